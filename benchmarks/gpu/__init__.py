"""The benchmark on a GPU: python -m benchmarks.run --device cuda, or make gpu.

`--device interpreter` runs the same code at tiny shapes on the CPU, where Triton's interpreter stands in.
"""
