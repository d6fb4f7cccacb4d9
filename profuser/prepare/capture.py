"""Captures what a source says about a response: top-k log-probabilities, log-sum-exp and cross-entropy, teacher-forced.

The training mode scores the ground truth, the inference mode the response that won. Either goes through the source's own
tokenizer and chat template. The rows of a capture are the response's tokens and the end of turn: row j is the distribution
*of* the source's own token j, which the model emits one position earlier. Where a target token begins inside a source token,
the capture also holds a prefix range: of the source's tokens that begin with the bytes before that place it keeps the exact
mass of all and the top k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from profuser.alignment.follow_numbers import NumberFollower, NumberRow
from profuser.alignment.ranges import RangeRequest, flat_maps
from profuser.alignment.types import PrefixRanges, SourceCapture
from profuser.alignment.vocab_map import ByteOrder
from profuser.errors import is_lack_of_memory
from profuser.kernels.head import Head
from profuser.kernels.source_topk import source_topk
from profuser.models.batch import batch_of, on_device, placed
from profuser.models.head import hidden_states
from profuser.models.packing import Layout, Pass, by_tokens, size_of
from profuser.ragged import offsets_of
from profuser.store.layout import CAPTURE_COLUMNS, shard_arrays
from profuser.text.encoded import Encoded
from profuser.text.fit import Fitted, Verdict

LEAST = -60000.0
"""The lowest log-probability that is stored. fp16 can hold it, and nothing so improbable reaches a target."""


@dataclass(slots=True)
class ScoredResponse:
    """What one source says about one response.

    lse: (m,) float32, the log-sum-exp of every row's logits. nll: nats, summed over the response's tokens and the end of turn.
    tokens: the number of these rows, m. response_bytes: the length of the response.
    """

    capture: SourceCapture
    lse: np.ndarray
    nll: float
    tokens: int
    response_bytes: int

    def cross_entropy(self, unit: str) -> float:
        """Returns nats per own token or per byte of the response; +inf where the response is empty or the source gave NaN."""
        count = self.tokens if unit == "token" else self.response_bytes
        return self.nll / count if self.response_bytes and np.isfinite(self.nll) else float("inf")


@dataclass(frozen=True, slots=True)
class CaptureRequest:
    """One response that a source is to score.

    encoded: the conversation in the source's tokens. response_bytes: the length of the response.
    ranges: the prefix ranges that the alignment to the target's tokens needs.
    numbers: the rows whose numbers are followed.
    """

    encoded: Encoded
    response_bytes: int
    ranges: RangeRequest
    numbers: Sequence[NumberRow] = ()


@dataclass(frozen=True, slots=True)
class Numbered:
    """A request with its number among those that were made together."""

    number: int
    request: CaptureRequest

    @property
    def input_ids(self) -> list[int]:
        """The conversation in the source's tokens."""
        return self.request.encoded.input_ids


class BatchSize:
    """How much a source scores at a time: so many responses or tokens, until its memory does not suffice for them.

    Args:
        most: how many at first. unit: "responses", or "tokens", padding included.
        say: is called with a line where there are fewer from then on.
        layout: how the responses of so many tokens are laid into a forward pass. Those that are counted are padded.
    """

    def __init__(
        self,
        most: int,
        unit: Literal["responses", "tokens"] = "responses",
        say: Callable[[str], None] = print,
        layout: Layout = "padded",
    ):
        assert unit == "tokens" or layout == "padded"
        self.now, self.unit, self.layout, self._say = most, unit, layout, say

    def passes(self, asked: Sequence[Numbered]) -> list[Pass[Numbered]]:
        """Divides requests into forward passes of responses of similar length. It depends on these and on `now` alone."""
        if self.unit == "tokens":
            return by_tokens(asked, self.now, self.layout)
        ascending = sorted(asked, key=lambda one: len(one.input_ids))
        return [[[one] for one in ascending[n : n + self.now]] for n in range(0, len(ascending), self.now)]

    def halve(self, rows: Pass[Numbered]) -> None:
        """Takes half as many from now on as a pass had, for which the memory did not suffice.

        A pass may have fewer than there may be at a time: it would be tried again as it is, if that number were halved.
        """
        had = len(rows) if self.unit == "responses" else size_of(rows)
        self.now = had // 2
        self._say(f"for {had} {self.unit} at a time the memory does not suffice: from now on {self.now} at a time")


def capture_responses(
    model: PreTrainedModel,
    head: Head,
    requests: Sequence[CaptureRequest],
    byte_order: ByteOrder,
    *,
    top_k: int,
    batch_size: int | BatchSize,
    follower: NumberFollower | None = None,
) -> Iterator[tuple[int, ScoredResponse]]:
    """Scores responses with one source, several in a forward pass.

    Args:
        requests: the responses; one without any tokens is left out of the results.
        byte_order: the source's vocabulary in byte order.
        top_k: how many entries are kept of a distribution.
        batch_size: how many responses, or tokens, go into a forward pass. A pass for which the memory does not suffice is divided.
        follower: what asks the source how its numbers go on, if it is asked.

    Yields:
        (index into `requests`, ScoredResponse), in no particular order.
    """
    size = batch_size if isinstance(batch_size, BatchSize) else BatchSize(batch_size)
    passes = size.passes([Numbered(i, r) for i, r in enumerate(requests) if r.encoded.label_positions])
    vocab_order = torch.from_numpy(byte_order.ids).to(head.weight.device)
    while passes:
        numbers = [one.number for row in passes[0] for one in row]
        try:
            scored = _scored(model, head, passes[0], size.layout, vocab_order, top_k, follower)
        except Exception as error:
            if not is_lack_of_memory(error) or len(numbers) == 1:
                raise
            scored = None
        if scored is None:  # behind the handler, where the error no longer holds what was computed
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            size.halve(passes[0])
            passes = size.passes([one for rows in passes for row in rows for one in row])
            continue
        yield from zip(numbers, scored)
        del passes[0]


@torch.no_grad()
def _scored(
    model: PreTrainedModel,
    head: Head,
    one_pass: Pass[Numbered],
    layout: Layout,
    vocab_order: torch.Tensor,
    top_k: int,
    follower: NumberFollower | None,
) -> list[ScoredResponse]:
    """Scores the responses of one forward pass, in the order in which they lie in its rows."""
    device = head.weight.device
    top_k = min(top_k, head.weight.shape[0])
    inputs: dict[str, Any] = on_device(batch_of(one_pass, 0, layout), device)
    input_ids = inputs.pop("input_ids")
    hidden = hidden_states(model, input_ids, inputs.pop("attention_mask", None), **inputs)

    # The rows of source_topk are the batch's label tokens end to end. Each is predicted from the position before it. A text's first
    # token has none, and must not take that of the text before it.
    batch = [one.request for row in one_pass for one in row]
    positions = [r.encoded.label_positions for r in batch]
    places = [(b, place.start) for b, place, _ in placed(one_pass)]
    sequence = torch.tensor([b for (b, _), of_response in zip(places, positions) for _ in of_response])
    position = torch.tensor([begin + t for (_, begin), of_response in zip(places, positions) for t in of_response])
    before = torch.tensor(
        [begin + max(t - 1, 0) for (_, begin), of_response in zip(places, positions) for t in of_response]
    )
    labels = input_ids[sequence.to(device), position.to(device)]
    row_offsets = offsets_of([len(of_response) for of_response in positions])

    # The prefix ranges are put end to end as well, so that their row numbers now count over the whole batch.
    range_offsets = offsets_of([len(r.ranges.rows) for r in batch])
    range_rows = np.concatenate([r.ranges.rows + first_row for r, first_row in zip(batch, row_offsets)])
    lo, hi = (np.concatenate([getattr(r.ranges, name) for r in batch]) for name in ("lo", "hi"))
    arrays = (range_rows, lo, hi, *flat_maps([r.ranges for r in batch]))
    rows_on_device, lo_on_device, hi_on_device, begin_on_device, mapped_on_device = (
        torch.from_numpy(x).to(device) for x in arrays
    )

    # The head and the top k of every row and range.
    rows_of = hidden[sequence.to(hidden.device), before.to(hidden.device)]
    found = source_topk(
        rows_of.to(device),  # a model that is spread over devices may have its head on another one than its last layer
        head.weight,
        labels,
        top_k,
        ranges=(rows_on_device, lo_on_device, hi_on_device, vocab_order, begin_on_device, mapped_on_device),
        bias=head.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
    )
    ids, logprobs, lse, ce, range_ids, range_logprobs, range_logmass = (x.cpu().numpy() for x in found)

    # The rows and ranges are divided among the responses again.
    found_of: list[ScoredResponse] = []
    for b, request in enumerate(batch):
        encoded = request.encoded
        rows, ranges = slice(*row_offsets[b : b + 2]), slice(*range_offsets[b : b + 2])
        spans = np.array(encoded.label_spans(request.response_bytes), dtype=np.int32).reshape(-1, 2)
        capture = SourceCapture(
            ids=np.array([encoded.input_ids[t] for t in positions[b]], dtype=np.int32),
            begin=spans[:, 0].copy(),
            stop=spans[:, 1].copy(),
            top_ids=ids[rows],
            top_logprobs=logprobs[rows],
            own_logprobs=-ce[rows],
            ranges=PrefixRanges(
                rows=request.ranges.rows,
                strip=request.ranges.strip,
                logmass=range_logmass[ranges],
                ids=request.ranges.spelt(range_ids[ranges]),
                logprobs=range_logprobs[ranges],
            ),
        )
        if follower is not None:
            capture.ranges = capture.ranges.with_others(follower.follow(encoded, request.numbers))
        found_of.append(
            ScoredResponse(
                capture=capture,
                lse=lse[rows],
                nll=float(ce[rows].sum(dtype=np.float64)),
                tokens=len(positions[b]),
                response_bytes=request.response_bytes,
            )
        )
    return found_of


def pack_captures(
    fitted: Sequence[Fitted],
    verdicts: Sequence[Verdict],
    scored: Mapping[int, ScoredResponse],
    top_k: int,
    vocabulary: int,
) -> dict[str, np.ndarray]:
    """Packs captures into the arrays of one shard (profuser.store.layout.CAPTURE_COLUMNS).

    Args:
        fitted, verdicts: one of each per example of the shard.
        scored: the captures by example, of those examples of which there is one.
        top_k: how many entries were kept of a distribution. vocabulary: how many tokens the source has.
    """
    k = min(top_k, vocabulary)
    responses = [scored.get(i) for i in range(len(fitted))]
    captured = [r for r in responses if r is not None]

    def column(pick, width: int | None = None) -> np.ndarray:
        """Puts one array of every capture end to end; `width` is its second dimension, if it has one."""
        shape = (0,) if width is None else (0, width)
        return np.concatenate([pick(r) for r in captured] or [np.zeros(shape)])

    # The log-probability of a range's entry is stored relative to the range's mass, because fp16 is finest near 0.
    relative = column(lambda r: r.capture.ranges.logprobs - r.capture.ranges.logmass[:, None], k)
    arrays = {
        "reason": np.array(verdicts),
        "cut": np.array([f.cut for f in fitted]),
        "nll": np.array([np.nan if r is None else r.nll for r in responses]),
        "response_bytes": np.array([0 if r is None else r.response_bytes for r in responses]),
        "offsets": offsets_of([0 if r is None else r.tokens for r in responses]),
        "ids": column(lambda r: r.capture.ids),
        "begin": column(lambda r: r.capture.begin),
        "stop": column(lambda r: r.capture.stop),
        "top_ids": column(lambda r: r.capture.top_ids, k),
        "top_logprobs": column(lambda r: r.capture.top_logprobs, k),
        "own_logprobs": column(lambda r: r.capture.own_logprobs),
        "lse": column(lambda r: r.lse),
        "range_offsets": offsets_of([0 if r is None else len(r.capture.ranges.rows) for r in responses]),
        "range_rows": column(lambda r: r.capture.ranges.rows),
        "range_strip": column(lambda r: r.capture.ranges.strip),
        "range_logmass": column(lambda r: r.capture.ranges.logmass),
        "range_counts": column(lambda r: (r.capture.ranges.ids >= 0).sum(1)),
        "range_ids": np.maximum(column(lambda r: r.capture.ranges.ids, k), 0),
        "range_logprobs": np.maximum(relative, LEAST),
    }
    return shard_arrays(CAPTURE_COLUMNS, arrays, vocabulary, k)


def unpack_captures(shard: Mapping[str, np.ndarray]) -> list[ScoredResponse | None]:
    """Reads back what pack_captures packed: one result per example, None where nothing was captured."""
    result: list[ScoredResponse | None] = []
    for i in range(len(shard["reason"])):
        part = slice(*shard["offsets"][i : i + 2])
        if part.stop == part.start:
            result.append(None)
            continue
        result.append(
            ScoredResponse(
                SourceCapture(
                    ids=shard["ids"][part].astype(np.int32),
                    begin=shard["begin"][part],
                    stop=shard["stop"][part],
                    top_ids=shard["top_ids"][part].astype(np.int32),
                    top_logprobs=shard["top_logprobs"][part].astype(np.float32),
                    own_logprobs=shard["own_logprobs"][part],
                    ranges=_unpack_ranges(shard, slice(*shard["range_offsets"][i : i + 2])),
                ),
                lse=shard["lse"][part],
                nll=float(shard["nll"][i]),
                tokens=part.stop - part.start,
                response_bytes=int(shard["response_bytes"][i]),
            )
        )
    return result


def _unpack_ranges(shard: Mapping[str, np.ndarray], part: slice) -> PrefixRanges:
    """Reads back the prefix ranges of one response; `part` says which of the shard's ranges these are."""
    logmass = shard["range_logmass"][part]
    is_entry = np.arange(shard["range_ids"].shape[1]) < shard["range_counts"][part][:, None]
    logprobs = shard["range_logprobs"][part].astype(np.float32) + logmass[:, None]
    return PrefixRanges(
        rows=shard["range_rows"][part],
        strip=shard["range_strip"][part],
        logmass=logmass,
        ids=np.where(is_entry, shard["range_ids"][part].astype(np.int32), -1),
        logprobs=np.where(is_entry, logprobs, -np.inf).astype(np.float32),
    )
