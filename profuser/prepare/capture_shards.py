"""Makes the arrays of one shard of captures: what a source says about one text for each example of a part."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from profuser.alignment.follow_numbers import NumberFollower, number_rows
from profuser.alignment.ranges import ranges_needed
from profuser.alignment.vocab_map import ByteOrder
from profuser.kernels.head import Head
from profuser.models.attention import keeps_apart, packed_layout
from profuser.models.head import head_of, uses_flash_attention
from profuser.models.load import check_vocabulary, free_memory, load_model
from profuser.models.packing import Layout
from profuser.prepare.capture import BatchSize, CaptureRequest, ScoredResponse, capture_responses, pack_captures
from profuser.prepare.data import Row
from profuser.prepare.inputs import Inputs
from profuser.progress import Progress
from profuser.recipe.data import Split
from profuser.recipe.generation import Reasoning
from profuser.recipe.schema import CaptureConfig, SourceConfig
from profuser.store.division import Part
from profuser.text.chat import ChatFormat
from profuser.text.encoded import Encoded
from profuser.text.fit import Fitted, Verdict
from profuser.text.token_bytes import TokenBytesMismatch


@dataclass(frozen=True, slots=True)
class LoadedSource:
    """A source whose model is in memory, with what capturing needs of it."""

    name: str
    chat: ChatFormat
    model: PreTrainedModel
    head: Head
    byte_order: ByteOrder
    reasoning: Reasoning
    follower: NumberFollower | None
    batch_size: BatchSize


def load_source(inputs: Inputs, source: SourceConfig) -> LoadedSource:
    """Loads a source's model and checks that it fits its tokenizer."""
    config = inputs.recipe.capture
    # flash-attention computes in 16 bits, and takes none of the masks by which numbers are followed.
    packs = config.may_pack and inputs.dtype == torch.bfloat16 and not inputs.recipe.align.follow_numbers
    free_memory()  # of the source before, which one that is spread over devices leaves in a reference cycle
    model = load_model(source, inputs.dtype, inputs.device, packs=packs, spreads=True)
    head, chat, recipe = head_of(model), inputs.chats[source.name], inputs.recipe
    check_vocabulary(source.name, chat, len(head.weight))
    order = ByteOrder(chat.token_bytes, head.weight.shape[0])
    follower = None
    if recipe.align.follow_numbers:
        top_k = min(recipe.capture.top_k, head.weight.shape[0])
        follower = NumberFollower(inputs.target.token_bytes, chat.token_bytes, model, head, top_k)
    return LoadedSource(
        source.name,
        chat,
        model,
        head,
        order,
        recipe.reasoning_of(source),
        follower,
        batch_size(source.name, model, config),
    )


def batch_size(name: str, model: PreTrainedModel, config: CaptureConfig) -> BatchSize:
    """Returns how much a source scores at a time, and says how its responses are packed if they are."""

    def say(line: str) -> None:
        print(f"{name}: {line}", flush=True)

    if (budget := config.tokens_per_batch) is None:
        return BatchSize(config.batch_size, say=say)
    layout: Layout = "padded"
    flash = uses_flash_attention(model)
    if config.may_pack and (flash or config.layout == "packed"):
        layout, said = packed_layout(model, keeps_apart(model, flash), budget)
        say_once(f"{name}: responses are {said}")
    return BatchSize(budget, "tokens", say, layout)


@functools.cache
def say_once(line: str) -> None:
    """Prints a line, if this process has not printed it yet: a source is loaded in several phases."""
    print(line, flush=True)


def captured(
    inputs: Inputs, split: Split, part: Part, source: LoadedSource, fitted: Sequence[Fitted], bar: Progress
) -> dict[str, np.ndarray]:
    """Lets a source score texts.

    Args:
        fitted: the texts, one per example of the part. An example whose verdict is not OK has none.
    """
    # Encode the texts, and find out which prefix ranges and numbers the target will need of each.
    rows, tokens, its = part.of(inputs.rows[split]), inputs.target.token_bytes, source.chat.token_bytes
    verdicts = [f.verdict for f in fitted]
    requests: list[CaptureRequest] = []
    asked: list[int] = []  # the example, counted within the part, of every request
    for i, own, theirs in _encodings(inputs, rows, source.chat, fitted, verdicts):
        ranges = ranges_needed(tokens, theirs, its, own, source.byte_order)
        numbers = number_rows(tokens, theirs, its, own) if source.follower else ()
        requests.append(CaptureRequest(own, len(fitted[i].text.encode()), ranges, numbers))
        asked.append(i)

    # Score them.
    top_k = inputs.recipe.capture.top_k
    scored: dict[int, ScoredResponse] = {}
    for i, response in capture_responses(
        source.model,
        source.head,
        requests,
        source.byte_order,
        top_k=top_k,
        batch_size=source.batch_size,
        follower=source.follower,
    ):
        scored[asked[i]] = response
        bar.update(1, tokens=len(requests[i].encoded.input_ids))
    bar.update(len(part) - len(scored))  # the examples that were not asked for are done as well
    return pack_captures(fitted, verdicts, scored, top_k, source.head.weight.shape[0])


def taken(
    inputs: Inputs,
    split: Split,
    part: Part,
    source: SourceConfig,
    fitted: Sequence[Fitted],
    whole: Callable[[int], str],
    bar: Progress,
) -> dict[str, np.ndarray]:
    """Takes what a source says about texts from the log-probabilities that the user has given.

    Args:
        fitted: the texts, one per example of the part. An example whose verdict is not OK has none.
        whole: gives the text of an example, by its number in the split, before it was cut.
    """
    given, chat, rows = inputs.logprobs(source), inputs.chats[source.name], part.of(inputs.rows[split])
    verdicts = [f.verdict for f in fitted]
    scored: dict[int, ScoredResponse] = {}
    for i, own, _ in _encodings(inputs, rows, chat, fitted, verdicts):
        assert given is not None
        scored[i] = given.scored(rows[i]["prompt"], whole(part.examples[i]), fitted[i], own)
    bar.update(len(part))
    return pack_captures(fitted, verdicts, scored, inputs.recipe.capture.top_k, len(chat.tokenizer))


def _encodings(
    inputs: Inputs, rows: Sequence[Row], chat: ChatFormat, fitted: Sequence[Fitted], verdicts: list[Verdict]
) -> Iterator[tuple[int, Encoded, Encoded]]:
    """Encodes texts for a source and for the target.

    Yields:
        (index of the text, in the source's tokens, in the target's tokens) for every text whose verdict is OK. Where a tokenizer does
        not hold its bytes, `verdicts` gets that instead.
    """
    for i, (row, text) in enumerate(zip(rows, fitted, strict=True)):
        if text.verdict != Verdict.OK:
            continue
        try:
            own = chat.encode(row["prompt"], text.text, complete=not text.cut)
            theirs = inputs.target.encode(row["prompt"], text.text, complete=not text.cut)
        except TokenBytesMismatch as error:
            verdicts[i] = Verdict.of(error)
            continue
        yield i, own, theirs
