"""`python -m profuser.doctor`: how well a source's tokens cover a target's, on a text of yours and without any model.

With a recipe instead it shows one training example in every model's own chat template: what is context, what is learnt,
where the turn ends. The rest of this page is about the text.

The file is taken as one response, as it is: no template, no begin or end of turn, nothing stripped. Both tokenizers
encode it and every target token, zero-width ones included, has exactly one kind (design.md section 5): `same_span`,
`shared_prefix`, `inside` or `skipped`. A token that begins before the text (dummy leading space) counts by its clipped
span.

A normaliser or a decoder can make it impossible that tokens hold the text's bytes. `prepare` leaves such a response out
for that source as a whole; one file with one decomposed accent would then say nothing, so the doctor skips the lines
(a line keeps its newline) that a tokenizer changes, and no others:

- The tokens stay those of the whole text wherever they hold what the normaliser makes of it, line by line: then
  `positions` is the number of tokens that the target really has, whichever the source, and a token across a line's
  end, `.\\n\\n`, is not cut; it is skipped when it touches a changed line.
- Where the text has no tokens that can be placed at all (an unknown character), each run of lines between those at
  fault is encoded as a text of its own, and the lines at fault by themselves, to be counted.

What needs a model, mapped mass and reliability, is left out here; the report of a run shows it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from profuser.alignment.spans import ENGINE, match_spans
from profuser.alignment.text import PlainText
from profuser.alignment.types import KINDS, SKIP_NO_SOURCE_POSITION, SKIP_NOT_MATCHED, SKIP_REASONS, SKIPPED
from profuser.capture import OK, REASONS
from profuser.cli import main_of
from profuser.config import Recipe, SourceConfig, parse_run, target_config
from profuser.data import load_examples
from profuser.errors import ConfigError, DataError
from profuser.models import chat_format, load_tokenizer
from profuser.prepare import fit
from profuser.template_rows import MASK_LEGEND, conversation_rows, describe
from profuser.token_bytes import TokenBytes, TokenBytesMismatch
from profuser.token_rows import LEGEND, clipped, example_rows, paint

SHOWN_SKIPS = 10
MAX_PAIRS = 400_000_000  # of tokens, in dynamic time warping: a byte each


@dataclass(frozen=True, slots=True)
class Line:
    """A line (bytes [begin, end) of the text) that a tokenizer's tokens do not hold; reason: normaliser | decoder."""

    begin: int
    end: int
    reason: str


@dataclass(frozen=True, slots=True)
class View:
    """One tokenizer's tokens of a text.

    ids: n token ids; begin, end: (n,) int32 byte spans, monotone, begin >= 0; approximate inside the changed lines.
    """

    ids: list[int]
    begin: np.ndarray
    end: np.ndarray
    changed: list[Line]

    def touching(self, begin: int, end: int) -> slice:
        """The tokens that hold a byte of [begin, end), or stand there with none."""
        occupied = np.maximum(self.end, self.begin + 1)
        return slice(int(np.searchsorted(occupied, begin, "right")), int(np.searchsorted(self.begin, end, "left")))


@dataclass(frozen=True, slots=True)
class Skip:
    """Positions that get nothing. text: the line's, or what the tokens hold; None where they lie all over the text."""

    reason: str
    text: str | None
    positions: int


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What became of every target token.

    data: the text; target: ((n,) begin, (n,) end) byte spans; source: the same, without the tokens of changed lines;
    kind: (n,) uint8 into KINDS.
    """

    data: bytes
    target: tuple[np.ndarray, np.ndarray]
    source: tuple[np.ndarray, np.ndarray]
    kind: np.ndarray
    skips: list[Skip]

    @property
    def counts(self) -> dict[str, int]:
        return dict(zip(KINDS, np.bincount(self.kind, minlength=len(KINDS)).tolist()))

    @property
    def shares(self) -> dict[str, float]:
        """Fractions of the positions by kind, and `usable`. Without any position nothing is usable: all `skipped`."""
        n = len(self.kind)
        shares = {name: count / n if n else float(name == "skipped") for name, count in self.counts.items()}
        return {**shares, "usable": 1 - shares["skipped"]}


def view(tokens: TokenBytes, text: str) -> View:
    """The tokens of `text`, with the lines that they do not hold (see the head of this module)."""
    try:
        return _view(*_encode(tokens, text, text), [])
    except TokenBytesMismatch:
        lines = _lines(text)
    held = [tokens.seen(line) for line in lines]
    try:
        ids, spans = _encode(tokens, text, "".join(held))
    except TokenBytesMismatch:
        return _view_of_runs(tokens, lines)
    starts, held_starts = _starts(lines), _starts(held)

    def place(offsets: np.ndarray) -> np.ndarray:
        line = np.clip(np.searchsorted(held_starts, offsets, "right") - 1, 0, len(lines) - 1)
        return np.minimum(starts[line] + offsets - held_starts[line], starts[line + 1])

    begin, end = np.array(spans, np.int64).reshape(-1, 2).T
    changed = [
        Line(int(a), int(e), "normaliser" if tokens.normalised(line) != line else "decoder")
        for line, has, a, e in zip(lines, held, starts, starts[1:])
        if line != has
    ]
    return _view(ids, list(zip(place(np.maximum(begin, 0)), place(end))), changed)


def diagnose(target: PlainText, source: PlainText, text: str, align: str = "bytes") -> Diagnosis:
    """Kinds of the target's tokens of `text`, taken as one response.

    Args:
        align: "bytes": every position that conditions on bytes which the source saw; "fusellm": of these, the ones that
            FuseLLM's dynamic time warping accepts, the others are skipped.
    Raises:
        DataError: a text too long for dynamic time warping.
    """
    data = text.encode()
    target_view, source_view = view(target.token_bytes, text), view(source.token_bytes, text)
    keep = np.ones(len(source_view.ids), bool)
    regions = []
    for side in (target_view, source_view):
        for line in side.changed:
            hit = side.touching(line.begin, line.end)
            if side is source_view:
                keep[hit] = False
            # Whole tokens: one that straddles the line's end takes the bytes beyond with it.
            begin = min([line.begin, *side.begin[hit][:1].tolist()])
            regions.append((line, begin, max([line.end, *side.end[hit][-1:].tolist()])))
    source_spans = source_view.begin[keep], source_view.end[keep]
    kind, _ = match_spans(target_view.begin, target_view.end, *source_spans)

    reason = np.full(len(kind), "", dtype=object)
    skips = []
    for line, begin, end in sorted(regions, key=lambda region: region[0].begin):
        hit = target_view.touching(begin, end)
        new = int((reason[hit] == "").sum())
        reason[hit] = line.reason
        kind[hit] = SKIPPED
        if new:
            skips.append(Skip(line.reason, data[line.begin : line.end].decode(), new))
    alone = np.flatnonzero((kind == SKIPPED) & (reason == ""))
    for run in np.split(alone, np.flatnonzero(np.diff(alone) > 1) + 1) if len(alone) else []:
        held = data[target_view.begin[run[0]] : target_view.end[run[-1]]].decode(errors="replace")
        skips.append(Skip(SKIP_REASONS[SKIP_NO_SOURCE_POSITION], held, len(run)))
    if align == "fusellm":
        rejected = (kind != SKIPPED) & ~_accepted(target, source, target_view.ids, source_view.ids)
        kind[rejected] = SKIPPED
        if rejected.any():
            skips.append(Skip(SKIP_REASONS[SKIP_NOT_MATCHED], None, int(rejected.sum())))
    return Diagnosis(data, (target_view.begin, target_view.end), source_spans, kind, skips)


def report(diagnosis: Diagnosis, target: str, source: str, align: str, file: str) -> dict:
    """What `--json` prints. mapped_mass and reliability are null: they need a model."""
    return {
        "target": target,
        "source": source,
        "text": file,
        "align": align,
        "engine": ENGINE,
        "positions": len(diagnosis.kind),
        "bytes": len(diagnosis.data),
        **diagnosis.shares,
        "mapped_mass": None,
        "reliability": None,
        "skips": [asdict(skip) for skip in diagnosis.skips],
    }


def table(diagnosis: Diagnosis, target: str, source: str, align: str, file: str, *, color: bool, width: int) -> str:
    """The same for a person: counts by kind, what was skipped, and a few lines with the tokens under them."""
    facts = (
        ("target", target),
        ("source", source),
        ("text", f"{file} ({len(diagnosis.data)} bytes, {len(diagnosis.kind)} target tokens)"),
        ("align", align),
        ("engine", ENGINE),
    )
    lines = [f"{name:<8}{value}" for name, value in facts]
    lines += ["", f"{'kind':<16}{'positions':>10}{'share':>9}"]
    shares, counts = diagnosis.shares, diagnosis.counts
    if not len(diagnosis.kind):
        return "\n".join([*lines[:-2], "", "the text has no tokens"])
    for k, name in enumerate(KINDS):
        lines.append(f"{paint(f'{name:<16}', k, color)}{counts[name]:>10}{100 * shares[name]:>8.1f}%")
    usable = len(diagnosis.kind) - counts["skipped"]
    lines.append(f"{'usable':<16}{usable:>10}{100 * shares['usable']:>8.1f}%")
    if diagnosis.skips:
        lines += ["", "skipped positions"]
    for skip in diagnosis.skips[:SHOWN_SKIPS]:
        held = "" if skip.text is None else f"  {clipped(skip.text, width - 32)}"
        lines.append(f"  {skip.reason:<20}{skip.positions:>8}{held}")
    if len(diagnosis.skips) > SHOWN_SKIPS:
        lines.append(f"  and {len(diagnosis.skips) - SHOWN_SKIPS} more: --json lists them all")
    examples = example_rows(
        diagnosis.data,
        diagnosis.target,
        diagnosis.kind,
        diagnosis.source,
        color=color,
        width=width,
    )
    if examples:
        lines += ["", *itertools.chain.from_iterable((*example, "") for example in examples)]
        lines += [
            "lines with the most to see, cut to the width; · is a space, ⏎ a line end, \\xe4 one byte of a character that tokens "
            "split, ∅ a token without bytes",
            "a mark stands where a token begins, the target's in the row `target`, the source's (|) in the row `source`",
        ]
        lines += [
            f"  {paint(mark, k, color)}  {paint(KINDS[k], k, color)}: {meaning}"
            for k, (mark, meaning) in enumerate(LEGEND)
        ]
    return "\n".join(lines)


def read_text(path: Path) -> str:
    """A file's text, byte for byte.

    Raises:
        DataError: no such file, or not UTF-8.
    """
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise DataError(f"--text must be a readable file, got {path} ({error.strerror}); fix the path") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"--text must be UTF-8, {path} has the byte 0x{error.object[error.start]:02x} at {error.start}; convert "
            "it, for instance with `iconv -t UTF-8`"
        ) from None


def use_color() -> bool:
    """On a terminal, or with FORCE_COLOR set; never with NO_COLOR."""
    wanted = sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))
    return wanted and not os.environ.get("NO_COLOR")


def show_templates(recipe: Recipe, example: int, as_json: bool) -> None:
    """Print one training example as every model of a recipe sees it, through its own chat template."""
    rows = load_examples(recipe.data, recipe.data.train, recipe.data.limit)
    if not 0 <= example < len(rows):
        raise ConfigError(f"--example must be in 0..{len(rows) - 1} ({recipe.data.train}), got {example}; give another")
    row = rows[example]
    target = target_config(recipe)
    models = {s.name: s for s in [*recipe.sources, target]}
    chats = {name: chat_format(config) for name, config in models.items()}
    ordered = [chats[target.name], *(chats[s.name] for s in recipe.sources)]
    text, cut, reason = fit(ordered, row["prompt"], row["response"], recipe.data.max_length)
    described = {}
    if not as_json:
        at = f", cut to data.max_length {recipe.data.max_length}" if cut else ""
        print(f"example {example} of {recipe.data.train}{at}; {MASK_LEGEND}\n")
    for name, chat in chats.items():
        shown = [f"not used: {REASONS[reason]}"]
        try:
            if reason == OK and as_json:
                described[name] = describe(chat, row["prompt"], text, complete=not cut)
                continue
            if reason == OK:
                width = shutil.get_terminal_size().columns
                shown = conversation_rows(chat, row["prompt"], text, complete=not cut, color=use_color(), width=width)
        except TokenBytesMismatch as error:
            shown = [f"not used: {error}"]
        described[name] = {"skipped": shown[0]}
        if not as_json:
            print("\n".join([f"{name}  {models[name].model}", "", *shown, ""]))
    if as_json:
        print(json.dumps({"example": example, "models": described}))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m profuser.doctor",
        description=__doc__.split("\n")[0],
        usage="%(prog)s --tokenizers TARGET SOURCE --text FILE [--align fusellm] [--json]\n"
        "       %(prog)s --config RECIPE [--example N] [--json] [recipe overrides]",
    )
    parser.add_argument(
        "--tokenizers",
        nargs=2,
        metavar=("TARGET", "SOURCE"),
        help="each a directory, a Hub id, or demo:NAME for a bundled model",
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text, taken as one response")
    parser.add_argument("--config", metavar="RECIPE", help="show a training example in every model's chat template")
    parser.add_argument("--example", type=int, default=0, metavar="N", help="which one, from 0")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument(
        "--align",
        choices=("bytes", "fusellm"),
        default="bytes",
        help="bytes: ours; fusellm: only what FuseLLM's dynamic time warping accepts",
    )
    args, overrides = parser.parse_known_args(argv)
    if args.config is not None:
        if args.tokenizers or args.text:
            parser.error("give --config, or --tokenizers and --text")
        run = parse_run("doctor", ["--config", args.config, *overrides], {}, __doc__.split("\n")[0])
        return show_templates(run.recipe, args.example, args.json)
    if overrides or not (args.tokenizers and args.text):
        parser.error(
            f"give --tokenizers and --text, or --config{'; unknown: ' + ' '.join(overrides) if overrides else ''}"
        )
    text = read_text(args.text)
    target, source = (
        PlainText(load_tokenizer(SourceConfig(name=f"--tokenizers {role}", model=model)))
        for role, model in zip(("TARGET", "SOURCE"), args.tokenizers)
    )
    diagnosis = diagnose(target, source, text, args.align)
    names = (*args.tokenizers, args.align, str(args.text))
    if args.json:
        print(json.dumps(report(diagnosis, *names)))
    else:
        print(table(diagnosis, *names, color=use_color(), width=shutil.get_terminal_size().columns))


def _accepted(target: PlainText, source: PlainText, target_ids: list[int], source_ids: list[int]) -> np.ndarray:
    """(n,) bool: the target's tokens that FuseLLM's rule accepts."""
    from profuser.alignment.fusellm import accepted_positions, vocabulary_map  # rapidfuzz and a map: for this mode only

    if len(target_ids) * len(source_ids) > MAX_PAIRS:
        raise DataError(
            f"--align fusellm compares every target token with every source token, at most {MAX_PAIRS} pairs, got "
            f"{len(target_ids)} x {len(source_ids)} tokens; give a shorter text"
        )
    return accepted_positions(target_ids, source_ids, target, source, vocabulary_map(target, source))[0]


def _encode(tokens: TokenBytes, text: str, held: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a text in which nothing is a control token, and their spans in what the tokens hold of it."""
    ids, _ = tokens.encode_parts([(text, True)])
    return ids, tokens.spans(ids, held)


def _view(ids: list[int], spans: Sequence[tuple[int, int]], changed: list[Line]) -> View:
    begin, end = np.array(spans, np.int32).reshape(-1, 2).T
    return View(ids, np.maximum(begin, 0), end, changed)


def _view_of_runs(tokens: TokenBytes, lines: list[str]) -> View:
    """The tokens of each run of lines that they hold, and of each other line by itself."""

    def fits(part: str) -> bool:
        try:
            _encode(tokens, part, part)
        except TokenBytesMismatch:
            return False
        return True

    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    changed = []
    position = 0
    for good, group in itertools.groupby(lines, fits):
        run = list(group)
        for part in ["".join(run)] if good and fits("".join(run)) else run:
            size = len(part.encode())
            try:
                own, own_spans = _encode(tokens, part, part)
            except TokenBytesMismatch as error:
                own = tokens.encode(part)
                own_spans = [(0, size)] * len(own)
                changed.append(Line(position, position + size, error.reason))
            ids += own
            spans += [(position + max(begin, 0), position + end) for begin, end in own_spans]
            position += size
    return _view(ids, spans, changed)


def _lines(text: str) -> list[str]:
    """Lines with their newlines; only "\\n" ends one."""
    parts = text.split("\n")
    return [f"{part}\n" for part in parts[:-1]] + parts[-1:] * bool(parts[-1])


def _starts(lines: Sequence[str]) -> np.ndarray:
    """(n + 1,) int64 byte offsets."""
    return np.cumsum([0, *(len(line.encode()) for line in lines)])


if __name__ == "__main__":
    main_of(main)
