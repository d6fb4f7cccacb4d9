"""How the doctor shows one example in every model's chat template."""

import json
import re

import pytest
from conftest import ROOT

from profuser.doctor.__main__ import main
from profuser.doctor.template_rows import CONTEXT, END, RESPONSE, cells, conversation_rows, describe
from profuser.doctor.token_rows import LABEL
from profuser.errors import ConfigError
from profuser.models.load import chat_format
from profuser.recipe.schema import SourceConfig
from profuser.text.chat import ChatFormat

DEMO = str(ROOT / "profuser/recipes/demo.yaml")


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return chat_format(SourceConfig(name="scholar", model="demo:scholar"))


def test_the_marks_are_the_label_mask_of_training(chat):
    encoded = chat.encode("Hi there?", "A stone. Answer: bitter.")
    marked = cells(chat, encoded)
    assert [mark != CONTEXT for _, mark in marked] == encoded.label_mask
    assert "".join(text for text, mark in marked if mark == RESPONSE).strip() == "A stone. Answer: bitter."
    assert [text for text, mark in marked if mark == END] == ["</s>"]


def test_rows_keep_the_width_and_every_mark_stands_under_its_token(chat):
    rows = conversation_rows(chat, "Hi there?\nAnd more \u00e9.", "A stone. " * 10 + "End.", color=False, width=60)
    tokens, masks = ([row[LABEL:] for row in rows if row.startswith(name)] for name in ("tokens", "mask"))
    assert len(tokens) == len(masks) > 1
    for token, mask in zip(tokens, masks):
        assert len(token) <= 60 - LABEL
        assert [n for n, c in enumerate(mask) if c == "│"] == [n for n, c in enumerate(token) if c == "│"]
        assert set(mask) <= set(".^$│")
    assert "learnt" not in rows[-1]


def test_json_holds_ids_mask_and_end_of_turn(chat):
    found = describe(chat, "Hi", "A stone.")
    assert len(found["input_ids"]) == len(found["label_mask"]) == len(found["tokens"])
    assert found["label_mask"][-1]
    assert found["input_ids"][-1] == found["end_of_turn"]
    assert found["generation_prompt_is_prefix"]
    assert found["rendered"] == "".join(found["tokens"])


def test_the_doctor_shows_one_example_in_every_template_of_a_recipe(capsys):
    main(["--config", DEMO, "--example", "2"])
    out = capsys.readouterr().out
    for name in ("guardian", "scholar", "reckoner"):
        assert re.search(rf"^{name}  demo:{name}$", out, re.MULTILINE)
    assert out.count("of them labels") == 3
    main(["--config", DEMO, "--json"])
    assert set(json.loads(capsys.readouterr().out)["models"]) == {"guardian", "scholar", "reckoner"}


def test_an_example_that_is_not_there_and_half_a_command_are_refused(capsys):
    with pytest.raises(ConfigError, match="--example must be in 0"):
        main(["--config", DEMO, "--example", "100000"])
    for arguments in (
        ["--config", DEMO, "--text", "x"],
        ["--text", "x"],
        ["--tokenizers", "a", "b", "--text", "x", "--speed"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
