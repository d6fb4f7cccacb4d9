"""Ids of tokens in a model's configuration files: what is none, or has no row in the embedding, is found before anything runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_runs import run

from profuser.errors import DataError
from profuser.models.load import open_model
from profuser.models.reward import open_reward_model
from profuser.recipe.places import resolve
from profuser.recipe.schema import SourceConfig

ROWS = 1152  # of guardian's embedding
NONE = [-1, -(2**31), ROWS, 99_999, 2**31, "3", 3.0, True, {"id": 3}]
FILES = ("config.json", "generation_config.json")
KEYS = ("eos_token_id", "bos_token_id", "pad_token_id")


@pytest.fixture
def guardian(tmp_path):
    return Path(shutil.copytree(resolve("demo:guardian"), tmp_path / "guardian"))


def write(model: Path, file: str, **changes) -> None:
    content = json.loads((model / file).read_text()) | changes
    (model / file).write_text(json.dumps(content))


def opened(model: Path) -> None:
    open_model(SourceConfig(name="a", model=str(model)))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("key", KEYS)
def test_what_is_no_id_is_named_with_its_file(guardian, file, key):
    many = [[3, value] for value in NONE] if key == "eos_token_id" else [[3], []]
    original = (guardian / file).read_text()
    for value in [*NONE, *many]:
        (guardian / file).write_text(original)
        write(guardian, file, **{key: value})
        by_us = f"/{file} must hold .*the id of a token.* as {key}.*, got "
        by_transformers = f"no model's configuration could be read .*Field '{key}' with value "
        with pytest.raises(DataError, match=f"^a: .*({by_us}|{by_transformers})") as error:
            opened(guardian)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", FILES)
def test_ids_with_a_row_and_none_at_all_are_read(guardian, file):
    for value in (0, 3, ROWS - 1, None, [3], [3, ROWS - 1], []):
        write(guardian, file, eos_token_id=value)
        opened(guardian)
    for key in KEYS[1:]:
        for value in (0, ROWS - 1, None):
            write(guardian, file, **{key: value})
            opened(guardian)
    (guardian / "generation_config.json").unlink()
    opened(guardian)


def test_a_part_of_a_configuration_has_ids_as_well(guardian):
    write(guardian, "config.json", text_config={"eos_token_id": -1})
    with pytest.raises(DataError, match=r"config\.json must hold .* as eos_token_id, got -1"):
        opened(guardian)


def test_a_judge_writes_nothing_and_may_have_them(tmp_path):
    judge = Path(shutil.copytree(resolve("demo:judge-a"), tmp_path / "judge"))
    write(judge, "config.json", eos_token_id=99_999, bos_token_id=-1)
    open_reward_model("a", str(judge), False)
    write(judge, "config.json", eos_token_id="3")
    with pytest.raises(DataError, match=r"^judge a: .*'eos_token_id' with value '3'"):
        open_reward_model("a", str(judge), False)


@pytest.mark.parametrize(("file", "key"), [("config.json", "eos_token_id"), ("generation_config.json", "pad_token_id")])
def test_every_command_ends_with_one_line(in_run, file, key):
    model = Path("guardian")
    write(model, file, **{key: -1})
    Path("prompts.jsonl").write_text('{"prompt": "hello"}\n')
    recipe = ["--config", "recipe.yaml"]
    for command in (
        ["train", *recipe, "--fresh"],
        ["train", *recipe, "--dry-run"],
        ["prepare", *recipe, "--fresh"],
        ["doctor", "--sources", *recipe],
        ["generate", *recipe, "--prompt", "hello"],
        ["generate", *recipe, "--input", "prompts.jsonl", "--output", "answers.jsonl"],
        ["evaluate", "runs/recipe", "--data", "heldout.jsonl", "--models", "./guardian"],
        ["evaluate", "--models", "decode:recipe.yaml", "--tasks", "profuser_demo"],
        ["merge", "--method", "linear", "--models", "demo:guardian", "guardian", "--output", "merged"],
        ["merge", "--method", "linear", "--models", "guardian", "demo:guardian", "--output", "merged"],
    ):
        code, _, err = run(*command)
        assert code == 3, (command, err)
        assert f"{file} must hold" in err.splitlines()[-1], (command, err)
        assert f"as {key}, got -1" in err
        assert "Traceback" not in err
    assert not Path("merged").exists()
    assert not Path("answers.jsonl").exists()
