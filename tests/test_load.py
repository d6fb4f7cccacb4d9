"""What is wrong with a model's files is said with a fix that helps."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from small_tokenizers import CHATML

from profuser.errors import DataError
from profuser.models import load
from profuser.models.load import chat_format, load_model, load_tokenizer, open_model
from profuser.models.reward import load_reward_model
from profuser.models.weights import loaded_model
from profuser.recipe.places import resolve
from profuser.recipe.schema import SourceConfig
from profuser.text.conversation import Conversation, Turn


@pytest.fixture
def model(tmp_path):
    """A copy of a bundled model, in a folder of its own."""
    shutil.copytree(resolve("demo:guardian"), tmp_path / "m")
    return tmp_path / "m"


def refusal(model, **keys) -> str:
    with pytest.raises(DataError) as error:
        load_tokenizer(SourceConfig(name="m", model=str(model), **keys))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_file_of_a_tokenizer_that_is_not_utf8_is_named(model, name):
    (model / name).write_bytes((model / name).read_bytes() + b"\n\xe9")
    message = refusal(model)
    assert f"({name}: line " in message
    assert "0xe9" in message


def test_a_chat_template_is_read_as_utf8_whatever_the_locale(model, tmp_path, monkeypatch):
    monkeypatch.setattr("locale.getencoding", lambda: "ascii")
    template = tmp_path / "chat.jinja"
    template.write_bytes("\ufeff{# café #}\r\nx".encode())
    tokenizer = load_tokenizer(SourceConfig(name="m", model=str(model), chat_template=str(template)))
    assert tokenizer.chat_template == "{# café #}\nx"
    template.write_bytes(b"one\ncaf\xe9")
    message = refusal(model, chat_template=str(template))
    assert str(template) in message
    assert "line 2 has the byte 0xe9" in message


NO_TURNS, NO_SYSTEM = (
    "{{ messages[0]['content'] }}",
    CHATML.replace("m['role'] +", "(m['role'] | replace('system', 'user')) +"),
)


def test_what_is_said_of_a_chat_template_names_the_source(model, caplog):
    """A recipe may have one model as two sources, each with a template of its own."""
    own = SourceConfig(name="tutor", model=str(model), chat_template=NO_TURNS)
    with pytest.raises(DataError, match=r"once each, tutor's renders .*; correct the `chat_template` of that source"):
        chat_format(own)
    (model / "chat_template.jinja").write_text(NO_TURNS)
    with pytest.raises(DataError, match=r"once each, tutor's renders .*; set `chat_template` for that source"):
        chat_format(replace(own, chat_template=None))
    said = Conversation((Turn("system", "s"), Turn("user", "u")))
    chat_format(replace(own, chat_template=NO_SYSTEM)).prompt_ids(said)
    assert "tutor's chat template has no system role" in caplog.text
    assert str(model) not in caplog.text


@pytest.mark.parametrize(
    ("installed", "fix"),
    [
        ((), "`pip install sentencepiece protobuf`"),
        (("sentencepiece",), "`pip install protobuf`"),
        (("google.protobuf",), "`pip install sentencepiece`"),
    ],
)
def test_a_tokenizer_model_alone_names_the_packages_that_are_missing(model, monkeypatch, installed, fix):
    monkeypatch.setattr(load, "is_installed", lambda module: module in installed)
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    message = refusal(model)
    assert fix in message
    assert "tiktoken" not in message


def test_a_judge_with_a_tokenizer_model_alone_names_the_packages_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "is_installed", lambda module: False)
    shutil.copytree(resolve("demo:judge-a"), tmp_path / "rm")
    (tmp_path / "rm" / "tokenizer.json").unlink()
    (tmp_path / "rm" / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    with pytest.raises(DataError, match="pip install sentencepiece protobuf"):
        load_reward_model("rm", str(tmp_path / "rm"), trust_remote_code=False)


def test_a_tokenizer_of_tiktokens_own_format_is_not_taken_for_sentencepiece(model, monkeypatch):
    monkeypatch.setattr(load, "is_installed", lambda module: False)
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    assert "sentencepiece" not in refusal(model)


def test_a_model_with_code_of_its_own_names_the_key_that_allows_it(model):
    config = json.loads((model / "config.json").read_text())
    classes = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}
    (model / "config.json").write_text(json.dumps(config | {"auto_map": classes, "model_type": "own"}))
    # Classes of its own: transformers marks what it loads so, and marked classes of its own would be saved with their code.
    (model / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Own(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = Own\n"
    )
    source = SourceConfig(name="m", model=str(model))
    with pytest.raises(DataError, match="set trust_remote_code: true beside it"):
        load_model(source, torch.float32)
    assert (
        load_model(replace(source, trust_remote_code=True), torch.float32).config.hidden_size == config["hidden_size"]
    )


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors", "notes.md"]
)
def test_a_pipe_in_the_place_of_a_file_is_refused(model, name):
    """Whoever reads it would wait for ever."""
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    for use in (open_model, load_tokenizer):
        with pytest.raises(DataError, match=rf"^m: a model must consist of files, .*{name} is none"):
            use(SourceConfig(name="m", model=str(model)))


def test_a_directory_and_a_link_beside_a_models_files_do_no_harm(model):
    (model / "onnx").mkdir()
    (model / "nowhere").symlink_to("not there")
    source = SourceConfig(name="m", model=str(model))
    open_model(source)
    load_tokenizer(source)


def test_a_generation_config_may_be_missing(model):
    source = SourceConfig(name="m", model=str(model))
    ends = chat_format(source).end_ids
    (model / "generation_config.json").unlink()
    assert chat_format(source).end_ids == ends


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"eos_token_id": [3,', "cannot be read"),
        ("", "cannot be read"),
        ("[]", "cannot be read"),
        ("null", "cannot be read"),
        ('{"a":' * 5000, "cannot be read"),
        ('{"cache_implementation": "none of these"}', "cannot be read"),
        ('{"eos_token_id": -1}', "must be a token's id or a list of ids, got -1"),
        ('{"eos_token_id": "</s>"}', "must be a token's id or a list of ids, got '</s>'"),
        ('{"eos_token_id": [3, [4]]}', "must be a token's id or a list of ids, got [3, [4]]"),
        ('{"eos_token_id": 1e400}', "must be a token's id or a list of ids, got inf"),
        ('{"eos_token_id": true}', "must be a token's id or a list of ids, got True"),
        (
            '{"eos_token_id": [3, 300]}',
            "must be a control token, 300 is ' wit' to the tokenizer, at which answers would end",
        ),
    ],
)
def test_a_generation_config_that_cannot_be_read_is_said(model, content, says):
    (model / "generation_config.json").write_text(content)
    with pytest.raises(DataError) as error:
        chat_format(SourceConfig(name="m", model=str(model)))
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert "generation_config.json" in str(error.value)


def test_a_model_that_is_opened_again_is_looked_at_again_only_where_a_file_has_changed(model, monkeypatch):
    source, looked = SourceConfig(name="m", model=str(model)), []
    monkeypatch.setattr(load, "loaded_model", lambda *args: looked.append(args) or loaded_model(*args))
    open_model(source)
    open_model(source)
    assert len(looked) == 1

    # The file has the size and the time that it had.
    weights = model / "model.safetensors"
    before, content = weights.stat(), weights.read_bytes()
    weights.write_bytes(content.replace(b"layers.1.", b"layers.x."))
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_size == before.st_size
    for times in (2, 3):  # what is wrong is said every time
        with pytest.raises(DataError, match="layers"):
            open_model(source)
        assert len(looked) == times


@pytest.fixture
def downloaded(tmp_path, monkeypatch):
    """The folder of a model in the Hub's cache, in which each file is a link, on a machine without a network."""
    repository = tmp_path / "models--org--m"
    folder = repository / "snapshots" / "0"
    shutil.copytree(resolve("demo:guardian"), repository / "blobs")
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    for file in (repository / "blobs").iterdir():
        (folder / file.name).symlink_to(file)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder


@pytest.mark.parametrize(
    ("name", "deleted", "said"),
    [
        ("model.safetensors", "file", "model.safetensors"),
        ("model.safetensors", "link", "a model must have weights"),
        ("generation_config.json", "file", "generation_config.json is a link to what is not there"),
        ("tokenizer.json", "file", "tokenizer.json is a link to what is not there"),
        ("tokenizer.json", "link", "no tokenizer could be loaded"),
    ],
)
def test_a_file_of_a_hub_model_that_was_deleted_is_missed_before_a_model_is_loaded(downloaded, name, deleted, said):
    """Without a network it cannot be downloaded again. No generation config at all is right for many models."""
    source = SourceConfig(name="a", model="org/m")
    open_model(source)
    (downloaded / name if deleted == "link" else (downloaded / name).resolve()).unlink()
    with pytest.raises(DataError, match=rf"^a: [^\n]*{said}"):
        _ = open_model(source), chat_format(source)
