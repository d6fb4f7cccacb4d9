"""Padding is masked, so that a model may be without a row for the token that its tokenizer pads with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_runs import RECIPE, rows, run, without_pictures, write_rows

from profuser.models.load import chat_format, load_model
from profuser.prepare.responses import generate
from profuser.recipe.generation import GenerationConfig
from profuser.recipe.places import resolve
from profuser.recipe.schema import SourceConfig


def pad_with_a_new_token(folder: Path) -> None:
    """Gives a tokenizer a padding token behind all rows of its model."""
    rows_of_head = json.loads((folder / "config.json").read_text())["vocab_size"]
    content = json.loads((folder / "tokenizer.json").read_text())
    last = {**content["added_tokens"][0], "content": "[PAD]", "special": True}
    # The ids between are taken by tokens that never occur.
    first = max([*content["model"]["vocab"].values(), *(token["id"] for token in content["added_tokens"])]) + 1
    content["added_tokens"] += [last | {"id": i, "content": f"[PAD{i}]"} for i in range(first, rows_of_head)]
    content["added_tokens"].append(last | {"id": max(first, rows_of_head)})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "[PAD]"}))


@pytest.fixture
def padded(tmp_path, monkeypatch):
    """A working directory with a model whose padding has no row."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(resolve("demo:guardian"), "guardian")
    pad_with_a_new_token(Path("guardian"))
    return tmp_path


@pytest.mark.usefixtures("padded")
def test_answers_are_those_of_the_model_as_it_was():
    answers = []
    for model in ("demo:guardian", "guardian"):
        source = SourceConfig(name="m", model=model)
        chat, loaded = chat_format(source), load_model(source, torch.float32)
        if model == "guardian":
            assert chat.tokenizer.pad_token_id >= loaded.config.vocab_size
        prompts = [row["prompt"] for row in rows("heldout", 5)] + ["Hi"]
        config = GenerationConfig(max_new_tokens=6, batch_size=3)
        answers.append(generate(loaded, chat, prompts, config, max_length=96, seed=0))
    assert answers[0] == answers[1]


@pytest.mark.long
@pytest.mark.usefixtures("padded")
def test_a_whole_run_does_without_the_row():
    Path("recipe.yaml").write_text(RECIPE)
    write_rows("train.jsonl", rows("fusion", 6))
    write_rows("heldout.jsonl", rows("heldout", 3))
    with without_pictures():
        code, _, err = run("train", "--config", "recipe.yaml")
    assert code == 0, err
