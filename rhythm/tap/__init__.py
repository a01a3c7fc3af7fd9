"""A transformers model → signals: attention is read while a forward pass runs."""
