"""Benchmarks: a registry of ops, a correctness check, and a run that times the ops in interleaved rounds.

`python -m benchmarks.run --device cpu`. Nothing here imports transformers, because the repository's root is on sys.path
then, and its kernels/ would shadow Hugging Face's package of that name.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the repository
