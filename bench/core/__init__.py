"""Variants, inputs, the correctness check, timing, memory, the speed-of-light bound and result records."""
