"""Writes what a preparation found: each source's wins, how well it aligns, and a table of all responses with their scores."""

from __future__ import annotations

import functools
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from profuser.alignment.types import KINDS
from profuser.prepare.agreement import agreement
from profuser.prepare.data import Row, shared_prompts
from profuser.prepare.inputs import Inputs
from profuser.prepare.vote_rules import NOBODY
from profuser.prepare.votes import Ballots, Candidate
from profuser.recipe.schedule import Mode
from profuser.store import layout
from profuser.store.files import as_json
from profuser.store.no_signal import advice
from profuser.store.parquet import AT_A_TIME
from profuser.store.store import Store
from profuser.text.fit import Verdict
from profuser.text.template import conversation

NO_SIGNAL = {"skip": "left out of inference mode", "ground_truth": "taught the ground truth in inference mode"}
"""What becomes of a prompt without a signal, for every value of judging.no_signal."""
MUCH_WITHOUT_SIGNAL = 0.2
"""The share of prompts without a signal above which a warning is printed."""


def write_summary(inputs: Inputs, store: Store, ballots: Ballots | None, seconds: Mapping[str, float]) -> None:
    """Writes summary.json and samples.parquet, the audit table, beside the shards. `seconds` says how long each phase took."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # The first word of a column's name says what it holds; all others are texts.
    turn = pa.struct({"role": pa.string(), "content": pa.string()})
    types = {"votes": pa.float64(), "score": pa.float64(), "chosen": pa.list_(turn), "rejected": pa.list_(turn)}
    table, writer = io.BytesIO(), None
    for columns in audit_tables(inputs, store, ballots):
        schema = pa.schema({name: types.get(name.partition("_")[0], pa.string()) for name in columns})
        writer = writer or pq.ParquetWriter(table, schema)
        writer.write_table(pa.table(columns, schema))
    assert writer is not None
    writer.close()
    store.put_finding("summary.json", as_json(summarise(inputs, store, ballots, seconds)))
    store.put_finding("samples.parquet", table.getvalue())


def summarise(inputs: Inputs, store: Store, ballots: Ballots | None, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Returns the content of summary.json."""
    rows, names = inputs.rows["train"], inputs.source_names
    shards = target_shards(store)
    summary: dict[str, Any] = {
        "sources": names,
        "target": inputs.recipe.target,
        "skills": list(dict.fromkeys(row["skill"] for row in rows)),
        "examples": len(rows),
        "min_ce_unit": inputs.recipe.align.min_ce_unit,
        "min_ce_wins": count_wins(rows, min_ce_winners(shards, len(rows)), names),
        "vote_wins": {},
        "judges": {},
        "abstentions": {},
        "no_signal": None,
        "agreement": None,
        "alignment": alignment_summary(shards, names),
        "handled": handled(inputs, store),
        "seconds": dict(seconds),
    }
    # The vote, where there was one: each source's wins and its share of every judge's first places, and how often each judge
    # abstained and nobody won.
    if ballots is not None:
        summary["vote_wins"] = count_wins(rows, [ballots.winning_source(e) for e in range(len(rows))], names)
        judged = np.flatnonzero(ballots.eligible.sum(1) > 1)  # where there is something to prefer
        for r, judge in enumerate(inputs.recipe.judges):
            of_judge = ballots.choices[:, r]
            voted = np.asarray(of_judge.any(1))
            shares = of_judge.sum(0) / max(1, voted.sum())
            summary["judges"][judge.name] = {
                name: float(shares[ballots.places_of(source)].sum()) for source, name in enumerate(names)
            }
            summary["abstentions"][judge.name] = 1 - float(voted[judged].mean()) if len(judged) else 0.0
        summary["agreement"] = agreement(ballots, [judge.name for judge in inputs.recipe.judges])
        rule, reasons = inputs.recipe.judging.no_signal, ballots.no_signal()
        summary["no_signal"] = {"prompts": sum(reasons.values()), "rule": rule, "reasons": reasons}
        if reasons:
            summary["handled"][f"prompt on which no judge preferred a response, {NO_SIGNAL[rule]}"] = sum(
                reasons.values()
            )
        won = [e for e in range(len(rows)) if ballots.winning_source(e) != NOBODY]
        if alone := sum(not ballots.preferred(e) for e in won):
            summary["handled"]["prompt with one finished response, which won without a vote"] = alone
        unusable = Counter(
            c.left_out or f"{'unfinished' if c.text else 'empty'} response of a source, kept from the judges"
            for of_prompt in ballots.candidates
            for c in of_prompt
            if not c.eligible and c.left_out != Verdict.NOT_WINNER.label
        )
        summary["handled"] |= unusable
    return summary


def no_signal_warning(summary: Mapping[str, Any]) -> str:
    """Returns the line that warns of a vote without votes; it is empty where the judges preferred a response often enough."""
    found, examples = summary.get("no_signal"), summary["examples"]
    if not found or found["prompts"] <= MUCH_WITHOUT_SIGNAL * examples:
        return ""
    reasons = ", ".join(f"{n} x {reason}" for reason, n in found["reasons"].items())
    return (
        f"warning: on {found['prompts']} of {examples} training prompts no judge preferred a response ({reasons}); they are "
        f"{NO_SIGNAL[found['rule']]}; {advice(found['reasons'], found['rule'])}"
    )


def audit_tables(inputs: Inputs, store: Store, ballots: Ballots | None) -> Iterator[dict[str, list]]:
    """Yields the columns of the audit table, which has one row per training prompt, for some prompts after the other.

    They hold the texts, the winners, the votes and the scores. The last two, `chosen` and `rejected`, hold the vote as a
    preference between two conversations, in the form that preference training uses. Where no judge preferred the winner, both
    are null.
    """
    everything, names = inputs.rows["train"], inputs.source_names
    min_ce = min_ce_winners(target_shards(store), len(everything))
    for first in range(0, len(everything), AT_A_TIME):
        # The ground truth and who won by Min-CE.
        rows = everything[first : first + AT_A_TIME]
        examples = range(first, first + len(rows))
        table: dict[str, list] = {
            "prompt": [str(row["prompt"]) for row in rows],
            "ground_truth": [row["response"] for row in rows],
            "skill": [row["skill"] for row in rows],
            "min_ce_winner": [None if min_ce[e] == NOBODY else names[min_ce[e]] for e in examples],
        }
        if ballots is None:
            yield table
            continue

        # Every response with its votes and scores. Where a source gave several, its columns are numbered.
        candidates = [ballots.candidates[e] for e in examples]
        votes, scores = ballots.votes[examples], ballots.scores[examples].astype(np.float64)
        for source, name in enumerate(names):
            for n, c in enumerate(ballots.places_of(source)):
                label = f"{name}_{n}" if ballots.responses_per_source > 1 else name
                table[f"response_{label}"] = [of_prompt[c].text for of_prompt in candidates]
                table[f"votes_{label}"] = votes[:, c].tolist()
                for r, judge in enumerate(inputs.recipe.judges):
                    table[f"score_{judge.name}_{label}"] = scores[:, r, c].tolist()

        # Who won the vote, and the vote as a preference.
        winning = [ballots.winning_source(e) for e in examples]
        table["vote_winner"] = [None if winner == NOBODY else names[winner] for winner in winning]
        table["chosen"] = [
            conversation(row["prompt"], of_prompt[ballots.winner[e]].text) if ballots.preferred(e) else None
            for e, row, of_prompt in zip(examples, rows, candidates)
        ]
        losers = [loser(*of_prompt) for of_prompt in zip(candidates, votes, ballots.winner[examples])]
        table["rejected"] = [
            None if losing is None else conversation(row["prompt"], losing.text) for row, losing in zip(rows, losers)
        ]
        yield table


def target_shards(store: Store) -> list[dict[str, np.ndarray]]:
    """Reads the shards of targets of the training split."""
    kind = layout.targets("train")
    return [store.get(kind, number) for number in store.numbers(kind)]


def min_ce_winners(shards: Sequence[Mapping[str, np.ndarray]], examples: int) -> list[int]:
    """Returns for each example the source with the lowest cross-entropy on the ground truth, the first of several equal ones.

    It is NOBODY where no source was scored. `examples` is the number of training examples.
    """
    winner = [NOBODY] * examples
    for shard in shards:
        for example, mode, ce in zip(shard["example"], shard["mode"], shard["source_ce"]):
            if mode == Mode.TRAINING and (won := layout.winner_of(ce)) is not None:
                winner[example] = won
    return winner


def count_wins(rows: Sequence[Row], winners: Sequence[int], names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Counts by skill and source how many examples the source won. Examples that nobody won count for "none"."""
    wins: dict[str, Counter] = {}
    for row, winner in zip(rows, winners):
        wins.setdefault(row["skill"], Counter())["none" if winner == NOBODY else names[winner]] += 1
    return {skill: dict(counter) for skill, counter in wins.items()}


def alignment_summary(
    shards: Sequence[Mapping[str, np.ndarray]], names: Sequence[str]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Summarises the alignment by mode and source.

    A summary holds the number of positions, the share of each kind, the coverage, the mean mapped mass, and the histogram of
    the reliability in ten bins.
    """
    keys = ("kinds", "covered", "mapped_mass", "reliability")
    total: dict[str, np.ndarray] = {key: functools.reduce(np.add, [shard[key] for shard in shards]) for key in keys}
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for mode in Mode:
        for source, name in enumerate(names):
            positions = int(total["kinds"][mode, source].sum())
            if positions:
                result.setdefault(mode.key, {})[name] = {
                    "positions": positions,
                    **{kind: float(count / positions) for kind, count in zip(KINDS, total["kinds"][mode, source])},
                    "coverage": float(total["covered"][mode, source] / positions),
                    "mapped_mass": float(total["mapped_mass"][mode, source] / max(1, total["covered"][mode, source])),
                    "reliability": total["reliability"][mode, source].tolist(),
                }
    return result


def handled(inputs: Inputs, store: Store) -> dict[str, int]:
    """Counts what is odd about the texts of all splits, and what became of them. One that several sources skip counts once."""
    counts: Counter[str] = Counter()
    names = inputs.source_names
    for split, rows in inputs.rows.items():
        # What the captures of the ground truth, and of the responses that won, say about their texts.
        captured = [[layout.truth(split, name) for name in names]]
        if split == "train":
            captured.append([layout.winners(name) for name in names])
        for kinds in captured:
            for number in store.numbers(kinds[0]):
                shards = [store.get(kind, number) for kind in kinds]
                reasons, cut = (np.stack([shard[key] for shard in shards]) for key in ("reason", "cut"))
                for verdict in Verdict:
                    if verdict not in (Verdict.OK, Verdict.NOT_WINNER):
                        counts[verdict.label] += int((reasons == verdict).any(0).sum())
                counts["over-long response, cut without an end of turn"] += int(cut.any(0).sum())

        # What the data itself shows.
        if split != "train":
            name = {"heldout": "held-out"}.get(split, split)
            counts[f"{name} prompt that is trained on as well, kept"] += shared_prompts(rows, inputs.rows["train"])
        counts["empty prompt, kept"] += sum(not str(row["prompt"]).strip() for row in rows)
        held = [chat.token_bytes.has_control for chat in (inputs.target, *inputs.chats.values())]
        counts["control token spelt out in a text, kept as text"] += sum(
            any(has(str(row["prompt"])) or has(row["response"]) for has in held) for row in rows
        )
    return {name: n for name, n in counts.items() if n}


def loser(candidates: Sequence[Candidate], votes: np.ndarray, winner: int) -> Candidate | None:
    """Returns the eligible candidate with the fewest votes whose text is not the winner's; None where there is none."""
    others = [
        c for c, (text, ok, _) in enumerate(candidates) if ok and winner != NOBODY and text != candidates[winner].text
    ]
    return candidates[min(others, key=lambda c: (votes[c], c))] if others else None
