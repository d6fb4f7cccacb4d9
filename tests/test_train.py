"""The whole chain on the bundled models with a handful of prompts, and what the trainer promises."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, small_run
from small_tokenizers import pretrained_tokenizer

from profuser.errors import ConfigError, DataError, NonFiniteError
from profuser.evaluate.__main__ import main as evaluate_command
from profuser.evaluate.scores import evaluate
from profuser.fusion_model import FusionModel
from profuser.kernels import left_out
from profuser.pipeline import train
from profuser.prepare.data import data_hash
from profuser.prepare.inputs import load_split
from profuser.prepare.phases import prepare
from profuser.recipe.schedule import Mode, Stage
from profuser.store.store import Store
from profuser.train.collate import collate
from profuser.train.loop import Trainer
from profuser.train.metrics_log import is_due
from profuser.train.run_directory import RunDirectory
from profuser.train.steps import StepBatch
from profuser.train.targets import Targets
from profuser.train.updates import OwnUpdates


def trainer(run, store, directory, **optim):
    directory.mkdir(parents=True, exist_ok=True)
    recipe = replace(run.recipe, optim=replace(run.recipe.optim, **optim))
    return Trainer(recipe, store, directory, Accelerator(cpu=True))


def weights(t):
    return {n: p.detach().clone() for n, p in t.fusion.named_parameters()}


@pytest.fixture(scope="module")
def finished(prepared, tmp_path_factory):
    _, run, _ = prepared
    run = replace(run, recipe=replace(run.recipe, output=str(tmp_path_factory.mktemp("finished") / "run")))
    assert not RunDirectory(run).complete()
    scores = train(run)
    return run, scores


def test_scores_cover_every_source_the_target_before_and_the_fused_model(finished):
    run, scores = finished
    assert json.loads((run.output_dir / "scores.json").read_text()) == scores
    assert set(scores) == {"sources", "target_before", "fused"}
    assert set(scores["sources"]) == {s.name for s in run.recipe.sources}
    for table in (*scores["sources"].values(), scores["target_before"], scores["fused"]):
        assert set(table) == {"knowledge", "reasoning", "safety", "mean"}
        assert all(0 <= v <= 1 for v in table.values())
    assert scores["target_before"] == scores["sources"][run.recipe.target]


def test_the_output_directory_loads_and_generates(finished):
    from transformers import AutoModelForCausalLM

    run, _ = finished
    model = AutoModelForCausalLM.from_pretrained(run.output_dir)
    render: Any = pretrained_tokenizer(run.output_dir).apply_chat_template
    ids = render(
        [{"role": "user", "content": "How does a bozun taste?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    out = model.generate(ids, max_new_tokens=5)
    assert out.shape[1] > ids.shape[1]


def test_the_model_cards_code_runs_where_the_model_is(finished, capsys):
    run, _ = finished
    code = (run.output_dir / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code.replace("this directory", str(run.output_dir)), {})
    assert capsys.readouterr().out


def test_a_finished_run_can_be_scored_again_from_its_directory_alone(finished, capsys):
    run, scores = finished
    before = json.loads((run.output_dir / "evaluation.json").read_text())
    evaluate_command([str(run.output_dir)])
    assert json.loads((run.output_dir / "evaluation.json").read_text()) == before
    assert json.loads((run.output_dir / "scores.json").read_text()) == scores
    assert "fused" in capsys.readouterr().out


def test_the_evaluation_shows_training_prompts_of_every_skill_with_votes_and_the_fused_response(finished):
    run, _ = finished
    votes = json.loads((run.output_dir / "evaluation.json").read_text())["votes"]
    assert len(votes) == run.recipe.evaluation.examples
    assert len({example["skill"] for example in votes}) == 3
    assert all(len(example["sources"]) == 3 and isinstance(example["fused"], str) for example in votes)


def test_the_evaluation_records_which_prompts_it_was_made_on(finished):
    run, _ = finished
    recorded = json.loads((run.output_dir / "evaluation.json").read_text())["data"]
    assert recorded == data_hash(load_split(run.recipe, "heldout"))
    assert recorded != data_hash(load_split(run.recipe, "validation"))


def test_changed_training_data_are_refused_when_scoring(finished, tmp_path):
    run, _ = finished
    data = tmp_path / "fusion.jsonl"
    data.write_text(Path(run.recipe.data.train).read_text().replace("?", "??"))
    changed = replace(run, recipe=replace(run.recipe, data=replace(run.recipe.data, train=str(data))))
    with pytest.raises(DataError, match="must be the training data"):
        evaluate(changed, Store.open(run.store_dir))


def test_the_run_directory_says_what_was_done(finished):
    run, _ = finished
    record = json.loads((run.output_dir / "run.json").read_text())
    assert record["prepared"] is False  # the store was there already
    assert record["status"] == "complete"
    assert set(record["seconds"]) == {"prepare", "train", "evaluate"}
    lines = [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval" in line] == [0, 2, 4]
    stages = {line["step"]: line["stage"] for line in lines if "eval" not in line}
    assert stages == {1: 0, 2: 0, 3: 1, 4: 1}
    first, last = (next(line for line in lines if line["step"] == s and "eval" not in line) for s in (1, 4))
    assert "ce_training" not in first
    assert {"ce_training", "kd_training", "ce_inference", "kd_inference"} <= set(last)
    assert 0 <= last["data_wait"] <= 1


@pytest.mark.parametrize(
    ("first", "stop", "log_every", "lines"),
    [
        (0, 12, 10, 12),  # it had two lines, or one
        (7, 19, 10, 12),
        (0, 10, 10, 10),
        (3, 8, 10, 5),  # five steps have five points
        (0, 1, 10, 1),
        (0, 25, 10, 13),
        (5, 99, 10, 11),
        (0, 100, 10, 10),
        (103, 203, 10, 11),
        (0, 99, 1000, 11),
        (0, 1000, 1, 1000),
        (0, 1234, 10, 124),
    ],
)
def test_a_stage_has_ten_logged_points_whatever_its_length(first, stop, log_every, lines):
    stage = Stage(1.0, 0.0, 0.1, first, stop)
    logged = [done for done in range(first + 1, stop + 1) if is_due(done, stage, log_every)]
    assert len(logged) == lines
    assert logged[-1] == stop
    if (stop - first) // 10 >= log_every:  # a stage that is long enough is logged where log_every says
        assert logged[:-1] == [done for done in range(first + 1, stop) if done % log_every == 0]


def test_a_short_run_logs_every_step(prepared, tmp_path):
    _, run, store = prepared
    t = trainer(run, store, tmp_path / "t", log_every=10, eval_every=0)
    t.train()
    lines = [json.loads(line) for line in t.metrics.read_text().splitlines()]
    assert [(line["step"], line["stage"]) for line in lines if "eval" not in line] == [(1, 0), (2, 0), (3, 1), (4, 1)]


def test_a_complete_run_is_not_run_again_and_another_recipe_is_refused(finished):
    run, _ = finished
    assert RunDirectory(run).complete()
    other = replace(run, recipe=replace(run.recipe, seed=7))
    with pytest.raises(ConfigError, match="seed differ"):
        RunDirectory(other).complete()


def interrupted(run, store, directory):
    """Trains until Ctrl-C comes during the second of the four steps, and returns the trainer."""
    part = trainer(run, store, directory)
    own_step = part._step

    def interrupt(step: int, stage: Stage, batch: StepBatch) -> dict[str, float]:
        result = own_step(step, stage, batch)
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    part._step = interrupt
    with pytest.raises(KeyboardInterrupt):
        part.train()
    return part


def untimed(metrics: Path) -> list[dict]:
    """The lines of a metrics.jsonl without the times, and without the seals, which are those of the times as well."""
    timing = {"tokens_per_second": 0, "data_wait": 0, "sha256": ""}
    return [json.loads(line) | timing for line in metrics.read_text().splitlines()]


def test_resuming_after_an_interruption_equals_the_uninterrupted_run(prepared, tmp_path):
    _, run, store = prepared
    whole = trainer(run, store, tmp_path / "whole")
    whole.train()
    interrupted(run, store, tmp_path / "part")
    resumed = trainer(run, store, tmp_path / "part")
    resumed.train()
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(resumed).values()))
    assert untimed(resumed.metrics) == untimed(whole.metrics)


def test_what_dropout_draws_follows_from_the_step_and_not_from_what_was_drawn_before(prepared, tmp_path):
    """A checkpoint holds one random state, but every process has its own."""
    _, run, store = prepared
    seen: list[list[int]] = []
    for before in (1, 2):
        t = trainer(run, store, tmp_path / str(before), eval_every=0)
        states: list[int] = []
        t.fusion.register_forward_pre_hook(
            lambda module, args, states=states: states.append(torch.initial_seed()) if module.training else None
        )
        torch.manual_seed(before)
        t.train()
        seen.append(states)
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 4  # one for each step


def test_an_interruption_while_scoring_costs_only_the_scoring(prepared, tmp_path, monkeypatch):
    _, run, _ = prepared
    run = replace(run, recipe=replace(run.recipe, output=str(tmp_path / "run")))

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("profuser.pipeline.evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(run)
    assert not RunDirectory(run).complete()
    monkeypatch.setattr(Trainer, "_step", interrupted)  # no step is taken again
    assert train(run)["fused"]


def test_gradients_do_not_depend_on_the_micro_batch_size(prepared, tmp_path):
    _, run, store = prepared
    after = []
    for size in (1, 3, 4):
        t = trainer(run, store, tmp_path / str(size), micro_batch_size=size, grad_clip=1e9)
        t.updates.optimizer = torch.optim.SGD(t.fusion.parameters(), lr=1.0)
        metrics = t._step(3, t.stages[1], t.steps.batch(3))
        after.append((weights(t), metrics))
    for other, metrics in after[1:]:
        assert metrics["loss"] == pytest.approx(after[0][1]["loss"], rel=1e-5)
        for name, value in after[0][0].items():
            torch.testing.assert_close(other[name], value, atol=1e-5, rtol=1e-4)


def test_a_step_with_columns_left_out_has_the_exact_losses_and_nearly_the_exact_gradient(
    prepared, tmp_path, monkeypatch
):
    _, run, store = prepared
    monkeypatch.setattr(left_out, "PAYS", 1.0)  # a small vocabulary would be computed as a whole
    thinned, multiply = [], left_out.ThinnedProducts.multiply_stand_ins
    monkeypatch.setattr(left_out.ThinnedProducts, "multiply_stand_ins", lambda self: thinned.append(multiply(self)))
    after = []
    for share in (0.0, 0.003):
        t = trainer(run, store, tmp_path / str(share), left_out=share, grad_clip=1e9)
        t.updates.optimizer = torch.optim.SGD(t.fusion.parameters(), lr=1.0)
        before = weights(t)
        metrics = t._step(3, t.stages[1], t.steps.batch(3))
        after.append((torch.cat([(value - before[name]).flatten() for name, value in weights(t).items()]), metrics))
    (exact, of_exact), (near, of_near) = after
    assert thinned
    assert of_near["loss"] == of_exact["loss"]
    assert 0 < (near - exact).norm() < 5e-3 * exact.norm()
    assert 0 < of_near["left_out_share"] <= 0.003
    assert of_near["kept_share"] < 1
    assert "kept_share" not in of_exact


def test_each_mode_is_normalised_by_its_own_tokens(prepared, tmp_path):
    """The loss of a step equals the formula, which is computed here from the model's own dense logits."""
    _, run, store = prepared
    t = trainer(run, store, tmp_path / "n")
    stage = t.stages[1]
    step = stage.first
    batch = [s for i in t.steps.instructions(step) for s in t.targets[i]]
    expected = 0.0
    for mode, w in ((Mode.TRAINING, stage.training_weight), (Mode.INFERENCE, stage.inference_weight)):
        ce = kd = n = 0.0
        for s in (s for s in batch if s.mode == mode):
            ids = torch.tensor(s.input_ids.astype("int64"))[None]
            with torch.no_grad():
                logq = torch.log_softmax(t.fusion.model(ids).logits[0].double(), -1)
            positions = s.label_mask.nonzero()[0]
            ce -= float(sum(logq[p - 1, s.input_ids[p]] for p in positions))
            n += len(positions)
            winner = int(s.source_ce.argmin())
            for r in range(len(s.row_position)):
                if s.row_source[r] != winner:
                    continue
                part = slice(s.entry_offsets[r], s.entry_offsets[r + 1])
                p = torch.tensor(s.entry_logprobs[part].astype("float64")).exp()
                tail = min(max(float(s.row_tail[r]), 0.0), 1.0)
                p = p / p.sum() * (1 - tail)
                q = logq[s.row_position[r] - 1].exp()
                ids_ = torch.tensor(s.entry_ids[part].astype("int64"))
                kd += float((p * (p.log() - q[ids_].log())).sum())
                rest = 1 - float(q[ids_].sum())
                kd += tail * (torch.tensor(tail).log() - torch.tensor(rest).log()).item() if tail > 0 else 0.0
        expected += w * (ce + stage.beta * kd) / n
    assert t._step(step, stage, t.steps.batch(step))["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_nan_in_a_source_stops_the_run_and_names_it(prepared, tmp_path, monkeypatch):
    _, run, store = prepared
    t = trainer(run, store, tmp_path / "nan")
    sequence = t.targets.sequence
    monkeypatch.setattr(
        t.targets, "sequence", lambda n: replace(s := sequence(n), entry_logprobs=s.entry_logprobs * np.float16("nan"))
    )
    with pytest.raises(NonFiniteError, match="training example"):
        t._step(0, t.stages[0], t.steps.batch(0))


def test_a_large_gradient_is_clipped_to_the_norm_that_was_asked_for():
    """torch's clip_grad_norm_ is wrong by 0.02 % here on a CPU, and by less where the tensor is divided."""
    layer = torch.nn.Linear(1024, 8192)
    alone: Any = SimpleNamespace(prepare=lambda *prepared: prepared)
    fusion: Any = layer
    updates = OwnUpdates(fusion, torch.optim.SGD(layer.parameters(), lr=1.0), 0.5, alone, sharded=False)
    before = torch.cat([p.detach().flatten() for p in layer.parameters()])
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(parameter.shape, generator=generator) for parameter in layer.parameters()]
    for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    true = torch.cat([gradient.flatten() for gradient in gradients]).double().norm()
    assert updates.update() == pytest.approx(float(true), rel=1e-7)
    change = torch.cat([p.detach().flatten() for p in layer.parameters()]) - before
    assert float(change.double().norm()) == pytest.approx(0.5, rel=1e-5)
    # It is then forgotten, and one that is not finite leaves the weights as they are.
    assert all(parameter.grad is None for parameter in layer.parameters())
    for number in (math.inf, math.nan):
        for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
            parameter.grad = torch.full_like(gradient, number)
        assert not math.isfinite(updates.update())
    assert torch.equal(torch.cat([p.detach().flatten() for p in layer.parameters()]) - before, change)


def test_padding_and_batch_mates_do_not_change_a_sequences_loss(prepared):
    from profuser.models.load import load_model
    from profuser.recipe.schema import SourceConfig

    _, run, store = prepared
    targets = Targets(store, "train")
    model = FusionModel(load_model(SourceConfig(name="g", model="demo:" + run.recipe.target), torch.float32)).eval()
    sequences = [targets.sequence(n) for n in range(6)]
    ones = dict.fromkeys(Mode, 1.0)

    def losses(group):
        batch = collate([[s] for s in group], ones, ones, 0, targets.top_k)
        batch = {name: torch.from_numpy(array) for name, array in batch.items()}
        out = model(**batch, reduction="sum", return_stats=True)
        return (out["ce"] + out["kd"]).view(len(group), -1).sum(1)

    with torch.no_grad():
        together = losses(sequences)
        alone = torch.cat([losses([s]) for s in sequences])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_a_damaged_store_is_repaired_before_training(prepared, tmp_path):
    directory, run, _ = prepared
    shutil.copytree(directory / "store", tmp_path / "store")
    victim = sorted((tmp_path / "store/targets").iterdir())[0]
    original = victim.read_bytes()
    victim.write_bytes(original[:-7])
    copy = replace(run, recipe=replace(run.recipe, store=str(tmp_path / "store")))
    assert prepare(copy).complete
    assert victim.read_bytes() == original


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_keeps_what_was_finished_and_the_same_command_goes_on(tmp_path, number, code):
    run = small_run(tmp_path)
    arguments = [
        sys.executable, "-m", "profuser.train",
        f"--data.train={run.recipe.data.train}", f"--data.validation={run.recipe.data.validation}",
        f"--data.heldout={run.recipe.data.heldout}", f"--store={tmp_path / 'store'}", f"--output={tmp_path / 'run'}",
        "--generation.max_new_tokens=16", "--capture.shard_size=5", "--optim.steps=4", "--optim.batch_size=4",
    ]  # fmt: skip
    process = subprocess.Popen(
        arguments,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's `&` lets a process ignore SIGINT, and a child inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    manifest = tmp_path / "store/manifest.json"
    while not (manifest.exists() and json.loads(manifest.read_text())["shards"]):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    before = set(json.loads(manifest.read_text())["shards"])
    assert before
    times = {
        n: (tmp_path / "store" / f"{n}.safetensors").stat().st_mtime_ns
        for n in before
        if (tmp_path / "store" / f"{n}.safetensors").exists()
    }
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert Store.open(tmp_path / "store").complete
    for name, written in times.items():
        assert (tmp_path / "store" / f"{name}.safetensors").stat().st_mtime_ns == written
    assert (tmp_path / "run/report.html").exists()


def test_a_renormalised_tail_with_a_temperature_trains_and_evaluates(prepared, tmp_path):
    _, run, store = prepared
    t = trainer(run, store, tmp_path / "t", tail="renormalize", temperature=2.0)
    t.train()
    lines = [json.loads(line) for line in t.metrics.read_text().splitlines()]
    assert all(line["eval"]["kd"] > 0 for line in lines if "eval" in line)


def test_a_torn_last_line_of_the_metrics_does_not_stop_a_resumption(finished, prepared, tmp_path):
    _, run, store = prepared
    metrics = interrupted(run, store, tmp_path / "t").metrics
    os.truncate(metrics, metrics.stat().st_size - 20)
    trainer(run, store, tmp_path / "t").train()
    assert untimed(metrics) == untimed(finished[0].output_dir / "metrics.jsonl")


def test_resuming_on_other_targets_is_refused(prepared, tmp_path):
    _, run, store = prepared
    trainer(run, store, tmp_path / "t").train()
    other = trainer(run, store, tmp_path / "t")
    other.targets_digest = "other"
    with pytest.raises(ConfigError, match="other targets"):
        other.train()


def test_without_any_training_example_left_the_run_says_so(prepared, tmp_path):
    _, run, _ = prepared
    recipe = replace(run.recipe, data=replace(run.recipe.data, max_length=4), store=str(tmp_path / "s"))
    with pytest.raises(DataError, match="max_length"):
        trainer(replace(run, recipe=recipe), prepare(replace(run, recipe=recipe)), tmp_path / "t")


def test_a_recipe_can_be_corrected_until_there_is_something_to_lose(prepared, tmp_path):
    _, run, _ = prepared
    first = replace(run, recipe=replace(run.recipe, output=str(tmp_path / "r"), seed=1))
    RunDirectory(first).begin("fp32")
    corrected = RunDirectory(replace(first, recipe=replace(first.recipe, seed=2)))
    assert not corrected.complete()
    corrected.begin("fp32")
    (tmp_path / "r/checkpoints/step-000001").mkdir(parents=True)
    with pytest.raises(ConfigError, match="seed differ"):
        RunDirectory(replace(first, recipe=replace(first.recipe, seed=3))).complete()
    smaller = replace(first.recipe, seed=2, optim=replace(first.recipe.optim, micro_batch_size=1))
    assert not RunDirectory(replace(first, recipe=smaller)).complete()


def test_the_fused_model_keeps_the_targets_dtype(finished):
    from safetensors.torch import load_file

    run, _ = finished
    assert {t.dtype for t in load_file(run.output_dir / "model.safetensors").values()} == {torch.bfloat16}


def command(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--no-such-key", "1"], 2, "no-such-key"),
        pytest.param(
            ["--data.train", "missing.jsonl", "--output", "{tmp}/r", "--store", "{tmp}/s"],
            3,
            "missing.jsonl",
            marks=pytest.mark.long,
        ),
        (["--config", "{tmp}/missing_model.yaml", "--output", "{tmp}/r", "--store", "{tmp}/s"], 3, "/no/such/model"),
    ],
)
def test_bad_input_gets_one_line_and_its_exit_code(tmp_path, arguments, code, expected):
    (tmp_path / "missing_model.yaml").write_text(
        "sources: [{name: a, model: /no/such/model}]\ntarget: a\ndata: {train: 'demo:fusion.jsonl'}\nschedule: sft\n"
    )
    result = command("profuser.train", *[a.format(tmp=tmp_path) for a in arguments])
    assert result.returncode == code, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert expected in errors[0]


@pytest.mark.parametrize(
    ("name", "said"),
    [("nothing", "None"), ("a_score", "0.5"), ("a_failure", r"KeyError in test_train\.py, line \d+: 'answr'")],
)
def test_a_match_that_is_wrong_is_found_before_any_model_runs(tmp_path, monkeypatch, name, said):
    monkeypatch.setattr("profuser.pipeline.Preparation.run", lambda _: pytest.fail("the preparation began"))
    run = small_run(tmp_path, f"--evaluation.match=test_train:{name}")
    with pytest.raises(
        DataError, match=f"evaluation.match: test_train:{name} must return True or False, .* it gave .*{said}"
    ):
        train(run)


def nothing(example, response): ...


def a_score(example, response):
    return 0.5


def a_failure(example, response):
    return example["answr"] == response
