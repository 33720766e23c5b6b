"""The formulation of the XSMoE paper (arXiv 2508.05993): a baseline of the benchmarks and an oracle of the tests."""
