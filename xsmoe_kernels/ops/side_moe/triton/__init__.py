"""Triton kernels of `side_moe` and `side_moe_group`. `forward.py` and `backward.py` launch them."""
