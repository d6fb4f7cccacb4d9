"""The comparison with Hugging Face's Trainer: both sides get the same rows, and the made-up store holds what was put into it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import ROOT
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import bench_trainer, trainer_steps
from benchmarks.synthetic_store import SETTINGS, SOURCES, TOP_K, demo_sequences, shard_of
from profuser.models.load import chat_format
from profuser.recipe.schema import SourceConfig
from profuser.store import layout
from profuser.store.store import Store
from profuser.train.targets import Targets


def tiny_model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=1200, **sizes))


def test_both_trainers_take_their_steps_in_turn_from_the_same_weights_on_the_same_rows(monkeypatch):
    monkeypatch.setattr(bench_trainer, "make_model", tiny_model)
    monkeypatch.setattr(bench_trainer, "STEPS", 3)
    monkeypatch.setitem(bench_trainer.SEQUENCES, "small", 6)
    found = bench_trainer.in_turn("small")  # it checks that the first cross-entropies are equal
    assert found["steps"] == 1
    assert 0 < found["filled"] <= 1
    assert len(found["ours_wall_ms"]) == len(found["theirs_cpu_ms"]) == 1
    ours, theirs = found["cross_entropy_of_first_step"]
    assert ours == pytest.approx(theirs, rel=1e-5)
    json.dumps(found)


def test_a_store_of_made_up_sequences_holds_each_of_them(tmp_path):
    chat = chat_format(SourceConfig(name="guardian", model="demo:guardian"))
    sequences = demo_sequences(chat, np.random.default_rng(0), 5, SOURCES)
    store = Store.build(tmp_path / "store", SETTINGS, {})
    store.put(layout.targets("train"), 0, shard_of(sequences, len(chat.token_bytes.pieces)), examples=5)
    store.finish()
    targets = Targets(Store.open(store.directory), "train")
    assert len(targets) == 5
    for number, made in enumerate(sequences):
        (read,) = targets[number]
        assert np.array_equal(read.label_mask, made.label_mask)
        assert read.winner == made.source_ce.argmin()
        assert len(read.row_position) == SOURCES * made.labels
        assert (np.diff(read.entry_offsets) == TOP_K).all()
        for name in (
            "input_ids",
            "source_ce",
            "row_position",
            "row_source",
            "entry_offsets",
            "entry_ids",
            "entry_logprobs",
        ):
            assert np.array_equal(getattr(read, name), getattr(made, name)), name


def test_the_steps_for_a_gpu_print_their_losses_and_then_the_share_of_the_loss(tmp_path, capsys):
    trainer_steps.measure(2, False, tmp_path)
    steps, share = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    assert len(steps["losses"]) == 2
    assert steps["tokens_per_second"] > 0
    assert 0 < share["share_of_loss"] < 1


@pytest.mark.parametrize("model", ["small", "medium", "smollm2"])
def test_the_page_says_what_the_result_says_which_is_within_its_bounds(model):
    """A fusion step takes at most 1.05 of the time of a plain one, with less memory."""
    result = json.loads((ROOT / f"benchmarks/results/bench_trainer_{model}.json").read_text())
    info = result["benchmarks"][0]["extra_info"]
    seconds = {side: np.median(info[f"{side}_cpu_ms"]) / 1e3 for side in ("ours", "theirs")}
    peak = info["peak_mib"]
    assert info["steps"] >= 10
    assert seconds["ours"] <= 1.05 * seconds["theirs"]
    assert peak["ours"] < peak["theirs"]
    page = (ROOT / "docs/results.md").read_text()
    for unit, digits, values in (("s", 2, seconds), ("MiB", 0, peak)):
        cells = [f"{values[side]:.{digits}f} {unit}" for side in ("ours", "theirs")]
        assert f"| {' | '.join(cells)} | {values['ours'] / values['theirs']:.2f} |" in page
