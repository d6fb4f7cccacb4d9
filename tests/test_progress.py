"""The lines of progress, and the estimate in the first line of a run."""

import contextlib
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from profuser import progress
from profuser.models.load import load_model
from profuser.prepare.announce import announce
from profuser.prepare.estimate import Machine, Size, expected, probe, sentence, size_of
from profuser.prepare.inputs import Inputs
from profuser.prepare.phases import Preparation
from profuser.progress import Progress, in_words
from profuser.recipe.schema import SourceConfig
from profuser.train.checkpoint import newest_step


@pytest.fixture
def clock(monkeypatch):
    """The clock of the progress module, time.monotonic(), which tests move by hand."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


def test_off_a_terminal_there_is_a_line_every_few_seconds_and_one_at_the_end(clock, capsys):
    with Progress("fuse", 10, "steps") as bar:
        for _ in range(10):
            clock.now += 4
            bar.update(1, tokens=100, note="loss 1.5")
    assert capsys.readouterr().out.splitlines() == [
        "fuse: 4/10 steps in 16 s, 24 s left, 25 tokens/s, loss 1.5",
        "fuse: 8/10 steps in 32 s, 8 s left, 25 tokens/s, loss 1.5",
        "fuse: 10/10 steps in 40 s, 25 tokens/s, loss 1.5",
    ]


def test_the_last_line_is_printed_once(clock, capsys):
    with Progress("align", 1) as bar:
        clock.now += 20
        bar.update(1)
    assert capsys.readouterr().out == "align: 1/1 it in 20 s\n"


def test_a_brief_part_of_something_else_says_nothing(clock, capsys):
    with Progress("score", 2, brief=True) as bar:
        bar.update(2)
    with Progress("nothing to do", 0):
        pass
    assert capsys.readouterr().out == ""


def test_an_interrupted_phase_prints_no_closing_line(capsys):
    def interrupted():
        with Progress("fuse", 3) as bar:
            bar.update(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert capsys.readouterr().out == ""


def test_a_resumed_phase_estimates_from_what_it_did_itself(clock, capsys):
    with Progress("fuse", 100, "steps", initial=90) as bar:
        clock.now += 20
        bar.update(5)
        clock.now += 20
        bar.update(5)
    assert capsys.readouterr().out.splitlines()[0] == "fuse: 95/100 steps in 20 s, 20 s left"


def test_the_time_left_counts_units_by_what_they_cost(clock, capsys):
    with Progress("fuse", 4, "steps", initial=1, cost=lambda n: [0, 1, 2, 4, 6][n]) as bar:
        clock.now += 20
        bar.update()
    assert capsys.readouterr().out.splitlines()[0] == "fuse: 2/4 steps in 20 s, 80 s left"


def test_on_a_terminal_the_bar_carries_rate_and_note(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress("fuse", 2, "steps") as bar:
        bar.update(1, tokens=10, note="loss 0.5")
        assert bar.bar is not None
        bar.bar.refresh()
    out = capsys.readouterr()
    assert re.search(r"fuse:.*1/2.*tokens/s, loss 0\.5", out.err)


def test_the_size_of_a_model_is_read_from_its_files():
    source = SourceConfig(name="scholar", model="demo:scholar")
    model = load_model(source, torch.float32)
    weights = {p.data_ptr(): p.numel() for p in model.parameters()}
    assert size_of(source) == Size(sum(weights.values()), model.config.num_hidden_layers)


def test_a_model_that_is_not_here_has_no_size_and_the_line_says_so():
    assert size_of(SourceConfig(name="far", model="nobody/nothing")) is None
    assert "unknown" in sentence(None)


def test_what_is_done_already_is_not_expected_again(prepared, tmp_path):
    _, run, _ = prepared
    with contextlib.ExitStack() as held:
        preparation = Preparation.begin(Inputs.open(run), held)
    done = expected(preparation.inputs, preparation.unmade, first_step=run.recipe.optim.steps)
    assert done is not None
    assert done["score"] == done["answer"] == 0
    assert done["evaluate"] > 0
    fresh = replace(run, recipe=replace(run.recipe, store=str(tmp_path / "store")))
    with contextlib.ExitStack() as held:
        preparation = Preparation.begin(Inputs.open(fresh), held)
    todo = expected(preparation.inputs, preparation.unmade, first_step=0)
    assert todo is not None
    assert all(todo[phase] > 0 for phase in ("score", "answer", "fuse", "evaluate"))
    assert todo["fuse"] > done["fuse"]


def test_the_sources_are_expected_to_do_what_they_are_asked(prepared, monkeypatch):
    monkeypatch.setattr("profuser.prepare.estimate.probe", lambda *_: Machine(flops=1e9, bandwidth=1e30, op=0.0))
    inputs = Inputs.open(prepared[1])
    inputs = replace(inputs, rows={"train": inputs.rows["train"]})

    def seconds(folder: str, count: int, of: Inputs = inputs) -> float:
        found = expected(of, lambda kind: count if kind.folder == folder else 0)
        assert found is not None
        return sum(found.values())

    # Each of the three sources is taken to win a third of the votes.
    assert seconds("winners", 30) == pytest.approx(seconds("truth", 10))
    twice = replace(
        inputs.recipe, generation=replace(inputs.recipe.generation, responses_per_source=2, temperature=1.0)
    )
    prompts = inputs.recipe.generation.batch_size
    two = seconds("responses", prompts, replace(inputs, recipe=twice))
    assert two == pytest.approx(2 * seconds("responses", prompts))
    whole = seconds("truth", 10)
    monkeypatch.setattr(Inputs, "routed", lambda *_: np.array([True, False]))
    assert seconds("truth", 10) == pytest.approx(whole / 2)


def test_gradient_checkpointing_takes_another_forward_pass(prepared, monkeypatch):
    monkeypatch.setattr("profuser.prepare.estimate.probe", lambda *_: Machine(flops=1e9, bandwidth=1e30, op=0.0))
    inputs = Inputs.open(prepared[1])
    inputs = replace(inputs, rows={"train": inputs.rows["train"]})
    saving = replace(inputs.recipe, optim=replace(inputs.recipe.optim, gradient_checkpointing=True))
    plain, saved = (expected(replace(inputs, recipe=recipe), lambda _: 0, 0) for recipe in (inputs.recipe, saving))
    assert plain is not None
    assert saved is not None
    assert saved["fuse"] == pytest.approx(plain["fuse"] * 4 / 3)


def test_the_first_lines_say_what_on_what_and_how_long(prepared, capsys):
    _, run, _ = prepared
    with contextlib.ExitStack() as held:
        announce("train", Preparation.begin(Inputs.open(run), held), processes=2, first_step=1)
    line, data = capsys.readouterr().out.splitlines()
    assert data == "data: 12 training, 6 validation, 6 held-out examples"
    for part in (
        "guardian, scholar, reckoner -> guardian",
        "12 instructions",
        "3 of 4 steps (progressive)",
        "2 processes",
        "expected",
    ):
        assert part in line


def test_the_probe_measures_plausible_speeds():
    machine = probe(torch.device("cpu"), torch.float32)
    assert machine.flops > 1e8
    assert machine.bandwidth > 1e8
    assert 0 < machine.op < 1e-2


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "1 s"), (40.4, "40 s"), (75, "1 min"), (1800, "30 min"), (8000, "2 h")]
)
def test_durations_have_no_more_digits_than_they_are_worth(seconds, words):
    assert in_words(seconds) == words


def test_the_newest_checkpoint_tells_where_a_run_goes_on(tmp_path):
    assert newest_step(tmp_path) == 0
    for step in (5, 20):
        (tmp_path / f"step-{step:06d}").mkdir()
        (tmp_path / f"step-{step:06d}/state.json").write_text("{}")
    (tmp_path / "step-000030").mkdir()  # this checkpoint is not complete
    assert newest_step(tmp_path) == 20
