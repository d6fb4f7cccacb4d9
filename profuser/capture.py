"""What a source says about a response: top-k log-probabilities, log-sum-exp and cross-entropy, teacher-forced.

Training mode scores the ground truth, inference mode the winner's response; both go through the source's own tokenizer
and chat template. Row j of a capture is the distribution *of* the source's own token j (emitted one position earlier),
over the response's tokens and the end of turn. Where a target token begins inside a source token, the capture also holds
the exact mass of, and the top k among, the tokens that begin with the bytes before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from profuser.alignment.ranges import RangeRequest
from profuser.alignment.types import PrefixRanges, SourceCapture
from profuser.alignment.vocab_map import ByteOrder
from profuser.chat import Encoded
from profuser.kernels.head import Head
from profuser.kernels.source_topk import source_topk
from profuser.models import hidden_states
from profuser.store import id_dtype

REASONS = (
    "ok",
    "empty response, skipped",
    "over-long prompt, skipped",
    "text that a normaliser changes, skipped",
    "text that a decoder cannot give back, skipped",
    "not the winner",
)
"""Why a response was not captured; the store keeps the index."""
LEAST = -60000.0  # fp16 holds it; nothing as improbable reaches a target
OK, EMPTY, TOO_LONG, NORMALISER, DECODER, NOT_WINNER = range(len(REASONS))


@dataclass(slots=True)
class Scored:
    """One response under one source."""

    capture: SourceCapture
    lse: np.ndarray  # float32 [m], log-sum-exp of the logits
    nll: float  # nats, summed over the response's tokens and the end of turn
    tokens: int
    response_bytes: int

    def cross_entropy(self, unit: str) -> float:
        """Nats per own token or per byte of the response; +inf where there is nothing to score or a NaN came out."""
        count = self.tokens if unit == "token" else self.response_bytes
        return self.nll / count if self.response_bytes and np.isfinite(self.nll) else float("inf")


def label_positions(encoded: Encoded) -> list[int]:
    """Indices in input_ids of the tokens that are learnt: the response's and the end of turn."""
    return [*range(encoded.start, encoded.stop), *([] if encoded.end is None else [encoded.end])]


@torch.no_grad()
def capture(
    model: PreTrainedModel,
    head: Head,
    encoded: Sequence[Encoded],
    response_bytes: Sequence[int],
    ranges: Sequence[RangeRequest],
    order: ByteOrder,
    *,
    top_k: int,
    batch_size: int,
) -> Iterable[tuple[int, Scored]]:
    """Score responses with one source, in batches of similar length.

    Args:
        encoded: the responses in their conversations; one without response tokens is left out.
        response_bytes: length of each response in bytes.
        ranges: what the target needs of each response; order: the source's vocabulary in byte order.

    Yields:
        (index into `encoded`, Scored), in no particular order.
    """
    device = head.weight.device
    vocab_order = torch.from_numpy(order.order).to(device)
    top_k = min(top_k, head.weight.shape[0])
    order = sorted((i for i, e in enumerate(encoded) if label_positions(e)), key=lambda i: len(encoded[i].input_ids))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        width = max(len(encoded[i].input_ids) for i in batch)
        input_ids = torch.zeros(len(batch), width, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, i in enumerate(batch):
            ids = encoded[i].input_ids
            input_ids[row, : len(ids)] = torch.tensor(ids)
            attention_mask[row, : len(ids)] = 1
        hidden = hidden_states(model, input_ids.to(device), attention_mask.to(device))
        positions = [label_positions(encoded[i]) for i in batch]
        rows = torch.tensor([r for r, p in enumerate(positions) for _ in p])
        columns = torch.tensor([t for p in positions for t in p])
        labels = input_ids[rows, columns].to(device)
        first_rows = np.cumsum([0, *map(len, positions)])
        asked = [ranges[i] for i in batch]
        range_rows = np.concatenate([r.rows + first for r, first in zip(asked, first_rows)])
        lo, hi = (np.concatenate([getattr(r, name) for r in asked]) for name in ("lo", "hi"))
        found = source_topk(
            hidden[rows.to(device), columns.to(device) - 1],
            head.weight,
            labels,
            top_k,
            ranges=(*(torch.from_numpy(x).to(device) for x in (range_rows, lo, hi)), vocab_order),
            bias=head.bias,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
        )
        ids, logprobs, lse, ce, range_ids, range_logprobs, range_logmass = (x.cpu().numpy() for x in found)
        first_ranges = np.cumsum([0, *(len(r.rows) for r in asked)])
        for n, i in enumerate(batch):
            e, request = encoded[i], asked[n]
            part = slice(*first_rows[n : n + 2])
            range_part = slice(*first_ranges[n : n + 2])
            ends = [] if e.end is None else [(response_bytes[i], response_bytes[i])]
            spans = np.array([*e.spans, *ends], dtype=np.int32).reshape(-1, 2)
            yield (
                i,
                Scored(
                    SourceCapture(
                        ids=np.array([e.input_ids[t] for t in positions[n]], dtype=np.int32),
                        begin=spans[:, 0].copy(),
                        stop=spans[:, 1].copy(),
                        top_ids=ids[part],
                        top_logprobs=logprobs[part],
                        own_logprobs=-ce[part],
                        ranges=PrefixRanges(
                            rows=request.rows,
                            strip=request.strip,
                            logmass=range_logmass[range_part],
                            ids=range_ids[range_part],
                            logprobs=range_logprobs[range_part],
                        ),
                    ),
                    lse=lse[part],
                    nll=float(ce[part].sum(dtype=np.float64)),
                    tokens=len(positions[n]),
                    response_bytes=response_bytes[i],
                ),
            )


def pack_captures(
    n: int, reason: np.ndarray, cut: list[bool], scored: dict[int, Scored], top_k: int, vocabulary: int
) -> dict[str, np.ndarray]:
    """One capture shard: per example reason, nll and counts; per own token its id, span, top-k, lse and log-probability;
    per prefix range its row, bytes, log-mass and top k, relative to the mass (fp16 is finest near 0)."""
    have = [scored.get(i) for i in range(n)]
    counts = np.array([0 if s is None else s.tokens for s in have], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    there = [s for s in have if s is not None]
    k = min(top_k, vocabulary)
    range_offsets = np.cumsum([0, *(0 if s is None else len(s.capture.ranges.rows) for s in have)])

    def column(pick, dtype, width=None):
        shape = (0,) if width is None else (0, width)
        return np.concatenate([pick(s) for s in there] or [np.zeros(shape)]).astype(dtype)

    return {
        "reason": reason,
        "cut": np.array(cut, dtype=np.uint8),
        "nll": np.array([np.nan if s is None else s.nll for s in have], dtype=np.float64),
        "response_bytes": np.array([0 if s is None else s.response_bytes for s in have], dtype=np.int32),
        "offsets": offsets,
        "ids": column(lambda s: s.capture.ids, id_dtype(vocabulary)),
        "begin": column(lambda s: s.capture.begin, np.int32),
        "stop": column(lambda s: s.capture.stop, np.int32),
        "top_ids": column(lambda s: s.capture.top_ids, id_dtype(vocabulary), k),
        "top_logprobs": column(lambda s: s.capture.top_logprobs, np.float16, k),
        "own_logprobs": column(lambda s: s.capture.own_logprobs, np.float32),
        "lse": column(lambda s: s.lse, np.float32),
        "range_offsets": range_offsets,
        "range_rows": column(lambda s: s.capture.ranges.rows, np.int32),
        "range_strip": column(lambda s: s.capture.ranges.strip, np.int32),
        "range_logmass": column(lambda s: s.capture.ranges.logmass, np.float32),
        "range_counts": column(lambda s: (s.capture.ranges.ids >= 0).sum(1), np.uint8 if k < 256 else np.int32),
        "range_ids": column(lambda s: np.maximum(s.capture.ranges.ids, 0), id_dtype(vocabulary), k),
        "range_logprobs": column(
            lambda s: np.maximum(s.capture.ranges.logprobs - s.capture.ranges.logmass[:, None], LEAST), np.float16, k
        ),
    }


def unpack_captures(shard: dict[str, np.ndarray]) -> list[Scored | None]:
    """The inverse of pack_captures; None where nothing was captured."""
    result: list[Scored | None] = []
    for i in range(len(shard["reason"])):
        part = slice(*shard["offsets"][i : i + 2])
        if part.stop == part.start:
            result.append(None)
            continue
        result.append(
            Scored(
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


def _unpack_ranges(shard: dict[str, np.ndarray], part: slice) -> PrefixRanges:
    logmass = shard["range_logmass"][part]
    there = np.arange(shard["range_ids"].shape[1]) < shard["range_counts"][part][:, None]
    logprobs = shard["range_logprobs"][part].astype(np.float32) + logmass[:, None]
    return PrefixRanges(
        rows=shard["range_rows"][part],
        strip=shard["range_strip"][part],
        logmass=logmass,
        ids=np.where(there, shard["range_ids"][part].astype(np.int32), -1),
        logprobs=np.where(there, logprobs, -np.inf).astype(np.float32),
    )
