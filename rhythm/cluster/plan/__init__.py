"""What a cluster would put where, and whether it can: arithmetic before anything starts."""
