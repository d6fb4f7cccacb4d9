"""Without sources the loss is a fused linear cross-entropy, of which the same is asked as other projects ask of theirs.

Cases and tolerances are those of the files named below. The expected values are from plain torch, as there.

Liger-Kernel, test_fused_linear_cross_entropy.py:
- `test_correctness`: `test_loss_and_gradients_equal_a_linear_head_and_cross_entropy` (with the shapes of
  `test_correctness_functional`) and `test_a_row_weight_is_a_class_weight_looked_up`
- `test_amp`: `test_autocast_around_an_fp32_head_gives_torchs_values`

ml-cross-entropy (cut-cross-entropy), test_cce_loss_forward.py and test_cce_loss_backward.py:
- `test_loss_forward`: `test_per_row_loss_errs_no_more_than_torch`
- `test_loss_backward`: `test_gradients_err_no_more_than_torch`
- `test_loss_partials`: `test_only_the_gradients_asked_for_are_made`

Both projects ignore labels and take ragged sizes. `test_without_a_label_all_results_are_zero` and
`test_any_number_of_rows_gives_torchs_values` test the extremes of that.

Our loss has no token accuracy, no ignore index other than -100 (map it) and no shift of labels inside (FusionModel shifts). So these are
not tested. Label smoothing and z-loss are in test_divergences.py, and columns that are left out of the gradient in test_left_out.py.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from profuser.kernels.common import IGNORE_INDEX
from profuser.loss import fused_linear_fusion_loss

# The absolute and relative tolerance for each reduction and dtype, as Liger has them.
LIGER_TOLERANCE = {
    ("mean", torch.bfloat16): (5e-3, 5e-2),
    ("mean", torch.float32): (1e-5, 5e-4),
    ("sum", torch.bfloat16): (5e-0, 5e1),
    ("sum", torch.float32): (1e-3, 5e-2),
    ("none", torch.bfloat16): (5e-0, 5e1),
    ("none", torch.float32): (1e-3, 5e-2),
}
# (N, V, D) of whole tiles, of ragged rows and vocabulary, and with everything ragged.
CCE_SHAPES = [(256, 512, 128), (252, 507, 128), (252, 507, 123)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def softcapped(logits, softcap):
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def torch_loss(hidden, weight, labels, bias=None, softcap=None, reduction="mean"):
    logits = softcapped(F.linear(hidden, weight, bias), softcap).float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction=reduction)


def liger_case(N: int, D: int, V: int, dtype: torch.dtype, biased: bool) -> dict[str, Any]:
    """A case with a head of positive weights, as Liger draws it, so that logits grow with D.

    Fewer than half of the labels are ignored.
    """
    labels = torch.randint(V, (N,))
    labels[torch.randperm(N)[: torch.randint(1, N // 2, ()).item()]] = IGNORE_INDEX
    return {
        "hidden": torch.randn(N, D).to(dtype).requires_grad_(),
        "weight": torch.rand(V, D).to(dtype).requires_grad_(),
        "labels": labels,
        "bias": torch.rand(V).to(dtype).requires_grad_() if biased else None,
    }


def loss_and_gradients(function, case, **options):
    """The loss, and the gradients of hidden, weight and bias for a grad_output of ones."""
    leaves = [case[name] for name in ("hidden", "weight", "bias") if case[name] is not None]
    loss = function(**case, **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)


def assert_close(found, true, atol, rtol):
    for ours, theirs in zip(found, true, strict=True):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol, check_dtype=False)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("reduction", "dtype"), LIGER_TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(256, 256, 1024), (4 * 47, 31, 123), (4, 8, 8), (63, 41, 41)], ids=str)
def test_loss_and_gradients_equal_a_linear_head_and_cross_entropy(shape, reduction, dtype, biased, softcap):
    N, D, V = shape
    case = liger_case(N, D, V, dtype, biased)
    found = loss_and_gradients(fused_linear_fusion_loss, case, softcap=softcap, reduction=reduction)
    true = loss_and_gradients(torch_loss, case, softcap=softcap, reduction=reduction)
    atol, rtol = LIGER_TOLERANCE[reduction, dtype]
    assert_close(found, true, atol, rtol)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_row_weight_is_a_class_weight_looked_up(reduction):
    case = liger_case(4 * 47, 31, 123, torch.float32, biased=True)
    of_class = torch.rand(123)

    def weighted(hidden, weight, labels, bias):
        logits = F.linear(hidden, weight, bias)
        return F.cross_entropy(logits, labels, weight=of_class, ignore_index=IGNORE_INDEX, reduction=reduction)

    row_weight = torch.where(case["labels"] == IGNORE_INDEX, 0, of_class[case["labels"].clamp_min(0)])
    total = {"num_items_in_batch": row_weight.sum()} if reduction == "mean" else {}
    # torch's mean divides by the sum of the weights. Our loss would take a sum below 1 for 1, so this case must not have one.
    assert reduction != "mean" or total["num_items_in_batch"] >= 1
    found = loss_and_gradients(fused_linear_fusion_loss, case, ce_weight=row_weight, reduction=reduction, **total)
    assert_close(found, loss_and_gradients(weighted, case), *LIGER_TOLERANCE["mean", torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_autocast_around_an_fp32_head_gives_torchs_values(dtype, biased):
    case = liger_case(4 * 47, 31, 123, torch.float32, biased)
    with torch.autocast("cpu", dtype=dtype):
        found = loss_and_gradients(fused_linear_fusion_loss, case)
        true = loss_and_gradients(torch_loss, case)
    assert_close(found, true, atol=5e-3, rtol=5e-2)


def cce_case(N: int, V: int, D: int, dtype: torch.dtype, biased: bool, ignored: bool) -> dict[str, Any]:
    """A case in which some of the head's rows are hidden states, so that some logits are far above the others.

    With `ignored`, a fifth of the labels are ignored.
    """
    hidden = torch.randn(N, D).to(dtype) / D**0.5
    weight = torch.randn(V, D).to(dtype)
    weight[: min(N, V) // 2] = hidden[: min(N, V) // 2]
    labels = torch.randint(V, (N,))
    if ignored:
        labels[torch.randperm(N)[: N // 5]] = IGNORE_INDEX
    return {
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(),
        "labels": labels,
        "bias": (torch.randn(V) * 0.02).to(dtype).requires_grad_() if biased else None,
    }


def in_fp32(case):
    return {
        name: x.detach().float().requires_grad_() if x is not None and x.is_floating_point() else x
        for name, x in case.items()
    }


def assert_errs_no_more(ours, same_dtype, true, tolerance):
    """Checks for every entry that our error is at most that of torch in the same dtype plus the tolerance."""
    for found, plain, exact in zip(ours, same_dtype, true, strict=True):
        excess = (found.float() - exact).abs() - (plain.float() - exact).abs()
        assert excess.max() <= tolerance


CCE_DTYPES = [(torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)]


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize(("dtype", "tolerance"), CCE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", CCE_SHAPES, ids=str)
def test_per_row_loss_errs_no_more_than_torch(shape, dtype, tolerance, softcap, biased, ignored):
    N, V, D = shape
    case = cce_case(N, V, D, dtype, biased, ignored)
    options = {"softcap": softcap, "reduction": "none"}
    with torch.no_grad():
        true = torch_loss(**in_fp32(case), **options)
        plain = torch_loss(**case, **options)
        assert_errs_no_more([fused_linear_fusion_loss(**case, **options)], [plain], [true], tolerance)


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("reduction", ["none", "mean", pytest.param("sum", marks=pytest.mark.long)])
@pytest.mark.parametrize(("dtype", "tolerance"), CCE_DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", CCE_SHAPES, ids=str)
def test_gradients_err_no_more_than_torch(shape, dtype, tolerance, reduction, softcap, biased, ignored):
    N, V, D = shape
    case = cce_case(N, V, D, dtype, biased, ignored)
    # Every reduction is brought to the scale of a mean, to which the tolerance belongs.
    divisor = {"none": len(case["labels"]), "mean": 1, "sum": (case["labels"] != IGNORE_INDEX).sum()}[reduction]

    def gradients(function, case):
        return loss_and_gradients(lambda **kw: function(**kw, softcap=softcap, reduction=reduction) / divisor, case)[1:]

    true = gradients(torch_loss, in_fp32(case))
    assert_errs_no_more(gradients(fused_linear_fusion_loss, case), gradients(torch_loss, case), true, tolerance)


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
def test_only_the_gradients_asked_for_are_made(wanted):
    case = cce_case(256, 512, 128, torch.bfloat16, biased=True, ignored=False)
    for name in ("hidden", "weight", "bias"):
        case[name].requires_grad_(name == wanted)
    fused_linear_fusion_loss(**case).backward()
    assert [name for name in ("hidden", "weight", "bias") if case[name].grad is not None] == [wanted]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_a_label_all_results_are_zero(reduction, dtype):
    case = liger_case(4 * 47, 31, 123, dtype, biased=True) | {"labels": torch.full((4 * 47,), IGNORE_INDEX)}
    for result in loss_and_gradients(fused_linear_fusion_loss, case, reduction=reduction):
        assert not result.any()  # here torch's own mean would be 0/0


@pytest.mark.parametrize("N", [1, 2, 127, 128, 129, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_rows_gives_torchs_values(N, dtype):
    case = cce_case(N, 507, 123, dtype, biased=True, ignored=False)
    found = loss_and_gradients(fused_linear_fusion_loss, case, chunk_size=128)
    assert_close(found, loss_and_gradients(torch_loss, case), *LIGER_TOLERANCE["mean", dtype])
