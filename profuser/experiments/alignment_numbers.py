"""`python -m profuser.experiments.alignment_numbers`: how near the aligned distributions come to the truth at numbers.

Some tokenizers cut numbers into digits, some into groups of three, and some as their merges go. Here the truth is not
sampled, as it is in `alignment_truth`, but computed: a model that writes numbers digit by digit, such as SmolLM2, tells the
probability of every string of digits (`digit_trees`), and each string is tokenised again behind the target's own tokens. Two
directions are measured on the numbers of `texts/numbers.txt`:

- *one → several*: the source is the model itself, and the targets have tokens of several digits. DeepSeek-V3 cuts numbers
  into groups of three from the left, so that three digits decide a token. GPT-2 and GPT-NeoX merge digits without a bound, so
  that only the whole number decides it.
- *several → one*: the source is composed of the model. It has SmolLM2's tokens and all strings of two and three digits, and
  its tokenizer is SmolLM2's, but cuts numbers into groups of three as DeepSeek-V3's does. The targets Llama-2 and Qwen-2 have
  single digits, so the truth is what the model itself says of its next token.

With --follow-numbers only the first direction is measured, with a source that is asked how its numbers go on (rule 9), and what
asking costs is printed.

All figures of a position are taken over the tokens that the library names and the NAMED most probable ones of the truth.
*False mass* is the sum of max(0, said - true), *missing mass* the sum of max(0, true - said), in which a mass that was moved
to the tail is missing. The total variation is that of `alignment_truth`, with one bucket for the tail.

These approximations are made on purpose:
- A string of three digits or more is followed only if its probability is at least FLOOR. Otherwise it is taken for a whole
  number. The mass of such strings is printed as *not followed*; it is an upper bound of what may be at the wrong token.
- A token without digits counts for what the target's tokenizer makes of it before a space and a word.
- Tokens below LEAST, control tokens, parts of characters, and a space before a number that the text does not have, count as
  other tokens.
- The composed source's distributions are composed where numbers begin, go on or end. Elsewhere they have only single digits,
  which no measured position depends on.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from profuser.alignment.align import align, plain_text, prefix_ranges
from profuser.alignment.follow_numbers import NumberFollower, number_rows
from profuser.alignment.ranges import ranges_needed
from profuser.cli import main_of
from profuser.environment import environment
from profuser.errors import ConfigError
from profuser.experiments.alignment_truth import CHANGED, OTHER, Retokeniser, total_variation
from profuser.experiments.byte_sampler import Continuation, TextModel
from profuser.experiments.digit_trees import (
    DIGITS,
    GROUP,
    DigitTree,
    composed_row,
    composed_tokenizer,
    grow,
    load_trees,
    save_trees,
)
from profuser.experiments.page import write_section
from profuser.experiments.windows import TEXTS, TOP_K, Source, Target, Window, pretrained_tokenizer
from profuser.kernels.source_topk import source_topk_from_logits
from profuser.models.fingerprint import fingerprint
from profuser.models.head import head_layer, head_of
from profuser.prepare.capture import CaptureRequest, capture_responses
from profuser.store.files import read_json, write_json
from profuser.text.token_bytes import TokenBytes

SECTION = "alignment_numbers"
ONE_TO_SEVERAL, SEVERAL_TO_ONE = "one → several", "several → one"
TARGETS = {ONE_TO_SEVERAL: ("deepseek_v3", "gpt2", "gpt_neox"), SEVERAL_TO_ONE: ("llama2", "qwen2")}
DECIDING = {"deepseek_v3": 3, "llama2": 1, "qwen2": 1}
"""The number of digits that decide a target's token. Where there is none, the whole number does."""
PLACES = {
    ONE_TO_SEVERAL: ("first token", "first token with a space", "later token", "after the number"),
    SEVERAL_TO_ONE: ("first digit", "second digit", "third digit", "after the number"),
}
"""The kinds of positions: which token of a number in the target, or which digit of a token of the composed source.

A first token with a space stands where the source may also write a word, so numbers have only a part of the mass there.
"""
FIRST = ("first token", "first token with a space", "first digit")
FLOOR = 1e-4
LEAST = 1e-5
NAMED = 10
CLASSES = ("no digit", "1 digit", "2 digits", "3 digits or more")

# --- the two sources -------------------------------------------------------------------------------------------------


def paragraphs(text: str) -> Iterator[tuple[str, str]]:
    """The paragraphs of a text with their sorts. A paragraph that is a word in brackets names the sort of those behind it."""
    sort = ""
    for paragraph in text.strip().split("\n\n"):
        if heading := re.fullmatch(r"\[(\w+)\]", paragraph):
            sort = heading[1]
        else:
            yield sort, paragraph


class Reading:
    """A paragraph as the model reads it.

    Attributes:
        rows: (tokens, V) float64, row m has the probabilities of token m.
        at: by the byte at which it begins, the number of each token.
    """

    def __init__(self, source: Source, sort: str, number: int, text: str):
        ids = source.tokens.encode(text)
        self.sort, self.data = sort, text.encode()
        self.window = Window("numbers", number, text, ids, source.tokens.spans(ids, text))
        self.model: TextModel = source.read(self.window)
        with torch.inference_mode():
            logits = head_layer(source.model)(self.model.hidden[:-1])
        self.rows = logits.double().softmax(-1).numpy()
        self.at = {begin: m for m, (begin, _) in enumerate(self.window.spans)}


class Trees:
    """The trees of digits at bytes of paragraphs. The model grows those that are not known by the text before them."""

    def __init__(self, source: Source, known: dict[str, DigitTree]):
        self.digit_ids = [source.tokens.encode(digit)[0] for digit in DIGITS]
        self.known = known

    def at(self, reading: Reading, begin: int) -> DigitTree:
        before = reading.data[:begin].decode()
        if before not in self.known:
            self.known[before] = grow(reading.model.after(reading.at[begin]), self.digit_ids, FLOOR)
        return self.known[before]

    def of_row(self, row: np.ndarray) -> DigitTree:
        """The tree of one digit, which a distribution tells without the model."""
        return DigitTree.of_one(row[self.digit_ids])


@dataclass(slots=True)
class Side:
    """A source's tokens of a paragraph, and the probabilities that it gives at each of them, (tokens, V)."""

    tokenizer: PreTrainedTokenizerBase
    ids: list[int]
    probabilities: np.ndarray


class Composed:
    """The composed source."""

    def __init__(self, source: Source, trees: Trees):
        self.tokenizer, self.ids = composed_tokenizer(source.tokenizer)
        self.trees = trees
        self._tokens = TokenBytes(self.tokenizer)
        self._digits = {i: digits for digits, i in self.ids.items()}

    def side(self, reading: Reading) -> Side:
        text = reading.window.text
        ids = self._tokens.encode(text)
        others = [[i for i in some if i not in self._digits] for some in (ids, reading.window.ids)]
        assert others[0] == others[1], f"the two sources must differ in numbers alone: {text!r}"
        rows, before = [], ""
        for i, (begin, _) in zip(ids, self._tokens.spans(ids, text), strict=True):
            row, digits = reading.rows[reading.at[begin]], self._digits.get(i, "")
            if 0 < len(before) < GROUP:
                tree = DigitTree.of_one(np.zeros(len(DIGITS)))
            elif digits or before:
                tree = self.trees.at(reading, begin)
            else:
                tree = self.trees.of_row(row)
            rows.append(composed_row(row, tree, self.ids))
            before = digits
        return Side(self.tokenizer, ids, np.stack(rows))


# --- the truth -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Written:
    """Bytes that the source may write, and their probability; if it is not `exact`, the digits may go on."""

    data: bytes
    mass: float
    exact: bool = True


def written(source: Source, trees: Trees, reading: Reading, begin: int, deciding: int | None) -> list[Written]:
    """What the source may write from byte `begin` on: numbers, or as many of their digits as decide, and other tokens."""
    own = reading.at[begin]
    # A space that belongs to a number's first token in some targets is a token of its own in the source.
    leads = {b"": (own, 1.0)}
    if re.match(rb" \d", reading.data[begin:]):
        leads[b" "] = (own + 1, float(reading.rows[own][reading.window.ids[own]]))
    found = []
    for lead, (m, share) in leads.items():
        row = share * reading.rows[m]
        row[trees.digit_ids] = 0.0
        if not lead and len(leads) > 1:
            row[reading.window.ids[own]] = 0.0
        tree = trees.of_row(reading.rows[m]) if deciding == 1 else trees.at(reading, begin + len(lead))
        for digits, mass, exact in tree.numbers(deciding):
            found.append(Written(lead + digits.encode(), share * mass, exact))
        pieces = source.tokens.pieces
        for i in np.flatnonzero(row[: len(pieces)] >= LEAST).tolist():
            if piece := pieces[i]:
                found.append(Written(lead + piece, float(row[i])))
    return found


def truth_at(target: Target, window: Window, t: int, found: Sequence[Written]) -> tuple[dict[int, float], float]:
    """The distribution of the target's token t, and the part of it that is not exact.

    What changes the target's tokens before t is left out, and the rest is divided by what remains.
    """
    behind = [w.data + (b"x" if w.data[-1:].isspace() else b" x") for w in found]
    outcomes = Retokeniser(target, window, t)([Continuation(data) for data in behind]).tolist()
    truth = {OTHER: max(1.0 - sum(w.mass for w in found), 0.0)}
    possible, inexact = truth[OTHER], 0.0
    for w, token in zip(found, outcomes, strict=True):
        if token == CHANGED:
            continue
        # A token that is longer than the bytes reaches into what was put behind them, or is not what they are.
        if token != OTHER and not w.data.startswith(target.tokens.piece(token)):
            token = OTHER
        truth[token] = truth.get(token, 0.0) + w.mass
        possible += w.mass
        inexact += 0.0 if w.exact else w.mass
    return {i: p / possible for i, p in truth.items()}, inexact / possible


# --- the figures -----------------------------------------------------------------------------------------------------


def positions(direction: str, target: Target, window: Window) -> Iterator[tuple[int, str]]:
    """The target's tokens that are measured, each with its place in or behind a number."""
    places = PLACES[direction]
    numbers = [number.span() for number in re.finditer(rb"\d+", window.text.encode())]
    for t, (begin, end) in enumerate(target.of(window)[1]):
        first = next((first for first, last in numbers if begin < last and end > first), None)
        if first is None:
            if any(begin == last for _, last in numbers):
                yield t, places[-1]
        elif direction == SEVERAL_TO_ONE:
            yield t, places[(begin - first) % GROUP]
        else:
            yield t, places[0 if begin == first else 1 if begin < first else 2]


def figures(target: Target, gold: int, said: dict[int, float], truth: dict[int, float]) -> dict[str, Any]:
    """What is said against what is true, over the named tokens and the truth's most probable ones."""
    ranked = sorted((i for i in truth if i != OTHER), key=lambda i: (-truth[i], i))
    over = {i: (said.get(i, 0.0), truth.get(i, 0.0)) for i in dict.fromkeys([*said, *ranked[:NAMED]])}

    def digits(i: int) -> int:
        return min(sum(byte in DIGITS.encode() for byte in target.tokens.piece(i)), len(CLASSES) - 1)

    classes = np.zeros((len(CLASSES), 2))
    for column, some in enumerate((said, truth)):
        for i, p in some.items():
            if i != OTHER:
                classes[digits(i), column] += p
    return {
        "total variation": total_variation(said, truth),
        "false": sum(max(0.0, p - q) for p, q in over.values()),
        "missing": sum(max(0.0, q - p) for p, q in over.values()),
        "missing digits": sum(max(0.0, q - p) for i, (p, q) in over.items() if digits(i)),
        "gold": [said.get(gold, 0.0), truth.get(gold, 0.0)],
        "classes": classes.round(6).tolist(),
        "tokens": {
            f"{i} {target.tokens.piece(i).decode(errors='replace')}": f"{p:.4f} {q:.4f}"
            for i, (p, q) in over.items()
            if max(p, q) >= 0.002
        },
    }


def measure(
    source: Source, targets: dict[str, Target], trees: Trees, save: Callable[[], None], follow: bool
) -> list[dict[str, Any]]:
    """One row per position of every direction and target. After every paragraph `save` is called."""
    rows = []
    composed = Composed(source, trees)
    for number, (sort, text) in enumerate(paragraphs((TEXTS / "numbers.txt").read_text("utf-8"))):
        reading = Reading(source, sort, number, text)
        own = Side(source.tokenizer, reading.window.ids, reading.rows)
        sides = {ONE_TO_SEVERAL: own}
        if not follow:  # only a source of shorter tokens is asked
            sides[SEVERAL_TO_ONE] = composed.side(reading)
        for direction, side in sides.items():
            for name in TARGETS[direction]:
                rows += measure_text(source, trees, reading, side, direction, targets[name], follow)
        save()
        print(f"paragraph {number}: {len(rows)} positions", flush=True)
    return rows


def measure_text(
    source: Source, trees: Trees, reading: Reading, side: Side, direction: str, target: Target, follow: bool = False
) -> Iterator[dict[str, Any]]:
    """One row per position of a paragraph: what the library makes of the side's distributions, and the truth."""
    window = reading.window
    numbers = None
    if follow and direction == ONE_TO_SEVERAL:
        request = asked(source, target, window.text)
        numbers = follower_of(source, target).follow(request.encoded, request.numbers)
    ranges = prefix_ranges(window.text, target.tokenizer, side.tokenizer)
    logits = torch.from_numpy(side.probabilities).log().float()
    labels = torch.tensor(side.ids)
    top_ids, top_logprobs, _, ce, *of_ranges = source_topk_from_logits(logits, labels, TOP_K, ranges=ranges)
    aligned = align(
        window.text,
        target.tokenizer,
        side.tokenizer,
        top_ids,
        top_logprobs,
        -ce,
        of_ranges,
        numbers=numbers,
        top_k=TOP_K,
    )
    for t, place in positions(direction, target, window):
        gold, (begin, end) = int(aligned.target_ids[t]), target.of(window)[1][t]
        entries = zip(aligned.source_ids[t].tolist(), aligned.source_logprobs[t].double().exp().tolist(), strict=True)
        said = {i: p for i, p in entries if i >= 0}
        found = written(source, trees, reading, begin, DECIDING.get(target.name))
        truth, inexact = truth_at(target, window, t, found)
        row = {
            "direction": direction,
            "target": target.name,
            "place": place,
            "sort": reading.sort,
            "paragraph": window.number,
            "token": t,
            "text": [reading.data[max(begin - 24, 0) : begin].decode(), reading.data[begin:end].decode()],
            "not followed": inexact,
            "covered": not int(aligned.skip_reason[t]),
        }
        yield row | (figures(target, gold, said, truth) if row["covered"] else {})


def asked(source: Source, target: Target, text: str) -> CaptureRequest:
    """What is asked of the source about a text, numbers included. The source reads its `lead` before the text."""
    ours, theirs = plain_text(target.tokenizer), plain_text(source.tokenizer)
    tokens = ours.token_bytes, theirs.token_bytes
    encoded, own, lead = ours.encode(text), theirs.encode(text), source.lead
    ranges = ranges_needed(tokens[0], encoded, tokens[1], own, theirs.byte_order)
    own = replace(own, input_ids=[*lead, *own.input_ids], start=len(lead), stop=len(lead) + own.stop)
    return CaptureRequest(own, len(text.encode()), ranges, number_rows(tokens[0], encoded, tokens[1], own))


def follower_of(source: Source, target: Target) -> NumberFollower:
    ours, theirs = plain_text(target.tokenizer), plain_text(source.tokenizer)
    return NumberFollower(ours.token_bytes, theirs.token_bytes, source.model, head_of(source.model), TOP_K)


def cost(source: Source, target: Target) -> float:
    """How many times as long a capture of the texts takes if the source is asked how their numbers go on."""
    texts = [text for _, text in paragraphs((TEXTS / "numbers.txt").read_text("utf-8"))]
    requests = [asked(source, target, text) for text in texts]
    head, order, follower = head_of(source.model), plain_text(source.tokenizer).byte_order, follower_of(source, target)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for follows in (False, True) * 3:
        start = time.monotonic()
        list(
            capture_responses(
                source.model, head, requests, order, top_k=TOP_K, batch_size=8, follower=follower if follows else None
            )
        )
        seconds[follows].append(time.monotonic() - start)
    return float(np.median(seconds[True]) / np.median(seconds[False]))


# --- tables ----------------------------------------------------------------------------------------------------------


def means(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a line of the tables says of its positions. All but the coverage is over those that have a distribution."""
    used = [row for row in rows if row["covered"]]
    found: dict[str, Any] = {"n": len(rows), "coverage": len(used) / len(rows)}
    for key in ("total variation", "false", "missing", "missing digits"):
        found[key] = float(np.mean([row[key] for row in used]))
    found["gold"] = np.mean([row["gold"] for row in used], axis=0).tolist()
    found["classes"] = np.mean([row["classes"] for row in used], axis=0).tolist()
    found["not followed"] = float(np.mean([row["not followed"] for row in rows]))
    return found


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The means of all groups of positions, by the group's name."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for direction, names in TARGETS.items():
        for name in names:
            for place in PLACES[direction]:
                groups[f"{direction} | {name} | {place}"] = [
                    row for row in rows if (row["direction"], row["target"], row["place"]) == (direction, name, place)
                ]
        for sort in dict.fromkeys(row["sort"] for row in rows):
            groups[f"{direction} | {sort}"] = [
                row for row in rows if (row["direction"], row["sort"]) == (direction, sort) and row["place"] in FIRST
            ]
    return {name: means(members) for name, members in groups.items() if any(row["covered"] for row in members)}


def table(head: Sequence[str], text_columns: int, rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * text_columns + "---:|" * (len(head) - text_columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def section(results: dict[str, Any], before: dict[str, Any] | None, command: str) -> str:
    """The results as Markdown. With results from before, cells say `before → now`."""
    now = results["figures"]
    earlier = before["figures"] if before else now

    def shown(name: str, *keys: str | int) -> str:
        values = []
        for found in (earlier.get(name, now[name]), now[name]) if before else (now[name],):
            value: Any = found
            for key in keys:
                value = value[key]
            values.append(f"{value:.3f}")
        return " → ".join(dict.fromkeys(values))

    measures = ("total variation", "false", "missing")
    cells, classes, sorts = [], [], []
    for name, of_group in now.items():
        columns = name.split(" | ")
        n = str(of_group["n"])
        if len(columns) == 2:
            sorts.append([*columns, n, *(shown(name, key) for key in measures)])
            continue
        of_all = [shown(name, key) for key in (*measures, "missing digits")]
        cells.append(
            [
                *columns, n, shown(name, "coverage"), *of_all, shown(name, "gold", 0), f"{of_group['gold'][1]:.3f}",
                f"{of_group['not followed']:.3f}",
            ]
        )  # fmt: skip
        classes.append(
            [
                *columns,
                *(f"{shown(name, 'classes', c, 0)} / {of_group['classes'][c][1]:.3f}" for c in range(len(CLASSES))),
            ]
        )
    head = ["direction", "target", "position", "n", "coverage", *measures, "of it digits"]
    was = f" Cells with an arrow say what it was at commit {before['commit']} and what it is." if before else ""
    return "\n\n".join(
        [
            f"Command: `{command}`; source {results['source']}; {results['hardware']}; torch {results['versions']['torch']}, "
            f"transformers {results['versions']['transformers']}; commit {results['commit']}.{was}",
            f"Means over positions, k = {TOP_K}. *False* and *missing* mass are over the tokens that are named and the truth's "
            f"{NAMED} most probable ones; *of it digits* is the part of the missing mass at tokens with digits. *Not followed* "
            "is the mass of long digit strings that the truth takes for whole numbers.",
            table([*head, "gold: said", "gold: true", "not followed"], 3, cells),
            "The mass on tokens with so many digits, as said / true:",
            table([*head[:3], *CLASSES], 3, classes),
            "By the sort of text, at first tokens and first digits:",
            table(["direction", "text", "n", *measures], 2, sorts),
        ]
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog=f"python -m profuser.experiments.{SECTION}", description=__doc__.split("\n")[0].split(": ", 1)[1]
    )
    parser.add_argument(
        "--model", type=Path, required=True, help="the directory of the source, a causal LM that writes single digits"
    )
    parser.add_argument(
        "--tokenizers",
        type=Path,
        required=True,
        help=f"a directory with the folders {', '.join(name for names in TARGETS.values() for name in names)}",
    )
    parser.add_argument(
        "--trees", type=Path, help="read the probabilities of digit strings from this file, and add those it lacks"
    )
    parser.add_argument(
        "--follow-numbers", action="store_true", help="ask the source how its numbers go on (align.follow_numbers)"
    )
    parser.add_argument("--json", type=Path, help="write all figures and positions to this file")
    parser.add_argument(
        "--before", type=Path, help="show the figures of this file, an earlier --json, beside the new ones"
    )
    parser.add_argument(
        "--write",
        type=Path,
        help=f"replace the {SECTION} section of this Markdown file by the tables, or {SECTION}_followed with --follow-numbers",
    )
    args = parser.parse_args(argv)
    for name in (name for names in TARGETS.values() for name in names):
        if not (args.tokenizers / name).is_dir():
            raise ConfigError(f"--tokenizers must be a directory with the folder {name}, got {args.tokenizers}; add it")
    before = read_json(args.before, "figures", "commit", fix="write it with --json") if args.before else None
    source = Source(args.model)
    made_by = f"{fingerprint(str(args.model))} {FLOOR}"
    known = load_trees(args.trees, made_by) if args.trees and args.trees.exists() else {}
    trees, saved, start = Trees(source, known), len(known), time.monotonic()

    def save() -> None:
        nonlocal saved
        if args.trees and len(trees.known) > saved:
            save_trees(args.trees, made_by, trees.known)
            saved = len(trees.known)

    targets = {
        name: Target(name, pretrained_tokenizer(args.tokenizers / name)) for names in TARGETS.values() for name in names
    }
    results: dict[str, Any] = {"source": args.model.name, **environment()}
    results["positions"] = measure(source, targets, trees, save, args.follow_numbers)
    results["figures"] = summary(results["positions"])
    if args.follow_numbers:
        results["cost"] = cost(source, targets["deepseek_v3"])
    option = " --follow-numbers" if args.follow_numbers else ""
    text = section(results, before, f"python -m profuser.experiments.{SECTION} --model DIR --tokenizers DIR{option}")
    if "cost" in results:
        text += (
            f"\n\nA capture of these texts for deepseek_v3 takes {results['cost']:.2f} times as long if the source is asked how its "
            "numbers go on."
        )
    print(text)
    print(f"\n{time.monotonic() - start:.0f} s")
    if args.json:
        write_json(args.json, results)
    if args.write:
        write_section(args.write, f"{SECTION}_followed" if args.follow_numbers else SECTION, text)


if __name__ == "__main__":
    main_of(main)
