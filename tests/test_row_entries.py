"""The sources' entries by the C++ extension are those of torch: equal ids, padding, tails, floors, odd numbers, any number of threads."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from profuser.kernels import kept, row_entries, rows
from profuser.kernels.divergences import ENTRY_FLOOR, TAIL_FLOOR
from profuser.kernels.tails import TailRule

pytestmark = pytest.mark.skipif(not rows.is_built(), reason="the C++ extension is not built")

NAMES = ("ids", "inside", "p", "log_p", "apart", "mass", "present")
ODD = (torch.nan, -torch.inf, torch.inf, -800.0, -1e31, 0.0, 5.0)


def assert_equal_settled(ids: Tensor, log_p: Tensor, tail: Tensor | None, labels: Tensor, rule: TailRule) -> None:
    expected = dict(zip(NAMES, kept.settled(ids, log_p, tail, labels, rule), strict=True))
    got = dict(zip(NAMES, row_entries.settle(ids, log_p, tail, labels, rule), strict=True))
    for of_one in (expected, got):  # a small tail is a difference, whose digits are those of rounding
        of_one["log_p"][..., -1].masked_fill_(of_one["p"][..., -1] < 1e-9, 0)
    for name, of_torch in expected.items():
        if of_torch.dtype == torch.float64 and name != "mass":
            of_torch = of_torch.float()
        assert_close(
            got[name], of_torch, rtol=1e-6, atol=1e-15, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


def drawn(seed: int) -> dict:
    """Entries of few different ids, so that many are equal, some of them padding, and a rule, all drawn by chance."""
    choose, g = random.Random(seed), torch.Generator().manual_seed(seed)
    n, W, K = choose.choice([0, 1, 37]), choose.choice([1, 1, 2, 3]), choose.choice([1, 2, 5, 20])
    vocabulary = choose.choice([1, 3, 9, 1000])
    ids = torch.randint(-1, vocabulary, (n, W, K), generator=g)
    ids[torch.rand(n, W, generator=g) < 0.1] = -1
    log_p = (torch.randn(n, W, K, generator=g) * choose.choice([0.1, 3.0, 200.0])).log_softmax(-1)
    log_p = log_p.to(choose.choice([torch.float16, torch.float32, torch.float64]))
    if choose.random() < 0.5:
        log_p[torch.rand(n, W, K, generator=g) < 0.05] = choose.choice(ODD)
    bucket = choose.random() < 0.6
    floors = choose.random() < 0.5
    return {
        "ids": ids,
        "log_p": log_p,
        "tail": torch.rand(n, W, generator=g).double() * 1.002 - 0.001 if bucket and choose.random() < 0.5 else None,
        "labels": torch.randint(0, vocabulary, (n,), generator=g, dtype=choose.choice([torch.int32, torch.int64])),
        "rule": TailRule(
            bucket=bucket,
            absent_tail=choose.choice([0.0, 1.0]),
            tail_floor=TAIL_FLOOR if floors else 0.0,
            entry_floor=ENTRY_FLOOR if floors else 0.0,
            vocabulary=vocabulary,
        ),
    }


@pytest.mark.parametrize(
    "seeds", [range(60), pytest.param(range(60, 3000), marks=pytest.mark.long)], ids=["60", "3000"]
)
def test_they_are_those_of_torch(seeds):
    for seed in seeds:
        assert_equal_settled(**drawn(seed))


def test_an_entry_below_the_floor_belongs_to_the_rest():
    ids, log_p = torch.tensor([[[4, 2]]]), torch.tensor([[[-1e-30, -80.0]]])
    rule = TailRule(bucket=True, absent_tail=1.0, tail_floor=TAIL_FLOOR, entry_floor=ENTRY_FLOOR, vocabulary=9)
    for settle in (kept.settled, row_entries.settle):
        got = dict(zip(NAMES, settle(ids, log_p, None, torch.tensor([4]), rule), strict=True))
        assert got["ids"].tolist() == [[-1, 4]]
        assert got["p"][0, 0].tolist() == pytest.approx([0, 1 - TAIL_FLOOR, TAIL_FLOOR])
        assert got["log_p"][0, 0, 0] == -torch.inf
        assert got["apart"].tolist() == [[False, False]]


def test_the_floor_is_about_what_the_tail_leaves_of_an_entry():
    ids, log_p = torch.tensor([[[4, 2]]]), torch.tensor([[[-1e-30, -65.0]]])  # e^-65 is above the floor by itself
    rule = TailRule(bucket=True, absent_tail=1.0, tail_floor=TAIL_FLOOR, entry_floor=ENTRY_FLOOR, vocabulary=9)
    for settle in (kept.settled, row_entries.settle):
        for tail, named in ((0.0, [2, 4]), (1.0, [-1, 4])):
            given = torch.tensor([[tail]], dtype=torch.float64)
            got = dict(zip(NAMES, settle(ids, log_p, given, torch.tensor([4]), rule), strict=True))
            assert got["ids"].tolist() == [named]


def test_a_tail_that_was_rounded_out_of_range_is_nothing_or_all():
    ids, log_p = torch.tensor([[[4, 2]]]), torch.tensor([[[-0.5, -2.0]]])
    rule = TailRule(bucket=True, absent_tail=1.0, tail_floor=0.0, entry_floor=0.0, vocabulary=9)
    for settle in (kept.settled, row_entries.settle):
        for tail, t in ((-5e-4, 0.0), (1.0005, 1.0)):
            given = torch.tensor([[tail]], dtype=torch.float64)
            got = dict(zip(NAMES, settle(ids, log_p, given, torch.tensor([4]), rule), strict=True))
            assert got["p"][0, 0, -1] == t
            assert got["p"].sum().item() == pytest.approx(1)


def test_a_tail_that_is_no_mass_is_out_of_range_where_there_is_a_source():
    tail, there = torch.tensor([[-0.01, 0.0, 1.0, 1.01, torch.nan]]), torch.ones(1, 5, dtype=torch.bool)
    assert kept.out_of_range(torch.ones(1, 5), tail, there).tolist() == [[True, False, False, True, True]]
    assert not kept.out_of_range(torch.ones(1, 5), tail, ~there).any()


def test_threads_change_nothing(monkeypatch):
    case = drawn(3) | {"ids": torch.randint(-1, 50, (3001, 2, 7)), "log_p": torch.randn(3001, 2, 7).log_softmax(-1)}
    case |= {"tail": None, "labels": torch.randint(0, 50, (3001,))}
    case["rule"] = case["rule"]._replace(vocabulary=50)
    alone = row_entries.settle(**case)
    for threads in (2, 5, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for got, expected in zip(row_entries.settle(**case), alone, strict=True):
            assert torch.equal(got, expected)


def test_what_does_not_fit_is_refused():
    extension: Any = rows._rows
    rule = drawn(2)["rule"]
    ids, log_p, labels = (
        torch.zeros(3, 1, 2, dtype=torch.int64),
        torch.zeros(3, 1, 2).double(),
        torch.zeros(3, dtype=torch.int64),
    )
    to = [
        torch.empty(3, 2, dtype=torch.int64),
        torch.empty(3, 1, 2, dtype=torch.bool),
        torch.empty(3, 1, 3),
        torch.empty(3, 1, 3),
    ]
    to += [torch.empty(3, 2, dtype=torch.bool), torch.empty(3, 1).double(), torch.empty(3, 1, dtype=torch.bool)]

    def call(ids=ids, log_p=log_p, tail=None, labels=labels, to=to):
        given = [x if x is None else x.numpy() for x in (ids, log_p, tail, labels)]
        extension.keep_entries(*given, *rule, tuple(x.numpy() for x in to), 1)

    call()
    for wrong in (
        {"ids": ids[0]},
        {"ids": ids[:2]},
        {"log_p": log_p[:, :, :1].contiguous()},
        {"tail": torch.zeros(2, 1).double()},
        {"labels": labels[:2]},
        *({"to": [*to[:i], to[i][:2], *to[i + 1 :]]} for i in range(len(to))),
    ):
        with pytest.raises((ValueError, TypeError)):
            call(**wrong)
