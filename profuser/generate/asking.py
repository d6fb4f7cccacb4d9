"""Answers that wait for models: one alone, or several side by side, with one forward pass for all that wait for the same model.

Whatever decodes is a coroutine. Where it needs to know how likely a model's next tokens are, it awaits an `Ask`, and whoever runs
it computes what it asks for. So the ways of decoding need not know whether there are other prompts beside theirs.
"""

from __future__ import annotations

from collections.abc import Coroutine, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from profuser.kernels.head import ChunkedHead, Head
from profuser.models.branches import Branch, Branches, states_together

T = TypeVar("T")

HEAD_ROWS = 64
"""So many rows of logits are computed at a time. They take much memory where a vocabulary is large."""


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """What somebody waits for: the log-probabilities (n, V) in fp32 of the next token behind each of n branches of a text.

    head: the model's. read: the text as the model has read it. ids: the tokens that it has to become first.
    """

    head: Head
    read: Branches
    ids: Sequence[int]
    branches: Sequence[Branch]

    def __await__(self) -> Generator[Ask, Tensor, Tensor]:
        return (yield self)


Waiting = Coroutine[Ask, Tensor, T]
"""A coroutine that gives a T, and awaits nothing but what is asked of models."""


def alone(answer: Waiting[T]) -> T:
    """Runs one coroutine to its end."""
    said = None
    while True:
        try:
            ask = answer.send(said)  # pyrefly: ignore[bad-argument-type]  # a coroutine is begun with None
        except StopIteration as end:
            return end.value
        (said,) = _said([ask])


def side_by_side(answers: Iterable[Waiting[T]], at_once: int) -> Iterator[T]:
    """Runs coroutines, `at_once` of them at a time: where one has ended, the next one begins.

    Of all models, that is asked next for which most of them wait. Those that wait for another one are joined meanwhile by others, so
    that they do not fall apart into many small groups.

    Yields:
        What they give, in their order.
    """
    coming = enumerate(answers)
    running: dict[int, Waiting[T]] = {}
    waiting: dict[int, Ask] = {}
    done: dict[int, T] = {}
    shown = 0

    def go_on(number: int, said: Tensor | None) -> None:
        try:
            waiting[number] = running[number].send(said)  # pyrefly: ignore[bad-argument-type]  # begun with None
        except StopIteration as end:
            del running[number]
            done[number] = end.value

    try:
        while True:
            while len(running) < at_once and (begun := next(coming, None)) is not None:
                running[begun[0]] = begun[1]
                go_on(begun[0], None)
            while shown in done:
                yield done.pop(shown)
                shown += 1
            if not running:
                return
            groups: dict[int, list[int]] = {}
            for number, ask in waiting.items():
                groups.setdefault(id(ask.head), []).append(number)
            largest = max(groups.values(), key=len)
            for number, said in zip(largest, _said([waiting.pop(number) for number in largest])):
                go_on(number, said)
    finally:
        for answer in running.values():
            answer.close()


@torch.no_grad()
def _said(asks: Sequence[Ask]) -> Iterator[Tensor]:
    """What is asked of one model."""
    states = states_together([(ask.read, ask.ids, ask.branches) for ask in asks])
    first = 0
    while first < len(asks):
        # As many as the head's rows allow, but at least one.
        last, rows = first + 1, len(states[first])
        while last < len(asks) and rows + len(states[last]) <= HEAD_ROWS:
            rows, last = rows + len(states[last]), last + 1
        yield from _log_probabilities(asks[first].head, torch.cat(states[first:last])).split(
            [len(of) for of in states[first:last]]
        )
        first = last


def _log_probabilities(head: Head, hidden: Tensor) -> Tensor:
    """(n, V) fp32, of the next token behind each of n states."""
    logits = torch.empty(len(hidden), len(head.weight), device=hidden.device)
    return ChunkedHead(head, torch.float32, HEAD_ROWS).logits_into(logits, hidden.float()).log_softmax(-1)
