"""Plans a cluster run from its configuration before anything starts: placement, memory and checks."""
