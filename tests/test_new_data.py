"""`python -m profuser.evaluate RUN --data FILE` scores a finished run and other models on a new file, without a store."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path

import pytest
from command_runs import STORE, rows, run, write_rows

from profuser.evaluate import contestants
from profuser.evaluate.terminal import score_table
from profuser.models.fingerprint import fingerprint
from profuser.train.run_record import EVALUATION, SCORES

pytestmark = pytest.mark.usefixtures("in_run")

RUN = Path("runs/recipe")


def scored(*more: str, file: str = "heldout.jsonl") -> dict:
    """Scores the run on a file and returns what is written about it."""
    before = {path: path.read_bytes() for path in RUN.iterdir() if path.is_file()}
    code, _, err = run("evaluate", str(RUN), "--data", file, *more)
    assert (code, err) == (0, "")
    assert {path: path.read_bytes() for path in RUN.iterdir() if path.is_file()} == before, "a file of the run changed"
    newest = max(RUN.glob("evaluations/*.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(newest.read_text())


def test_on_the_heldout_file_the_scores_and_answers_are_the_trainers_own_even_without_the_store():
    shutil.rmtree(STORE)
    found = scored()
    own = json.loads((RUN / SCORES).read_text())
    assert {key: found["scores"][key] for key in own} == own
    evaluation = json.loads((RUN / EVALUATION).read_text())
    for example in evaluation["examples"]:
        row = next(row for row in found["rows"] if row["prompt"] == example["prompt"])
        assert row["responses"] == example["responses"]
        assert row["correct"] == example["correct"]
    assert not Path(STORE).exists()


def test_other_models_are_scored_beside_it_alone_and_together():
    found = scored("--models", "demo:reckoner", "./guardian", "decode:recipe.yaml")
    assert set(found["scores"]["models"]) == {"demo:reckoner", "./guardian", "decode:recipe.yaml"}
    assert found["scores"]["models"]["./guardian"] == found["scores"]["target_before"]
    assert all(set(row["responses"]) == set(row["correct"]) and len(row["responses"]) == 7 for row in found["rows"])


def test_only_what_is_new_is_answered(monkeypatch):
    loaded, real = [], contestants.load_model

    def load(source, *rest):
        loaded.append(source.name)
        return real(source, *rest)

    monkeypatch.setattr(contestants, "load_model", load)
    first = scored()
    assert sorted(loaded) == ["fused", "guardian", "scholar"]
    loaded.clear()
    assert scored("--models", "demo:reckoner")["scores"]["fused"] == first["scores"]["fused"]
    assert loaded == ["demo:reckoner"]

    # Answers that are damaged are answered again.
    for path in RUN.glob("evaluations/answers/*.json"):
        path.write_bytes(path.read_bytes()[:-20])
    loaded.clear()
    assert scored()["rows"] == first["rows"]
    assert sorted(loaded) == ["fused", "guardian", "scholar"]


def test_a_model_is_another_one_when_its_files_change_and_not_when_what_is_said_about_it_does():
    before = fingerprint(str(RUN))
    for name in ("run.json", SCORES, EVALUATION, "metrics.jsonl", "report.html", "README.md", "scores.png"):
        (RUN / name).write_text("other")
    assert fingerprint(str(RUN)) == before
    config = RUN / "generation_config.json"
    config.write_text(config.read_text().replace("{", '{"a": 1,', 1))
    assert fingerprint(str(RUN)) != before


@pytest.mark.long
def test_a_run_that_was_scored_on_new_data_is_still_complete():
    scored()
    code, out, err = run("train", "--config", "recipe.yaml")
    assert (code, err) == (0, "")
    assert "is complete already" in out


def test_rows_in_other_columns_or_without_skills_are_read_and_known_prompts_counted():
    known = [{key: row[key] for key in ("prompt", "response", "answer")} for row in rows("fusion", 2)]
    Path("plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in known))
    code, out, _ = run("evaluate", str(RUN), "--data", "plain.jsonl")
    assert code == 0
    assert "2 of 2 prompts in plain.jsonl are training prompts as well" in out
    (path,) = RUN.glob("evaluations/plain-*.json")
    assert set(json.loads(path.read_text())["scores"]["fused"]) == {"all", "mean"}


def test_a_configuration_is_chosen_as_the_message_says():
    """Each message leads to the next command, until the rows are scored."""
    for name in ("main", "extra"):
        for split in ("dev", "test"):
            Path(f"sets/{name}").mkdir(parents=True, exist_ok=True)
            write_rows(f"sets/{name}/{split}.jsonl", rows("fusion", 2 if name == "main" else 1))
    Path("sets/README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {name}\n  data_files:\n"
            + "".join(f"  - {{ split: {split}, path: {name}/{split}.jsonl }}\n" for split in ("dev", "test"))
            for name in ("main", "extra")
        )
        + "---\n"
    )
    given, said = "sets", []
    for _ in range(3):
        code, _, err = run("evaluate", str(RUN), "--data", given)
        if code == 0:
            break
        said.append(err)
        given = err.partition("; write --data '")[2].rpartition("'")[0]
    assert given == "{ path: sets, config: main, split: test }"
    assert [message.partition(" of sets")[0] for message in said] == [
        "error: --data must name one of the configurations", "error: --data must name one of the splits",
    ]  # fmt: skip
    (path,) = RUN.glob("evaluations/sets-*.json")
    assert len(json.loads(path.read_text())["rows"]) == 2


@pytest.mark.parametrize("given", ["{ path: [a, b] }", "{ folder: sets }", "{ config: main }", "{ path: a", "{}"])
def test_a_mapping_that_is_no_place_is_one_line(given):
    code, _, err = run("evaluate", str(RUN), "--data", given)
    assert code == 2
    assert err == (
        f"error: --data must be a path, or a mapping of path, config and split, got {given}; write '{{ path: data, config: main }}'\n"
    )


@pytest.mark.long
def test_without_held_out_data_a_run_says_that_nothing_was_scored():
    places = ["--store", "runs/other-store", "--output", "runs/other"]
    code, out, err = run("train", "--config", "recipe.yaml", "--data.heldout", "null", *places)
    assert (code, err) == (0, "")
    assert "nothing was scored: the recipe has no data.heldout" in out
    assert "target before" not in out


def test_of_a_single_skill_there_is_no_mean():
    scores = {"target_before": {"all": 0.5, "mean": 0.5}, "fused": {"all": 1.0, "mean": 1.0}, "sources": {}}
    assert score_table(scores).split() == ["all", "target", "before", "50.0", "fused", "100.0"]


def test_conversations_are_answered_and_their_answers_kept():
    """A system message, and several turns: prompts that are no texts."""
    first, second = rows("fusion", 2)
    asked = {"role": "user", "content": first["prompt"]}
    reply = {"role": "assistant", "content": first["response"]}
    more = [{"role": "user", "content": second["prompt"]}, {"role": "assistant", "content": second["response"]}]
    talks = [[{"role": "system", "content": "Be brief."}, asked, reply], [asked, reply, *more]]
    lines = [{"messages": talk, "answer": row["answer"]} for talk, row in zip(talks, (first, second))]
    Path("talks.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found = scored(file="talks.jsonl")
    assert [row["ground_truth"] for row in found["rows"]] == [first["response"], second["response"]]
    assert found["rows"][0]["prompt"] == f"system: Be brief.\nuser: {first['prompt']}"
    assert all(set(row["responses"]) == {"guardian", "scholar", "target_before", "fused"} for row in found["rows"])
    kept = {path: path.read_bytes() for path in RUN.glob("evaluations/answers/*.json")}
    assert scored(file="talks.jsonl") == found
    assert {path: path.read_bytes() for path in RUN.glob("evaluations/answers/*.json")} == kept


def test_the_report_shows_what_was_scored_later_and_names_a_damaged_file():
    scores = scored("--models", "demo:scholar")
    assert run("report", "runs/recipe")[0] == 0
    page = html.unescape(Path("runs/recipe/report.html").read_text(encoding="utf-8"))
    section = page[page.index('id="later"') :]
    assert "heldout.jsonl" in section
    table = section[: section.index("</table>")]
    assert re.findall(r'<th scope="row"[^>]*>(.*?)</th>', table)[0] == "fused"
    assert table.count("<tr>") == 1 + len(scores["comparison"]["mean"]["scores"])
    for model, found in scores["comparison"]["mean"]["scores"].items():
        (row,) = (line for line in table.splitlines() if f">{model.replace('_', ' ')}</th>" in line)
        assert f"<b>{100 * found['value']:.1f}</b>" in row
    (path,) = Path("runs/recipe/evaluations").glob("*.json")
    path.write_text(path.read_text().replace('"p": ', '"q": '))
    code, _, err = run("report", "runs/recipe")
    assert code == 3
    assert err.count("\n") == 1
    assert (
        "p, which is missing; remove it, and `python -m profuser.evaluate runs/recipe --data FILE` makes it again"
        in err
    )
