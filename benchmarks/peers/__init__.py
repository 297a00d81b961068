"""Adapters for other engines; `benchmarks/compare_peers.py` runs them."""
