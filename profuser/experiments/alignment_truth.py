"""`python -m profuser.experiments.alignment_truth`: how near the aligned distributions come to what the source means.

It makes two tables from five texts that were written for this purpose (`texts/`). *Reliability* shows what alignment makes
of a real source's distributions at every position. *Truth* compares estimates with a sampled truth at positions that a
seed draws. There the source is sampled as a distribution over byte strings (`byte_sampler`), and every continuation is
tokenised again behind the target's own tokens. A continuation that would have changed an earlier target token is
discarded; of all others the token at the position is counted. Three estimates of this distribution are compared on the
same positions: the library's, a one-hot on the text's token, and the mapping by exact bytes.

The total variation is taken over the ids that an estimate keeps, and over one bucket, in which its tail is compared with
the truth's mass on all other ids:

    TV = 1/2 (sum over kept i of |p_i - q_i| + |tail - (1 - sum over kept i of q_i)|).

By this measure an estimate that leaves more to its tail seems nearer to the truth. Therefore the agreement stands beside
it: the probability that estimate and truth give to the same ids, sum over kept i of min(p_i, q_i).

The noise floor is the TV between the two halves of a position's samples, in the buckets of the library's estimate. It is
about twice the TV that a perfect estimate would have to all samples, so it overstates the noise in the other columns.

These approximations are made on purpose, besides those that `byte_sampler` names:
- a text is read in windows of WINDOW source tokens, each behind one newline, so the source sees no chat template;
- a continuation goes on to its second word or to LOOKAHEAD characters, and the token at its beginning then counts as
  decided;
- where the source ends the text at the position, or gives bytes that are not UTF-8, no token is counted: this mass is part
  of the truth's mass on other ids.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from profuser.alignment.align import AlignedText
from profuser.cli import main_of
from profuser.environment import environment
from profuser.errors import ConfigError
from profuser.experiments.byte_sampler import Continuation, TextModel, continuations, covers
from profuser.experiments.page import write_section
from profuser.experiments.windows import (
    KINDS,
    LANGUAGES,
    TOP_K,
    WINDOW,
    Source,
    Target,
    Window,
    pretrained_tokenizer,
)
from profuser.store.files import write_json
from profuser.typed import read_json

ESTIMATES = ("ours", "exact bytes", "one-hot")
SECTION = "alignment_truth"
CUT_BYTES = 16  # at least so many bytes before a position may have other tokens than the source's tokenizer gives them
FLOOR = 1e-4
# A round draws `samples` continuations. Rounds end when ENOUGH · `samples` of all drawn keep the target's prefix.
MAX_ROUNDS, ENOUGH = 8, 0.8
LOOKAHEAD = {"bytes": 24, "ideographs": 4}
SECOND_WORD = re.compile(rb"\S\s+\S")
# Characters from U+3000 to U+9FFF and full-width forms, which are written without spaces between words.
IDEOGRAPH = re.compile(rb"[\xe3-\xe9\xef][\x80-\xbf]{2}")
# What stands in place of a target token: OTHER if the continuation is no text there, and CHANGED if it changes an earlier
# target token.
OTHER, CHANGED = -1, -2


# --- truth -----------------------------------------------------------------------------------------------------------


def decided(data: bytes) -> bool:
    """Whether a continuation is so long that its first target token no longer depends on what comes next."""
    ideographs = len(IDEOGRAPH.findall(data))
    return (
        len(data) >= LOOKAHEAD["bytes"] or ideographs >= LOOKAHEAD["ideographs"] or SECOND_WORD.search(data) is not None
    )


class Retokeniser:
    """The token that a target's tokenizer puts at index t of a text, if the text goes on in another way from there."""

    def __init__(self, target: Target, window: Window, t: int):
        ids, spans = target.of(window)
        data = window.text.encode()
        begin = max(spans[t][0], 0)
        self._target = target
        first = self._cut(target, ids, spans, data, t)
        self._whole = first == 0
        self._before = ids[first:t]
        self._lead = data[max(spans[first][0], 0) : begin]

    @staticmethod
    def _cut(target: Target, ids: list[int], spans, data: bytes, t: int) -> int:
        """The index of a token before t from which on the rest of the text, alone, gets the same tokens as in the whole text.

        For every continuation, only what follows this token must be tokenised again. The begins of the last few lines before
        t are tried, the latest first; if none of them serves, the index is 0.
        """
        begins = {begin: n for n, (begin, _) in enumerate(spans)}
        starts = [m.end() for m in re.finditer(rb"\n(?=\S)", data) if m.end() + 2 * CUT_BYTES <= spans[t][0]]
        for start in reversed(starts[-4:]):
            first = begins.get(start)
            if first is not None:
                encoded = target.tokens.fragment.encode(data[start:].decode(), add_special_tokens=False).ids
                if encoded == ids[first:]:
                    return first
        return 0

    def __call__(self, samples: list[Continuation]) -> np.ndarray:
        """For each of the n continuations a target token, OTHER or CHANGED, as (n,) int64."""
        outcomes = {data: self._outcome(data) for data in {sample.data for sample in samples}}
        return np.array([outcomes[sample.data] for sample in samples], dtype=np.int64)

    def _outcome(self, continuation: bytes) -> int:
        data = self._lead + continuation
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            # Only what stands before the first byte that is not UTF-8 is used, or before a character that was cut short.
            data = data[: error.start]
            text = data.decode() + ("" if error.reason == "unexpected end of data" else "\ufffd")
        if len(data) <= len(self._lead):
            return OTHER
        tokens = self._target.tokens
        if self._whole:
            ids = tokens.encode_parts([(text, True)])[0]
        else:
            ids = tokens.fragment.encode(text, add_special_tokens=False).ids
        n = len(self._before)
        if ids[:n] != self._before:
            return CHANGED
        # A token whose bytes are longer than the data reaches into the replacement character, so it is not known.
        known = len(ids) > n and ids[n] not in tokens.specials and len(tokens.of(ids[: n + 1])) <= len(data) + 1
        return ids[n] if known else OTHER


@dataclass(slots=True)
class Position:
    target: str
    language: str
    window: int
    token: int
    kind: int
    weight: float  # how many positions of its target, kind and language the texts have for each one that was drawn


def draw(targets: list[Target], all_windows: list[Window], count: int, rng: np.random.Generator) -> list[Position]:
    """Draws `count` positions, equally many of every target and kind, from all languages in turn that have such positions."""
    drawn = []
    strata = [(target, kind) for target in targets for kind in range(len(KINDS))]
    for n, (target, kind) in enumerate(strata):
        wanted = count // len(strata) + (n < count % len(strata))
        pools: dict[str, list[Position]] = {name: [] for name in LANGUAGES}
        for window in all_windows:
            spans = target.of(window)[1]
            for t in np.flatnonzero(target.kinds(window)[0] == kind).tolist():
                if spans[t][1] > max(spans[t][0], 0):
                    pools[window.language].append(Position(target.name, window.language, window.number, t, kind, 0.0))
        order = {name: rng.permutation(len(pool)).tolist() for name, pool in pools.items()}
        taken: dict[str, list[Position]] = {name: [] for name in LANGUAGES}
        for name in [name for _ in range(wanted) for name in LANGUAGES]:
            if order[name] and sum(map(len, taken.values())) < wanted:
                taken[name].append(pools[name][order[name].pop()])
        for name, positions in taken.items():
            for position in positions:
                position.weight = len(pools[name]) / len(positions)
            drawn += positions
    return drawn


def sample_truth(
    source: Source,
    text_model: TextModel,
    window: Window,
    target: Target,
    position: Position,
    samples: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Counts the target's tokens at a position in both halves of the samples, and says what was left out."""
    begin = max(target.of(window)[1][position.token][0], 0)
    starts = [b for b, _ in window.spans]
    cut = max((n for n, b in enumerate(starts) if b <= begin - CUT_BYTES), default=0)
    data = window.text.encode()[max(starts[cut], 0) : begin]
    found = covers(text_model.after(cut), source.vocab, data, floor=FLOOR)
    retokenise = Retokeniser(target, window, position.token)
    outcomes = np.zeros(0, dtype=np.int64)
    for _ in range(MAX_ROUNDS):
        drawn = continuations(text_model.after(cut), source.vocab, found, samples, rng, decided)
        outcomes = np.concatenate([outcomes, retokenise(drawn)])
        if (outcomes != CHANGED).sum() >= ENOUGH * samples:
            break
    halves = [
        {str(i): n for i, n in sorted(Counter(half[half != CHANGED].tolist()).items())}
        for half in (outcomes[::2], outcomes[1::2])
    ]
    return {
        "halves": halves,
        "changed": int((outcomes == CHANGED).sum()),
        "covers": len(found.histories),
        "pruned": found.pruned,
    }


def shares(*counts: dict[str, int]) -> dict[int, float]:
    """The relative frequencies in the sum of one or more counts."""
    total = sum(sum(count.values()) for count in counts)
    summed: Counter[int] = Counter()
    for count in counts:
        summed.update({int(i): n for i, n in count.items()})
    return {i: n / total for i, n in summed.items()} if total else {}


def total_variation(estimate: dict[int, float], truth: dict[int, float]) -> float:
    """The TV over the estimate's ids and one bucket for its tail.

    Both arguments give probabilities by token id; the truth also gives one to OTHER.
    """
    kept = sum(abs(p - truth.get(i, 0.0)) for i, p in estimate.items())
    tail = max(1.0 - sum(estimate.values()), 0.0)
    return (kept + abs(tail - (1.0 - sum(truth.get(i, 0.0) for i in estimate)))) / 2


def agreement(estimate: dict[int, float], truth: dict[int, float]) -> float:
    """The probability that both give to the same ids. A large tail cannot raise it."""
    return sum(min(p, truth.get(i, 0.0)) for i, p in estimate.items())


# --- estimates -------------------------------------------------------------------------------------------------------


def exact_bytes(
    source: Source,
    target: Target,
    window: Window,
    t: int,
    j: int,
    top_ids: list[int],
    top_masses: list[float],
    own: float,
) -> dict[int, float]:
    """The plain mapping: each of the top k at source token j goes to a target token by its own bytes.

    A candidate's bytes from the position on become the target token that has exactly these bytes, or else the longest token
    with which they begin. Where the position is inside the source token, candidates that do not begin with the bytes before
    the position are left out, and the others are scaled to a sum of 1, because a top k does not tell the whole mass of the
    tokens that begin so. At other positions, what the top k leaves out is the tail. The source's own token is added if it is
    not among the top k.
    """
    ids, spans = target.of(window)
    begin, own_begin = spans[t][0], window.spans[j][0]
    stripped = window.text.encode()[max(own_begin, 0) : max(begin, 0)]
    in_front = target.tokens.piece(ids[t])[: max(-begin, 0)]  # the leading space that the tokenizer adds itself
    candidates = dict(zip(top_ids, top_masses, strict=True))
    candidates.setdefault(window.ids[j], own)
    estimate: dict[int, float] = {}
    for candidate, mass in candidates.items():
        piece = source.tokens.pieces[candidate] or b""
        if not piece.startswith(stripped) or len(piece) == len(stripped):
            continue
        rest = in_front + piece[len(stripped) :]
        token = next((target.by_bytes[rest[:n]] for n in range(len(rest), 0, -1) if rest[:n] in target.by_bytes), None)
        if token is not None:
            estimate[token] = estimate.get(token, 0.0) + mass
    scale = sum(estimate.values()) if stripped else 1.0
    return {i: p / scale for i, p in estimate.items()}


def estimates(
    source: Source, target: Target, window: Window, t: int, aligned: AlignedText, top: tuple[torch.Tensor, ...]
) -> dict[str, dict[int, float]] | None:
    """The three estimates of the distribution at target token t; None where the library gives none."""
    if int(aligned.skip_reason[t]):
        return None
    kept = [n for n, i in enumerate(aligned.source_ids[t].tolist()) if i >= 0]
    ours = {int(aligned.source_ids[t][n]): float(np.exp(float(aligned.source_logprobs[t][n]))) for n in kept}
    j = int(target.kinds(window)[1][t])
    ids, logprobs, _, ce = top
    exact = exact_bytes(
        source, target, window, t, j, ids[j].tolist(), logprobs[j].exp().tolist(), float((-ce[j]).exp())
    )
    return {"ours": ours, "exact bytes": exact, "one-hot": {target.of(window)[0][t]: 1.0}}


# --- the two measurements --------------------------------------------------------------------------------------------


def measure_reliability(source: Source, targets: list[Target]) -> list[dict[str, Any]]:
    """One row per target and language, one per target over all languages, and one over all targets."""
    kept: dict[tuple[str, str], list[np.ndarray]] = {}
    for window in source.windows:
        text_model = source.read(window)
        for target in targets:
            aligned = target.align(window, source, text_model)
            ids, _ = target.of(window)
            kinds, _ = target.kinds(window)
            entries = np.asarray(aligned.source_ids)
            only_gold = ((entries >= 0).sum(1) == 1) & (entries[:, 0] == np.array(ids))
            skipped = np.asarray(aligned.skip_reason) != 0
            parts = kept.setdefault((target.name, window.language), [])
            parts.append(np.stack([kinds, np.asarray(aligned.reliability), only_gold, skipped]).astype(np.float64))
        print(f"reliability: {window.language}, window {window.number}", flush=True)
    rows = []
    for name in [*(target.name for target in targets), "all"]:
        for language in [*LANGUAGES, "all"]:
            parts = [
                p
                for key, found in kept.items()
                if name in (key[0], "all") and language in (key[1], "all")
                for p in found
            ]
            if name != "all" or language == "all":
                rows.append({"target": name, "language": language} | reliability_shares(np.concatenate(parts, axis=1)))
    return rows


def reliability_shares(columns: np.ndarray) -> dict[str, Any]:
    """The shares in a row of the table.

    `columns` gives for every position its kind, its reliability, whether only the text's token was kept, and whether the
    position was skipped.
    """
    kinds, reliability, only_gold, skipped = columns
    return {
        "positions": len(kinds),
        **{kind: float((kinds == n).mean()) for n, kind in enumerate(KINDS)},
        "skipped": float(skipped.mean()),
        **{f"reliability >= {bound}": float((reliability >= bound).mean()) for bound in (0.1, 0.5, 0.9)},
        "only gold": float(only_gold[skipped == 0].mean()),
    }


def measure_truth(
    source: Source, targets: list[Target], count: int, samples: int, seed: int, known: dict[tuple, dict[str, Any]]
) -> list[dict[str, Any]]:
    """One row per position: its truth, which is taken from `known` if it is there already, the estimates, and their TV."""
    by_name = {target.name: n for n, target in enumerate(targets)}
    positions = draw(targets, source.windows, count, np.random.default_rng(seed))
    rows = []
    started = time.monotonic()
    for window in source.windows:
        here = [p for p in positions if (p.language, p.window) == (window.language, window.number)]
        if not here:
            continue
        text_model = source.read(window)
        top = source.topk(window, text_model)
        aligned = {name: targets[by_name[name]].align(window, source, text_model) for name in {p.target for p in here}}
        for position in here:
            target, t = targets[by_name[position.target]], position.token
            truth = known.get((position.target, position.language, position.window, t))
            if truth is None:
                key = (seed, by_name[position.target], LANGUAGES.index(position.language), position.window, t)
                rng = np.random.default_rng(key)
                truth = sample_truth(source, text_model, window, target, position, samples, rng)
            rows.append(scored(source, target, window, position, truth, aligned[position.target], top))
        print(
            f"truth: {window.language}, window {window.number}: {len(rows)}/{len(positions)} positions, "
            f"{time.monotonic() - started:.0f} s",
            flush=True,
        )
    return rows


def scored(
    source: Source,
    target: Target,
    window: Window,
    position: Position,
    truth: dict[str, Any],
    aligned: AlignedText,
    top: tuple[torch.Tensor, ...],
) -> dict[str, Any]:
    t = position.token
    ids, spans = target.of(window)
    data, begin = window.text.encode(), max(spans[t][0], 0)
    row = {
        "target": position.target,
        "language": position.language,
        "window": position.window,
        "token": t,
        "kind": KINDS[position.kind],
        "weight": position.weight,
        "gold": ids[t],
        "text": [
            data[max(begin - 24, 0) : begin].decode(errors="replace"),
            data[begin : begin + 12].decode(errors="replace"),
        ],
        **{key: truth[key] for key in ("halves", "changed", "covers", "pruned")},
        "reliability": float(aligned.reliability[t]),
    }
    found = estimates(source, target, window, t, aligned, top)
    kept = sum(sum(half.values()) for half in truth["halves"])
    if found is None or not all(truth["halves"]):
        return row | {"skipped": "not aligned" if found is None else f"{kept} continuations kept"}
    whole = shares(*truth["halves"])
    first, second = (shares(half) for half in truth["halves"])
    bucketed = {i: first.get(i, 0.0) for i in found["ours"]}
    return row | {
        "estimates": {name: {str(i): p for i, p in estimate.items()} for name, estimate in found.items()},
        "tv": {name: total_variation(estimate, whole) for name, estimate in found.items()},
        "agreement": {name: agreement(estimate, whole) for name, estimate in found.items()},
        "noise": total_variation(bucketed, second),
    }


# --- tables ----------------------------------------------------------------------------------------------------------


def reliability_table(rows: list[dict[str, Any]]) -> str:
    columns = [*KINDS, "skipped", *(f"reliability >= {b}" for b in (0.1, 0.5, 0.9)), "only gold"]
    heads = [c.replace(">=", "≥") for c in columns]
    lines = ["| target | text | positions | " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (1 + len(columns))]
    for row in rows:
        cells = " | ".join(f"{100 * row[c]:.1f}" for c in columns)
        lines.append(f"| {row['target']} | {row['language']} | {row['positions']} | {cells} |")
    return "\n".join(lines)


def interval(values: np.ndarray, weights: np.ndarray, resamples: np.ndarray) -> tuple[float, float, float]:
    """The ratio of the weighted means of the first and second row of values, and its 95 % bootstrap interval.

    Positions are what the bootstrap resamples.
    """
    estimate = (values[0] @ weights) / (values[1] @ weights)
    over = values[:, resamples] * weights[resamples]
    low, high = np.percentile(over[0].sum(1) / over[1].sum(1), [2.5, 97.5])
    return float(estimate), float(low), float(high)


def truth_table(rows: list[dict[str, Any]], seed: int) -> tuple[str, dict[str, Any]]:
    """The table as Markdown, and the figures in it."""
    used = [row for row in rows if "tv" in row]
    groups: dict[str, list[dict[str, Any]]] = {"all": used, "all, weighted by their shares of the texts": used}
    groups |= {kind: [row for row in used if row["kind"] == kind] for kind in KINDS}
    groups |= {
        name: [row for row in used if row["target"] == name] for name in dict.fromkeys(r["target"] for r in used)
    }
    groups["reliability < 0.5"] = [row for row in used if row["reliability"] < 0.5]
    groups["reliability ≥ 0.5"] = [row for row in used if row["reliability"] >= 0.5]
    columns = ["ours", "exact bytes", "one-hot", "noise floor", "ours / exact bytes", "ours / one-hot"]
    agreements = [f"agreement: {estimate}" for estimate in ESTIMATES]
    heads = [*columns, *agreements]
    lines = ["| positions | n | " + " | ".join(heads) + " |", "|---|---:|" + "---:|" * len(heads)]
    figures: dict[str, Any] = {}
    for name, members in groups.items():
        if not members:
            continue
        resamples = np.random.default_rng(seed).integers(len(members), size=(4000, len(members)))
        weights = np.array([row["weight"] if "weighted" in name else 1.0 for row in members])
        tv = {estimate: np.array([row["tv"][estimate] for row in members]) for estimate in ESTIMATES}
        tv["noise floor"] = np.array([row["noise"] for row in members])
        ones = np.ones(len(members))
        cells = {column: interval(np.stack([tv[column], ones]), weights, resamples) for column in columns[:4]}
        for other in ("exact bytes", "one-hot"):
            cells[f"ours / {other}"] = interval(np.stack([tv["ours"], tv[other]]), weights, resamples)
        agreed = [float(np.average([row["agreement"][e] for row in members], weights=weights)) for e in ESTIMATES]
        figures[name] = {"n": len(members), **cells, **dict(zip(agreements, agreed))}
        shown = [f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in cells.values()]
        shown = " | ".join([*shown, *(f"{x:.3f}" for x in agreed)])
        lines.append(f"| {name} | {len(members)} | {shown} |")
    return "\n".join(lines), figures


def section(results: dict[str, Any], command: str) -> str:
    """The results as Markdown."""
    where = (
        f"Command: `{command}`; source {results['source']}; {results['hardware']}; torch {results['versions']['torch']}, "
        f"transformers {results['versions']['transformers']}; commit {results['commit']}."
    )
    parts = [where]
    if results.get("reliability"):
        parts += [
            f"The share of target positions in %, at k = {TOP_K}, from the source's real probabilities in windows of {WINDOW} "
            "source tokens behind one newline. `only gold` is the share, among the positions that have a distribution, of those "
            "that hold nothing but the text's token.",
            reliability_table(results["reliability"]),
        ]
    if results.get("positions"):
        rows = results["positions"]
        skipped = Counter(row["skipped"] for row in rows if "skipped" in row)
        kept = [sum(sum(half.values()) for half in row["halves"]) for row in rows]
        left_out = ", ".join(f"{n} ({reason})" for reason, n in skipped.items()) or "none"
        parts += [
            f"The total variation to the sampled truth at k = {TOP_K}: mean [95 % bootstrap interval over positions]. There are "
            f"{results['samples']} continuations per position, and up to {MAX_ROUNDS} times as many where few keep the target's "
            f"prefix (kept: {min(kept)} to {max(kept)}, mean {np.mean(kept):.0f}). Positions left out: {left_out}. The noise "
            "floor is the distance between the two halves of the samples, which is about twice the noise in the other columns. "
            "The agreement is the probability that estimate and truth give to the same tokens; a tail cannot add to it.",
            results["truth_table"],
        ]
    return "\n\n".join(parts)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m profuser.experiments.alignment_truth", description=__doc__.split("\n")[0].split(": ", 1)[1]
    )
    parser.add_argument("--model", type=Path, required=True, help="the directory of the source model, a causal LM")
    parser.add_argument(
        "--tokenizers", type=Path, required=True, help="a directory with one folder per target tokenizer"
    )
    parser.add_argument(
        "--targets", nargs="+", default=["llama2", "qwen2", "gpt_neox"], help="which folders of --tokenizers to use"
    )
    parser.add_argument("--positions", type=int, default=216, help="how many positions are drawn, over all targets")
    parser.add_argument("--samples", type=int, default=256, help="how many continuations are sampled per position")
    parser.add_argument("--seed", type=int, default=0, help="the seed of positions and samples")
    parser.add_argument("--only", choices=("reliability", "truth"), help="make only one of the two tables")
    parser.add_argument("--json", type=Path, help="write all figures and positions to this file")
    parser.add_argument(
        "--reuse", type=Path, help="take the sampled truth of positions from this file, written by an earlier --json"
    )
    parser.add_argument("--write", type=Path, help=f"replace the {SECTION} section of this Markdown file by the tables")
    args = parser.parse_args(argv)
    source = Source(args.model)
    for name in args.targets:
        if not (args.tokenizers / name).is_dir():
            raise ConfigError(f"--targets must be folders of --tokenizers, got {name!r}; {args.tokenizers} has none")
    targets = [Target(name, pretrained_tokenizer(args.tokenizers / name)) for name in args.targets]
    results: dict[str, Any] = {"source": args.model.name, "samples": args.samples, "seed": args.seed, **environment()}
    if args.only != "truth":
        results["reliability"] = measure_reliability(source, targets)
    if args.only != "reliability":
        earlier = read_json(args.reuse) if args.reuse else {"positions": []}
        results["samples"] = earlier.get("samples", args.samples)
        known = {(r["target"], r["language"], r["window"], r["token"]): r for r in earlier["positions"]}
        results["positions"] = measure_truth(source, targets, args.positions, args.samples, args.seed, known)
        results["truth_table"], results["truth"] = truth_table(results["positions"], args.seed)
    flags = f"--targets {' '.join(args.targets)} --positions {args.positions} --samples {results['samples']} --seed {args.seed}"
    text = section(results, f"python -m profuser.experiments.alignment_truth --model DIR --tokenizers DIR {flags}")
    print(text)
    if args.json:
        write_json(args.json, results)
    if args.write:
        write_section(args.write, SECTION, text)


if __name__ == "__main__":
    main_of(main)
