"""optim.compile: one graph for batches of all sizes, with the results and the files of a run that is not compiled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from profuser.errors import ConfigError
from profuser.pipeline import train
from profuser.recipe.adapter import AdapterConfig
from profuser.train import compiled
from profuser.train.compiled import check_compile
from profuser.train.loop import Trainer


def with_optim(run, directory, adapter=None, **optim):
    changed = replace(run.recipe.optim, **optim)
    return replace(run, recipe=replace(run.recipe, output=str(directory), adapter=adapter, optim=changed))


@pytest.fixture
def traced(monkeypatch):
    """Graphs are made as for any backend, and computed by torch's own operations."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.long
def test_a_compiled_run_writes_what_an_uncompiled_one_does_from_a_few_graphs(traced, prepared, tmp_path):
    options = {"tokens_per_micro_batch": prepared[1].recipe.data.max_length, "steps": 2, "batch_size": 5}
    plain, graphs = (with_optim(prepared[1], tmp_path / str(on), compile=on, **options) for on in (False, True))
    assert train(plain) == train(graphs)
    assert (plain.output_dir / "model.safetensors").read_bytes() == (
        graphs.output_dir / "model.safetensors"
    ).read_bytes()
    last = [sorted((run.output_dir / "checkpoints").iterdir())[-1] / "model.safetensors" for run in (plain, graphs)]
    ours, theirs = map(load_file, last)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not any("_orig_mod" in name for name in theirs)
    # The small function of check_compile, training and validation; passes with one row are a case of their own.
    assert 3 <= counters["stats"]["unique_graphs"] <= 5, counters
    assert not counters["graph_break"]


@pytest.mark.long
def test_passes_of_other_sizes_use_the_same_graph_also_with_an_adapter_and_gradient_checkpointing(
    traced, prepared, tmp_path
):
    run = with_optim(
        prepared[1], tmp_path, AdapterConfig(rank=2), compile=True, micro_batch_size=2, gradient_checkpointing=True
    )
    t = Trainer(run.recipe, prepared[2], tmp_path, Accelerator(cpu=True))
    shapes = set()
    for number in range(3):
        batch = t.steps.batch(number)
        shapes |= {micro.arrays["input_ids"].shape for micro in batch.micro_batches}
        assert t._step(number, t.stages[0], batch)["loss"] > 0
    assert len(shapes) > 3
    assert counters["stats"]["unique_graphs"] <= 2, (shapes, counters)
    assert not counters["graph_break"]


@pytest.mark.long
def test_inductors_code_has_the_gradients_of_torchs_own_operations(prepared, tmp_path):
    found = []
    for on in (False, True):
        (tmp_path / str(on)).mkdir()
        run = with_optim(prepared[1], tmp_path / str(on), compile=on, tokens_per_micro_batch=4096)
        t = Trainer(run.recipe, prepared[2], tmp_path / str(on), Accelerator(cpu=True))
        (micro, *_) = t.steps.batch(0).micro_batches
        out = t.fusion(**micro.tensors(torch.device("cpu")), reduction="sum")["loss"]
        out.backward()
        gradients = [p.grad.flatten().double() for p in t.fusion.parameters() if p.grad is not None]
        found.append((out.item(), torch.cat(gradients)))
    (loss, gradients), (compiled_loss, compiled_gradients) = found
    assert compiled_loss == pytest.approx(loss, rel=1e-5)
    assert (compiled_gradients - gradients).norm() < 1e-4 * gradients.norm()


def test_what_cannot_be_compiled_is_refused_before_anything_is_prepared(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("profuser.pipeline.Preparation.begin", lambda *_: pytest.fail("the preparation began"))
    monkeypatch.setattr(compiled, "BACKEND", "no_such_backend")
    with pytest.raises(ConfigError, match=r"optim\.compile needs a torch\.compile that works, here it fails") as found:
        train(with_optim(prepared[1], tmp_path / "run", compile=True))
    assert "\n" not in str(found.value)
    with pytest.raises(ConfigError, match="a compiled target must not be sharded"):
        check_compile(torch.device("cpu"), sharded=True)
    with pytest.raises(ConfigError, match=r"optim\.compile must be false with optim\.shard"):
        replace(prepared[1].recipe, optim=replace(prepared[1].recipe.optim, shard=True, compile=True))
