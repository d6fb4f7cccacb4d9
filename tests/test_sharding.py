"""A target that is divided among processes learns what a whole one learns, and its checkpoints fit any number of processes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from command_runs import children
from conftest import ROOT
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    PreTrainedModel,
    ZambaConfig,
)

from profuser.fusion_model import FusionModel, tied_names
from profuser.recipe.places import resolve
from profuser.store.files import DiskFull, temporary_beside
from profuser.train import checkpoint
from profuser.train.checkpoint import Checkpoint, load_newest, save_checkpoint
from profuser.train.shard_files import save_shares
from profuser.train.sharding import blocks_of, load_into_shards, whole, whole_model


def forked(processes: int, *arguments: str) -> subprocess.CompletedProcess:
    """Runs a program of tests/ in several processes, which forked.py makes."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/forked.py"), str(processes), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)


def launched(processes: int, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*launcher, *arguments], capture_output=True, text=True, env=environment, check=False, timeout=300
    )


BLOCKS = 2


def guardian(place: Path, *, is_tied: bool) -> str:
    """Writes the first blocks of the demo's target, whose head may share the embedding's weights."""
    shutil.copytree(resolve("demo:guardian"), place)
    changes = {"num_hidden_layers": BLOCKS, "tie_word_embeddings": is_tied}
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | changes))
    model = AutoModelForCausalLM.from_pretrained(resolve("demo:guardian"))
    model.model.layers = model.model.layers[:BLOCKS]
    for key, value in changes.items():
        setattr(model.config, key, value)
    if is_tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    model.save_pretrained(place)
    return str(place)


BOTH = ("whole", "adapter")


@pytest.mark.parametrize(
    ("processes", "is_tied", "precision", "kinds"),
    [
        (2, True, "float64", ("whole",)),
        pytest.param(2, True, "float64", ("adapter",), marks=pytest.mark.long),
        pytest.param(2, False, "float64", BOTH, marks=pytest.mark.long),
        pytest.param(2, False, "float32", BOTH, marks=pytest.mark.long),
        pytest.param(3, True, "float64", BOTH, marks=pytest.mark.long),
    ],
)
def test_a_sharded_targets_gradients_and_checkpoints_are_those_of_a_whole_one(
    prepared, tmp_path, processes, is_tied, precision, kinds
):
    """Also with an adapter: then the frozen weights are divided, too, and checkpoints hold the adapter's alone."""
    model = guardian(tmp_path / "guardian", is_tied=is_tied)
    done = forked(processes, "sharded_steps", str(prepared[2].directory), str(tmp_path), model, precision, *kinds)
    assert done.returncode == 0, done.stderr[-3000:]
    of_kinds = json.loads(done.stdout.splitlines()[-1])
    assert of_kinds.keys() == {*kinds}
    if "adapter" in kinds:
        assert of_kinds["adapter"]["trained"] == of_kinds["adapter"]["stored"] == BLOCKS * 7 * 2
    for kind, found in of_kinds.items():
        check_sharded(found, processes, is_tied, exact=precision == "float64" and processes == 2)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / kind / "exported")
        assert isinstance(again.get_output_embeddings().weight, torch.Tensor)


def check_sharded(found: dict[str, Any], processes: int, is_tied: bool, exact: bool) -> None:
    """`exact` says whether nothing may differ but the last digits of fp64.

    Tokens have weights in fp32, which a number of processes that is no power of two rounds in another way.
    """
    assert found["world"] == processes
    assert found["blocks"] == BLOCKS
    assert found["names"]
    assert found["share"] < 1.05 / processes  # of the weights, of which a process holds its share
    assert found["gradient"] <= (1e-12 if exact else 1e-5)
    equal = (
        "restored", "resumed", "restored_beside", "resumed_beside", "into_whole", "into_shards", "moments", "exported",
    )  # fmt: skip
    assert [name for name in equal if not found[name]] == []
    assert found["whole_step"] <= (1e-9 if exact else 1e-4)
    assert found["tied"] == is_tied
    shares = [name for name in found["files"] if name.startswith("shard-")]
    assert len(shares) == processes
    assert sorted({*found["files"]} - {*shares}) == [
        "metrics.jsonl", "random.safetensors", "state.json", "steps.safetensors",
    ]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("adapter", [None, {"rank": 4}], ids=["whole", "adapter"])
def test_two_processes_one_and_four_go_on_with_each_others_checkpoints(prepared, tmp_path, adapter):
    """Each does two steps of six, whose losses are those of a process that does all of them."""
    recipe = prepared[1].recipe.to_dict()
    recipe |= {"adapter": adapter, "optim": recipe["optim"] | {"shard": True, "lr": 1e-3, "batch_size": 8, "steps": 6}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    (tmp_path / "run").mkdir()
    arguments = [
        str(ROOT / "tests/resharded_steps.py"), str(tmp_path / "recipe.json"), str(prepared[2].directory),
    ]  # fmt: skip

    def some_steps(processes: int, run: str, steps: int) -> dict[str, Any]:
        if processes == 1:
            environment = os.environ | {"PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"}
            command = [sys.executable, *arguments, str(tmp_path / run), str(steps)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
        else:
            done = launched(processes, *arguments, str(tmp_path / run), str(steps))
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    found = [some_steps(processes, "run", 2) for processes in (2, 1, 4)]
    assert [(each["processes"], each["start"]) for each in found] == [(2, 0), (1, 2), (4, 4)]
    (tmp_path / "alone").mkdir()
    alone = some_steps(1, "alone", 6)["losses"]
    assert [loss for each in found for loss in each["losses"]] == pytest.approx(alone, rel=1e-6)


# -- other architectures, in one process that counts as several --------------------------------------------------------


class CountingLlama(LlamaForCausalLM):
    """A model with a buffer of integers, which bf16 would round."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("seen", torch.tensor(2**24 + 1))


def small(kind: str) -> PreTrainedModel:
    """An untrained model of two or more layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 63}
    config: Any
    match kind:
        case "llama":
            config = LlamaConfig(**sizes, num_hidden_layers=2)
        case "llama, tied":
            config = LlamaConfig(**sizes, num_hidden_layers=2, tie_word_embeddings=True)
        case "gpt2":
            config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=63)
        case "biogpt":  # it names no blocks
            config = BioGptConfig(**sizes, num_hidden_layers=2)
        case "mamba":  # its blocks lie in each other
            config = MambaConfig(hidden_size=32, state_size=8, num_hidden_layers=2, vocab_size=63)
        case _:  # Zamba: two of its layers share an attention block
            more: dict[str, Any] = {"layer_types": ["mamba", "mamba", "hybrid"] * 2, "mamba_d_state": 8}
            more |= {"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4}
            config = ZambaConfig(**sizes, num_hidden_layers=6, **more)
    if kind == "llama":
        model = CountingLlama(config).eval()
        model.config.tie_word_embeddings = True  # which its head of its own contradicts
        return model
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", ["LlamaDecoderLayer"] * 2),
        ("biogpt", []),
        ("mamba", ["MambaBlock"] * 2),
        ("zamba", ["ZambaMambaDecoderLayer"] * 4),
    ],
)
def test_the_blocks_neither_lie_in_each_other_nor_share_weights(kind, expected):
    assert [type(block).__name__ for block in blocks_of(small(kind))] == expected


@pytest.fixture
def group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["llama", "llama, tied", "gpt2", "biogpt", "mamba", "zamba"])
def test_a_sharded_model_is_the_loaded_one_whatever_its_config_says_of_ties(group, kind):
    loaded, accelerator = small(kind), Accelerator(cpu=True)
    loaded.generation_config.max_new_tokens = 7
    with torch.device("meta"):
        empty = type(loaded)(loaded.config).eval()
    plain, fusion = FusionModel(loaded, beta=0), FusionModel(empty, beta=0)
    load_into_shards(fusion, loaded, accelerator)
    assert all(isinstance(p, DTensor) for p in fusion.parameters())
    ids = torch.arange(3, 12)[None]
    assert torch.equal(*(model(ids, labels=ids)["loss"] for model in (fusion, plain)))
    assert tied_names(fusion.model) == tied_names(loaded)
    exported = whole_model(fusion.model, torch.bfloat16, accelerator)
    assert exported is not None
    assert (fusion.model.generation_config.max_new_tokens, exported.generation_config.max_new_tokens) == (7, 7)
    assert tied_names(exported) == tied_names(loaded)
    expected = nn.Module.to(loaded, torch.bfloat16).state_dict()
    assert exported.state_dict().keys() == expected.keys()
    for name, tensor in exported.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)  # dtypes included


def test_the_other_processes_learn_where_to_write_when_an_empty_directory_is_there(group, tmp_path, monkeypatch):
    """They would make it themselves, and write into what the main process still removes."""
    seen, agreed = [], checkpoint.agreed

    def told(value, *rest):
        if isinstance(value, Path):
            seen.append(list(value.iterdir()))
        return agreed(value, *rest)

    monkeypatch.setattr(checkpoint, "agreed", told)
    loaded = small("llama")
    with torch.device("meta"):
        fusion = FusionModel(type(loaded)(loaded.config).eval(), beta=0)
    load_into_shards(fusion, loaded, Accelerator(cpu=True))
    left = temporary_beside(tmp_path / "step-000002")
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"of a process that was killed")
    save_checkpoint(tmp_path, Checkpoint(2, "t", b""), fusion, torch.optim.AdamW(fusion.parameters()), 1)
    assert seen == [[]]


def test_a_disk_that_is_full_for_one_process_is_a_full_disk_for_all(group, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", full)
    with pytest.raises(DiskFull):
        save_shares(tmp_path, {"weight": torch.ones(3)}, {})


@pytest.mark.parametrize("validated", [False, True])
@pytest.mark.parametrize("kind", ["llama", "llama, tied", "biogpt"])
def test_a_checkpoint_after_a_validation_holds_the_moments_of_every_weight(group, tmp_path, kind, validated):
    loaded = small(kind)
    with torch.device("meta"):
        empty = type(loaded)(loaded.config).eval()
    plain, fusion = FusionModel(loaded, beta=0), FusionModel(empty, beta=0)
    load_into_shards(fusion, loaded, Accelerator(cpu=True))
    ids = torch.arange(3, 12)[None]
    optimizer, again = (torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (fusion, plain))
    for _ in range(2):
        optimizer.zero_grad()
        fusion(ids, labels=ids)["loss"].backward()
        optimizer.step()
    if validated:
        with torch.no_grad():
            fusion(ids, labels=ids)
    path = save_checkpoint(tmp_path, Checkpoint(2, "t", b""), fusion, optimizer, 1)
    files = json.loads((path / "state.json").read_text())["files"]
    assert {*files, "state.json"} == {file.name for file in path.iterdir()}  # so that damage to any is noticed
    load_newest(tmp_path, plain, again)
    for ours, other in zip(fusion.parameters(), plain.parameters(), strict=True):
        assert torch.equal(whole(ours.detach()), other.detach())
        expected = optimizer.state[ours]
        assert again.state[other].keys() == expected.keys()
        assert all(torch.equal(again.state[other][key], whole(expected[key])) for key in expected)
        assert expected["step"] == 2


# -- whole runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def arguments(prepared) -> list[str]:
    directory, run, _ = prepared
    return [
        f"--data.train={run.recipe.data.train}", f"--data.validation={run.recipe.data.validation}",
        f"--data.heldout={run.recipe.data.heldout}", f"--store={directory / 'store'}", "--generation.max_new_tokens=24",
        "--capture.shard_size=5", "--optim.steps=4", "--optim.batch_size=3", "--optim.micro_batch_size=1", "--optim.log_every=1",
        "--optim.checkpoint_every=2",
    ]  # fmt: skip


def one_process(arguments: list[str], output: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "profuser.train", *arguments, f"--output={output}"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)


@pytest.fixture(scope="module")
def alone(arguments, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("alone") / "run"
    done = one_process(arguments, output)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes" not in done.stdout
    return output


@pytest.mark.long
@pytest.mark.parametrize(
    "way",
    [
        pytest.param([], id="ddp"),
        pytest.param(
            ["--optim.shard=true", "--data.max_length=256", "--optim.tokens_per_micro_batch=256"], id="fsdp-packed"
        ),
    ],
)
def test_two_processes_take_the_steps_of_one(arguments, alone, tmp_path, way):
    """Losses, gradient norms and held-out CE are equal, and so are the models that are written."""
    two = launched(2, "-m", "profuser.train", *arguments, *way, f"--output={tmp_path / 'two'}")
    assert two.returncode == 0, two.stderr[-3000:]
    assert "2 processes" in two.stdout
    assert ("each holds 1/2 of the target's weights" in two.stdout) == bool(way)
    lines = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (tmp_path / "two", alone)
    ]
    for ours, expected in zip(*lines, strict=True):
        assert ours.keys() == expected.keys()
        for key in ("loss", "ce_inference", "kd_training", "grad_norm"):
            if key in expected:
                assert ours[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-5), (key, expected["step"])
        if "eval" in expected:
            assert ours["eval"]["ce"] == pytest.approx(expected["eval"]["ce"], rel=1e-3)
    weights, expected = (AutoModelForCausalLM.from_pretrained(run).state_dict() for run in (tmp_path / "two", alone))
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name].float(), tensor.float(), rtol=0.02, atol=2e-3)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "two" / name).read_text()) == json.loads((alone / name).read_text()), name


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_of_two_processes_stops_both_and_one_process_goes_on(arguments, alone, tmp_path, number):
    """The signal goes to the second process alone. Both stop after the same step, whose checkpoint any number can read."""
    output = tmp_path / "two"
    sharded = [*arguments, "--optim.steps=400", "--optim.shard=true"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with subprocess.Popen(
        [*launcher, "-m", "profuser.train", *sharded, f"--output={output}"], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 200
        while not list(output.glob("checkpoints/step-*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        ranks = [p for p in children(process.pid) if b"RANK=1" in Path(f"/proc/{p}/environ").read_bytes().split(b"\0")]
        os.kill(ranks[0], number)
        process.wait(timeout=100)
    stopped = max(int(path.name.removeprefix("step-")) for path in output.glob("checkpoints/step-*"))
    assert 2 <= stopped < 400
    again = one_process([*arguments, "--optim.steps=400", "--optim.shard=true"], output)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"resuming at step {stopped} of 400" in again.stdout
