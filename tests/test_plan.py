"""The plan of a run as a command: what it says, what it finds, and that it touches nothing."""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_runs import folder, prepared_files, run
from conftest import ROOT
from plan_models import PAPER

from profuser.errors import ConfigError
from profuser.plan.plan import Plan, make_plan
from profuser.plan.probe import Timed
from profuser.plan.text import beside, commands, plan_text, remedies, size
from profuser.recipe.parse import parse_run
from profuser.train.__main__ import without_own


def test_a_store_that_does_not_fit_is_found(prepared, tmp_path):
    _, of, _ = prepared
    other = replace(of.recipe, capture=replace(of.recipe.capture, top_k=3))
    with pytest.raises(ConfigError, match=r"captured with other settings \(capture\.top_k differ\)"):
        make_plan(replace(of, recipe=other), timed=False)
    rows = Path(str(of.recipe.data.train)).read_text().splitlines(keepends=True)
    (tmp_path / "fewer.jsonl").write_text("".join(rows[1:]))
    fewer = replace(of.recipe, data=replace(of.recipe.data, train=str(tmp_path / "fewer.jsonl")))
    first, *_ = make_plan(replace(of, recipe=fewer), timed=False).assumed
    assert first == "data.train changed since the store was made: run `python -m profuser.prepare` before the training"


class TestCommand:
    def test_what_is_assumed_is_said(self, paper):
        text = plan_text(paper, ["--config", PAPER], 200.0, 100.0)
        assert all(note in text for note in paper.assumed)
        for said in ("not on this machine", "100,000 instructions", "512 tokens", "200 TFLOP/s", "as given"):
            assert said in text

    def test_what_is_given_is_not_assumed(self):
        given = make_plan(parse_run("train", []), processes=(1,), instructions=7_000, tokens=90, timed=False)
        assert (given.instructions, given.lengths.mean, given.lengths.longest) == (7_000, 90, 256)
        assert given.store["targets"] > 7_000 * 90

    def test_the_time_is_that_of_the_operations_at_the_speed(self, paper):
        fuse = next(work for work in paper.work if work.phase == "fuse")
        sequences = 128 * (1172 * 1 + 1172 * 2)  # stages of one and of two modes
        assert fuse.flops == 4 * 2 * 6_738_415_616 * sequences * 512  # 4: gradient checkpointing
        assert "35 h with 1, 4 h with 8, 2 h with 16" in plan_text(paper, [], None, 100.0)

    def test_nothing_is_written_and_no_weights_are_read(self, good, monkeypatch):
        with folder(good):
            shutil.rmtree("runs")
            before = sorted(map(str, Path().rglob("*")))
            monkeypatch.setattr("safetensors.torch.load_file", lambda *args: pytest.fail("weights were read"))
            code, out, err = run("train", "--config", "recipe.yaml", "--dry-run", "--processes", "2")
            assert (code, err) == (0, "")
            assert sorted(map(str, Path().rglob("*"))) == before
            command = "torchrun --nproc-per-node 2 -m profuser.train --config recipe.yaml"
            for said in ("2, DDP", "2, sharded", "by short probes", command):
                assert said in out
            assert "--dry-run" not in out

    def test_a_finished_run_is_left_as_it_is(self, good):
        with folder(good):
            before = prepared_files()
            assert run("train", "--config", "recipe.yaml", "--dry-run")[0] == 0
            assert prepared_files() == before

    def test_the_plan_finds_what_a_run_would_refuse(self, good, monkeypatch):
        with folder(good):
            code, _, err = run("train", "--config", "recipe.yaml", "--dry-run", "--target=./nowhere")
            assert (code, err.count("\n"), "nowhere" in err) == (3, 1, True)
            code, _, err = run("train", "--config", "recipe.yaml", "--dry-run", "--adapter.target_modules=[nope]")
            assert (code, err.count("\n")) == (2, 1)
            assert err.startswith("error: adapter.target_modules must name layers of the target, got nope")
            monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
            code, _, err = run("train", "--config", "recipe.yaml", "--dry-run", "--optim.trackers=[wandb]")
            assert (code, err.count("\n")) == (2, 1)
            assert err.startswith("error: optim.trackers: wandb needs the package wandb")
            monkeypatch.setitem(sys.modules, "bitsandbytes", None)
            code, _, err = run("train", "--config", "recipe.yaml", "--dry-run", "--optim.name=adamw_8bit")
            assert (code, err.count("\n")) == (2, 1)
            assert "bitsandbytes" in err
            Path("train.jsonl").unlink()
            code, _, err = run("train", "--config", "recipe.yaml", "--dry-run")
            assert (code, err.count("\n"), "train.jsonl" in err) == (3, 1, True)

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--dry-run", "--processes", "0"], "--processes must be a whole number above 0"),
            (["--dry-run", "--processes", "many"], "--processes must be a whole number above 0"),
            (["--dry-run", "--processes"], "--processes must have a value"),
            (["--dry-run", "--tflops=nan"], "--tflops must be a number above 0"),
            (["--dry-run", "--instructions=1e5"], "--instructions must be a whole number"),
            (["--dry-run", "--device", "tpu"], "--device must be one of cuda, cpu, got tpu"),
            (["--dry-run=yes"], "--dry-run must stand alone"),
            (["--dry-run", "--fresh"], "--dry-run must stand without --fresh"),
            (["--tflops", "100"], "--tflops must come with --dry-run"),
            (["--dry_run"], "did you mean --dry-run?"),
        ],
    )
    def test_wrong_options_are_refused_in_one_line(self, arguments, says):
        code, _, err = run("train", *arguments)
        assert (code, err.count("\n")) == (2, 1), err
        assert says in err

    def test_the_commands_keep_all_other_arguments(self):
        argv = ["--config", "a b.yaml", "--dry-run", "--processes", "4", "--optim.lr=1e-5", "--tflops=3", "--seed", "1"]
        assert without_own(argv) == ["--config", "a b.yaml", "--optim.lr=1e-5", "--seed", "1"]

    @pytest.mark.parametrize("name", ["device", "probe"])
    def test_a_source_may_be_called_what_an_option_is_called(self, name):
        assert without_own(["--dry-run", "--device", "cpu", "--target", name]) == ["--target", name]

    def test_more_gpus_than_a_machine_has_are_started_on_several(self, paper):
        two = "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m profuser.train --seed 1"
        assert commands(paper, ["--seed", "1"])[-1].split("  # ")[0].strip() == two
        on_cpu = commands(replace(paper, device="cpu"), ["--seed", "1"])[-1]
        assert on_cpu.strip() == "torchrun --nproc-per-node 16 -m profuser.train --seed 1"
        odd = replace(paper, training=[replace(paper.training[0], processes=20)])
        assert commands(odd, []) == ["commands:", "  torchrun --nproc-per-node 20 -m profuser.train"]

    def test_what_the_device_has_and_what_checkpointing_saves_is_said(self, paper):
        def said(of: Plan) -> str:
            return plan_text(of, [], None, 100.0)

        on_cpu = replace(paper, device="cpu")
        for available, fits in ((on_cpu.peak(1), "enough"), (on_cpu.peak(1) - 1, "TOO LITTLE")):
            assert f"{fits} for one process" in said(replace(on_cpu, available=available))
        assert ("not the GPU's" in said(paper), "not the GPU's" in said(on_cpu)) == (True, False)
        with_it, without = (size(n) for n in (paper.one.activations, paper.other_activations))
        activations = (
            f"activations of {with_it} with optim.gradient_checkpointing, {without} without; the recipe has it"
        )
        assert f"{activations} on" in said(paper)
        off = replace(paper.recipe, optim=replace(paper.recipe.optim, gradient_checkpointing=False))
        other = replace(paper.one, activations=paper.other_activations)
        assert f"{activations} off" in said(
            replace(paper, recipe=off, one=other, other_activations=paper.one.activations)
        )

    def test_times_that_were_measured_give_way_to_a_speed_and_are_added_up(self, paper):
        probed = replace(paper, seconds={"score": 60.0, "fuse": 120.0})
        assert "by short probes: 3 min (score 1 min, fuse 2 min)" in plan_text(probed, [], None, 100.0)
        assert "time at 200 TFLOP/s per process (as given)" in plan_text(probed, [], 200.0, 100.0)
        timed = [
            Timed("train", "steps", "8 steps", tokens=500, seconds=10.0, start=2.0, factor=5.0),
            Timed("train", "validation", seconds=4.0, factor=2.0),
        ]
        lines = plan_text(replace(paper, timed=timed), [], None, 100.0).splitlines()
        first = next(n for n, line in enumerate(lines) if "timed with the models themselves: 1 min" in line)
        assert [line.split() for line in lines[first + 2 : first + 5]] == [
            ["train", "60.0", "s"],
            ["steps", "8", "steps", "in", "10.0", "s", "50", "2.00", "s", "52.0", "s"],
            ["validation", "8.00", "s"],
        ]

    def test_a_run_is_set_beside_its_estimate(self, paper):
        seconds = {"score": 600.0, "answer": 1200.0, "fuse": 2400.0, "evaluate": 300.0}
        plan, memory = replace(paper, seconds=seconds), size(paper.peak(8))
        record = {"peak_device_bytes": 3 << 30, "seconds": {"prepare": 240, "train": 360, "evaluate": 600}}
        line = beside(plan, record, 8)
        assert line.startswith("memory of the GPU: 3.0 GiB at most, ")
        assert f"estimated {memory}; time: prepare 4 min, estimated 4 min, " in line
        assert line.endswith("train 6 min, estimated 5 min, evaluate 10 min, estimated 5 min")
        assert "time: train 6 min" in beside(plan, record | {"prepared": False}, 8)
        assert beside(paper, record, 8).endswith(memory)


class TestLackOfMemory:
    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            MemoryError(),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_the_message_names_the_estimate_and_three_settings(self, good, monkeypatch, error):
        def fail(run):
            raise error

        monkeypatch.setattr("profuser.pipeline.train_and_report", fail)
        with folder(good):
            code, _, err = run("train", "--config", "recipe.yaml")
        assert (code, err.count("\n")) == (5, 1), err
        assert re.search(r"the estimate was [\d.]+ MiB of the [\d.]+ GiB", err)
        settings = re.findall(r"(?:optim|data|generation|capture)\.\w+", err.partition("set ")[2])
        assert len(settings) == len(set(settings)) == 3

    def test_the_settings_are_those_that_the_recipe_has(self, paper):
        text = remedies(paper, 1)
        assert "optim.tokens_per_micro_batch (now 4096)" in text
        assert not {"micro_batch_size", "gradient_checkpointing"} & set(re.findall(r"optim\.(\w+)", text))

    def test_the_settings_are_those_of_what_needs_most_and_shards_come_first(self, paper):
        optim = replace(paper.recipe.optim, shard=False, gradient_checkpointing=False, tokens_per_micro_batch=None)
        capture = replace(paper.recipe.capture, tokens_per_batch=99)
        plan = replace(paper, recipe=replace(paper.recipe, optim=optim, capture=capture))
        first = "set optim.gradient_checkpointing: true, a lower optim.micro_batch_size"
        assert first in remedies(plan, 1)
        assert "set optim.shard: true, optim.gradient_checkpointing: true or" in remedies(plan, 8)
        assert "optim.shard" not in remedies(paper, 8)
        whole = [
            memory for memory in plan.training if not memory.sharded
        ]  # where no target of such a recipe is sharded
        assert "optim.shard" not in remedies(replace(plan, training=whole), 8)
        large = replace(plan, preparing=[replace(plan.preparing[0], weights=1 << 40)])
        assert "set a lower generation.batch_size (now 32), a lower capture.tokens_per_batch (now 99)" in remedies(
            large, 1
        )

    def test_another_error_stays_what_it_is(self, good, monkeypatch):
        def fail(run):
            raise RuntimeError("a defect")

        monkeypatch.setattr("profuser.pipeline.train_and_report", fail)
        with folder(good), pytest.raises(RuntimeError, match="a defect"):
            run("train", "--config", "recipe.yaml")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the page shows the plan of a machine without a GPU")
def test_the_page_shows_what_is_printed_without_network_and_data(monkeypatch):
    page = (ROOT / "docs/plan.md").read_text()
    (block,) = re.findall(
        r"^<!-- printed by python -m profuser\.train (.*?) -->\n```text\n(.*?)^```$", page, re.M | re.S
    )
    monkeypatch.chdir(ROOT)
    assert run("train", *block[0].split()) == (0, block[1], "")
