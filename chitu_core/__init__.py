"""Tensors, processes and configuration; nothing here knows diffusion."""

__version__ = "0.1.0"
