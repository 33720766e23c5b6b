"""One stream through the published formulation and through ours: time, memory and quality as experts grow."""
