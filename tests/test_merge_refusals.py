"""What cannot be merged is refused in one line, and nothing is lost or left behind."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch
from merge_models import LAYERS, changed, merged, weights, written
from safetensors.torch import save_file
from small_tokenizers import pretrained_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from profuser.errors import ConfigError, DataError
from profuser.merge.run import merge
from profuser.merge.settings import MergedModel, MergeSettings, read_settings, settings_of
from profuser.merge.weights import WeightsWriter
from profuser.recipe.places import resolve
from profuser.store.files import DiskFull
from profuser.store.processes import place


def test_an_architecture_that_differs_is_fused_instead(mergeable, tmp_path):
    tokenizer = pretrained_tokenizer(resolve("demo:guardian"))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=40, num_hidden_layers=LAYERS, num_attention_heads=4
    )
    other = written(tmp_path / "other", AutoModelForCausalLM.from_config(config), tokenizer)
    with pytest.raises(
        ConfigError, match=r"one architecture.*gate_proj.*fuse them instead: `python -m profuser.train`"
    ):
        merge(settings_of("linear", [mergeable["a"], other], None, None, None, {}, None, 0), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".merged*"))


def test_a_vocabulary_that_differs_is_fused_instead(mergeable, tmp_path):
    with pytest.raises(ConfigError, match=r"one vocabulary.*fuse them instead"):
        merge(
            settings_of("linear", ["demo:guardian", "demo:reckoner"], None, None, None, {}, None, 0),
            tmp_path / "merged",
        )


@pytest.mark.parametrize(
    ("place", "file", "said"),
    [
        ("run/adapter", "adapter_config.json", "is an adapter of peft; name its run, .*run, which holds the model"),
        ("mine", "adapter_config.json", "is an adapter of peft; merge it into its base"),
        ("run/checkpoints/step-000031", "state.json", "is a checkpoint; name its run, .*run, which holds the model"),
    ],
)
def test_an_adapter_and_a_checkpoint_are_named_as_what_they_are(mergeable, tmp_path, place, file, said):
    part = tmp_path / place
    part.mkdir(parents=True)
    (part / file).write_text("{}")
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run/run.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"models must be whole to be merged, {part} {said}"):
        merge(settings_of("linear", [mergeable["a"], str(part)], None, None, None, {}, None, 0), tmp_path / "merged")


def test_a_base_that_is_no_ancestor(mergeable, tmp_path):
    tokenizer = pretrained_tokenizer(resolve("demo:guardian"))
    config = AutoModelForCausalLM.from_pretrained(mergeable["a"]).config
    stranger = written(tmp_path / "stranger", AutoModelForCausalLM.from_config(config), tokenizer)
    with pytest.raises(ConfigError, match=r"--base must be the model that .* was trained from"):
        merge(settings_of("ties", [mergeable["a"]], stranger, None, None, {}, None, 0), tmp_path / "merged")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "tise"}, "did you mean ties"),
        ({"method": "ties"}, "--base"),
        ({"method": "slerp", "models": ["a", "b", "c"]}, "exactly two models, got 3"),
        ({"method": "linear", "models": ["a"]}, "two models or more"),
        ({"method": "linear", "base": "base"}, "no base"),
        ({"parameters": {"density": 0.5}}, "has the settings weight, normalize, got density"),
        ({"parameters": {"weight": "much"}}, "weight must be a number"),
        ({"parameters": {"weight": True}}, "weight must be a number"),
        ({"parameters": {"weight": []}}, "empty list"),
        ({"parameters": {"weight": [{"filter": "mlp"}]}}, "filter, value"),
        ({"parameters": {"weight": math.nan}}, "weight must be a number"),
        ({"method": "ties", "base": "base", "parameters": {"density": 0}}, r"density must be in \(0, 1\]"),
        ({"parameters": {"normalize": 1}}, "true or false"),
        ({"parameters": {"normalize": [True, False]}}, "true or false"),
        ({"parameters": {"weight": math.inf}}, "not infinite"),
        ({"parameters": {"weight": -(10**400)}}, "not infinite"),
        ({"parameters": {"weight": [0, [1, 2]]}}, "weight must be a number"),
        ({"parameters": {"weight": [0, {"filter": "mlp", "value": 1}]}}, "either a list of numbers or"),
        ({"parameters": {"weight": [{"filter": 3, "value": 1}]}}, "filter, value"),
        ({"parameters": {"weight": [{"filter": ["mlp"], "value": 1}]}}, "filter, value"),
        ({"method": ["linear"]}, "method must be one of"),
        ({"method": 3}, "method must be one of"),
        ({"dtype": "int4"}, "dtype must be one of"),
        ({"dtype": ["float32"]}, "dtype must be one of"),
    ],
)
def test_settings_that_make_no_sense(change, message):
    settings = {"method": "linear", "models": ["a", "b"]} | change
    settings["models"] = [MergedModel(model=model) for model in settings["models"]]
    with pytest.raises(ConfigError, match=message):
        MergeSettings(**settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: ties\nmodels: [", "must be YAML"),
        ("- 1", "must hold keys"),
        ("models: []", "must name its merge_method"),
        ("merge_method: linear\nmodel: x", "did you mean models"),
        ("merge_method: linear", "either models or slices"),
        ("merge_method: linear\nmodels: a", "list of entries"),
        ("merge_method: linear\nmodels: [{name: a}]", "must have model"),
        ("merge_method: linear\nmodels: [{model: a+lora}]", "merge the adapter"),
        ("merge_method: passthrough\nmodels: [{model: a}]", "method must be one of"),
        ("merge_method: linear\ntokenizer_source: union\nmodels: [{model: a}]", "tokenizer_source must be base"),
        ("merge_method: [linear]\nmodels: [{model: a}, {model: b}]", "method must be one of"),
        ("merge_method: {a: b}\nmodels: [{model: a}, {model: b}]", "method must be one of"),
        ("merge_method: 3\nmodels: [{model: a}, {model: b}]", "method must be one of"),
        ("merge_method: linear\ndtype: ''\nmodels: [{model: a}, {model: b}]", "dtype must be one of"),
        ("merge_method: linear\nout_dtype: 0\nmodels: [{model: a}, {model: b}]", "dtype must be one of"),
        ("merge_method: linear\nmodels: [3]", "must have model"),
        ("merge_method: linear\nmodels: [{model: a, layer_range: 3}, {model: b}]", "two whole numbers"),
        ("merge_method: linear\nslices: [{sources: 3}]", "one slice"),
        ("merge_method: linear\nslices: [{sources: {model: a}}]", "one slice"),
        ("merge_method: linear\nslices: 3", "one slice"),
        ("merge_method: linear\nmodels: &x [*x]", "must be YAML"),
        ("merge_method: linear\nmodels: " + "[" * 5000, "must be YAML"),
        ("a: &a [1, 1]\n" + "".join(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}' if n else '*a'] * 9)}]\n" for n in range(9)), "must be YAML"),
        ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [1, 3]}]}]", "one slice"),
    ],
)  # fmt: skip
def test_yaml_that_is_not_understood(tmp_path, text, message):
    (tmp_path / "merge.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_settings(tmp_path / "merge.yaml")


def test_weights_that_are_damaged(mergeable, tmp_path):
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in Path(mergeable["a"]).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(DataError, match="cannot be read"):
        merge(settings_of("linear", [mergeable["a"], str(folder)], None, None, None, {}, None, 0), tmp_path / "merged")


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_the_models_name(mergeable, tmp_path, value):
    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = value

    spoilt = changed(mergeable["b"], tmp_path / "spoilt", spoil)
    with pytest.raises(DataError, match=r"spoilt: weights must be finite, got NaN or infinity in model\.layers\.1"):
        merge(settings_of("linear", [mergeable["a"], spoilt], None, None, None, {}, None, 0), tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


def test_weights_that_the_dtype_cannot_hold_are_refused(mergeable, tmp_path):
    settings = settings_of(
        "linear", [mergeable["a"], mergeable["b"]], None, [1e8], None, {"normalize": False}, "float16", 0
    )
    with pytest.raises(DataError, match="exceeds float16"):
        merge(settings, tmp_path / "merged")


def test_weights_that_add_up_to_0_are_refused(mergeable, tmp_path):
    settings = settings_of("linear", [mergeable["a"], mergeable["b"]], None, [1, -1], None, {}, None, 0)
    with pytest.raises(ConfigError, match="must not add up to 0"):
        merge(settings, tmp_path / "merged")


def test_a_model_that_holds_more_than_its_configuration_says_is_refused(mergeable, tmp_path):
    """Half of its layers would be left out in silence."""
    folder = changed(mergeable["b"], tmp_path / "cut", lambda tensors: None)
    config = json.loads((tmp_path / "cut/config.json").read_text())
    (tmp_path / "cut/config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS - 1}))
    with pytest.raises(DataError, match=r"have no place in it \(model\.layers\.3\."):
        merge(settings_of("linear", [folder, folder], None, None, None, {}, None, 0), tmp_path / "merged")


def test_weights_that_nothing_loads_take_no_part(mergeable, tmp_path):
    """A file beside model.safetensors, such as Mistral's consolidated.safetensors, is not read by transformers either."""
    folder = changed(mergeable["b"], tmp_path / "beside", lambda tensors: None)
    save_file({"layers.0.w1": torch.zeros(2)}, tmp_path / "beside/consolidated.safetensors")
    found = merged(tmp_path, settings_of("linear", [mergeable["a"], folder], None, None, None, {}, None, 0))
    a, b = weights(mergeable["a"]), weights(mergeable["b"])
    assert all(torch.equal(found[name], (a[name] + b[name]) / 2) for name in a)


def test_a_file_of_the_weights_that_the_index_lists_and_is_gone(mergeable, tmp_path):
    folder = tmp_path / "parts"
    AutoModelForCausalLM.from_pretrained(mergeable["b"]).save_pretrained(folder, max_shard_size="60KB")
    pretrained_tokenizer(mergeable["b"]).save_pretrained(folder)
    settings = settings_of("linear", [mergeable["a"], str(folder)], None, None, None, {}, None, 0)
    found, a, b = merged(tmp_path, settings), weights(mergeable["a"]), weights(mergeable["b"])
    assert all(torch.equal(found[name], (a[name] + b[name]) / 2) for name in a)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(DataError, match="must have all its weights"):
        merge(settings, tmp_path / "again")


@pytest.mark.parametrize("layers", [[0, LAYERS - 1], [1, LAYERS], [0, LAYERS + 1], [0, 10**30]])
def test_a_slice_of_some_layers_is_refused(mergeable, tmp_path, layers):
    path = tmp_path / "slice.yaml"
    sources = ", ".join(f"{{model: {mergeable[name]}, layer_range: {layers}}}" for name in "ab")
    path.write_text(f"merge_method: linear\nslices: [{{sources: [{sources}]}}]")
    with pytest.raises(ConfigError, match="layer_range must be all layers"):
        merge(read_settings(path), tmp_path / "merged")


def test_a_dtype_that_is_not_written_names_the_option(mergeable, tmp_path):
    def small(tensors):
        tensors.update({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()})

    folders = [changed(mergeable[name], tmp_path / name, small) for name in "ab"]
    with pytest.raises(ConfigError, match="stored in float8_e4m3fn; give --dtype"):
        merge(settings_of("linear", folders, None, None, None, {}, None, 0), tmp_path / "merged")
    found, (a, b) = tmp_path / "found", map(weights, folders)
    merge(settings_of("linear", folders, None, None, None, {}, "float32", 0), found)
    assert all(torch.equal(weights(found)[name], (a[name].float() + b[name].float()) / 2) for name in a)


def test_a_full_disk_names_the_output_and_leaves_nothing(mergeable, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(WeightsWriter, "write", full)
    with pytest.raises(DiskFull, match=r"/merged needs [\d,]+ bytes, [\d,]+ are free"):
        merge(
            settings_of("linear", [mergeable["a"], mergeable["b"]], None, None, None, {}, None, 0), tmp_path / "merged"
        )
    assert not list(tmp_path.iterdir())


def test_what_may_not_be_the_output(mergeable, tmp_path, monkeypatch):
    settings = settings_of("linear", [mergeable["a"], mergeable["b"]], None, None, None, {}, None, 0)
    (tmp_path / "inside").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path / "inside")
    for output in (".", "", "..", "../file", "../link", mergeable["a"], "../inside"):
        with pytest.raises(ConfigError, match="--output must"):
            merge(settings, Path(output))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "inside", "link"]


def test_what_a_killed_merge_has_left_is_removed_by_the_next_and_what_runs_is_not(mergeable, tmp_path):
    """A process of a container often has the id of the one before it."""
    processes = (2**22 + 1, 10**30, os.getpid(), os.getppid(), "x")  # no id is as large as the first two
    *left, running, other = (tmp_path / f".merged[1].{place()}.{process}.tmp" for process in processes)
    for folder in (*left, running, other):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    merge(
        settings_of("linear", [mergeable["a"], mergeable["b"]], None, None, None, {}, None, 0), tmp_path / "merged[1]"
    )
    assert not any(folder.exists() for folder in left)
    assert running.exists()
    assert other.exists()
