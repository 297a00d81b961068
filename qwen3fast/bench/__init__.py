"""Tokens per second with and without the KV cache: measure, record as JSON, show as table and plot."""
