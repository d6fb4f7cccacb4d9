"""The model of a complete run is uploaded to the Hub only where the recipe asks for it, and a failure leaves the run complete."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_runs import run

from profuser.train import hub

pytestmark = pytest.mark.usefixtures("in_run")
ASKED = ("train", "--config", "recipe.yaml", "--hub.repository", "lab/fused")


class FakeApi:
    """The Hub: repositories that exist, each with whether it is private, and what was uploaded to them."""

    def __init__(self):
        self.private: dict[str, bool] = {}
        self.uploads: list[tuple[str, set[str]]] = []
        self.down = False

    def __call__(self):
        return self

    def create_repo(self, repository, *, private, exist_ok):
        if self.down:
            raise ConnectionError("no route to the Hub\nand more lines")
        assert exist_ok
        self.private.setdefault(repository, private)

    def repo_info(self, repository):
        return SimpleNamespace(private=self.private[repository])

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        names = {str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()}
        taken = {name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)}
        self.uploads.append((repo_id, taken))


@pytest.fixture
def api(monkeypatch):
    fake = FakeApi()
    monkeypatch.setattr(hub, "HfApi", fake)
    monkeypatch.setattr(hub, "get_token", lambda: "a token")
    return fake


def test_nothing_is_uploaded_unless_the_recipe_asks_for_it(api):
    assert run("train", "--config", "recipe.yaml")[0] == 0
    assert api.private == {}


def test_the_models_files_are_uploaded_once_into_a_private_repository(api):
    for said in ("uploaded: lab/fused", "is complete already"):
        code, out, err = run(*ASKED)
        assert (code, err) == (0, "")
        assert said in out
    ((repository, names),) = api.uploads
    assert repository == "lab/fused"
    assert api.private == {"lab/fused": True}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= names
    # What tells of the data stays here.
    assert not {"report.html", "evaluation.json", "metrics.jsonl", "run.json", "scores.json"} & names
    assert not any(name.startswith("checkpoints") for name in names)
    assert run(*ASKED[:-1], "lab/other")[0] == 0
    assert [name for name, _ in api.uploads] == ["lab/fused", "lab/other"]


def test_after_a_failure_the_run_is_complete_and_the_same_command_tries_again(api):
    api.down = True
    code, out, err = run(*ASKED)
    assert code == 1
    assert err.splitlines() == [
        "error: the model could not be uploaded to lab/fused (no route to the Hub); the run is complete, and the same command tries "
        "again"
    ]
    assert "report:" in out
    assert json.loads(Path("runs/recipe/run.json").read_text())["status"] == "complete"
    api.down = False
    code, out, err = run(*ASKED)
    assert (code, err) == (0, "")
    assert len(api.uploads) == 1


def test_nothing_is_uploaded_to_a_public_repository_unless_that_is_said(api):
    api.private["lab/fused"] = False
    code, _, err = run(*ASKED)
    assert code == 2
    assert "hub.repository must be private where hub.private is true, lab/fused is public" in err
    assert api.uploads == []
    assert run(*ASKED, "--hub.private", "false")[0] == 0
    assert len(api.uploads) == 1


@pytest.mark.parametrize("name", ["a/b/c", "lab/..", "lab/fused model", ""])
def test_what_is_no_name_on_the_hub_is_refused_before_anything_is_done(api, name):
    code, out, err = run(*ASKED[:-1], name)
    assert (code, out) == (2, "")
    assert "hub.repository must be a name on the Hub such as org/model" in err
    assert len(err.splitlines()) == 1


def test_without_a_token_a_run_does_not_begin(api, monkeypatch):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    code, out, err = run(*ASKED)
    assert (code, out) == (2, "")
    assert "hub.repository needs a token of the Hub, there is none; run `hf auth login`" in err
