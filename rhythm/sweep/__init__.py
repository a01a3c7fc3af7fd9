"""A sweep: one configuration trained by several methods and seeds, its results kept as two CSV files."""
