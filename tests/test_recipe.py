"""Recipes: what a correct one may say, and how a wrong one is refused."""

import pytest
import yaml

from profuser.errors import ConfigError
from profuser.recipe.compare import differing_keys
from profuser.recipe.parse import parse_run
from profuser.recipe.places import RECIPES_DIR, is_path, resolve

MINIMAL = {"sources": [{"name": "a", "model": "demo:guardian"}], "target": "a", "data": {"train": "demo:fusion.jsonl"}}


def parse(tmp_path, recipe, *argv):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return parse_run("train", ["--config", str(path), *argv], {"fresh": "start over"}, "")


def test_no_arguments_mean_the_bundled_demo():
    run = parse_run("train", [], {}, "")
    assert run.name == "demo"
    assert str(run.output_dir) == "runs/demo"
    assert str(run.store_dir) == "runs/demo-store"


def test_a_recipe_takes_its_name_from_the_file_and_overrides_from_the_line(tmp_path):
    run = parse(tmp_path, MINIMAL, "--optim.lr", "0.5", "--schedule", "sft", "--fresh")
    assert (run.name, run.recipe.optim.lr, run.recipe.schedule, run.options) == ("mine", 0.5, "sft", {"fresh": True})


def test_stages_can_be_spelt_out(tmp_path):
    recipe = MINIMAL | {"schedule": [{"inference_weight": 1.0}, {"training_weight": 1.0, "share": 2.0}]}
    schedule = parse(tmp_path, recipe).recipe.schedule
    assert isinstance(schedule, list)
    assert [stage.share for stage in schedule] == [1.0, 2.0]


@pytest.mark.parametrize("recipe", sorted(RECIPES_DIR.glob("*.yaml")), ids=lambda p: p.name)
def test_every_bundled_recipe_parses(recipe):
    assert parse_run("train", ["--config", str(recipe)], {}, "").recipe.sources


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"bogus": 1}, "bogus"),
        ({"data": {"train": "x", "tarin": "y"}}, "tarin"),
        ({"sources": [{"name": "a", "model": "m", "modell": "n"}]}, "modell"),
        ({"optim": {"lr": "fast"}}, "optim.lr"),
        ({"optim": {"steps": 0}}, "optim.steps"),
        ({"optim": {"batch_size": 0}}, "optim.batch_size"),
        ({"optim": {"temperature": 2.0}}, "renormalize"),
        ({"schedule": "progresive"}, "schedule"),
        ({"schedule": []}, "at least one stage"),
        ({"schedule": [{"share": 1.0}]}, "inference_weight or training_weight"),
        ({"sources": []}, "at least one model"),
        ({"sources": [{"name": "a", "model": "m"}, {"name": "a", "model": "n"}]}, "'a' twice"),
        ({"sources": [{"name": "../a", "model": "m"}]}, "'../a'"),
        ({"target": "b"}, "sources: a"),
        ({"judges": [{"name": "j"}]}, "either model or function"),
        ({"align": {"min_reliability": 3.0}}, "min_reliability"),
        ({"sources": [{"name": "fused", "model": "m"}]}, "'fused'"),
        ({"generation": {"responses_per_source": 2}}, "temperature"),
        ({"optim": {"beta": -1.0}}, "optim.beta"),
        ({"optim": {"betas": [1.5, 0.9]}}, "optim.betas"),
        ({"optim": {"log_every": 0}}, "optim.log_every"),
        ({"seed": -1}, "seed"),
        ({"date": "31.7.2026"}, "date must be a date such as"),
    ],
)
def test_a_wrong_recipe_names_the_key(tmp_path, change, expected):
    with pytest.raises(ConfigError) as error:
        parse(tmp_path, MINIMAL | change)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("stage", "new"),
    [({"infer_weight": 1.0}, "inference_weight"), ({"train_weight": 1.0}, "training_weight")],
)
def test_an_old_spelling_names_the_new_one(tmp_path, stage, new):
    with pytest.raises(ConfigError, match=f"{next(iter(stage))} is now called {new}"):
        parse(tmp_path, MINIMAL | {"schedule": [stage]})


@pytest.mark.parametrize("missing", ["sources", "target", "data"])
def test_a_recipe_without_a_needed_key_says_which(tmp_path, missing):
    recipe = {k: v for k, v in MINIMAL.items() if k != missing}
    with pytest.raises(ConfigError, match=missing):
        parse(tmp_path, recipe)


def test_a_bundled_name_stays_inside_the_demo():
    with pytest.raises(ConfigError, match="inside"):
        resolve("demo:../../setup.py")


def test_what_looks_like_a_path_is_never_a_hub_id():
    assert all(map(is_path, ("./m", "/m", "~/m", "../m", "a/b/c", "demo:guardian")))
    assert not is_path("org/model")


def test_differing_keys_are_dotted_and_see_through_tuples():
    assert differing_keys({"a": {"b": (1, 2), "c": 1}}, {"a": {"b": [1, 2], "c": 2}, "d": 3}) == ["a.c", "d"]
