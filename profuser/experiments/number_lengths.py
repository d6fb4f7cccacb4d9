"""How many digits a model gives its next number: the probability of each length, summed over the model's own tokens.

A number of two digits may be one token or two, so its length is no matter of one row. From the place where a number begins all
continuations with digits are followed, row by row: what does not go on with a digit ends the number. Of the improbable ones of a
row only some are followed, each with the mass FLOOR. They are drawn at equal distances of mass from a random beginning, so that
on average every continuation has its own mass.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from profuser.models.padding import padded
from profuser.text.chat import ChatFormat

LONGEST = 5
"""Numbers of so many digits and more are counted together."""
FLOOR = 0.02
"""Continuations that are less probable than this are drawn from."""
BATCH = 128


@torch.no_grad()
def number_lengths(model: PreTrainedModel, chat: ChatFormat, places: Sequence[Sequence[int]]) -> np.ndarray:
    """The probabilities of the length of the number that a model writes next.

    Args:
        places: for each place the ids before it.
    Returns:
        (places, LONGEST + 1) float64: the probability that no number follows, and that one of 1, 2, ... LONGEST or more digits
        does. What is drawn is unbiased, but a row adds up to 1 on average only.
    """
    tokens = [(i, len(token)) for token, i in chat.tokenizer.get_vocab().items() if token.isdecimal()]
    ids, sizes = (np.array(column) for column in zip(*sorted(tokens)))
    found = np.zeros((len(places), LONGEST + 1))
    rng = np.random.default_rng(0)
    front = [(place, list(before), 0, 1.0) for place, before in enumerate(places)]
    while front:
        following = []
        for first in range(0, len(front), BATCH):
            batch = front[first : first + BATCH]
            input_ids, mask = padded([before for _, before, _, _ in batch], chat.tokenizer.pad_token_id)
            last = mask.sum(1) - 1
            logits = model(input_ids=input_ids, attention_mask=mask).logits[torch.arange(len(batch)), last]
            rows = logits.double().softmax(-1)[:, torch.from_numpy(ids)].numpy()
            for (place, before, digits, mass), row in zip(batch, rows, strict=True):
                found[place, digits] += mass * (1.0 - row.sum())
                lengths = np.minimum(digits + sizes, LONGEST)
                goes_on = mass * row
                found[place, LONGEST] += goes_on[lengths == LONGEST].sum()
                open_ended = lengths < LONGEST
                probable = np.flatnonzero(open_ended & (goes_on >= FLOOR))
                rest = np.where(open_ended & (goes_on < FLOOR), goes_on, 0.0).cumsum()
                points = np.arange(rng.random() * FLOOR, rest[-1], FLOOR) if rest[-1] > 0 else []
                drawn = np.searchsorted(rest, points, side="right")
                for chosen, masses in ((probable, goes_on[probable]), (drawn, np.full(len(drawn), FLOOR))):
                    following += [
                        (place, [*before, int(ids[n])], int(lengths[n]), float(m))
                        for n, m in zip(chosen, masses, strict=True)
                    ]
        front = following
    return found


def against(said: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """How well the lengths that a model says agree with the true ones, as means over the places.

    Args:
        said: what `number_lengths` returned.
        true: (places, LONGEST), the true probabilities of 1, 2, ... LONGEST digits.
    Returns:
        right: the mass on which both agree, sum min(said, true); where the true length is certain, it is its probability.
        bias: by how many digits the numbers are longer than the true ones on average.
        shorter, longer, none: the mass on numbers that are shorter than every possible one, or longer, and on no number.
    """
    lengths = np.arange(1, LONGEST + 1)
    numbers = said[:, 1:]
    written = numbers.sum(1) > 0
    known = numbers[written] / numbers[written].sum(1, keepdims=True)
    possible = true > 0
    least, most = possible.argmax(1), LONGEST - 1 - possible[:, ::-1].argmax(1)
    place = np.arange(LONGEST)
    return {
        "right": float(np.minimum(numbers, true).sum(1).mean()),
        "bias": float(((known - true[written]) @ lengths).mean()) if written.any() else float("nan"),
        "shorter": float((numbers * (place < least[:, None])).sum(1).mean()),
        "none": float(said[:, 0].mean()),
        "longer": float((numbers * (place > most[:, None])).sum(1).mean()),
    }
