"""Batches from a store's shards: the winner is chosen before anything is padded, and workers change nothing."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from profuser.errors import DataError, ProfuserError
from profuser.fusion_model import FusionModel
from profuser.kernels.common import IGNORE_INDEX
from profuser.models.load import load_model
from profuser.recipe.schedule import Mode, Stage, plan
from profuser.recipe.schema import SourceConfig
from profuser.store import layout
from profuser.store.store import Store
from profuser.train.collate import collate
from profuser.train.steps import MicroBatch, Steps, load_steps
from profuser.train.targets import Targets

ONES = dict.fromkeys(Mode, 1.0)


@pytest.fixture(scope="module")
def targets(prepared):
    return Targets(prepared[2], "train")


@pytest.fixture(scope="module")
def steps(prepared, targets):
    recipe = prepared[1].recipe
    return Steps(targets, recipe.optim, plan(recipe, len(targets)), seed=3, pad_id=0)


def same(a: Mapping, b: Mapping) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(np.asarray(a[name]), np.asarray(b[name])) for name in a)


def test_a_batch_holds_the_winners_distributions_and_nothing_of_the_others(targets):
    sequences = [s for instruction in targets for s in instruction][:8]
    batch = collate([[s] for s in sequences], ONES, ONES, pad_id=0, top_k=targets.top_k)
    B, T, K = len(sequences), max(len(s.input_ids) for s in sequences), targets.top_k
    assert batch["source_ids"].shape == batch["source_logprobs"].shape == (1, B, T, K)
    assert len({s.winner for s in sequences}) > 1
    for b, s in enumerate(sequences):
        seen = np.zeros(T, bool)
        for r in np.flatnonzero(s.row_source == s.winner):
            t, part = s.row_position[r], slice(s.entry_offsets[r], s.entry_offsets[r + 1])
            n = part.stop - part.start
            seen[t] = True
            assert batch["source_ids"][0, b, t, :n].tolist() == s.entry_ids[part].tolist()
            assert batch["source_logprobs"][0, b, t, :n].tolist() == s.entry_logprobs[part].astype(np.float32).tolist()
            assert (batch["source_ids"][0, b, t, n:] == -1).all()
            assert batch["source_tail"][0, b, t] == s.row_tail[r]
        assert (batch["source_ids"][0, b, ~seen] == -1).all()
        assert (batch["source_tail"][0, b, ~seen] == 0).all()


def test_what_a_step_says_of_its_sequences(targets, steps):
    batch = steps.batch(0)
    lengths = [n for micro in batch.micro_batches for row in micro.lengths for n in row]
    assert (batch.tokens, batch.squares) == (sum(lengths), sum(n * n for n in lengths))
    assert [micro.entries for micro in batch.micro_batches] == [targets.top_k] * len(batch.micro_batches)
    mixed = MicroBatch({"source_ids": np.zeros((3, 2, 8, 5), np.int64)}, [], [])
    assert (mixed.entries, MicroBatch({}, [], []).entries) == (15, 0)
    rows = MicroBatch({}, [], [[2, 3], [4]])  # the first token of a row is not predicted
    assert rows.sequence_of_token().tolist() == [0, 1, 1, 1, 2, 2, 2, -1]


@pytest.mark.parametrize("mixing", [None, 1.0, 0.3])
def test_the_combined_sources_give_the_loss_that_all_sources_with_their_cross_entropies_give(prepared, targets, mixing):
    """A batch with every source's rows, which the loss itself combines, gives the same: where it chooses, bit for bit."""
    _, run, _ = prepared
    options: dict[str, Any] = {} if mixing is None else {"combine": "softmax", "combine_temperature": mixing}
    model = load_model(SourceConfig(name="g", model=f"demo:{run.recipe.target}"), torch.float32)
    model = FusionModel(model, divergence="jsd", **options)
    sequences = [s for instruction in targets for s in instruction][:6]
    batch = collate([[s] for s in sequences], ONES, ONES, pad_id=0, top_k=targets.top_k, mixing=mixing)
    S, shape = len(targets.sources), batch["source_ids"].shape[1:]
    dense = {
        "source_ids": np.full((S, *shape), -1, np.int32),
        "source_logprobs": np.zeros((S, *shape), np.float32),
        "source_tail": np.zeros((S, *shape[:2]), np.float32),
        "source_ce": np.stack([s.source_ce for s in sequences], 1),
    }
    for b, s in enumerate(sequences):
        for r, (t, source) in enumerate(zip(s.row_position, s.row_source)):
            part = slice(s.entry_offsets[r], s.entry_offsets[r + 1])
            n = part.stop - part.start
            dense["source_ids"][source, b, t, :n] = s.entry_ids[part]
            dense["source_logprobs"][source, b, t, :n] = s.entry_logprobs[part]
            dense["source_tail"][source, b, t] = s.row_tail[r]
    rest = {name: x for name, x in batch.items() if not name.startswith("source_")}
    losses = []
    for arrays in (batch, rest | dense):
        model.zero_grad()
        loss = model(**{name: torch.from_numpy(x) for name, x in arrays.items()}, reduction="sum")["loss"]
        loss.backward()
        losses.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    tolerance = 0 if mixing is None else 1e-5
    torch.testing.assert_close(*losses, rtol=tolerance, atol=tolerance)


def test_a_sequence_that_no_source_scored_has_no_distribution(targets):
    some = targets.sequence(0)
    for ce in (np.inf, np.nan):
        alone = replace(some, source_ce=np.full_like(some.source_ce, ce))
        batch = collate([[s] for s in [alone]], ONES, ONES, pad_id=0, top_k=targets.top_k)
        assert alone.winner is None
        assert (batch["source_ids"] == -1).all()


def test_the_first_of_equal_sources_wins_and_a_nan_does_not(targets):
    some = targets.sequence(0)
    for ce, winner in (([2.0, 1.0, 1.0], 1), ([np.nan, np.inf, 3.0], 2), ([0.5, 0.5, 0.5], 0)):
        assert replace(some, source_ce=np.array(ce, np.float32)).winner == winner


@pytest.mark.parametrize("mixing", [0.2, 1.0])
def test_mixed_sources_weigh_what_their_cross_entropies_say(targets, mixing):
    some = targets.sequence(0)
    for ce in ([2.0, 1.0, 1.5], [np.nan, 3.0, np.inf], [np.inf, np.nan, np.inf]):
        weights = replace(some, source_ce=np.array(ce, np.float32)).weights(mixing)
        unnormed = np.nan_to_num(np.exp(-np.array(ce) / mixing))
        np.testing.assert_allclose(weights, unnormed / max(unnormed.sum(), 1e-9), rtol=1e-6)


def test_without_kd_no_distribution_is_collated(targets):
    batch = collate([[s] for s in [targets.sequence(0)]], ONES, dict.fromkeys(Mode, 0.0), pad_id=0, top_k=targets.top_k)
    assert not [name for name in batch if name.startswith("source_")]


def test_a_step_with_sequences_of_one_mode_has_their_distributions(targets):
    """So it is in the first stage of the progressive schedule, in which a mode without sequences weighs 0."""
    some = next(s for instruction in targets for s in instruction if s.mode == Mode.INFERENCE and s.winner is not None)
    alone = {Mode.TRAINING: 0.0, Mode.INFERENCE: 1.0}
    batch = collate([[some]], ONES, alone, pad_id=0, top_k=targets.top_k)
    assert (batch["source_ids"] >= 0).any()
    assert same(batch, collate([[some]], ONES, ONES, pad_id=0, top_k=targets.top_k))


def test_padding_carries_no_label_and_labels_are_the_masked_tokens(targets):
    sequences = [targets.sequence(0), targets.sequence(1)]
    batch = collate([[s] for s in sequences], ONES, ONES, pad_id=7, top_k=targets.top_k)
    for b, s in enumerate(sequences):
        n = len(s.input_ids)
        assert (batch["input_ids"][b, n:] == 7).all()
        assert (batch["labels"][b, n:] == IGNORE_INDEX).all()
        assert batch["attention_mask"][b].sum() == n
        assert (batch["labels"][b, :n] == np.where(s.label_mask, s.input_ids.astype(int), IGNORE_INDEX)).all()


def test_targets_are_views_of_the_files_and_travel_to_another_process_without_them(targets):
    sequence = targets.sequence(3)
    assert not sequence.entry_ids.flags.owndata
    assert not sequence.entry_ids.flags.writeable
    blob = pickle.dumps(targets)
    assert len(blob) < 100_000
    again = pickle.loads(blob).sequence(3)
    assert np.array_equal(again.entry_logprobs, sequence.entry_logprobs)


def test_a_step_takes_each_instruction_once_an_epoch_in_an_order_of_its_seed(steps, targets):
    n, size = len(targets), steps.optim.batch_size
    taken = [i for step in range(2 * n // size) for i in steps.instructions(step)]
    assert sorted(taken[:n]) == sorted(taken[n : 2 * n]) == list(range(n))
    assert taken[:n] != taken[n : 2 * n]
    fresh = replace(steps)
    assert [fresh.instructions(step) for step in (2, 1, 0)] == [steps.instructions(step) for step in (2, 1, 0)]
    assert replace(steps, seed=4).instructions(0) != steps.instructions(0)


@pytest.mark.parametrize("world", [2, 3])
def test_the_ranks_share_a_step_and_make_as_many_passes(steps, world):
    whole = steps.batch(2)
    ranks = [replace(steps, world=world, rank=rank).batch(2) for rank in range(world)]
    assert len({len(rank.micro_batches) for rank in ranks}) == 1
    said = (whole.labels, whole.tokens, whole.squares)
    assert all((rank.labels, rank.tokens, rank.squares) == said for rank in ranks)
    sizes = [m.arrays["input_ids"].size for rank in ranks for m in rank.micro_batches]
    assert {rank.computed for rank in ranks} == {sum(sizes)}  # of all ranks, padding included

    def labels(batches) -> int:
        return sum(int((m.arrays["labels"] != IGNORE_INDEX).sum()) for batch in batches for m in batch.micro_batches)

    def weight(batches) -> float:
        arrays = [m.arrays for batch in batches for m in batch.micro_batches]
        return sum(float(a["ce_weight"][a["labels"] != IGNORE_INDEX].sum()) for a in arrays)

    assert labels(ranks) == labels([whole])
    # DDP averages the ranks' gradients, so that each rank's weights are `world` times as large.
    assert weight(ranks) / world == pytest.approx(weight([whole]), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_step_mixes_the_sources_as_the_recipe_says(steps, targets, temperature):
    optim = replace(steps.optim, combine="softmax", combine_temperature=temperature)
    (micro, *_) = replace(steps, optim=optim).batch(2).micro_batches
    of_sequence = [
        sequence.weights(temperature)
        for origin in micro.origins
        for sequence in targets[origin.example]
        if sequence.mode == origin.mode
    ]
    assert np.array_equal(micro.arrays["source_weight"][:, :, 0].T, np.array(of_sequence, np.float32))


def test_beta_is_the_weight_of_the_distributions_beside_that_of_the_labels(steps):
    stages = [replace(stage, beta=0.25) for stage in steps.stages]
    for micro in replace(steps, stages=stages).batch(2).micro_batches:
        assert np.array_equal(micro.arrays["kd_weight"], micro.arrays["ce_weight"] / 4)


def test_a_rank_without_a_sequence_of_its_own_makes_a_pass_with_nothing_to_learn(steps):
    lonely = replace(steps, optim=replace(steps.optim, batch_size=1), world=2, rank=1)
    (micro,) = lonely.batch(0).micro_batches
    assert (micro.arrays["labels"] == IGNORE_INDEX).all()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_give_the_same_steps_in_the_same_order(steps, workers):
    found = list(load_steps(steps, 1, workers=workers, pin_memory=False))
    assert len(found) == len(steps) - 1
    for step, batch in enumerate(found, start=1):
        expected = steps.batch(step)
        assert (batch.labels, batch.tokens) == (expected.labels, expected.tokens)
        for ours, theirs in zip(batch.micro_batches, expected.micro_batches, strict=True):
            assert ours.origins == theirs.origins
            assert same(ours.arrays, theirs.arrays)


def test_loading_steps_leaves_the_random_state_alone(steps):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(load_steps(steps, 0, workers=1, pin_memory=False))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_shard_is_one_error_and_not_a_workers_traceback(prepared, tmp_path, steps, workers):
    before = set(multiprocessing.active_children())  # such as what renders chat templates for others
    shutil.copytree(prepared[2].directory, tmp_path / "store")
    store = Store.open(tmp_path / "store")
    damaged = replace(steps, targets=Targets(store, "train"))
    path = store.directory / f"{layout.targets('train').shard(0)}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # the last byte belongs to the entries, so the index stays intact
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"^store shard .*sha256.*profuser\.prepare[^\n]*$") as error:
        list(load_steps(damaged, 0, workers=workers, pin_memory=False))
    assert error.traceback  # which holds on to where the error came through
    assert set(multiprocessing.active_children()) <= before  # one that is left would keep this process from ending


class Killed:
    """Steps whose worker is killed, as if from outside."""

    def __len__(self):
        return 2

    def __getitem__(self, step):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_was_killed_is_one_line():
    steps: Any = Killed()
    with pytest.raises(ProfuserError, match="data_workers: 0"):
        list(load_steps(steps, 0, workers=1, pin_memory=False))


def test_a_stage_knows_its_modes():
    stage = Stage(inference_weight=0.1, training_weight=0.0, beta=1.0, first=0, stop=1)
    assert stage.modes == [Mode.INFERENCE]
    assert (stage.weight(Mode.INFERENCE), stage.weight(Mode.TRAINING)) == (0.1, 0.0)


KILLED = """
import multiprocessing, os, signal
from profuser.train.steps import load_steps

class Large:
    def __len__(self):
        return 9

    def __getitem__(self, n):
        return bytes(1 << 20)  # more than a pipe holds

batches = load_steps(Large(), 0, workers=WORKERS, pin_memory=False)
next(batches)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.long), 2])
def test_workers_end_when_the_trainer_was_killed(workers):
    """Also while they hand over a batch, which nobody will take any more."""
    code = KILLED.replace("WORKERS", str(workers))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        children = [int(pid) for pid in process.stdout.readline().split()]
        process.wait(60)
    assert process.returncode == -signal.SIGKILL
    assert len(children) == workers
    deadline = time.monotonic() + 20
    while left := [pid for pid in children if works(pid)]:
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            pytest.fail(f"{len(left)} of {workers} workers are still there")
        time.sleep(0.1)


def works(process: int) -> bool:
    """Whether a process is there that has not ended. One that has may wait for somebody to ask how."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
