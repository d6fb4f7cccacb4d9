"""Packed passes hold every sequence once, within the budget, and change neither losses nor gradients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Phi3Config

from profuser.errors import ConfigError, NonFiniteError
from profuser.fusion_model import FusionModel
from profuser.kernels.common import IGNORE_INDEX
from profuser.models.attention import keeps_apart
from profuser.models.load import load_model
from profuser.models.packing import Layout, by_count, by_tokens, first_fit, shares, size_of, tokens_of
from profuser.recipe.schedule import Mode, Stage, plan
from profuser.recipe.schema import SourceConfig
from profuser.train.collate import collate
from profuser.train.losses import SequenceLosses, step_losses
from profuser.train.steps import StepBatch, Steps
from profuser.train.targets import Targets

ONES = dict.fromkeys(Mode, 1.0)
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    "initializer_range": 0.3, "max_position_embeddings": 16,
}  # fmt: skip
ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 16}


@pytest.fixture(scope="module")
def targets(prepared):
    return Targets(prepared[2], "train")


@pytest.fixture(scope="module")
def sequences(targets):
    return [s for instruction in targets for s in instruction]


def of_lengths(some, lengths):
    """Sequences of given lengths, of which only the tokens count."""
    return [replace(some, example=n, input_ids=np.zeros(length, np.int32)) for n, length in enumerate(lengths)]


def flat(passes):
    return sorted(sequence.example for one in passes for row in one for sequence in row)


# -- the division into rows, passes and ranks -------------------------------------------------------------------------


def test_a_sequence_goes_into_the_first_row_with_room(sequences):
    rows = first_fit(of_lengths(sequences[0], [7, 6, 4, 3, 3, 1]), 10)
    assert [[len(s.input_ids) for s in row] for row in rows] == [[7, 3], [6, 4], [3, 1]]


@pytest.mark.parametrize("layout", ["padded", "packed", "flat"])
@pytest.mark.parametrize("multiple", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(4))
def test_passes_hold_every_sequence_once_within_the_budget(sequences, layout: Layout, multiple, seed):
    rng = np.random.default_rng(seed)
    budget = 64
    lengths = rng.integers(1, budget + 1, rng.integers(1, 40)).tolist()
    passes = by_tokens(of_lengths(sequences[0], lengths), budget, layout, multiple)
    assert flat(passes) == list(range(len(lengths)))
    assert len(passes) % multiple == 0
    assert max(map(size_of, passes)) <= budget
    assert {len(row) for one in passes for row in one} == {1} or layout != "padded"
    assert max(map(len, passes)) <= 1 or layout != "flat"
    if multiple == 1:  # nothing is halved, so no two passes of flat rows fit together
        sizes = sorted(map(size_of, passes))
        assert layout != "flat" or len(sizes) < 2 or sizes[0] + sizes[1] > budget


def test_a_sequence_beyond_the_budget_has_a_pass_of_its_own(sequences):
    for layout in ("padded", "packed", "flat"):
        passes = by_tokens(of_lengths(sequences[0], [30, 3, 3]), 10, layout, 1)
        assert flat(passes) == [0, 1, 2]
        assert [len(s.input_ids) for s in passes[0][0]] == [30]
        assert all(size_of(one) <= 10 for one in passes[1:]) or layout == "packed"


@pytest.mark.parametrize(("low", "high"), [(1, 64), (33, 64), (34, 40), (60, 64)])
def test_packed_rows_are_well_filled_and_not_much_longer_than_the_longest_sequence(sequences, low, high):
    lengths = np.random.default_rng(0).integers(low, high + 1, 300).tolist()
    passes = by_tokens(of_lengths(sequences[0], lengths), 1024, "packed", 1)
    assert sum(lengths) / sum(map(size_of, passes)) > 0.9
    assert max(tokens_of(row) for one in passes for row in one) <= 4 * max(lengths)
    short = by_tokens(of_lengths(sequences[0], lengths), 100, "packed", 1)
    assert max(map(size_of, short)) <= 100


def test_a_step_without_sequences_has_no_passes():
    assert [by_tokens([], 1024, layout, 2) for layout in ("padded", "packed", "flat")] == [[], [], []]


def test_ranks_get_as_many_passes_and_about_as_many_tokens(sequences):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 65, 200).tolist()
    for layout in ("padded", "packed", "flat"):
        of_ranks = shares(by_tokens(of_lengths(sequences[0], lengths), 128, layout, 3), 3)
        assert len({len(passes) for passes in of_ranks}) == 1
        loads = [sum(tokens_of(row) for one in passes for row in one) for passes in of_ranks]
        assert max(loads) / min(loads) < 1.1
    of_ranks = shares(by_count(of_lengths(sequences[0], lengths), 12), 3)
    loads = [sum(tokens_of(row) for one in passes for row in one) for passes in of_ranks]
    assert max(loads) / min(loads) < 1.1


# -- a batch ----------------------------------------------------------------------------------------------------------


def test_a_packed_batch_says_of_each_sequence_what_a_batch_of_its_own_says(sequences, targets):
    some = sequences[:5]
    rows = [some[:3], some[3:4], some[4:]]
    packed = collate(rows, ONES, ONES, pad_id=7, top_k=targets.top_k, layout="packed")
    assert "attention_mask" not in packed
    for b, row in enumerate(rows):
        begin = 0
        for sequence in row:
            alone = collate([[sequence]], ONES, ONES, pad_id=7, top_k=targets.top_k)
            place = slice(begin, begin := begin + len(sequence.input_ids))
            for name in ("input_ids", "labels", "ce_weight", "kd_weight"):
                assert np.array_equal(packed[name][b, place], alone[name][0]), name
            for name in ("source_ids", "source_logprobs", "source_tail"):
                assert np.array_equal(packed[name][0, b, place], alone[name][0, 0]), name
            assert packed["position_ids"][b, place].tolist() == list(range(len(sequence.input_ids)))
        assert (packed["labels"][b, begin:] == IGNORE_INDEX).all()
        assert (packed["source_ids"][0, b, begin:] == -1).all()
        assert not packed["position_ids"][b, begin:].any()


def test_a_flat_batch_gives_the_bounds_of_its_sequences(sequences, targets):
    batch = collate([sequences[:3]], ONES, ONES, pad_id=7, top_k=targets.top_k, layout="flat")
    lengths = [len(s.input_ids) for s in sequences[:3]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, *np.cumsum(lengths).tolist()]
    assert int(batch["max_length_q"]) == int(batch["max_length_k"]) == max(lengths)


# -- exactness --------------------------------------------------------------------------------------------------------


def gradients(model, steps: Steps, world: int = 1, step: int = 3):
    """The gradients of an optimizer step, over all ranks, as one vector, and the sum of its losses by sequence."""
    model.zero_grad()
    by_sequence: dict[tuple[int, Mode], float] = {}
    for rank in range(world):
        for micro in replace(steps, world=world, rank=rank).batch(step).micro_batches:
            out = model(**micro.tensors(torch.device("cpu")), reduction="sum", return_stats=True)
            (out["loss"] / world).backward()
            of_token = micro.sequence_of_token()
            for number, origin in enumerate(micro.origins):
                key = origin.example, origin.mode
                by_sequence[key] = by_sequence.get(key, 0) + float((out["ce"] + out["kd"])[of_token == number].sum())
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), by_sequence


@pytest.fixture(scope="module")
def double(prepared):
    target = load_model(SourceConfig(name="g", model=f"demo:{prepared[1].recipe.target}"), torch.float64)
    return FusionModel(target, source_temperature=1.0)


def steps_of(prepared, targets, layout: Layout = "padded", **optim) -> Steps:
    recipe = prepared[1].recipe
    return Steps(targets, replace(recipe.optim, **optim), plan(recipe, len(targets)), seed=3, pad_id=0, layout=layout)


@pytest.fixture(scope="module")
def plain(prepared, targets, double):
    return gradients(double, steps_of(prepared, targets, micro_batch_size=100))


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("layout", "optim"),
    [
        ("padded", {"micro_batch_size": 1}),
        ("padded", {"micro_batch_size": 2}),
        ("padded", {"tokens_per_micro_batch": 300}),
        ("packed", {"tokens_per_micro_batch": 300}),
        ("packed", {"tokens_per_micro_batch": 2000}),
        ("flat", {"tokens_per_micro_batch": 300}),
        ("flat", {"tokens_per_micro_batch": 2000}),
    ],
)
def test_neither_packing_nor_accumulation_nor_ranks_change_a_steps_gradients(
    prepared, targets, double, plain, layout: Layout, optim, world
):
    """In fp64 they are equal to 1e-12 of their norm, and so is the loss of every single sequence."""
    found, losses = gradients(double, steps_of(prepared, targets, layout, **optim), world)
    assert (found - plain[0]).norm() <= 1e-12 * plain[0].norm()
    labelled = {key: value for key, value in losses.items() if key in plain[1]}
    assert labelled == pytest.approx(plain[1], rel=1e-6)  # the statistics are in fp32


def test_in_fp32_packing_is_as_near_to_fp64_as_padding_is(prepared, targets, plain):
    target = load_model(SourceConfig(name="g", model=f"demo:{prepared[1].recipe.target}"), torch.float32)
    model = FusionModel(target, source_temperature=1.0)

    def distance(layout: Layout, **optim) -> float:
        found, _ = gradients(model, steps_of(prepared, targets, layout, **optim))
        return float((found.double() - plain[0]).norm() / plain[0].norm())

    own = distance("padded", micro_batch_size=100)
    for layout, budget in (("packed", 300), ("packed", 2000), ("flat", 2000)):
        assert distance(layout, tokens_per_micro_batch=budget) <= 2 * own


def test_no_sequence_sees_another_one_of_its_row(sequences, targets, double):
    """Whatever its neighbours in the row are, the loss of a sequence is that of the sequence alone. The statistics are in fp32."""
    a, b, c, other = sequences[:4]
    longer = [replace(other, example=9), b, c]

    def of_middle(rows):
        batch = collate(rows, ONES, ONES, 0, targets.top_k, "packed")
        out = double(**{k: torch.from_numpy(x) for k, x in batch.items()}, reduction="sum", return_stats=True)
        begin = len(rows[0][0].input_ids)  # the first token of b is not predicted, so its losses begin here
        T = batch["input_ids"].shape[1]
        return (out["ce"] + out["kd"]).view(len(rows), T - 1)[0, begin : begin + len(b.input_ids) - 1]

    with torch.no_grad():
        expected = double(
            **{k: torch.from_numpy(x) for k, x in collate([[b]], ONES, ONES, 0, targets.top_k).items()},
            reduction="sum",
            return_stats=True,
        )
        for rows in ([[a, b, c]], [longer], [[a, b], [c]], [[a, b, c, other], [other]]):
            torch.testing.assert_close(of_middle(rows), expected["ce"] + expected["kd"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=16, vocab_size=64),
        LlamaConfig(**SIZES, rope_parameters=ROPE | {"rope_type": "dynamic", "factor": 4.0}),
        Phi3Config(
            **SIZES,
            original_max_position_embeddings=16,
            pad_token_id=0,
            rope_parameters=ROPE
            | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0},
        ),
    ],
    ids=["learned positions", "dynamic", "longrope"],
)
def test_padding_that_is_longer_than_the_models_positions_changes_nothing(sequences, config):
    """Sequences fit into 16 positions, but the padding behind the last of them is of 30 tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    rng = np.random.default_rng(0)
    rows = [
        [
            replace(
                sequences[0],
                input_ids=rng.integers(1, 64, length),
                label_mask=np.ones(length, bool),
            )
            for length in lengths
        ]
        for lengths in ([14, 15, 16], [1, 5, 9])
    ]
    zeros = dict.fromkeys(Mode, 0.0)
    batch = collate(rows, ONES, zeros, pad_id=0, top_k=1, layout="packed")
    assert batch["input_ids"].shape == (2, 45)
    fusion = FusionModel(model, beta=0.0)
    assert fusion.keeps_apart[False]

    def loss(batch):
        return float(fusion(**{k: torch.from_numpy(x) for k, x in batch.items()}, reduction="sum")["loss"].detach())

    alone = [loss(collate([[sequence]], ONES, zeros, pad_id=0, top_k=1)) for row in rows for sequence in row]
    assert loss(batch) == pytest.approx(sum(alone), rel=1e-6)


def test_a_model_whose_rows_must_all_begin_examples_at_the_same_places_is_not_packed(double, monkeypatch):
    """The probe has rows of different layouts: a model that reads the positions of the first row alone leaks."""
    assert keeps_apart(double.model, flattened=False)
    inner = type(double.model.base_model)
    forward = inner.forward

    def first_rows_positions(self, *args, position_ids, **inputs):
        return forward(self, *args, position_ids=position_ids[:1].expand_as(position_ids), **inputs)

    monkeypatch.setattr(inner, "forward", first_rows_positions)
    assert not keeps_apart(double.model, flattened=False)
    assert keeps_apart(double.model, flattened=True)


# -- the trainer ------------------------------------------------------------------------------------------------------


def test_a_non_finite_loss_in_a_packed_row_names_its_own_example(prepared, targets):
    micro = steps_of(prepared, targets, "packed", tokens_per_micro_batch=2000).batch(0).micro_batches[0]
    for number in range(len(micro.origins)):
        losses = SequenceLosses()
        ce = torch.zeros(len(micro.sequence_of_token()))
        losses.add(micro, ce, ce)
        of_token = micro.sequence_of_token() == number
        bad = ce.clone()
        bad[np.flatnonzero(of_token)[-1]] = float("nan")
        losses.add(micro, ce, bad)
        error = losses.not_finite(4)
        assert isinstance(error, NonFiniteError)
        origin = micro.origins[number]
        assert f"kd is not at step 5: training example {origin.example}, {origin.mode.key} mode" in str(error)
        sums = losses.by_mode()
        assert sums[1, 1 - origin.mode] == 0
        assert sums[1, origin.mode].isnan()


def test_the_loss_of_a_step_weighs_what_both_losses_of_a_mode_come_to():
    stage = Stage(inference_weight=0.1, training_weight=1.0, beta=0.5, first=0, stop=1)
    found = step_losses([8.0, 6.0, 4.0, 3.0], StepBatch([], {Mode.TRAINING: 4, Mode.INFERENCE: 2}, 6, 6, 36), stage)
    assert found == {
        "ce_training": 2, "kd_training": 1, "loss_training": 2.5, "ce_inference": 3, "kd_inference": 1.5, "loss_inference": 3.75,
        "loss": pytest.approx(2.5 + 0.375),
    }  # fmt: skip
    alone = step_losses([8.0, 0.0, 4.0, 0.0], StepBatch([], {Mode.TRAINING: 4, Mode.INFERENCE: 0}, 4, 4, 16), stage)
    assert alone == {"ce_training": 2, "kd_training": 1, "loss_training": 2.5, "loss": 2.5}


def test_the_trainer_says_how_it_packs_and_logs_the_padding(prepared, tmp_path, capsys, monkeypatch):
    _, run, store = prepared
    from test_train import trainer

    t = trainer(run, store, tmp_path / "packed", tokens_per_micro_batch=1024)
    assert t.layout == "packed"
    assert "sequences are packed into passes of 1,024 tokens" in capsys.readouterr().out
    monkeypatch.setattr("profuser.fusion_model.keeps_apart", lambda *_: False)
    t = trainer(run, store, tmp_path / "padded", tokens_per_micro_batch=1024)
    assert t.layout == "padded"
    assert "would let each see the one before it" in capsys.readouterr().out


def test_a_budget_must_hold_the_longest_sequence(prepared):
    recipe = prepared[1].recipe
    with pytest.raises(ConfigError, match=r"optim\.tokens_per_micro_batch must hold .* got 10; raise it"):
        replace(recipe, optim=replace(recipe.optim, tokens_per_micro_batch=10))
