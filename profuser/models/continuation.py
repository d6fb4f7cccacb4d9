"""Lets a model continue a batch of prompts token by token. Rows that have ended leave the batch when half of it has.

Every row draws its tokens with random numbers of its own, so that neither the other rows of a batch nor their number decide what
is drawn.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, LogitsProcessor, PreTrainedModel, StoppingCriteria
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from profuser.models.padding import padded

SELECTABLE = (DynamicLayer, DynamicSlidingWindowLayer)
"""The layers of a cache whose rows can be taken out. Rows of any other cache are read again."""


class Sampling(NamedTuple):
    """A rule of sampling: the temperature, above 0, and the share of the probability that is sampled from."""

    temperature: float
    top_p: float


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    ends: Collection[int],
    pad: int,
    rooms: Sequence[int],
    sampling: Sampling | None = None,
    draws: Sequence[np.ndarray] = (),
) -> list[list[int]]:
    """Continues every prompt of a batch with the tokens that a model writes, up to and with the first of `ends`.

    Args:
        ends: the ids that end a row. pad: the id that rows are padded with, which the model must have a row for.
        rooms: how many tokens each row may have, at least 1.
        sampling: None takes the most probable token.
        draws: for each row, a number in [0, 1) for every token that it may have. They are used with `sampling` alone.
    """
    rooms = list(rooms)
    ids, mask = (x.to(model.device) for x in padded(prompts, pad, left=True))
    width = ids.shape[1]
    written: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # those that go on
    cache: Cache | None = None
    # What a generation config of the model's own says of sampling and of repetitions would change the answers.
    usual: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0, "return_dict_in_generate": True}
    while rows:
        done = ids.shape[1] - width
        halt = _HalfHasEnded(ends, [rooms[row] - done for row in rows])
        drawn = [_Drawn(sampling, [draws[row] for row in rows], width)] if sampling else []
        out = model.generate(  # pyrefly: ignore[not-callable]  # a PreTrainedModel may have it, from GenerationMixin
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=max(rooms[row] for row in rows) - done,
            eos_token_id=sorted(ends),
            pad_token_id=pad,
            stopping_criteria=[halt],
            logits_processor=drawn,
            **usual,
        )
        new = out.sequences[:, ids.shape[1] :].tolist()
        going = []
        for place, (row, tokens) in enumerate(zip(rows, new, strict=True)):
            tokens = tokens[: rooms[row] - len(written[row])]
            end = next((t for t, token in enumerate(tokens) if token in ends), None)
            written[row] += tokens if end is None else tokens[: end + 1]
            if end is None and len(written[row]) < rooms[row]:
                going.append(place)
        if going:
            ids, mask, cache = _kept(out, mask, torch.tensor(going, device=ids.device))
        rows = [rows[place] for place in going]
    return written


def _kept(out: Any, mask: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Cache | None]:
    """The rows of a batch that go on: their ids, their mask and, where it can be kept, their part of the cache."""
    ids = out.sequences[places]
    mask = mask[places]
    mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], 1)
    cache = getattr(out, "past_key_values", None)
    if not isinstance(cache, Cache) or not all(type(layer) in SELECTABLE for layer in cache.layers):
        return ids, mask, None
    if cache.get_seq_length() != ids.shape[1] - 1:  # the last token is always still to be read
        return ids, mask, None
    cache.batch_select_indices(places)
    return ids, mask, cache


class _HalfHasEnded(StoppingCriteria):
    """Stops a batch when at most half of its rows go on.

    Args:
        ends: the ids that end a row. rooms: how many more tokens each row may have.
    """

    def __init__(self, ends: Collection[int], rooms: Sequence[int]):
        self.ends, self.rooms, self.steps = sorted(ends), rooms, 0
        self.ended: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        self.steps += 1
        full = torch.tensor([self.steps >= room for room in self.rooms], device=input_ids.device)
        last = torch.isin(input_ids[:, -1], torch.tensor(self.ends, device=input_ids.device))
        self.ended = full | last if self.ended is None else self.ended | full | last
        return torch.full_like(self.ended, bool(2 * self.ended.sum() >= len(self.ended)))


class _Drawn(LogitsProcessor):
    """Draws the next token of every row, with a number that the row has for it, and leaves no other possible.

    The token is the first one, in the order of the ids, behind which the share `draws` of the probability lies. So a difference in the
    last bits of the logits, which the shape of a batch makes, changes a draw only where it lies that near to a boundary.

    Args:
        draws: for each row, a number in [0, 1) for every token that it may have.
        width: how many ids stand before the first token that is drawn.
    """

    def __init__(self, sampling: Sampling, draws: Sequence[np.ndarray], width: int):
        self.sampling, self.width = sampling, width
        # A row that has all its tokens goes on with the others, and what it draws is not used.
        self.draws = np.zeros((len(draws), max(map(len, draws))))
        for row, of_row in zip(self.draws, draws):
            row[: len(of_row)] = of_row

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        probabilities = torch.softmax(scores.double() / self.sampling.temperature, -1)
        if self.sampling.top_p < 1:
            # The most probable tokens until they hold the share, the one that reaches it among them.
            ordered, order = probabilities.sort(descending=True, stable=True)
            beyond = ordered.cumsum(-1) - ordered >= self.sampling.top_p
            probabilities = probabilities.masked_fill(beyond.scatter(-1, order, beyond), 0.0)
        reached = probabilities.cumsum(-1)
        draw = torch.from_numpy(self.draws[:, input_ids.shape[1] - self.width]).to(reached)[:, None] * reached[:, -1:]
        # Rounding must not carry a draw beyond the last token that can be drawn.
        draw = torch.minimum(draw, torch.nextafter(reached[:, -1:], torch.zeros_like(draw)))
        token = torch.searchsorted(reached, draw, right=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)
