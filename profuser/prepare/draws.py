"""The random numbers with which responses are sampled. They follow from the seed, the source, the example and the number of the
response, so that a response does not depend on what else is answered, in which order and by how many processes."""

from __future__ import annotations

import hashlib

import numpy as np


def draws_of(seed: int, of: str, example: int, response: int, count: int) -> np.ndarray:
    """Returns `count` numbers in [0, 1), one for every token of a response.

    Args:
        of: whose responses are sampled, and for what, such as "scholar train".
        example: the number of the example in its split. response: the number of the response to it.
    """
    return np.random.Generator(np.random.Philox(key=_key(seed, of, example, response))).random(count)


def seed_of(seed: int, of: str, example: int, response: int) -> int:
    """Returns a seed below 2**31 for an engine that has a sampler of its own. The arguments are those of `draws_of`."""
    return _key(seed, of, example, response) & 0x7FFFFFFF


def _key(seed: int, of: str, example: int, response: int) -> int:
    digest = hashlib.sha256(f"{seed} {of} {example} {response}".encode()).digest()
    return int.from_bytes(digest[:16], "little")
