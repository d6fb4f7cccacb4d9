"""The Triton path as a differentiable op: its gradients, its compilation, its memory, and when it is taken."""

import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from loss_checks import DIFFERENTIABLE, Case, make_case, on, run
from new_tensors import NewTensors
from test_fused_loss_autograd import opcheck
from torch.utils.checkpoint import checkpoint

from profuser.kernels import fused_loss as op_module
from profuser.kernels.common import IGNORE_INDEX
from profuser.kernels.reference import fusion_loss_reference
from profuser.loss import fused_linear_fusion_loss

pytestmark = [
    pytest.mark.usefixtures("small_blocks"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
ROWS = 7  # the sixth has no entry of any source
small_case = partial(make_case, N=ROWS)


# Autograd


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_grad_output_scales_the_gradient(triton_loss, reduction):
    case = small_case()
    once, scaled = triton_loss(case, reduction=reduction), triton_loss(case, reduction=reduction, grad_output=-3.7)
    for name in DIFFERENTIABLE:
        torch.testing.assert_close(scaled[f"d{name}"], -3.7 * once[f"d{name}"])


def test_none_weighs_each_row_by_its_grad_output(triton_loss):
    case = small_case()
    grad_output = torch.randn(ROWS, generator=torch.Generator().manual_seed(0))
    grad_output[case["labels"] == IGNORE_INDEX] = math.nan
    truth = run(fusion_loss_reference, case, reduction="none", grad_output=grad_output.nan_to_num())
    ours = triton_loss(case, reduction="none", grad_output=grad_output)
    for name in DIFFERENTIABLE:
        torch.testing.assert_close(ours[f"d{name}"], truth[f"d{name}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_two_backwards_add_the_gradient_twice(triton_loss, device, reduction):
    case = small_case()
    expected = triton_loss(case, reduction=reduction)
    case = on(device, case)
    total = fused_linear_fusion_loss(**case, reduction=reduction, impl="triton").sum()
    total.backward(retain_graph=True)
    total.backward()
    for name in DIFFERENTIABLE:
        torch.testing.assert_close(case[name].grad.cpu(), 2 * expected[f"d{name}"])


@pytest.mark.parametrize(
    ("frozen", "reduction"),
    [
        (("weight", "bias"), "none"),
        (("hidden",), "mean"),
        (DIFFERENTIABLE, "none"),
        *(
            pytest.param(*other, marks=pytest.mark.long)
            for other in ((("weight", "bias"), "mean"), (("hidden",), "none"), (DIFFERENTIABLE, "mean"))
        ),
    ],
)
def test_frozen_parts_get_no_gradient(triton_loss, device, frozen, reduction, poisoned_buffers):
    case = small_case()
    expected = triton_loss(case, reduction=reduction)
    case = on(device, case, frozen)
    result = fused_linear_fusion_loss(**case, reduction=reduction, impl="triton")
    torch.testing.assert_close(result.detach().cpu(), expected["loss"])
    if result.requires_grad:
        result.sum().backward()
    for name in DIFFERENTIABLE:
        if name in frozen:
            assert case[name].grad is None
        else:
            torch.testing.assert_close(case[name].grad.cpu(), expected[f"d{name}"])


def test_a_tied_head_gets_both_gradients(device):
    case = small_case()
    table = case.pop("weight")
    tokens = torch.randint(83, (ROWS,), generator=torch.Generator().manual_seed(0))
    grads = []
    for place, function in ((device, partial(fused_linear_fusion_loss, impl="triton")), ("cpu", fusion_loss_reference)):
        tied = table.to(place, copy=True).requires_grad_()
        moved: Case = {k: v.to(place) if isinstance(v, torch.Tensor) else v for k, v in case.items()}
        moved |= {"hidden": F.embedding(tokens.to(place), tied).tanh(), "weight": tied}
        function(**moved).backward()
        grads.append(tied.grad.cpu())
    torch.testing.assert_close(*grads)


def test_gradient_checkpointing_recomputes_the_same(triton_loss, device):
    case = small_case()
    expected = triton_loss(case)
    case = on(device, case)
    hidden, weight = case.pop("hidden"), case.pop("weight")

    def head(hidden, weight):
        return fused_linear_fusion_loss(hidden, weight, **case, impl="triton")

    checkpoint(head, hidden, weight, use_reentrant=False).backward()
    torch.testing.assert_close(hidden.grad.cpu(), expected["dhidden"])
    torch.testing.assert_close(weight.grad.cpu(), expected["dweight"])


def test_distributed_data_parallel_gives_the_same_gradients(triton_loss, device):
    case = small_case()
    expected = triton_loss(case)

    class HeadWithLoss(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = torch.nn.Parameter(weight)

        def forward(self, **case):
            return fused_linear_fusion_loss(weight=self.weight, **case, impl="triton")

    def gradients(weight, **case):
        model = torch.nn.parallel.DistributedDataParallel(HeadWithLoss(weight.detach()))
        model(**case).backward()
        return model.module.weight.grad.cpu(), case["hidden"].grad.cpu()

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        dweight, dhidden = gradients(**on(device, case))
        torch.testing.assert_close(dweight, expected["dweight"])
        torch.testing.assert_close(dhidden, expected["dhidden"])
    finally:
        # The model must be gone by now. As the last user of the group it would wait for a thread while it holds the GIL, and
        # that thread wants the GIL.
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("sources", "per_row"),
    [
        (True, True),
        (False, False),
        *(pytest.param(*other, marks=pytest.mark.long) for other in ((True, False), (False, True))),
    ],
)
def test_the_op_passes_opcheck(device, per_row, sources):
    case = make_case(N=5, B=2)
    if not sources:
        case = {k: v for k, v in case.items() if k not in ("source_ids", "source_logprobs", "source_ce", "cu_seqlens")}
    needs = {f"grad_{name}": not per_row for name in DIFFERENTIABLE}
    opcheck(on(device, case), per_row=per_row, temperature=2.0, impl="triton", **needs)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_in_one_graph(triton_loss, device, reduction):
    case = small_case()
    expected = triton_loss(case, reduction=reduction)
    compiled = torch.compile(fused_linear_fusion_loss, fullgraph=True, backend="aot_eager")
    found = run(compiled, case, device=device, reduction=reduction, impl="triton")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_casts_hidden_and_leaves_the_logits_and_the_weight_gradient_in_fp32(triton_loss, device, dtype):
    case = small_case()
    rounded = triton_loss(case | {"hidden": case["hidden"].bfloat16()})
    with torch.autocast(device, dtype=torch.bfloat16):
        found = triton_loss(case | {"hidden": case["hidden"].to(dtype)})
    assert found["dhidden"].dtype == dtype
    assert found["dweight"].dtype == torch.float32
    for name in rounded:
        assert torch.equal(found[name], rounded[name].to(found[name].dtype)), name


# Memory and interface


def test_no_tensor_is_larger_than_a_chunk_of_logits_or_a_gradient(device):
    N, D, V, chunk = 24, 6, 300, 4
    case = on(device, make_case(N=N, D=D, V=V, K=4, temperature=2.0, softcap=3.0))
    with NewTensors(look_inside=True) as new:
        fused_linear_fusion_loss(**case, chunk_size=chunk, impl="triton").backward()
    padded = V + 4
    assert chunk * padded in new.sizes
    assert max(new.sizes) <= max(chunk * padded, N * D, V * D) < N * V


def test_the_driver_reads_nothing_back(device, monkeypatch):
    """There is no .item() and no data-dependent shape, for which the host would wait for the device.

    On a CPU, where nothing waits, backward reads for each gradient whether it is to be multiplied by 1.
    """
    case = on(device, small_case())
    monkeypatch.setattr(op_module, "check_values", lambda *args: None)
    forbidden = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
    with torch.profiler.profile() as profile:
        fused_linear_fusion_loss(**case, impl="triton", chunk_size=4).backward()
    found = {event.key: event.count for event in profile.key_averages() if event.key in forbidden}
    learning = sum(x.requires_grad for x in case.values() if isinstance(x, torch.Tensor))
    assert found == ({"aten::_local_scalar_dense": learning} if device == "cpu" else {})


def test_triton_without_a_gpu_or_the_interpreter_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        ValueError, match=r"needs a CUDA device, the tensors are on cpu; use impl=None.*TRITON_INTERPRET=1"
    ):
        fused_linear_fusion_loss(**small_case(), impl="triton")


def test_the_cpu_path_works_without_triton():
    """Triton cannot be installed on macOS."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from profuser.loss import fused_linear_fusion_loss
hidden, weight = torch.ones(2, 3), torch.ones(5, 3)
print(fused_linear_fusion_loss(hidden, weight, torch.tensor([1, 2])).item())
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(math.log(5))
