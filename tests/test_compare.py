"""The comparison with baselines: the control that moves every KD row by one token, and what is said of which data."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT

from profuser.errors import ConfigError
from profuser.experiments import compare
from profuser.experiments.compare import ARMS, chosen_arms, main, shift_rows, shifted, table
from profuser.prepare.target_writer import TargetWriter
from profuser.recipe.parse import parse_run
from profuser.recipe.places import DEFAULT_RECIPE
from profuser.store import layout
from profuser.store.marks import labels_of, marks_of, rows_of
from profuser.train.run_directory import demo_data


def test_shifted_rows_stand_one_label_later_and_lose_nothing_else():
    first = marks_of(np.arange(9) >= 5, np.array([0, 0, 0]), np.array([5, 6, 8]))
    last = marks_of(np.arange(4) >= 2, np.array([0, 0, 1]), np.array([2, 3, 2]))
    shard = {
        "source_ce": np.zeros((3, 2), np.float32),
        "offsets": np.array([0, 9, 12, 16]),
        "marks": np.concatenate([first, np.zeros(3, np.uint64), last]).astype(np.uint8),
        "row_offsets": np.array([0, 3, 3, 6]),
        "row_tail": np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], np.float32),
        "entry_offsets": np.array([0, 6, 6, 10]),
        "entry_counts": np.array([2, 1, 3, 1, 1, 2], np.uint8),
        "entry_ids": np.arange(10, dtype=np.uint16),
        "entry_logprobs": np.arange(10, dtype=np.float16),
        "input_ids": np.arange(4),
    }
    out = shifted(shard)
    assert out["row_offsets"].tolist() == [0, 2, 2, 3]
    assert out["marks"].dtype == np.uint8
    assert [rows.tolist() for rows in rows_of(out["marks"][:9], 2)] == [[0, 0], [6, 8]]
    assert [rows.tolist() for rows in rows_of(out["marks"][12:], 2)] == [[0], [3]]
    assert (labels_of(out["marks"]) == labels_of(shard["marks"])).all()
    np.testing.assert_allclose(out["row_tail"], [0.1, 0.2, 0.4])
    assert out["entry_offsets"].tolist() == [0, 3, 3, 4]
    assert out["entry_counts"].tolist() == [2, 1, 1]
    assert out["entry_ids"].tolist() == [0, 1, 2, 6]
    assert out["input_ids"] is shard["input_ids"]


def test_a_shard_without_sequences_is_shifted_as_well():
    out = shifted(TargetWriter(2, 100, 5, "byte", "all").arrays())
    assert [len(out[name]) for name in ("marks", "row_tail", "entry_ids")] == [0, 0, 0]
    assert out["marks"].dtype == np.uint8


def test_a_control_that_was_interrupted_is_not_taken_for_a_finished_one(prepared, tmp_path, monkeypatch):
    """It would be a store in which nothing, or not all, is shifted."""
    directory = tmp_path / "store-shifted"
    monkeypatch.setattr(compare, "shifted", lambda shard: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shift_rows(prepared[2], directory)
    assert not directory.exists()
    monkeypatch.undo()
    for _ in range(2):  # what is there already is made again
        control = shift_rows(prepared[2], directory)
        assert not control.damaged()
        assert control.digest(layout.targets("train")) != prepared[2].digest(layout.targets("train"))
        assert control.digest(layout.targets("validation")) == prepared[2].digest(layout.targets("validation"))
    assert [path.name for path in tmp_path.iterdir()] == ["store-shifted"]


def demo_recipe(**data):
    recipe = parse_run("train", ["--config", str(DEFAULT_RECIPE)]).recipe
    return replace(recipe, data=replace(recipe.data, **data))


RESULTS = {
    "seeds": [0],
    "sources": {"guardian": {"safety": 0.5, "mean": 0.5}},
    "target_before": {"safety": 0.5, "mean": 0.5},
    "kd_before": 0.6,
    "arms": {"progressive": [{"fused": {"safety": 0.75, "mean": 0.75}, "kd": 0.1, "ce": 0.2}]},
    "hardware": "a CPU",
    "versions": {"torch": "2", "transformers": "5"},
    "commit": "0123",
}


@pytest.mark.parametrize("train", ["mine.jsonl", "org/demo", "demo:fusion_clean.jsonl", "./demo/fusion.jsonl"])
def test_the_demos_flaws_are_not_said_of_other_data(train):
    demo = demo_data(demo_recipe(train=train))
    assert demo is None
    text = table(RESULTS, "guardian", "command", demo)
    assert "terse" not in text
    assert "Ground truth" not in text
    assert "exact match" not in text
    assert "for each seed: +25.0 points" in text


def test_the_demos_flaws_are_said_of_the_demos_data():
    text = table(RESULTS, "guardian", "command", demo_data(demo_recipe()))
    assert "Ground truth of the fusion data: 40 % terse, 10 % wrong." in text
    assert "Held-out exact match in %" in text


def test_without_the_progressive_arm_nothing_is_said_of_it():
    text = table(RESULTS | {"arms": {"sft": RESULTS["arms"]["progressive"]}}, "guardian", "command", None)
    assert "ProFuser" not in text
    assert "| SFT | 75.0 | 75.0 | 0.100 |" in text


def test_arms_on_the_demos_own_files_are_not_run_on_other_data():
    mine = demo_recipe(train="mine.jsonl")
    assert [arm.name for arm in chosen_arms(None, demo_recipe())] == [arm.name for arm in ARMS]
    assert {arm.name for arm in ARMS} - {arm.name for arm in chosen_arms(None, mine)} == {
        "route",
        "sft-wellformed",
        "sft-clean",
        "progressive-clean",
    }
    assert [arm.name for arm in chosen_arms(["sft", "shifted"], mine)] == ["sft", "shifted"]
    with pytest.raises(ConfigError, match=r"--arms sft-clean must come with the demo's data, .* mine\.jsonl; leave"):
        chosen_arms(["sft", "sft-clean"], mine)
    with pytest.raises(ConfigError, match=r"needs data\.heldout"):
        chosen_arms(["sft"], demo_recipe(heldout=None))


def test_a_route_to_a_source_that_the_recipe_lacks_is_not_run():
    two = replace(demo_recipe(), sources=demo_recipe().sources[:2])
    assert [arm.name for arm in ARMS if arm not in chosen_arms(None, two)] == ["route"]
    with pytest.raises(ConfigError, match=r"--arms route must come with .* has guardian, scholar; leave"):
        chosen_arms(["sft", "route"], two)


def test_arms_that_mix_the_sources_are_not_run_where_the_recipe_chooses_them_otherwise():
    routed = replace(demo_recipe(), capture=replace(demo_recipe().capture, choice="route"))
    assert [arm.name for arm in ARMS if arm not in chosen_arms(None, routed)] == ["avg-ce", "softmax"]
    with pytest.raises(
        ConfigError, match=r"--arms softmax must come with capture\.choice: min_ce, .* has route; leave"
    ):
        chosen_arms(["softmax"], routed)


def test_the_demos_section_of_a_page_is_not_overwritten_with_other_data(tmp_path):
    recipe = tmp_path / "mine.yaml"
    text = DEFAULT_RECIPE.read_text().replace("train: demo:fusion.jsonl", f"train: {tmp_path}/mine.jsonl")
    assert "mine.jsonl" in text
    recipe.write_text(text)
    with pytest.raises(ConfigError, match="--write puts the demo's results into a page"):
        main(["--config", str(recipe), "--output", str(tmp_path / "out"), "--write", str(ROOT / "docs/results.md")])
    assert not (tmp_path / "out").exists()


def test_arms_that_mix_the_sources_have_a_store_with_all_of_them(tmp_path):
    base = parse_run("train", [])
    stores = {"fusion": (base.recipe.data.train, "a"), "mixed": (base.recipe.data.train, "b")}
    arms = {arm.name: arm for arm in ARMS}
    runs = {name: compare.run_of(base, arms[name], 0, tmp_path, stores) for name in ("fusellm", "avg-ce", "softmax")}
    optim = {name: run.recipe.optim for name, run in runs.items()}
    assert [(optim[name].combine, optim[name].mixing, runs[name].recipe.keep, runs[name].recipe.store) for name in runs] == [
        ("min_ce", None, "winner", "a"), ("avg_ce", 1.0, "all", "b"), ("softmax", 0.1, "all", "b"),
    ]  # fmt: skip


def test_the_routed_arm_asks_the_source_that_is_strong_in_the_prompts_skill(tmp_path):
    rows = list(compare.routed_rows())
    assert [{name: value for name, value in row.items() if name != "route"} for row in rows] == compare.demo_rows()
    assert {(row["skill"], row["route"]) for row in rows} == {
        ("knowledge", "scholar"), ("safety", "guardian"), ("reasoning", "reckoner"),
    }  # fmt: skip
    compare.write_jsonl(tmp_path / "routed.jsonl", rows)
    assert [json.loads(line) for line in (tmp_path / "routed.jsonl").read_text().splitlines()] == rows
    arm = next(arm for arm in ARMS if arm.name == "route")
    run = compare.run_of(
        parse_run("train", []), arm, 0, tmp_path, {"routed": (str(tmp_path / "routed.jsonl"), "store")}
    )
    assert (run.recipe.capture.choice, run.recipe.data.train) == ("route", str(tmp_path / "routed.jsonl"))
