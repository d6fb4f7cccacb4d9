"""The random numbers with which responses are sampled. They follow from the seed, the source, the prompt and the number of the
response, so that a response does not depend on what else is answered, in which order and by how many processes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from profuser.prepare.data import prompt_digest
from profuser.text.conversation import Prompt


def names_of(prompts: Sequence[Prompt]) -> list[str]:
    """Returns what stands for each prompt in the draws: a digest of it, and how many of the prompts before it are the same."""
    seen: Counter[str] = Counter()
    names = []
    for prompt in prompts:
        digest = prompt_digest(prompt).hex()
        names.append(f"{digest[:32]} {seen[digest]}")
        seen[digest] += 1
    return names


def draws_of(seed: int, of: str, prompt: str, response: int, count: int) -> np.ndarray:
    """Returns `count` numbers in [0, 1), one for every token of a response.

    Args:
        of: whose responses are sampled, and for what, such as "scholar train".
        prompt: what stands for the prompt (`names_of`). response: the number of the response to it.
    """
    return np.random.Generator(np.random.Philox(key=_key(seed, of, prompt, response))).random(count)


def seed_of(seed: int, of: str, prompt: str, response: int) -> int:
    """Returns a seed below 2**31 for an engine that has a sampler of its own. The arguments are those of `draws_of`."""
    return _key(seed, of, prompt, response) & 0x7FFFFFFF


def _key(seed: int, of: str, prompt: str, response: int) -> int:
    digest = hashlib.sha256(f"{seed} {of} {prompt} {response}".encode()).digest()
    return int.from_bytes(digest[:16], "little")
