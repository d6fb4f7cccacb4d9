"""Whatever a recipe names is opened before the first model runs, and what is wrong with it is said in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from profuser.errors import ConfigError, DataError
from profuser.prepare.inputs import Inputs
from profuser.prepare.judges import judge_fingerprint, load_judge
from profuser.prepare.phases import prepare
from profuser.recipe.parse import Run
from profuser.recipe.places import resolve
from profuser.recipe.schema import JudgeConfig, SourceConfig

Damage = Callable[[Path], object]


def edit_json(name: str, **changes) -> Damage:
    """Changes a JSON file of a model. A key that is given None is taken out."""

    def edit(model: Path) -> None:
        content = json.loads((model / name).read_text()) | changes
        (model / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return edit


def without_template(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    edit_json("tokenizer_config.json", chat_template=None)(model)


def cut(name: str) -> Damage:
    return lambda model: (model / name).write_bytes((model / name).read_bytes()[:100])


def lost_part(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    parts = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))


def larger_tokenizer(model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["overmuch"] = 9999
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))


ANY_MODEL: list[tuple[Damage, str]] = [
    (without_template, "a model needs a chat template.*`chat_template`"),
    (cut("config.json"), "no model's configuration could be read"),
    (edit_json("config.json", model_type="wav2vec2"), "must be loadable as AutoModelFor"),
    (cut("model.safetensors"), "cannot be read .*download"),
    (lambda model: (model / "model.safetensors").unlink(), "must have weights.*download"),
    (lost_part, r"lacks model-00002-of-00002.safetensors \(1 of 2 files\)"),
    (cut("tokenizer.json"), "no tokenizer could be loaded"),
]


def damaged(name: str, damage: Damage, place: Path) -> str:
    """The path of a copy of a bundled model that something is wrong with."""
    shutil.copytree(resolve(f"demo:{name}"), place / name)
    damage(place / name)
    return str(place / name)


def refused(run: Run, place: Path, message: str, **changes) -> None:
    """Checks that a recipe is refused with this message before a store is begun."""
    recipe = replace(run.recipe, store=str(place / "store"), output=str(place / "run"), **changes)
    with pytest.raises(DataError, match=message) as error:
        prepare(replace(run, recipe=recipe))
    assert "\n" not in str(error.value)
    assert not (place / "store").exists()


@pytest.mark.parametrize(("damage", "message"), ANY_MODEL)
def test_a_judge_is_opened_at_the_start(prepared, tmp_path, damage, message):
    _, run, _ = prepared
    broken = JudgeConfig(name="broken", model=damaged("judge-b", damage, tmp_path))
    # The judge is named somewhere in the line, before the rule or behind it.
    refused(run, tmp_path, f"^(?=.*judge broken).*{message}", judges=[*run.recipe.judges, broken])


def test_a_judge_with_two_outputs_is_noticed_at_the_start(prepared, tmp_path):
    _, run, _ = prepared
    two = edit_json("config.json", id2label={"0": "bad", "1": "good"}, label2id={"bad": 0, "good": 1})
    broken = JudgeConfig(name="broken", model=damaged("judge-a", two, tmp_path))
    refused(run, tmp_path, "judge broken: .* must have 1 output, got 2", judges=[broken])


@pytest.mark.parametrize(("damage", "message"), [*ANY_MODEL, (larger_tokenizer, "an embedding for every token.*9999")])
def test_the_last_source_is_opened_at_the_start(prepared, tmp_path, damage, message):
    _, run, _ = prepared
    broken = SourceConfig(name="broken", model=damaged("scholar", damage, tmp_path))
    refused(run, tmp_path, message, sources=[*run.recipe.sources, broken])


@pytest.mark.parametrize(("damage", "message"), [*ANY_MODEL, (larger_tokenizer, "an embedding for every token.*9999")])
def test_a_target_that_is_no_source_is_opened_at_the_start(prepared, tmp_path, damage, message):
    _, run, _ = prepared
    refused(run, tmp_path, message, target=damaged("scholar", damage, tmp_path))


def test_the_printed_fix_for_a_judge_without_a_template_works(prepared, tmp_path):
    """With the template that its tokenizer had, it gives the same scores; with another one it is another judge."""
    _, run, _ = prepared
    template = (Path(resolve("demo:judge-b")) / "chat_template.jinja").read_text()
    (tmp_path / "own.jinja").write_text(template)
    bare = JudgeConfig(name="judge-b", model=damaged("judge-b", without_template, tmp_path))
    mended = [replace(bare, chat_template=text) for text in (template, str(tmp_path / "own.jinja"))]
    Inputs.open(replace(run, recipe=replace(run.recipe, judges=mended[:1])))

    rows = [{"prompt": "How does a bozun taste?", "response": "", "skill": "knowledge"}]
    candidates = [["A bozun is a stone. Answer: bitter.", "Answer: sweet."]]
    expected = load_judge(JudgeConfig(name="judge-b", model="demo:judge-b"))(rows, candidates)
    for config in mended:
        assert np.array_equal(load_judge(config)(rows, candidates), expected)
    other = replace(bare, chat_template=template.replace("USER", "HUMAN"))
    assert not np.array_equal(load_judge(other)(rows, candidates), expected)
    prints = [judge_fingerprint(config) for config in (bare, *mended, other)]
    assert prints[1] == prints[2]
    assert len(set(prints)) == 3


def test_the_printed_fix_for_a_target_that_is_no_source_works_too(prepared, tmp_path):
    """Such a target has no key for a template in the recipe."""
    _, run, _ = prepared
    target = damaged("scholar", without_template, tmp_path)
    refused(run, tmp_path, "put a chat_template.jinja beside its tokenizer", target=target)
    shutil.copy(Path(resolve("demo:scholar")) / "chat_template.jinja", target)
    Inputs.open(replace(run, recipe=replace(run.recipe, target=target)))


def test_a_judges_template_that_is_not_there_is_named(prepared, tmp_path):
    _, run, _ = prepared
    judge = JudgeConfig(name="rm", model="demo:judge-a", chat_template="nowhere.jinja")
    refused(run, tmp_path, "judge rm: chat_template must be .*nowhere.jinja", judges=[judge])


def test_a_function_has_no_template():
    with pytest.raises(ConfigError, match="judges: f: chat_template is for a reward model"):
        JudgeConfig(name="f", function="m:f", chat_template="{{ messages }}")
