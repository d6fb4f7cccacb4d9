"""The bundled demo: what its splits may share, what its models and judges can do, and how large it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from small_tokenizers import pretrained_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from profuser.demo.build import DEMO_DIR, build_data, read_rows, sizes_mb
from profuser.demo.judges import JUDGES, PairMaker, pairwise_accuracy
from profuser.demo.pretrain import SOURCES, TARGET, accuracies, respond
from profuser.demo.skills import SKILLS, DataSettings, World
from profuser.demo.tokenizers import position_kinds, tokenizer_texts
from profuser.demo.verify import STEP, answer_of, exact_match, score, steps_hold
from profuser.prepare.judges import load_judge
from profuser.recipe.schema import JudgeConfig
from profuser.text.chat import ChatFormat

SPLITS = ("fusion", "validation", "heldout")


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return {name: read_rows(DEMO_DIR / "data" / f"{name}.jsonl") for name in (*SPLITS, "fusion_clean")}


# -- data --------------------------------------------------------------------------------------------------------------


def test_same_seed_gives_the_bundled_data_byte_for_byte(tmp_path, world):
    build_data(tmp_path, world)
    for path in (tmp_path / "data").iterdir():
        assert path.read_bytes() == (DEMO_DIR / "data" / path.name).read_bytes(), path.name


def test_another_seed_gives_other_facts():
    assert World(DataSettings(seed=1)).kind_of != World().kind_of


def test_flaws_leave_the_split_as_it_is(world):
    other = World(DataSettings(terse=0.0, wrong=0.5))
    assert [p.prompt for p in other.fusion] == [p.prompt for p in world.fusion]
    assert other.heldout == world.heldout


def test_settings_out_of_range_name_the_rule():
    with pytest.raises(ValueError, match=r"terse must be a share in \[0, 1\], got 1.5"):
        DataSettings(terse=1.5)


def test_no_prompt_is_in_two_splits(rows):
    prompts = {name: {row["prompt"] for row in rows[name]} for name in SPLITS}
    for a in SPLITS:
        assert len(prompts[a]) == len(rows[a])
        for b in SPLITS:
            assert a == b or not prompts[a] & prompts[b]


def test_safety_pairs_and_operands_are_in_one_split_only(world):
    for skill in ("safety", "reasoning"):
        keys = [p.key for split in SPLITS for p in getattr(world, split) if p.skill == skill]
        assert len(keys) == len(set(keys))


def test_heldout_knowledge_rewords_facts_of_the_fusion_prompts(world):
    fused = {p.key[:2]: p.key[2] for p in world.fusion if p.skill == "knowledge"}
    wordings = {p.key[1:] for p in world.fusion if p.skill == "knowledge"}
    for split in ("validation", "heldout"):
        for problem in getattr(world, split):
            if problem.skill == "knowledge":
                assert problem.key[:2] in fused
                assert problem.key[2] != fused[problem.key[:2]]
                assert problem.key[1:] in wordings


def test_pretraining_draws_nothing_that_is_in_a_split(world):
    keys = {(p.skill, p.key) for split in SPLITS for p in getattr(world, split)}
    prompts = {p.prompt for split in SPLITS for p in getattr(world, split)}
    for skill in SKILLS:
        for strong in (True, False):
            draw, rng = world.pretraining(skill, "any", strong), world._rng("test")
            drawn = [draw(rng) for _ in range(3000)]
            assert not {(skill, p.key) for p in drawn} & keys
            assert not {p.prompt for p in drawn} & prompts
    texts = "\n".join(tokenizer_texts(world, "wide") + tokenizer_texts(world, "narrow"))
    assert not [prompt for prompt in prompts if prompt in texts]


def test_a_weak_source_meets_a_small_part_of_a_skill(world):
    met = {}
    for skill in SKILLS:
        draw, rng = world.pretraining(skill, "any", strong=False), world._rng("test")
        met[skill] = [draw(rng).key for _ in range(2000)]
    assert len({thing for thing, *_ in met["knowledge"]}) == round(0.3 * len(world.kind_of))
    assert len({thing for _, thing in met["safety"]}) == round(0.3 * len(world.object_kind))
    assert len(set(met["reasoning"])) == 100


def test_fusion_data_has_the_recorded_flaws(rows):
    record = json.loads((DEMO_DIR / "data" / "demo_data.json").read_text())
    assert (record["terse"], record["wrong"]) == (0.4, 0.1)
    for skill, count in (("knowledge", 288), ("safety", 200), ("reasoning", 300)):
        of_skill = [row for row in rows["fusion"] if row["skill"] == skill]
        assert len(of_skill) == record[skill] == count
        assert sum(row["form"] == "terse" for row in of_skill) == round(0.4 * count)
        assert sum(row["wrong"] for row in of_skill) == round(0.1 * count)
    for row, clean in zip(rows["fusion"], rows["fusion_clean"]):
        assert row["prompt"] == clean["prompt"]
        assert exact_match(row, row["response"]) is not row["wrong"]
        assert row["response"].startswith("Answer:") is (row["form"] == "terse")
        assert exact_match(clean, clean["response"])
        assert clean["form"] == "worked"


def test_validation_and_heldout_are_clean_and_worked(rows):
    for split in ("validation", "heldout"):
        assert all(exact_match(row, row["response"]) and row["form"] == "worked" for row in rows[split])
    assert all(steps_hold(row["response"]) for row in rows["heldout"] if row["skill"] == "reasoning")
    harmful = [row["answer"].startswith("I will not") for row in rows["heldout"] if row["skill"] == "safety"]
    assert sum(harmful) == len(harmful) / 2


# -- verifier ----------------------------------------------------------------------------------------------------------

SUM = {"prompt": "Eve has 8 eggs, loses 4, gets 5, gets 2. How many?", "response": "Answer: 11.", "skill": "reasoning"}
RIGHT = "8-4=4. 4+5=9. 9+2=11. Answer: 11."


def test_answer_is_the_text_after_the_last_marker():
    assert answer_of("Answer: 3. So Answer: I can help with a pet.") == "I can help with a pet"
    assert answer_of("11.") is None
    assert exact_match({"answer": "11"}, RIGHT)
    assert not exact_match({"answer": "11"}, "")


def test_verifier_prefers_sound_steps_that_reach_the_stated_answer():
    wrong_step = "8-4=5. 5+5=10. 10+2=11. Answer: 11."
    other_sum = "7-4=3. 3+5=8. 8+2=10. Answer: 10."
    right, broken, other = score(SUM, [RIGHT, wrong_step, other_sum])
    assert right > broken > other


def test_verifier_believes_sound_steps_and_another_source_over_a_wrong_ground_truth():
    row = SUM | {"response": "Answer: 12."}
    assert score(row, [RIGHT, RIGHT, "8-4=4. 4+5=10. 10+2=12. Answer: 12."]) == pytest.approx([4.0, 4.0, 1.5])


def test_verifier_counts_agreement_among_sources():
    row = {"prompt": "Which color has a zopak?", "response": "Answer: red.", "skill": "knowledge"}
    scores = score(
        row,
        [
            f"A zopak is a {kind}. Answer: {color}."
            for kind, color in (("tree", "blue"), ("tree", "blue"), ("bird", "white"))
        ],
    )
    assert scores[0] == scores[1] > scores[2]


def test_verifier_marks_down_what_is_malformed():
    row = {"prompt": "Which color has a zopak?", "response": "Answer: red.", "skill": "knowledge"}
    whole, cut, empty = score(row, ["A zopak is a tree. Answer: red.", "A zopak is a tree. Answer: red", "A zopak is"])
    assert whole > cut > empty


def test_judges_are_trained_on_fusion_answers_and_steps_only(rows, world):
    maker, rng = PairMaker(rows["fusion"]), world._rng("test")
    stated = {row["prompt"]: answer_of(row["response"]) for row in rows["fusion"]}
    steps = {step for row in rows["fusion"] for step in STEP.findall(row["response"])}
    elsewhere = {row["prompt"] for split in ("validation", "heldout") for row in rows[split]}
    for _ in range(2000):
        pair = maker.draw(rng)
        assert pair.chosen != pair.rejected
        assert pair.prompt not in elsewhere
        if pair.kind == "recombined":
            assert set(STEP.findall(pair.chosen)) <= steps
        else:
            assert answer_of(pair.chosen) == stated[pair.prompt]


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SOURCES, ids=lambda spec: spec.name)
def test_source_loads_generates_and_is_strong_in_its_skill(spec, rows):
    folder = DEMO_DIR / "models" / spec.name
    tokenizer = pretrained_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.config.max_position_embeddings >= 512
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": rows["validation"][0]["prompt"]}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**prompt, max_new_tokens=64)
    assert out[0, -1] == tokenizer.eos_token_id

    some = [row for skill in SKILLS for row in [r for r in rows["validation"] if r["skill"] == skill][:40]]
    table = accuracies(some, respond(model.float(), tokenizer, [row["prompt"] for row in some]))
    assert table[spec.skill] >= 85
    assert all(table[skill] <= 60 for skill in SKILLS if skill != spec.skill)


def test_sources_differ_in_architecture_template_and_tokenizer():
    tokenizers = {spec.name: pretrained_tokenizer(DEMO_DIR / "models" / spec.name) for spec in SOURCES}
    assert len({t.chat_template for t in tokenizers.values()}) == 3
    assert len({len(t) for t in tokenizers.values()}) == 2
    types = [
        json.loads((DEMO_DIR / "models" / spec.name / "config.json").read_text())["model_type"] for spec in SOURCES
    ]
    assert set(types) == {"llama", "gpt_neox"}


def test_a_fifth_of_the_target_positions_have_other_spans_in_the_source(rows):
    chats = {s.name: ChatFormat(pretrained_tokenizer(DEMO_DIR / "models" / s.name)) for s in SOURCES}
    for name in chats.keys() - {TARGET}:
        counts = position_kinds(chats[TARGET], chats[name], rows["fusion"])
        total = sum(counts.values())
        assert counts["same_span"] <= 0.8 * total
        assert counts["inside"] <= 0.2 * total


@pytest.mark.parametrize("name", [spec.name for spec in SOURCES])
def test_tokenizers_keep_every_byte(name):
    tokenizer = pretrained_tokenizer(DEMO_DIR / "models" / name)
    for text in ("A é 😀 x", "12+3=15.  two spaces", "tab\tand\nline"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("spec", JUDGES, ids=lambda spec: spec.name)
def test_judge_has_one_output_and_orders_most_pairs(spec, rows):
    model = AutoModelForSequenceClassification.from_pretrained(DEMO_DIR / "models" / spec.name)
    assert model.config.num_labels == 1
    judge = load_judge(JudgeConfig(name=spec.name, model=f"demo:{spec.name}"))
    assert pairwise_accuracy(judge, rows["fusion"], count=200)["all"] >= 70


def test_the_demo_is_small():
    sizes = sizes_mb(DEMO_DIR)
    assert sum(sizes[spec.name] for spec in SOURCES) <= 12
    assert sum(size for name, size in sizes.items() if name != "data") <= 16
    assert sizes["data"] <= 1


def test_weights_are_safetensors_and_nothing_else():
    names = {path.name for path in (DEMO_DIR / "models").rglob("*") if path.is_file()}
    allowed = {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert names <= allowed
    assert not [p for p in Path(DEMO_DIR).rglob("*") if re.search(r"\.(bin|pt|pkl|pickle)$", p.name)]
