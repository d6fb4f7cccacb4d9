"""A source's top-k and cross-entropy agree with the dense reference, and equal logits have a fixed order."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from new_tensors import NewTensors

from profuser.kernels.common import IGNORE_INDEX
from profuser.kernels.reference import logits_topk_reference, source_topk_reference
from profuser.kernels.source_topk import Ranges, source_topk, source_topk_from_logits

NAMES = ("ids", "logprobs", "lse", "ce", "range_ids", "range_logprobs", "range_logmass")
FLOOR = 5e-7  # a few roundings of fp32, relative to the largest true entry


def make_case(dtype=torch.float32, N=37, D=20, V=83, spread=1.0, seed=0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(V, (N,), generator=g)
    labels[::5] = IGNORE_INDEX
    return {
        "hidden": (torch.randn(N, D, generator=g) * spread).to(dtype),
        "weight": (torch.randn(V, D, generator=g) / D**0.5).to(dtype),
        "labels": labels,
        "bias": torch.randn(V, generator=g).to(dtype),
    }


def upcast(case):
    return {k: v.double() if k in ("hidden", "weight", "bias") else v for k, v in case.items()}


def assert_as_accurate_as_reference(case, k, chunk_size=8, **options):
    truth = source_topk_reference(**upcast(case), k=k, **options)
    same_dtype = source_topk_reference(**case, k=k, **options)
    ours = source_topk(**case, k=k, chunk_size=chunk_size, **options)
    assert len(ours) == len(truth)
    for name, found, same, true in zip(NAMES, ours, same_dtype, truth):
        assert found.shape == true.shape, name
        assert found.dtype == (torch.int32 if name.endswith("ids") else torch.float32), name
        if name.endswith("ids"):
            assert torch.equal(found.long(), true)
            continue
        assert torch.equal(found.isfinite(), true.isfinite()), name  # a range may have fewer than k tokens
        found, same, true = (x[true.isfinite()].double() for x in (found, same, true))
        error = (found - true).abs().max().item()
        allowed = 2 * (same - true).abs().max().item() + FLOOR * true.abs().max().item()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 10, 83])
def test_top_k_is_as_accurate_as_the_dense_reference(dtype, temperature, k):
    assert_as_accurate_as_reference(make_case(dtype), k, temperature=temperature)


def make_ranges(N=37, V=83, R=60, seed=0) -> Ranges:
    """Ranges of every size over a shuffled vocabulary without its last ids.

    Among them are an empty range, one of a single id, and one of all ids.
    """
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(V - 3, generator=g)
    rows = torch.randint(N, (R,), generator=g).sort().values
    edges = torch.randint(len(order) + 1, (2, R), generator=g).sort(0).values
    edges[:, 0], edges[:, 1], edges[:, 2] = torch.tensor([5, 5]), torch.tensor([7, 8]), torch.tensor([0, len(order)])
    lo, hi = edges
    return rows, lo, hi, order


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 10, 83])
def test_ranges_are_as_accurate_as_the_dense_reference(dtype, temperature, k):
    assert_as_accurate_as_reference(make_case(dtype, spread=4.0), k, temperature=temperature, ranges=make_ranges())


def make_maps(ranges, V=83, top=12, seed=0) -> Ranges:
    """Two thirds of the ranges get maps of their own; the maps overlap, and hold -1 and ids far beyond the vocabulary."""
    g = torch.Generator().manual_seed(seed)
    rows, lo, hi, order = ranges
    mapped = torch.randint(-1, top, (2 * V,), generator=g)
    mapped[::7] += 100_000
    map_begin = (torch.rand(len(rows), generator=g) * (len(mapped) - (hi - lo) + 1)).long()
    map_begin[2::3] = -1
    return rows, lo, hi, order, map_begin, mapped


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=pytest.mark.long), 2.5])
@pytest.mark.parametrize("k", [pytest.param(1, marks=pytest.mark.long), 10, 83])
def test_merged_masses_are_as_accurate_as_the_dense_reference(dtype, temperature, k):
    """With a map of the vocabulary, with maps of ranges, and with both."""
    case = make_case(dtype, spread=2.0)
    vocab_map = torch.randint(-1, 30, (83,), generator=torch.Generator().manual_seed(1))
    for options in (
        {"vocab_map": vocab_map},
        {"vocab_map": vocab_map, "ranges": make_ranges()},
        {"ranges": make_maps(make_ranges())},
        {"ranges": make_maps(make_ranges()), "vocab_map": vocab_map},
    ):
        assert_as_accurate_as_reference(case, k, temperature=temperature, **options)


@pytest.mark.parametrize("chunk_size", [None, 1, 7, 37])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_whole_vocabulary_maps_of_every_row_give_the_reference(chunk_size, spread):
    """As alignment uses them: one range of every row over the whole order, with one of three maps, beside small ranges."""
    case = make_case(spread=spread)
    g = torch.Generator().manual_seed(2)
    order = torch.randperm(83, generator=g)
    rows = torch.arange(37).repeat_interleave(2)
    small = torch.arange(74) % 2 == 1
    lo = torch.where(small, torch.randint(70, (74,), generator=g), 0)
    hi = torch.where(small, lo + 5, 83)
    map_begin = torch.where(small, -1, 83 * torch.randint(3, (74,), generator=g))
    ranges = rows, lo, hi, order, map_begin, torch.randint(-1, 20, (3 * 83,), generator=g)
    assert_as_accurate_as_reference(case, 10, chunk_size, ranges=ranges)
    logits = (case["hidden"] @ case["weight"].T + case["bias"]).double()
    found = source_topk_from_logits(logits, case["labels"], 10, ranges=ranges, chunk_size=chunk_size)
    for ours, true in zip(found, logits_topk_reference(logits, case["labels"], 10, ranges=ranges), strict=True):
        torch.testing.assert_close(ours, true.to(ours.dtype))


@pytest.mark.parametrize("sizes", [[1, 63, 64, 65], [127, 128, 129], [4096, 4097], [1, 9000]], ids=str)
def test_sums_of_every_length_are_exact(sizes):
    """Sums are made of blocks of 64, of blocks of blocks, and so on. Each token is added once."""
    V = sum(sizes)
    g = torch.Generator().manual_seed(V)
    vocab_map = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[torch.randperm(V, generator=g)]
    logits = torch.randn(3, V, generator=g)
    ids, logprobs, *_ = source_topk_from_logits(
        logits, torch.zeros(3, dtype=torch.long), len(sizes), vocab_map=vocab_map
    )
    true_ids, true, *_ = logits_topk_reference(
        logits.double(), torch.zeros(3, dtype=torch.long), len(sizes), vocab_map=vocab_map
    )
    assert torch.equal(ids.long(), true_ids)
    torch.testing.assert_close(logprobs.double(), true, rtol=0, atol=1e-6)


def test_merged_masses_that_fp32_cannot_tell_from_0_have_their_logarithm():
    logits = torch.tensor([[0.0, -100.0, -200.0, 0.5]])
    ids, logprobs, *_ = source_topk_from_logits(
        logits.clone(), torch.tensor([0]), 3, vocab_map=torch.tensor([7, 8, 9, 7])
    )
    assert ids.tolist() == [[7, 8, 9]]
    torch.testing.assert_close(
        logprobs, torch.tensor([[0.0, -100.0, -200.0]]) - torch.tensor([0.0, 0.974077, 0.974077])
    )


def test_results_do_not_depend_on_the_chunk_or_the_other_rows():
    case = make_case()
    options: dict[str, Any] = {"vocab_map": torch.arange(83) // 3, "ranges": make_maps(make_ranges())}
    first = source_topk(**case, k=7, chunk_size=37, **options)
    logits = case["hidden"] @ case["weight"].T + case["bias"]
    once = source_topk_from_logits(logits, case["labels"], 7, chunk_size=37, **options)
    for chunk_size in (1, 5, 36):
        for found, same in zip(
            source_topk_from_logits(logits, case["labels"], 7, chunk_size=chunk_size, **options), once, strict=True
        ):
            assert torch.equal(found, same)
    assert all(
        torch.equal(a, b) for a, b in zip(first, source_topk(**case, k=7, chunk_size=37, **options), strict=True)
    )


def test_equal_logits_in_a_range_rank_by_its_order():
    order = torch.tensor([6, 2, 5, 0])
    *_, ids, _, logmass = source_topk_from_logits(
        torch.zeros(1, 8), torch.tensor([0]), 3, ranges=(torch.tensor([0]), torch.tensor([1]), torch.tensor([4]), order)
    )
    assert ids.tolist() == [[2, 5, 0]]
    assert logmass.item() == pytest.approx(math.log(3 / 8))


@pytest.mark.parametrize("V", [5, 83])  # the table of masses holds all tokens of a small vocabulary
def test_a_token_that_is_in_a_slice_twice_counts_twice(V):
    logits, labels = torch.randn(1, V, generator=torch.Generator().manual_seed(0)), torch.tensor([4])
    order, mapped = torch.tensor([4, 1, 4, 3]), torch.tensor([1, 2, 1, 3])
    ranges = torch.tensor([0]), torch.tensor([0]), torch.tensor([4]), order, torch.tensor([0]), mapped
    *_, logmass = source_topk_from_logits(logits.clone(), labels, 3, ranges=ranges)
    torch.testing.assert_close(logmass, logits.log_softmax(-1)[0, order].logsumexp(0, keepdim=True))


def test_without_ranges_their_results_are_empty():
    none = torch.zeros(0, dtype=torch.long)
    *_, ids, logprobs, logmass = source_topk(**make_case(), k=4, ranges=(none, none, none, torch.arange(83)))
    assert (ids.shape, logprobs.shape, logmass.shape) == ((0, 4), (0, 4), (0,))


def ranges_with(**changes):
    return tuple((dict(zip(("rows", "lo", "hi", "order"), make_ranges())) | changes).values())


def maps_with(**changes):
    names = ("rows", "lo", "hi", "order", "map_begin", "mapped")
    return tuple((dict(zip(names, make_maps(make_ranges()))) | changes).values())


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 7), (123, 17, 251), (64, 8, 128)])
@pytest.mark.parametrize("chunk_size", [None, 1, 50])
def test_ragged_shapes_and_chunks_give_the_reference(shape, chunk_size):
    N, D, V = shape
    case = make_case(torch.float64, N=N, D=D, V=V)
    truth = source_topk_reference(**case, k=min(3, V))
    for found, true in zip(source_topk(**case, k=min(3, V), chunk_size=chunk_size), truth, strict=True):
        torch.testing.assert_close(found, true.to(found.dtype))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("logit_scale", [1.0, 0.3])
def test_softcap_and_scale_are_those_of_the_reference(softcap, logit_scale):
    assert_as_accurate_as_reference(make_case(), 7, softcap=softcap, logit_scale=logit_scale, temperature=1.5)
    case = make_case() | {"bias": None}
    ours = source_topk(**case, k=7, softcap=softcap, logit_scale=logit_scale)
    expected = source_topk_reference(**case, k=7, softcap=softcap, logit_scale=logit_scale)
    for found, true in zip(ours, expected, strict=True):
        torch.testing.assert_close(found, true.to(found.dtype))


def test_log_probabilities_belong_to_the_whole_vocabulary():
    case = make_case()
    logits = case["hidden"] @ case["weight"].T + case["bias"]
    ids, logprobs, lse, ce = source_topk(**case, k=83, temperature=2.0)
    expected = (logits / 2).log_softmax(1)
    torch.testing.assert_close(logprobs, expected.gather(1, ids.long()))
    torch.testing.assert_close(logprobs.logsumexp(1), torch.zeros(37), rtol=0, atol=1e-6)
    torch.testing.assert_close(lse, (logits / 2).logsumexp(1))
    torch.testing.assert_close(ce, F.cross_entropy(logits, case["labels"], reduction="none"))


def test_ignored_rows_have_no_cross_entropy_but_a_top_k():
    case = make_case()
    ids, logprobs, _, ce = source_topk(**case, k=5)
    ignored = case["labels"] == IGNORE_INDEX
    assert not ce[ignored].any()
    assert (ce[~ignored] > 0).all()
    case["labels"] = torch.zeros_like(case["labels"])
    again = source_topk(**case, k=5)
    assert torch.equal(ids, again[0])
    assert torch.equal(logprobs, again[1])


def test_equal_logits_rank_by_ascending_id():
    logits = torch.zeros(4, 40)
    logits[1, 10:30] = 1.0
    logits[2, [35, 3, 17]] = 2.0
    logits[3, ::2] = -0.0
    labels = torch.zeros(4, dtype=torch.long)
    ids, _, _, _ = source_topk_from_logits(logits, labels, 5)
    assert ids.tolist() == [[0, 1, 2, 3, 4], [10, 11, 12, 13, 14], [3, 17, 35, 0, 1], [0, 1, 2, 3, 4]]
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(6, (200, 50), generator=generator).float()
    for k in (1, 7, 49, 50):
        ids, _, _, _ = source_topk_from_logits(coarse, torch.zeros(200, dtype=torch.long), k, chunk_size=64)
        assert torch.equal(ids.long(), coarse.sort(dim=1, descending=True, stable=True).indices[:, :k])


def test_equal_masses_of_different_groups_rank_by_ascending_id():
    """Token 86 is in the group with the largest mass, token 20 in another."""
    logits = torch.full((1, 200), -5.0).index_copy(1, torch.tensor([20, 85, 86]), torch.tensor([[1.0, 2.0, 1.0]]))
    ids, *_ = source_topk_from_logits(logits, torch.tensor([0]), 2, vocab_map=torch.arange(200))
    assert ids.tolist() == [[85, 20]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_give_the_same_as_hidden_states(dtype):
    case = make_case()
    logits = (case["hidden"] @ case["weight"].T + case["bias"]).to(dtype)
    before = logits.clone()
    identity = {"hidden": logits, "weight": torch.eye(83, dtype=dtype), "labels": case["labels"]}
    expected = source_topk_reference(**upcast(identity), k=6, temperature=1.7)
    for found, true in zip(
        source_topk_from_logits(logits, case["labels"], 6, temperature=1.7, chunk_size=8), expected, strict=True
    ):
        torch.testing.assert_close(found, true.to(found.dtype), rtol=1e-6, atol=1e-6)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("spread", [20.0, 80.0])
def test_large_logits_cost_no_accuracy(spread):
    assert_as_accurate_as_reference(make_case(spread=spread), 10)


def test_small_cross_entropy_keeps_its_digits():
    logits = torch.zeros(1, 100)
    logits[0, 4] = 25.0
    _, _, _, ce = source_topk_from_logits(logits, torch.tensor([4]), 3)
    assert ce.item() == pytest.approx(math.log1p(99 * math.exp(-25)), rel=1e-6)


def test_a_gold_token_without_probability_has_infinite_cross_entropy():
    logits = torch.zeros(2, 8)
    logits[0, 3] = -math.inf
    logits[1, 3] = -500.0
    _, _, _, ce = source_topk_from_logits(logits, torch.tensor([3, 3]), 2)
    assert ce[0] == math.inf
    assert ce[1].item() == pytest.approx(500 + math.log(7))


def test_no_graph_is_recorded():
    case = make_case()
    case["weight"].requires_grad_()
    assert not any(result.requires_grad for result in source_topk(**case, k=3))


def test_no_tensor_is_larger_than_a_chunk_of_logits():
    case = make_case(N=500, D=4, V=300)
    everywhere = torch.arange(500), torch.zeros(500, dtype=torch.long), torch.full((500,), 300), torch.arange(300)
    maps: dict[str, Any] = {
        "ranges": (*everywhere, torch.arange(500) % 3, torch.arange(302) // 3),
        "vocab_map": torch.arange(300) // 2,
    }
    for k, options in ((3, {}), (10, {}), (10, maps)):
        with NewTensors() as new:
            source_topk(**case, k=k, chunk_size=20, temperature=2.0, **options)
        assert max(new.sizes) <= max(20 * 300, 500 * k)


def test_without_rows_the_results_are_empty():
    case = make_case()
    case |= {"hidden": case["hidden"][:0], "labels": case["labels"][:0]}
    assert [tuple(result.shape) for result in source_topk(**case, k=4)] == [(0, 4), (0, 4), (0,), (0,)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, r"k must be in 1..83 .*got 0"),
        ({"k": 84}, r"k must be in 1..83 .*got 84"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"labels": torch.full((37,), 83)}, "labels must be in .*got 83"),
        ({"labels": torch.zeros(36, dtype=torch.long)}, r"labels must be \(N,\) with N=37"),
        ({"weight": torch.zeros(83, 19)}, r"weight must be \(V, D\)"),
        ({"chunk_size": 0}, "chunk_size must be >= 1"),
        ({"ranges": ranges_with(rows=torch.arange(59))}, r"rows \(R,\), lo \(R,\)"),
        ({"ranges": ranges_with(rows=torch.arange(60).flip(0) % 37)}, "ascending"),
        ({"ranges": ranges_with(rows=torch.full((60,), 37))}, r"row in \[0, 37\)"),
        ({"ranges": ranges_with(hi=torch.full((60,), 81))}, "hi <= 80, got row"),
        ({"ranges": ranges_with(lo=torch.full((60,), -1))}, "0 <= lo"),
        ({"ranges": ranges_with(order=torch.arange(84))}, "vocab_order must be < 83"),
        ({"ranges": ranges_with(lo=torch.zeros(60))}, "ranges must be integers"),
        ({"ranges": make_maps(make_ranges())[:5]}, "got 5 values"),
        ({"ranges": maps_with(map_begin=torch.zeros(59, dtype=torch.long))}, r"map_begin \(R,\) .*got .*\(59,\)"),
        ({"ranges": maps_with(map_begin=torch.zeros(60))}, "ranges must be integers"),
        ({"ranges": maps_with(map_begin=torch.full((60,), -2))}, "map_begin must be in -1..*got -2"),
        ({"ranges": maps_with(map_begin=torch.full((60,), 166))}, "map_begin must be in -1..* got 166"),
        (
            {"ranges": maps_with(map_begin=torch.zeros(60, dtype=torch.long), mapped=torch.arange(3))},
            "got 0; -1 stands",
        ),
        ({"ranges": maps_with(mapped=torch.full((166,), -2))}, "mapped must be >= -1, got -2"),
        ({"ranges": maps_with(mapped=torch.full((166,), 2**31))}, "mapped must be <= 2147483647"),
        ({"vocab_map": torch.full((83,), -2)}, "vocab_map must be >= -1, got -2"),
    ],
)
def test_wrong_arguments_name_the_rule_the_value_and_the_fix(changes, message):
    with pytest.raises(ValueError, match=message):
        source_topk(**(make_case() | {"k": 5} | changes))


def test_logits_with_a_batch_axis_are_refused():
    with pytest.raises(ValueError, match=r"logits must be \(N, V\)"):
        source_topk_from_logits(torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.long), 1)
