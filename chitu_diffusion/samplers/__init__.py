"""Solvers of the flow ODE, one file each, found by file name; every `Sampler` has the same interface."""
