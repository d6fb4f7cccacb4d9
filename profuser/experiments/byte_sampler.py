"""A language model as a distribution over byte strings: it samples continuations of a text that is cut at any byte.

The bytes before a cut do not determine the tokens: `the` may be one token, or `t` and `he`, or the beginning of `there`. A
cover of the bytes x is a token sequence that begins with x, and whose tokens but the last are shorter than x. Given x, a
cover s is drawn with the probability

    P(s | x) = P(s) / P(x),    P(x) = sum of P(s) over the covers s of x.

`covers` enumerates the covers with their probabilities; `continuations` draws covers and goes on with the model from there.

Two approximations are made on purpose. Only covers that begin with the given history are enumerated: tokens other than the
tokenizer's own are allowed from a cut a few words back, and not in the whole text. A partial cover is not followed if its
posterior probability, given the bytes up to its own end, is below `floor`; the sum of what was left out is returned. The
model is a function from token histories to log-probabilities, so the same code runs on a table.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

from profuser.models.branches import Branches
from profuser.models.head import head_layer

History = tuple[int, ...]
LogProbs = Callable[[Sequence[History]], np.ndarray]
"""Takes n histories, and gives natural log-probabilities of the next token, (n, V) float32."""

MAX_ROWS = 256  # so many histories go to the model at a time; at V = 49152 their log-probabilities take 50 MB


class ByteVocab:
    """A vocabulary in the order of its tokens' bytes. Control tokens have no bytes, and a sample ends with such a token."""

    def __init__(self, pieces: Sequence[bytes | None]):
        self.pieces = pieces
        self.order = np.array(sorted((i for i, p in enumerate(pieces) if p), key=lambda i: (pieces[i], i)))
        self._sorted = [pieces[i] for i in self.order]

    def range_of(self, prefix: bytes) -> tuple[int, int]:
        """The range [lo, hi) of `order` with the tokens whose bytes are `prefix` or begin with it."""
        lo = bisect.bisect_left(self._sorted, prefix)
        hi = bisect.bisect_left(self._sorted, True, lo=lo, key=lambda piece: piece[: len(prefix)] > prefix)
        return lo, hi

    def count_equal(self, piece: bytes) -> int:
        """How many tokens have exactly these bytes."""
        return bisect.bisect_right(self._sorted, piece) - bisect.bisect_left(self._sorted, piece)


@dataclass(slots=True)
class Covers:
    """The covers of some bytes: every cover without its last token, and the tokens that may be its last one.

    A cover is histories[i] followed by tokens[i][n], and its probability is masses[i][n]. Only strip[i] bytes of the last
    token are among the given bytes: the rest of it, pieces[token][strip[i]:], already belongs to the continuation.
    """

    histories: list[History] = field(default_factory=list)
    strip: list[int] = field(default_factory=list)
    tokens: list[np.ndarray] = field(default_factory=list)
    masses: list[np.ndarray] = field(default_factory=list)
    pruned: float = 0.0  # an upper bound of the posterior probability of all partial covers that were not followed


def covers(logprobs: LogProbs, vocab: ByteVocab, data: bytes, *, floor: float = 1e-4) -> Covers:
    """All covers of `data`. Without any bytes the result is empty, which stands for the history as it is."""
    found = Covers()
    if not data:
        return found
    reach = np.zeros(len(data) + 1)  # reach[n] is the probability that the text begins with data[:n]
    reach[0] = 1.0
    # By the number of bytes that they hold: the partial covers that are still to be followed, with their probabilities.
    waiting: dict[int, list[tuple[History, float]]] = {0: [((), 1.0)]}
    while waiting:
        begin = min(waiting)
        partial = waiting.pop(begin)
        kept = [(history, p) for history, p in partial if p >= floor * reach[begin]]
        found.pruned += sum(p for _, p in partial if p < floor * reach[begin]) / reach[begin]
        rest = data[begin:]
        ranges = np.array([vocab.range_of(rest[:length]) for length in range(1, len(rest) + 1)])
        lo, hi = ranges[-1]
        for first in range(0, len(kept), MAX_ROWS):
            some = kept[first : first + MAX_ROWS]
            for (history, p), row in zip(some, logprobs([history for history, _ in some]), strict=True):
                masses = p * np.exp(row[vocab.order].astype(np.float64))
                summed = np.concatenate([[0.0], masses.cumsum()])
                reach[begin + 1 :] += summed[ranges[:, 1]] - summed[ranges[:, 0]]
                found.histories.append(history)
                found.strip.append(len(rest))
                found.tokens.append(vocab.order[lo:hi])
                found.masses.append(masses[lo:hi])
                for length, (first_equal, _) in enumerate(ranges[:-1], start=1):
                    # In byte order, tokens that are exactly these bytes come before those that only begin with them.
                    for n in range(first_equal, first_equal + vocab.count_equal(rest[:length])):
                        waiting.setdefault(begin + length, []).append(((*history, int(vocab.order[n])), masses[n]))
    return found


@dataclass(slots=True)
class Continuation:
    """The bytes that follow a cut in one sample.

    `ended_by` is the token that ended the text; it is None where sampling was stopped.
    """

    data: bytes
    ended_by: int | None = None


def continuations(
    logprobs: LogProbs,
    vocab: ByteVocab,
    found: Covers,
    n: int,
    rng: np.random.Generator,
    finished: Callable[[bytes], bool],
    *,
    max_tokens: int = 64,
) -> list[Continuation]:
    """Draws n independent samples of what follows the covered bytes.

    A sample ends when `finished` holds for its bytes, when a token without bytes comes, or after `max_tokens` tokens. Equal
    histories are given to the model only once, so the samples cost the more, the more they differ.
    """
    histories, samples = _drawn_covers(vocab, found, n, rng)
    active = [i for i in range(n) if not finished(samples[i].data)]
    for _ in range(max_tokens):
        groups: dict[History, list[int]] = {}
        for i in active:
            groups.setdefault(histories[i], []).append(i)
        unique = list(groups)
        active = []
        for first in range(0, len(unique), MAX_ROWS):
            some = unique[first : first + MAX_ROWS]
            for history, row in zip(some, logprobs(some), strict=True):
                summed = np.exp(row, dtype=np.float64).cumsum()
                members = groups[history]
                for i, token in zip(members, _inverse(summed, rng.random(len(members))).tolist(), strict=True):
                    piece = vocab.pieces[token] if token < len(vocab.pieces) else None
                    if not piece:
                        samples[i].ended_by = token
                        continue
                    histories[i] = (*history, token)
                    samples[i].data += piece
                    if not finished(samples[i].data):
                        active.append(i)
        if not active:
            break
    return samples


def _drawn_covers(vocab: ByteVocab, found: Covers, n: int, rng) -> tuple[list[History], list[Continuation]]:
    if not found.histories:
        return [()] * n, [Continuation(b"") for _ in range(n)]
    owner = np.repeat(np.arange(len(found.histories)), [len(t) for t in found.tokens])
    tokens = np.concatenate(found.tokens)
    drawn = _inverse(np.concatenate(found.masses).cumsum(), rng.random(n))
    histories, samples = [], []
    for i, token in zip(owner[drawn].tolist(), tokens[drawn].tolist(), strict=True):
        histories.append((*found.histories[i], token))
        samples.append(Continuation(vocab.pieces[token][found.strip[i] :]))
    return histories, samples


def _inverse(summed: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Indices in proportion to masses, of which `summed` holds the running sums; u in [0, 1) is uniform."""
    return np.minimum(np.searchsorted(summed, u * summed[-1], side="right"), len(summed) - 1)


class TextModel:
    """A model that has read one text, and that can go on from any token of it along many histories.

    Args:
        model: any causal Hugging Face model whose attention takes a 4-D mask. It should be in fp32, because its
            distributions are compared.
        lead: the tokens in front of the text.
        ids: the text's tokens.
    Attributes:
        hidden: (len(ids) + 1, D), the states that predict tokens 0 to len(ids) of the text.
    """

    def __init__(self, model: PreTrainedModel, lead: Sequence[int], ids: Sequence[int]):
        self._head, self._lead = head_layer(model), len(lead)
        self._branches = Branches(model, [*lead, *ids], "use another model")
        self.hidden = self._branches.hidden[self._lead - 1 :]

    def after(self, cut: int) -> LogProbs:
        """The model behind the text's first `cut` tokens, where the histories begin. It forgets the histories of earlier calls."""
        self._branches.forget()

        @torch.inference_mode()
        def logprobs(histories: Sequence[History]) -> np.ndarray:
            states = self._branches.states([(self._lead + cut, history) for history in histories])
            return self._head(states).float().log_softmax(-1).numpy()

        return logprobs
