"""Schedules: the weights of their stages, how they divide the steps, and the learning rate in each."""

from dataclasses import replace
from itertools import pairwise

import pytest

from profuser.errors import ConfigError
from profuser.recipe.optim import OptimConfig
from profuser.recipe.parse import parse_run
from profuser.recipe.schedule import learning_rate, plan, stage_at
from profuser.recipe.schema import StageConfig


@pytest.fixture
def recipe():
    return parse_run("train", [], {}, "").recipe


def weights(recipe):
    return [(s.inference_weight, s.training_weight) for s in plan(recipe, 100)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("progressive", [(1, 0), (0.1, 1)]),
        ("simultaneous", [(1, 1)]),
        ("reverse", [(0, 1), (1, 0.1)]),
        ("fusellm", [(0, 1)]),
        ("sft", [(0, 1)]),
    ],
)
def test_named_schedules_have_the_papers_weights(recipe, schedule, expected):
    assert weights(replace(recipe, schedule=schedule)) == expected


def test_sft_distils_nothing_whatever_beta_says(recipe):
    assert [s.beta for s in plan(replace(recipe, schedule="sft"), 100)] == [0.0]


def test_schedules_share_the_same_number_of_steps(recipe):
    for schedule in ("progressive", "simultaneous", "reverse", "fusellm", "sft"):
        stages = plan(replace(recipe, schedule=schedule, optim=replace(recipe.optim, steps=101)), 100)
        assert stages[0].first == 0
        assert stages[-1].stop == 101
        assert all(a.stop == b.first for a, b in pairwise(stages))


def test_epochs_become_steps(recipe):
    optim = replace(recipe.optim, steps=None, epochs=3, batch_size=16)
    assert plan(replace(recipe, optim=optim, schedule="sft"), 100)[-1].stop == 19


def test_more_steps_than_can_be_counted_are_refused(recipe):
    for epochs in (1e17, 9e18):
        with pytest.raises(ConfigError, match=r"fewer than 2\*\*53 steps, got \d+; lower optim.epochs"):
            plan(replace(recipe, optim=replace(recipe.optim, steps=None, epochs=epochs)), 10_000)


def test_stages_spelt_out_divide_the_steps_by_their_shares(recipe):
    stages = [StageConfig(inference_weight=1, share=3), StageConfig(training_weight=1, share=1, beta=0.5)]
    planned = plan(replace(recipe, schedule=stages, optim=replace(recipe.optim, steps=100)), 10)
    assert [(s.first, s.stop) for s in planned] == [(0, 75), (75, 100)]
    assert planned[1].beta == 0.5
    assert [stage_at(planned, s) for s in (0, 74, 75, 99)] == [0, 0, 1, 1]


def test_shares_need_not_sum_to_one(recipe):
    stages = [StageConfig(inference_weight=1, share=0.3), StageConfig(training_weight=1, share=0.1)]
    planned = plan(replace(recipe, schedule=stages, optim=replace(recipe.optim, steps=100)), 10)
    assert [(s.first, s.stop) for s in planned] == [(0, 75), (75, 100)]


def test_a_part_of_a_step_of_warm_up_is_a_whole_one(recipe):
    optim = OptimConfig(lr=1.0, warmup_ratio=0.03, steps=50)
    (stage,) = plan(replace(recipe, optim=optim, schedule="sft"), 100)
    assert [learning_rate(optim, stage, n) for n in (0, 1)] == [0.5, 1.0]


def test_learning_rate_warms_up_and_decays_within_each_stage(recipe):
    optim = OptimConfig(lr=1.0, warmup_ratio=0.1, steps=200, min_lr_ratio=0.2)
    for stage in plan(replace(recipe, optim=optim), 100):
        rates = [learning_rate(optim, stage, s) for s in range(stage.first, stage.stop)]
        assert rates[0] == pytest.approx(0.1)
        assert max(rates) == pytest.approx(1.0)
        assert rates.index(max(rates)) in (9, 10)
        assert rates[-1] == pytest.approx(0.2, abs=0.01)
        assert all(a >= b for a, b in pairwise(rates[10:]))


def test_the_cosine_begins_where_the_warm_up_ends(recipe):
    optim = OptimConfig(lr=1.0, warmup_ratio=0.1, steps=200, min_lr_ratio=0.2)
    for stage in plan(replace(recipe, optim=optim), 100):
        # The warm-up has ten steps. Of the 90 behind it, 45 are half.
        rates = [learning_rate(optim, stage, stage.first + n) for n in (9, 10, 55)]
        assert rates == pytest.approx([1.0, 1.0, 0.6])
