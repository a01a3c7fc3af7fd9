"""Engines in a single process: transformers generates, torch trains, `rhythm.observe` computes signals."""
