"""--fresh checks everything before it renames anything, and renames nothing but a store or a run of ours."""

from __future__ import annotations

import dataclasses
import datetime
import json
import shutil
from pathlib import Path

import pytest
from command_runs import STORE, folder, run

from profuser.prepare.inputs import Inputs
from profuser.recipe.parse import parse_run
from profuser.recipe.places import resolve
from profuser.recipe.schema import JudgeConfig
from profuser.store.fresh import check_fresh, needed
from profuser.store.sealed import write_sealed

TRAIN = ("train", "--config", "recipe.yaml", "--fresh")
PREPARE = ("prepare", "--config", "recipe.yaml", "--fresh")
BOTH = pytest.mark.parametrize(
    ("command", "option"), [(TRAIN, "--output"), (PREPARE, "--store")], ids=["train", "prepare"]
)


@pytest.fixture(autouse=True)
def place(good, monkeypatch):
    """Runs every test in a copy of a folder with a finished run, as `python -m` would."""
    with folder(good) as copy:
        monkeypatch.syspath_prepend(str(copy))
        yield copy


def tree(top: str | Path = ".") -> dict[str, bytes]:
    """Every file below a folder with its content, but for what Python itself writes."""
    files = (path for path in sorted(Path(top).rglob("*")) if path.is_file() and "__pycache__" not in path.parts)
    return {str(path): path.read_bytes() for path in files}


def refused(code: int, *arguments: str) -> str:
    """Runs a command that must change nothing, and returns its line."""
    before = tree()
    found, _, err = run(*arguments)
    assert (found, err.count("\n")) == (code, 1), err
    assert tree() == before
    return err


@BOTH
@pytest.mark.parametrize(
    ("directory", "what"),
    [
        (".", "the working directory"),
        ("..", "the working directory"),
        ("/", "the working directory"),
        ("runs/..", "the working"),
    ],
)
def test_what_a_person_works_in_is_not_renamed(command, option, directory, what):
    assert what in refused(2, *command, option, directory)


@BOTH
def test_the_home_directory_is_not_renamed(command, option, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home/me"))
    (tmp_path / "home/me").mkdir(parents=True)
    for directory in (tmp_path / "home/me", tmp_path / "home"):
        assert "the home directory" in refused(2, *command, option, str(directory))
        assert directory.exists()


@BOTH
def test_a_link_to_what_is_needed_is_not_renamed(command, option):
    Path("link").symlink_to(".")
    assert "the working directory" in refused(2, *command, option, "link")


def ours(directory: str, option: str) -> None:
    """Makes a directory look like a store or run of ours."""
    Path(directory).mkdir(exist_ok=True)
    name, content = ("run.json", {"recipe": {}}) if option == "--output" else ("manifest.json", {"shards": {}})
    (Path(directory) / name).write_text(json.dumps(content))


@BOTH
def test_what_the_recipe_needs_stays_in_its_place(command, option):
    for directory in ("model", "data", "judge", "texts", "recipes"):
        ours(directory, option)
    shutil.copytree("guardian", "model/deep/guardian")
    shutil.copytree(resolve("demo:judge-a"), "judge", dirs_exist_ok=True)
    shutil.copy("heldout.jsonl", "data/heldout.jsonl")
    shutil.copy("guardian/chat_template.jinja", "texts/chat.jinja")
    text = Path("recipe.yaml").read_text()
    text = text.replace("./guardian }", "./model/deep/guardian, chat_template: texts/chat.jinja }")
    text = text.replace("heldout: heldout.jsonl", "heldout: data/heldout.jsonl")
    text = text.replace("judges: [", "judges: [{ name: rm, model: judge }, ")
    Path("recipes/mine.yaml").write_text(text)
    for directory, name in (
        ("model", "guardian"), ("data", "data.heldout"), ("judge", "judge rm"), ("texts", "the chat template of guardian"),
        ("recipes", "the recipe"),
    ):  # fmt: skip
        message = refused(2, command[0], "--config", "recipes/mine.yaml", "--fresh", option, directory)
        assert f"must leave {name} in its place" in message
        assert option in message


def test_whatever_a_recipe_reads_is_needed(tmp_path):
    names = ("base", "responses", "logprobs", "judges-base", "judges-template", "scores")
    paths = {name: f"{tmp_path}/{name}" for name in names}
    run = parse_run("train", ["--config", "recipe.yaml"], {}, "")
    run.recipe.sources[0] = dataclasses.replace(
        run.recipe.sources[0], base=paths["base"], responses=paths["responses"], logprobs=paths["logprobs"]
    )
    judge = JudgeConfig(
        name="rm", model="demo:judge-a", base=paths["judges-base"], chat_template=paths["judges-template"]
    )
    run.recipe.judges[:] = [judge, JudgeConfig(name="people", scores=paths["scores"])]
    for what in ("store", "run"):
        assert {Path(path) for path in paths.values()} <= {path for _, path in needed(run, what)}


def test_a_run_that_holds_its_store_stays_where_it_is():
    shutil.move(STORE, "runs/recipe/store")
    assert "must leave the store" in refused(2, *TRAIN, "--store", "runs/recipe/store")


def test_a_store_that_holds_its_run_stays_where_it_is():
    shutil.move("runs/recipe", f"{STORE}/run")
    assert "must leave the run" in refused(2, *PREPARE, "--output", f"{STORE}/run")


@BOTH
@pytest.mark.parametrize(
    "content", [None, "{}", "[]", "not JSON", "[" * 5000, '{"name": "an app", "recipe": 1, "shards": 1}']
)
def test_a_directory_of_somebody_elses_is_not_renamed(command, option, content):
    Path("photos").mkdir()
    Path("photos/beach.jpg").write_bytes(b"sand")
    if content is not None:
        wrong = "manifest.json" if option == "--output" else "run.json"
        Path("photos", wrong if content.startswith('{"name') else RECORD[option]).write_text(content)
    assert "neither" in refused(3, *command, option, "photos")


@BOTH
@pytest.mark.parametrize("name", ["checkpoints", "targets"])
def test_one_name_that_a_directory_of_ours_has_does_not_make_it_ours(command, option, name):
    Path("photos", name).mkdir(parents=True)
    assert "neither" in refused(3, *command, option, "photos")


RECORD = {"--output": "run.json", "--store": "manifest.json"}


@BOTH
def test_a_file_is_not_renamed(command, option):
    Path("notes").write_text("by hand")
    assert "neither" in refused(3, *command, option, "notes")


@pytest.mark.parametrize(
    ("edit", "code", "says"),
    [
        (lambda: Path("guardian/model.safetensors").unlink(), 3, "weights"),
        (lambda: Path("guardian/tokenizer.json").write_text("{"), 3, "tokenizer"),
        (lambda: Path("guardian/config.json").write_text("{"), 3, "configuration"),
        (lambda: half_of("guardian/config.json"), 3, "have no place"),
        (lambda: Path("train.jsonl").write_text(""), 3, "train.jsonl"),
        (lambda: Path("heldout.jsonl").unlink(), 3, "heldout.jsonl"),
        (lambda: replace("recipe.yaml", "lr:", "lerning_rate:"), 2, "lerning_rate"),
        (lambda: replace("recipe.yaml", "demo.verify:score", "nowhere:score"), 2, "nowhere"),
    ],
)
@pytest.mark.parametrize("command", [TRAIN, PREPARE], ids=["train", "prepare"])
def test_whatever_is_wrong_is_found_before_anything_is_renamed(command, edit, code, says):
    edit()
    assert says in refused(code, *command)


def replace(path: str, old: str, new: str) -> None:
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new))


def half_of(path: str) -> None:
    replace(path, '"num_hidden_layers": 4', '"num_hidden_layers": 2')


def test_a_judge_that_fails_is_found_before_the_store_is_renamed():
    replace("recipe.yaml", "demo.verify:score", "demo.verify:exact_match")
    assert "fix the function" in refused(3, *PREPARE)


def test_a_match_that_fails_is_found_before_the_run_is_renamed():
    replace("recipe.yaml", "profuser.demo.verify:exact_match", "operator:concat")
    assert "evaluation.match" in refused(3, *TRAIN)


def test_another_store_is_found_before_the_run_is_renamed():
    assert "manifest.json" in refused(3, *TRAIN, "--store", "guardian")
    assert "capture.top_k differ" in refused(2, *TRAIN, "--capture.top_k", "3")


def renamed(pattern: str) -> Path:
    (path,) = Path("runs").glob(pattern)
    return path


def test_a_run_and_a_store_are_renamed_and_made_again():
    before = tree("runs/recipe")
    code, out, err = run(*TRAIN)
    assert code == 0, err
    aside = renamed("recipe.2*")
    assert f"renamed the old run runs/recipe to {aside}" in out
    assert {name.replace(str(aside), "runs/recipe"): data for name, data in tree(aside).items()} == before
    model = "runs/recipe/model.safetensors"
    assert Path(model).read_bytes() == before[model]


def test_a_damaged_store_is_renamed_as_its_line_advises():
    manifest = Path(f"{STORE}/manifest.json")
    manifest.write_bytes(manifest.read_bytes()[:100])
    code, _, err = run("prepare", "--config", "recipe.yaml")
    assert code == 3
    assert "python -m profuser.prepare --fresh" in err
    code, out, err = run(*PREPARE)
    assert code == 0, err
    assert f"renamed the old store {STORE} to" in out
    assert (renamed("recipe-store.2*") / "manifest.json").stat().st_size == 100


def test_a_damaged_run_may_be_renamed_as_its_line_advises():
    Path("runs/recipe/run.json").write_text("{")
    assert "--fresh" in refused(3, "train", "--config", "recipe.yaml")
    check_fresh(parse_run("train", ["--config", "recipe.yaml"]), "run")


def test_a_store_that_is_begun_again_has_todays_date():
    manifest = Path(f"{STORE}/manifest.json")
    content = json.loads(manifest.read_text())
    content["settings"]["sources"]["date"] = "2001-02-03"
    write_sealed(manifest, content)
    recipe = parse_run("prepare", ["--config", "recipe.yaml"])
    assert Inputs.open(recipe).date == datetime.date(2001, 2, 3)
    assert Inputs.open(recipe, fresh=True).date >= datetime.date(2026, 1, 1)


@pytest.mark.parametrize("what", ["store", "run"])
def test_a_directory_that_is_empty_or_not_there_may_be_begun_in(what):
    recipe = parse_run("train", ["--config", "recipe.yaml", "--store", "empty", "--output", "empty-too"])
    check_fresh(recipe, what)
    for name in ("empty", "empty-too"):
        Path(name, ".leases").mkdir(parents=True)
    check_fresh(recipe, what)
