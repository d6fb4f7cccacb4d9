"""Continuous batching: the answers of ordinary batches, nothing asked twice, an end at any moment, and no model that it gets wrong."""

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import small_run
from transformers import AutoConfig, AutoModelForCausalLM

from profuser.errors import ConfigError, ProfuserError
from profuser.models.continuation import Sampling, continuations
from profuser.models.load import chat_format, load_model
from profuser.prepare.continuous import ContinuousBatches
from profuser.prepare.engines import Asked, Source, answering
from profuser.prepare.phases import prepare
from profuser.prepare.responses import Response
from profuser.recipe.generation import GenerationConfig
from profuser.recipe.schema import SourceConfig
from profuser.store import layout
from profuser.store.unfinished import Unfinished
from profuser.text.fit import Verdict

SIZES = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT2 = {"vocab_size": 400, "n_embd": 32, "n_layer": 2, "n_head": 2}
ARCHITECTURES = {
    "llama": SIZES | {"intermediate_size": 48, "num_key_value_heads": 1},
    "gpt_neox": SIZES | {"intermediate_size": 48},
    "gpt2": GPT2,
    "gemma3_text": SIZES | {"intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8},
    "gptj": GPT2 | {"rotary_dim": 8},
    "mpt": {"vocab_size": 400, "d_model": 32, "n_layers": 2, "n_heads": 2},
    "stablelm": SIZES | {"intermediate_size": 48},
    "mamba": {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
}
END = 0


def random_model(architecture, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(architecture, **ARCHITECTURES[architecture]), dtype=dtype
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 3  # so that what it writes depends on what it reads
    return model


def batches(model, *, longest=320, sampling=None):
    return ContinuousBatches("source", model, ends=[END], at_once=2, longest=longest, sampling=sampling)


def prompts_of(lengths):
    return {
        number: [(7 * number + place * place) % 390 + 1 for place in range(length)]
        for number, length in enumerate(lengths)
    }


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gpt2", "gemma3_text"])
def test_it_writes_what_batches_write(architecture):
    model, prompts = random_model(architecture), prompts_of((5, 290, 30, 13))  # a page of the cache holds 256 tokens
    rooms = {0: 12, 1: 9, 2: 1, 3: 12}
    expected = continuations(model, list(prompts.values()), ends={END}, pad=END, rooms=list(rooms.values()))
    with batches(model) as continuous:
        for _ in range(2):  # it stays ready for further prompts, whose numbers may be the same
            assert dict(continuous.answers(prompts, rooms)) == dict(enumerate(expected))


def test_the_shortest_prompt_and_the_longest_that_is_not_too_long_are_tried(monkeypatch):
    """A model may go wrong behind a long prompt alone."""
    tried: list[Any] = []
    monkeypatch.setattr(ContinuousBatches, "_try", lambda self, prompts, rooms: tried.append((prompts, rooms)))
    monkeypatch.setattr(ContinuousBatches, "_start", lambda self, sampling: None)
    monkeypatch.setattr(ContinuousBatches, "_written", lambda self, prompts, rooms: iter(()))
    continuous = batches(None, longest=4000)
    prompts = {number: [7] * length for number, length in enumerate((5, 2, 3000, 9))}
    for _ in range(2):  # they are tried once
        assert list(continuous.answers(prompts, {0: 30, 1: 4, 2: 30, 3: 30})) == []
    assert tried == [({1: [7] * 2, 3: [7] * 9}, {1: 4, 3: 16})]


UNKNOWN = "source: generation.engine continuous must have a model that transformers' continuous batching knows, "


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ("gptj", UNKNOWN + "GPTJForCausalLM is none (its attention"),
        ("mpt", UNKNOWN + "MptForCausalLM is none (its attention"),
        ("mamba", UNKNOWN + "MambaForCausalLM is none ("),
        ("stablelm", "source: transformers' continuous batching has failed ("),
    ],
)
def test_a_model_that_it_gets_wrong_is_refused(architecture, said, capfd):
    """Also in a dtype whose rounding would hide it."""
    with batches(random_model(architecture, torch.bfloat16)) as continuous, pytest.raises(ConfigError) as error:
        list(continuous.answers(prompts_of((5, 9)), {0: 4, 1: 4}))
    assert str(error.value).startswith(said)
    assert str(error.value).endswith("set generation.engine: transformers")
    assert "Traceback" not in capfd.readouterr().err


def test_a_model_that_reads_other_positions_than_its_own_is_refused():
    model = random_model("llama")
    own = model.forward
    model.forward = lambda input_ids, **others: own(
        input_ids, **others | ({"position_ids": torch.zeros_like(input_ids)} if "position_ids" in others else {})
    )
    with (
        batches(model) as continuous,
        pytest.raises(ConfigError, match=r"for LlamaForCausalLM its log-probabilities are"),
    ):
        list(continuous.answers(prompts_of((5, 9)), {0: 4, 1: 4}))


def test_a_log_probability_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setattr(ContinuousBatches, "_start", lambda self, sampling, **options: None)
    monkeypatch.setattr(ContinuousBatches, "_written", lambda self, prompts, rooms: iter([(0, [7], [float("nan")])]))
    with pytest.raises(ConfigError, match="its log-probabilities are wrong by nan"):
        batches(random_model("gpt2"))._try({0: [5, 6]}, {0: 1})


def test_a_gpu_without_room_for_a_page_has_no_memory_left(monkeypatch):
    model = random_model("llama")

    def none_fits(*_):
        raise ValueError("Invalid values: max_batch_tokens = 8192, num_sectors = -3")

    monkeypatch.setattr(model, "init_continuous_batching", none_fits)
    with batches(model) as continuous, pytest.raises(torch.OutOfMemoryError, match="no page"):
        list(continuous.answers(prompts_of([5]), {0: 4}))


def test_it_ends_at_any_moment_and_leaves_the_model_as_it_was():
    model, threads = random_model("llama"), threading.active_count()
    attention = model.config._attn_implementation
    with batches(model) as continuous:
        next(iter(continuous.answers(prompts_of([8] * 12), dict.fromkeys(range(12), 200))))
    assert threading.active_count() == threads
    assert model.config._attn_implementation == attention


def test_an_engine_that_fails_on_the_way_is_one_line_and_lack_of_memory_stays_what_it_is():
    model = random_model("llama")
    with batches(model) as continuous:
        written = continuous.answers(prompts_of([8] * 6), dict.fromkeys(range(6), 50))
        next(written)
        model.forward = lambda **_: SimpleNamespace(logits=None)
        with pytest.raises(
            ProfuserError, match=r"source: transformers' continuous batching has failed \(.*\); set generation\.engine"
        ):
            list(written)
    model = random_model("llama")
    with batches(model) as continuous:
        written = continuous.answers(prompts_of([8] * 6), dict.fromkeys(range(6), 50))
        next(written)

        def no_memory(**_):
            raise torch.OutOfMemoryError("CUDA out of memory")

        model.forward = no_memory
        with pytest.raises(torch.OutOfMemoryError):
            list(written)


def test_sampling_follows_its_rule():
    model, prompts, rooms = (
        random_model("llama"),
        prompts_of([9] * 3) | {3: prompts_of([9])[0]},
        dict.fromkeys(range(4), 8),
    )
    with batches(model) as continuous:
        greedy = dict(continuous.answers(prompts, rooms))
    with batches(model, sampling=Sampling(1.0, 1e-6)) as continuous:  # of which the most probable token alone is left
        assert dict(continuous.answers(prompts, rooms)) == greedy
    with batches(model, sampling=Sampling(5.0, 1.0)) as continuous:
        sampled = dict(continuous.answers(prompts, rooms))
    assert sampled[0] != sampled[3]  # to the same prompt
    assert sampled != greedy


def guardian(**generation):
    config = SourceConfig(name="guardian", model="demo:guardian")
    said = GenerationConfig(engine="continuous", max_new_tokens=20, batch_size=3)
    return Source(config, replace(said, **generation), chat_format(config), 60, 0, torch.float32), load_model(
        config, torch.float32
    )


def test_what_is_kept_is_not_asked_for_again_and_a_prompt_without_room_gets_an_empty_response(tmp_path):
    source, model = guardian()
    prompts = ["What is the season of a vator?", "word " * 80, "Which color has a miwum?"]
    kept = Response("kept", True, Verdict.OK)
    with Unfinished(tmp_path, layout.responses("train", "guardian"), 0, "engine") as unfinished:
        unfinished.add((2, 0), ["kept", True, 0])  # as a file gives it
        with answering("continuous", source, model) as answer:
            found = answer(Asked("train", prompts, kept=unfinished))
        assert unfinished.results[0, 0] == list(found[0][0])
    assert found[0][0].finished
    assert found[1:] == [[Response("", True, Verdict.OK)], [kept]]


@pytest.mark.parametrize("ended", [[0, 1], [1]])
def test_what_is_sampled_after_an_end_is_no_copy_of_what_was_kept(tmp_path, ended):
    source, model = guardian(temperature=4.0, max_new_tokens=6, batch_size=4)

    def answers(kept=None):
        with answering("continuous", source, model) as answer:
            given = answer(Asked("train", ["Which color has a miwum?", "What is the season of a vator?"], 4, kept))
            return [[response.text for response in of_prompt] for of_prompt in given]

    first = answers()
    assert len(set(first[0])) == 4
    assert answers() == first
    with Unfinished(tmp_path, layout.responses("train", "guardian"), 0, "engine") as unfinished:
        for n in ended:
            unfinished.add((0, n), [first[0][n], True, 0])
        both = answers(unfinished)
    assert [both[0][n] for n in ended] == [first[0][n] for n in ended]
    assert len(set(both[0])) == 4


def test_a_store_is_that_of_transformers_but_for_the_name_of_the_engine(prepared, tmp_path):
    _, run, expected = prepared
    again = small_run(Path(tmp_path), "--generation.engine=continuous", f"--store={tmp_path / 'store'}")
    again = replace(again, recipe=replace(again.recipe, data=run.recipe.data))
    store = prepare(again)
    for kind in (layout.targets("train"), layout.responses("train", again.recipe.sources[0].name)):
        assert store.digest(kind) == expected.digest(kind)
