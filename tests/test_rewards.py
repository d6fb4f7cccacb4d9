"""At each validation the judges score what the target answers to validation prompts, and their mean scores are logged and drawn."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch._dynamo.utils import counters

from profuser.errors import ConfigError, DataError
from profuser.evaluate import rewards as module
from profuser.evaluate.rewards import Rewards
from profuser.evaluate.scores import answer
from profuser.plan.plan import make_plan
from profuser.prepare.inputs import load_split
from profuser.prepare.judges import load_judge
from profuser.recipe.adapter import AdapterConfig
from profuser.recipe.parse import parse_run
from profuser.recipe.schema import JudgeConfig
from profuser.report.figures import draw_compared_curves, draw_curves
from profuser.report.metrics import Change, Metrics, StageRow, compared_stages, stage_table
from profuser.report.theme import LIGHT
from profuser.train import compiled
from profuser.train.loop import Trainer

CPU = torch.device("cpu")
JUDGES = ("judge-a", "judge-b", "verifier")


def opened(prepared, directory, adapter=None, **optim) -> Trainer:
    recipe = prepared[1].recipe
    optim = replace(recipe.optim, **{"eval_rewards": 3, "checkpoint_every": 0, "keep_best": False} | optim)
    recipe = replace(recipe, adapter=adapter, optim=optim)
    directory.mkdir(exist_ok=True)
    return Trainer(recipe, prepared[2], directory, Accelerator(cpu=True), Rewards.open(recipe, prepared[2], CPU))


def validations(t: Trainer) -> list[dict]:
    lines = [json.loads(line) for line in t.metrics.read_text().splitlines()]
    return [line["eval"] for line in lines if "eval" in line]


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory) -> Trainer:
    t = opened(prepared, tmp_path_factory.mktemp("rewards") / "run", eval_rewards=100)
    t.train()
    return t


def test_the_means_are_those_of_the_judges_on_the_answers_of_the_target_as_it_is_then(prepared, trained):
    recipe, found = trained.recipe, validations(trained)
    assert len(found) == 3
    assert all(list(line) == ["ce", "kd", *(f"reward_{name}" for name in JUDGES)] for line in found)
    rows = load_split(recipe, "validation")
    prompts = [row["prompt"] for row in rows]
    trained.fusion.eval()
    texts = answer(trained.fusion.model, trained.chat, prompts, recipe)
    for config in recipe.judges:
        scores = load_judge(config, date=prepared[2].date)(rows, [[text] for text in texts])
        assert found[-1][f"reward_{config.name}"] == pytest.approx(float(scores.mean()), rel=1e-6)
    assert found[0]["reward_judge-a"] != found[-1]["reward_judge-a"]


def test_what_is_trained_stays_the_same(prepared, trained, tmp_path):
    t = opened(prepared, tmp_path / "without", eval_rewards=0)
    t.train()
    assert [list(line) for line in validations(t)] == [["ce", "kd"]] * 3
    assert [line["ce"] for line in validations(t)] == [line["ce"] for line in validations(trained)]
    for ours, theirs in zip(t.fusion.parameters(), trained.fusion.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_so_many_prompts_are_taken_at_random_and_always_the_same(prepared):
    recipe, store = prepared[1].recipe, prepared[2]

    def taken(number, seed=0) -> list[str]:
        of = replace(recipe, seed=seed, optim=replace(recipe.optim, eval_rewards=number))
        found = Rewards.open(of, store, CPU)
        return [] if found is None else [row["prompt"] for row in found.rows]

    assert taken(0) == []
    everything = [row["prompt"] for row in load_split(recipe, "validation")]
    assert taken(100) == everything
    assert taken(3) == taken(3)
    assert set(taken(3)) < set(everything)
    assert len({tuple(taken(3, seed)) for seed in range(8)}) > 1


@pytest.mark.parametrize(
    "way", ["sharded", *(pytest.param(w, marks=pytest.mark.long) for w in ("adapter", "checkpointing"))]
)
def test_the_target_answers_whichever_way_it_is_trained(prepared, trained, tmp_path, way):
    """One process counts as several. Training goes on from there as if nothing had been asked."""
    options = {"adapter": AdapterConfig(rank=2)} if way == "adapter" else {}
    options |= {"gradient_checkpointing": True} if way == "checkpointing" else {}
    if way == "sharded":
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        t = opened(prepared, tmp_path / "run", eval_rewards=100, shard=way == "sharded", **options)
        assert t.sharded == (way == "sharded")
        t.train()
    finally:
        if way == "sharded":
            torch.distributed.destroy_process_group()
    found, expected = validations(t), validations(trained)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    if way != "adapter":
        assert found[-1] == pytest.approx(expected[-1], rel=1e-4)
    assert t.fusion.training


@pytest.mark.long
def test_a_compiled_target_answers_without_a_graph(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()
    t = opened(prepared, tmp_path / "run", compile=True)
    t._evaluate(0, 0)
    before = counters["stats"]["unique_graphs"]
    t._evaluate(0, 0)
    torch._dynamo.reset()
    first, again = validations(t)
    assert first == again
    assert counters["stats"]["unique_graphs"] == before <= 2


def test_a_judge_that_fails_is_said_and_the_training_goes_on(prepared, tmp_path, monkeypatch, capsys):
    load = module.load_judge

    def broken(config: JudgeConfig, *args, **options):
        if config.name == "judge-b":
            raise DataError("judge judge-b: its files are gone")
        return load(config, *args, **options)

    monkeypatch.setattr(module, "load_judge", broken)
    t = opened(prepared, tmp_path / "run")
    t._evaluate(0, 0)
    (found,) = validations(t)
    assert found["reward_judge-b"] is None
    assert found["reward_judge-a"] is not None
    assert "judge judge-b could not score the answers" in capsys.readouterr().out


def test_answers_that_a_judge_does_not_score_do_not_count(prepared, monkeypatch):
    recipe = prepared[1].recipe
    recipe = replace(recipe, judges=recipe.judges[:1], optim=replace(recipe.optim, eval_rewards=3))
    found = Rewards.open(recipe, prepared[2], CPU)
    assert found is not None
    given = iter([[1.0, np.nan, 4.0], [np.nan] * 3])
    monkeypatch.setattr(module, "load_judge", lambda *_, **__: lambda *_: np.array(next(given))[:, None])
    texts = [["a"], ["b"], ["c"]]
    assert found._mean(recipe.judges[0], texts) == 2.5
    assert found._mean(recipe.judges[0], texts) is None


def test_rewards_without_prompts_or_judges_are_refused(prepared):
    recipe = prepared[1].recipe
    optim = replace(recipe.optim, eval_rewards=3)
    with pytest.raises(ConfigError, match=r"optim\.eval_rewards must go with data\.validation, got 3 and none"):
        replace(recipe, optim=optim, data=replace(recipe.data, validation=None))
    of_file = JudgeConfig(name="people", scores="scores.jsonl")
    with pytest.raises(ConfigError, match="needs a judge that is a model or a function, got 3 and none"):
        replace(recipe, optim=optim, judges=[of_file])
    assert replace(recipe, optim=optim, judges=[of_file, recipe.judges[0]]).scoring_judges == [recipe.judges[0]]
    with pytest.raises(ConfigError, match=r"optim\.eval_rewards must be >= 0"):
        replace(recipe.optim, eval_rewards=-1)


def test_the_plan_counts_a_judge_beside_the_targets_weights_and_moments(prepared):
    def peak(number):
        run = parse_run(
            "train", [f"--optim.eval_rewards={number}", "--optim.micro_batch_size=1", "--data.max_length=64"]
        )
        plan = make_plan(run, processes=(1,), instructions=700, device="cuda", timed=False)
        huge = [replace(model, weights=1 << 40) if model.doing == "judges" else model for model in plan.preparing]
        return replace(plan, preparing=huge).peak(1), plan.memory(1).lasting

    (without, lasting), (with_it, _) = peak(0), peak(3)
    assert with_it - without == lasting


# -- in the report ------------------------------------------------------------------------------------------------------


def logged(**scores: tuple[float | None, ...]) -> Metrics:
    training = [{"step": step, "stage": 0, "loss": 1.0} for step in (10, 20)]
    evals = [
        {"step": 10 * i, "stage": 0, "eval": {"ce": 2.0} | {f"reward_{n}": of[i] for n, of in scores.items()}}
        for i in range(3)
    ]
    return Metrics(training, evals)


RECIPE = {"schedule": [{"training_weight": 1.0}]}


def test_a_score_of_0_is_a_score_and_none_is_not():
    rows = stage_table(logged(a=(0.0, 1.0, -0.5), b=(1.0, None, 2.0), c=(None, None, None)), RECIPE)
    assert rows[-2:] == [
        StageRow("Judges' mean scores", "a", [Change(0.0, -0.5)]),
        StageRow("Judges' mean scores", "b", [Change(1.0, 2.0)]),
    ]


def test_runs_with_different_judges_stand_side_by_side():
    rows = compared_stages([(logged(a=(0.0, 1.0, 2.0)), RECIPE), (logged(b=(3.0, 4.0, 5.0)), RECIPE)])
    assert rows[-2:] == [
        StageRow("Judges' mean scores", "a", [Change(0.0, 2.0), None]),
        StageRow("Judges' mean scores", "b", [None, Change(3.0, 5.0)]),
    ]


def test_each_judge_has_a_panel():
    metrics = logged(a=(0.0, 1.0, 2.0), b=(0.0, 0.0, 0.0), c=(None, None, None))
    titles = [axis.get_title(loc="left") for axis in draw_curves(metrics, LIGHT).axes]
    assert [title for title in titles if "score" in title] == ["Mean score by a", "Mean score by b"]
    (axis,) = [axis for axis in draw_curves(metrics, LIGHT).axes if axis.get_title(loc="left") == "Mean score by a"]
    assert list(np.asarray(axis.lines[0].get_ydata())) == [0.0, 1.0, 2.0]
    both = draw_compared_curves({"one": metrics, "two": logged(d=(1.0, 2.0, 3.0))}, LIGHT)
    titles = [axis.get_title(loc="left") for axis in both.axes]
    assert [t for t in titles if "score" in t] == [f"Mean score by {name}, validation" for name in "abd"]
