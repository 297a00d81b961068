"""Servers of other engines, for compare_servers.py: their setup, weights and processes."""
