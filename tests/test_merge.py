"""Merging: every method against a dense reference in numpy, mergekit's YAML, and what cannot be merged."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_tokenizers import pretrained_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from profuser.errors import ConfigError, DataError
from profuser.merge import blocks, methods
from profuser.merge import models as opened
from profuser.merge.blocks import Blocks
from profuser.merge.run import merge
from profuser.merge.settings import METHODS, MergedModel, MergeSettings, read_settings, settings_of
from profuser.merge.trim import trims
from profuser.merge.weights import Slot, WeightsWriter
from profuser.merge.widen import widen
from profuser.recipe.places import resolve
from profuser.store.files import DiskFull
from profuser.text.token_bytes import TokenBytes

LAYERS = 4


# --- the methods against dense references ----------------------------------------------------------------------------


def whole(method, tensors, *settings, **named):
    """What a method gives for some tensors, put together from its blocks."""
    parts = method(Blocks(tensors, [None] * len(tensors)), *settings, **named)
    return torch.cat([part.reshape(-1) for part in parts]).reshape(tensors[0].shape)


@pytest.fixture(params=[1 << 18, 10], ids=["one block", "several blocks"])
def in_blocks(request, monkeypatch):
    """A tensor is one block, or blocks of ten elements, by which nothing that is tested can be divided."""
    monkeypatch.setattr(blocks, "BLOCK", request.param)


@pytest.fixture(params=[(6, 5), (23,), (3, 2, 4)], ids=["matrix", "vector", "kernel"])
def tensors(request, in_blocks):
    torch.manual_seed(0)
    base = torch.randn(request.param, dtype=torch.float64)
    return base, [base + 0.3 * torch.randn(request.param, dtype=torch.float64) for _ in range(3)]


def test_linear(tensors):
    _, (a, b, c) = tensors
    expected = (0.2 * a + 0.3 * b + 1.0 * c).numpy()
    merged = whole(methods.linear, [a, b, c], [0.2, 0.3, 1.0])
    np.testing.assert_allclose(merged, expected / 1.5, atol=1e-12)
    merged = whole(methods.linear, [a, b, c], [0.2, 0.3, 1.0], normalize=False)
    np.testing.assert_allclose(merged, expected, atol=1e-12)
    with pytest.raises(ValueError, match="add up to 0"):
        whole(methods.linear, [a, b], [1.0, -1.0])


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp(tensors, t):
    _, (a, b, _) = tensors
    x, y = a.numpy().ravel(), b.numpy().ravel()
    angle = np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    expected = (np.sin((1 - t) * angle) * x + np.sin(t * angle) * y) / np.sin(angle)
    np.testing.assert_allclose(whole(methods.slerp, [a, b], t).numpy().ravel(), expected, atol=1e-9)
    # The same direction is interpolated linearly, and so is a tensor of zeros.
    np.testing.assert_allclose(whole(methods.slerp, [a, 2 * a], t), (1 + t) * a, atol=1e-12)
    assert torch.isfinite(whole(methods.slerp, [a, torch.zeros_like(a)], t)).all()


def test_task_arithmetic(tensors):
    base, (a, b, _) = tensors
    expected = base + 0.8 * (0.6 * (a - base) + 0.5 * (b - base))
    merged = whole(methods.task_arithmetic, [base, a, b], [0.6, 0.5], scale=0.8)
    np.testing.assert_allclose(merged, expected, atol=1e-12)
    mean = base + (0.6 * (a - base) + 0.5 * (b - base)) / 1.1
    merged = whole(methods.task_arithmetic, [base, a, b], [0.6, 0.5], normalize=True)
    np.testing.assert_allclose(merged, mean, atol=1e-12)


def test_ties(tensors):
    base, models = tensors
    weights, densities = [0.6, 0.5, 0.2], [0.5, 0.3, 1.0]
    weighted = []
    for model, weight, density in zip(models, weights, densities, strict=True):
        delta = (model - base).numpy().ravel()
        kept = max(1, int(density * delta.size))
        delta[np.argsort(-abs(delta), kind="stable")[kept:]] = 0
        weighted.append(weight * delta)
    sign = np.where(sum(weighted) >= 0, 1, -1)
    agrees = [np.sign(delta) == sign for delta in weighted]
    total = sum(delta * mask for delta, mask in zip(weighted, agrees, strict=True))
    divisor = sum(weight * mask for weight, mask in zip(weights, agrees, strict=True))
    expected = base.numpy().ravel() + total / np.where(divisor == 0, 1, divisor)
    np.testing.assert_allclose(
        whole(methods.ties, [base, *models], weights, densities).numpy().ravel(), expected, atol=1e-12
    )


def test_dare_keeps_a_share_and_the_expected_value():
    base, model = torch.zeros(400, 500), torch.ones(400, 500)
    for method in (methods.dare_linear, methods.dare_ties):
        merged = whole(method, [base, model], [0.5], [0.3], torch.Generator().manual_seed(1))
        assert merged.unique().tolist() == pytest.approx([0.0, 0.5 / 0.3])
        assert float((merged > 0).float().mean()) == pytest.approx(0.3, abs=0.005)
        assert float(merged.mean()) == pytest.approx(0.5, abs=0.01)
        again = whole(method, [base, model], [0.5], [0.3], torch.Generator().manual_seed(1))
        assert torch.equal(merged, again)
    kept = whole(methods.dare_ties, [base, model], [0.5], [1.0], torch.Generator())
    assert torch.equal(kept, torch.full_like(base, 0.5))


@pytest.mark.parametrize("densities", [[0.3, 0.6, 0.4], [1.0, 0.6, 1.0], [0.3, 1.0, 0.4]])
def test_dares_random_numbers_are_those_for_one_whole_task_vector_after_the_other(tensors, densities):
    """Whatever the blocks are, a seed gives one result."""
    base, models = tensors
    generator, expected = torch.Generator().manual_seed(5), base.clone()
    for model, density in zip(models, densities, strict=True):
        kept = torch.rand(base.shape, generator=generator) < density if density < 1 else torch.ones_like(base)
        expected += 0.5 * kept * (model - base) / density
    found = whole(methods.dare_linear, [base, *models], [0.5] * 3, densities, torch.Generator().manual_seed(5))
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [1e-9, 0.2, 0.5, 0.77, 0.999])
@pytest.mark.parametrize("steps", [1, 3, 40, None], ids=lambda steps: f"steps {steps}")
def test_exactly_the_share_of_largest_elements_is_kept_and_of_equal_ones_the_first(in_blocks, dtype, density, steps):
    """`steps` different magnitudes make ties, in vectors with both signs and zeros; None gives numbers of all sizes."""
    rng = np.random.default_rng(3)
    values = rng.integers(-(steps or 1), (steps or 1) + 1, 211) * 0.37
    if steps is None:
        values = rng.standard_normal(211) * 10.0 ** rng.uniform(-40, 30, 211)
    delta = torch.from_numpy(values).to(dtype)
    parameter = Blocks([torch.zeros_like(delta), delta], [None, None])
    (trim,) = trims(parameter, [density])
    assert trim is not None
    found = torch.cat([trim(tensor - base) for base, tensor in parameter])
    kept = max(1, int(density * len(delta)))
    expected = torch.zeros_like(delta)
    first = np.argsort(-delta.abs().numpy(), kind="stable")[:kept].copy()
    expected[first] = delta[first]
    assert torch.equal(found, expected)
    assert trims(parameter, [1.0]) == [None]


def dense_widen(base: np.ndarray, models: list[np.ndarray], by_row: bool) -> np.ndarray:
    """WIDEN, column by column."""
    if base.ndim == 1:
        changes = [np.array([abs(m - base) for m in models])]
    else:
        shape = base.shape
        flat = [x.reshape(shape[0], -1) for x in (base, *models)]
        flat = flat if by_row else [x.T for x in flat]  # a row of `flat` is a column of the paper
        magnitude, direction = [], []
        for model in flat[1:]:
            magnitude.append([abs(np.linalg.norm(w) - np.linalg.norm(w0)) for w, w0 in zip(model, flat[0])])
            direction.append([1 - w @ w0 / np.linalg.norm(w) / np.linalg.norm(w0) for w, w0 in zip(model, flat[0])])
        changes = [np.array(magnitude), np.array(direction)]
    weights = []
    for of_kind in changes:
        n = of_kind.shape[1]
        ranks = np.array([[sum(of_model < value) for value in of_model] for of_model in of_kind])
        importance = np.exp(ranks / n) / np.exp(ranks / n).sum(0)
        importance[2 * ranks > n - 1] = 1
        weights.append(importance)
    merged = base.copy()
    for n, model in enumerate(models):
        weight = np.mean([kind[n] for kind in weights], axis=0)
        if base.ndim > 1:
            weight = weight.reshape(-1, *[1] * (base.ndim - 1)) if by_row else weight.reshape(1, *base.shape[1:])
        merged = merged + weight * (model - base)
    return merged


@pytest.mark.parametrize("by_row", [False, True])
def test_widen(tensors, by_row):
    base, models = tensors
    expected = dense_widen(base.numpy(), [model.numpy() for model in models], by_row)
    np.testing.assert_allclose(whole(widen, [base, *models], by_row=by_row), expected, atol=1e-10)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory of a process is read from /proc")
@pytest.mark.parametrize("method", METHODS)
def test_no_whole_tensor_is_in_memory(tmp_path, monkeypatch, method):
    """A tensor has 8 MB, or 16 MB in the dtype of the computation, and a block 64 kB."""
    monkeypatch.setattr(blocks, "BLOCK", 1 << 14)
    shape = (1 << 14, 1 << 8)
    base = (0.02 * torch.randn(shape)).bfloat16()
    save_file({"0": base, "1": base + base.flip(0) / 8, "2": base + base.flip(1) / 8}, tmp_path / "x.safetensors")
    count = 2 if method == "slerp" else 3
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        parameter = Blocks([file.get_tensor(f"{n}") for n in range(count)], [None] * count)
    settings: dict[str, tuple] = {
        "linear": ([0.2, 0.3, 0.4],),
        "slerp": (0.3,),
        "task_arithmetic": ([0.5, 0.3],),
        "ties": ([0.5, 0.3], [0.5, 0.3]),
        "dare_linear": ([0.5, 0.3], [0.5, 0.3], torch.Generator()),
        "dare_ties": ([0.5, 0.3], [0.5, 0.3], torch.Generator()),
        "widen": (),
    }
    function = widen if method == "widen" else getattr(methods, method)
    start = most = 0
    for _ in range(2):  # the second time, no library asks for memory for the first time
        start = most = own_memory()
        for part in function(parameter, *settings[method]):
            assert part.numel() <= 1 << 14
            most = max(most, own_memory())
    assert most - start < 4e6


def own_memory() -> int:
    """The bytes that belong to this process alone; what is mapped from files does not count."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


# --- models on disk --------------------------------------------------------------------------------------------------


def written(folder: Path, model, tokenizer) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and three models that were trained from it, all with guardian's tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = pretrained_tokenizer(resolve("demo:guardian"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4
    )
    base = AutoModelForCausalLM.from_config(config)
    found = {"base": written(folder / "base", base, tokenizer)}
    for name in "abc":
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(base.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        found[name] = written(folder / name, model, tokenizer)
    return found


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(path).items()}


def merged(tmp_path, settings: MergeSettings) -> dict[str, torch.Tensor]:
    merge(settings, tmp_path / "merged")
    return weights(tmp_path / "merged")


def test_a_merged_model_loads_and_speaks(models, tmp_path):
    settings = settings_of("ties", [models["a"], models["b"]], models["base"], [0.5], [0.6], {}, "bfloat16", 0)
    merge(settings, tmp_path / "merged")
    model, loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert model.dtype == torch.bfloat16
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]
    tokenizer = pretrained_tokenizer(tmp_path / "merged")
    ids = torch.tensor([tokenizer.encode("Hello")])
    assert model(input_ids=ids).logits.shape == (1, ids.shape[1], model.config.vocab_size)
    assert json.loads((tmp_path / "merged/merge.json").read_text())["method"] == "ties"
    a, b, base = (weights(models[name]) for name in ("a", "b", "base"))
    name = "model.layers.1.mlp.up_proj.weight"
    expected = whole(methods.ties, [base[name], a[name], b[name]], [0.5, 0.5], [0.6, 0.6])
    assert torch.equal(weights(tmp_path / "merged")[name], expected.bfloat16())


def test_gradients_and_filters_of_mergekits_yaml(models, tmp_path):
    """The layers stand at 0, 1/3, 2/3 and 1, all other parameters at 0. Of filters the first that fits counts."""
    path = tmp_path / "slerp.yaml"
    path.write_text(
        f"""
        merge_method: slerp
        base_model: {models["a"]}
        slices:
        - sources:
          - {{model: {models["a"]}, layer_range: [0, {LAYERS}]}}
          - {{model: {models["b"]}, layer_range: [0, {LAYERS}]}}
        parameters:
          t:
          - {{filter: self_attn, value: [0, 0.5, 1]}}
          - {{filter: mlp, value: [1, 0]}}
          - value: 0.25
        dtype: float32
        """
    )
    found = merged(tmp_path, read_settings(path))
    a, b = weights(models["a"]), weights(models["b"])
    expected = {
        "model.layers.0.self_attn.q_proj.weight": 0,
        "model.layers.1.self_attn.q_proj.weight": 1 / 3,
        "model.layers.3.self_attn.q_proj.weight": 1,
        "model.layers.1.mlp.up_proj.weight": 2 / 3,
        "model.layers.2.input_layernorm.weight": 0.25,
        "model.embed_tokens.weight": 0.25,
        "lm_head.weight": 0.25,
    }
    for name, t in expected.items():
        torch.testing.assert_close(found[name], whole(methods.slerp, [a[name], b[name]], t), rtol=0, atol=1e-7)


def test_a_models_own_settings_stand_before_those_for_all(models, tmp_path):
    settings = MergeSettings(
        method="linear",
        models=[MergedModel(model=models["a"], parameters={"weight": 3}), MergedModel(model=models["b"])],
        parameters={"weight": 1},
    )
    found, a, b = merged(tmp_path, settings), weights(models["a"]), weights(models["b"])
    for name in a:
        torch.testing.assert_close(found[name], (3 * a[name] + b[name]) / 4, rtol=0, atol=1e-6)


def test_tokens_of_equal_bytes_are_merged_whatever_their_ids(models, tmp_path):
    """The second model has its tokens in the reverse order, and one that the first does not have is left out."""
    folder = tmp_path / "reversed"
    model = AutoModelForCausalLM.from_pretrained(models["b"])
    tokenizer = json.loads((Path(models["b"]) / "tokenizer.json").read_text())
    size = model.config.vocab_size
    written(folder, model, pretrained_tokenizer(models["b"]))
    vocab = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: size - 1 - i for token, i in vocab.items()}
    for token in tokenizer["added_tokens"]:
        token["id"] = size - 1 - token["id"]
    tokenizer["added_tokens"].sort(key=lambda token: token["id"])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    flipped = {
        name: tensor.flip(0).contiguous() if name in ("model.embed_tokens.weight", "lm_head.weight") else tensor
        for name, tensor in weights(models["b"]).items()
    }
    save_file(flipped, folder / "model.safetensors", metadata={"format": "pt"})
    straight = merged(tmp_path / "1", settings_of("linear", [models["a"], models["b"]], None, None, None, {}, None, 0))
    mapped = merged(tmp_path / "2", settings_of("linear", [models["a"], str(folder)], None, None, None, {}, None, 0))
    assert all(torch.equal(straight[name], mapped[name]) for name in straight)


def test_a_token_that_a_model_lacks_keeps_the_bases_row_exactly(in_blocks):
    """Also where the model is stored in a coarser dtype than the base."""
    torch.manual_seed(0)
    base, other = torch.randn(7, 4), torch.randn(6, 4).bfloat16()
    rows = torch.tensor([5, -1, 0, 3, -1, 2, 1])
    found = list(Blocks([base, other], [None, rows]))
    (ours, theirs) = (torch.cat(parts) for parts in zip(*found, strict=True))
    known = rows >= 0
    assert torch.equal(ours, base)
    assert torch.equal(theirs[known], other[rows[known]].float())
    assert torch.equal(theirs[~known], base[~known])


def test_equal_tokenizer_files_are_not_taken_apart(models, tmp_path, monkeypatch):
    """Only where a file differs, be it in a space, do the tokens have to be compared."""
    taken: list[str] = []

    def tokens(tokenizer):
        taken.append(tokenizer.name_or_path)
        return TokenBytes(tokenizer)

    monkeypatch.setattr(opened, "TokenBytes", tokens)
    settings = settings_of("linear", [models["a"], models["b"]], None, None, None, {}, None, 0)
    found = merged(tmp_path / "1", settings)
    assert not taken
    folder = changed(models["b"], tmp_path / "spaced", lambda tensors: None)
    with open(Path(folder) / "tokenizer.json", "a") as file:
        file.write(" ")
    again = merged(tmp_path / "2", settings_of("linear", [models["a"], folder], None, None, None, {}, None, 0))
    assert len(taken) == 2
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_tied_embeddings_stay_tied(tmp_path):
    tokenizer = pretrained_tokenizer(resolve("demo:guardian"))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    names = [written(tmp_path / name, AutoModelForCausalLM.from_config(config), tokenizer) for name in "ab"]
    found = merged(tmp_path, settings_of("slerp", names, None, None, None, {"t": 0.5}, None, 0))
    assert "lm_head.weight" not in found
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.tie_word_embeddings


def test_large_models_are_written_in_several_files(tmp_path):
    slots = [Slot(f"t{n}", torch.float16, (n + 1, 3)) for n in range(5)]
    tensors = [torch.randn(slot.shape).half() for slot in slots]
    WeightsWriter(tmp_path, slots, max_bytes=40).write(iter(tensors))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 3
    assert index["metadata"]["total_size"] == sum(slot.size for slot in slots)
    found = weights(tmp_path)
    assert all(torch.equal(found[slot.name], tensor) for slot, tensor in zip(slots, tensors, strict=True))
    assert all(index["weight_map"][name] for name in found)


# --- what cannot be merged -------------------------------------------------------------------------------------------


def test_an_architecture_that_differs_is_fused_instead(models, tmp_path):
    tokenizer = pretrained_tokenizer(resolve("demo:guardian"))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=40, num_hidden_layers=LAYERS, num_attention_heads=4
    )
    other = written(tmp_path / "other", AutoModelForCausalLM.from_config(config), tokenizer)
    with pytest.raises(
        ConfigError, match=r"one architecture.*gate_proj.*fuse them instead: `python -m profuser.train`"
    ):
        merge(settings_of("linear", [models["a"], other], None, None, None, {}, None, 0), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".merged*"))


def test_a_vocabulary_that_differs_is_fused_instead(models, tmp_path):
    with pytest.raises(ConfigError, match=r"one vocabulary.*fuse them instead"):
        merge(
            settings_of("linear", ["demo:guardian", "demo:reckoner"], None, None, None, {}, None, 0),
            tmp_path / "merged",
        )


def test_a_base_that_is_no_ancestor(models, tmp_path):
    tokenizer = pretrained_tokenizer(resolve("demo:guardian"))
    config = AutoModelForCausalLM.from_pretrained(models["a"]).config
    stranger = written(tmp_path / "stranger", AutoModelForCausalLM.from_config(config), tokenizer)
    with pytest.raises(ConfigError, match=r"--base must be the model that .* was trained from"):
        merge(settings_of("ties", [models["a"]], stranger, None, None, {}, None, 0), tmp_path / "merged")


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


def test_weights_that_are_damaged(models, tmp_path):
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in Path(models["a"]).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(DataError, match="cannot be read"):
        merge(settings_of("linear", [models["a"], str(folder)], None, None, None, {}, None, 0), tmp_path / "merged")


def changed(source: str, folder: Path, change) -> str:
    """Copies a model and changes its weights. It returns the copy."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_the_models_name(models, tmp_path, value):
    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = value

    spoilt = changed(models["b"], tmp_path / "spoilt", spoil)
    with pytest.raises(DataError, match=r"spoilt: weights must be finite, got NaN or infinity in model\.layers\.1"):
        merge(settings_of("linear", [models["a"], spoilt], None, None, None, {}, None, 0), tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


def test_weights_that_the_dtype_cannot_hold_are_refused(models, tmp_path):
    settings = settings_of("linear", [models["a"], models["b"]], None, [1e8], None, {"normalize": False}, "float16", 0)
    with pytest.raises(DataError, match="exceeds float16"):
        merge(settings, tmp_path / "merged")


def test_weights_that_add_up_to_0_are_refused(models, tmp_path):
    settings = settings_of("linear", [models["a"], models["b"]], None, [1, -1], None, {}, None, 0)
    with pytest.raises(ConfigError, match="must not add up to 0"):
        merge(settings, tmp_path / "merged")


def test_a_model_that_holds_more_than_its_configuration_says_is_refused(models, tmp_path):
    """Half of its layers would be left out in silence."""
    folder = changed(models["b"], tmp_path / "cut", lambda tensors: None)
    config = json.loads((tmp_path / "cut/config.json").read_text())
    (tmp_path / "cut/config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS - 1}))
    with pytest.raises(DataError, match=r"have no place in it \(model\.layers\.3\."):
        merge(settings_of("linear", [folder, folder], None, None, None, {}, None, 0), tmp_path / "merged")


def test_weights_that_nothing_loads_take_no_part(models, tmp_path):
    """A file beside model.safetensors, such as Mistral's consolidated.safetensors, is not read by transformers either."""
    folder = changed(models["b"], tmp_path / "beside", lambda tensors: None)
    save_file({"layers.0.w1": torch.zeros(2)}, tmp_path / "beside/consolidated.safetensors")
    found = merged(tmp_path, settings_of("linear", [models["a"], folder], None, None, None, {}, None, 0))
    a, b = weights(models["a"]), weights(models["b"])
    assert all(torch.equal(found[name], (a[name] + b[name]) / 2) for name in a)


def test_a_file_of_the_weights_that_the_index_lists_and_is_gone(models, tmp_path):
    folder = tmp_path / "parts"
    AutoModelForCausalLM.from_pretrained(models["b"]).save_pretrained(folder, max_shard_size="60KB")
    pretrained_tokenizer(models["b"]).save_pretrained(folder)
    settings = settings_of("linear", [models["a"], str(folder)], None, None, None, {}, None, 0)
    found, a, b = merged(tmp_path, settings), weights(models["a"]), weights(models["b"])
    assert all(torch.equal(found[name], (a[name] + b[name]) / 2) for name in a)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(DataError, match="must have all its weights"):
        merge(settings, tmp_path / "again")


@pytest.mark.parametrize("layers", [[0, LAYERS - 1], [1, LAYERS], [0, LAYERS + 1], [0, 10**30]])
def test_a_slice_of_some_layers_is_refused(models, tmp_path, layers):
    path = tmp_path / "slice.yaml"
    sources = ", ".join(f"{{model: {models[name]}, layer_range: {layers}}}" for name in "ab")
    path.write_text(f"merge_method: linear\nslices: [{{sources: [{sources}]}}]")
    with pytest.raises(ConfigError, match="layer_range must be all layers"):
        merge(read_settings(path), tmp_path / "merged")


def test_a_dtype_that_is_not_written_names_the_option(models, tmp_path):
    def small(tensors):
        tensors.update({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()})

    folders = [changed(models[name], tmp_path / name, small) for name in "ab"]
    with pytest.raises(ConfigError, match="stored in float8_e4m3fn; give --dtype"):
        merge(settings_of("linear", folders, None, None, None, {}, None, 0), tmp_path / "merged")
    found, (a, b) = tmp_path / "found", map(weights, folders)
    merge(settings_of("linear", folders, None, None, None, {}, "float32", 0), found)
    assert all(torch.equal(weights(found)[name], (a[name].float() + b[name].float()) / 2) for name in a)


def test_a_full_disk_names_the_output_and_leaves_nothing(models, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(WeightsWriter, "write", full)
    with pytest.raises(DiskFull, match=r"/merged needs [\d,]+ bytes, [\d,]+ are free"):
        merge(settings_of("linear", [models["a"], models["b"]], None, None, None, {}, None, 0), tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_what_may_not_be_the_output(models, tmp_path, monkeypatch):
    settings = settings_of("linear", [models["a"], models["b"]], None, None, None, {}, None, 0)
    (tmp_path / "inside").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path / "inside")
    for output in (".", "", "..", "../file", "../link", models["a"], "../inside"):
        with pytest.raises(ConfigError, match="--output must"):
            merge(settings, Path(output))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "inside", "link"]


def test_what_a_killed_merge_has_left_is_removed_by_the_next_and_what_runs_is_not(models, tmp_path):
    """A process of a container often has the id of the one before it."""
    processes = (2**22 + 1, 10**30, os.getpid(), os.getppid(), "x")  # no id is as large as the first two
    *left, running, other = (tmp_path / f".merged[1].{process}.tmp" for process in processes)
    for folder in (*left, running, other):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    merge(settings_of("linear", [models["a"], models["b"]], None, None, None, {}, None, 0), tmp_path / "merged[1]")
    assert not any(folder.exists() for folder in left)
    assert running.exists()
    assert other.exists()


def test_the_command(models, tmp_path):
    command = [sys.executable, "-m", "profuser.merge", "--method", "slerp", "--models", models["a"], models["b"]]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "merged")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "merged 2 models by slerp" in done.stdout
    again = subprocess.run(
        [*command, "--output", str(tmp_path / "merged")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert again.returncode == 2
    assert "--output must be a new or empty directory" in again.stderr
