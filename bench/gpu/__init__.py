"""Build, tests, benchmarks and sanitizers on a machine with a GPU."""
