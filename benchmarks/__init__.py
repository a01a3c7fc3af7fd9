"""Benchmarks: a registry of ops, a gate that checks them, and a run that times them side by side.

`python -m benchmarks.run --device cpu`. Nothing here imports transformers: the repository's root is on sys.path then,
and its kernels/ must not be taken for Hugging Face's package of that name.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the repository
