"""The kernels compiled ahead for GPUs that are not there, and what their machine code holds."""
