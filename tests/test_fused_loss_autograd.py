"""The fused loss as a differentiable op: its gradients, its compilation, its memory and its interface."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_checks import DIFFERENTIABLE, assert_close_to_truth, make_case, run
from new_tensors import NewTensors
from torch.autograd.forward_ad import dual_level, make_dual

from profuser.kernels.common import IGNORE_INDEX
from profuser.kernels.fused_loss import fused_loss_forward, fused_loss_op
from profuser.kernels.fused_loss_types import Operands, Options
from profuser.kernels.reference import fusion_loss_reference
from profuser.loss import FusedLinearFusionLoss, fused_linear_fusion_loss


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# Autograd


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_grad_output_scales_the_gradient(reduction):
    case = make_case(torch.float64)
    once = run(fused_linear_fusion_loss, case, reduction=reduction)
    scaled = run(fused_linear_fusion_loss, case, reduction=reduction, grad_output=-3.7)
    for name in DIFFERENTIABLE:
        torch.testing.assert_close(scaled[f"d{name}"], -3.7 * once[f"d{name}"])


def test_the_scale_of_a_bf16_gradient_is_not_rounded_to_bf16():
    case = make_case(torch.bfloat16, num_items_in_batch=307)  # bf16 rounds 1/307 by 0.22 %
    ours = run(fused_linear_fusion_loss, case)["dhidden"].double()
    true = run(fusion_loss_reference, case, upcast=torch.float64)["dhidden"]
    assert ((ours * true).sum() / (true * true).sum()).item() == pytest.approx(1, abs=5e-4)


def test_an_fp16_gradient_survives_small_weights():
    """grad_output, with the loss scale in it, comes after the forward pass and cannot bring back what fp16 lost there."""
    case = make_case(torch.float16, reduction="sum")
    case |= {name: case[name] * 1e-7 for name in ("ce_weight", "kd_weight")}
    found = run(fused_linear_fusion_loss, case, grad_output=65536.0)["dhidden"].double()
    truth = run(fusion_loss_reference, case, upcast=torch.float64, grad_output=65536.0)["dhidden"]
    assert (found - truth).norm() < 2e-3 * truth.norm()


def test_numbers_of_numpy_are_numbers():
    options: dict[str, Any] = {"num_items_in_batch": 18, "chunk_size": 5, "temperature": 0.5, "max_chunk_bytes": 10_000}
    case = make_case()
    expected = run(fused_linear_fusion_loss, case, **options)
    of_numpy: dict[str, Any] = {name: np.array(value)[()] for name, value in options.items()}
    found = run(fused_linear_fusion_loss, case, **of_numpy)
    assert torch.equal(found["loss"], expected["loss"])


def test_transposed_operands_give_the_same():
    case = make_case(torch.float64)
    for name in ("hidden", "weight"):
        case[name] = case[name].T.contiguous().T
    for name in ("source_ids", "source_logprobs"):
        case[name] = case[name].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert_close_to_truth(case, chunk_size=8)
    for name in DIFFERENTIABLE:
        case[name].requires_grad_()
    opcheck(case)


def test_none_weighs_each_row_by_its_grad_output():
    case = make_case(torch.float64)
    assert_close_to_truth(case, reduction="none")
    grad_output = torch.randn(37, dtype=torch.float64)
    ours = run(fused_linear_fusion_loss, case, reduction="none", grad_output=grad_output)
    truth = run(fusion_loss_reference, case, reduction="none", grad_output=grad_output)
    for name in DIFFERENTIABLE:
        torch.testing.assert_close(ours[f"d{name}"], truth[f"d{name}"])


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_two_backwards_add_the_gradient_twice(reduction):
    case = make_case(torch.float64)
    expected = run(fused_linear_fusion_loss, case, reduction=reduction)
    for name in DIFFERENTIABLE:
        case[name].requires_grad_()
    loss = fused_linear_fusion_loss(**case, reduction=reduction).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    for name in DIFFERENTIABLE:
        torch.testing.assert_close(case[name].grad, 2 * expected[f"d{name}"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("grad_output", [1.0, -3.7])
def test_gradients_of_a_kept_graph_are_nobodys_but_the_callers(grad_output, dtype):
    """The last backward may hand out the op's own tensors; one before it may not, because the next one needs them."""
    case = make_case(dtype)
    expected = run(fused_linear_fusion_loss, case, grad_output=grad_output)
    operands = [case[name].requires_grad_() for name in DIFFERENTIABLE]
    loss = fused_linear_fusion_loss(**case)
    for last in (False, False, True):
        gradients = torch.autograd.grad(loss, operands, torch.tensor(grad_output).to(loss), retain_graph=not last)
        for name, gradient in zip(DIFFERENTIABLE, gradients, strict=True):
            torch.testing.assert_close(gradient, expected[f"d{name}"])
            gradient.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, operands)


def test_gradients_that_were_put_aside_are_scaled_once():
    """Packed tensors may be the very ones that come back, as those of save_on_cpu are on a CPU."""
    case = make_case(torch.float64)
    expected = run(fused_linear_fusion_loss, case, grad_output=2.5)
    operands = [case[name].requires_grad_() for name in DIFFERENTIABLE]
    with torch.autograd.graph.save_on_cpu():
        loss = fused_linear_fusion_loss(**case)
    for last in (False, True):
        gradients = torch.autograd.grad(2.5 * loss, operands, retain_graph=not last)
        for name, gradient in zip(DIFFERENTIABLE, gradients, strict=True):
            torch.testing.assert_close(gradient, expected[f"d{name}"])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [("weight", "bias"), ("hidden",), ("hidden", "weight"), DIFFERENTIABLE])
def test_frozen_parts_get_no_gradient(frozen, reduction):
    case = make_case()
    expected = run(fused_linear_fusion_loss, case, reduction=reduction)
    learning = [name for name in DIFFERENTIABLE if name not in frozen]
    for name in learning:
        case[name].requires_grad_()
    loss = fused_linear_fusion_loss(**case, reduction=reduction)
    torch.testing.assert_close(loss.detach(), expected["loss"])
    assert loss.requires_grad == bool(learning)
    if learning:
        loss.sum().backward()
    for name in DIFFERENTIABLE:
        if name in frozen:
            assert case[name].grad is None
        else:
            torch.testing.assert_close(case[name].grad, expected[f"d{name}"])


def test_no_gradient_is_computed_without_autograd():
    case = make_case()
    expected = run(fused_linear_fusion_loss, case)["loss"]
    for name in DIFFERENTIABLE:
        case[name].requires_grad_()
    with torch.no_grad(), NewTensors(look_inside=True) as new:
        loss = fused_linear_fusion_loss(**case, chunk_size=4)
    torch.testing.assert_close(loss, expected)
    assert max(new.sizes) < 83 * 20  # no tensor is as large as a [V, D] gradient


def test_a_tied_head_gets_both_gradients():
    case = make_case(torch.float64)
    table = case.pop("weight")
    tokens = torch.randint(83, (37,))
    grads = []
    for function in (fused_linear_fusion_loss, fusion_loss_reference):
        tied = table.clone().requires_grad_()
        function(**(case | {"hidden": F.embedding(tokens, tied).tanh(), "weight": tied})).backward()
        grads.append(tied.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options", [{}, {"tail": "renormalize", "temperature": 2.0}, {"softcap": 2.0, "logit_scale": 0.5}], ids=str
)
def test_the_gradients_pass_gradcheck(reduction, options):
    case = make_case(torch.float64, N=7, D=3, V=9, S=2, K=4, B=2)
    leaves = [case.pop(name).requires_grad_() for name in DIFFERENTIABLE]

    def loss(hidden, weight, bias):
        return fused_linear_fusion_loss(
            hidden=hidden, weight=weight, bias=bias, **case, **options, reduction=reduction, chunk_size=3
        )

    assert torch.autograd.gradcheck(loss, leaves)


def op_arguments(case, **options):
    """The op's arguments for a case of the public function, with all gradients and a few rows per chunk."""
    operands = Operands(**{name: value for name, value in case.items() if name in Operands._fields})
    return operands, Options(grad_hidden=True, grad_weight=True, grad_bias=True, chunk_size=8)._replace(**options)


def opcheck(case, **options):
    operands, options = op_arguments(case, **options)
    torch.library.opcheck(fused_loss_op, (*operands, *options))


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("sources", [True, False])
def test_the_op_passes_opcheck(per_row, sources):
    case = make_case()
    if not sources:
        case = {k: v for k, v in case.items() if k not in ("source_ids", "source_logprobs", "source_ce", "cu_seqlens")}
    for name in DIFFERENTIABLE:
        case[name].requires_grad_()
    needs = {f"grad_{name}": not per_row for name in DIFFERENTIABLE}
    opcheck(case, per_row=per_row, temperature=2.0, **needs)


def compiled_results(backend):
    for reduction in ("mean", "none"):
        case = make_case()
        expected = run(fused_linear_fusion_loss, case, reduction=reduction)
        compiled = torch.compile(fused_linear_fusion_loss, fullgraph=True, backend=backend)
        yield run(compiled, case, reduction=reduction), expected


def test_compiles_in_one_graph():
    for found, expected in compiled_results("aot_eager"):
        for name in expected:
            torch.testing.assert_close(found[name], expected[name])


def test_its_backward_is_compiled_as_a_part_of_one_graph():
    """Compiled autograd traces the backward itself, in which nothing may be asked of the graph that is running."""
    case = make_case()
    expected = run(fused_linear_fusion_loss, case)
    for name in DIFFERENTIABLE:
        case[name].requires_grad_()
    loss = fused_linear_fusion_loss(**case)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        loss.backward()
    for name in DIFFERENTIABLE:
        torch.testing.assert_close(case[name].grad, expected[f"d{name}"])


def test_compiles_once_for_every_size_and_every_weight():
    compiled = torch.compile(fused_linear_fusion_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    calls: list[tuple[int, dict[str, Any]]] = [
        (37, {"beta": 0.1}), (23, {"beta": 0.4}), (23, {"beta": 0.4, "temperature": 2.0}),
    ]  # fmt: skip
    for N, options in calls:
        case = make_case(N=N, kd_weight=None)
        found, expected = (run(f, case, **options) for f in (compiled, fused_linear_fusion_loss))
        for name in expected:
            torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_an_error(reduction):
    case = make_case(reduction=reduction)
    hidden = case["hidden"].requires_grad_()
    loss = fused_linear_fusion_loss(**case).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("name", ["hidden", "weight", "bias", "source_logprobs", "ce_weight"])
@pytest.mark.parametrize(
    "derivative",
    [
        lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
        lambda f, x: torch.func.jacfwd(f)(x),
        dual_level()(lambda f, x: f(make_dual(x, torch.ones_like(x)))),
    ],
    ids=["jvp", "jacfwd", "dual"],
)
def test_forward_mode_is_an_error(name, derivative):
    case = make_case(bias=torch.zeros(83), ce_weight=torch.ones(37), kd_weight=None)

    def loss(x):
        return fused_linear_fusion_loss(**case | {name: x})

    with pytest.raises(RuntimeError, match=f"no forward-mode derivative, got a tangent of {name}; call backward"):
        derivative(loss, case[name])


@pytest.mark.long
def test_compiles_with_inductor():
    for found, expected in compiled_results("inductor"):
        for name in expected:
            torch.testing.assert_close(found[name], expected[name])


def test_autocast_leaves_the_logits_in_fp32():
    case = make_case()
    expected = run(fused_linear_fusion_loss, case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(fused_linear_fusion_loss, case)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


# Memory


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "softcap": 3.0}], ids=str)
def test_no_tensor_is_larger_than_a_chunk_of_logits_or_a_gradient(options):
    N, D, V, chunk = 512, 6, 300, 8
    case = make_case(N=N, D=D, V=V, K=4, **options)
    del case["bias"]
    with NewTensors(look_inside=True) as new:
        for reduction in ("mean", "none"):
            run(fused_linear_fusion_loss, case, reduction=reduction, chunk_size=chunk)
    # Tensors as large as the whole batch's sources and gradients are allowed. The whole batch's logits would be 64 chunks.
    assert max(new.sizes) <= max(chunk * V, N * D, V * D, 3 * N * 4)


@pytest.mark.parametrize("grad_output", [1.0, 0.5])
def test_the_last_backward_makes_no_tensor_as_large_as_the_head(grad_output):
    V, D = 300, 64
    case = make_case(N=16, D=D, V=V, K=4)
    for name in DIFFERENTIABLE:
        case[name].requires_grad_()
    loss = fused_linear_fusion_loss(**case)
    with NewTensors() as kept:
        loss.backward(torch.tensor(grad_output), retain_graph=True)
    case["weight"].grad = None
    with NewTensors() as last:
        loss.backward(torch.tensor(grad_output))
    assert V * D in kept.sizes
    assert V * D not in last.sizes  # not even where the weight's .grad is filled


def test_a_bf16_head_is_not_copied_to_fp32_at_once():
    case = make_case(torch.bfloat16, N=64, D=256, V=1000, K=4)
    with NewTensors() as new:
        fused_loss_forward(*op_arguments(case, grad_weight=False, grad_bias=False, chunk_size=16))
    assert max(new.sizes) <= 64 * 256 < 1000 * 256


# The interface


def test_the_module_is_the_function():
    case = make_case(tail="renormalize")
    module = FusedLinearFusionLoss(temperature=2.0, tail="renormalize", reduction="sum", return_stats=True)
    del case["tail"]
    loss, stats = module(**case)
    expected, expected_stats = fused_linear_fusion_loss(
        **case, temperature=2.0, tail="renormalize", reduction="sum", return_stats=True
    )
    assert torch.equal(loss, expected)
    assert stats.keys() == expected_stats.keys()
    assert not list(module.parameters())
    assert "temperature=2.0" in repr(module)


def test_stats_are_detached_and_add_up_to_the_loss():
    case = make_case(torch.float64)
    for name in DIFFERENTIABLE:
        case[name].requires_grad_()
    loss, stats = fused_linear_fusion_loss(**case, reduction="sum", temperature=1.5, return_stats=True)
    assert {name: tuple(value.shape) for name, value in stats.items()} == {
        "ce": (37,), "kd": (37,), "source_mass": (37,), "target_mass": (37,), "winner": (4,)
    }  # fmt: skip
    assert not any(value.requires_grad for value in stats.values())
    total = (case["ce_weight"] * stats["ce"] + case["kd_weight"] * stats["kd"]).sum()
    torch.testing.assert_close(loss.detach(), total)


WRONG = {
    "id beyond the vocabulary": ({"source_ids": lambda x: x.index_fill(1, torch.tensor([0]), 83)}, "< 83.*got 83"),
    "id below padding": ({"source_ids": lambda x: x.index_fill(1, torch.tensor([0]), -2)}, ">= -1.*got -2"),
    "label beyond the vocabulary": ({"labels": lambda x: x.index_fill(0, torch.tensor([0]), 83)}, "labels must be in"),
    "negative label": ({"labels": lambda x: x.index_fill(0, torch.tensor([0]), -1)}, r"labels must be in.*got -1"),
    "probabilities": ({"source_logprobs": torch.exp}, "natural log-probabilities <= 0.*take log"),
    "K-first layout": ({"source_ids": lambda x: x.permute(2, 1, 0)[:, :5]}, r"\(S, N, K\).*got \(6, 5, 3\)"),
    "N last": ({"source_ids": lambda x: x.transpose(1, 2)}, r"\(S, N, K\) with N=37.*permute"),
    "no source axis": ({"source_ids": lambda x: x[0]}, r"unsqueeze\(0\)"),
    "log-probabilities of another top-k": ({"source_logprobs": lambda x: x[..., :4]}, "source_ids' shape"),
    "no log-probabilities": ({"source_logprobs": lambda x: None}, "needs source_logprobs"),
    "float ids": ({"source_ids": lambda x: x.float()}, "int32 or int64"),
    "integer log-probabilities": ({"source_logprobs": lambda x: x.int()}, "source_logprobs must be floating"),
    "sources without ids": ({"source_ids": lambda x: None}, "source_logprobs needs source_ids"),
    "label of another length": ({"labels": lambda x: x[1:]}, r"labels must be \(N,\) with N=37, got \(36,\)"),
    "float labels": ({"labels": lambda x: x.float()}, "labels must be int64"),
    "hidden with a batch axis": ({"hidden": lambda x: x[None]}, r"hidden must be \(N, D\)"),
    "transposed head": ({"weight": lambda x: x.T}, r"weight must be \(V, D\)"),
    "bias of another head": ({"bias": lambda x: x[1:]}, r"bias must be \(V,\)"),
    "integer hidden": ({"hidden": lambda x: x.int()}, "hidden must be floating point"),
    "beta and kd_weight": ({"beta": 0.5}, "beta or kd_weight, not both"),
    "negative beta": ({"beta": -1.0, "kd_weight": None}, "beta must be >= 0"),
    "source_ce and source_index": ({"source_index": torch.zeros(4).long()}, "give one of source_ce, source_index, source_weight"),
    "no choice": ({"source_ce": None}, "with S=3 sources a choice is needed"),
    "source_ce transposed": ({"source_ce": lambda x: x.T}, r"source_ce must be \(S, B\) with S=3"),
    "bounds missing": ({"cu_seqlens": None}, "cu_seqlens is required when B > 1"),
    "bounds of another batch": ({"cu_seqlens": torch.tensor([0, 20, 37])}, "B=2 sequences"),
    "bounds that end early": ({"cu_seqlens": torch.tensor([0, 9, 18, 27, 36])}, "rise from 0 to N=37"),
    "bounds that fall": ({"cu_seqlens": torch.tensor([0, 18, 9, 27, 37])}, "rise from 0 to N=37"),
    "source_index out of range": (
        {"source_ce": None, "source_index": torch.tensor([0, 1, 2, 3])}, r"source_index must be in \[0, 3\).*got 3",
    ),
    "float source_index": ({"source_ce": None, "source_index": torch.zeros(4)}, "source_index must be"),
    "temperature 0": ({"temperature": 0.0}, "temperature must be > 0.*got 0.0"),
    "negative temperature": ({"temperature": -1.0}, "temperature must be > 0"),
    "softcap 0": ({"softcap": 0.0}, "softcap must be > 0"),
    "logit_scale 0": ({"logit_scale": 0.0}, "logit_scale must be > 0"),
    "chunk of no rows": ({"chunk_size": 0}, "chunk_size must be >= 1"),
    "chunk of no bytes": ({"max_chunk_bytes": 0}, "max_chunk_bytes must be >= 1"),
    "unknown tail": ({"tail": "drop"}, "tail must be one of"),
    "tail mass without a bucket": ({"source_tail": torch.zeros(3, 37), "tail": "renormalize"}, "needs tail='bucket'"),
    "tail mass per entry": ({"source_tail": torch.zeros(3, 37, 6)}, r"source_tail must be \(S, N\)"),
    "log of a tail mass": ({"source_tail": torch.full((3, 37), -2.0)}, r"linear mass in \[0, 1\].*exp"),
    "unknown reduction": ({"reduction": "batchmean"}, "reduction must be one of"),
    "divisor of a sum": ({"reduction": "sum", "num_items_in_batch": 5}, "is for reduction='mean'"),
    "negative divisor": ({"num_items_in_batch": -1}, "num_items_in_batch must be >= 0"),
    "infinite divisor": ({"num_items_in_batch": float("inf")}, "num_items_in_batch must be >= 0 and finite, got inf"),
    "divisor that is NaN": ({"num_items_in_batch": float("nan")}, "num_items_in_batch must be >= 0 and finite, got nan"),
    "weight per sequence": ({"ce_weight": torch.ones(4)}, r"ce_weight must be \(N,\)"),
    "source that requires grad": ({"source_logprobs": lambda x: x.requires_grad_()}, "must not require grad"),
    "triton in fp64": ({"impl": "triton", "hidden": lambda x: x.double()}, "computes in float32, got float64"),
    "unknown impl": ({"impl": "cuda"}, "impl must be None"),
    "float bounds": ({"cu_seqlens": lambda x: x.float()}, "cu_seqlens must be int64 or int32"),
    "tail mass without sources": ({"source_tail": torch.zeros(37)}, r"unsqueeze\(0\)"),
    "source_ce of fewer sources": ({"source_ce": torch.zeros(2, 4)}, "a row for each source"),
    "label padding of -1": ({"labels": lambda x: x.masked_fill(x == IGNORE_INDEX, -1)}, "mark what is not learnt with -100"),
    "labels with an axis too many": ({"labels": lambda x: x[:, None]}, r"squeeze\(1\)"),
    "head of a shard": ({"weight": torch.zeros(0)}, "gathered first"),
    "no hidden states": ({"hidden": None}, "hidden must be a tensor, got NoneType; pass the last hidden states"),
    "all hidden states": ({"hidden": lambda x: (x, x)}, r"hidden must be a tensor, got tuple.*hidden_states\[-1\]"),
    "learnable temperature": ({"temperature": torch.ones((), requires_grad=True)}, r"temperature must be \(N,\) = \(37,\), got \(\)"),
    "temperature as text": ({"temperature": "1"}, r"got '1' \(str\)"),
    "chunk of a half": ({"chunk_size": 2.5}, "chunk_size must be a whole number, got 2.5"),
    "bytes as a float": ({"max_chunk_bytes": 1e6}, "max_chunk_bytes must be a whole number"),
    "divisor as text": ({"num_items_in_batch": "4"}, "num_items_in_batch must be a number"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_name_the_rule_the_value_and_the_fix(changes, message):
    case = make_case()
    for name, change in changes.items():
        case[name] = change(case[name]) if callable(change) else change
    with pytest.raises((ValueError, TypeError), match=message) as error:
        fused_linear_fusion_loss(**case)
    assert "\n" not in str(error.value)
