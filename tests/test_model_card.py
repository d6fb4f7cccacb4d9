"""The model card says what was fused, on which data, in which stages, how well it does, and under which licences."""

from __future__ import annotations

from dataclasses import replace

import pytest

from profuser.recipe.adapter import AdapterConfig
from profuser.recipe.schema import SourceConfig, StageConfig
from profuser.train.model_card import adapter_card, licence, model_card


@pytest.fixture
def recipe(prepared):
    return prepared[1].recipe


def test_a_card_has_sources_data_stages_and_scores(recipe):
    skills = {"knowledge": 0.25, "mean": 0.5}
    scores = {"sources": {"guardian": skills}, "target_before": skills, "fused": {"knowledge": 0.75, "mean": 0.8234}}
    card = model_card(replace(recipe, optim=replace(recipe.optim, beta=0.3)), scores)
    assert "| `guardian` | demo:guardian | Apache-2.0 |" in card
    assert f"on {recipe.data.train}." in card
    assert "| 1 | 1 | 0 | 0.3 |\n| 2 | 0.1 | 1 | 0.3 |" in card
    assert "| **fused** | 75.0 | 82.3 |" in card
    assert "base_model" not in card


def test_a_card_without_scores_has_no_table_of_them(recipe):
    card = model_card(recipe)
    assert "percent right" not in card
    assert card.startswith("---\nlibrary_name: transformers\n")


def test_stages_that_are_spelt_out_and_an_adapter_are_named(recipe):
    own = replace(recipe, schedule=[StageConfig(training_weight=2.0, beta=0.0)], adapter=AdapterConfig(rank=8))
    card = model_card(own)
    assert "by the schedule **its own stages**" in card
    assert "| 1 | 0 | 2 | 0 |" in card
    assert "A LoRA adapter of rank 8 was trained and merged." in card


def test_the_card_of_an_adapter_names_its_base_on_the_hub_alone(recipe):
    hub = SourceConfig(name="guardian", model="someone/never-downloaded")
    of_hub = replace(recipe, sources=[hub, *(source for source in recipe.sources if source.name != "guardian")])
    assert "base_model: someone/never-downloaded\n" in adapter_card(of_hub, rank=8)
    assert "base_model:" not in adapter_card(recipe, rank=8)


@pytest.mark.parametrize(
    ("card", "named"),
    [
        ("---\nlicense: mit\n---\n# A model", "mit"),
        ("---\nlicense:\n- mit\n- other\n---\n", "['mit', 'other']"),
        ("---\ntags: [a]\n---\n", "not found in its model card"),
        ("---\n: : :\n---\n", "not found in its model card"),
        ("no front matter", "not found in its model card"),
        ("", "not found in its model card"),
        (None, "not found in its model card"),
    ],
)
def test_a_licence_is_that_of_the_sources_own_card(tmp_path, card, named):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert licence(SourceConfig(name="a", model=str(tmp_path))) == named


def test_a_hub_model_whose_card_is_not_here_has_no_licence_and_is_the_base_model(recipe):
    hub = SourceConfig(name="far", model="somebody/not-here")
    card = model_card(replace(recipe, sources=[*recipe.sources, hub]))
    assert "| `far` | somebody/not-here | not found in its model card |" in card
    assert "base_model:\n- somebody/not-here" in card
