"""Steps that stand out are said, with the examples in them: a loss far above those before, or a step far slower."""

from __future__ import annotations

import json
import random

import pytest
from test_train import trainer

from profuser.errors import NonFiniteError
from profuser.store.sealed import unsealed
from profuser.train.health import ENOUGH, Health, spike


def steady(health: Health, count: int, stage: int = 0, seed: int = 0) -> None:
    """Steps with a falling, noisy loss, none of which stands out."""
    rng = random.Random(seed)
    for n in range(count):
        assert health.notices(stage, 2.0 * 0.99**n + rng.gauss(0, 0.1), rng.uniform(0.8, 2.0)) == []


@pytest.mark.parametrize("seed", range(20))
def test_a_noisy_falling_loss_does_not_stand_out(seed):
    steady(Health(), 300, seed=seed)


def test_a_spike_and_a_slow_step_stand_out_each_with_its_figures():
    health = Health()
    steady(health, 40)
    assert health.notices(0, 9.0, 1.0)[0].startswith("the loss was 9.000, the median of the 40 steps before 1.")
    (slow,) = health.notices(0, 1.4, 60.0)
    assert slow.startswith("it took 60.0 s, ")
    assert len(health.notices(0, 9.0, 60.0)) == 2  # one spike does not hide the next


def test_few_steps_say_nothing_and_a_stage_begins_anew():
    health = Health()
    steady(health, ENOUGH - 1)
    assert health.notices(0, 9.0, 60.0) == []
    health = Health()
    steady(health, 40)
    assert health.notices(1, 9.0, 1.0) == []
    steady(health, 5, stage=2)
    health = Health()
    steady(health, 40)
    assert health.notices(1, 2.0, 60.0) == []  # steps of another stage take another time


def test_a_step_without_a_loss_counts_for_the_time_alone():
    health = Health()
    for _ in range(ENOUGH):
        assert health.notices(0, None, 1.0) == []
    assert health.notices(0, 5.0, 1.0) == []
    assert len(health.notices(0, None, 11.0)) == 1


def test_equal_losses_have_no_deviation_and_a_little_more_is_no_spike():
    assert spike([1.0] * 20, 1.4) == ""
    assert spike([1.0] * 20, 1.6) != ""
    assert spike([0.0] * 20, 0.0) == ""


def test_a_spike_is_six_standard_deviations_above_the_median_which_the_median_distance_estimates():
    before = [0.9, 1.1] * 10
    assert spike(before, 1 + 6 * 0.148) == ""
    assert spike(before, 1 + 6 * 0.149) != ""


def test_the_trainer_says_which_examples_were_in_the_step(prepared, tmp_path, capsys):
    _, run, store = prepared
    t = trainer(run, store, tmp_path / "run")
    steady(t.health, 20, stage=1)
    t._say_what_stands_out(2, 1, 50.0, 1.0)
    examples = sorted({s.example for i in t.steps.instructions(2) for s in t.targets[i]})
    assert f"training examples {', '.join(map(str, examples))}" in capsys.readouterr().out
    (line,) = (tmp_path / "run/notices.jsonl").read_text().splitlines()
    entry = unsealed(json.loads(line), {"step": int, "what": str, "examples": [int]})
    assert (entry["step"], entry["examples"]) == (3, examples)


def test_a_gradient_that_is_not_finite_names_the_examples_of_its_step(prepared, tmp_path, monkeypatch):
    _, run, store = prepared
    t = trainer(run, store, tmp_path / "run")
    monkeypatch.setattr(t.updates, "update", lambda: float("inf"))
    examples = sorted({s.example for i in t.steps.instructions(2) for s in t.targets[i]})
    with pytest.raises(
        NonFiniteError, match=f"norm inf at step 3, training examples {', '.join(map(str, examples))}; lower"
    ):
        t._step(2, t.stages[0], t.steps.batch(2))
    (line,) = (tmp_path / "run/notices.jsonl").read_text().splitlines()
    assert json.loads(line)["examples"] == examples
