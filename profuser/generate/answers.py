"""The answers to a file of prompts: read, made and written row by row, so that an interrupted command goes on."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from profuser.errors import DataError, in_short
from profuser.generate.decoder import Decoder
from profuser.generate.steps import Answer, Step
from profuser.progress import Progress
from profuser.recipe.utf8 import read_utf8


def prompts_of(path: Path) -> list[str]:
    """The prompts in a JSONL file, one row each, as `prompt` or as `messages` with one message of the user.

    Raises:
        DataError: the file is missing or not UTF-8, or a row is not of that kind.
    """
    try:
        lines = read_utf8(path).splitlines()
    except OSError:
        raise DataError(f"--input must be an existing JSONL file, got {path}; fix the path") from None
    except ValueError as error:
        raise DataError(f"{path} must be UTF-8, {error}") from None
    return [_prompt(f"{path} line {n}", line) for n, line in enumerate(lines, start=1) if line.strip()]


def _prompt(where: str, line: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} must be a JSON object, got {in_short(line)} ({error}); fix the row") from None
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if isinstance(row, dict) and prompt is None and isinstance(messages := row.get("messages"), list):
        if len(messages) != 1 or not isinstance(messages[0], dict) or messages[0].get("role") != "user":
            raise DataError(
                f"{where}: messages must be one message of the user, got {in_short(messages)}; give a `prompt`"
            )
        prompt = messages[0].get("content")
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"{where} must have a text as `prompt`, got {in_short(row)}; fix the row")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: a prompt must be Unicode, got a lone surrogate; fix the row") from None
    return prompt


def row_of(prompt: str, answer: Answer, sources: list[str]) -> dict[str, Any]:
    """The row of an answer. With `eva` it also counts the steps in which a source was asked but left out."""
    left_out = Counter(sources[number] for step in answer.steps for number in step.left_out)
    return {
        "prompt": prompt,
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


def answer_file(fusion: Decoder, prompts: list[str], output: Path) -> Iterator[tuple[str, Answer]]:
    """Answers prompts and writes a row for each of them, in their order. Rows that are there already stay.

    Yields:
        every prompt that is answered now, with its answer.

    Raises:
        DataError: the file holds rows of other prompts.
    """
    done = finished_rows(output, prompts)
    sources = [voice.name for voice in fusion.voices]
    with open(output, "a", encoding="utf-8") as file, Progress("answer", len(prompts) - done, "prompts") as bar:
        for prompt in prompts[done:]:
            answer = fusion.answer(prompt)
            file.write(json.dumps(row_of(prompt, answer, sources), ensure_ascii=False) + "\n")
            file.flush()
            bar.update(1)
            yield prompt, answer


def finished_rows(output: Path, prompts: list[str]) -> int:
    """How many rows an output file has already. A last row that was not written to its end is taken off."""
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        return 0
    data = output.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    lines = whole.splitlines()
    for n, line in enumerate(lines):
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if n >= len(prompts) or prompt != prompts[n]:
            raise DataError(
                f"--output must be a new file, or one with answers to the same prompts, {output} has another row in line {n + 1}; "
                "name another"
            )
    if len(whole) < len(data):
        with open(output, "r+b") as file:
            file.truncate(len(whole))
    return len(lines)
