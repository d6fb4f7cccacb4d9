"""The same command on a complete run: what is still right stays, and the rest is made again or refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
from command_runs import STORE, folder, rows, run, write_rows

from profuser.store.lease import hold
from profuser.store.sealed import write_sealed
from profuser.train.run_record import read_run, write_run

TRAIN = ("train", "--config", "recipe.yaml")
RUN = Path("runs/recipe")


@pytest.fixture(autouse=True)
def place(good):
    with folder(good):
        yield


def test_a_complete_run_is_left_alone():
    before = {path: path.stat().st_mtime_ns for path in RUN.glob("*.safetensors")}
    code, out, err = run(*TRAIN)
    assert (code, err) == (0, "")
    assert "is complete already" in out
    assert "scoring again" not in out
    assert {path: path.stat().st_mtime_ns for path in RUN.glob("*.safetensors")} == before


def test_every_file_has_the_mode_that_the_umask_asks_for():
    mask = os.umask(0)
    os.umask(mask)
    files = [path for path in Path("runs").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".json", ".html", ".parquet"}
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {oct(0o666 & ~mask)}


def test_a_stricter_umask_is_respected_too():
    (RUN / "model.safetensors").unlink()
    before = os.umask(0o027)
    try:
        assert run(*TRAIN)[0] == 0
    finally:
        os.umask(before)
    assert (RUN / "model.safetensors").stat().st_mode & 0o777 == 0o640


def test_paths_spelt_out_are_the_same_run():
    code, out, _ = run(*TRAIN, "--output", "./runs/recipe", "--store", str(Path(STORE).resolve()))
    assert code == 0
    assert "is complete already" in out


def test_another_evaluation_scores_again():
    recipe = Path("recipe.yaml")
    recipe.write_text(recipe.read_text().replace("evaluation: { match", "evaluation: { examples: 1, match"))
    code, out, err = run(*TRAIN)
    assert code == 0, err
    assert "scoring again" in out
    assert len(json.loads((RUN / "evaluation.json").read_text())["examples"]) == 1
    assert json.loads((RUN / "run.json").read_text())["recipe"]["evaluation"]["examples"] == 1
    assert "scoring again" not in run(*TRAIN)[1]


@pytest.mark.parametrize("name", ["scores.json", "evaluation.json"])
def test_lost_scores_are_made_again(name):
    (RUN / name).unlink()
    code, out, err = run(*TRAIN)
    assert code == 0, err
    assert "scoring again" in out
    assert (RUN / name).exists()


def test_a_lost_model_is_made_again_from_the_last_checkpoint():
    (RUN / "model.safetensors").unlink()
    code, out, err = run(*TRAIN)
    assert code == 0, err
    assert "resuming at step 2 of 2" in out
    assert (RUN / "model.safetensors").exists()


def test_a_lost_summary_is_made_again():
    Path(f"{STORE}/summary.json").unlink()
    code, _, err = run("prepare", "--config", "recipe.yaml")
    assert code == 0, err
    assert json.loads(Path(f"{STORE}/summary.json").read_text())["examples"] == 6


def test_changed_data_are_noticed():
    write_rows("train.jsonl", rows("fusion", 7))
    code, _, err = run(*TRAIN)
    assert code == 2
    assert "data.train differ" in err


def test_a_run_does_not_go_on_with_a_store_that_was_made_again():
    write_rows("train.jsonl", rows("fusion", 7))
    assert run("prepare", "--config", "recipe.yaml")[0] == 0
    code, _, err = run(*TRAIN)
    assert code == 2
    assert "other data (data.train differ)" in err
    before = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    for command in (["evaluate", str(RUN)], ["report", str(RUN)]):
        code, _, err = run(*command)
        assert (code, err.count("\n")) == (2, 1)
        assert "holds a run of other data (data.train differ)" in err
    assert {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()} == before
    print(err)
    assert (RUN / "model.safetensors").exists()


def test_fresh_moves_nothing_before_it_can_start_over():
    write_rows("train.jsonl", rows("fusion", 7))
    code, _, err = run(*TRAIN, "--fresh")
    assert code == 2, err
    assert (RUN / "model.safetensors").exists()


def test_a_fresh_preparation_moves_nothing_before_its_recipe_can_be_opened():
    before = store_files()
    code, _, err = run("prepare", "--config", "recipe.yaml", "--fresh", "--data.train", "missing.jsonl")
    assert code == 3, err
    assert store_files() == before


def test_nothing_in_use_is_moved_for_a_fresh_start():
    before = store_files()
    with hold(Path(STORE), "store", {}, lambda *_: [], use="reads"):
        code, _, err = run("prepare", "--config", "recipe.yaml", "--fresh")
    assert code == 2
    assert err.count("\n") == 1
    assert "in use by process" in err
    with hold(RUN, "run", {}, lambda *_: [], use="alone"):
        code, _, err = run(*TRAIN, "--fresh")
    assert code == 2
    assert "in use by process" in err
    assert store_files() == before
    assert (RUN / "model.safetensors").exists()


def test_the_time_of_every_session_counts():
    shutil.rmtree(RUN / "checkpoints")
    write_run(RUN, read_run(RUN) | {"status": "running", "seconds": {"prepare": 1000.0}})
    code, _, err = run(*TRAIN)
    assert code == 0, err
    record = json.loads((RUN / "run.json").read_text())
    assert record["seconds"]["prepare"] > 1000
    assert record["prepared"] is True


LOOKING = {
    "train": TRAIN,
    "evaluate": ("evaluate", str(RUN)),
    "report": ("report", str(RUN)),
    "doctor": ("doctor", "--config", "recipe.yaml"),
    "store info": ("store", "info", STORE),
    "store verify": ("store", "verify", STORE),
}


def store_files() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path(STORE).rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", LOOKING)
def test_looking_leaves_every_byte_of_the_store_and_needs_no_lease_on_it(command):
    with hold(Path(STORE), "store", {}, lambda *_: ["everything"], use="alone"):
        before = store_files()
        code, _, err = run(*LOOKING[command])
        assert (code, err) == (0, "")
        assert store_files() == before


@pytest.mark.parametrize(
    "command", ["train", *(pytest.param(c, marks=pytest.mark.long) for c in ("evaluate", "report"))]
)
def test_looking_does_not_drop_what_newer_rules_or_another_judge_would_make_anew(command, monkeypatch):
    monkeypatch.setattr("profuser.prepare.inputs.ALIGNMENT_RULES", 99)
    monkeypatch.setattr("profuser.prepare.inputs.judge_fingerprint", lambda judge: "another")
    before = store_files()
    code, _, err = run(*LOOKING[command])
    assert (code, err) == (0, "")
    assert store_files() == before
    code, out, err = run("prepare", "--config", "recipe.yaml")
    assert code == 0, err
    assert "voting again" in out


@pytest.mark.parametrize(
    ("command", "shard"),
    [
        ("evaluate", "targets/heldout-00000.safetensors"),
        pytest.param("evaluate", "responses/heldout-scholar-00000.json", marks=pytest.mark.long),
        ("report", "manifest.json"),
        ("report", "summary.json"),
        ("store verify", "winners/train-scholar-00000.safetensors"),
    ],
)
def test_only_prepare_and_train_build_a_damaged_part_again(command, shard):
    path = Path(STORE) / shard
    path.write_bytes(path.read_bytes()[:-9])
    before = store_files()
    code, _, err = run(*LOOKING[command])
    assert code == 3
    assert "profuser.prepare" in err
    assert err.count("\n") == 1
    assert store_files() == before
    if shard != "manifest.json":
        code, out, err = run("prepare", "--config", "recipe.yaml")
        assert code == 0, err
        assert "building it again" in out or "writing it again" in out
        assert run(*LOOKING[command])[0] == 0


@pytest.mark.parametrize("schema", [1, 2])
def test_a_run_of_an_older_schema_is_named_with_the_command_that_makes_it_anew(schema):
    record = json.loads((RUN / "run.json").read_text()) | {"schema": schema}
    del record["sha256"]
    if schema == 1:
        del record["schema"]
    (RUN / "run.json").write_text(json.dumps(record))
    for command in ("train", "evaluate", "report"):
        code, _, err = run(*LOOKING[command])
        assert code == 3
        assert err.count("\n") == 1
        assert f"has schema {schema}, this version reads 3" in err
        assert "python -m profuser.train --fresh" in err


def test_a_store_of_an_older_schema_is_named_with_the_command_that_makes_it_anew():
    path = Path(STORE) / "manifest.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    path.write_text(json.dumps(content | {"schema": 3}))
    for command in ("train", "evaluate", "store info"):
        code, _, err = run(*LOOKING[command])
        assert code == 3
        assert err.count("\n") == 1
        assert "has schema 3, this version reads 8" in err
        assert "python -m profuser.prepare --fresh" in err


def test_a_run_goes_on_in_the_precision_that_it_was_begun_with(monkeypatch):
    (RUN / "model.safetensors").unlink()
    monkeypatch.setattr("profuser.pipeline.settled_precision", lambda name: "bf16" if name == "auto" else name)
    code, _, err = run(*TRAIN)
    assert code == 0, err
    assert json.loads((RUN / "run.json").read_text())["precision"] == "fp32"


def test_a_store_goes_on_in_the_arithmetic_that_it_was_begun_with(monkeypatch):
    manifest = Path(STORE) / "manifest.json"
    content = json.loads(manifest.read_text())
    assert content["settings"]["sources"]["capture"]["dtype"] == "float32"
    content["settings"]["sources"]["capture"]["dtype"] = "bfloat16"  # as if it had been begun on a GPU
    write_sealed(manifest, content)
    victim = Path(STORE) / "truth/train-scholar-00000.safetensors"
    before = victim.read_bytes()
    victim.unlink()
    code, _, err = run("prepare", "--config", "recipe.yaml")
    assert code == 0, err
    assert victim.read_bytes() != before
    code, _, err = run("prepare", "--config", "recipe.yaml", "--capture.dtype", "float32")
    assert code == 2
    assert "capture.dtype" in err


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", *(pytest.param(n, marks=pytest.mark.long) for n in ("README.md", "chat_template.jinja"))],
)
def test_a_model_that_was_edited_is_said_to_differ_and_stays(name):
    whole = (RUN / name).read_bytes()
    flip(RUN / name, 0.9)
    edited = (RUN / name).read_bytes()
    for command in ("train", "evaluate"):
        code, out, err = run(*LOOKING[command])
        assert (code, err) == (0, "")
        assert f"{name} in runs/recipe is not what training wrote" in out
        assert (RUN / name).read_bytes() == edited
    (RUN / name).unlink()
    assert run(*TRAIN)[0] == 0
    assert (RUN / name).read_bytes() == whole


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", *(pytest.param(name, marks=pytest.mark.long) for name in ("model.safetensors", "config.json"))],
)
def test_a_model_that_cannot_be_read_is_made_again(name):
    whole = (RUN / name).read_bytes()
    (RUN / name).write_bytes(whole[:-9])
    code, _, err = run(*LOOKING["evaluate"])
    assert code == 3
    assert f"{name} differs" in err
    assert "remove that file, and `python -m profuser.train`" in err
    code, out, err = run(*TRAIN)
    assert code == 0, err
    assert f"{name} is gone or damaged: making the model again" in out
    assert (RUN / name).read_bytes() == whole


def test_damaged_scores_are_made_again():
    whole = (RUN / "scores.json").read_bytes()
    flip(RUN / "scores.json")
    code, _, err = run(*LOOKING["report"])
    assert code == 3
    assert "scores.json must be what was written" in err
    assert "`python -m profuser.evaluate runs/recipe`" in err
    assert run(*LOOKING["evaluate"])[0] == 0
    assert (RUN / "scores.json").read_bytes() == whole
    assert run(*LOOKING["report"])[0] == 0


def test_damaged_metrics_come_back_from_a_checkpoint():
    whole = (RUN / "metrics.jsonl").read_bytes()
    flip(RUN / "metrics.jsonl")
    code, _, err = run(*LOOKING["report"])
    assert code == 3
    assert "`python -m profuser.train`" in err
    assert "restored from" in run(*TRAIN)[1]
    assert (RUN / "metrics.jsonl").read_bytes() == whole


def test_metrics_that_no_checkpoint_holds_are_shown_as_far_as_they_are_intact():
    shutil.rmtree(RUN / "checkpoints")
    flip(RUN / "metrics.jsonl", 0.1)
    code, out, err = run(*TRAIN)
    assert code == 0, err
    assert "no checkpoint holds it" in out
    assert "damaged lines of metrics.jsonl" in (RUN / "report.html").read_text(encoding="utf-8")
    assert "no checkpoint holds it" not in run(*TRAIN)[1]


def test_another_runs_record_is_noticed():
    record = read_run(RUN)
    record["recipe"]["seed"] = 5
    for name in ("metrics.jsonl", "model.safetensors"):
        record["files"][name] = {"sha256": "0" * 64, "bytes": 5}
    write_run(RUN, record)
    for command in ("train", "evaluate"):
        code, _, err = run(*LOOKING[command])
        assert code == 3
        assert "must describe the files beside it" in err


@pytest.mark.parametrize(
    "damage", [*(pytest.param(d, marks=pytest.mark.long) for d in ("flipped", "missing")), "a directory"]
)
def test_a_fresh_start_needs_nothing_of_a_damaged_manifest(damage):
    path = Path(STORE) / "manifest.json"
    flip(path) if damage == "flipped" else path.unlink()
    if damage == "a directory":
        path.mkdir()
    code, _, err = run("prepare", "--config", "recipe.yaml", "--fresh")
    assert code == 0, err
    assert run(*LOOKING["evaluate"])[0] == 0


@pytest.mark.parametrize("name", ["summary.json", "samples.parquet"])
def test_a_damaged_finding_is_written_again_as_it_was(name):
    path = Path(STORE) / name
    whole = path.read_bytes()
    flip(path)
    code, out, err = run("prepare", "--config", "recipe.yaml")
    assert code == 0, err
    assert f"store: {name} is damaged or missing: writing it again" in out
    assert path.read_bytes() == whole
    assert run(*LOOKING["store verify"])[0] == 0
