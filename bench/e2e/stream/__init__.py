"""One stream through the paper's formulation and ours: time, memory and quality as experts grow."""
