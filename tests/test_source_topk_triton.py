"""The Triton path of `source_topk`, on a GPU if there is one, and otherwise in Triton's interpreter on the CPU."""

import math

import pytest
import torch
import torch.nn.functional as F
from new_tensors import NewTensors
from topk_triton_checks import (
    MARKS,
    check_hidden,
    check_logits,
    make_case,
    make_ranges,
    on,
    random_logits,
)

from profuser.kernels.common import IGNORE_INDEX
from profuser.kernels.reference import logits_topk_reference
from profuser.kernels.source_topk import source_topk, source_topk_from_logits

triton = pytest.importorskip("triton", reason="Triton exists on Linux alone")

pytestmark = MARKS


# V is below, at, one above, or ragged against GROUP = 16, its square, and BLOCK_V = 2048. k is below and above the number of
# groups.
SHAPES = [(1, 1), (7, 7), (16, 10), (83, 64), (128, 128), (257, 17), (1000, 64), (2048, 2), (2500, 10), (2500, 128)]


@pytest.mark.parametrize(("V", "k"), SHAPES)
@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=pytest.mark.long), 2.5])
def test_every_shape_is_as_accurate_as_the_dense_reference(device, V, k, temperature):
    logits, labels = random_logits(2, V)
    check_logits(device, logits, labels, k, temperature=temperature)


@pytest.mark.parametrize("k", [1, 10, *(pytest.param(k, marks=pytest.mark.long) for k in (2, 64, 128))])
def test_equal_logits_rank_by_ascending_id(device, k):
    g = torch.Generator().manual_seed(k)
    logits = torch.zeros(4, 1000)
    logits[0] = torch.randint(6, (1000,), generator=g).float()
    logits[1, ::3] = -0.0
    logits[2, torch.randperm(1000, generator=g)[:40]] = 2.0
    logits[3] = torch.where(torch.rand(1000, generator=g) < 0.9, -math.inf, -0.0)
    check_logits(device, logits, torch.zeros(4, dtype=torch.long), k, chunk_size=None)


@pytest.mark.parametrize("group", [1, 16, 256], ids=lambda g: f"one of every {g}")
def test_the_best_tokens_are_found_wherever_they_lie(device, group):
    """The k best tokens lie in k groups, or groups of groups, of which one is the last. So no selected group may be wrong."""
    V = 5120  # without padding, so that the last group of a row lies beside the first of the next
    logits, labels = random_logits(3, V, spread=0.1)
    g = torch.Generator().manual_seed(group)
    for row in logits:
        groups = torch.randperm(V // group - 1, generator=g)[:15]
        groups = torch.cat([groups, torch.tensor([V // group - 1])])
        row[groups * group + torch.randint(group, (16,), generator=g)] += 10
    check_logits(device, logits, labels, 16, chunk_size=None)


@pytest.mark.parametrize("count", [3, pytest.param(6, marks=pytest.mark.long)])
def test_random_coarse_logits_agree_exactly(device, count):
    g = torch.Generator().manual_seed(3)
    for seed in range(count):
        V, k, N = (int(torch.randint(1, top, (1,), generator=g)) for top in (700, 40, 4))
        logits, labels = random_logits(N, V, seed)
        logits = logits.round() if seed % 2 else logits
        logits[torch.rand(N, V, generator=g) < 0.2] = -math.inf
        logits[:, 0] = 0.5  # rows without a finite logit have a test of their own
        check_logits(device, logits, labels, min(k, V), ranges=make_ranges(N, V, 3, seed), temperature=1.0 + seed % 3)


def test_the_plain_interpreter_agrees(device):
    logits, labels = random_logits(2, 30)
    check_logits(device, logits, labels, 2)


def test_a_row_with_fewer_finite_logits_than_k_is_ranked_to_the_end(device):
    logits = torch.full((2, 300), -math.inf)
    logits[0, [280, 3, 17]] = torch.tensor([1.0, 1.0, 4.0])
    logits[1, 299] = -3e4
    check_logits(device, logits, torch.tensor([3, 0]), 10)


def test_a_row_without_a_finite_logit_spoils_no_other(device):
    logits, labels = random_logits(3, 40)
    logits[0] = -math.inf
    ids, logprobs, lse, ce = source_topk_from_logits(logits.to(device), labels.to(device), 4, impl="triton")
    assert ids[0].tolist() == [0, 1, 2, 3]
    assert lse[0] == -math.inf
    assert logprobs[0].isnan().all()
    assert ce[0].isnan()
    assert lse[1:].isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_logit_without_a_value_spoils_its_row_alone(device, bad, impl):
    logits, labels = random_logits(4, 300)
    logits[2, 17] = bad
    logits[1, 5] = bad  # the label of row 1 is ignored
    ranges = torch.tensor([0, 2]), torch.tensor([0, 0]), torch.tensor([9, 9]), torch.arange(30, 60)
    args = on(device, {"logits": logits, "labels": labels, "ranges": ranges})
    ids, logprobs, lse, ce, range_ids, range_logprobs, range_logmass = source_topk_from_logits(**args, k=10, impl=impl)
    assert ((ids >= 0) & (ids < 300)).all()
    assert lse.isnan().tolist() == [False, True, True, False]
    assert logprobs.isnan().all(1).tolist() == [False, True, True, False]
    assert ce.isnan().tolist() == [False, False, True, False]
    assert ce[1] == 0
    assert (range_ids < 0).all(1).tolist() == [False, True]
    assert range_logprobs.isnan().all(1).tolist() == [False, True]
    assert range_logmass.isnan().tolist() == [False, True]


@pytest.mark.parametrize("gap", [25.0, 80.0])
def test_a_small_cross_entropy_keeps_its_digits(device, gap):
    logits = torch.zeros(2, 100)
    logits[:, 4] = gap
    labels = torch.tensor([4, 5])
    *_, ce = source_topk_from_logits(logits.to(device), labels.to(device), 3, temperature=1.7, impl="triton")
    assert ce[0].item() == pytest.approx(99 * math.exp(-gap), rel=1e-5)
    assert ce[1].item() == pytest.approx(gap, rel=1e-6)


def test_cross_entropy_is_accurate_on_both_sides_of_one_half(device):
    """It is computed by log1p where the gold id has more than half of the mass."""
    logits = torch.zeros(9, 3)
    logits[:, 0] = torch.linspace(-2, 6, 9)
    *_, ce = source_topk_from_logits(
        logits.to(device), torch.zeros(9, dtype=torch.long, device=device), 1, impl="triton"
    )
    expected = F.cross_entropy(logits.double(), torch.zeros(9, dtype=torch.long), reduction="none")
    torch.testing.assert_close(ce.cpu().double(), expected, rtol=1e-6, atol=0)


def test_a_gold_token_without_probability_has_infinite_cross_entropy(device):
    logits = torch.zeros(2, 8)
    logits[0, 3], logits[1, 3] = -math.inf, -500.0
    *_, ce = source_topk_from_logits(logits.to(device), torch.tensor([3, 3], device=device), 2, impl="triton")
    assert ce[0] == math.inf
    assert ce[1].item() == pytest.approx(500 + math.log(7))


@pytest.mark.parametrize("scale", [20.0, 80.0])
def test_large_logits_cost_no_accuracy(device, scale):
    check_logits(device, *random_logits(4, 500, spread=scale), 10, temperature=0.7)


def test_bad_labels_give_nan_and_spoil_nothing_else(device):
    logits, _ = random_logits(5, 83)
    labels = torch.tensor([82, 83, -1, 2**40, IGNORE_INDEX])
    ids, logprobs, lse, ce = source_topk_from_logits(logits.to(device), labels.to(device), 3, impl="triton")
    assert ce.isnan().tolist() == [False, True, True, True, False]
    truth = logits_topk_reference(logits.double(), labels.clamp(0, 82), 3)
    assert torch.equal(ids.cpu().long(), truth[0])
    torch.testing.assert_close(logprobs.cpu(), truth[1].float())
    torch.testing.assert_close(lse.cpu(), truth[2].float())


def test_log_probabilities_do_not_depend_on_the_label(device):
    logits, labels = random_logits(3, 2100)
    first = source_topk_from_logits(logits.to(device), labels.to(device), 5, impl="triton")
    labels = (labels + 1000).clamp_min(0) % 2100
    second = source_topk_from_logits(logits.to(device), labels.to(device), 5, impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)], ids=str)
def test_hidden_states_may_have_every_dtype(device, dtype):
    check_hidden(device, make_case(dtype, N=3), 10, ranges=make_ranges(3, 83, 4))


@pytest.mark.parametrize("chunk_size", [pytest.param(1, marks=pytest.mark.long), 3, None])
def test_chunks_of_any_size_give_the_reference(device, chunk_size):
    check_hidden(device, make_case(V=300), 4, chunk_size, ranges=make_ranges(5, 300, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_may_have_half_precision(device, dtype):
    logits, labels = random_logits(3, 300)
    check_logits(device, logits.to(dtype), labels, 10)


@pytest.mark.parametrize("softcap", [None, 3.0, pytest.param(30.0, marks=pytest.mark.long)])
@pytest.mark.parametrize("logit_scale", [pytest.param(1.0, marks=pytest.mark.long), 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_softcap_scale_and_bias_are_those_of_the_reference(device, softcap, logit_scale, bias):
    case = make_case(N=3)
    if bias:
        case["bias"] = torch.randn(83, generator=torch.Generator().manual_seed(5))
    options = {"softcap": softcap, "logit_scale": logit_scale, "ranges": make_ranges(3, 83, 3), "temperature": 1.5}
    check_hidden(device, case, 7, **options)


def test_labels_and_bias_may_have_any_stride(device):
    case = on(device, make_case(N=3) | {"bias": torch.randn(83, generator=torch.Generator().manual_seed(5))})
    expected = source_topk(**case, k=7, impl="triton")
    for strided in (lambda x: torch.stack([x, x], 1)[:, 0], lambda x: x.repeat_interleave(2)[::2]):
        changed = case | {name: strided(case[name]) for name in ("labels", "bias")}
        for found, same in zip(source_topk(**changed, k=7, impl="triton"), expected, strict=True):
            assert torch.equal(found, same)


@pytest.mark.parametrize(("V", "k"), [(83, 4), (83, 64), (2500, 10)])
@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=pytest.mark.long), 2.5])
def test_ranges_are_as_accurate_as_the_dense_reference(device, V, k, temperature):
    logits, labels = random_logits(3, V)
    check_logits(device, logits, labels, k, ranges=make_ranges(3, V, 5), temperature=temperature)


def test_equal_logits_in_a_range_rank_by_its_order(device):
    g = torch.Generator().manual_seed(0)
    logits = torch.randint(3, (2, 1500), generator=g).float()
    logits[1] = -math.inf
    logits[1, 5] = 0.0
    order = torch.randperm(1500, generator=g)
    ranges = torch.tensor([0, 0, 1]), torch.tensor([0, 700, 0]), torch.tensor([1500, 1000, 1500]), order
    check_logits(device, logits, torch.zeros(2, dtype=torch.long), 10, ranges=ranges)


def test_without_ranges_or_without_rows_the_results_are_empty(device):
    logits, labels = (x.to(device) for x in random_logits(3, 50))
    none = torch.zeros(0, dtype=torch.long, device=device)
    found = source_topk_from_logits(logits, labels, 4, ranges=(none, none, none, none), impl="triton")
    assert [tuple(x.shape) for x in found[4:]] == [(0, 4), (0, 4), (0,)]
    found = source_topk_from_logits(logits[:0], labels[:0], 4, ranges=(none, none, none, none), impl="triton")
    assert [tuple(x.shape) for x in found] == [(0, 4), (0, 4), (0,), (0,), (0, 4), (0, 4), (0,)]


def test_ranges_out_of_bounds_give_nothing_and_spoil_nothing_else(device):
    logits, labels = random_logits(3, 50)
    order = torch.arange(20, 40)
    order[13] = 50
    rows = torch.tensor([0, -1, 3, 0, 0, 1, 2, 2])
    lo, hi = torch.tensor([[0, 0, 0, -1, 5, 0, 12, 14], [5, 5, 5, 4, 4, 21, 14, 20]])
    options = on(device, {"ranges": (rows, lo, hi, order)})
    *_, ids, logprobs, logmass = source_topk_from_logits(
        logits.to(device), labels.to(device), 4, impl="triton", chunk_size=2, **options
    )
    good = torch.tensor([0, 7])
    assert logmass.isnan().tolist() == [False, True, True, True, True, True, True, False]
    assert torch.equal(logprobs.isnan().all(1), logmass.isnan())
    assert (ids < 0).all(1).tolist() == logmass.isnan().tolist()
    sound = rows[good], lo[good], hi[good], order
    truth = logits_topk_reference(logits.double(), labels, 4, ranges=sound)
    assert torch.equal(ids.cpu()[good].long(), truth[4])
    torch.testing.assert_close(logmass.cpu()[good], truth[6].float())


def test_a_range_that_ends_beyond_the_order_gives_nothing_whatever_lies_there(device):
    """The order is the beginning of a longer tensor, in which ids of tokens follow."""
    logits, labels = (x.to(device) for x in random_logits(1, 50))
    rows, lo, hi = torch.tensor([[0], [2], [5]], device=device)
    order = torch.arange(8, device=device)[:4]
    *_, ids, logprobs, logmass = source_topk_from_logits(logits, labels, 2, ranges=(rows, lo, hi, order), impl="triton")
    assert ids.tolist() == [[-1, -1]]
    assert logprobs.isnan().all()
    assert logmass.isnan().all()


def test_logits_need_not_be_contiguous(device):
    wide, labels = random_logits(3, 300)
    for logits in (wide[:, 7:207], wide.t().contiguous().t(), wide[::2, :100]):
        check_logits(device, logits, labels[: len(logits)] % logits.shape[1], 10)
    # A single row of a larger tensor calls itself contiguous, whatever its stride is.
    check_logits(device, wide.as_strided((1, 40), (900, 1), 860), torch.tensor([3]), 5)


def test_no_tensor_is_larger_than_a_chunk_of_logits(device):
    case = on(device, make_case(N=6, D=4, V=300))
    with NewTensors() as new:
        source_topk(**case, k=3, chunk_size=2, temperature=2.0, impl="triton")
    assert max(new.sizes) <= 2 * 304
    case = on(device, make_case(N=3, D=4, V=300))
    everywhere = torch.arange(3), torch.zeros(3, dtype=torch.long), torch.full((3,), 300), torch.arange(300)
    maps = {"ranges": (*everywhere, torch.arange(3) % 2, torch.arange(302) // 3), "vocab_map": torch.arange(300) // 2}
    with NewTensors() as new:
        source_topk(**case, k=3, chunk_size=2, impl="triton", **on(device, maps))
    assert max(new.sizes) <= 2 * 304


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"impl": "cuda"}, "impl must be None, 'torch' or 'triton', got 'cuda'"),
        ({"k": 129}, "k <= 128 .*got k=129"),
        ({"hidden": torch.zeros(5, 12, dtype=torch.float64)}, "at most fp32, got k=5 and torch.float64"),
        ({"vocab_map": torch.zeros(84, dtype=torch.long)}, r"vocab_map must be \(150,\) integers, .*got \(84,\)"),
        ({"vocab_map": torch.zeros(150)}, "vocab_map must be .*got .*float32"),
        ({"vocab_map": torch.full((150,), -2), "impl": "torch"}, "vocab_map must be >= -1, got -2"),
    ],
)
def test_wrong_arguments_name_the_rule_the_value_and_the_fix(device, changes, message):
    case = make_case(V=150) | {"k": 5, "impl": "triton"} | changes
    with pytest.raises(ValueError, match=message):
        source_topk(**on(device, case))


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        ValueError, match="CUDA device, the tensors are on cpu; use impl=None, or set TRITON_INTERPRET=1"
    ):
        source_topk(**make_case(), k=5, impl="triton")
    source_topk(**make_case(), k=5)


@pytest.mark.gpu
def test_a_large_vocabulary_matches_torch_topk():
    g = torch.Generator("cuda").manual_seed(0)
    N, D, V, k = 4096, 2048, 128256, 64
    hidden = torch.randn(N, D, device="cuda", generator=g).bfloat16()
    weight = (torch.randn(V, D, device="cuda", generator=g) * 3 / D**0.5).bfloat16()
    labels = torch.randint(V, (N,), device="cuda", generator=g)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ids, logprobs, lse, ce = source_topk(hidden, weight, labels, k)
    # That is a chunk of fp32 logits and the maxima of its groups.
    assert torch.cuda.max_memory_allocated() - before < 1.2 * 2048 * V * 4
    for rows in torch.arange(N, device="cuda").split(512):
        logits = torch.mm(hidden[rows], weight.t(), out_dtype=torch.float32)
        values, _ = logits.topk(k)
        torch.testing.assert_close(logits.gather(1, ids[rows].long()), values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[rows], logits.logsumexp(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logprobs[rows], values - logits.logsumexp(1)[:, None], rtol=1e-5, atol=1e-5)
        expected = F.cross_entropy(logits, labels[rows], reduction="none")
        torch.testing.assert_close(ce[rows], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_more_than_two_to_the_31_logits_are_addressed_right():
    """In a chunk of logits as large as this, row offsets overflow int32."""
    N, V = 17000, 131072
    logits = torch.zeros(N, V, device="cuda", dtype=torch.bfloat16)
    columns = torch.arange(N, device="cuda") * 7 % V
    logits[torch.arange(N, device="cuda"), columns] = 20.0
    ids, _, lse, ce = source_topk_from_logits(logits, columns, 2, chunk_size=N)
    assert torch.equal(ids[:, 0].long(), columns)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(math.exp(20) + V - 1)))
    torch.testing.assert_close(ce, torch.full_like(ce, math.log1p((V - 1) * math.exp(-20))))


@pytest.mark.gpu
def test_the_gpu_is_never_waited_for():
    case = on("cuda", make_case(torch.bfloat16, N=300, D=64, V=5000))
    options = on("cuda", {"ranges": make_ranges(300, 5000, 50), "vocab_map": torch.arange(5000) // 2})
    source_topk(**case, k=10, **options)  # this call compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        source_topk(**case, k=10, chunk_size=128, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("change", [{"k": 129}, {"hidden": torch.zeros(5, 12, dtype=torch.float64)}], ids=str)
def test_what_triton_cannot_do_takes_the_torch_path(change):
    case = on("cuda", make_case(V=150) | {"k": 5} | change)
    for found, expected in zip(source_topk(**case), source_topk(**case, impl="torch"), strict=True):
        assert torch.equal(found, expected)
