"""Engines that generate, train and compute signals, behind the interfaces of `rhythm.engines.interfaces`."""
