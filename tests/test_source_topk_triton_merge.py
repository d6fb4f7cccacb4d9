"""Tokens that count for other ids, as a source's for the target's: the Triton path adds their mass before it ranks them."""

import math
from typing import Any

import pytest
import torch
from topk_triton_checks import (
    MARKS,
    NAMES,
    assert_as_accurate_as_fp32,
    check_hidden,
    check_logits,
    make_case,
    make_ranges,
    on,
    random_logits,
)

from profuser.kernels.common import IGNORE_INDEX
from profuser.kernels.reference import logits_topk_reference
from profuser.kernels.source_topk import Ranges, source_topk_from_logits

triton = pytest.importorskip("triton", reason="Triton exists on Linux alone")

pytestmark = MARKS


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=pytest.mark.long), 2.0])
def test_mapped_ids_are_merged_and_ranked_again(device, impl, temperature):
    logits, labels = random_logits(2, 83, spread=1.5)
    g = torch.Generator().manual_seed(1)
    for top in (8, 400):
        vocab_map = torch.randint(-1, top, (83,), generator=g, dtype=torch.int32)
        ranges = make_ranges(2, 83, 4, seed=top)
        options: dict[str, Any] = {"vocab_map": vocab_map, "ranges": ranges, "temperature": temperature}
        ours = source_topk_from_logits(logits.to(device), labels.to(device), 12, impl=impl, **on(device, options))
        truth = logits_topk_reference(logits.double(), labels, 12, **options)
        assert_as_accurate_as_fp32(ours, truth, logits_topk_reference(logits, labels, 12, **options))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_vocabulary_map_gives_what_is_worked_out_by_hand(device, impl):
    """Tokens 0 to 4 have the masses 0.1, 0.2, 0.4, 0.2 and 0.1. 0 and 1 count for 7, 2 and 4 for 9, and 3 for nothing."""
    logits = torch.tensor([[0.1, 0.2, 0.4, 0.2, 0.1]]).log()
    vocab_map = torch.tensor([7, 7, 9, -1, 9])
    ids, logprobs, lse, _ = source_topk_from_logits(
        logits.to(device), torch.tensor([0], device=device), 4, vocab_map=vocab_map.to(device), impl=impl
    )
    assert ids.tolist() == [[9, 7, -1, -1]]
    torch.testing.assert_close(logprobs.exp().cpu(), torch.tensor([[0.5, 0.3, 0.0, 0.0]]))
    assert lse.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_merged_ties_go_to_the_lowest_id_and_nothing_stays_without_probability(device, impl):
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0, -math.inf, -math.inf]])
    vocab_map = torch.tensor([5, 3, 3, 5, 1, 0])
    ids, logprobs, *_ = source_topk_from_logits(
        logits.to(device), torch.tensor([0], device=device), 6, vocab_map=vocab_map.to(device), impl=impl
    )
    assert ids.tolist() == [[3, 5, -1, -1, -1, -1]]
    assert logprobs[0, 0] == logprobs[0, 1]
    assert (logprobs[0, 2:] == -math.inf).all()


def make_maps(ranges, V, seed=0) -> Ranges:
    """Maps that overlap for most of the ranges, with -1 and ids beyond the vocabulary in them; every third has none."""
    g = torch.Generator().manual_seed(seed)
    rows, lo, hi, order = ranges
    mapped = torch.randint(-1, 20, (2 * V,), generator=g)
    mapped[::7] += 100_000
    map_begin = (torch.rand(len(rows), generator=g) * (len(mapped) - (hi - lo) + 1)).long()
    map_begin[1] = 0  # of a single id
    map_begin[2::3] = -1
    return rows, lo, hi, order, map_begin, mapped


@pytest.mark.parametrize(
    ("V", "k"), [(83, 64), *(pytest.param(*both, marks=pytest.mark.long) for both in ((83, 4), (700, 10)))]
)
@pytest.mark.parametrize(
    ("temperature", "vocabulary_too"),
    [
        (2.5, True),
        *(pytest.param(*both, marks=pytest.mark.long) for both in ((1.0, False), (1.0, True), (2.5, False))),
    ],
)
def test_merged_ranges_are_as_accurate_as_the_dense_reference(device, V, k, temperature, vocabulary_too):
    logits, labels = random_logits(3, V, spread=1.5)
    options: dict[str, Any] = {"ranges": make_maps(make_ranges(3, V, 6), V)}
    if vocabulary_too:
        options["vocab_map"] = torch.randint(-1, V // 2, (V,), generator=torch.Generator().manual_seed(1))
    check_logits(device, logits, labels, k, temperature=temperature, **options)


@pytest.mark.parametrize("chunk_size", [2, *(pytest.param(size, marks=pytest.mark.long) for size in (1, None))])
def test_whole_vocabulary_maps_of_every_row_give_the_reference(device, chunk_size):
    """As alignment uses them: one range of every row over the whole order, with one of two maps, beside small ranges."""
    case = make_case(N=3, V=300) | {"bias": torch.randn(300, generator=torch.Generator().manual_seed(5))}
    g = torch.Generator().manual_seed(2)
    order = torch.randperm(300, generator=g)
    rows = torch.arange(3).repeat_interleave(2)
    small = torch.arange(6) % 2 == 1
    lo = torch.where(small, torch.randint(200, (6,), generator=g), 0)
    hi = torch.where(small, lo + 5, 300)
    map_begin = torch.where(small, -1, 300 * torch.randint(2, (6,), generator=g))
    ranges = rows, lo, hi, order, map_begin, torch.randint(-1, 20, (600,), generator=g)
    check_hidden(device, case, 10, chunk_size, ranges=ranges, softcap=20.0, logit_scale=0.7, temperature=1.3)


@pytest.mark.parametrize("sizes", [[1, 63, 64, 65], [255, 256, 257, 3], [1, 1300]], ids=str)
def test_segments_of_every_length_are_added(device, sizes):
    """The kernel has one way for segments of 64 tokens at most, and another one for longer ones."""
    V = sum(sizes)
    g = torch.Generator().manual_seed(V)
    vocab_map = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[torch.randperm(V, generator=g)]
    logits, labels = random_logits(2, V, spread=1.0)
    check_logits(device, logits, labels, len(sizes), vocab_map=vocab_map)


def test_many_long_segments_are_dealt_to_all_programs(device, monkeypatch):
    from profuser.kernels import source_topk_triton_merge

    monkeypatch.setattr(source_topk_triton_merge, "LONG", 2)
    monkeypatch.setattr(source_topk_triton_merge, "BLOCK", 16)
    logits, labels = random_logits(2, 300)
    vocab_map = torch.randint(-1, 40, (300,), generator=torch.Generator().manual_seed(0))
    check_logits(device, logits, labels, 16, vocab_map=vocab_map, ranges=make_maps(make_ranges(2, 300, 4), 300))


def test_more_rows_and_ranges_than_a_launch_takes(device, monkeypatch):
    from profuser.kernels import source_topk_triton_merge

    monkeypatch.setattr(source_topk_triton_merge, "MERGED_ROWS", 2)
    logits, labels = random_logits(5, 50)
    vocab_map = torch.arange(50) // 3
    for ranges in (make_ranges(5, 50, 5), make_maps(make_ranges(5, 50, 5), 50)):
        check_logits(device, logits, labels, 4, chunk_size=3, vocab_map=vocab_map, ranges=ranges)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_thousand_tokens_that_count_for_ten_ids_keep_all_of_their_mass(device, impl):
    """Numbers of three digits for a target of single digits: the ten most probable tokens alone hold a hundredth of the mass."""
    g = torch.Generator().manual_seed(0)
    logits = torch.full((2, 1100), -20.0)
    logits[:, 100:] = torch.randn(2, 1000, generator=g) * 0.01
    first_digit = torch.cat([torch.full((100,), -1), torch.arange(1000) // 100])
    whole = torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([1100, 1100]), torch.arange(1100)
    labels = torch.tensor([100 + 456, IGNORE_INDEX])
    options = on(device, {"vocab_map": first_digit, "ranges": (*whole, torch.tensor([0, 0]), first_digit)})
    found = source_topk_from_logits(logits.to(device), labels.to(device), 10, impl=impl, **options)
    ids, logprobs, _, ce, range_ids, range_logprobs, logmass = (x.cpu() for x in found)
    assert ids.sort(1).values.tolist() == [list(range(10))] * 2
    torch.testing.assert_close(logprobs.exp().sum(1), torch.ones(2), rtol=0, atol=1e-6)
    assert range_ids.sort(1).values.tolist() == [list(range(10))] * 2
    # The label's mass is left out of the merged entries. An ignored label has none.
    own = torch.tensor([math.exp(-ce[0]), 0.0])
    torch.testing.assert_close(range_logprobs.exp().sum(1), 1 - own, rtol=0, atol=2e-6)
    torch.testing.assert_close(logmass, torch.zeros(2), rtol=0, atol=2e-6)
    fours = range_logprobs[0][range_ids[0] == 4].exp()
    torch.testing.assert_close(fours, logprobs[0][ids[0] == 4].exp() - own[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_label_that_is_not_in_the_range_takes_nothing_from_it(device, impl):
    logits = torch.tensor([[0.1, 0.2, 0.4, 0.3]]).log()
    ranges = torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([3, 4]), torch.tensor([0, 1, 2, 3])
    options = on(device, {"ranges": (*ranges, torch.tensor([1, 0]), torch.tensor([5, 5, 6, 6]))})
    *_, ids, logprobs, logmass = source_topk_from_logits(
        logits.to(device), torch.tensor([3], device=device), 3, impl=impl, **options
    )
    # The first range holds tokens 0 to 2, the second one 1 to 3, of which 3 is the label and the only one that counts for 6.
    assert ids.tolist() == [[6, 5, -1], [5, -1, -1]]
    torch.testing.assert_close(logprobs.exp().cpu(), torch.tensor([[0.6, 0.1, 0.0], [0.6, 0.0, 0.0]]))
    torch.testing.assert_close(logmass.exp().cpu(), torch.tensor([0.7, 0.9]))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_masses_far_below_the_most_probable_token_are_not_lost(device, impl):
    """e^-200 is 0 in fp32."""
    logits = torch.tensor([[0.0, -200.0, -201.0, -202.0, -math.inf]])
    ranges = torch.tensor([0]), torch.tensor([1]), torch.tensor([5]), torch.arange(5)
    options = on(
        device,
        {
            "vocab_map": torch.tensor([3, 8, 7, 8, 9]),
            "ranges": (*ranges, torch.tensor([0]), torch.tensor([7, 8, 7, 9])),
        },
    )
    ids, logprobs, _, _, range_ids, range_logprobs, logmass = source_topk_from_logits(
        logits.to(device), torch.tensor([0], device=device), 4, impl=impl, **options
    )
    assert ids.tolist() == [[3, 8, 7, -1]]
    assert range_ids.tolist() == [[7, 8, -1, -1]]
    both = -200 + math.log1p(math.exp(-2))
    assert logprobs[0, :3].tolist() == pytest.approx([0.0, both, -201.0])
    assert range_logprobs[0, :2].tolist() == pytest.approx([both, -201.0])
    assert logmass.item() == pytest.approx(-200 + math.log(1 + math.exp(-1) + math.exp(-2)))


@pytest.mark.parametrize(
    "bad", [math.nan, *(pytest.param(bad, marks=pytest.mark.long) for bad in (math.inf, -math.inf))]
)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_row_without_values_has_no_merged_masses_and_spoils_no_other(device, bad, impl):
    """NaN or +inf at one token, or -inf at all."""
    logits, labels = random_logits(4, 90)
    logits[2, 17 if bad != -math.inf else slice(None)] = bad
    vocab_map = torch.randint(-1, 60, (90,), generator=torch.Generator().manual_seed(0))
    everywhere = torch.arange(4), torch.zeros(4, dtype=torch.long), torch.full((4,), 90), torch.arange(90)
    for begins in ([0, 3, 0, -1], [0, 0, -1, 3]):
        options: dict[str, Any] = {"vocab_map": vocab_map}
        options["ranges"] = (*everywhere, torch.tensor(begins), torch.arange(93) // 2)
        found = source_topk_from_logits(
            logits.to(device), labels.to(device), 10, impl=impl, chunk_size=3, **on(device, options)
        )
        good = torch.tensor([0, 1, 3])
        for name, ours, true in zip(
            NAMES, found, logits_topk_reference(logits.double(), labels, 10, **options), strict=True
        ):
            ours = ours.cpu()
            if name.endswith("ids"):
                assert torch.equal(ours[good].long(), true[good])
                assert (ours[2] == -1).all()
                continue
            torch.testing.assert_close(ours[good], true[good].float(), rtol=1e-5, atol=1e-5)
            assert ours[2].isnan().all() or (name in ("lse", "ce") and bad == -math.inf)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_merged_ties_go_to_the_lowest_id_among_thousands(device, impl):
    """With so many ids, groups of ids are chosen first."""
    g = torch.Generator().manual_seed(0)
    V = 1999
    logits = torch.randint(3, (3, V), generator=g).float()
    logits[1] = 0.0
    logits[2] = -math.inf
    logits[2, [5, 1990]] = 1.0
    vocab_map = torch.randperm(V, generator=g) + 7
    check_logits(device, logits, torch.zeros(3, dtype=torch.long), 12, vocab_map=vocab_map)
    ids, *_ = source_topk_from_logits(
        logits.to(device),
        torch.zeros(3, dtype=torch.long, device=device),
        12,
        vocab_map=vocab_map.to(device),
        impl=impl,
    )
    truth = logits_topk_reference(logits.double(), torch.zeros(3, dtype=torch.long), 12, vocab_map=vocab_map)
    assert torch.equal(ids.cpu().long(), truth[0])


def test_mapped_ranges_out_of_bounds_give_nothing_and_spoil_nothing_else(device):
    logits, labels = random_logits(3, 50)
    order = torch.arange(20, 40)
    order[13] = 50
    rows = torch.tensor([0, -1, 3, 0, 0, 1, 2, 1, 2, 2, 2, 1])
    lo = torch.tensor([0, 0, 0, -1, 5, 0, 12, 2, 0, 0, 14, 4])
    hi = torch.tensor([5, 5, 5, 4, 4, 21, 14, 5, 5, 5, 20, 4])
    map_begin = torch.tensor([3, 0, 0, 0, 0, 0, 0, -2, 16, 2**40, 0, 0])
    mapped = torch.randint(-5, 6, (20,), generator=torch.Generator().manual_seed(0))
    found = source_topk_from_logits(
        logits.to(device),
        labels.to(device),
        4,
        impl="triton",
        chunk_size=2,
        **on(device, {"ranges": (rows, lo, hi, order, map_begin, mapped)}),
    )
    ids, logprobs, logmass = (x.cpu() for x in found[4:])
    good = torch.tensor([0, 10, 11])
    expected = torch.ones(12, dtype=torch.bool)
    expected[good] = False
    assert torch.equal(logmass.isnan(), expected)
    assert torch.equal(logprobs.isnan().all(1), expected)
    assert (ids[expected] == -1).all()
    by_row = good[rows[good].argsort(stable=True)]
    sound = rows[by_row], lo[by_row], hi[by_row], order, map_begin[by_row], mapped.clamp_min(-1)
    truth = logits_topk_reference(logits.double(), labels, 4, ranges=sound)
    assert torch.equal(ids[by_row].long(), truth[4])
    torch.testing.assert_close(logprobs[by_row], truth[5].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logmass[by_row], truth[6].float(), rtol=1e-5, atol=1e-5)


def test_bad_labels_leave_nothing_out(device):
    logits, _ = random_logits(3, 50)
    labels = torch.tensor([50, -(2**40), 2**40])
    everywhere = torch.arange(3), torch.zeros(3, dtype=torch.long), torch.full((3,), 50), torch.arange(50)
    options = {"ranges": (*everywhere, torch.zeros(3, dtype=torch.long), torch.arange(50) // 4)}
    found = source_topk_from_logits(logits.to(device), labels.to(device), 4, impl="triton", **on(device, options))
    truth = logits_topk_reference(logits.double(), torch.full((3,), IGNORE_INDEX), 4, **options)
    assert torch.equal(found[4].cpu().long(), truth[4])
    torch.testing.assert_close(found[5].cpu(), truth[5].float())
    torch.testing.assert_close(found[6].cpu(), truth[6].float(), rtol=0, atol=1e-6)
