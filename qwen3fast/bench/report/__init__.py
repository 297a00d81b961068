"""`python -m qwen3fast.bench report`: records as one HTML page that needs nothing else."""
