"""The memory that the plan names is what a training takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_runs import rows, write_rows
from conftest import ROOT
from plan_models import demo, small
from transformers import LlamaConfig, LlamaForCausalLM

from profuser.kernels.common import chunk_rows
from profuser.models import packing
from profuser.models.load import load_model
from profuser.plan.architecture import Architecture, open_architecture
from profuser.plan.lengths import Lengths
from profuser.plan.memory import Pass, TrainingMemory, answering, checkpoint_bytes, loss_bytes, reading, training_memory
from profuser.plan.plan import largest_pass, make_plan
from profuser.plan.text import size
from profuser.recipe.adapter import AdapterConfig
from profuser.recipe.optim import OptimConfig
from profuser.recipe.parse import parse_run
from profuser.recipe.places import resolve
from profuser.recipe.schema import SourceConfig
from profuser.train.adapter import with_adapter
from profuser.train.optimizer import parameter_groups
from profuser.train.targets import Targets

ADAPTER = AdapterConfig(rank=4)


def test_the_optimizers_state_is_what_torch_holds():
    model = load_model(SourceConfig(name="g", model="demo:guardian"), torch.float32)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1))
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    moments = sum(state[key].nbytes for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    memory = make_plan(parse_run("train", []), processes=(1,), instructions=700, timed=False).training[0]
    assert (memory.weights, memory.gradients, memory.moments) == (gradients, gradients, moments)


def test_shards_divide_what_the_optimizer_holds(paper):
    by = {(m.processes, m.sharded): m for m in paper.training}
    assert set(by) == {(1, False), (8, False), (8, True), (16, False), (16, True)}
    whole = 4 * 6_738_415_616
    for (n, sharded), memory in by.items():
        share = whole / n if sharded else whole
        assert (memory.weights, memory.gradients, memory.moments) == pytest.approx((share, share, 2 * share))
    assert by[1, False].peak > 16 * 6_738_415_616
    assert by[8, False].peak == by[1, False].peak  # the gradients are exchanged where they lie
    assert by[16, True].peak < by[8, True].peak < by[1, False].peak / 6
    assert paper.one.tokens == 4096


def test_a_recipe_that_shards_is_judged_by_its_shards(paper):
    assert paper.memory(8).sharded
    recipe = replace(paper.recipe, optim=replace(paper.recipe.optim, shard=False))
    whole = replace(paper, recipe=recipe)
    assert not whole.memory(8).sharded
    assert not paper.memory(1).sharded
    assert paper.peak(8) < whole.peak(8)


def test_an_adapter_has_the_gradients_and_moments_of_its_own_weights():
    adapter = AdapterConfig(rank=4)
    adapted = with_adapter(load_model(SourceConfig(name="g", model="demo:guardian"), torch.float32), adapter)
    trained = sum(p.nbytes for p in adapted.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in adapted.parameters() if not p.requires_grad)
    command = ["--adapter.rank=4"]
    plan = make_plan(parse_run("train", command), processes=(1,), instructions=700, timed=False)
    whole = make_plan(parse_run("train", []), processes=(1,), instructions=700, timed=False)
    memory = plan.training[0]
    assert (memory.weights, memory.gradients, memory.moments) == (trained + frozen, trained, 2 * trained)
    assert memory.loss < whole.training[0].loss  # the head has no gradient
    assert plan.checkpoint < whole.checkpoint / 10


def test_shards_divide_the_weights_that_an_adapter_freezes_too():
    def of(*overrides):
        plan = make_plan(parse_run("train", overrides), processes=(1, 4), instructions=700, timed=False)
        return {(m.processes, m.sharded): m for m in plan.training}

    by, trained = of("--adapter.rank=4"), of()
    one, four = by[1, False], by[4, True]
    assert by[4, False].weights == one.weights
    for part in ("weights", "gradients", "moments"):
        assert getattr(four, part) == pytest.approx(getattr(one, part) / 4, abs=4)
    # What is gathered is that of a target without an adapter, but for the adapter and the frozen blocks' gradients.
    block = Architecture("guardian", demo("guardian").config, "generates", True, True).block
    a, b = (block_of.trained_block for block_of in (demo("guardian"), replace(demo("guardian"), adapter=ADAPTER)))
    assert a == block
    assert b == by[1, False].gradients / 4 / 4  # one of four blocks
    assert four.exchange < trained[4, True].exchange + 3 * 4 * b


@pytest.mark.parametrize("setting", ["--adapter.quantize=nf4", "--optim.name=adamw_8bit"])
def test_what_is_held_in_few_bits_is_not_sharded(setting):
    run = parse_run("train", ["--adapter.rank=4", setting])
    plan = make_plan(run, processes=(1, 4), instructions=700, timed=False)
    assert [(m.processes, m.sharded) for m in plan.training] == [(1, False), (4, False)]


def test_gradient_checkpointing_and_fewer_tokens_save_activations(paper):
    def activations(*overrides: str) -> tuple[int, int]:
        plan = make_plan(parse_run("train", [*overrides]), processes=(1,), instructions=700, timed=False)
        return plan.training[0].activations, plan.other_activations

    off, on = activations()
    assert activations("--optim.gradient_checkpointing=true") == (on, off)
    assert on < off / 8
    assert activations("--optim.micro_batch_size=12")[0] == off / 2
    assert paper.training[0].activations < paper.other_activations / 8


def test_a_pass_without_a_budget_has_the_longest_rows_of_both_modes():
    recipe = parse_run("train", []).recipe  # 48 instructions in passes of 24
    lengths = Lengths(30.0, 50, 12.0, 0.0)
    one = largest_pass(recipe, 2, lengths, (1000, 7), 1)
    assert (one.rows, one.length, one.activations, one.copies, one.in_step) == (48, 50, 48000, 7, 2)
    assert largest_pass(recipe, 2, lengths, (1000, 7), 2).in_step == 1
    assert largest_pass(recipe, 1, lengths, (1000, 7), 2).rows == 24


@pytest.mark.parametrize("budget", [50, 99, 130, 512, 4096])
@pytest.mark.parametrize("layout", ["padded", "packed", "flat"])
def test_a_pass_with_a_budget_is_as_large_as_the_packing_makes_it(prepared, budget, layout):
    recipe = parse_run("train", ["--data.max_length=50", f"--optim.tokens_per_micro_batch={budget}"]).recipe
    one = largest_pass(recipe, 2, Lengths(30.0, 50, 12.0, 0.0), (1000, 7), 1)
    assert budget - one.rows < one.tokens <= budget
    some = Targets(prepared[2], "train")[0][0]
    drawn = np.random.default_rng(0).integers(10, 51, 500)
    passes = packing.by_tokens([replace(some, input_ids=np.zeros(n, np.int32)) for n in drawn], budget, layout, 1)
    assert 0.7 * budget < max(map(packing.size_of, passes)) <= budget


@pytest.mark.parametrize("cuda", [False, True])
def test_the_loss_is_far_from_tokens_times_vocabulary(cuda):
    model, optim = open_architecture(SourceConfig(name="m", model="lmsys/vicuna-7b-v1.5")), OptimConfig()
    sizes = [loss_bytes(model, optim, n, top_k=10, cuda=cuda, bf16=cuda) for n in (65_536, 131_072)]
    assert sizes[1] - sizes[0] < 65_536 * 32_000 * 4 / 3  # what grows are the gradients of the hidden states


@pytest.mark.parametrize(
    ("built", "cuda", "left_out", "another_chunk"),
    [(True, False, 0.0, False), (True, False, 0.003, True), (False, False, 0.0, True), (False, True, 0.0, False)],
)
def test_a_temperature_needs_another_chunk_of_logits_where_the_loss_does(
    built, cuda, left_out, another_chunk, monkeypatch
):
    monkeypatch.setattr("profuser.kernels.rows._rows", object() if built else None)
    model = open_architecture(SourceConfig(name="m", model="lmsys/vicuna-7b-v1.5"))
    optim = OptimConfig(left_out=left_out)
    cold, hot = (
        loss_bytes(model, replace(optim, temperature=T, tail="renormalize"), 65_536, top_k=10, cuda=cuda, bf16=cuda)
        for T in (1.0, 2.0)
    )
    assert hot - cold == another_chunk * chunk_rows(65_536, 32_000, 4) * 32_000 * 4


def test_the_softcap_of_a_target_needs_another_chunk_of_logits():
    with_it, without = (
        small("gemma2", head_dim=8, num_key_value_heads=2, vocab_size=4099, final_logit_softcapping=softcap)
        for softcap in (30.0, None)
    )
    a, b = (loss_bytes(of, OptimConfig(), 640, top_k=10, cuda=False, bf16=False) for of in (with_it, without))
    assert a - b == chunk_rows(640, 4099, 4) * 4099 * 4


def test_the_loss_in_16_bits_multiplies_its_gradients_into_new_tensors():
    model = open_architecture(SourceConfig(name="m", model="lmsys/vicuna-7b-v1.5"))
    assert loss_bytes(model, OptimConfig(), 64, top_k=10, cuda=False, bf16=True) == 2 * 4 * (32_000 + 64) * 4096


def test_the_peak_is_when_the_backward_pass_begins_or_ends_or_at_the_update():
    usual = TrainingMemory(
        processes=1, sharded=False, weights=1000, gradients=100, moments=10, exchange=1,
        activations=50, copies=5, loss=20, ending=0, update=0, single=True,
    )  # fmt: skip

    def beside_what_lasts(**parts: Any) -> int:
        return replace(usual, **parts).peak - 1011

    assert beside_what_lasts() == 100
    assert beside_what_lasts(loss=60) == 50 + 5 + 60  # there are no gradients yet
    assert beside_what_lasts(loss=60, single=False) == 100 + 50 + 5 + 60
    assert beside_what_lasts(ending=30) == 100 + 30
    assert beside_what_lasts(update=40, ending=30) == 100 + 40


def test_the_parts_of_a_small_target():
    plain, tied = (small("llama", tie_word_embeddings=t) for t in (False, True))
    adapted, head = replace(plain, adapter=ADAPTER), 4 * 101 * 32
    frozen = adapted.parameters - adapted.trained

    def of(target, processes=1, sharded=False, cuda=False, copies=0, in_step=1):
        one = Pass(2, 40, 1000, copies, in_step)
        optim = OptimConfig()
        return training_memory(target, optim, one, processes=processes, sharded=sharded, cuda=cuda, top_k=10)

    # Under DDP the buffers of the gradients are always there, and of several passes the second finds gradients.
    assert (of(plain).single, of(plain, 4, True).single) == (True, True)
    assert not any(memory.single for memory in (of(plain, 4), of(plain, in_step=2), of(plain, 4, True, in_step=2)))
    # The embeddings' gradient is added to another one: to that of the head, or of the pass before.
    assert [of(plain).ending, of(plain, in_step=2).ending, of(tied).ending] == [0, head, head]
    assert of(adapted, in_step=2).ending == 0
    assert of(plain).update == 2 * head
    assert of(plain, 4, True, cuda=True).update == of(plain, 4, True).weights == plain.parameters
    # A sharded target gathers two blocks and what is outside of them, and has no copies of its own.
    whole, half = (of(plain, 4, True, copies=copies) for copies in (0, 7))
    assert whole.exchange - half.exchange == 2 * (2 * plain.block + plain.root)
    assert whole.exchange == 4 * (2 * plain.block + plain.root) + 4 * plain.block
    assert (of(plain, copies=7).copies, half.copies, of(adapted, copies=7).copies) == (7, 0, 0)
    # Weights that an adapter freezes are in 16 bits where the passes are.
    assert of(adapted).weights - of(adapted, copies=7).weights == 2 * frozen


def test_a_checkpoint_is_copied_from_a_gpu():
    model = small("llama")
    on_cpu, on_gpu = (checkpoint_bytes(model, OptimConfig(), cuda=cuda) for cuda in (False, True))
    assert (on_cpu, on_gpu) == (20 * model.parameters, 32 * model.parameters)


def test_the_models_that_make_the_store():
    model = small("llama", num_key_value_heads=2)  # 2 * 3 * 2 * 8 keys and values of a token
    answers = answering(model, "m", 2, 5, 40)
    assert (answers.weights, answers.working) == (2 * model.parameters, 5 * 40 * 96 * 2 + 3 * 5 * 101 * 4)
    assert answers.piece == 5 * 40 * 2 * 8 * 2
    reads = reading(model, "m", "is captured", 4, 5, 40)
    assert reads.working == 5 * 40 * (4 * 32 + 3 * 48) * 4 + 2048 * 101 * 4
    assert reading(replace(model, kind="scores"), "m", "judges", 4, 5, 40).working == 5 * 40 * (4 * 32 + 3 * 48) * 4
    assert reads.peak == reads.weights + reads.working
    assert (reads.kept, replace(reads, piece=32 << 20).kept) == (reads.working, 0)


PROGRAM = """
import sys
sys.path.insert(0, TESTS)
from command_runs import without_pictures
from profuser.cli import main_of
from profuser.train.__main__ import main
with without_pictures():
    main_of(main, ["--config", "recipe.yaml"])
"""


def train_in_a_process(place: Path) -> tuple[dict, str]:
    """Trains in a process of its own, without a report's pictures, and returns its run.json and what it printed."""
    command = [sys.executable, "-c", PROGRAM.replace("TESTS", repr(str(ROOT / "tests")))]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((place / "runs/recipe/run.json").read_text()), done.stdout


RECIPE = """\
sources: [{ name: guardian, model: "demo:guardian" }]
target: TARGET
data: { train: train.jsonl, max_length: 256 }
schedule: fusellm
optim: { steps: 2, batch_size: 4, micro_batch_size: 4, data_workers: 0 }
"""


def make_folder(place: Path, target: str) -> None:
    (place / "recipe.yaml").write_text(RECIPE.replace("TARGET", target))
    write_rows(str(place / "train.jsonl"), rows("fusion", 8))


def estimate_beside(place: Path, monkeypatch) -> tuple[float, int]:
    """The estimate of a folder's recipe, and what its training took, in bytes."""
    record, out = train_in_a_process(place)
    monkeypatch.chdir(place)
    plan = make_plan(parse_run("train", ["--config", "recipe.yaml"]), processes=(1,), timed=False)
    estimated = plan.peak(1)
    assert (
        f"memory without mapped files: {size(record['peak_owned_bytes'])} at most, estimated {size(estimated)}; time: "
        in out
    )
    return estimated, record["peak_owned_bytes"]


@pytest.mark.parametrize(
    ("optim", "share"), [([], 0.75), pytest.param(["--optim.tokens_per_micro_batch", "512"], 0, marks=pytest.mark.long)]
)
def test_an_adapter_adds_its_libraries_and_on_padded_passes_the_gaps_between_its_tensors(monkeypatch, optim, share):
    plan = make_plan(parse_run("train", ["--adapter.rank", "16", *optim]), processes=(1,), timed=False)
    counted = plan.peak(1)
    for name in ("ADAPTER", "PIECES"):
        monkeypatch.setattr(f"profuser.plan.plan.{name}", 0)
    assert counted - plan.peak(1) == (55 << 20) + round(share * plan.one.activations)


@pytest.mark.long
def test_a_small_training_takes_what_was_estimated(tmp_path, monkeypatch):
    """Most of its memory is that of Python and its libraries."""
    make_folder(tmp_path, "guardian")
    estimated, measured = estimate_beside(tmp_path, monkeypatch)
    print(f"estimated {size(estimated)}, measured {size(measured)}")
    assert estimated == pytest.approx(measured, rel=0.1)


@pytest.mark.long
def test_a_training_of_a_hundred_million_parameters_takes_what_was_estimated(tmp_path, monkeypatch):
    target = tmp_path / "target"
    shutil.copytree(resolve("demo:guardian"), target, ignore=shutil.ignore_patterns("*.safetensors"))
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, dtype="float32", bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(target)
    make_folder(tmp_path, "./target")
    estimated, measured = estimate_beside(tmp_path, monkeypatch)
    assert estimated == pytest.approx(measured, rel=0.1)
    model = open_architecture(SourceConfig(name="target", model=str(target)))
    assert measured > checkpoint_bytes(model, OptimConfig(), cuda=False)
