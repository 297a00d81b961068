"""Logits to a token: processors.py, samplers.py, constraints.py and, with the extra `structured`, grammar.py."""
