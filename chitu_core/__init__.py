"""Tensors, processes and configuration; nothing here knows diffusion."""
