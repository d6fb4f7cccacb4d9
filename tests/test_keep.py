"""What `align.keep` leaves out of the targets is what no batch would have taken from them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args
from unittest import mock

import numpy as np
import pytest

from profuser.plan.plan import make_plan
from profuser.prepare.inputs import Inputs
from profuser.prepare.phases import prepare
from profuser.recipe.parse import Run
from profuser.recipe.schedule import Mode
from profuser.store.layout import winner_of
from profuser.store.store import Store
from profuser.train.collate import collate
from profuser.train.targets import Targets

WEIGHTS = dict.fromkeys(Mode, 1.0)


def keeping(run: Run, directory: Path, keep: Literal["winner", "all"], **optim) -> Run:
    recipe = replace(run.recipe, store=str(directory), align=replace(run.recipe.align, keep=keep))
    return replace(run, recipe=replace(recipe, optim=replace(recipe.optim, **optim)))


@pytest.fixture(scope="module")
def winners(prepared, tmp_path_factory) -> tuple[Run, Store]:
    """The prepared store with the winners' rows only."""
    _, run, store = prepared
    directory = tmp_path_factory.mktemp("winners") / "store"
    shutil.copytree(store.directory, directory)
    copy = Store.open(directory)
    copy._manifest["settings"]["targets"]["keep"] = "winner"
    copy._drop([name for name in copy.digests if name.startswith("targets/")])
    run = keeping(run, directory, "winner")
    with mock.patch("profuser.prepare.phases.gc.collect"):
        return run, prepare(run)


def test_the_winners_rows_make_the_same_batches(prepared, winners):
    whole, kept = (Targets(store, "train") for store in (prepared[2], winners[1]))
    assert len(whole) == len(kept)
    sequences = [[[s] for instruction in of for s in instruction] for of in (whole, kept)]
    batches = [collate(of, WEIGHTS, WEIGHTS, pad_id=0, top_k=10) for of in sequences]
    for name, array in batches[0].items():
        np.testing.assert_array_equal(batches[1][name], array)
    assert all(set(s.row_source) <= {s.winner} for (s,) in sequences[1])
    counted = [len(s.row_source) for (s,) in sequences[0]], [len(s.row_source) for (s,) in sequences[1]]
    assert sum(counted[1]) < 0.6 * sum(counted[0])


def test_the_summary_counts_the_rows_of_all_sources(prepared, winners):
    assert winners[1].summary["alignment"] == prepared[2].summary["alignment"]
    assert winners[1].summary["min_ce_wins"] == prepared[2].summary["min_ce_wins"]


def test_where_sources_are_mixed_the_rows_of_all_are_needed(prepared, winners):
    run, store = winners
    mixed = Inputs.open(keeping(run, store.directory, "winner", combine="avg_ce"))
    assert store.changes(mixed.settings()).targets == ["keep"]
    assert not prepared[2].changes(replace(mixed, store_dir=prepared[2].directory).settings())


def test_a_store_with_all_rows_serves_a_recipe_that_needs_the_winners(prepared):
    _, run, store = prepared
    inputs = Inputs.open(keeping(run, store.directory, "winner"))
    assert inputs.keep == "all"
    assert not store.changes(inputs.settings())


def test_a_new_store_holds_what_the_recipe_says(prepared, tmp_path):
    for keep in get_args(Literal["winner", "all"]):
        assert Inputs.open(keeping(prepared[1], tmp_path / "new", keep)).keep == keep


def test_the_plan_is_near_the_winners_targets(winners):
    run, store = winners
    plan = make_plan(run, processes=(1,), timed=False)  # which takes responses to be as long as ground truths
    assert plan.store["targets"] == pytest.approx(
        sum(total.bytes for total in store.totals() if total.folder == "targets"), rel=0.15
    )


@pytest.mark.parametrize(("ce", "winner"), [([2.0, 1.0, 1.0], 1), ([np.nan, np.inf, 3.0], 2), ([np.inf, np.nan], None)])
def test_the_winner_has_the_lowest_cross_entropy(ce, winner):
    assert winner_of(np.array(ce, np.float32)) == winner
