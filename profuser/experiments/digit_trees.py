"""A model that writes numbers digit by digit, as a distribution over whole numbers and as a source of multi-digit tokens.

Where single digits are its only tokens of numbers, the model tells the probability of every string of digits exactly:

    P(begins with d1 d2 d3) = P(d1) P(d2 | d1) P(d3 | d1 d2),    P(is d1 d2) = P(d1) P(d2 | d1) (1 - P(a digit | d1 d2)).

From the same products a source is composed that has all tokens of one to three digits, as DeepSeek-V3's tokenizer has them:
a token of three digits has the probability that these digits are written, a shorter one the probability that the number also
ends there. All other tokens keep the model's own probabilities.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from profuser.errors import DataError
from profuser.experiments.byte_sampler import MAX_ROWS, LogProbs
from profuser.store.files import write_atomic

DIGITS = "0123456789"
GROUP = 3  # the composed source's tokens have up to so many digits
MAX_DIGITS = 12  # longer strings are not followed; the model may go on with zeros for ever


@dataclass(slots=True)
class DigitTree:
    """What the model writes where a number may begin or go on.

    following: for strings of digits the probabilities of the ten digits that may come next, (10,) float64. What they leave
        to 1 is the probability that the number ends. The strings that are not in it were not followed.
    """

    following: dict[str, np.ndarray]

    @classmethod
    def of_one(cls, probabilities: np.ndarray) -> DigitTree:
        """The tree in which only the first digit is followed."""
        return cls({"": probabilities})

    def numbers(self, longest: int | None = None) -> Iterator[tuple[str, float, bool]]:
        """The numbers that may be written here, as (digits, probability, whether this is exact).

        Digits that were not followed stand for all numbers that begin with them, which is not exact. Digits whose number is
        `longest` stand for all numbers that begin with them, too, and this is meant.
        """
        waiting = [("", 1.0)]
        while waiting:
            digits, mass = waiting.pop()
            follow = self.following.get(digits)
            if follow is None or len(digits) == longest:
                yield digits, mass, len(digits) == longest
                continue
            if digits:
                yield digits, mass * max(1.0 - float(follow.sum()), 0.0), True
            waiting += [(digits + digit, mass * p) for digit, p in zip(DIGITS, follow.tolist(), strict=True)]


def grow(logprobs: LogProbs, digit_ids: Sequence[int], floor: float) -> DigitTree:
    """Follows the strings of fewer than GROUP digits, and the longer ones whose probability is at least `floor`.

    Args:
        logprobs: the model behind the text before the tree.
        digit_ids: the model's tokens of the ten digits.
    """
    following: dict[str, np.ndarray] = {}
    waiting = [("", 1.0)]
    while waiting:
        further = []
        for first in range(0, len(waiting), MAX_ROWS):
            some = waiting[first : first + MAX_ROWS]
            rows = logprobs([tuple(digit_ids[int(digit)] for digit in digits) for digits, _ in some])
            for (digits, mass), row in zip(some, rows, strict=True):
                follow = following[digits] = np.exp(row[list(digit_ids)].astype(np.float64))
                further += [(digits + digit, mass * p) for digit, p in zip(DIGITS, follow.tolist(), strict=True)]
        waiting = [(s, p) for s, p in further if len(s) < GROUP or (p >= floor and len(s) < MAX_DIGITS)]
    return DigitTree(following)


# --- the composed source ---------------------------------------------------------------------------------------------


def composed_tokenizer(tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedTokenizerFast, dict[str, int]]:
    """The model's tokenizer with tokens of one to GROUP digits, and the ids of these tokens by their digits.

    Numbers are cut into groups of GROUP digits from the left, and every group is one token. The new tokens have the ids
    behind all others.

    Raises:
        DataError: the tokenizer is not a BPE, or has other tokens with digits.
    """
    config = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab, merges = config["model"]["vocab"], config["model"]["merges"]
    longer = [token for token in vocab if len(token) > 1 and any(digit in token for digit in DIGITS)]
    if config["model"]["type"] != "BPE" or longer or not set(DIGITS) <= set(vocab):
        raise DataError(
            "--model must have a BPE tokenizer whose only tokens with digits are the ten digits, got "
            f"{config['model']['type']} with {longer[:3]}; SmolLM2 is such a model"
        )
    ids = {digit: vocab[digit] for digit in DIGITS}
    beyond = len(tokenizer)
    for length in range(2, GROUP + 1):
        for digits in map("".join, itertools.product(DIGITS, repeat=length)):
            ids[digits] = vocab[digits] = beyond
            beyond += 1
            # Both ways of merging a group lead to its token, so their order does not matter.
            merges += [list(cut) for cut in {(digits[:1], digits[1:]), (digits[:-1], digits[-1:])}]
    group = {"type": "Split", "pattern": {"Regex": f"[0-9]{{1,{GROUP}}}"}, "behavior": "Isolated", "invert": False}
    own = [config["pre_tokenizer"]] if config["pre_tokenizer"] else []
    config["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [group, *own]}
    composed = Tokenizer.from_str(json.dumps(config))
    return PreTrainedTokenizerFast(tokenizer_object=composed, eos_token=tokenizer.eos_token), ids


def composed_row(row: np.ndarray, tree: DigitTree, ids: dict[str, int]) -> np.ndarray:
    """The composed source's distribution where the model's is `row`.

    Args:
        row: (V,) probabilities.
        tree: what the model writes there. Behind a token of fewer than GROUP digits its digits have no probability, because the
            composed source writes such a token only where the number ends.
        ids: the composed source's tokens by their digits.
    Returns:
        (V',) float64 probabilities, which add up to 1.
    """
    composed = np.zeros(max(len(row), 1 + max(ids.values())))
    composed[: len(row)] = row
    composed[list(ids.values())] = 0.0
    for digits, mass, _ in tree.numbers(GROUP):
        composed[ids[digits]] = mass
    return composed / composed.sum()


# --- files -----------------------------------------------------------------------------------------------------------


def save_trees(path: Path, model: str, trees: dict[str, DigitTree]) -> None:
    """Writes the trees by the texts before them, with the fingerprint of the model that they are of."""
    strings = [digits for tree in trees.values() for digits in tree.following]
    rows = [row for tree in trees.values() for row in tree.following.values()]
    file = io.BytesIO()
    np.savez_compressed(
        file,
        model=np.array(model),
        texts=np.array(list(trees)),
        sizes=np.array([len(tree.following) for tree in trees.values()]),
        strings=np.array(strings),
        following=np.array(rows, np.float32).reshape(-1, len(DIGITS)),
    )
    write_atomic(path, file.getvalue())


def load_trees(path: Path, model: str) -> dict[str, DigitTree]:
    """Reads what `save_trees` wrote.

    Raises:
        DataError: the trees are of another model.
    """
    with np.load(path) as file:
        if (found := str(file["model"])) != model:
            raise DataError(
                f"{path} must hold the trees of this model ({model}), got those of {found}; name another file"
            )
        texts, strings, following = (
            file["texts"].tolist(),
            file["strings"].tolist(),
            file["following"].astype(np.float64),
        )
        ends = file["sizes"].cumsum().tolist()
    parts = zip(texts, [0, *ends[:-1]], ends, strict=True)
    return {text: DigitTree(dict(zip(strings[a:b], following[a:b], strict=True))) for text, a, b in parts}
