"""Hand-chosen ways to run a few operations, each beside its plain PyTorch reference."""
