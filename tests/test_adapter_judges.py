"""A judge may be a peft adapter over a base: it is the reward model that peft makes of the two, with the score head that either has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_tokenizers import CHATML, byte_level, wrap
from test_judges import RESPONSES, ROWS, SIZES, check_scores_are_those_of_each_alone
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from profuser.errors import ConfigError, DataError
from profuser.models.load import load_tokenizer
from profuser.plan.architecture import open_architecture
from profuser.prepare.judges import judge_fingerprint, load_judge, open_judge, reward_source
from profuser.recipe.schema import JudgeConfig


def large(model: Any) -> Any:
    """Gives a model random weights that are so large that every token matters."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_base(folder: Path, kind: Any = AutoModelForCausalLM, **settings: Any) -> Path:
    """Saves a small random model with a tokenizer; a language model unless another kind is asked for."""
    torch.manual_seed(0)
    tokenizer = wrap(byte_level(500), CHATML)
    config = LlamaConfig(**SIZES, max_position_embeddings=128, vocab_size=len(tokenizer), pad_token_id=0, **settings)
    large(kind.from_config(config, dtype=torch.float32)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(folder: Path, base: Path, outputs: int = 1, **options: Any) -> str:
    """Saves an adapter of a reward model over a base, and beside it the model that peft makes of the two; returns its place."""
    torch.manual_seed(1)
    config = {"num_labels": outputs, "dtype": torch.float32, "ignore_mismatched_sizes": True}
    model = AutoModelForSequenceClassification.from_pretrained(base, **config)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    settings: dict[str, Any] = {
        "r": 4,
        "init_lora_weights": False,
        "task_type": "SEQ_CLS",
        "target_modules": ["q_proj", "down_proj"],
    } | options
    made: Any = peft.get_peft_model(model, peft.LoraConfig(**settings))
    made.peft_config["default"].base_model_name_or_path = str(base)
    made.save_pretrained(folder)
    whole = folder.with_name("whole")
    made.merge_and_unload().save_pretrained(whole)
    load_tokenizer(reward_source(JudgeConfig(name="rm", model=str(base)), str(base))).save_pretrained(whole)
    return str(folder)


def scores(config: JudgeConfig) -> torch.Tensor:
    open_judge(config)
    return torch.from_numpy(load_judge(config)(ROWS, RESPONSES))


def assert_same(location: str, **options: Any) -> None:
    """Checks that an adapter scores as the whole model beside it does."""
    whole = Path(location).with_name("whole")
    check_scores_are_those_of_each_alone(str(whole))
    expected = scores(JudgeConfig(name="rm", model=str(whole)))
    found = scores(JudgeConfig(name="rm", model=location, **options))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("options", [{}, {"task_type": None, "modules_to_save": ["score"]}], ids=["SEQ_CLS", "by name"])
def test_over_a_language_model_the_adapters_score_head_comes_along(tmp_path, options):
    location = make_adapter(tmp_path / "one", make_base(tmp_path / "base"), **options)
    assert "base_model.model.score.weight" in load_file(tmp_path / "one/adapter_model.safetensors")
    assert_same(location)


def test_over_a_classifier_with_several_outputs_it_takes_the_place_of_its_head(tmp_path):
    base = make_base(tmp_path / "base", AutoModelForSequenceClassification, num_labels=3)
    assert_same(make_adapter(tmp_path / "one", base))


def test_over_a_reward_model_the_bases_head_stays_where_the_adapter_has_none(tmp_path):
    base = make_base(tmp_path / "base", AutoModelForSequenceClassification, num_labels=1)
    model = AutoModelForSequenceClassification.from_pretrained(base)
    made: Any = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"]))
    made.peft_config["default"].base_model_name_or_path = str(base)
    made.save_pretrained(tmp_path / "one")
    made.merge_and_unload().save_pretrained(tmp_path / "whole")
    load_tokenizer(reward_source(JudgeConfig(name="rm", model=str(base)), str(base))).save_pretrained(
        tmp_path / "whole"
    )
    assert_same(str(tmp_path / "one"))


def test_a_base_may_be_given_and_both_files_are_known(tmp_path):
    location = make_adapter(tmp_path / "one", make_base(tmp_path / "base"))
    known = {judge_fingerprint(JudgeConfig(name="rm", model=location))}
    moved = (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"judge rm: .*must have its base, .* give its place as `base`"):
        open_judge(JudgeConfig(name="rm", model=location))
    assert_same(location, base=str(moved))
    given = JudgeConfig(name="rm", model=location, base=str(moved))
    assert judge_fingerprint(given) in known  # whatever the place
    for file in (moved / "model.safetensors", tmp_path / "one/adapter_model.safetensors"):
        save_file({name: w + 1 for name, w in load_file(file).items()}, file, metadata={"format": "pt"})
        assert judge_fingerprint(given) not in known
        known.add(judge_fingerprint(given))
    source = reward_source(given, location)
    assert open_architecture(source, "scores").parameters > open_architecture(source, "generates").parameters / 2


def without_head(file: Path) -> None:
    weights = load_file(file)
    save_file({name: w for name, w in weights.items() if "score" not in name}, file)


@pytest.mark.parametrize(
    ("outputs", "damage", "says"),
    [
        (1, without_head, r"1 are in neither \(score.weight\); save the score head with the adapter"),
        (2, lambda file: None, r"must have 1 output, .*one has 2 \(score.weight\)"),
        (1, lambda file: file.write_bytes(b"x" * 99), "cannot be read"),
        (1, Path.unlink, "lacks adapter_model.safetensors"),
    ],
    ids=["no head", "two outputs", "damaged", "missing"],
)
def test_what_is_wrong_is_one_line_before_anything_is_loaded(tmp_path, outputs, damage, says):
    location = make_adapter(tmp_path / "one", make_base(tmp_path / "base"), outputs)
    damage(tmp_path / "one/adapter_model.safetensors")
    with pytest.raises(DataError, match=says) as error:
        open_judge(JudgeConfig(name="rm", model=location))
    assert str(error.value).startswith("judge rm: ")
    assert "\n" not in str(error.value)


def test_an_adapter_that_does_not_fit_is_refused_when_it_is_loaded(tmp_path):
    location = make_adapter(tmp_path / "one", make_base(tmp_path / "base"))
    file = tmp_path / "one/adapter_model.safetensors"
    weights = load_file(file)
    weights.pop(next(name for name in weights if "lora_A" in name))
    save_file(weights, file)
    with pytest.raises(DataError, match=r"judge rm: an adapter must fit its base .* \(it lacks"):
        load_judge(JudgeConfig(name="rm", model=location))


def test_a_base_goes_with_an_adapter_alone(tmp_path):
    with pytest.raises(DataError, match="judge rm: base must go with an adapter"):
        open_judge(JudgeConfig(name="rm", model=str(make_base(tmp_path / "base")), base="demo:guardian"))
    with pytest.raises(ConfigError, match="judges: rm: base is for a reward model"):
        JudgeConfig(name="rm", function="profuser.demo.verify:score", base="demo:guardian")
