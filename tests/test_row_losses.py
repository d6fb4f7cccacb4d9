"""The loss by the C++ extension is that of torch: every option, every odd logit, any number of threads."""

import math
import random
from typing import Any

import pytest
import torch
from loss_checks import FLOOR, Case, make_case, run, with_logits
from test_divergences import FAMILY

from profuser.kernels import left_out, rows
from profuser.loss import fused_linear_fusion_loss

pytestmark = pytest.mark.skipif(rows._rows is None, reason="the C++ extension is not built")


def in_torch(case: Case, **options: Any) -> dict[str, torch.Tensor]:
    """The loss as it is where the extension is not built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "_rows", None)
        return run(fused_linear_fusion_loss, case, **options)


def drawn(seed: int) -> Case:
    """A case with options drawn by chance, whose vocabularies are no multiples of a vector and sometimes smaller than one."""
    choose, g = random.Random(seed), torch.Generator().manual_seed(seed)
    V = choose.choice([5, 16, 17, 83, 300, 1041])
    S, N = choose.choice([1, 3]), 37
    case = make_case(V=V, S=S, K=choose.choice([1, 4, 6]), spread=choose.choice([0.3, 1.0, 5.0]), seed=seed)
    case |= choose.choice(FAMILY)
    temperature = choose.choice([1.0, 1.0, 0.6, 2.5, "of each row"])
    if temperature == "of each row":
        temperature = torch.rand(N, generator=g) + 0.5
        temperature[::4] = 1.0
    case |= {"temperature": temperature, "label_smoothing": choose.choice([0.0, 0.0, 0.15])}
    case |= {"z_loss": choose.choice([0.0, 0.0, 1e-2]), "softcap": choose.choice([None, None, 4.0])}
    case |= {"logit_scale": choose.choice([1.0, 0.4])}
    if choose.random() < 0.4:
        case["source_weight"] = torch.rand(S, 4, generator=g) * (torch.rand(S, 4, generator=g) > 0.2)
        del case["source_ce"]
    elif choose.random() < 0.2:
        case |= {"source_ids": None, "source_logprobs": None, "source_ce": None}
        case = {name: value for name, value in case.items() if value is not None}
        for name in ("kd_weight", "tail", "divergence", "divergence_beta"):
            case.pop(name, None)
    return case


def assert_no_worse(case: Case, **options: Any) -> None:
    """Checks that the extension has no more than twice the error of torch in fp32, both against fp64."""
    truth = run(fused_linear_fusion_loss, case, upcast=torch.float64, chunk_size=8, **options)
    expected = in_torch(case, chunk_size=8, **options)
    got = run(fused_linear_fusion_loss, case, chunk_size=8, **options)
    assert got.keys() == truth.keys()
    for name, true in truth.items():
        assert got[name].dtype == expected[name].dtype
        scale = true.abs().max().item() if true.numel() else 0.0
        error, of_torch = (
            (x[name].double() - true).abs().max().item() if true.numel() else 0.0 for x in (got, expected)
        )
        assert error <= 2 * of_torch + 4 * FLOOR[torch.float32] * max(scale, 1e-3), name


@pytest.mark.parametrize("seed", [*range(60), *(pytest.param(s, marks=pytest.mark.long) for s in range(60, 1000))])
def test_options_drawn_by_chance(seed):
    assert_no_worse(drawn(seed))


@pytest.mark.parametrize("seed", [*range(12), *(pytest.param(s, marks=pytest.mark.long) for s in range(12, 200))])
def test_columns_are_left_out_alike(seed, monkeypatch):
    monkeypatch.setattr(left_out, "PAYS", 1.0)
    case = drawn(seed)
    if case["label_smoothing"]:  # which a softcap allows no columns to be left out with
        case["softcap"] = None
    exact = run(fused_linear_fusion_loss, case, chunk_size=8)
    got = run(fused_linear_fusion_loss, case, chunk_size=8, left_out=0.05)
    expected = in_torch(case, chunk_size=8, left_out=0.05)
    for name in ("loss", "ce", "kd", "target_mass"):
        assert torch.equal(got[name], exact[name])
    for name in ("left_out_share", "kept_share", "dhidden", "dweight", "dbias"):
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(got[name], expected[name], rtol=2e-4, atol=1e-5 * max(scale, 1e-3))


ODD = {
    "a column without probability": -math.inf, "a NaN": math.nan, "an infinite logit": math.inf, "an enormous one": 1e37,
    "the lowest": -3e38,
}  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
@pytest.mark.parametrize("at", ["gold", "kept", "neither"])
def test_odd_logits_are_those_of_fp64(value, at, temperature):
    column = {"gold": 3, "kept": 7, "neither": 11}[at]
    logits = torch.randn(21, generator=torch.Generator().manual_seed(0))
    logits[column] = value
    case: Case = {
        # The logits are a bias, because a product would turn one infinite logit into a row of NaN.
        "hidden": torch.zeros(1, 1),
        "weight": torch.zeros(21, 1),
        "bias": logits,
        "labels": torch.tensor([3]),
        "source_ids": torch.tensor([[[7, 3, 9, -1]]], dtype=torch.int32),
        "source_logprobs": torch.tensor([[[0.4, 0.3, 0.2, 0.0]]]).log(),
        "temperature": temperature,
    }
    got, truth = (run(fused_linear_fusion_loss, case, upcast=dtype) for dtype in (None, torch.float64))
    for name, x in truth.items():
        torch.testing.assert_close(
            got[name], x.to(got[name].dtype), rtol=1e-5, atol=1e-6, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_rows_without_anything_outside():
    """All columns are lifted, so that nothing is left for the dense part."""
    case = with_logits(
        torch.randn(3, 4),
        labels=torch.tensor([0, 1, 2]),
        source_ids=torch.arange(4, dtype=torch.int32).expand(1, 3, 4),
        source_logprobs=torch.randn(1, 3, 4).log_softmax(-1),
    )
    assert_no_worse(case)
    assert_no_worse(case, temperature=2.0, label_smoothing=0.1)


@pytest.mark.parametrize("threads", [2, 3, 64])
@pytest.mark.parametrize("share", [0.0, 0.02])
def test_the_number_of_threads_changes_no_loss(monkeypatch, threads, share):
    case = make_case(N=41, V=20_001, D=8, spread=5.0, temperature=1.5)
    one = run(fused_linear_fusion_loss, case, left_out=share)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    got = run(fused_linear_fusion_loss, case, left_out=share)
    exact = [name for name in one if share == 0 or name in ("loss", "ce", "kd", "target_mass")]
    assert all(torch.equal(got[name], one[name]) for name in exact)
    for name in ("dhidden", "dweight"):
        torch.testing.assert_close(got[name], one[name], rtol=1e-4, atol=1e-6)


def test_what_does_not_fit_is_refused():
    extension: Any = rows._rows
    good = {
        "rows": torch.randn(3, 5), "gold": torch.tensor([0, 1, 4]),
        "entries": (
            torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 1, 2, dtype=torch.bool), torch.rand(3, 1, 3), torch.rand(3, 1, 3),
            torch.ones(3, 1), torch.ones(3, 2, dtype=torch.bool),
        ),
        "weight_ce": torch.ones(3), "weight_kd": torch.ones(3), "temperature": torch.ones(3, dtype=torch.float64),
        "losses": torch.empty(5, 3),
    }  # fmt: skip
    settings: Any = {
        "divergence": "forward_kl", "beta": 0.5, "conditional": False, "label_smoothing": 0.0, "z_loss": 0.0, "entropies": False,
        "gradient": True, "parts": None, "threads": 1,
    }  # fmt: skip

    def call(**changed: Any) -> None:
        given = good | changed
        entries = given["entries"]
        arrays: dict[str, Any] = {name: x.numpy() for name, x in given.items() if isinstance(x, torch.Tensor)}
        arrays["entries"] = tuple(x.numpy() for x in entries)
        extension.loss_rows(**arrays, **(settings | {k: v for k, v in changed.items() if k in settings}))

    call()
    for changed in (
        {"rows": torch.randn(3, 5).double()}, {"rows": torch.randn(5, 3).t()}, {"rows": torch.randn(4, 5)},
        {"gold": torch.tensor([0, 1, 5])}, {"gold": torch.tensor([0, -1, 1])}, {"gold": torch.tensor([0, 1])},
        {"losses": torch.empty(4, 3)}, {"losses": torch.empty(5, 2)}, {"weight_kd": torch.ones(2)}, {"divergence": "kl"},
        {"entries": (good["entries"][0] + 5, *good["entries"][1:])},
        {"entries": (*good["entries"][:2], torch.rand(3, 1, 2), *good["entries"][3:])},
        {"entries": (good["entries"][0][:2], *good["entries"][1:])},
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError)):
            call(**changed)
