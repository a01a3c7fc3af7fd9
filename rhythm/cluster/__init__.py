"""Many machines, one trainer: which process does what, where it stands, and what happens when one is lost."""
