"""The same command on a run that is complete: what is still right stays, the rest is made again or refused."""

import json
import shutil
from pathlib import Path

import pytest
from command_runs import STORE, folder, rows, run, write_rows

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


def test_fresh_moves_nothing_before_it_can_start_over():
    write_rows("train.jsonl", rows("fusion", 7))
    code, _, err = run(*TRAIN, "--fresh")
    assert code == 2, err
    assert (RUN / "model.safetensors").exists()


def test_the_time_of_every_session_counts():
    shutil.rmtree(RUN / "checkpoints")
    record = json.loads((RUN / "run.json").read_text())
    (RUN / "run.json").write_text(json.dumps(record | {"status": "running", "seconds": {"prepare": 1000.0}}))
    code, _, err = run(*TRAIN)
    assert code == 0, err
    assert json.loads((RUN / "run.json").read_text())["seconds"]["prepare"] > 1000
