"""Prompts that are answered side by side get the answers that they get one after the other."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from command_runs import run
from test_cool_fusion import PROMPTS, demo, random_voice  # noqa: F401  (demo is a fixture)
from test_follow_numbers import models
from transformers import AutoModelForCausalLM, LlamaConfig

from profuser.errors import ConfigError, DataError
from profuser.evaluate.contestants import Joint
from profuser.generate import asking
from profuser.generate.answers import answer_file, finished_rows, settings_key
from profuser.generate.asking import each, side_by_side
from profuser.generate.cool_fusion import CoolFusion
from profuser.generate.methods import METHODS
from profuser.generate.speaker import Speaker, Voice
from profuser.models.branches import Branches, fault_together, states_together
from profuser.models.head import head_of
from profuser.recipe.parse import parse_run
from profuser.recipe.places import resolve
from profuser.recipe.schema import DecodeConfig

NEAR = {"rtol": 1e-5, "atol": 1e-6}  # in fp64, but Gemma's norms compute in fp32
OF_MANY_LENGTHS = [*PROMPTS[:2], PROMPTS[3], "Hi", PROMPTS[0] + " Eve has 8 eggs, loses 4." * 4, PROMPTS[1]]


@pytest.mark.parametrize("batch_size", [3, *(pytest.param(n, marks=pytest.mark.long) for n in (2, 5, 16))])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "cool", "weights": [0.2, 3.0, 1.0], "max_segment_tokens": 2},
        pytest.param(
            {"method": "cool", "segment": "aligned", "rerank": True, "criterion": "mean_nll"},
            marks=pytest.mark.long,
            id="aligned",
        ),
        {"method": "gated", "gate": 0.5},
        {"method": "eva"},
        {"method": "mixture", "seed": 3},
    ],
    ids=lambda options: options["method"],
)
def test_every_prompt_gets_the_answer_that_it_gets_alone(demo, options, batch_size):  # noqa: F811
    voices = demo[1:] if options["method"] == "mixture" else demo
    fusion = METHODS[options["method"]](voices, DecodeConfig(**options), 7)
    found = list(fusion.answers(OF_MANY_LENGTHS, batch_size))
    for answer, expected in zip(found, map(fusion.answer, OF_MANY_LENGTHS), strict=True):
        assert (answer.text, answer.finished, answer.source) == (expected.text, expected.finished, expected.source)
        for step, of_expected in zip(answer.steps, expected.steps, strict=True):
            assert (step.won, step.left_out) == (of_expected.won, of_expected.left_out)
            for candidate, other in zip(step.candidates, of_expected.candidates, strict=True):
                assert (candidate.text, candidate.sources) == (other.text, other.sources)
                assert candidate.perplexities == pytest.approx(other.perplexities, rel=1e-3, nan_ok=True)


@pytest.mark.long
def test_two_hundred_prompts_of_the_demo(demo):  # noqa: F811
    with open(resolve("demo:heldout.jsonl"), encoding="utf-8") as file:
        prompts = [json.loads(line)["prompt"] for line in itertools.islice(file, 200)]
    fusion = CoolFusion(demo, DecodeConfig(), 40)
    assert [a.text for a in fusion.answers(prompts, 16)] == [fusion.answer(prompt).text for prompt in prompts]


@pytest.mark.long
@pytest.mark.parametrize("segment", ["shortest", "aligned"])
def test_random_models_with_real_tokenizers(segment):
    voices = [random_voice(name, seed) for seed, name in enumerate(("llama2", "qwen2"))]
    fusion = CoolFusion(voices, DecodeConfig(segment=segment, max_segment_tokens=6), 16)
    found = [answer.text for answer in fusion.answers(OF_MANY_LENGTHS, 4)]
    assert found == [fusion.answer(prompt).text for prompt in OF_MANY_LENGTHS]


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """How many texts were read in every call of a model."""
    found = []

    def counting(wanted):
        found.append(len(wanted))
        return states_together(wanted)

    monkeypatch.setattr(asking, "states_together", counting)
    return found


def test_prompts_in_step_need_the_forward_passes_of_one(demo, passes):  # noqa: F811
    fusion = CoolFusion(demo, DecodeConfig(), 8)
    fusion.answer(PROMPTS[0])
    of_one = len(passes)
    assert set(passes) == {1}
    passes.clear()
    list(fusion.answers([PROMPTS[0]] * 6, 6))
    assert passes == [6] * of_one


def test_no_more_prompts_than_asked_for_are_answered_at_a_time_and_ended_ones_make_room(demo, passes):  # noqa: F811
    fusion = CoolFusion(demo, DecodeConfig(), 8)
    list(fusion.answers(OF_MANY_LENGTHS, 3))
    assert max(passes) == 3
    # There are enough prompts to go on with three of them until near the end.
    assert sum(passes[: len(passes) // 2]) > 1.5 * (len(passes) // 2)


def test_two_sources_of_one_model_read_one_text_at_a_time_unless_several_are_asked_for(demo, passes):  # noqa: F811
    fusion = CoolFusion([demo[0]] * 2, DecodeConfig(), 8)
    fusion.answer(PROMPTS[0])
    list(fusion.answers(PROMPTS[:1], 4))
    assert set(passes) == {1}
    assert list(fusion.answers([], 4)) == []


# --- coroutines ------------------------------------------------------------------------------------------------------


async def value_of(n):
    return n


async def sums(n):
    return sum(await each(value_of(m) for m in range(n)))


@pytest.mark.parametrize("at_once", [1, 2, 9])
def test_results_come_in_order(at_once):
    assert list(side_by_side(map(sums, range(6)), at_once)) == [0, 0, 1, 3, 6, 10]


def test_an_error_ends_all_that_still_run(demo):  # noqa: F811
    ended = []

    async def waits(n):
        try:
            speaker = Speaker(demo[0], PROMPTS[0])
            for _ in range(3):
                await speaker.row()
                if n == 1:
                    raise DataError("one")
        finally:
            ended.append(n)

    with pytest.raises(DataError, match="one"):
        list(side_by_side(map(waits, range(9)), 3))
    assert sorted(ended) == [0, 1, 2]


# --- models ----------------------------------------------------------------------------------------------------------


def whole(model, ids):
    with torch.no_grad():
        return model.base_model(torch.tensor([list(ids)])).last_hidden_state[0]


@pytest.mark.parametrize("name", list(models()))
def test_texts_that_are_read_together_have_the_states_of_each_alone(name):
    """Some grow, some are cut and go on otherwise, some stay, while branches begin in all of them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(models()[name]).double().eval()
    first = [torch.randint(90, (size,)).tolist() for size in (20, 3, 11, 27)]
    assert fault_together(model, first) is None
    read = [Branches(model, ids, "") for ids in first]
    texts = [list(ids) for ids in first]
    for change in range(4):
        texts[change] += torch.randint(90, (change + 2,)).tolist()
        texts[change - 1] = [*texts[change - 1][: -change or None], *[7] * change]
        branches = [
            [(len(t), ()), (len(t), (3, 4)), (2, (1,)), (1, (t[1], 5, 6))][: 4 - change + n]
            for n, t in enumerate(texts)
        ]
        found = states_together(list(zip(read, texts, branches)))
        for text, ids, wanted, states in zip(read, texts, branches, found, strict=True):
            assert text.ids == tuple(ids)
            torch.testing.assert_close(text.hidden, whole(model, ids), **NEAR)
            for (cut, tokens), state in zip(wanted, states, strict=True):
                torch.testing.assert_close(state, whole(model, [*ids[:cut], *tokens])[-1], **NEAR)
    # A text can go on alone.
    read[2].become([*texts[2], 8])
    torch.testing.assert_close(read[2].hidden, whole(model, [*texts[2], 8]), **NEAR)


def test_more_tokens_than_are_computed_at_a_time():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(models()["llama"]).double().eval()
    texts = [torch.randint(90, (size,)).tolist() for size in (700, 300, 2)]
    read = [Branches(model, ids[:2], "") for ids in texts]
    states_together([(text, ids, [(len(ids), (4,))]) for text, ids in zip(read, texts)])
    for text, ids in zip(read, texts):
        torch.testing.assert_close(text.hidden, whole(model, ids), **NEAR)


def stretched(rows: int) -> LlamaConfig:
    """A model whose positions are stretched for a whole batch as soon as one of its texts is long."""
    return LlamaConfig(
        vocab_size=rows, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, initializer_range=0.5,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
        },
    )  # fmt: skip


def test_a_model_whose_texts_depend_on_each_other_is_found_out():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(stretched(90)).eval()
    short, long = torch.randint(90, (12,)).tolist(), torch.randint(90, (100,)).tolist()
    assert fault_together(model, [short, long[:40]]) is None
    assert "states differ" in (fault_together(model, [short, long]) or "")


def test_a_model_that_takes_no_such_mask_is_found_out():
    model = AutoModelForCausalLM.from_config(models()["llama"]).eval()
    forward = model.base_model.forward

    def refusing(*args, attention_mask=None, **options):
        if attention_mask is not None:
            raise ValueError("no mask")
        return forward(*args, **options)

    model.base_model.forward = refusing
    assert fault_together(model, [[1, 2, 3], [4, 5, 6, 7]]) == "it fails with ValueError"


def test_states_that_are_no_number_differ():
    model = AutoModelForCausalLM.from_config(models()["llama"]).eval()
    with torch.no_grad():
        model.base_model.embed_tokens.weight[7] = torch.nan
    assert "differ by nan" in (fault_together(model, [[1, 2, 7], [4, 5, 6, 7]]) or "")


def test_sources_that_cannot_read_several_prompts_answer_one_at_a_time_and_say_so(demo, caplog, passes):  # noqa: F811
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(stretched(len(demo[0].head.weight))).eval()
    voices = [demo[0], Voice("stretched", demo[0].chat, model, head_of(model))]
    fusion = CoolFusion(voices, DecodeConfig(max_segment_tokens=4), 40)
    found = list(fusion.answers(PROMPTS[:2], 2))
    assert set(passes) == {1}
    assert found == list(map(fusion.answer, PROMPTS[:2]))
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "prompts are answered one at a time: stretched cannot read several together, its states differ"
    )


def test_a_prompt_that_is_too_long_is_refused_before_any_is_answered(demo, passes):  # noqa: F811
    with pytest.raises(DataError, match="at most 512 tokens"):
        list(CoolFusion(demo, DecodeConfig(), 8).answers([PROMPTS[0], "word " * 600], 2))
    assert not passes


# --- files and the command -------------------------------------------------------------------------------------------


def test_rows_come_in_order_and_go_on_with_another_batch_size(demo, tmp_path):  # noqa: F811
    fusion = CoolFusion(demo, DecodeConfig(), 8)
    expected = [fusion.answer(prompt).text for prompt in OF_MANY_LENGTHS]
    output = tmp_path / "answers.jsonl"
    for row in answer_file(fusion, OF_MANY_LENGTHS, output, "key", 4):  # an interruption behind the second row
        if row[0] == OF_MANY_LENGTHS[1]:
            break
    assert finished_rows(output, OF_MANY_LENGTHS, "key") == 2
    assert [prompt for prompt, _ in answer_file(fusion, OF_MANY_LENGTHS, output, "key", 16)] == OF_MANY_LENGTHS[2:]
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == OF_MANY_LENGTHS
    assert [row["response"] for row in rows] == expected


def test_the_batch_size_is_no_part_of_the_settings():
    assert settings_key(parse_run("generate", []).recipe) == settings_key(
        parse_run("generate", ["--decode.batch_size=8"]).recipe
    )


def test_models_that_are_scored_together_answer_in_batches_and_are_the_same_contestant(passes):
    recipes = [
        parse_run("generate", [f"--decode.batch_size={n}", "--generation.max_new_tokens=4"]).recipe for n in (1, 3)
    ]
    alone, batched = (Joint("demo", recipe) for recipe in recipes)
    assert alone.identity == batched.identity
    answers = batched.load().answer(PROMPTS[:2], recipes[1].generation, max_length=512)
    assert max(passes) == 2
    assert answers == alone.load().answer(PROMPTS[:2], recipes[0].generation, max_length=512)


def test_the_command_answers_a_file_in_batches(tmp_path, passes):
    source, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS[:3]))
    code, out, err = run("generate", "--input", str(source), "--output", str(output), "--batch-size", "3",
                         "--generation.max_new_tokens=8")  # fmt: skip
    assert code == 0, err
    assert out.endswith(f"3 answers: {output}\n")
    assert max(passes) == 3
    assert len(output.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prompt", "a", "--batch-size", "2"], "--batch-size must go with --input"),
        (["--batch-size", "2"], "--batch-size must go with --input"),
        (["--input", "a", "--output", "b", "--batch-size", "0"], "decode.batch_size must be > 0"),
        (["--input", "a", "--output", "b", "--batch-size", "-3"], "decode.batch_size must be > 0"),
        (["--input", "a", "--output", "b", "--batch-size", "2.5"], "--batch-size"),
        (["--input", "a", "--output", "b", "--batch-size", "2", "--decode.batch_size", "3"], "either --batch-size or"),
    ],
)
def test_a_wrong_batch_size_is_one_line(tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("generate", *arguments)
    assert (code, out) == (2, "")
    assert says in err.splitlines()[-1]


def test_wrong_settings():
    with pytest.raises(ConfigError, match=r"decode\.batch_size must be > 0"):
        DecodeConfig(batch_size=0)
