"""Engines of one machine: transformers generates, torch trains, `observe` reads attention."""
