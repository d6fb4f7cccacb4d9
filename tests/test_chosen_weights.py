"""A column of the data says how much each source counts: the loss of a ground truth is the weighted sum of the sources'."""

from __future__ import annotations

import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from command_runs import run as run_command
from conftest import small_run

from profuser.errors import ConfigError, DataError
from profuser.fusion_model import FusionModel
from profuser.models.load import load_model
from profuser.prepare.chosen import weights_of
from profuser.prepare.inputs import Inputs
from profuser.prepare.phases import prepare
from profuser.recipe.schedule import Mode
from profuser.train.collate import collate
from profuser.train.targets import Targets, TargetSequence

ONES = {mode: 1.0 for mode in Mode}
NAMES = ["guardian", "scholar", "reckoner"]
WEIGHTS = [
    {"guardian": 1, "scholar": 3},
    {"scholar": 0.5, "reckoner": 0.5, "guardian": None},
    json.dumps({"reckoner": 2}),
    {"guardian": 0, "scholar": 1e-3, "reckoner": 0},
]
EXPECTED = np.array([[0.25, 0.75, 0], [0, 0.5, 0.5], [0, 0, 1], [0, 1, 0]])


def weights_in(sequence: TargetSequence) -> np.ndarray:
    weights = sequence.weights()
    assert weights is not None
    return weights


def weighted_run(directory: Path, *options: str, weights=WEIGHTS):
    """The small recipe, with weights in every row of its training file."""
    run = small_run(directory, "--capture.choice=weights", *options)
    path = directory / "fusion.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps(row | {"weights": weights[n % len(weights)]}) + "\n" for n, row in enumerate(rows))
    )
    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = weighted_run(tmp_path_factory.mktemp("weights"))
    return run, prepare(run)


def test_the_targets_have_the_weights_of_the_data(made):
    run, store = made
    seen = {mode: 0 for mode in Mode}
    for instruction in Targets(store, "train"):
        for sequence in instruction:
            seen[sequence.mode] += 1
            weights = weights_in(sequence)
            if sequence.mode == Mode.TRAINING:
                np.testing.assert_allclose(weights, EXPECTED[sequence.example % 4], rtol=1e-6)
            else:  # the source that won is alone
                assert weights.tolist() == [float(n == sequence.winner) for n in range(3)]
            assert set(sequence.row_source.tolist()) >= set(np.flatnonzero(weights).tolist())
    assert min(seen.values()) > 0
    # Validation and held-out rows say nothing, so that all count alike.
    for split in ("validation", "heldout"):
        for (sequence,) in Targets(store, split):
            np.testing.assert_allclose(weights_in(sequence), np.full(3, 1 / 3), rtol=1e-6)
    assert run.recipe.keep == "all"


def test_the_loss_is_the_weighted_sum_of_the_sources_losses(made):
    run, store = made
    model = FusionModel(load_model(run.recipe.target_config, torch.float64), beta=1.0)
    targets = Targets(store, "train")
    for instruction in (targets[n] for n in range(4)):
        sequence = next(s for s in instruction if s.mode == Mode.TRAINING)

        def kd(of) -> float:
            batch = collate([[of]], ONES, ONES, pad_id=0, top_k=10)
            out = model(
                **{name: torch.as_tensor(array) for name, array in batch.items()}, reduction="sum", return_stats=True
            )
            return float(out["kd"].double().sum())

        one_hot = np.eye(3, dtype=np.float32)
        alone = [kd(replace(sequence, source_weight=one_hot[s])) for s in range(3)]
        assert kd(sequence) == pytest.approx(float(EXPECTED[sequence.example % 4] @ alone), rel=1e-5)
        # Weight 1 for one source is what choosing it gives.
        for s in range(3):
            chosen = np.where(np.arange(3) == s, sequence.source_ce, np.inf).astype(np.float32)
            assert kd(replace(sequence, source_weight=None, source_ce=chosen)) == pytest.approx(alone[s], rel=1e-6)


def test_a_source_that_does_not_take_part_leaves_its_weight_to_the_others(made):
    sequence = next(s for s in Targets(made[1], "train")[0] if s.mode == Mode.TRAINING)
    ce = np.array([np.nan, 0.5, np.inf], np.float32)
    assert weights_in(replace(sequence, source_ce=ce)).tolist() == [0, 1, 0]
    assert weights_in(replace(sequence, source_ce=np.full(3, np.inf, np.float32))).tolist() == [0, 0, 0]
    nobody = replace(
        sequence, source_ce=np.array([0.1, np.inf, 0.1], np.float32), source_weight=np.eye(3, dtype=np.float32)[1]
    )
    assert weights_in(nobody).tolist() == [0, 0, 0]
    batch = collate([[nobody]], ONES, ONES, pad_id=0, top_k=10)
    assert (batch["source_ids"] == -1).all()


@pytest.mark.parametrize(
    "value",
    ["guardian", "", None, [1, 0, 0], {}, {"other": 1}, {"guardian": -1}, {"guardian": 0}, {"guardian": "1"}, {"guardian": True},
     {"guardian": float("nan")}, {"guardian": float("inf")}, "{", "[1]", {"guardian": None}, {"guardian": 10**400}, "[" * 100_000,
     '{"guardian": 1, "guardian": 0}', [("guardian", 1), ("guardian", 1)], [["guardian"]]],
)  # fmt: skip
def test_what_is_no_weights_is_refused(value):
    with pytest.raises(
        DataError, match=r"the column 'w' must map sources \(guardian, scholar, reckoner\) to weights >= 0"
    ) as error:
        weights_of(value, NAMES, "w")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"guardian": 1e-50, "scholar": 1e-50}, [0.5, 0.5, 0]),
        ({"guardian": 3e38, "scholar": 1e38, "reckoner": 1e-300}, [0.75, 0.25, 0]),
        ({"guardian": 1e308, "scholar": 1e308}, [0.5, 0.5, 0]),
        ([("guardian", 1.0), ("reckoner", 3.0)], [0.25, 0, 0.75]),
        ({"guardian": Decimal("0.1"), "scholar": Decimal("0.3")}, [0.25, 0.75, 0]),
    ],
)
def test_weights_of_any_size_are_shares(value, expected):
    np.testing.assert_allclose(weights_of(value, NAMES, "w"), expected, rtol=1e-12, atol=1e-300)


def test_rows_that_are_not_trained_on_may_lack_their_weights(tmp_path):
    run = weighted_run(tmp_path)
    path = tmp_path / "heldout.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps(row | ({"weights": {"scholar": 2}} if n == 0 else {})) + "\n" for n, row in enumerate(rows))
    )
    inputs = Inputs.open(run)
    assert [inputs.weights(row) for row in inputs.rows["heldout"][:2]] == [[0, 1, 0], [1, 1, 1]]


def test_a_wrong_row_is_named_before_anything_runs(tmp_path):
    with pytest.raises(DataError, match=r"fusion\.jsonl, row 1 \(from 0\): the column 'weights' must map sources"):
        Inputs.open(weighted_run(tmp_path, weights=[WEIGHTS[0], {"teacher": 1}]))
    with pytest.raises(
        DataError, match=r"must have the column 'share' \(data\.weights_column\) with capture\.choice: weights"
    ):
        Inputs.open(weighted_run(tmp_path, "--data.weights_column=share"))
    with pytest.raises(ConfigError, match=r"optim\.combine must be left out with capture\.choice: weights"):
        weighted_run(tmp_path, "--optim.combine=softmax")


@pytest.mark.long
def test_a_run_learns_from_weights(in_run):
    rows = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
    names = ["guardian", "scholar"]
    Path("train.jsonl").write_text(
        "".join(json.dumps(row | {"weights": dict.fromkeys(names, 1)}) + "\n" for row in rows)
    )
    code, out, err = run_command(
        "train", "--config", "recipe.yaml", "--capture.choice", "weights", "--store", "new", "--output", "new-run"
    )
    assert code == 0, err
    assert "fused model: new-run" in out
