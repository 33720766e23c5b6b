"""SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), over arrays."""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""The increment of the generator's state."""


def mix(values: np.ndarray) -> np.ndarray:
    """Apply the generator's output function to values, uint64 of any shape."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
