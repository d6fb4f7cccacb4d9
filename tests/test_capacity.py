"""The trainer's choice of `left_out_capacity`: it follows from what the steps needed, a resumed run repeats it, and all ranks agree.

It is made for a GPU. Here a CPU makes it as well, with chunks of few rows, because the demo's vocabulary is small.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from conftest import ROOT
from loss_checks import make_case
from test_train import trainer, weights

from profuser.errors import NonFiniteError
from profuser.kernels import common
from profuser.kernels.left_out_capped import least_capacity
from profuser.loss import fused_linear_fusion_loss
from profuser.models.head import head_layer
from profuser.pipeline import check_launch
from profuser.recipe.adapter import AdapterConfig
from profuser.recipe.schedule import Stage
from profuser.report.metrics import read_metrics, stage_table
from profuser.store.sealed import sealed
from profuser.train import capacity, loop
from profuser.train.capacity import EXACT_STEPS, PATIENCE, Capacity, LeftOut, is_chosen_on
from profuser.train.metrics_log import summary
from profuser.train.steps import StepBatch

SHARE = 0.1
"""The demo's gradients are flat: of less than this, most of its small vocabulary would be needed."""


def few_rows_on_any_device(patch: pytest.MonkeyPatch) -> None:
    """Lets a CPU choose the capacity as a GPU does, and keep a part of a small vocabulary."""
    patch.setattr(loop, "is_chosen_on", lambda device: True)
    patch.setattr(common, "CHUNK_ELEMENTS", 1)
    patch.setattr(common, "MIN_CHUNK_ROWS", 8)
    patch.setattr(capacity, "PAYS", 0.9)


@pytest.fixture
def chosen(monkeypatch):
    few_rows_on_any_device(monkeypatch)


# The choice


def begun(vocabulary: int = 32768) -> Capacity:
    """After the first step, which needed 8000 columns. The sizes are multiples of 1024."""
    found = Capacity(vocabulary, 64)
    assert found.of_pass(1) == vocabulary
    found.update(8000)
    return found


def test_the_first_step_keeps_all_columns_and_the_next_what_it_needed_with_a_margin():
    assert begun().of_pass(1) == 9216  # 9000, rounded up


def test_it_goes_up_at_once_and_down_after_several_steps_to_the_largest_that_these_needed():
    found = begun()
    found.update(9300)
    assert found.columns == 11264
    for needed in [5000] * (PATIENCE - 1) + [9300] + [4000, 7000] + [3000] * (PATIENCE - 3):
        found.update(needed)
        assert found.columns == 11264
    found.update(3000)
    assert found.columns == 8192
    assert (found.fewer, found.enough) == (0, 0)


def test_what_differs_by_less_than_the_margin_changes_no_shape():
    found = begun()
    for needed in (7900, 8100, 7300, 8190) * PATIENCE:
        found.update(needed)
        assert found.of_pass(1) == 9216


def test_where_most_columns_are_needed_the_steps_are_exact_and_now_and_then_one_counts_them():
    found = begun()
    found.update(25000)
    for _ in range(EXACT_STEPS):
        assert found.of_pass(1) is None
        found.update(0)
    assert found.of_pass(1) == 32768
    found.update(25000)
    assert found.of_pass(1) is None
    for _ in range(EXACT_STEPS):
        found.update(0)
    found.update(8000)
    assert found.of_pass(1) == 9216


def test_a_pass_whose_labels_and_kept_ids_may_be_more_keeps_more_or_is_exact():
    found = begun()
    assert found.of_pass(10000) == 10240
    assert found.of_pass(30000) is None
    found.update(0)
    assert found.of_pass(1) == 9216


def test_a_vocabulary_smaller_than_a_multiple_is_kept_or_not_as_a_whole():
    found = Capacity(100, 8)
    assert found.of_pass(1) == 100
    found.update(10)
    assert found.of_pass(1) is None


def test_its_state_is_all_that_decides_and_a_checkpoint_without_one_begins_anew():
    found, other = begun(), Capacity(32768, 64)
    for needed in (9300, 5000, 4000):
        found.update(needed)
    other.restore(json.loads(json.dumps(found.state)))
    assert other == found
    for needed in [5000] * PATIENCE + [30000, 0, 0]:
        found.update(needed)
        other.update(needed)
        assert other == found
    found.restore(None)
    assert found == Capacity(32768, 64)


def test_it_is_chosen_on_a_gpu_which_the_recipe_may_now_ask_for(prepared):
    assert is_chosen_on(torch.device("cuda"))
    assert not is_chosen_on(torch.device("cpu"))
    recipe = prepared[1].recipe
    gpu: Any = SimpleNamespace(device=torch.device("cuda"), num_processes=1, distributed_type=DistributedType.NO)
    check_launch(replace(recipe, optim=replace(recipe.optim, left_out=0.01)), gpu)


class ItIsTakenError(Exception):
    """The loss has begun with a capacity."""


@pytest.mark.parametrize(("rows", "vocabulary", "entries"), [(6, 300, 4), (300, 4096, 4), (5000, 3000, 0), (40, 50, 4)])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_least_capacity_is_the_least_that_the_loss_takes(monkeypatch, impl, rows, vocabulary, entries):
    """Its own check is met by that number and not by one less. Nothing is computed."""

    def taken(*_):
        raise ItIsTakenError

    for path in ("torch", "triton"):
        monkeypatch.setattr(f"profuser.kernels.fused_loss_{path}.CappedProducts", taken)
    case = make_case(V=vocabulary, N=rows, K=max(entries, 1), D=8)
    if not entries:
        case = {name: case[name] for name in ("hidden", "weight", "labels")}
    case["hidden"].requires_grad_()
    case["labels"].clamp_(min=0)
    least = least_capacity(impl, rows, vocabulary, 8, entries=entries)
    with pytest.raises(ItIsTakenError):
        fused_linear_fusion_loss(**case, left_out=0.1, left_out_capacity=least, impl=impl)
    with pytest.raises(ValueError, match="left_out_capacity must be at least"):
        fused_linear_fusion_loss(**case, left_out=0.1, left_out_capacity=least - 1, impl=impl)


# In the trainer


def logged(t) -> list[dict[str, Any]]:
    timing = {"tokens_per_second", "data_wait", "sha256"}
    lines = [json.loads(line) for line in t.metrics.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in timing} for line in lines]


def test_the_steps_adapt_and_a_resumed_run_equals_the_uninterrupted_one(chosen, prepared, tmp_path):
    _, run, store = prepared
    whole = trainer(run, store, tmp_path / "whole", left_out=SHARE)
    whole.train()
    steps = [line for line in logged(whole) if "eval" not in line]
    kept = [line["kept_share"] for line in steps]
    assert kept[0] == 1
    assert len(set(kept)) > 2  # it went down and up
    assert steps[0]["left_out_share"] == 0 < steps[1]["left_out_share"] <= SHARE

    part = trainer(run, store, tmp_path / "part", left_out=SHARE)
    own_step = part._step

    def interrupt(step: int, stage: Stage, batch: StepBatch) -> dict[str, float]:
        if step == 2:
            raise KeyboardInterrupt
        result = own_step(step, stage, batch)
        if step == 1:
            part._checkpoint(2)
        return result

    part._step = interrupt
    with pytest.raises(KeyboardInterrupt):
        part.train()
    state = json.loads((tmp_path / "part/checkpoints/step-000002/state.json").read_text())
    assert part.capacity is not None
    assert state["capacity"] == part.capacity.state
    assert state["capacity"]["columns"] < 1152
    resumed = trainer(run, store, tmp_path / "part", left_out=SHARE)
    resumed.train()
    assert resumed.capacity == whole.capacity
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(resumed).values()))
    assert logged(resumed)[-3:] == logged(whole)[-3:]


@pytest.mark.parametrize(
    "optim", [{"combine": "softmax"}, {"micro_batch_size": 1}, {"tokens_per_micro_batch": 256}], ids=str
)
def test_a_step_has_the_exact_losses_and_nearly_the_exact_gradient_in_any_passes(chosen, prepared, tmp_path, optim):
    """The next step's capacity follows from the pass, of several, and the rank that needed most."""
    _, run, store = prepared
    after = []
    for share in (0.0, SHARE):
        t = trainer(run, store, tmp_path / str(share), left_out=share, grad_clip=1e9, **optim)
        t.updates.optimizer = torch.optim.SGD(t.fusion.parameters(), lr=1.0)
        passes: list[float] = []
        if t.capacity is not None:
            t.capacity.restore({"columns": 768, "fewer": 0, "enough": 0, "exact_steps": 0})
            t.fusion.register_forward_hook(
                lambda module, args, out, passes=passes: passes.append(float(out["columns_needed"]))
            )
        before, batch = weights(t), t.steps.batch(3)
        assert {micro.entries for micro in batch.micro_batches} == {30 if "combine" in optim else 10}
        metrics = t._step(3, t.stages[1], batch)
        after.append((torch.cat([(value - before[name]).flatten() for name, value in weights(t).items()]), metrics))
    (exact, of_exact), (near, of_near) = after
    assert of_near["loss"] == pytest.approx(of_exact["loss"], rel=1e-6)
    assert of_near["kept_share"] == pytest.approx(768 / 1152)
    assert 0 < (near - exact).norm() < 0.05 * exact.norm()
    assert len(passes) == {"combine": 1, "micro_batch_size": 4, "tokens_per_micro_batch": 2}[next(iter(optim))]
    expected = Capacity(1152, 128)
    expected.restore({"columns": 768, "fewer": 0, "enough": 0, "exact_steps": 0})
    expected.update(int(max(passes)))
    assert t.capacity == expected


@pytest.mark.long
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
def test_by_the_kernels_of_a_gpu_the_step_is_that_of_plain_torch(chosen, prepared, tmp_path, monkeypatch):
    _, run, store = prepared
    found = []
    for impl in ("torch", "triton"):
        with monkeypatch.context() as patch:
            for name in ("profuser.loss.choose_impl", "profuser.train.capacity.choose_impl"):
                patch.setattr(name, lambda *_, impl=impl: impl)
            t = trainer(run, store, tmp_path / impl, left_out=SHARE, micro_batch_size=1)
            assert t.capacity is not None
            t.capacity.restore({"columns": 768, "fewer": 0, "enough": 0, "exact_steps": 0})
            found.append(t._step(3, t.stages[1], t.steps.batch(3)))
    shares = [metrics.pop("left_out_share") for metrics in found]  # of chunks of other sizes
    assert 0 < min(shares) <= max(shares) <= SHARE
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_the_largest_number_of_all_ranks_decides(chosen, prepared, tmp_path):
    _, run, store = prepared
    t = trainer(run, store, tmp_path / "t", left_out=SHARE)
    t.accelerator.gather = lambda tensor: torch.cat([tensor, tensor.new_tensor([[0.0, 0.5, 700.0]])])
    t._step(0, t.stages[0], t.steps.batch(0))
    assert t.capacity is not None
    assert t.capacity.columns == 896  # 788, rounded up


def test_a_step_that_fails_and_a_validation_change_nothing(chosen, prepared, tmp_path):
    _, run, store = prepared
    t = trainer(run, store, tmp_path / "t", left_out=SHARE)
    assert t.capacity is not None
    before = t.capacity.state
    t._evaluate(0, 0)
    assert t.capacity.state == before
    with torch.no_grad():
        head_layer(t.fusion.model).weight[5] = torch.nan
    with pytest.raises(NonFiniteError):
        t._step(0, t.stages[0], t.steps.batch(0))
    assert t.capacity.state == before


def test_with_an_adapter_the_head_is_frozen_and_columns_are_left_out_of_hidden_states_gradient(
    chosen, prepared, tmp_path
):
    _, run, store = prepared
    run = replace(run, recipe=replace(run.recipe, adapter=AdapterConfig(rank=4, alpha=8.0)))
    t = trainer(run, store, tmp_path / "t", left_out=SHARE)
    assert not head_layer(t.fusion.model).weight.requires_grad
    for step in (2, 3):
        metrics = t._step(step, t.stages[1], t.steps.batch(step))
    assert metrics["left_out_share"] > 0
    assert metrics["kept_share"] < 1


def test_a_sharded_targets_head_is_as_large_as_a_whole_one(chosen, prepared, tmp_path):
    _, run, store = prepared
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        t = trainer(run, store, tmp_path / "t", left_out=SHARE, shard=True)
        assert t.sharded
        assert t.capacity == Capacity(1152, 128)
        shares = [t._step(step, t.stages[1], t.steps.batch(step))["kept_share"] for step in (2, 3)]
        assert shares[1] < shares[0] == 1
    finally:
        torch.distributed.destroy_process_group()


def test_the_report_shows_what_was_left_out():
    lines = [{"step": n, "stage": 0, "left_out_share": 0.001 * n, "kept_share": 1 - n / 10} for n in (1, 2)]
    metrics = read_metrics("\n".join(json.dumps(sealed(line)) for line in lines).encode())
    rows = {row.label: row.values for row in stage_table(metrics, {"schedule": "sft"})}
    assert rows["left out, the largest"] == [(0.001, 0.002)]
    assert rows["columns kept, the most"] == [(0.9, 0.8)]


def test_a_line_has_the_largest_share_of_its_steps():
    """A mean would hide a step that left out more than was asked for."""
    window = [
        {"loss": loss, "left_out_share": share, "kept_share": kept}
        for loss, share, kept in ((1.0, 0.002, 0.5), (2.0, 0.009, 0.25))
    ]
    assert summary(window) == {"loss": 1.5, "left_out_share": 0.009, "kept_share": 0.5}


def test_a_pass_without_a_label_says_nothing():
    found = LeftOut(torch.device("cpu"))
    empty: Any = SimpleNamespace(label_rows=0)
    full: Any = SimpleNamespace(label_rows=3)
    one = {name: torch.tensor(1.0) for name in ("left_out_share", "kept_share", "columns_needed")}
    found.add(empty, one)
    assert found.largest().tolist() == [0, 0, 0]
    found.add(full, {})  # an exact one
    assert found.largest().tolist() == [0, 1, 0]
    found.add(full, {name: value / 2 for name, value in one.items()})
    assert found.largest().tolist() == [0.5, 1, 0.5]


@pytest.mark.long
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_choose_alike_and_go_on_alike(prepared, tmp_path, way):
    """Of the processes each trains two steps, goes on from their checkpoint, and says what it chose, and what its weights are."""
    _, run, store = prepared
    config = tmp_path / "recipe.json"
    config.write_text(json.dumps(run.recipe.to_dict()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "tests/capacity_run.py"), str(config), str(store.directory), str(tmp_path), way],
        capture_output=True, text=True, check=False, timeout=300,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["whole"] == first["resumed"]
    assert first["whole"]["capacity"]["columns"] < 1152
