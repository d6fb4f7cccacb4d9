"""What the fused loss must do on both of its paths, plain torch and Triton, measured against the dense fp64 reference.

The Triton path runs on a GPU if there is one, and otherwise in Triton's interpreter. Therefore the cases are small; blocks are
made smaller than V.
"""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from loss_checks import DIFFERENTIABLE, assert_as_accurate_as_reference, make_case, run, with_logits

from profuser.kernels import rows
from profuser.kernels.common import IGNORE_INDEX
from profuser.kernels.reference import fusion_loss_reference
from profuser.loss import fused_linear_fusion_loss

pytestmark = [
    pytest.mark.usefixtures("small_blocks"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
ROWS = 10  # few, because a program takes a millisecond in the interpreter
small_case = partial(make_case, N=ROWS)


@pytest.fixture(params=["torch", "triton"])
def path(request, device):
    """The options of `run` that choose a path."""
    return {"impl": request.param, "device": device if request.param == "triton" else "cpu"}


@pytest.fixture
def loss(path):
    return partial(run, fused_linear_fusion_loss, **path)


@pytest.fixture
def check(path):
    return partial(assert_as_accurate_as_reference, **path)


# Values and gradients


@pytest.mark.parametrize(
    ("softcap", "logit_scale", "biased"),
    [(None, 1.0, False), (None, 0.3, True), (3.0, 1.0, False), (3.0, 0.3, True), (3.0, 0.3, False)],
)
def test_softcap_scale_and_bias_work_together(check, softcap, logit_scale, biased):
    case = small_case(spread=2.0, softcap=softcap, logit_scale=logit_scale)
    if not biased:
        case["bias"] = None
    check(case, temperature=2.0 if biased else 1.0)


def test_source_tail_scales_the_entries_to_what_it_leaves(loss, check):
    case = small_case()
    case["source_tail"] = torch.rand(3, ROWS, generator=torch.Generator().manual_seed(0))
    check(case)
    # 0 and 1 are allowed: with 0 there is no bucket, and with 1 nothing else.
    case["source_tail"][:, ::2] = 0
    case["source_tail"][:, 1::2] = 1
    ours, _ = check(case)
    case["source_tail"][:, ::2] = -1e-6
    case["source_tail"][:, 1::2] = 1 + 1e-6
    rounded = loss(case, chunk_size=8)
    for name in ours:
        assert torch.equal(rounded[name], ours[name]), name


# Rows


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_write_zeros_even_when_they_hold_garbage(loss, reduction, poisoned_buffers):
    clean = small_case()
    ignored = clean["labels"] == IGNORE_INDEX
    assert ignored.any()
    poisoned = copy.deepcopy(clean)
    for name in ("hidden", "ce_weight", "kd_weight"):
        poisoned[name][ignored] = math.nan
    poisoned["source_logprobs"][:, ignored] = math.nan
    poisoned["source_logprobs"][:, ignored, ::2] = math.inf
    poisoned["source_ids"][:, ignored] = 2**31 - 1
    expected, found = loss(clean, reduction=reduction), loss(poisoned, reduction=reduction)
    for name in expected:
        assert torch.isfinite(found[name]).all(), name
        assert torch.equal(found[name], expected[name]), name
    for name in ("dhidden", "ce", "kd", "source_mass", "target_mass"):
        assert not found[name][ignored].any(), name


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [ROWS, 0])
def test_a_batch_without_valid_rows_is_zero_with_zero_gradients(loss, reduction, rows, poisoned_buffers):
    case = small_case()
    case["labels"][:] = IGNORE_INDEX
    case["hidden"][:] = math.nan
    if rows == 0:
        case |= {name: case[name][:0] for name in ("hidden", "labels", "ce_weight", "kd_weight")}
        case |= {name: case[name][:, :0] for name in ("source_ids", "source_logprobs")}
        case["cu_seqlens"] = torch.zeros(5, dtype=torch.long)
    result = loss(case, reduction=reduction)
    for name in ("loss", "dhidden", "dweight", "dbias", "ce", "kd", "source_mass", "target_mass"):
        assert not result[name].any(), name


def test_rows_without_an_entry_have_no_kd(check):
    case = small_case()
    case["labels"][5] = 7
    case["source_logprobs"][:, 6] = -math.inf
    case["labels"][6] = 7
    ours, _ = check(case)
    for row in (5, 6):
        assert ours["kd"][row] == ours["source_mass"][row] == ours["target_mass"][row] == 0
        assert ours["ce"][row] > 0


@pytest.mark.parametrize("K", [4, 40])
def test_duplicate_ids_add_their_mass(loss, K):
    """This includes duplicates that are further apart than a block of the Triton path's comparison."""
    case = make_case(N=4, S=1, B=1, K=K)
    case["source_ids"][..., (0, K - 1)] = 9
    merged = copy.deepcopy(case)
    merged["source_ids"][..., K - 1] = -1
    merged["source_logprobs"][..., 0] = case["source_logprobs"][..., (0, K - 1)].logsumexp(-1)
    for tail in ("bucket", "renormalize"):
        twice, once = loss(case, tail=tail), loss(merged, tail=tail)
        for name in twice:
            torch.testing.assert_close(twice[name], once[name], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, 5.0])
def test_padding_may_hold_any_log_probability(loss, value):
    case = small_case()
    poisoned = copy.deepcopy(case)
    poisoned["source_logprobs"][poisoned["source_ids"] < 0] = value
    expected, found = loss(case), loss(poisoned)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_ignored_rows_may_name_any_source(loss):
    case = make_case(N=6, S=2, B=1)
    del case["source_ce"]
    case["labels"][2] = IGNORE_INDEX
    named = torch.tensor([0, 1, -1, 0, 1, 1])
    expected, found = (loss(case, source_index=named.index_fill(0, torch.tensor(2), n)) for n in (-1, IGNORE_INDEX))
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    with pytest.raises(ValueError, match="source_index must be in"):
        loss(case, source_index=torch.tensor([0, IGNORE_INDEX, 0, 0, 1, 1]))


# Numerics


@pytest.mark.parametrize("gap", [10.0, 16.0, 20.0])
@pytest.mark.parametrize("tail_mass", [1e-7, 1e-3, 0.3])
@pytest.mark.parametrize("label", [1, 40])
def test_the_bucket_is_exact_when_the_target_keeps_almost_nothing_outside(loss, gap, tail_mass, label):
    z = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    z[:, :3] += gap
    case = with_logits(
        z, labels=torch.tensor([label]), source_ids=torch.tensor([[[0, 1, 2]]]),
        source_logprobs=torch.tensor([[[0.5, 0.3, 0.2]]]).log(), source_tail=torch.tensor([[tail_mass]]),
        ce_weight=torch.tensor([0.0]), kd_weight=torch.tensor([1.0]),
    )  # fmt: skip
    ours = loss(case)
    truth = run(fusion_loss_reference, case, upcast=torch.float64)
    torch.testing.assert_close(ours["loss"].double(), truth["loss"], rtol=2e-6, atol=1e-7)
    # Each column is compared with its own truth, because outside they are smaller than the largest by orders of magnitude.
    outside = slice(3, None)
    torch.testing.assert_close(ours["dhidden"][0, outside].double(), truth["dhidden"][0, outside], rtol=1e-5, atol=0)


def test_a_target_without_mass_outside_stays_finite(check):
    z = torch.full((2, 20), -200.0)
    z[:, :2] = 50.0
    case = with_logits(
        z, labels=torch.tensor([0, 7]), source_ids=torch.tensor([[[0, 1]]]).expand(1, 2, 2),
        source_logprobs=torch.tensor([[[0.6, 0.3]]]).log().expand(1, 2, 2), beta=1.0,
    )  # fmt: skip
    check(case)


@pytest.mark.parametrize("padding", [-math.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("compiled", [True, False], ids=["extension", "no extension"])
def test_a_source_that_gives_all_but_the_padded_columns_has_no_tail(loss, monkeypatch, padding, compiled):
    """What its log-probabilities lack of 1 by rounding would cost 1e22 where the target has nothing."""
    if not compiled:
        monkeypatch.setattr(rows, "_rows", None)
    g, real = torch.Generator().manual_seed(0), 13
    case = {
        "hidden": torch.randn(6, 8, generator=g), "weight": torch.randn(16, 8, generator=g), "labels": torch.arange(6),
        "bias": torch.zeros(16).index_fill(0, torch.arange(real, 16), padding), "beta": 1.0,
        "source_ids": torch.arange(real, dtype=torch.int32).expand(1, 6, real),
        "source_logprobs": torch.randn(1, 6, real, generator=g).log_softmax(-1) - 3e-7,
    }  # fmt: skip
    padded, whole = loss(case), loss(case | {"weight": case["weight"][:real], "bias": case["bias"][:real]})
    reference = run(fusion_loss_reference, case, upcast=torch.float64)
    for name in ("loss", "kd", "dhidden"):
        torch.testing.assert_close(padded[name], whole[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(padded[name].double(), reference[name].double(), rtol=1e-5, atol=1e-6)


def test_mass_above_one_by_rounding_is_divided_out(loss, check):
    case = small_case(S=1, B=1)
    case["source_ids"] = torch.arange(6, dtype=torch.int32).expand(1, ROWS, 6).clone()
    logits = torch.randn(1, ROWS, 6, generator=torch.Generator().manual_seed(0))
    case["source_logprobs"] = logits.log_softmax(-1) + 1e-3
    ours, _ = check(case)
    torch.testing.assert_close(ours["dhidden"], loss(case, tail="renormalize")["dhidden"])


def test_a_little_more_mass_than_1_is_rounding_and_a_tenth_is_not(loss, path):
    case = with_logits(torch.zeros(1, 9), labels=torch.tensor([1]), source_ids=torch.tensor([[[2, 3]]]))
    rounded, wrong = (case | {"source_logprobs": torch.full((1, 1, 2), mass / 2).log()} for mass in (1.04, 1.1))
    assert loss(rounded)["loss"].isfinite()
    if path["impl"] == "triton":  # which does not wait for a GPU in order to raise
        assert loss(wrong)["loss"].isnan()
    else:
        with pytest.raises(ValueError, match=r"add up to a mass of 1\.1"):
            loss(wrong)


@pytest.mark.parametrize("height", [-95.0, -120.0])
def test_entries_too_small_for_fp32_count_once_renormalised(loss, height):
    case = small_case(tail="renormalize")
    case["source_logprobs"] += height
    ours, truth = loss(case), run(fusion_loss_reference, case, upcast=torch.float64)
    for name in ("loss", "kd", "dhidden", "dweight"):
        torch.testing.assert_close(ours[name].double(), truth[name], rtol=1e-4, atol=1e-6)


def test_ids_that_cover_the_vocabulary_leave_no_bucket(check):
    case = small_case(V=6, K=6)
    case["source_ids"] = torch.arange(6, dtype=torch.int32).expand(3, ROWS, 6).clone()
    case["source_logprobs"] -= 1e-6
    for temperature in (1.0, 0.25):
        check(case, temperature=temperature)


@pytest.mark.parametrize("spread", [20.0, 80.0])
def test_large_logits_cost_no_accuracy(check, spread):
    case = make_case(N=14, spread=spread)
    check(case)
    check(case, tail="renormalize", temperature=3.0)


def test_logits_near_eighty_keep_their_probabilities(loss):
    z = 80 + torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    case = with_logits(z, labels=torch.arange(9), reduction="sum")
    truth = run(fusion_loss_reference, case, upcast=torch.float64)
    torch.testing.assert_close(loss(case)["dhidden"].double(), truth["dhidden"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("height", [3.0, 8.0, 25.0])
@pytest.mark.parametrize("source", [False, True])
def test_small_cross_entropy_keeps_its_digits(loss, height, source):
    z = torch.zeros(1, 100)
    z[0, 4] = height
    case = with_logits(z, labels=torch.tensor([4]))
    if source:
        case |= {"source_ids": torch.tensor([[[4, 7]]]), "source_logprobs": torch.full((1, 1, 2), -1.0), "beta": 0.0}
    ours, truth = loss(case), run(fusion_loss_reference, case, upcast=torch.float64)
    torch.testing.assert_close(ours["loss"].double(), truth["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(ours["dhidden"].double(), truth["dhidden"], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("size", "softcap"), [(1.0, 1.0), (30.0, 1.0), (50.0, 1000.0)])
def test_a_softcap_keeps_small_and_large_logits(check, size, softcap):
    """tanh is computed from exp, or from a series where the digits would cancel: an error of 6e-8 of a cap of 1000 shows."""
    logits = torch.linspace(-size, size, 6 * 40).view(6, 40)
    check(with_logits(logits, labels=torch.arange(6), reduction="sum"), softcap=softcap)


@pytest.mark.parametrize("gap", [0.0, 1e-3, 5e-2])
def test_a_target_close_to_the_source_costs_no_accuracy(check, gap):
    case = small_case(S=1, B=1, K=6)
    logits = case["hidden"] @ case["weight"].T + case["bias"]
    nearby = logits + gap * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    top = nearby.log_softmax(1).topk(6)
    case |= {"source_ids": top.indices[None], "source_logprobs": top.values[None], "ce_weight": torch.zeros(ROWS)}
    check(case, scale=1 / (case["labels"] != IGNORE_INDEX).sum().item())


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_columns_of_the_vocabulary_may_be_masked_by_the_bias(check, softcap):
    """A bias of -inf masks rows of the head beyond the tokenizer. Under a softcap this gives a finite logit."""
    case = small_case(S=1, B=1, softcap=softcap)
    case["labels"][case["labels"] >= 80] = 0
    case["source_ids"] %= 80
    case["source_ids"][..., 5] = 81
    case["source_logprobs"][..., 5] = -math.inf
    case["bias"][80:] = -math.inf
    for options in ({}, {"temperature": 2.0}, {"tail": "renormalize"}):
        check(case, **options)


# The choice of the source


def test_min_ce_picks_the_lowest_finite_source_of_each_sequence(check):
    nan, inf = math.nan, math.inf
    source_ce = torch.tensor([
        [1.0, nan, 2.0, nan, 0.5, -inf],
        [0.5, 3.0, 2.0, inf, nan, 4.0],
        [0.7, inf, 2.5, nan, 0.5, nan],
    ])  # fmt: skip
    case = small_case(B=6, source_ce=source_ce, cu_seqlens=torch.tensor([0, 2, 4, 4, 6, 8, 10]))
    case["labels"][:] = 1
    ours, _ = check(case)
    assert ours["winner"].tolist() == [1, 1, 0, -1, 0, 1]
    assert not ours["kd"][4:6].any()
    assert ours["ce"][4:6].all()


def test_a_loser_is_not_read(loss):
    case = small_case()
    expected = loss(case)
    lost = torch.ones(3, ROWS, dtype=torch.bool)
    for b, s in enumerate(expected["winner"].tolist()):
        lost[s, case["cu_seqlens"][b] : case["cu_seqlens"][b + 1]] = False
    case["source_logprobs"][lost] = math.nan
    case["source_ids"][lost] = 0
    found = loss(case)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_source_index_per_sequence_equals_per_row(loss, check):
    case = small_case(source_ce=None)
    per_sequence = torch.tensor([2, -1, 0, 1])
    per_row = per_sequence.repeat_interleave(case["cu_seqlens"].diff())
    ours, _ = check(case, source_index=per_sequence)
    assert ours["winner"].tolist() == per_sequence.tolist()
    by_row = loss(case | {"cu_seqlens": None, "labels": case["labels"].int()}, source_index=per_row.int(), chunk_size=8)
    assert by_row["winner"].tolist() == per_row.tolist()
    for name in ("loss", "dhidden", "dweight", "dbias", "kd"):
        assert torch.equal(ours[name], by_row[name]), name


@pytest.mark.parametrize("index", [3, -2])
def test_a_number_that_no_source_has_is_refused(index):
    case = make_case() | {"source_ce": None, "source_index": torch.tensor([0, 2, -1, index])}
    with pytest.raises(ValueError, match=rf"source_index must be in \[0, 3\) or -1 for no distillation, got {index}"):
        fused_linear_fusion_loss(**case)


@pytest.mark.parametrize("cu_dtype", [torch.int32, torch.int64])
def test_one_sequence_needs_no_bounds(check, cu_dtype):
    case = small_case(B=1)
    bounds = case.pop("cu_seqlens")
    ours, _ = check(case)
    assert torch.equal(ours["loss"], check(case, cu_seqlens=bounds.to(cu_dtype))[0]["loss"])


def test_one_source_is_top_k_distillation(loss, check):
    case = small_case(S=1, B=1)
    del case["source_ce"], case["cu_seqlens"]
    ours, _ = check(case)
    assert ours["winner"].tolist() == [0]
    everything_missing = loss(case, source_ce=torch.tensor([[math.nan]]))
    assert everything_missing["winner"].tolist() == [-1]
    assert not everything_missing["kd"].any()


def test_without_a_source_it_is_cross_entropy(loss, poisoned_buffers):
    case = {k: v for k, v in small_case().items() if k in ("hidden", "weight", "labels", "bias")}
    for reduction in ("mean", "sum", "none"):
        ours = loss(case, reduction=reduction, chunk_size=5)
        hidden, weight, bias = (case[name].clone().requires_grad_() for name in DIFFERENTIABLE)
        expected = F.cross_entropy(F.linear(hidden, weight, bias), case["labels"], reduction=reduction)
        expected.sum().backward()
        torch.testing.assert_close(ours["loss"], expected.detach())
        for name, leaf in zip(DIFFERENTIABLE, (hidden, weight, bias), strict=True):
            torch.testing.assert_close(ours[f"d{name}"], leaf.grad)
    assert ours["winner"].tolist() == [-1]
    for name in ("kd", "source_mass", "target_mass"):
        assert not ours[name].any()


# Statistics. That they are those of the reference is checked in every case above.


def test_entropies_are_those_worked_by_hand(loss):
    q = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])
    case = with_logits(
        q.log().clamp_min(-200.0),
        labels=torch.tensor([0, 0, 0]),
        source_ids=torch.tensor([[[0, 1, 1], [2, -1, -1], [-1, -1, -1]]]),
        source_logprobs=torch.tensor([[[0.5, 0.2, 0.1], [1.0, 0.3, 0.3], [0.5, 0.5, 0.5]]]).log(),
    )
    found = loss(case, temperature=2.0, kd_weight=torch.zeros(3))
    of_target = [-sum(x * math.log(x) for x in row) for row in ([0.1, 0.2, 0.3, 0.4], [0.25] * 4)]
    of_source = -sum(x * math.log(x) for x in (0.5, 0.3, 0.2))
    assert found["target_entropy"].tolist() == pytest.approx([*of_target, 0.0], abs=1e-6)
    assert found["source_entropy"].tolist() == pytest.approx([of_source, 0.0, 0.0], abs=1e-6)


def test_entropies_of_mixed_sources_are_their_weighted_mean(loss):
    case = small_case(B=1, S=2)
    del case["source_ce"]
    of_each = [loss(case | {"source_index": torch.tensor([s])})["source_entropy"] for s in range(2)]
    mixed = loss(case | {"source_weight": torch.tensor([[1.0], [3.0]])})["source_entropy"]
    present = (case["source_ids"] >= 0).any(-1).all(0)
    torch.testing.assert_close(mixed[present], ((of_each[0] + 3 * of_each[1]) / 4)[present])
