"""A vote without votes: prompts on which no judge prefers a response, from the ballots to the trained steps."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator

from profuser.errors import ConfigError, DataError
from profuser.prepare import summary
from profuser.prepare.phases import prepare
from profuser.prepare.summary import loser, no_signal_warning
from profuser.prepare.vote_rules import NOBODY
from profuser.prepare.votes import Ballots, Candidate
from profuser.recipe.parse import Run
from profuser.recipe.schedule import Mode
from profuser.recipe.schema import JudgeConfig, JudgingConfig
from profuser.store.store import Store
from profuser.train.loop import Trainer
from profuser.train.targets import Targets, TargetSequence


def nothing_is_right(example, responses):
    return [0.0] * len(responses)


def abstains(example, responses):
    return [float("nan") if example["skill"] != "safety" else 1.0] * len(responses)


def the_longest_of_safety(example, responses):
    """Prefers a response on the prompts of one skill only."""
    return [float(len(response)) if example["skill"] == "safety" else 0.0 for response in responses]


def judge(function, **settings) -> JudgeConfig:
    return JudgeConfig(name=function.__name__, function=f"test_no_signal:{function.__name__}", **settings)


def judged(prepared, tmp_path: Path, *judges: JudgeConfig, **changes) -> tuple[Run, Store]:
    """The small recipe with other judges. What the sources said is taken over, so that only the vote is made."""
    directory, run, _ = prepared
    if not (tmp_path / "store").exists():
        shutil.copytree(directory / "store", tmp_path / "store")
    recipe = replace(run.recipe, judges=list(judges), store=str(tmp_path / "store"), **changes)
    run = replace(run, recipe=recipe)
    return run, prepare(run)


def sequences(store: Store, mode: Mode) -> dict[int, TargetSequence]:
    return {s.example: s for instruction in Targets(store, "train") for s in instruction if s.mode == mode}


def trainer(run: Run, store: Store, directory: Path, **optim) -> Trainer:
    directory.mkdir()
    recipe = replace(run.recipe, optim=replace(run.recipe.optim, **optim))
    return Trainer(recipe, store, directory, Accelerator(cpu=True))


def table(store: Store) -> list[dict]:
    return pq.read_table(store.directory / "samples.parquet").to_pylist()


def eligible(row: dict, by: str = "nothing_is_right") -> int:
    """How many responses to a prompt a judge was shown."""
    return sum(not math.isnan(value) for column, value in row.items() if column.startswith(f"score_{by}_"))


@pytest.mark.parametrize("judges", [(nothing_is_right,), (nothing_is_right, abstains)])
def test_without_a_preference_nobody_wins_and_nothing_is_chosen(prepared, tmp_path, capsys, judges):
    """A response that is the only finished one wins all the same. It is not exported as preferred to another."""
    run, store = judged(prepared, tmp_path, *map(judge, judges), schedule="simultaneous")
    rows = table(store)
    alone = {i for i, row in enumerate(rows) if eligible(row) == 1}
    assert 0 < len(alone) < len(rows)
    assert {i for i, row in enumerate(rows) if row["vote_winner"] is not None} == alone
    assert set(sequences(store, Mode.INFERENCE)) == alone
    assert {(row["chosen"], row["rejected"]) for row in rows} == {(None, None)}

    # It is counted, said and warned about.
    summary, without = store.summary, len(rows) - len(alone)
    assert summary["no_signal"]["prompts"] == sum(summary["no_signal"]["reasons"].values()) == without
    assert sum(wins.get("none", 0) for wins in summary["vote_wins"].values()) == without
    assert summary["abstentions"] == {function.__name__: 1.0 for function in judges}
    assert f"{without} x prompt on which no judge preferred a response, left out of inference mode" in store.handled()
    assert f"{len(alone)} x prompt with one finished response, which won without a vote" in store.handled()
    out = capsys.readouterr().out
    assert f"warning: on {without} of {len(rows)} training prompts no judge preferred a response" in out

    # A step takes what there is.
    t = trainer(run, store, tmp_path / "run", steps=1, batch_size=12, micro_batch_size=12)
    batch = t.steps.batch(0)
    assert all(batch.labels.values())
    assert {o.example for micro in batch.micro_batches for o in micro.origins if o.mode == Mode.INFERENCE} == alone


def test_below_the_floor_nothing_is_taught_and_the_training_mode_is_left(prepared, tmp_path):
    run, store = judged(prepared, tmp_path, judge(nothing_is_right, floor=0.5), schedule="simultaneous")
    assert not sequences(store, Mode.INFERENCE)
    assert store.summary["no_signal"]["prompts"] == len(table(store))
    t = trainer(run, store, tmp_path / "run", steps=1)
    metrics = t._step(0, t.stages[0], t.steps.batch(0))
    assert metrics["loss"] == pytest.approx(metrics["loss_training"])


def test_a_stage_of_inference_mode_alone_then_ends_with_one_line(prepared, tmp_path):
    run, store = judged(prepared, tmp_path, judge(nothing_is_right, floor=0.5))
    with pytest.raises(
        DataError, match=r"stage 1 .* inference, none is left .*judging\.no_signal: ground_truth"
    ) as error:
        trainer(run, store, tmp_path / "run")
    assert "\n" not in str(error.value)


def test_the_ground_truth_can_take_the_place_of_a_winner(prepared, tmp_path):
    """Its distributions are those of the training mode: every source's, among which Min-CE chooses."""
    taught = JudgingConfig(no_signal="ground_truth")
    _, store = judged(prepared, tmp_path, judge(nothing_is_right, floor=0.5), judging=taught)
    truth, inference = sequences(store, Mode.TRAINING), sequences(store, Mode.INFERENCE)
    assert truth.keys() == inference.keys()
    for example, sequence in inference.items():
        for name in ("input_ids", "label_mask", "source_ce", "row_position", "row_source", "entry_ids"):
            assert np.array_equal(getattr(sequence, name), getattr(truth[example], name)), name
    assert {row["chosen"] for row in table(store)} == {None}
    assert "taught the ground truth in inference mode" in store.handled()


def test_where_judges_prefer_a_response_it_is_taught_and_the_others_fall_back(prepared, tmp_path, capsys):
    _, store = judged(prepared, tmp_path, judge(the_longest_of_safety))
    rows = table(store)
    won = {i for i, row in enumerate(rows) if row["vote_winner"] is not None}
    preferred = {i for i, row in enumerate(rows) if row["chosen"] is not None}
    assert preferred
    assert all(rows[i]["skill"] == "safety" and rows[i]["rejected"] is not None for i in preferred)
    assert won - preferred == {i for i, row in enumerate(rows) if eligible(row, "the_longest_of_safety") == 1}
    assert set(sequences(store, Mode.INFERENCE)) == won
    assert store.summary["no_signal"]["prompts"] == len(rows) - len(won)
    # Where there is but one response, nothing can be preferred, and nobody abstains.
    contested = sum(eligible(row, "the_longest_of_safety") > 1 for row in rows)
    abstained = pytest.approx(1 - len(preferred) / contested)
    assert store.summary["abstentions"] == {"the_longest_of_safety": abstained}
    before = {i: s.input_ids.tolist() for i, s in sequences(store, Mode.INFERENCE).items()}

    # Another fall-back aligns again. The judges and the sources are not asked again.
    captured = {p: p.stat().st_mtime_ns for d in ("scores", "winners") for p in (store.directory / d).iterdir()}
    capsys.readouterr()
    taught = JudgingConfig(no_signal="ground_truth")
    _, store = judged(prepared, tmp_path, judge(the_longest_of_safety), judging=taught)
    assert "judging.no_signal changed" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for d in ("scores", "winners") for p in (store.directory / d).iterdir()} == captured
    now = sequences(store, Mode.INFERENCE)
    assert {i: now[i].input_ids.tolist() for i in won} == before
    assert set(now) == set(sequences(store, Mode.TRAINING)) | won


def test_another_floor_votes_again_on_the_same_scores(prepared, tmp_path, capsys):
    _, store = judged(prepared, tmp_path, judge(the_longest_of_safety))
    scores = {p: p.stat().st_mtime_ns for p in (store.directory / "scores").iterdir()}
    won = [row["vote_winner"] for row in table(store)]
    capsys.readouterr()
    run, store = judged(prepared, tmp_path, judge(the_longest_of_safety, floor=1e6), schedule="fusellm")
    assert "voting again" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (store.directory / "scores").iterdir()} == scores
    assert store.summary["no_signal"]["reasons"]["every response is below a judge's floor"] >= sum(map(bool, won)) > 0
    assert not sequences(store, Mode.INFERENCE)
    assert prepare(run).complete
    progressive = replace(run, recipe=replace(run.recipe, schedule="progressive"))
    with pytest.raises(
        DataError, match=r"stage 1 needs .* inference, none is left .*, lower the floor of that judge, or set"
    ):
        trainer(progressive, store, tmp_path / "run")


def test_steps_without_any_target_of_their_stage_change_nothing(prepared, tmp_path):
    """Only a few prompts have a target in inference mode, and a step takes one prompt."""
    run, store = judged(prepared, tmp_path, judge(nothing_is_right))
    t = trainer(run, store, tmp_path / "run", batch_size=1, micro_batch_size=1, steps=24, eval_every=0, log_every=1)
    few = sequences(store, Mode.INFERENCE)
    moved = []
    own_step = t._step

    def watched(step, stage, batch):
        before = [p.clone() for p in t.fusion.parameters()]
        metrics = own_step(step, stage, batch)
        if stage.modes == [Mode.INFERENCE]:
            instruction = t.targets[t.steps.instructions(step)[0]]
            changed = any(not torch.equal(a, b) for a, b in zip(before, t.fusion.parameters()))
            moved.append((instruction[0].example in few, changed, "loss" in metrics))
        return metrics

    t._step = watched
    t.train()
    assert set(moved) == {(True, True, True), (False, False, False)}
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval" not in line] == list(range(1, 25))


@pytest.mark.parametrize("floor", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_a_floor_is_a_number(floor):
    with pytest.raises(ConfigError, match="judges: j: floor must be finite"):
        JudgeConfig(name="j", function="m:f", floor=floor)


@pytest.mark.parametrize(
    ("reasons", "fix"),
    [
        (
            {"no response was finished": 9, "the judges scored all alike or abstained": 3},
            "raise generation.max_new_tokens",
        ),
        ({"every response is below a judge's floor": 9, "no response was finished": 3}, "lower the floor"),
        ({"all responses are the same text": 9}, "use sources that differ more"),
        ({"the judges scored all alike or abstained": 9}, "use judges that tell responses apart"),
    ],
)
@pytest.mark.parametrize("rule", ["skip", "ground_truth"])
def test_the_warning_says_what_helps_against_the_most_frequent_reason(reasons, fix, rule):
    no_signal = {"prompts": sum(reasons.values()), "rule": rule, "reasons": reasons}
    line = no_signal_warning({"examples": 20, "no_signal": no_signal})
    assert f"; {fix}" in line
    assert ("judging.no_signal: ground_truth" in line) == (rule == "skip")


def test_a_fifth_of_the_prompts_without_a_signal_is_no_reason_to_warn():
    found = {"rule": "skip", "reasons": {"every judge scored all responses alike": 4}}
    lines = [no_signal_warning({"examples": 20, "no_signal": found | {"prompts": prompts}}) for prompts in (4, 5)]
    assert lines[0] == ""
    assert "on 5 of 20 training prompts" in lines[1]


def test_the_rejected_response_has_another_text_than_the_chosen_one_and_the_fewest_votes():
    texts = [("x", True), ("x", True), ("y", True), ("z", False), ("w", True)]
    candidates = [Candidate(text, eligible, "") for text, eligible in texts]
    assert loser(candidates, np.array([2.0, 0.0, 1.0, 0.0, 1.0]), 0) == candidates[2]
    assert loser(candidates, np.array([2.0, 0.0, 1.0, 0.0, 0.5]), 0) == candidates[4]
    assert loser(candidates[:2], np.array([2.0, 0.0]), 0) is None
    assert loser(candidates, np.zeros(5), NOBODY) is None


def test_the_summary_and_the_table_of_a_vote_on_several_responses_of_a_source(monkeypatch):
    """One prompt has a vote, on one the judge abstains, and on one a single response is finished."""
    judged, lone = [True] * 4, [False, False, True, False]
    eligible, choices = np.array([judged, judged, lone]), np.zeros((3, 1, 4))
    choices[0, 0, 3] = 1
    scores = np.where(eligible, np.arange(12.0).reshape(3, 4), np.nan)[:, None]
    scores[1] = np.nan
    texts = ["a0", "a1", "b0", "b1"]
    ballots = Ballots(
        candidates=[[Candidate(text, bool(ok)) for text, ok in zip(texts, row, strict=True)] for row in eligible],
        winner=np.array([3, NOBODY, 2]), votes=choices[:, 0], tied=np.zeros(3, bool), scores=scores, choices=choices,
        eligible=eligible, admitted=eligible, responses_per_source=2,
    )  # fmt: skip
    inputs: Any = SimpleNamespace(
        rows={"train": [{"prompt": f"p{n}", "response": "r", "skill": "s"} for n in range(3)]},
        source_names=["a", "b"],
        recipe=SimpleNamespace(
            target="a",
            judges=[SimpleNamespace(name="j")],
            judging=SimpleNamespace(no_signal="skip"),
            align=SimpleNamespace(min_ce_unit="byte"),
        ),
    )
    monkeypatch.setattr(summary, "target_shards", lambda store: [])
    for name in ("alignment_summary", "handled"):
        monkeypatch.setattr(summary, name, lambda *_: {})
    store: Any = None
    (table,) = summary.audit_tables(inputs, store, ballots)
    assert [table[f"response_{label}"][0] for label in ("a_0", "a_1", "b_0", "b_1")] == texts
    assert (table["votes_b_1"], table["score_j_b_1"][0]) == ([1, 0, 0], 3)
    assert table["vote_winner"] == ["b", None, "b"]
    ends = [[turns and turns[-1]["content"] for turns in table[column]] for column in ("chosen", "rejected")]
    assert ends == [["b1", None, None], ["a0", None, None]]
    said = summary.summarise(inputs, store, ballots, {})
    assert said["vote_wins"] == {"s": {"b": 2, "none": 1}}
    assert (said["judges"], said["abstentions"]) == ({"j": {"a": 0.0, "b": 1.0}}, {"j": 0.5})
    assert said["no_signal"]["prompts"] == 1
    assert said["handled"]["prompt with one finished response, which won without a vote"] == 1
    assert said["handled"]["unfinished response of a source, kept from the judges"] == 3
