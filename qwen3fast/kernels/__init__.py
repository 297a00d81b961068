"""Fast forms of a few operations, each with its plain PyTorch reference."""
