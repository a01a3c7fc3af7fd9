"""Triton kernels of rhythm, installed as ``rhythm.kernels``."""
