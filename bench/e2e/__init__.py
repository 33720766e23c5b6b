"""End-to-end benchmarks: training steps, their memory, whole streams, and recommendation quality."""
