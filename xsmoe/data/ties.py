"""An order for interactions with equal timestamps that depends only on a seed, the user and the item."""

import hashlib
from collections.abc import Iterable

import numpy as np

from xsmoe.data.repeats import factorize
from xsmoe.data.splitmix import mix


def tie_keys(users: np.ndarray, items: np.ndarray, seed: int) -> np.ndarray:
    """Return a sort key for each interaction, to order interactions with equal timestamps.

    The key is a hash of the seed and the two names (BLAKE2b, then the finalizer of SplitMix64). It is the same in every
    process and on every machine. It does not depend on the order of the interactions or on user and item numbers.

    Args:
        users, items: (N,) object arrays of str.
        seed: at least 0.

    Returns:
        (N,) uint64.
    """
    hashes = []
    for names, purpose in ((users, b"user"), (items, b"item")):
        distinct, places = factorize(names)
        hashes.append(_hash_names(distinct, seed, purpose)[places])
    return mix(hashes[0] + mix(hashes[1]))


def _hash_names(names: Iterable[str], seed: int, purpose: bytes) -> np.ndarray:
    key = seed.to_bytes(max(1, -(-seed.bit_length() // 8)), "little")
    start = hashlib.blake2b(digest_size=8, key=hashlib.blake2b(key).digest(), person=purpose)

    def digest(name: str) -> bytes:
        state = start.copy()
        state.update(name.encode())
        return state.digest()

    return np.frombuffer(b"".join(map(digest, names)), "<u8").astype(np.uint64)
