"""Fused operations: each has an eager form, which is its definition, and a Triton kernel for a GPU."""
