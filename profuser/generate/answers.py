"""The answers to a file of prompts: made and written row by row, so that an interrupted command goes on.

Every row has a seal, as the lines of metrics.jsonl have, and the key of the sources and settings that it was answered with. So a
row that stays is known to be what this very command would have written.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from profuser.errors import DataError
from profuser.generate.decoder import Decoder
from profuser.generate.prompts import given_as, given_in
from profuser.generate.steps import Answer, Step
from profuser.generate.voices import chats_of
from profuser.models.load import default_device, runtime_dtype
from profuser.models.merged_adapter import model_fingerprint
from profuser.prepare.inputs import without
from profuser.progress import Progress
from profuser.recipe.schema import Recipe
from profuser.store.files import writing
from profuser.store.sealed import sealed, unsealed
from profuser.text.conversation import Prompt
from profuser.typed import parsed


def settings_key(recipe: Recipe) -> str:
    """Returns a short hash of what decides an answer beside its prompt: the sources, and how they decode.

    Where a chat template writes the date, that is a part of it.

    Raises:
        DataError: a source cannot be opened, or has no usable chat template.
    """
    sources = [
        {
            "name": source.name,
            "model": source.model,
            "files": model_fingerprint(source),
            "revision": source.revision,
            "template": chat.digest,
        }
        for source, chat in zip(recipe.sources, chats_of(recipe), strict=True)
    ]
    dtype = str(runtime_dtype(recipe.capture.dtype, default_device()))
    decides = [sources, without(vars(recipe.decode), "batch_size"), recipe.generation.max_new_tokens, dtype]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def row_of(prompt: Prompt, answer: Answer, sources: list[str]) -> dict[str, Any]:
    """The row of an answer. With `eva` it also counts the steps in which a source was asked but left out."""
    left_out = Counter(sources[number] for step in answer.steps for number in step.left_out)
    return {
        **given_as(prompt),
        "response": answer.text,
        "finished": answer.finished,
        "source": answer.source,
        "segments": [
            {
                "text": step.winner.text,
                "source": sources[step.winner.sources[0]],
                "mean_ppl": mean_perplexity(step),
            }
            for step in answer.steps
        ],
        **({"left_out": dict(sorted(left_out.items()))} if left_out else {}),
    }


def mean_perplexity(step: Step) -> float | None:
    """The mean of the perplexities of a segment by the sources that count, or None if nobody was asked."""
    counted = [value for value in step.winner.perplexities if not math.isnan(value)]
    mean = sum(counted) / len(counted) if counted else math.inf
    return round(mean, 6) if math.isfinite(mean) else None


def answer_file(
    fusion: Decoder, prompts: Sequence[Prompt], output: Path, settings: str = "", batch_size: int = 1
) -> Iterator[tuple[Prompt, Answer]]:
    """Answers prompts and writes a row for each of them, in their order. Rows that are there already stay.

    Args:
        settings: the key of what the answers are made with.
        batch_size: how many prompts are answered at a time. An answer that ends before an earlier one waits for its turn.

    Yields:
        every prompt that is answered now, with its answer.

    Raises:
        DataError: a prompt is too long for a source, or its chat template cannot show it; the file holds other rows, or another
            process writes to it.
    """
    for number, prompt in enumerate(prompts, start=1):
        try:
            fusion.check_fits(prompt)
        except DataError as error:
            raise DataError(f"row {number} of --input: {error}") from None
    sources = [voice.name for voice in fusion.voices]
    finished_rows(output, prompts, settings)  # before anything of the file is touched
    with open(output, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"--output must not be in use, another process writes to {output}; name another") from None
        done = finished_rows(output, prompts, settings)
        with Progress("answer", len(prompts) - done, "prompts") as bar:
            fusion.on_step = bar.update
            for prompt, answer in zip(prompts[done:], fusion.answers(prompts[done:], batch_size)):
                row = sealed(row_of(prompt, answer, sources) | {"settings": settings})
                line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
                with writing(output, len(line)):
                    file.write(line)
                    file.flush()
                bar.update(1)
                yield prompt, answer


def finished_rows(output: Path, prompts: Sequence[Prompt], settings: str = "") -> int:
    """How many rows an output file has already. A last row that was not written to its end is taken off.

    Raises:
        DataError: it is no file, or holds a row that is damaged, of another prompt, or made with other settings.
    """
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        return 0
    if not output.is_file():
        raise DataError(f"--output must be a file, got {output}, which is none; name another")
    data = output.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    lines = whole.split(b"\n")[:-1]
    for n, line in enumerate(lines):
        where = f"{output} has another row in line {n + 1}"
        try:
            row = parsed(line)
        except ValueError:
            row = None
        given = given_in(row)
        if n >= len(prompts) or (given and given != given_as(prompts[n])):
            raise DataError(
                f"--output must be a new file, or one with answers to the same prompts, {where}; name another"
            )
        try:
            made_with = unsealed(row, {"settings": str})["settings"]
        except ValueError as error:
            raise DataError(
                f"--output must hold what was written, line {n + 1} of {output} must hold {error}; take it and all lines behind it "
                "out, or name another"
            ) from None
        if made_with != settings:
            raise DataError(
                f"--output must be a new file, or one of the same sources and settings, {where}; name another"
            )
    if len(whole) < len(data):
        with open(output, "r+b") as file:
            file.truncate(len(whole))
    return len(lines)
