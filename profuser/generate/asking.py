"""Answers that wait for models: one alone, or several side by side, with one forward pass for all that wait for the same model.

Whatever decodes is a coroutine. Where it needs to know how likely a model's next tokens are, it awaits an `Ask`, and whoever runs
it computes what it asks for. So the ways of decoding need not know whether there are other prompts beside theirs.
"""

from __future__ import annotations

from collections.abc import Coroutine, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

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


@dataclass(frozen=True, slots=True, eq=False)
class _Parts:
    """What somebody waits for who has several things done that do not wait for each other."""

    parts: Sequence[Waiting[Any]]

    def __await__(self) -> Generator[_Parts, list[Any], list[Any]]:
        return (yield self)


Waiting = Coroutine[Ask | _Parts, Any, T]
"""A coroutine that gives a T, and awaits nothing but what is asked of models."""


async def each(parts: Iterable[Waiting[T]]) -> list[T]:
    """What coroutines give that do not wait for each other, in their order."""
    waited_for = list(parts)
    return await _Parts(waited_for) if waited_for else []


def alone(answer: Waiting[T]) -> T:
    """Runs one coroutine to its end."""
    return next(side_by_side([answer], 1))


def side_by_side(answers: Iterable[Waiting[T]], at_once: int) -> Iterator[T]:
    """Runs coroutines, `at_once` of them at a time: where one has ended, the next one begins. If it is 1, every model reads one text at
    a time.

    Of all models, that is asked next for which most of them wait. Those that wait for another one are joined meanwhile by others, so
    that they do not fall apart into many small groups.

    Yields:
        What they give, in their order.
    """
    coming = iter(answers)
    running: list[_Task] = []  # in the order of the answers; those that have ended stay until it is their turn
    waiting: list[tuple[_Task, Ask]] = []
    try:
        while True:
            while sum(not task.ended for task in running) < at_once and (begun := next(coming, None)) is not None:
                running.append(_Task(begun, waiting))
                running[-1].go_on(None)
            while running and running[0].ended:
                yield running.pop(0).result
            if not running:
                return
            groups: dict[int, list[tuple[_Task, Ask]]] = {}
            for task, ask in waiting:
                groups.setdefault(id(ask.head), []).append((task, ask))
            group = max(groups.values(), key=len)
            if at_once == 1:  # two sources may be one model, which then is not proven to read several texts together
                group = group[:1]
            waiting[:] = [other for other in waiting if other not in group]
            for (task, _), said in zip(group, _said([ask for _, ask in group]), strict=True):
                task.go_on(said)
    finally:
        for task in running:
            task.close()


class _Task:
    """A coroutine that is run, with the parts of it that it waits for.

    Args:
        waiting: takes what is asked of models, with who asks.
        whole: whose part it is.
    """

    def __init__(self, coroutine: Waiting[Any], waiting: list[tuple[_Task, Ask]], whole: _Task | None = None):
        self._coroutine, self._waiting, self._whole = coroutine, waiting, whole
        self._parts: list[_Task] = []
        self.ended = False
        self.result: Any = None

    def go_on(self, said: Any) -> None:
        """Gives the coroutine what it waits for, and runs it until it waits for something else."""
        try:
            wanted = self._coroutine.send(said)
        except StopIteration as end:
            self.ended, self.result = True, end.value
            if self._whole is not None:
                self._whole._part_ended()
            return
        if isinstance(wanted, Ask):
            self._waiting.append((self, wanted))
            return
        self._parts = [_Task(part, self._waiting, self) for part in wanted.parts]
        for part in list(self._parts):
            part.go_on(None)

    def _part_ended(self) -> None:
        if all(part.ended for part in self._parts):
            results, self._parts = [part.result for part in self._parts], []
            self.go_on(results)

    def close(self) -> None:
        """Ends the coroutine where it stands."""
        for part in self._parts:
            part.close()
        self._coroutine.close()


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
