"""Trackers show what metrics.jsonl says, and no trouble with one of them is more than a line."""

import json
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any, ClassVar

import pytest
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from conftest import small_run

from profuser.errors import ConfigError
from profuser.pipeline import train, train_and_report
from profuser.recipe.compare import deciding_keys
from profuser.train.loop import Trainer
from profuser.train.run_directory import RunDirectory
from profuser.train.trackers import MODULES, Trackers, flat_line, flat_settings


class Fake(GeneralTracker):
    """A tracker that keeps what it is told, and fails where it shall."""

    made: ClassVar[list["Fake"]] = []
    fails: ClassVar[set[str]] = set()
    requires_logging_directory = False
    tracker = None

    def __init__(self, *where: str, **options: Any):
        self.where, self.options, self.told, self.logged = where, options, [], []
        self.made.append(self)

    def _do(self, what: str) -> None:
        self.told.append(what)
        if what in self.fails:
            raise ConnectionError(f"{what} found no network\nand a second line")

    def start(self):
        self._do("start")

    def store_init_configuration(self, values):
        self.settings = values
        self._do("settings")

    def log(self, values, step=None, **kwargs):
        self._do("log")
        self.logged.append((step, values))

    def finish(self):
        self._do("finish")


class Steady(Fake):
    """One that never fails."""

    fails: ClassVar[set[str]] = set()


@pytest.fixture
def fakes(monkeypatch):
    """Two trackers in the places of tensorboard, which never fails, and of wandb. Their packages seem to be installed."""
    Fake.made.clear()
    monkeypatch.setattr(Fake, "fails", set())
    for name, kind in (("tensorboard", Steady), ("wandb", Fake)):
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, kind)
        monkeypatch.setitem(sys.modules, MODULES[name], ModuleType(name))
    return Fake


def trainer(run, store, directory, **optim) -> Trainer:
    directory.mkdir(parents=True, exist_ok=True)
    recipe = replace(run.recipe, optim=replace(run.recipe.optim, **optim))
    return Trainer(recipe, store, directory, Accelerator(cpu=True))


def lines(directory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def flattened(line: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """What a tracker should be told of a line of metrics.jsonl."""
    stage = f"stage{line['stage'] + 1}"
    plain = {f"{stage}/{k}": v for k, v in line.items() if k not in ("step", "stage", "eval", "sha256")}
    return line["step"], plain | {f"{stage}/eval/{k}": v for k, v in line.get("eval", {}).items()}


def test_a_tracker_is_told_every_line_and_the_recipes_settings(prepared, tmp_path, fakes):
    _, run, store = prepared
    t = trainer(run, store, tmp_path / "t", trackers=["wandb"])
    t.train()
    t.trackers.close()
    (fake,) = fakes.made
    assert fake.told == ["start", "settings", *["log"] * len(fake.logged), "finish"]
    assert fake.logged == [flattened(line) for line in lines(tmp_path / "t")]
    assert {"stage1/loss", "stage1/lr", "stage2/kd_training", "stage2/eval/ce"} <= {
        k for _, v in fake.logged for k in v
    }
    assert fake.settings["optim.lr"] == run.recipe.optim.lr
    assert fake.settings["sources[0].name"] == run.recipe.sources[0].name
    assert fake.settings["optim.betas[1]"] == 0.95
    assert all(isinstance(value, bool | int | float | str) for value in fake.settings.values())
    assert fake.where == ("profuser",)
    assert (fake.options["name"], fake.options["dir"]) == ("t", str(tmp_path / "t"))


def test_what_is_null_is_left_out():
    line = {"step": 7, "stage": 1, "eval": {"ce": 0.5, "kd": None}}
    assert dict(flat_line(line)) == {"stage2/eval/ce": 0.5}
    settings = {"a": None, "b": {"c": [{"d": 1}, {"d": "x"}], "e": []}, "f": False}
    assert dict(flat_settings(settings)) == {"b.c[0].d": 1, "b.c[1].d": "x", "f": False}


@pytest.mark.parametrize("where", ["start", "settings", "log", "finish"])
def test_trouble_with_a_tracker_is_said_once_and_does_not_reach_the_others(tmp_path, fakes, capsys, where):
    fakes.fails.add(where)
    trackers = Trackers(["wandb", "tensorboard"], tmp_path, {"seed": 0})
    trackers.start(0)
    for step in (1, 2, 3):
        trackers.log({"step": step, "stage": 0, "loss": 0.5})
    trackers.close()
    trackers.close()
    assert capsys.readouterr().out == (
        f"tracker wandb failed ({where} found no network): going on without it, metrics.jsonl has all that it shows\n"
    )
    bad, good = fakes.made
    assert bad.told[-1] == where
    assert bad.told.count(where) == 1
    assert good.told == ["start", "settings", "log", "log", "log", "finish"]


def test_trouble_with_a_tracker_does_not_end_a_training(prepared, tmp_path, fakes, capsys):
    _, run, store = prepared
    fakes.fails.add("log")
    trainer(run, store, tmp_path / "t", trackers=["wandb"]).train()
    assert capsys.readouterr().out.count("tracker wandb failed") == 1
    assert lines(tmp_path / "t")[-1]["step"] == 4


def resumed(run, store, directory, **optim) -> None:
    """Trains, is killed after step 3 with a checkpoint of step 2, and goes on to the end."""
    t = trainer(run, store, directory, checkpoint_every=2, **optim)
    own_step = t._step

    def killed(step, stage, batch):
        if step == 3:
            raise RuntimeError("killed")
        return own_step(step, stage, batch)

    t._step = killed
    with pytest.raises(RuntimeError, match="killed"):
        t.train()
    t = trainer(run, store, directory, checkpoint_every=2, **optim)
    t.train()
    t.trackers.close()


def test_a_resumed_run_says_from_which_step_on_it_shows(prepared, tmp_path, fakes):
    _, run, store = prepared
    resumed(run, store, tmp_path / "t", trackers=["tensorboard", "wandb"])
    first, _, second, other = fakes.made
    assert (first.options["purge_step"], second.options["purge_step"]) == (0, 3)
    assert [step for step, _ in first.logged] == [0, 1, 2, 2, 3]
    assert [step for step, _ in second.logged] == [3, 4, 4]
    assert "settings" in first.told
    assert "settings" not in second.told  # the folder has them
    assert (other.options["name"], other.options["group"]) == ("t from step 2", "t")
    assert "settings" in other.told


def test_a_run_that_has_nothing_left_to_train_opens_no_tracker(prepared, tmp_path, fakes):
    _, run, store = prepared
    trainer(run, store, tmp_path / "t").train()
    assert fakes.made == []  # without trackers there is none either
    trainer(run, store, tmp_path / "t", trackers=["wandb"]).train()
    assert fakes.made == []


def test_in_tensorboard_no_step_stands_twice(prepared, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, run, store = prepared
    resumed(run, store, tmp_path / "t", trackers=["tensorboard"])
    shown = EventAccumulator(str(tmp_path / "t/tensorboard"))
    shown.Reload()
    expected: dict[str, list[Any]] = {}
    for step, values in map(flattened, lines(tmp_path / "t")):
        for name, value in values.items():
            expected.setdefault(name, []).append((step, pytest.approx(value)))
    found = {name: [(event.step, event.value) for event in shown.Scalars(name)] for name in shown.Tags()["scalars"]}
    assert found == expected


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_missing_package_is_named_before_anything_is_prepared(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, MODULES[name], None)  # as if it were not installed
    monkeypatch.setattr("profuser.pipeline.Preparation.begin", lambda *_: pytest.fail("the preparation began"))
    with pytest.raises(
        ConfigError, match=rf"optim.trackers: {name} needs the package .*pip install 'profuser\[{name}\]'"
    ):
        train(small_run(tmp_path, f"--optim.trackers=[{name}]"))


def test_a_missing_package_is_named_before_an_old_run_is_renamed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = small_run(tmp_path, "--optim.trackers=[wandb]")
    RunDirectory(run).begin("fp32")
    with pytest.raises(ConfigError, match="wandb needs the package"):
        train_and_report(replace(run, options={"fresh": True}))
    assert (run.output_dir / "run.json").exists()


def test_a_package_that_fails_while_it_is_imported_is_named_too(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("raise TypeError('Descriptors cannot be created directly.\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match=r"cannot be imported \(Descriptors cannot be created directly\.\)"):
        train(small_run(tmp_path, "--optim.trackers=[wandb]"))


def test_trackers_are_closed_last_of_all(tmp_path, monkeypatch, prepared):
    """A tracker may wait for its network; by then the fused model must be on the disk."""
    _, run, _ = prepared
    run = replace(run, recipe=replace(run.recipe, output=str(tmp_path / "run")))
    seen = []
    monkeypatch.setattr(Trackers, "close", lambda self: seen.append(RunDirectory(run).read()["status"]))
    monkeypatch.setattr("profuser.pipeline.evaluate", lambda *_: {})
    monkeypatch.setattr("profuser.pipeline.write_card", lambda *_: None)
    train(run)
    assert seen == ["complete"]


def test_trackers_do_not_decide_the_outcome(prepared):
    _, run, _ = prepared
    other = replace(run.recipe, optim=replace(run.recipe.optim, trackers=["wandb"]))
    assert deciding_keys(run.recipe.to_dict(), other.to_dict()) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("[tensorbord]", "did you mean tensorboard?"),
        ("tensorboard", "each entry one of tensorboard, trackio, wandb, got tensorboard; put it in brackets"),
        ("[wandb,wandb]", "optim.trackers: names must differ, got 'wandb' twice"),
        ("[3]", "optim.trackers"),
    ],
)
def test_a_wrong_list_of_trackers_is_named(tmp_path, given, said):
    with pytest.raises(ConfigError) as error:
        small_run(tmp_path, f"--optim.trackers={given}")
    assert said in str(error.value)
