"""A model is loaded as a whole or not at all: what its files lack, and what it has no place for, is an error with a fix."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from profuser.errors import DataError
from profuser.models.load import load_model, load_tokenizer, open_model
from profuser.models.reward import load_reward_model, open_reward_model
from profuser.recipe.places import resolve
from profuser.recipe.schema import SourceConfig

BUNDLED = sorted(path.name for path in Path(resolve("demo:guardian")).parent.iterdir() if path.is_dir())


def source(folder: Path | str) -> SourceConfig:
    return SourceConfig(name="m", model=str(folder))


@pytest.fixture
def model(tmp_path):
    """A copy of a bundled model with four layers."""
    shutil.copytree(resolve("demo:guardian"), tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def judge(tmp_path):
    """A copy of a bundled reward model."""
    shutil.copytree(resolve("demo:judge-a"), tmp_path / "rm")
    return tmp_path / "rm"


def configure(folder: Path, **keys) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def add(folder: Path, *names: str) -> None:
    """Adds weights to those of a model."""
    path = folder / "model.safetensors"
    save_file(load_file(path) | {name: torch.ones(3) for name in names}, path, {"format": "pt"})


def refusals(folder: Path) -> str:
    """The message with which a model is refused. Opening it must find what loading it finds."""
    messages = set()
    for action in (lambda: open_model(source(folder)), lambda: load_model(source(folder), torch.float32)):
        with pytest.raises(DataError) as error:
            action()
        messages.add(str(error.value))
    assert len(messages) == 1
    (message,) = messages
    assert "\n" not in message
    return message


def test_every_bundled_model_is_whole():
    for name in BUNDLED:
        if name.startswith("judge"):
            open_reward_model(name, f"demo:{name}", trust_remote_code=False)
            load_reward_model(name, f"demo:{name}", trust_remote_code=False)
        else:
            open_model(source(f"demo:{name}"))
            load_model(source(f"demo:{name}"), torch.float32)


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_half_a_model_is_refused(model, layers):
    configure(model, num_hidden_layers=layers)
    message = refusals(model)
    assert f"{9 * (4 - layers)} have no place in it (model.layers.{layers}.input_layernorm.weight)" in message
    assert f"number of layers in its configuration, which is {layers}" in message


def test_half_a_model_in_files_of_pytorch_is_refused(model):
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(weights, model / "pytorch_model.bin")
    load_model(source(model), torch.float32)
    open_model(source(model))
    configure(model, num_hidden_layers=2)
    assert "18 have no place" in refusals(model)


def test_a_model_and_a_half_is_refused(model):
    configure(model, num_hidden_layers=6)
    assert "18 are missing (model.layers.4.input_layernorm.weight)" in refusals(model)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"vocab_size": 100}, "lm_head.weight is [1152, 128] and not [100, 128]"),
        ({"vocab_size": 2000}, "lm_head.weight is [1152, 128] and not [2000, 128]"),
        ({"hidden_size": 64}, "39 have others"),
        ({"intermediate_size": 128}, "mlp.down_proj.weight is [128, 256] and not [128, 128]"),
        ({"num_key_value_heads": 2}, "self_attn.k_proj.weight is [128, 128] and not [64, 128]"),
    ],
)
def test_weights_of_another_shape_are_named(model, keys, says):
    configure(model, **keys)
    message = refusals(model)
    assert "the shapes that its config.json gives" in message
    assert says in message


HARMLESS = (
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.rotary_emb.inv_freq",
    "model.embeddings.position_ids",
    "transformer.h.0.attn.masked_bias",
    "transformer.h.0.attn.bias",
    "model.layers.0.mlp.up_proj._extra_state",
    "mtp.layers.0.mlp.up_proj.weight",
    "model.mtp_layers.0.mlp.up_proj.weight",
)


def test_what_a_model_does_without_is_no_error(model):
    whole = load_model(source(model), torch.float32).state_dict()
    add(model, *HARMLESS)
    open_model(source(model))
    loaded = load_model(source(model), torch.float32).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in whole.items())


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("score.weight", "give a language model"),
        ("v_head.summary.weight", "give a language model"),
        ("model.layers.1.self_attn.q_proj.lora_A.weight", "merge the adapter"),
        ("model.layers.1.self_attn.q_proj.qweight", "quantised"),
        ("model.vision_tower.patch.weight", "only its text model"),
        ("model.layers.1.self_attn.q_proj.bias", "fix its config.json"),
        ("model.layers.1.mlp.experts.0.up_proj.weight", "fix its config.json"),
        ("model.layers.4.mlp.up_proj.weight", "which is 4"),
        ("something.else", "if it is whole without them"),
    ],
)
def test_weights_without_a_place_are_refused_with_what_can_be_done(model, name, fix):
    add(model, name)
    message = refusals(model)
    assert f"1 have no place in it ({name})" in message
    assert fix in message


def test_half_a_judge_is_refused(judge):
    configure(judge, num_hidden_layers=1)
    for action in (open_reward_model, load_reward_model):
        with pytest.raises(DataError, match=r"judge rm: .* have no place in it"):
            action("rm", str(judge), trust_remote_code=False)


def test_a_judge_may_have_the_head_of_the_language_model_that_it_was_made_from(judge):
    add(judge, "lm_head.weight")
    open_reward_model("rm", str(judge), trust_remote_code=False)
    load_reward_model("rm", str(judge), trust_remote_code=False)


@pytest.fixture
def sharded(model, tmp_path):
    """A model in four files with an index."""
    load_model(source(model), torch.float32).save_pretrained(tmp_path / "sharded", max_shard_size="1MB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    return tmp_path / "sharded"


def edit_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(change(index)))


def without_last_file(index):
    last = sorted(set(index["weight_map"].values()))[-1]
    return index | {"weight_map": {key: part for key, part in index["weight_map"].items() if part != last}}


def test_a_model_in_several_files_is_whole(sharded):
    open_model(source(sharded))
    load_model(source(sharded), torch.float32)


def test_a_file_that_is_missing_is_named(sharded):
    part = sorted(sharded.glob("model-*.safetensors"))[1]
    part.unlink()
    with pytest.raises(DataError, match=rf"lacks {part.name} \(1 of "):
        open_model(source(sharded))


def test_a_file_that_the_index_does_not_list_is_named(sharded):
    last = sorted(sharded.glob("model-*.safetensors"))[-1].name
    edit_index(sharded, without_last_file)
    with pytest.raises(DataError, match=f"{last} is not in it"):
        open_model(source(sharded))


def test_a_file_of_another_model_in_place_of_a_part_is_refused(sharded):
    part = sorted(sharded.glob("model-*.safetensors"))[1]
    save_file({"other": torch.ones(3)}, part, {"format": "pt"})
    assert "must hold every weight" in refusals(sharded)


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "[" * 5000, "\x00", ""],
)
def test_an_index_that_lists_no_files_is_named(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(DataError, match=r"model\.safetensors\.index\.json must (hold|list)"):
        open_model(source(sharded))


def test_a_file_of_pytorch_that_holds_no_weights_is_not_taken_for_them(model):
    (model / "model.safetensors").rename(model / "training_args.bin")
    with pytest.raises(DataError, match="a model must have weights"):
        open_model(source(model))


@pytest.mark.parametrize(
    "keys",
    [
        {"num_hidden_layers": 10**9},
        {"n_layer": 1e30},
        {"num_labels": 10**8},
        {"text_config": {"num_local_experts": 10**7}},
        {"parts": [{"decoder_layers": 10**6}]},
    ],
)
def test_a_model_of_absurdly_many_layers_is_refused_at_once(model, keys):
    configure(model, **keys)
    with pytest.raises(DataError, match="at most 10,000 layers, experts or labels"):
        open_model(source(model))


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "config.json", "tokenizer.model", "vocab.txt", "chat_template.jinja"]
)
def test_a_file_of_absurd_size_is_refused_at_once(model, judge, name):
    for folder in (model, judge):
        with open(folder / name, "ab") as opened:
            opened.truncate(1 << 33)  # zeros that take no room on the disk
    for action in (
        lambda: open_model(source(model)),
        lambda: load_model(source(model), torch.float32),
        lambda: load_tokenizer(source(model)),
        lambda: open_reward_model("rm", str(judge), trust_remote_code=False),
        lambda: load_reward_model("rm", str(judge), trust_remote_code=False),
    ):
        with pytest.raises(DataError, match=rf"{name} must have at most 256 MiB, it has 8,192 MiB"):
            action()
