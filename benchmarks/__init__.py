"""Speed and memory, measured: `python -m benchmarks.decode --help`. Results are kept in `benchmarks/results/`.

Every benchmark warms up, synchronises, checks what it times against a reference in the same run, puts a dense baseline
beside every figure, and prints one JSON line last. Not installed with the package.
"""
