"""GGUF files of llama.cpp (optional package gguf): header, config, tokenizer, layout of tensors, weights."""
