"""The plan of a run: its counts are those of real models and stores, its memory is what training takes, and it touches nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_runs import folder, prepared_files, rows, run, write_rows
from conftest import ROOT
from safetensors.numpy import load_file
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from profuser.errors import ConfigError
from profuser.kernels.common import chunk_rows
from profuser.models import packing
from profuser.models.load import chat_format, load_model
from profuser.plan.architecture import CONFIGS, Architecture, open_architecture
from profuser.plan.asked import asked_of_each
from profuser.plan.lengths import Lengths, measured
from profuser.plan.memory import Pass, TrainingMemory, answering, checkpoint_bytes, loss_bytes, reading, training_memory
from profuser.plan.plan import Plan, largest_pass, make_plan
from profuser.plan.probe import Timed
from profuser.plan.store_size import PER_SEQUENCE, Counts, capture_bytes, targets_bytes
from profuser.plan.text import beside, commands, plan_text, remedies, size
from profuser.recipe.adapter import AdapterConfig
from profuser.recipe.optim import OptimConfig
from profuser.recipe.parse import parse_run
from profuser.recipe.places import resolve
from profuser.recipe.schema import Choice, SourceConfig
from profuser.store.layout import TARGET_COLUMNS
from profuser.train.__main__ import without_own
from profuser.train.adapter import with_adapter
from profuser.train.optimizer import parameter_groups
from profuser.train.targets import Targets

PAPER = str(ROOT / "profuser/recipes/paper-7b.yaml")
ADAPTER = AdapterConfig(rank=4)
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 101,
}


@pytest.fixture(scope="module")
def paper() -> Plan:
    """The plan of the paper's recipe, without its models and data."""
    return make_plan(parse_run("train", ["--config", PAPER]), timed=False)


def small(model_type: str, **sizes) -> Architecture:
    return Architecture(model_type, AutoConfig.for_model(model_type, **(SMALL | sizes)), "generates", True, False)


def demo(name: str) -> Architecture:
    return open_architecture(SourceConfig(name=name, model=f"demo:{name}"))


class TestArchitectures:
    @pytest.mark.parametrize(
        "model",
        [
            small("llama", tie_word_embeddings=False),
            small("llama", tie_word_embeddings=True, num_key_value_heads=2),
            small("qwen2", tie_word_embeddings=True),
            small("gemma2", head_dim=8, num_key_value_heads=2),
            small("gpt_neox"),
            small("gpt2", n_embd=32, n_layer=3, n_head=4),
            small("mpt", d_model=32, n_layers=3, n_heads=4, no_bias=True),
        ],
        ids=lambda model: model.name,
    )
    def test_parameters_are_those_of_the_real_model(self, model):
        real = AutoModelForCausalLM.from_config(model.config)
        assert model.parameters == sum(p.numel() for p in real.parameters())
        assert model.largest == max(p.numel() for p in real.parameters())
        assert model.block * model.layers + model.root == model.parameters
        assert 0 < model.block < model.parameters / 3

    def test_a_tied_head_counts_once(self):
        tied, untied = (small("llama", tie_word_embeddings=t).parameters for t in (True, False))
        assert untied - tied == 101 * 32

    @pytest.mark.parametrize("name", ["guardian", "scholar", "reckoner"])
    def test_parameters_are_those_of_the_loaded_weights(self, name):
        source = SourceConfig(name=name, model=f"demo:{name}")
        assert demo(name).parameters == sum(p.numel() for p in load_model(source, torch.float32).parameters())

    @pytest.mark.parametrize(
        ("model", "parameters"),
        [
            ("lmsys/vicuna-7b-v1.5", 6_738_415_616),
            ("meta-llama/Llama-2-7b-chat-hf", 6_738_415_616),
            ("mosaicml/mpt-7b-8k-chat", 6_649_286_656),
        ],
    )
    def test_the_papers_models_have_their_published_sizes(self, model, parameters):
        found = open_architecture(SourceConfig(name="m", model=model))
        assert (found.parameters, found.bundled, found.here) == (parameters, True, False)

    def test_every_hub_model_of_the_papers_recipe_is_bundled(self):
        recipe = parse_run("train", ["--config", PAPER]).recipe
        names = [model.model for model in (*recipe.sources, *recipe.judges)]
        assert all((CONFIGS / f"{str(name).replace('/', '--')}.json").is_file() for name in names)

    def test_the_cache_of_keys_and_values(self):
        assert small("llama", num_key_value_heads=2).cache == 2 * 3 * 2 * 8
        assert small("llama", num_key_value_heads=2, head_dim=16).cache == 2 * 3 * 2 * 16
        assert small("mamba", num_attention_heads=None).cache == 0

    def test_layers_may_differ(self):
        model = small(
            "gemma4_text", num_hidden_layers=6, num_key_value_heads=2, head_dim=8, vocab_size_per_layer_input=101
        )
        found = {
            (layer.head_dim, layer.num_key_value_heads, layer.intermediate_size)
            for layer in model.config.per_layer_config
        }
        assert len(found) > 1
        layers = model.config.per_layer_config
        assert model.cache == sum(2 * layer.num_key_value_heads * layer.head_dim for layer in layers)
        assert model.inner == max(layer.intermediate_size for layer in layers)
        assert small("gemma3n_text", num_hidden_layers=5, vocab_size_per_layer_input=101).inner == 48

    def test_what_is_in_no_block_is_counted_where_blocks_differ(self):
        model = small("jamba", num_hidden_layers=8, num_key_value_heads=2, num_experts=4, use_mamba_kernels=False)
        assert model.block * model.layers > model.parameters
        outside = [p.numel() for name, p in model.model.named_parameters() if ".layers." not in name]
        assert model.root == sum(outside) == 2 * 101 * 32 + 32

    @pytest.mark.parametrize("checkpointing", [False, True])
    @pytest.mark.parametrize("bf16", [False, True])
    def test_activations_are_what_a_real_pass_keeps(self, checkpointing, bf16):
        model = small("llama", num_key_value_heads=2, head_dim=8)
        copies = self.check_saved(model, checkpointing, bf16)
        linear = 2 * (model.block - 2 * 32) * model.layers  # all of a block but its two norms
        assert copies == (linear if bf16 and not checkpointing else 0)

    def test_activations_of_a_mixture_of_experts_are_what_a_real_pass_keeps(self):
        self.check_saved(small("mixtral", num_key_value_heads=2, num_local_experts=4), checkpointing=False, bf16=True)

    def check_saved(self, model: Architecture, checkpointing: bool, bf16: bool) -> int:
        """Compares what the plan says with what a pass keeps. Returns the bytes of copies in bf16 that are in it."""
        real = AutoModelForCausalLM.from_config(model.config).train()
        if checkpointing:
            real.gradient_checkpointing_enable()
        own = {t.untyped_storage().data_ptr() for t in (*real.parameters(), *real.buffers())}
        kept = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage
            return tensor

        ids = torch.arange(3 * 40).reshape(3, 40) % 101
        with saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden = real.base_model(input_ids=ids, attention_mask=(ids > 0).long(), use_cache=False)
        total = sum(storage.nbytes() for storage in kept.values())
        assert hidden is not None  # what it keeps lives as long as its graph
        activations, copies = model.saved(3, 40, bf16=bf16, checkpointing=checkpointing)
        assert activations + copies == pytest.approx(total, rel=0.05)
        return copies


def test_a_store_that_does_not_fit_is_found(prepared, tmp_path):
    _, run, _ = prepared
    other = replace(run.recipe, capture=replace(run.recipe.capture, top_k=3))
    with pytest.raises(ConfigError, match=r"captured with other settings \(capture\.top_k differ\)"):
        make_plan(replace(run, recipe=other), timed=False)
    rows = Path(str(run.recipe.data.train)).read_text().splitlines(keepends=True)
    (tmp_path / "fewer.jsonl").write_text("".join(rows[1:]))
    fewer = replace(run.recipe, data=replace(run.recipe.data, train=str(tmp_path / "fewer.jsonl")))
    first, *_ = make_plan(replace(run, recipe=fewer), timed=False).assumed
    assert first == "data.train changed since the store was made: run `python -m profuser.prepare` before the training"


class TestMemory:
    def test_the_optimizers_state_is_what_torch_holds(self):
        model = load_model(SourceConfig(name="g", model="demo:guardian"), torch.float32)
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.1))
        model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        optimizer.step()
        moments = sum(state[key].nbytes for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        memory = make_plan(parse_run("train", []), processes=(1,), instructions=700, timed=False).training[0]
        assert (memory.weights, memory.gradients, memory.moments) == (gradients, gradients, moments)

    def test_shards_divide_what_the_optimizer_holds(self, paper):
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

    def test_a_recipe_that_shards_is_judged_by_its_shards(self, paper):
        assert paper.memory(8).sharded
        recipe = replace(paper.recipe, optim=replace(paper.recipe.optim, shard=False))
        whole = replace(paper, recipe=recipe)
        assert not whole.memory(8).sharded
        assert not paper.memory(1).sharded
        assert paper.peak(8) < whole.peak(8)

    def test_an_adapter_has_the_gradients_and_moments_of_its_own_weights(self):
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

    def test_shards_divide_the_weights_that_an_adapter_freezes_too(self):
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
    def test_what_is_held_in_few_bits_is_not_sharded(self, setting):
        run = parse_run("train", ["--adapter.rank=4", setting])
        plan = make_plan(run, processes=(1, 4), instructions=700, timed=False)
        assert [(m.processes, m.sharded) for m in plan.training] == [(1, False), (4, False)]

    def test_gradient_checkpointing_and_fewer_tokens_save_activations(self, paper):
        def activations(*overrides: str) -> tuple[int, int]:
            plan = make_plan(parse_run("train", [*overrides]), processes=(1,), instructions=700, timed=False)
            return plan.training[0].activations, plan.other_activations

        off, on = activations()
        assert activations("--optim.gradient_checkpointing=true") == (on, off)
        assert on < off / 8
        assert activations("--optim.micro_batch_size=12")[0] == off / 2
        assert paper.training[0].activations < paper.other_activations / 8

    def test_a_pass_without_a_budget_has_the_longest_rows_of_both_modes(self):
        recipe = parse_run("train", []).recipe  # 48 instructions in passes of 24
        lengths = Lengths(30.0, 50, 12.0, 0.0)
        one = largest_pass(recipe, 2, lengths, (1000, 7), 1)
        assert (one.rows, one.length, one.activations, one.copies, one.in_step) == (48, 50, 48000, 7, 2)
        assert largest_pass(recipe, 2, lengths, (1000, 7), 2).in_step == 1
        assert largest_pass(recipe, 1, lengths, (1000, 7), 2).rows == 24

    @pytest.mark.parametrize("budget", [50, 99, 130, 512, 4096])
    @pytest.mark.parametrize("layout", ["padded", "packed", "flat"])
    def test_a_pass_with_a_budget_is_as_large_as_the_packing_makes_it(self, prepared, budget, layout):
        recipe = parse_run("train", ["--data.max_length=50", f"--optim.tokens_per_micro_batch={budget}"]).recipe
        one = largest_pass(recipe, 2, Lengths(30.0, 50, 12.0, 0.0), (1000, 7), 1)
        assert budget - one.rows < one.tokens <= budget
        some = Targets(prepared[2], "train")[0][0]
        drawn = np.random.default_rng(0).integers(10, 51, 500)
        passes = packing.by_tokens([replace(some, input_ids=np.zeros(n, np.int32)) for n in drawn], budget, layout, 1)
        assert 0.7 * budget < max(map(packing.size_of, passes)) <= budget

    @pytest.mark.parametrize("cuda", [False, True])
    def test_the_loss_is_far_from_tokens_times_vocabulary(self, cuda):
        model, optim = open_architecture(SourceConfig(name="m", model="lmsys/vicuna-7b-v1.5")), OptimConfig()
        sizes = [loss_bytes(model, optim, n, top_k=10, cuda=cuda, bf16=cuda) for n in (65_536, 131_072)]
        assert sizes[1] - sizes[0] < 65_536 * 32_000 * 4 / 3  # what grows are the gradients of the hidden states

    @pytest.mark.parametrize(
        ("built", "cuda", "left_out", "another_chunk"),
        [(True, False, 0.0, False), (True, False, 0.003, True), (False, False, 0.0, True), (False, True, 0.0, False)],
    )
    def test_a_temperature_needs_another_chunk_of_logits_where_the_loss_does(
        self, built, cuda, left_out, another_chunk, monkeypatch
    ):
        monkeypatch.setattr("profuser.kernels.rows._rows", object() if built else None)
        model = open_architecture(SourceConfig(name="m", model="lmsys/vicuna-7b-v1.5"))
        optim = OptimConfig(left_out=left_out)
        cold, hot = (
            loss_bytes(model, replace(optim, temperature=T, tail="renormalize"), 65_536, top_k=10, cuda=cuda, bf16=cuda)
            for T in (1.0, 2.0)
        )
        assert hot - cold == another_chunk * chunk_rows(65_536, 32_000, 4) * 32_000 * 4

    def test_the_softcap_of_a_target_needs_another_chunk_of_logits(self):
        with_it, without = (
            small("gemma2", head_dim=8, num_key_value_heads=2, vocab_size=4099, final_logit_softcapping=softcap)
            for softcap in (30.0, None)
        )
        a, b = (loss_bytes(of, OptimConfig(), 640, top_k=10, cuda=False, bf16=False) for of in (with_it, without))
        assert a - b == chunk_rows(640, 4099, 4) * 4099 * 4

    def test_the_loss_in_16_bits_multiplies_its_gradients_into_new_tensors(self):
        model = open_architecture(SourceConfig(name="m", model="lmsys/vicuna-7b-v1.5"))
        assert loss_bytes(model, OptimConfig(), 64, top_k=10, cuda=False, bf16=True) == 2 * 4 * (32_000 + 64) * 4096

    def test_the_peak_is_when_the_backward_pass_begins_or_ends_or_at_the_update(self):
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

    def test_the_parts_of_a_small_target(self):
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

    def test_a_checkpoint_is_copied_from_a_gpu(self):
        model = small("llama")
        on_cpu, on_gpu = (checkpoint_bytes(model, OptimConfig(), cuda=cuda) for cuda in (False, True))
        assert (on_cpu, on_gpu) == (20 * model.parameters, 32 * model.parameters)

    def test_the_models_that_make_the_store(self):
        model = small("llama", num_key_value_heads=2)  # 2 * 3 * 2 * 8 keys and values of a token
        answers = answering(model, "m", 2, 5, 40)
        assert (answers.weights, answers.working) == (2 * model.parameters, 5 * 40 * 96 * 2 + 3 * 5 * 101 * 4)
        assert answers.piece == 5 * 40 * 2 * 8 * 2
        reads = reading(model, "m", "is captured", 4, 5, 40)
        assert reads.working == 5 * 40 * (4 * 32 + 3 * 48) * 4 + 2048 * 101 * 4
        assert reading(replace(model, kind="scores"), "m", "judges", 4, 5, 40).working == 5 * 40 * (4 * 32 + 3 * 48) * 4
        assert reads.peak == reads.weights + reads.working
        assert (reads.kept, replace(reads, piece=32 << 20).kept) == (reads.working, 0)


class TestStore:
    def test_captures_have_the_bytes_that_their_counts_say(self, prepared):
        directory, _, _ = prepared
        for name, vocabulary in (("guardian", 1152), ("scholar", 448), ("reckoner", 448)):
            files = [path for part in ("truth", "winners") for path in directory.glob(f"store/{part}/*-{name}-*")]
            shards = [load_file(path) for path in files]
            examples, tokens, ranges = (
                sum(count(shard) for shard in shards)
                for count in (lambda s: len(s["reason"]), lambda s: len(s["ids"]), lambda s: len(s["range_rows"]))
            )
            counts = Counts(examples, tokens, ranges, len(files))
            assert capture_bytes(counts, vocabulary, 10) == pytest.approx(size_of(files), rel=0.03)

    def test_targets_have_the_bytes_that_their_counts_say(self, prepared):
        files = list(prepared[0].glob("store/targets/*"))
        shards = [load_file(path) for path in files]
        sequences, tokens, rows_, entries = (
            sum(len(shard[name]) for shard in shards) for name in ("example", "input_ids", "row_tail", "entry_ids")
        )
        counts = Counts(sequences, tokens, rows_, len(files))
        missing = (10 * rows_ - entries) * 4  # not every row has top_k entries
        assert targets_bytes(counts, 1152, 10, 3) - missing == pytest.approx(size_of(files), rel=0.03)

    def test_the_plan_is_near_a_prepared_store(self, prepared):
        directory, of, _ = prepared
        plan = make_plan(of, processes=(1,), timed=False)
        found = {
            name: size_of(
                [path for part in ("truth", "winners") for path in directory.glob(f"store/{part}/*-{name}-*")]
            )
            for name in ("guardian", "scholar", "reckoner")
        }
        found["targets"] = size_of(list(directory.glob("store/targets/*")))
        assert plan.store["targets"] == pytest.approx(found["targets"], rel=0.05)
        # Who wins the vote cannot be known: the sources get equal shares.
        assert sum(plan.store.values()) == pytest.approx(sum(found.values()), rel=0.05)

    def test_more_entries_and_larger_vocabularies_take_more(self):
        counts = Counts(1000, 50_000, 20_000, 1)
        assert capture_bytes(counts, 1 << 16, 20) - capture_bytes(counts, 1 << 16, 10) == 10 * (50_000 * 4 + 20_000 * 6)
        assert capture_bytes(counts, (1 << 16) + 1, 10) - capture_bytes(counts, 1 << 16, 10) == 50_000 * 2 * 11
        assert capture_bytes(counts, 7, 10) < capture_bytes(counts, 10, 10)

    def test_every_source_adds_its_cross_entropy_its_weight_and_a_bit_of_the_marks(self):
        one, two = (targets_bytes(Counts(1000, 0, 0, 0), 1152, 10, sources) for sources in (1, 2))
        assert one == 1000 * sum(np.dtype(TARGET_COLUMNS[name]).itemsize for name in PER_SEQUENCE)
        assert two - one == 1000 * 2 * 4
        seven, eight = (targets_bytes(Counts(0, 1000, 0, 0), 1152, 10, sources) for sources in (7, 8))
        assert eight - seven == 1000


def test_lengths_are_those_of_a_random_sample_up_to_the_limit():
    target, source = (chat_format(SourceConfig(name=name, model=f"demo:{name}")) for name in ("guardian", "scholar"))
    short, long = ({"prompt": "Hi.", "response": "sea " * n, "skill": "s"} for n in (1, 40))
    one, other = (measured(target, source, [row], 448, 1000) for row in (short, long))
    both = measured(target, source, [short] * 400 + [long] * 400, 448, 1000)
    assert both.longest == other.longest > one.longest
    assert both.mean == pytest.approx((one.mean + other.mean) / 2, rel=0.1)  # the first 256 are all short
    assert (one.ranges > 0, measured(source, source, [long], 448, 1000).ranges) == (True, 0)
    limited = measured(target, source, [short, long], 448, other.longest - 5)
    assert (limited.longest, limited.mean) == (other.longest - 5, (one.mean + other.mean - 5) / 2)
    cut = measured(target, source, [long], 448, other.longest - 5)  # of what does not fit the response loses its end
    assert cut.response == other.response - 5
    assert cut.ranges == round(other.ranges * cut.response / other.response) < other.ranges
    assert measured(target, source, [long], 448, 3).response == 0
    assert measured(target, source, [], 448, 1000) == Lengths(0, 0, 0, 0)


class TestWork:
    """What the sources compute is what they are asked, and not what a user has already or a route asks of others."""

    @staticmethod
    def planned(choice: Choice = "min_ce", responses: str | None = None, logprobs: str | None = None) -> Plan:
        of = parse_run("train", [])
        recipe = replace(
            of.recipe,
            sources=[replace(source, responses=responses, logprobs=logprobs) for source in of.recipe.sources],
            capture=replace(of.recipe.capture, choice=choice),
        )
        of = replace(of, recipe=recipe)
        return make_plan(of, processes=(1,), instructions=900, tokens=90, timed=False)

    @staticmethod
    def flops(plan: Plan) -> dict[str, float]:
        return {work.phase: work.flops for work in plan.work}

    @pytest.mark.parametrize(
        ("judges", "heldout", "answers"),
        [
            (True, True, (True, True)),
            (True, False, (True, False)),
            (False, True, (False, True)),
            (False, False, (False, False)),
        ],
    )
    def test_training_prompts_are_answered_for_judges_and_held_out_ones_for_the_scores(self, judges, heldout, answers):
        recipe = parse_run("train", []).recipe
        data = recipe.data if heldout else replace(recipe.data, heldout=None)
        recipe = replace(recipe, judges=recipe.judges if judges else [], data=data)
        asked = asked_of_each(recipe, None)["scholar"]
        assert (asked.answers, asked.answers_heldout) == answers

    def test_given_responses_are_not_answered(self):
        usual, given = self.planned(), self.planned(responses="answers.jsonl")
        assert self.flops(given) == {phase: flops for phase, flops in self.flops(usual).items() if phase != "answer"}
        assert {model.doing for model in usual.preparing} - {model.doing for model in given.preparing} == {"answers"}

    def test_given_logprobs_are_not_scored_again(self):
        usual, given = self.flops(self.planned()), self.flops(self.planned(logprobs="top.jsonl"))
        assert given["score"] == pytest.approx(
            usual["score"] / 4
        )  # the third of the responses that each source wins is left
        assert given | {"score": usual["score"]} == usual

    def test_a_route_asks_one_source_in_place_of_three(self):
        usual, routed = self.planned(), self.planned("route")
        flops = {phase: self.flops(routed)[phase] / self.flops(usual)[phase] for phase in ("score", "answer")}
        assert flops == pytest.approx({"score": (1 / 3 + 1 / 3) / (1 + 1 / 3), "answer": 1 / 3})
        assert routed.store["targets"] == usual.store["targets"]
        assert routed.store["scholar"] < 0.8 * usual.store["scholar"]
        assert set(routed.assumed) - set(usual.assumed) == {
            "the routes name all sources equally often (capture.choice: route)"
        }


def size_of(files: list[Path]) -> int:
    return sum(path.stat().st_size for path in files)


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


@pytest.mark.parametrize(("optim", "share"), [([], 0.75), (["--optim.tokens_per_micro_batch", "512"], 0)])
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="the page shows the plan of a machine without a GPU")
def test_the_page_shows_what_is_printed_without_network_and_data(monkeypatch):
    page = (ROOT / "docs/plan.md").read_text()
    (block,) = re.findall(
        r"^<!-- printed by python -m profuser\.train (.*?) -->\n```text\n(.*?)^```$", page, re.M | re.S
    )
    monkeypatch.chdir(ROOT)
    assert run("train", *block[0].split()) == (0, block[1], "")
