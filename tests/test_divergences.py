"""The loss as a family: every divergence with every tail, mixed sources, z-loss and label smoothing.

The truth is the dense reference, which takes each divergence from its paper and its gradients from autograd.
"""

import itertools
from typing import Any

import pytest
import torch
from loss_checks import (
    DIFFERENTIABLE,
    FLOOR,
    assert_as_accurate_as_reference,
    assert_close_to_truth,
    make_case,
    on,
    run,
    with_logits,
)
from torch.nn import functional as F

from profuser.kernels import fused_loss as op_module
from profuser.kernels.divergences import DIVERGENCES, canonical, infinite_at_zero
from profuser.kernels.reference import fusion_loss_reference
from profuser.kernels.row_losses import RowLosses
from profuser.kernels.tails import TAILS
from profuser.loss import FusedLinearFusionLoss, fused_linear_fusion_loss

BETAS = {"jsd": (0.0, 0.3, 0.5, 1.0), "skew_kl": (0.0, 0.1, 0.9), "skew_reverse_kl": (0.0, 0.1, 0.9)}
MEMBERS = [(divergence, beta) for divergence in DIVERGENCES for beta in BETAS.get(divergence, (0.5,))]
FAMILY = [
    {"divergence": divergence, "divergence_beta": beta, "tail": tail}
    for (divergence, beta), tail in itertools.product(MEMBERS, TAILS)
    if not (tail == "renormalize" and infinite_at_zero(canonical(divergence, beta)))
]

# `make test` takes every third where one takes long, and test-long takes all.
SLOW_FAMILY = [pytest.param(m, marks=[pytest.mark.long] if i % 3 else []) for i, m in enumerate(FAMILY)]


def named(member):
    return "-".join(str(value) for value in member.values())


def mixed_case(**options):
    """A case whose sources are mixed, some of them with a weight of 0."""
    case = make_case(**options)
    sources, rows, _ = case["source_ids"].shape
    weight = torch.rand(sources, rows, generator=torch.Generator().manual_seed(1))
    weight[0, ::3] = 0
    weight[:, 7:8] = 0
    del case["source_ce"]
    return case | {"source_weight": weight}


@pytest.mark.parametrize("member", FAMILY, ids=named)
def test_every_member_is_the_dense_formula(member):
    assert_close_to_truth(make_case(spread=2.0), chunk_size=8, **member)
    assert_close_to_truth(make_case(spread=2.0, seed=1), temperature=2.5, softcap=4.0, logit_scale=0.7, **member)


@pytest.mark.parametrize("member", FAMILY, ids=named)
def test_every_member_is_as_accurate_as_the_dense_formula(member):
    assert_as_accurate_as_reference(make_case(), scale=1.0, temperature=1.5, **member)


@pytest.mark.parametrize("member", FAMILY, ids=named)
def test_every_member_of_mixed_sources_is_the_dense_formula(member):
    assert_close_to_truth(mixed_case(spread=2.0), chunk_size=8, temperature=1.5, **member)


@pytest.mark.parametrize("member", SLOW_FAMILY, ids=named)
def test_every_member_passes_gradcheck(member):
    case = mixed_case(dtype=torch.float64, N=4, D=3, V=7, S=2, K=3, B=1)
    case["labels"] = case["labels"].clamp_min(0)
    leaves = [case.pop(name).requires_grad_() for name in DIFFERENTIABLE]

    def loss(hidden, weight, bias):
        return fused_linear_fusion_loss(hidden=hidden, weight=weight, bias=bias, chunk_size=3, **case, **member)

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_jsd_over_the_whole_vocabulary_is_gkd_of_trl(beta):
    """TRL's generalized_jsd_loss on dense logits, written from its paper's equation (1)."""
    student, teacher = torch.randn(5, 11, dtype=torch.float64), torch.randn(5, 11, dtype=torch.float64)
    student.requires_grad_()
    ours = distilled(student, teacher, divergence="jsd", divergence_beta=beta)
    (ours_grad,) = torch.autograd.grad(ours.sum(), student)
    log_q, log_p = student.log_softmax(1), teacher.log_softmax(1)
    if beta == 0:
        theirs = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    elif beta == 1:
        theirs = F.kl_div(log_p, log_q, reduction="none", log_target=True)
    else:
        log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
        of_teacher = F.kl_div(log_m, log_p, reduction="none", log_target=True)
        theirs = beta * of_teacher + (1 - beta) * F.kl_div(log_m, log_q, reduction="none", log_target=True)
    theirs = theirs.sum(1)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours_grad, torch.autograd.grad(theirs.sum(), student)[0])


@pytest.mark.parametrize("alpha", [0.1, 0.5])
@pytest.mark.parametrize("divergence", ["skew_kl", "skew_reverse_kl"])
def test_the_skewed_ones_over_the_whole_vocabulary_are_those_of_distillm(divergence, alpha):
    """DistiLLM's equations: D_SKL = KL(p, αp + (1 − α)q) and D_SRKL = KL(q, (1 − α)p + αq)."""
    student, teacher = torch.randn(5, 11, dtype=torch.float64), torch.randn(5, 11, dtype=torch.float64)
    student.requires_grad_()
    ours = distilled(student, teacher, divergence=divergence, divergence_beta=alpha)
    (ours_grad,) = torch.autograd.grad(ours.sum(), student)
    p, q = teacher.softmax(1), student.softmax(1)
    if divergence == "skew_kl":
        theirs = (p * (p / (alpha * p + (1 - alpha) * q)).log()).sum(1)
    else:
        theirs = (q * (q / ((1 - alpha) * p + alpha * q)).log()).sum(1)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours_grad, torch.autograd.grad(theirs.sum(), student)[0])


def distilled(student, teacher, **options):
    """The divergence of each row, (N,), between dense logits: every id is kept."""
    rows, vocabulary = teacher.shape
    case = with_logits(student, labels=torch.zeros(rows, dtype=torch.int64))
    return fused_linear_fusion_loss(
        **case,
        source_ids=torch.arange(vocabulary).expand(1, rows, vocabulary),
        source_logprobs=teacher.log_softmax(1)[None],
        ce_weight=torch.zeros(rows),
        kd_weight=torch.ones(rows),
        reduction="none",
        **options,
    )


def test_reverse_kl_is_forward_kl_with_the_two_exchanged():
    student, teacher = torch.randn(5, 11, dtype=torch.float64), torch.randn(5, 11, dtype=torch.float64)
    torch.testing.assert_close(
        distilled(student, teacher, divergence="reverse_kl"), distilled(teacher, student, divergence="forward_kl")
    )


def test_jsd_has_forward_and_reverse_kl_as_its_limits():
    student, teacher = torch.randn(5, 11, dtype=torch.float64), torch.randn(5, 11, dtype=torch.float64)
    for beta, limit in ((1e-6, "forward_kl"), (1 - 1e-6, "reverse_kl")):
        scaled = distilled(student, teacher, divergence="jsd", divergence_beta=beta) / min(beta, 1 - beta)
        torch.testing.assert_close(scaled, distilled(student, teacher, divergence=limit), rtol=1e-4, atol=1e-6)


# tvd has a corner there: its gradient is the sign of a rounding error.
@pytest.mark.parametrize("member", [m for m in FAMILY if m["divergence"] != "tvd"], ids=named)
def test_a_target_that_agrees_has_no_divergence_and_no_gradient(member):
    logits = torch.randn(6, 13, dtype=torch.float64, requires_grad=True)
    logprobs, ids = logits.detach().log_softmax(1).topk(4)
    if member["tail"] == "renormalize":
        logprobs, ids = (
            logits.detach().log_softmax(1).topk(13)
        )  # all of them: else the target's own tail is a difference
    loss = fused_linear_fusion_loss(
        **with_logits(logits, labels=torch.zeros(6, dtype=torch.int64)), source_ids=ids[None], source_logprobs=logprobs[None],
        ce_weight=torch.zeros(6), kd_weight=torch.ones(6), reduction="sum", **member,
    )  # fmt: skip
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-12


NEAR = [(d, beta) for d, beta in [*MEMBERS, ("skew_reverse_kl", 0.5)] if d != "tvd" and canonical(d, beta) == d]


def assert_accurate_near(apart, rows, divergence, beta, **options):
    """Checks the gradient of a divergence alone, from sources whose logits are about `apart` from the target's.

    Its large parts cancel. They must do so as well as autograd has them cancel in the dense formula of the same dtype.
    """
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(rows, 16, generator=g), torch.randn(50, 16, generator=g)
    logits = hidden.double() @ weight.double().T
    logprobs, ids = (logits + apart * torch.randn(logits.shape, generator=g)).log_softmax(1).topk(8)
    case = {
        "hidden": hidden, "weight": weight, "labels": torch.zeros(rows, dtype=torch.long), "source_ids": ids[None],
        "source_logprobs": logprobs.float()[None], "ce_weight": torch.zeros(rows), "kd_weight": torch.ones(rows),
        "divergence": divergence, "divergence_beta": beta,
    }  # fmt: skip
    true = run(fusion_loss_reference, case, upcast=torch.float64)["dhidden"]
    ours, dense = (
        (run(function, case, **of)["dhidden"].double() - true).norm()
        for function, of in ((fused_linear_fusion_loss, options), (fusion_loss_reference, {}))
    )
    assert ours <= 2 * dense + FLOOR[torch.float32] * true.norm()


@pytest.mark.parametrize("apart", [1.0, 0.01])
@pytest.mark.parametrize(("divergence", "beta"), NEAR)
def test_near_a_source_the_gradient_is_as_accurate_as_the_dense_formulas(monkeypatch, divergence, beta, apart):
    assert_accurate_near(apart, 96, divergence, beta)
    monkeypatch.setattr(RowLosses, "take", lambda *args: False)  # so that torch computes what the extension would
    assert_accurate_near(apart, 96, divergence, beta)


@pytest.mark.parametrize("member", FAMILY[:: len(FAMILY) // 6], ids=named)
def test_a_weight_of_one_is_a_choice(member):
    case = make_case()
    chosen = run(fused_linear_fusion_loss, case, **member)
    winner = chosen["winner"]
    assert winner.unique().numel() > 1
    weight = F.one_hot(winner, 3).T.float()
    del case["source_ce"]
    weighted = run(fused_linear_fusion_loss, case, source_weight=weight, **member)
    for name, value in chosen.items():
        torch.testing.assert_close(weighted[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("member", FAMILY[:: len(FAMILY) // 6], ids=named)
def test_equal_sources_mixed_are_one_source(member):
    case = make_case(S=1, B=1, dtype=torch.float64)
    del case["source_ce"]
    alone = run(fused_linear_fusion_loss, case, **member)
    for name in ("source_ids", "source_logprobs"):
        case[name] = case[name].expand(3, -1, -1)
    mixed = run(fused_linear_fusion_loss, case, source_weight=torch.tensor([[0.5], [0.2], [0.3]]).double(), **member)
    for name in alone.keys() - {"winner"}:
        torch.testing.assert_close(mixed[name], alone[name], msg=name)
    assert mixed["winner"].tolist() == [0]


def test_forward_kl_of_a_mixture_has_the_gradient_of_the_mixed_distribution():
    """With full supports Σ w_s KL(P_s ‖ Q) and KL(Σ w_s P_s ‖ Q) differ by a constant."""
    student = torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
    teachers = torch.randn(2, 5, 11, dtype=torch.float64).log_softmax(2)
    ids = torch.arange(11).expand(1, 5, 11)
    weight = torch.tensor([0.25, 0.75], dtype=torch.float64)
    options = {"ce_weight": torch.zeros(5), "kd_weight": torch.ones(5)}
    case = with_logits(student, labels=torch.zeros(5, dtype=torch.int64))
    mixed = fused_linear_fusion_loss(
        **case, source_ids=ids.expand(2, -1, -1), source_logprobs=teachers, source_weight=weight[:, None], **options
    )
    (of_mixture,) = torch.autograd.grad(mixed, student)
    mixture = (weight[:, None, None] * teachers.exp()).sum(0).log()
    (of_one,) = torch.autograd.grad(
        fused_linear_fusion_loss(**case, source_ids=ids, source_logprobs=mixture[None], **options), student
    )
    torch.testing.assert_close(of_mixture, of_one)


@pytest.mark.parametrize("tau", [0.5, 1.0, 100.0])
def test_softmax_weighs_the_sources_by_their_cross_entropy(tau):
    case = make_case(dtype=torch.float64)
    case["source_ce"][1, 2] = torch.nan
    case["source_ce"][:, 3] = torch.inf
    ours = assert_close_to_truth(case, combine="softmax", combine_temperature=tau)
    assert ours["winner"].tolist() == [*case["source_ce"].nan_to_num(9.0)[:, :3].argmin(0).tolist(), -1]
    weight = (-case["source_ce"].nan_to_num(torch.inf, posinf=torch.inf) / tau).softmax(0).nan_to_num(0.0)
    del case["source_ce"]
    by_hand = run(fused_linear_fusion_loss, case, source_weight=weight)
    for name, value in by_hand.items():
        torch.testing.assert_close(ours[name], value, msg=name, check_dtype=False)


def test_large_cross_entropies_keep_their_differences():
    case = make_case()
    case["source_ce"] = torch.tensor([[100000.01], [100000.02], [1e39]], dtype=torch.float64)
    case["cu_seqlens"] = None
    by_hand = torch.tensor([[1.0], [0.0], [-torch.inf]]).softmax(0)
    expected = run(fused_linear_fusion_loss, case | {"source_ce": None}, source_weight=by_hand)
    got = run(fused_linear_fusion_loss, case, combine="softmax", combine_temperature=0.01)
    torch.testing.assert_close(got["kd"], expected["kd"], rtol=1e-4, atol=1e-5)
    coldest = run(fused_linear_fusion_loss, case, combine="softmax", combine_temperature=1e-36)
    torch.testing.assert_close(coldest["loss"], run(fused_linear_fusion_loss, case)["loss"])


def test_the_weights_of_ignored_rows_are_not_read():
    case = mixed_case()
    before = fused_linear_fusion_loss(**case)
    case["source_weight"][:, case["labels"] == -100] = torch.nan
    assert torch.equal(fused_linear_fusion_loss(**case), before)


def test_what_a_source_of_weight_0_says_does_not_matter():
    case = mixed_case()
    before = run(fused_linear_fusion_loss, case)
    left_out = (case["source_weight"] == 0)[..., None].expand_as(case["source_ids"])
    case["source_logprobs"] = case["source_logprobs"].masked_fill(left_out, torch.nan)
    after = run(fused_linear_fusion_loss, case)
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def test_a_source_that_is_certain_costs_reverse_kl_the_floor_and_no_more():
    logits = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    loss = fused_linear_fusion_loss(
        **with_logits(logits, labels=torch.tensor([0])), source_ids=torch.tensor([[[1]]]), kd_weight=torch.ones(1),
        source_logprobs=torch.zeros(1, 1, 1, dtype=torch.float64), ce_weight=torch.zeros(1), divergence="reverse_kl",
    )  # fmt: skip
    floor = torch.tensor(1e-6, dtype=torch.float64)
    expected = 0.25 * torch.log(0.25 / (1 - floor)) + 0.75 * torch.log(0.75 / floor)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def dense_reverse_kl(logits, p):
    """Reverse KL of one row to p on the first ids and the rest in a bucket, as the docs have it."""
    kept = torch.as_tensor(p, dtype=torch.float64)
    q = logits.double().softmax(-1)[0]
    q = torch.cat([q[: len(kept)], q[len(kept) :].sum()[None]])
    full = torch.cat([kept, 1 - kept.sum()[None]])
    return (q * (q / full).log()).sum().item()


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(
    "impl", ["torch", pytest.param("triton", marks=pytest.mark.filterwarnings("ignore::RuntimeWarning"))]
)
@pytest.mark.parametrize(
    ("logprobs", "source_tail", "p"),
    [
        ([-2.0, -3.0], 1.0, [0.73105858e-6, 0.26894142e-6]),  # a tail of 1 leaves the entries the floor
        ([-2.0, -3.0], 0.0, [0.73105858 * (1 - 1e-6), 0.26894142 * (1 - 1e-6)]),
        ([-40.0, -40.0], None, [0.5e-6, 0.5e-6]),
        ([-13.0, -13.0], None, [2.2603294e-6, 2.2603294e-6]),  # kept mass that 1 - (1 - M) would have lost in fp32
        ([-0.5, -110.0], None, [0.60653066]),  # below 1e-30 an entry is outside
        ([-0.5, -800.0], None, [0.60653066]),
    ],
    ids=str,
)
def test_reverse_kl_is_finite_whatever_mass_is_where(impl, mixed, logprobs, source_tail, p):
    logits = torch.tensor([[0.3, -0.2, 0.1, 0.5]], requires_grad=True)
    case: dict[str, Any] = with_logits(logits, labels=torch.tensor([3])) | {
        "source_ids": torch.tensor([[[0, 1]]]), "source_logprobs": torch.tensor([[logprobs]]), "ce_weight": torch.zeros(1),
        "kd_weight": torch.ones(1), "divergence": "reverse_kl", "impl": impl,
    }  # fmt: skip
    if source_tail is not None:
        case["source_tail"] = torch.full((1, 1), source_tail)
    if mixed:
        case["source_weight"] = torch.ones(1, 1)
    loss = fused_linear_fusion_loss(**case)
    loss.backward()
    assert loss.item() == pytest.approx(dense_reverse_kl(logits.detach(), p), rel=2e-5)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad.sum().item() == pytest.approx(0, abs=1e-5)


def test_an_entry_of_probability_0_belongs_to_the_rest_of_reverse_kl():
    case = make_case(dtype=torch.float64)
    expected = assert_close_to_truth(case, divergence="reverse_kl")
    nothing = torch.full_like(case["source_ids"][..., :2], 3)
    ids, logprobs = case["source_ids"], case["source_logprobs"]
    free = (ids != 3).all(-1, keepdim=True)  # elsewhere it is merged into the entry that is there
    assert free.any()
    case["source_ids"] = torch.cat([ids, torch.where(free, nothing, -1)], -1)
    case["source_logprobs"] = torch.cat([logprobs, torch.full_like(logprobs[..., :2], -torch.inf)], -1)
    got = assert_close_to_truth(case, divergence="reverse_kl")
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=name)


# z-loss and label smoothing


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_label_smoothing_and_z_loss_are_those_of_the_dense_formula(smoothing, z_loss):
    options = {"label_smoothing": smoothing, "z_loss": z_loss}
    assert_close_to_truth(make_case(spread=2.0), chunk_size=8, temperature=1.5, softcap=5.0, **options)
    assert_close_to_truth(mixed_case(spread=2.0), divergence="jsd", logit_scale=0.5, **options)
    assert_as_accurate_as_reference(make_case(), **options)


def test_label_smoothing_is_torchs():
    logits = torch.randn(7, 9, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, -100, 4, 8, 8])
    ours = fused_linear_fusion_loss(**with_logits(logits, labels=labels), label_smoothing=0.2)
    theirs = F.cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits), strict=True):
        torch.testing.assert_close(a, b)


def test_the_statistic_of_cross_entropy_is_that_of_the_label_alone():
    plain = run(fused_linear_fusion_loss, make_case())
    smoothed = run(fused_linear_fusion_loss, make_case(), label_smoothing=0.3, z_loss=0.1)
    assert torch.equal(plain["ce"], smoothed["ce"])
    assert smoothed["loss"] != plain["loss"]


# On a GPU, or in Triton's interpreter


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
class TestTriton:
    ROWS = 8  # few, because a program takes a millisecond in the interpreter

    @pytest.mark.parametrize("member", SLOW_FAMILY, ids=named)
    def test_every_member_is_as_accurate_as_the_dense_formula(self, triton_check, member):
        triton_check(make_case(N=self.ROWS, B=2), scale=1.0, **member)

    @pytest.mark.parametrize(("divergence", "beta"), NEAR)
    def test_near_a_source_the_gradient_is_as_accurate_as_the_dense_formulas(self, device, divergence, beta):
        assert_accurate_near(0.01, 12, divergence, beta, impl="triton", device=device)

    @pytest.mark.parametrize("member", SLOW_FAMILY, ids=named)
    def test_every_member_of_mixed_sources_is_as_accurate(self, triton_check, member):
        triton_check(mixed_case(N=self.ROWS, B=2, spread=2.0), scale=1.0, temperature=1.5, softcap=4.0, **member)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_mixed_sources_in_16_bits(self, triton_check, dtype):
        triton_check(mixed_case(dtype=dtype, N=self.ROWS, B=2), scale=1.0, divergence="jsd")

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    @pytest.mark.parametrize("z_loss", [0.0, 1e-2])
    def test_label_smoothing_and_z_loss(self, triton_check, smoothing, z_loss):
        options = {"label_smoothing": smoothing, "z_loss": z_loss}
        triton_check(make_case(N=self.ROWS, B=2), softcap=4.0, logit_scale=0.5, temperature=1.5, **options)
        triton_check(
            make_case(N=self.ROWS, B=2) | {"source_ids": None, "source_logprobs": None, "source_ce": None}, **options
        )

    def test_softmax_mixes(self, triton_check):
        case = make_case(N=self.ROWS, B=2)
        case["source_ce"][:, 1] = torch.nan
        triton_check(case, combine="softmax", combine_temperature=0.5)

    def test_a_column_that_cannot_be_makes_the_smoothed_loss_infinite_on_both_paths(self, triton_loss):
        case = make_case(N=self.ROWS, B=2)
        case["labels"] = case["labels"].clamp_max(50)
        case["bias"][60] = -torch.inf
        for result in (
            triton_loss(case, label_smoothing=0.1),
            run(fused_linear_fusion_loss, case, label_smoothing=0.1),
        ):
            assert result["loss"] == torch.inf

    @pytest.mark.parametrize(
        ("name", "value"),
        [("source_weight", -1.0), ("source_ids", 83), ("source_logprobs", float("nan")), ("labels", 83),
         *(pytest.param(*other, marks=pytest.mark.long)
           for other in (("source_weight", float("nan")), ("source_ids", -2), ("source_logprobs", 1.0)))],
    )  # fmt: skip
    def test_a_value_out_of_range_makes_its_row_nan_and_no_other(self, device, monkeypatch, name, value):
        monkeypatch.setattr(
            op_module, "check_values", lambda *arguments: None
        )  # as on a GPU, where values are not read
        case = on(device, mixed_case(N=self.ROWS, B=2, K=3), frozen=DIFFERENTIABLE)
        case["labels"] = case["labels"].clamp_min(0)
        case["source_weight"] += 0.1
        options = {"impl": "triton", "reduction": "none"}
        before = fused_linear_fusion_loss(**case, **options)
        at = (2,) if name == "labels" else (1, 2)
        case[name][at] = value
        after = fused_linear_fusion_loss(**case, **options)
        assert after[2].isnan()
        others = [0, 1, 3, 4, 5, 6, 7]
        assert torch.equal(after[others], before[others])


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "kl"}, "divergence must be one of"),
        ({"divergence": "jsd", "divergence_beta": 1.1}, r"divergence_beta must be in \[0, 1\]"),
        ({"divergence": "jsd", "divergence_beta": float("nan")}, r"divergence_beta must be in \[0, 1\]"),
        ({"divergence": "skew_kl", "divergence_beta": 1.0}, r"divergence_beta must be in \[0, 1\)"),
        ({"divergence": "reverse_kl", "tail": "renormalize"}, "infinite with tail='renormalize'"),
        ({"divergence": "jsd", "divergence_beta": 1.0, "tail": "renormalize"}, "at divergence_beta=1.0 is infinite"),
        ({"divergence": "skew_reverse_kl", "divergence_beta": 0.0, "tail": "renormalize"}, "is infinite"),
        ({"combine": "avg"}, "combine must be one of"),
        ({"combine": "softmax", "combine_temperature": 0.0}, "combine_temperature must be > 0"),
        ({"combine": "softmax", "source_ce": None, "source_index": torch.zeros(4, dtype=torch.int64)}, "needs source_ce"),
        ({"source_ce": None, "source_weight": torch.full((3, 4), 1e39, dtype=torch.float64)}, "source_weight must be >= 0 and finite"),
        ({"combine": "avg_ce"}, "FuseLLM's AvgCE is 'softmax'"),
        ({"partial_hidden_grad": True}, "partial_hidden_grad needs a head that is divided"),
        ({"z_loss": -1e-4}, "z_loss must be >= 0"),
        ({"z_loss": float("inf")}, "z_loss must be >= 0"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\)"),
        ({"source_weight": torch.ones(3, 4)}, "give one of source_ce, source_index, source_weight"),
        ({"source_ce": None, "source_weight": torch.ones(3)}, r"source_weight must be \(S, B\) or \(S, N\)"),
        ({"source_ce": None, "source_weight": torch.ones(2, 4)}, "with S=3"),
        ({"source_ce": None, "source_weight": torch.ones(3, 5)}, "source_weight must have B=4"),
        ({"source_ce": None, "source_weight": torch.ones(3, 4, dtype=torch.int64)}, "floating point"),
        ({"source_ce": None, "source_weight": -torch.ones(3, 4)}, "source_weight must be >= 0 and finite, got -1"),
        ({"source_ce": None, "source_weight": torch.full((3, 4), torch.nan)}, "source_weight must be >= 0 and finite"),
        ({"tail": "conditional", "source_tail": torch.zeros(3, 37)}, "source_tail needs tail='bucket'"),
        ({"source_ce": None, "source_weight": torch.ones(3, 4, requires_grad=True)}, "must not require grad"),
    ],
)  # fmt: skip
def test_wrong_options_name_the_rule_the_value_and_the_fix(options, message):
    with pytest.raises(ValueError, match=message):
        fused_linear_fusion_loss(**(make_case() | options))


def test_the_module_takes_every_option_and_checks_it():
    options = {
        "divergence": "jsd", "divergence_beta": 0.3, "combine": "softmax", "combine_temperature": 2.0,
        "z_loss": 1e-3, "label_smoothing": 0.1,
    }  # fmt: skip
    case = make_case()
    expected = fused_linear_fusion_loss(**case, **options)
    assert torch.equal(FusedLinearFusionLoss(**options)(**case), expected)
    torch.testing.assert_close(expected, fusion_loss_reference(**case, **options))
    with pytest.raises(ValueError, match="divergence_beta"):
        FusedLinearFusionLoss(divergence="jsd", divergence_beta=2)
