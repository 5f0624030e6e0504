"""Diffusion transformers: one file a family."""
