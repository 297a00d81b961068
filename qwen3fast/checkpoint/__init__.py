"""Checkpoints: a hub id, a folder, a GGUF file, the shipped tiny model or random numbers -> a model."""
