"""The checkpoint with the lowest CE in validation is kept beside the last ones, and can be what a run writes."""

import contextlib
import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import small_run
from safetensors.torch import load_file
from test_checkpoint import saved, trained
from test_sharding import launched

from profuser.errors import ConfigError, DataError
from profuser.pipeline import train
from profuser.recipe.schedule import Stage
from profuser.train.checkpoint import load_best
from profuser.train.loop import Trainer
from profuser.train.metrics_log import append_line, ranking, validations
from profuser.train.run_directory import RunDirectory
from profuser.train.steps import StepBatch


def names(directory) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in directory.iterdir())


# -- the files ---------------------------------------------------------------------------------------------------------


def test_the_best_checkpoint_stays_beside_the_newest(tmp_path):
    model, optimizer = trained()
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 2)):
        saved(tmp_path, step, model, optimizer, best=best)
    assert names(tmp_path) == [2, 4, 5]
    saved(tmp_path, 6, model, optimizer, best=6)
    assert names(tmp_path) == [5, 6]
    saved(tmp_path, 7, model, optimizer, keep=1, best=None)
    assert names(tmp_path) == [7]


def test_the_best_that_is_intact_is_loaded(tmp_path, capsys):
    model, optimizer = trained()
    weights = {}
    for step in (1, 2, 3):
        with torch.no_grad():
            next(model.parameters()).fill_(step)
        saved(tmp_path, step, model, optimizer, keep=9)
        weights[step] = next(model.parameters()).clone()
    path = tmp_path / "step-000003/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    found = load_best(tmp_path, [3, 7, 1, 2], model, optimizer)  # step 7 has no checkpoint any more
    assert found is not None
    assert found.step == 1
    assert torch.equal(next(model.parameters()), weights[1])
    assert "step-000003 is damaged (model.safetensors must hold what was written" in capsys.readouterr().out
    assert load_best(tmp_path, [3, 7], model, optimizer) is None


def test_validations_are_ranked_by_ce_and_those_before_training_or_without_a_number_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step, ce in ((0, 0.5), (2, 3.0), (4, 1.0), (6, math.nan), (8, 1.0), (10, math.inf), (12, 0.9)):
        append_line(path, {"step": step, "stage": 0, "loss": 0.1})
        append_line(path, {"step": step, "stage": 0, "eval": {"ce": ce, "kd": -ce}})
    found = validations(path.read_bytes())
    assert found == {2: 3.0, 4: 1.0, 8: 1.0, 12: 0.9}
    assert ranking(found) == [12, 4, 8, 2]
    assert ranking({}) == []
    assert validations(b"") == {}


# -- a run -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch):
    """Gives the validation after each step the CE of a script, whatever the model has learnt."""
    script: dict[int, float] = {}

    def evaluation(self, step, stage):
        measured.append(step)
        own(self, step, stage)

    def likelihood(*_):
        return SimpleNamespace(ce=script.get(measured[-1], 9.0), kd=0.0)

    measured: list[int] = []
    own = Trainer._evaluate
    monkeypatch.setattr(Trainer, "_evaluate", evaluation)
    monkeypatch.setattr("profuser.train.loop.likelihood", likelihood)
    return script


def trainer(run, store, directory, **optim) -> Trainer:
    directory.mkdir(parents=True, exist_ok=True)
    settings = {"steps": 6, "eval_every": 1, "checkpoint_every": 0, "keep_checkpoints": 1, "data_workers": 0} | optim
    recipe = replace(run.recipe, optim=replace(run.recipe.optim, **settings))
    return Trainer(recipe, store, directory, Accelerator(cpu=True))


def weights(t: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in t.fusion.parameters()])


def train_and_watch(t: Trainer, stop: int = 99) -> dict[int, torch.Tensor]:
    """Trains until step `stop` would begin, and returns the weights after every step."""
    after: dict[int, torch.Tensor] = {}
    own_step = t._step

    def watched(step: int, stage: Stage, batch: StepBatch) -> dict[str, float]:
        if step == stop:
            raise RuntimeError("killed")
        result = own_step(step, stage, batch)
        after[step + 1] = weights(t)
        return result

    t._step = watched
    t.train()
    return after


@pytest.mark.parametrize(
    ("script", "best"),
    [
        (
            {0: 0.1, 1: 5, 2: 3, 3: 4, 4: 3, 5: math.nan, 6: 4},
            2,
        ),  # not the target before, and the earlier of equal ones
        pytest.param({1: 5, 2: 4, 3: 3, 4: 2, 5: 2, 6: 1}, 6, marks=pytest.mark.long),
        (dict.fromkeys(range(7), math.nan), None),
    ],
)
def test_the_best_weights_are_exported(prepared, tmp_path, scripted, capsys, script, best):
    _, run, store = prepared
    scripted.update(script)
    t = trainer(run, store, tmp_path / "t", export="best")
    after = train_and_watch(t)
    assert names(tmp_path / "t/checkpoints") == sorted({best, 6} - {None})
    capsys.readouterr()
    step = best or 6
    assert t.restore_exported() == step
    assert torch.equal(weights(t), after[step])
    said = capsys.readouterr().out
    assert f"the weights after step {step} of 6 are exported" in said
    assert ("lowest CE in validation, 3.0000" in said) == (step == 2)


def test_a_killed_run_goes_on_from_its_best_checkpoint_to_the_same_bits(prepared, tmp_path, scripted, capsys):
    _, run, store = prepared
    scripted.update({1: 5, 2: 4, 3: 4.5, 4: 4.4, 5: 3, 6: 3.5})
    whole = trainer(run, store, tmp_path / "whole", export="best")
    after = train_and_watch(whole)
    with pytest.raises(RuntimeError, match="killed"):
        train_and_watch(trainer(run, store, tmp_path / "part", export="best"), stop=4)
    assert names(tmp_path / "part/checkpoints") == [2]
    resumed = trainer(run, store, tmp_path / "part", export="best")
    again = train_and_watch(resumed)
    assert sorted(again) == [3, 4, 5, 6]
    assert all(torch.equal(again[step], after[step]) for step in again)
    assert resumed.validated == whole.validated
    assert names(tmp_path / "part/checkpoints") == [5, 6]
    assert (resumed.restore_exported(), whole.restore_exported()) == (5, 5)
    assert torch.equal(weights(resumed), after[5])

    # Where the best is damaged, the next best that is there is taken; where none is better than the last weights, these.
    path = tmp_path / "part/checkpoints/step-000005/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    last = trainer(run, store, tmp_path / "part", export="best")
    last.train()
    capsys.readouterr()
    assert last.restore_exported() == 6
    assert torch.equal(weights(last), after[6])
    said = capsys.readouterr().out
    assert "step-000005 is damaged" in said
    assert "after step 6 of 6 are exported, because no intact checkpoint is left of a step with a lower CE" in said


def test_the_best_is_not_kept_where_the_recipe_says_so(prepared, tmp_path, scripted):
    _, run, store = prepared
    scripted.update({2: 1.0})
    t = trainer(run, store, tmp_path / "t", keep_best=False)
    after = train_and_watch(t)
    assert names(tmp_path / "t/checkpoints") == [6]
    assert t.restore_exported() == 6
    assert torch.equal(weights(t), after[6])


def test_a_finished_run_writes_its_other_weights_without_training_again(
    prepared, tmp_path, scripted, capsys, monkeypatch
):
    _, run, _ = prepared
    scripted.update({1: 2, 2: 1, 3: 2, 4: 3})
    monkeypatch.setattr("profuser.pipeline.evaluate", lambda *_: {})
    optim = replace(run.recipe.optim, eval_every=1, data_workers=0)
    run = replace(run, recipe=replace(run.recipe, optim=optim, output=str(tmp_path / "run")))
    train(run)
    record, last = RunDirectory(run).read(), load_file(tmp_path / "run/model.safetensors")
    assert record["exported_step"] == 4
    assert RunDirectory(run).complete()

    other = replace(run, recipe=replace(run.recipe, optim=replace(optim, export="best")))
    capsys.readouterr()
    assert not RunDirectory(other).complete()
    assert "was written with optim.export: last, now best: making the model again" in capsys.readouterr().out
    monkeypatch.setattr(Trainer, "_step", lambda *_: pytest.fail("a step was taken"))
    train(other)
    assert RunDirectory(other).complete()
    assert RunDirectory(other).read()["exported_step"] == 2
    best = load_file(tmp_path / "run/model.safetensors")
    assert any(not torch.equal(best[name], last[name]) for name in last)
    assert "lowest cross-entropy in validation" in (tmp_path / "run/README.md").read_text()

    # Without checkpoints a run of a week would be trained again, which nobody has asked for.
    (tmp_path / "run/checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"optim.export must be best as it was"):
        RunDirectory(run).complete()


def test_a_line_of_metrics_is_a_mean_over_the_steps_before_and_after_a_kill(prepared, tmp_path, scripted, monkeypatch):
    """The best checkpoint is saved where it is measured, which may be between two lines."""
    _, run, store = prepared
    scripted.update({2: 1.0})
    monkeypatch.setattr("profuser.train.metrics_log.FEWEST", 1)
    for name, stops in (("whole", (99,)), ("part", (4, 99))):
        for stop in stops:
            t = trainer(run, store, tmp_path / name, eval_every=2, log_every=3)
            with contextlib.nullcontext() if stop == 99 else pytest.raises(RuntimeError, match="killed"):
                train_and_watch(t, stop)
    untimed = {"tokens_per_second": 0, "data_wait": 0, "sha256": ""}
    whole, part = (
        [json.loads(line) | untimed for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "part")
    )
    assert part == whole
    assert [line["step"] for line in whole if "eval" not in line] == [3, 6]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--optim.export=best", "--data.validation=null"], "optim.export: best needs data.validation, got none"),
        (
            ["--optim.export=best", "--optim.keep_best=false"],
            "optim.export: best needs optim.keep_best: true, got false",
        ),
        (["--optim.export=bst"], "optim.export must be one of last, best, got bst; did you mean best?"),
    ],
)
def test_a_best_that_cannot_be_is_refused(tmp_path, arguments, said):
    with pytest.raises(ConfigError) as error:
        small_run(tmp_path, *arguments)
    assert said in str(error.value)


def test_without_a_validation_example_that_can_be_used_there_is_no_best(prepared, tmp_path, monkeypatch):
    _, run, store = prepared
    monkeypatch.setattr("profuser.train.loop.validation_truths", lambda _: None)
    with pytest.raises(
        DataError, match=r"optim.export: best needs a validation example that can be used, none is left"
    ):
        trainer(run, store, tmp_path / "t", export="best")


@pytest.mark.long
@pytest.mark.parametrize("way", ["--optim.shard=true", "--optim.shard=false"])
def test_several_processes_export_what_one_does(prepared, tmp_path, way):
    """With a learning rate that is far too high the best validation is not the last one."""
    directory, _, store = prepared
    shutil.copytree(store.directory, tmp_path / "store")
    arguments = [
        f"--data.train={directory / 'fusion.jsonl'}",
        *(f"--data.{split}={directory / split}.jsonl" for split in ("validation", "heldout")),
        f"--store={tmp_path / 'store'}", "--generation.max_new_tokens=24", "--capture.shard_size=5",
        "--optim.steps=6", "--optim.batch_size=4", "--optim.micro_batch_size=2", "--optim.eval_every=1", "--optim.log_every=1",
        "--optim.checkpoint_every=0", "--optim.keep_checkpoints=1", "--optim.lr=0.02", "--optim.warmup_ratio=0.8",
        "--optim.export=best",
    ]  # fmt: skip
    runs = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        done = launched(processes, "-m", "profuser.train", *arguments, way, f"--output={output}")
        assert done.returncode == 0, done.stderr[:3000]
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        ce = {line["step"]: line["eval"]["ce"] for line in lines if "eval" in line and line["step"]}
        best = min(ce, key=lambda step: ce[step])
        assert best < 6
        assert f"(after step {best}, the best)" in done.stdout
        assert json.loads((output / "run.json").read_text())["exported_step"] == best
        assert names(output / "checkpoints") == [best, 6]
        runs.append((best, load_file(output / "model.safetensors")))
    assert runs[0][0] == runs[1][0]
    for name, tensor in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name].float(), tensor.float(), rtol=0.02, atol=4e-3)
