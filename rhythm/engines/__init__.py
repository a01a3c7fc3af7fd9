"""What does the work: Infer, Train and Attn, each behind an interface of `rhythm.engines.interfaces`."""
