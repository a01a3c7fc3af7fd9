"""Compiles the kernels ahead of time, for any GPU, and reads their machine code."""
