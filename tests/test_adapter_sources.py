"""A source may be a peft adapter over a base: it is the model that peft makes of the two, and is known by the files of both."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import small_run
from safetensors.torch import load_file, save_file

from profuser.errors import ConfigError, DataError
from profuser.models.load import chat_format, load_model, load_tokenizer, open_model
from profuser.models.merged_adapter import base_of, model_fingerprint
from profuser.prepare.engines import check_engine
from profuser.prepare.phases import prepare
from profuser.recipe.generation import GenerationConfig
from profuser.recipe.places import resolve
from profuser.recipe.schema import SourceConfig
from profuser.store import layout
from profuser.train.quantized import check_quantize

IDS = torch.tensor([[5, 9, 100, 41, 7]])


def adapter(folder: Path, base: Path, **options: Any) -> Any:
    """Writes an adapter that changes a model, and returns peft's model of the two."""
    torch.manual_seed(1)
    model = load_model(SourceConfig(name="base", model=str(base)), torch.float32)
    settings: dict[str, Any] = {
        "r": 4,
        "init_lora_weights": False,
        "task_type": "CAUSAL_LM",
        "target_modules": "all-linear",
    } | options
    made: Any = peft.get_peft_model(model, peft.LoraConfig(**settings))
    made.peft_config["default"].base_model_name_or_path = str(base)
    made.save_pretrained(folder)
    return made.eval()


@pytest.fixture
def place(tmp_path):
    """A directory with a base and an adapter over it, and what peft's model of the two says."""
    shutil.copytree(resolve("demo:guardian"), tmp_path / "base")
    made = adapter(tmp_path / "one", tmp_path / "base")
    with torch.no_grad():
        return tmp_path, made(IDS).logits


def source(folder: Path, **options: Any) -> SourceConfig:
    return SourceConfig(name="one", model=str(folder), **options)


def logits(config: SourceConfig, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        return load_model(config, dtype)(IDS).logits


def test_an_adapter_is_the_model_that_peft_makes_of_it(place):
    folder, expected = place
    one = source(folder / "one")
    torch.testing.assert_close(logits(one), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(source(folder / "base")), expected, atol=0.1)
    model = load_model(one, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any("lora" in name for name, _ in model.named_modules())
    assert all(parameter.requires_grad for parameter in model.parameters())  # it may be the target
    assert open_model(one).model_type == "llama"


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_kinds_of_adapters(tmp_path, options):
    shutil.copytree(resolve("demo:guardian"), tmp_path / "base")
    made = adapter(tmp_path / "one", tmp_path / "base", **options)
    with torch.no_grad():
        expected = made(IDS).logits
    torch.testing.assert_close(logits(source(tmp_path / "one")), expected, rtol=1e-4, atol=1e-4)


def test_the_tokenizer_is_the_adapters_own_or_the_bases(place):
    folder, _ = place
    one = source(folder / "one")
    base = chat_format(source(folder / "base"))
    assert chat_format(one).prompt_ids("Hi") == base.prompt_ids("Hi")
    assert chat_format(one).end_ids == base.end_ids
    tokenizer = load_tokenizer(source(folder / "base"))
    tokenizer.chat_template = str(tokenizer.chat_template).replace("assistant", "helper")
    tokenizer.save_pretrained(folder / "one")
    assert "helper" in base.token_bytes.of(chat_format(one).prompt_ids("Hi")).decode()


def test_an_adapter_is_known_by_its_own_files_and_those_of_its_base(place):
    folder, _ = place
    shutil.copytree(folder / "base", folder / "other")
    one = source(folder / "one")
    known = {model_fingerprint(one), model_fingerprint(source(folder / "base"))}
    assert model_fingerprint(replace(one, base=str(folder / "other"))) in known  # it has the same files
    for file in ("one/adapter_model.safetensors", "base/model.safetensors"):
        path = folder / file
        weights = load_file(path)
        save_file({name: tensor + 1 for name, tensor in weights.items()}, path, metadata={"format": "pt"})
        assert model_fingerprint(one) not in known
        known.add(model_fingerprint(one))


def test_a_base_on_the_hub_has_the_revision_of_the_adapter_unless_it_is_another_one(place):
    folder, _ = place
    one, path = source(folder / "one"), folder / "one/adapter_config.json"
    for revision in ("a", "b"):
        named = {"base_model_name_or_path": "org/base", "revision": revision}
        path.write_text(json.dumps(json.loads(path.read_text()) | named))
        bases = [base_of(one), base_of(replace(one, base="org/other"))]
        assert [base and (base.model, base.revision) for base in bases] == [("org/base", revision), ("org/other", None)]


def test_a_base_may_be_given(place):
    folder, expected = place
    (folder / "base").rename(folder / "moved")
    with pytest.raises(DataError, match=r"must have its base, .*/base is not there; give its place as `base`"):
        open_model(source(folder / "one"))
    torch.testing.assert_close(
        logits(source(folder / "one", base=str(folder / "moved"))), expected, rtol=1e-4, atol=1e-4
    )


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def lose(file: Path) -> None:
    weights = load_file(file)
    weights.pop(sorted(weights)[0])
    save_file(weights, file)


def extend(file: Path) -> None:
    save_file(
        load_file(file) | {"base_model.model.model.layers.99.self_attn.q_proj.lora_A.weight": torch.ones(4, 8)}, file
    )


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda one: edit(one / "adapter_config.json", base_model_name_or_path=None), "must have a base"),
        (lambda one: edit(one / "adapter_config.json", base_model_name_or_path=str(one)), "must be a whole model"),
        (lambda one: (one / "adapter_config.json").write_text("{"), "adapter_config.json"),
        (lambda one: (one / "adapter_model.safetensors").unlink(), "lacks adapter_model.safetensors"),
        (lambda one: (one / "adapter_model.safetensors").write_bytes(b"x" * 99), "cannot be read"),
        (lambda one: lose(one / "adapter_model.safetensors"), "it lacks"),
        (lambda one: extend(one / "adapter_model.safetensors"), "there is no place for"),
        (lambda one: edit(one / "adapter_config.json", r=8), "RuntimeError"),
        (lambda one: edit(one / "adapter_config.json", target_modules=["no_such"]), "does not"),
        (lambda one: edit(one / "adapter_config.json", peft_type="NONE_SUCH"), "does not"),
        (lambda one: edit(one / "adapter_config.json", base_model_name_or_path=resolve("demo:reckoner")), "does not"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_one_line(place, damage, says):
    folder, _ = place
    damage(folder / "one")
    with pytest.raises(DataError, match=says) as error:
        load_model(source(folder / "one"), torch.float32)
    assert "\n" not in str(error.value)


def test_what_cannot_go_with_an_adapter_is_refused(place):
    folder, _ = place
    one = source(folder / "one")
    with pytest.raises(DataError, match="base must go with an adapter"):
        open_model(source(folder / "base", base="demo:guardian"))
    with pytest.raises(ConfigError, match=r"must have a whole model, .* is an adapter"):
        check_engine("vllm", one, GenerationConfig(engine="vllm"))
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ConfigError, match="must go with a whole model"):
        check_quantize(one, torch.device("cpu"))


def test_a_store_of_an_adapter_is_that_of_the_merged_model(place):
    folder, _ = place
    merged = load_model(source(folder / "one"), torch.float32)
    merged.save_pretrained(folder / "merged")
    load_tokenizer(source(folder / "base")).save_pretrained(folder / "merged")
    stores = []
    for name in ("one", "merged"):
        spelt = f"[{{name: a, model: '{folder / name}'}}, {{name: b, model: 'demo:scholar'}}]"
        run = small_run(folder, f"--sources={spelt}", "--target=b", "--judges=[]", "--schedule=fusellm", f"--store={folder / name}-store",
                        "--data.heldout=null", "--generation.max_new_tokens=4")  # fmt: skip
        stores.append(prepare(run))
    for kind in (layout.targets("train"), layout.truth("train", "a")):
        assert stores[0].digest(kind) == stores[1].digest(kind)
    assert stores[0].settings.sources["sources"]["a"]["files"] != stores[1].settings.sources["sources"]["a"]["files"]
