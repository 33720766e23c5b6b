"""Benchmarks: `python -m bench`. How to run and read them: docs/benchmarking.md."""
