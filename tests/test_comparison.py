"""Runs side by side: what the page of a comparison says, which scores it sets beside each other, and its errors."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from pathlib import Path

import pytest
from command_runs import run as run_command
from command_runs import without_pictures
from report_runs import edit, make_run, write_lines
from test_report import Page

from profuser.recipe.compare import differing_values
from profuser.report.comparison import compare_runs
from profuser.report.intervals import difference, mean_score, wilson
from profuser.store.sealed import sealed
from profuser.train.run_record import METRICS, read_run, record_files, write_run


def make(root: Path, name: str, data: str | None = "a1b2", **kind) -> Path:
    """Writes a run of this name. `data` is the digest of its held-out prompts; None leaves it out, as earlier versions did."""
    made, store = make_run(root / f"{name}-made", **kind)
    shutil.rmtree(store)  # a comparison needs no store
    directory = made.rename(root / name)
    if data is not None and (directory / "evaluation.json").exists():
        edit(directory / "evaluation.json", lambda content: content.update(data=data))
    return directory


def refused(*arguments: object) -> tuple[int, str]:
    """The exit code of `report` with these arguments, and the one line that it prints."""
    code, out, err = run_command("report", *map(str, arguments))
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return code, err


@pytest.fixture(autouse=True)
def no_picture(request):
    """The picture is drawn where a test asks for it."""
    with contextlib.nullcontext() if "drawn" in request.fixturenames else without_pictures():
        yield


@pytest.fixture
def drawn() -> None:
    """Asks for the picture."""


@pytest.fixture
def two(tmp_path) -> tuple[Path, Path]:
    return make(tmp_path, "one"), make(tmp_path, "two", method="sft", seed=1)


def test_scores_on_the_same_prompts_stand_beside_each_other(two):
    page = Page(compare_runs(two))
    assert not page.stack
    head, *rows = page.tables["Scores of one, two"]
    assert head == ["skill", "one", "two", "n"]
    scores = [json.loads((directory / "scores.json").read_text()) for directory in two]
    for row in rows[:4]:
        assert [cell.split()[0] for cell in row[1:3]] == [f"{100 * of['fused'][row[0]]:.1f}" for of in scores]
    low, high = wilson(scores[0]["fused"]["safety"], 200)[1:]
    assert rows[1][1].split()[1] == f"{100 * low:.0f}–{100 * high:.0f}"
    best = [max(of["sources"].values(), key=lambda values: values["mean"])["mean"] for of in scores]
    before = [of["target_before"]["mean"] for of in scores]
    assert rows[4] == ["target before, mean", *(f"{100 * value:.1f}" for value in before), ""]
    assert [cell.split()[0] for cell in rows[5][1:3]] == [f"{100 * value:.1f}" for value in best]
    means = [
        mean_score(of["fused"]["mean"], [wilson(v, 200) for skill, v in of["fused"].items() if skill != "mean"])
        for of in scores
    ]
    first, second = sorted(means, key=lambda mean: -mean.value)
    gain = difference(first, second)
    assert (
        f"{100 * gain.value:+.1f} points (95 % interval {100 * gain.low:+.1f} to {100 * gain.high:+.1f})" in page.text
    )
    assert "All on the same 600 held-out prompts of demo:" in page.text
    assert "do not compare" not in page.text
    assert "not recorded" not in page.text


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"heldout": ["a.jsonl", "b.jsonl"]}, "a.jsonl, b.jsonl"),
        ({"heldout": {"path": "org/set", "config": None, "split": "test"}}, "org/set (split test)"),
        ({"heldout": None, "heldout_share": 0.05, "train": ["a.jsonl", "b.jsonl"]}, "5 % of a.jsonl, b.jsonl"),
    ],
)
def test_held_out_prompts_of_several_files_or_a_share_of_them_are_named_in_words(two, data, said):
    for directory in two:
        edit(directory / "run.json", lambda record: record["recipe"]["data"].update(data))
    text = Page(compare_runs(two)).text.replace(" ", "")  # lines may break within a name
    assert f"Allonthesame600held-outpromptsof{said}.".replace(" ", "") in text


def moved(recipe):
    recipe["recipe"]["data"]["heldout"] = "elsewhere/heldout.jsonl"


def matched(recipe):
    recipe["recipe"]["evaluation"] = {"match": "mine:match"}


@pytest.mark.parametrize(
    ("digests", "change", "together", "certain"),
    [
        (("x", "x"), None, True, True),
        (("x", "y"), None, False, True),  # the file has the same name and as many rows, but other ones
        (("x", "x"), moved, True, True),  # the same rows in another place
        (("x", "x"), matched, False, True),  # the same prompts, but another rule of what is right
        ((None, None), None, True, False),
        ((None, None), moved, False, False),
        (("x", None), None, False, False),
    ],
)
def test_scores_on_other_prompts_or_by_another_match_stand_apart(tmp_path, digests, change, together, certain):
    runs = [make(tmp_path, name, digest) for name, digest in zip(("one", "two"), digests)]
    if change is not None:
        edit(runs[1] / "run.json", change)
    page = Page(compare_runs(runs))
    tables = {name: rows[0] for name, rows in page.tables.items() if name.startswith("Scores")}
    if together:
        assert tables == {"Scores of one, two": ["skill", "one", "two", "n"]}
    else:
        assert tables == {f"Scores of {name}": ["skill", name, "n"] for name in ("one", "two")}
    assert ("The scores of these runs do not compare" in page.text) == (not together)
    assert ("points (95 %" in page.text) == together
    tiles = [
        attributes for tag, attributes in page.tags if tag == "div" and attributes.get("class", "").startswith("tile ")
    ]
    assert bool(tiles) == together  # scores in tiles stand beside each other as well
    assert ("on the same prompts is not recorded" in page.text) == (together and not certain)


@pytest.mark.parametrize("key", ["counts", "examples"])
def test_runs_without_a_digest_are_apart_where_their_files_differ(tmp_path, key):
    runs = [make(tmp_path, name, None) for name in ("one", "two")]

    def change(content):
        if key == "counts":
            content["counts"]["safety"] = 199
        else:
            content["examples"][2]["prompt"] += "?"

    edit(runs[1] / "evaluation.json", change)
    assert "do not compare" in Page(compare_runs(runs)).text


def test_a_run_whose_mean_is_no_number_leaves_the_lead_to_the_others(tmp_path):
    runs = [make(tmp_path, name, seed=n) for n, name in enumerate(("one", "two", "three"))]
    edit(runs[1] / "scores.json", lambda scores: scores["fused"].update(mean=math.nan))
    assert "points (95 %" in Page(compare_runs(runs)).text


def test_a_third_run_on_other_prompts_leaves_the_other_two_together(tmp_path):
    runs = [make(tmp_path, *of_run) for of_run in (("a", "x"), ("b", "y"), ("c", "x"))]
    tables = Page(compare_runs(runs)).tables
    assert [name for name in tables if name.startswith("Scores")] == ["Scores of a, c", "Scores of b"]


def test_a_run_without_held_out_prompts_is_said_to_have_no_scores(tmp_path):
    runs = [make(tmp_path, "one"), make(tmp_path, "two", scored=False)]
    page = Page(compare_runs(runs))
    assert "Scores of one" in page.tables
    assert "two was not scored" in page.text
    runs = [make(tmp_path, name, scored=False) for name in ("three", "four")]
    page = Page(compare_runs(runs))
    assert not any(name.startswith("Scores") for name in page.tables)
    assert "Nothing was scored" in page.text


def test_the_differing_keys_of_the_recipes_stand_with_their_values(tmp_path):
    runs = [make(tmp_path, name) for name in ("one", "two", "three")]

    def change(record):
        record["recipe"]["optim"] |= {"beta": 0.5, "log_every": 7}
        record["recipe"]["sources"][1]["model"] = "org/other_model"
        record["recipe"] |= {"seed": 4, "output": "elsewhere", "store": "elsewhere-store"}

    edit(runs[1] / "run.json", change)
    edit(runs[2] / "run.json", lambda record: record["recipe"]["optim"].update(steps=400))
    page = Page(compare_runs(runs))
    assert page.tables["Recipes"] == [
        ["key", "one", "two", "three"],
        ["optim.beta", "0.25", "0.5", "0.25"],
        ["optim.log_every changes no weight", "–", "7", "–"],
        ["optim.steps", "null (400 taken)", "null (400 taken)", "400"],
        ["seed", "–", "4", "–"],
        ["sources.scholar.model", "demo:scholar", "org/other_model", "demo:scholar"],
    ]
    assert "The recipes differ in sources, on which losses depend" in page.text


def test_the_same_recipes_are_said_to_be_the_same(tmp_path):
    runs = [make(tmp_path, name) for name in ("one", "two")]
    page = Page(compare_runs(runs))
    assert "They do not differ." in page.text
    assert "on which losses depend" not in page.text


def test_values_differ_as_in_json_and_among_any_number_of_mappings():
    a, b, c = {"x": (1, 2), "y": {"z": 1}}, {"x": [1, 2], "y": {"z": 1}}, {"x": [1, 2], "y": {"z": 2}, "n": None}
    assert differing_values([a, b]) == {}
    assert differing_values([a, b, c]) == {"y.z": [1, 1, 2]}
    assert differing_values([a, {"y": 3}]) == {"x": [(1, 2), None], "y": [{"z": 1}, 3]}


def test_stages_times_memory_and_hardware_are_those_of_each_run(tmp_path):
    one, other = make(tmp_path, "one"), make(tmp_path, "two", method="sft")

    def change(record):
        record["seconds"] = {"prepare": 3.0, "train": 61.0, "report": 1.0}
        record["versions"]["torch"] = "2.14.0"
        record |= {"hardware": "NVIDIA H200", "commit": "0123456789ab"}
        del record["peak_owned_bytes"]

    edit(other / "run.json", change)
    lines = [{"step": 7, "stage": 0, "loss": 0.5, "ce_training": 0.3111}]
    write_lines(other / METRICS, lines)
    record_files(other, METRICS)
    page = Page(compare_runs([one, other]))
    assert page.tables["Time and memory"] == [
        ["", "one", "two"],
        ["optimizer steps", "400", "7"],
        ["time", "1 h 02 min", "1 min 05 s"],
        ["time to prepare", "43 s", "3.0 s"],
        ["time to train", "1 h 01 min", "1 min 01 s"],
        ["time to evaluate", "8.2 s", "–"],
        ["time to report", "–", "1.0 s"],
        ["peak memory", "1.40 GiB without mapped files", "1.71 GiB with mapped files"],
        ["precision", "fp32", "fp32"],
        ["hardware", "x86_64, 2 cores", "NVIDIA H200"],
        ["commit", "–", "0123456789ab"],
        ["torch", "2.13.0", "2.14.0"],
        ["run", str(one), str(other)],
        ["store", str(tmp_path / "one-made/store"), str(tmp_path / "two-made/store")],
    ]
    runs, head, *rows = page.tables["Stages"]
    assert (runs, head) == (["", "one", "two"], ["", "stage 1", "stage 2", "stage 1"])
    assert rows[0] == ["optimizer steps", "1–200", "201–400", "1–7"]
    assert rows[2:5] == [["inference", "1", "0.1", "0"], ["training", "0", "1", "1"], ["KL (β)", "0.25", "0.25", "0"]]
    assert rows[7][0] == "training"
    assert rows[7][-1] == "0.311 (one point)"


def test_the_page_is_one_file_with_one_picture_and_lies_beside_the_first_run(two, drawn):
    before = {path for directory in two for path in directory.rglob("*")}
    path = compare_runs(two)
    assert path == two[0].parent / "report-comparison.html"
    assert {path for directory in two for path in directory.rglob("*")} == before
    page = Page(path)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 1
    assert not {"link", "script", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name in {"src", "href", "srcset", "data", "action"} & set(attributes):
            assert attributes[name].startswith(("data:image/svg+xml;base64,", "#"))
    assert {a["href"][1:] for tag, a in page.tags if tag == "a"} <= {a.get("id") for tag, a in page.tags}
    first = path.read_bytes()
    assert compare_runs(two).read_bytes() == first


def test_the_command_prints_the_page_and_takes_another_place_for_it(two, tmp_path):
    wanted = tmp_path / "pages/mine.html"
    assert run_command("report", *map(str, two), "--output", str(wanted)) == (0, f"{wanted}\n", "")
    assert "one beside two" in Page(wanted).text
    assert run_command("report", *map(str, two)) == (0, f"{tmp_path / 'report-comparison.html'}\n", "")


def test_runs_with_the_same_name_are_told_apart_by_their_folders(tmp_path):
    runs = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        runs.append(make(tmp_path / folder, "run"))
    assert "Scores of a/run, b/run" in Page(compare_runs(runs)).tables


def test_whatever_a_run_says_is_escaped(two):
    nasty = "<script>alert(1)</script>\u202e"

    def change(record):
        record["hardware"] = nasty
        record["recipe"] |= {"note": nasty, nasty: 1}

    edit(two[1] / "run.json", change)
    path = compare_runs(two)
    assert "script" not in {tag for tag, _ in Page(path).tags}
    assert "\u202e" not in path.read_text()


def test_a_run_that_is_given_twice_is_refused(two, tmp_path):
    (tmp_path / "link").symlink_to(two[0])
    for again in (two[0], f"{two[0]}/", f"{two[0]}/../one", tmp_path / "link"):
        code, line = refused(*two, again)
        assert code == 2
        assert "every RUN_DIR must be another run" in line
        assert "twice" in line


def test_a_run_that_cannot_be_used_is_refused_by_name(two, tmp_path):
    one, other = two
    record = read_run(other)

    def again(name: str) -> tuple[int, str]:
        code, line = refused(one, other)
        assert name in line
        assert not (tmp_path / "report-comparison.html").exists()
        write_run(other, record)
        return code, line

    write_run(other, record | {"status": "running"})
    assert again("must hold a finished run")[0] == 3
    (other / "run.json").write_text(json.dumps(sealed(record | {"schema": 2})))
    assert "schema 2, this version reads 3" in again("two")[1]
    (other / "run.json").write_text(json.dumps(sealed(record | {"schema": 9})))
    assert "schema 9" in again("two")[1]
    (other / "run.json").write_text((other / "run.json").read_text().replace("sft", "tfs"))
    assert again("two/run.json must hold")[0] == 3
    content = (other / METRICS).read_bytes()
    (other / METRICS).write_bytes(content.replace(b"0.", b"1.", 1))
    assert again(f"two/{METRICS} must be what was written")[0] == 3
    (other / METRICS).write_bytes(content)
    (other / "scores.json").write_text("{}")
    assert again("two/scores.json must be what was written")[0] == 3
    (other / "run.json").unlink()
    assert again("two/run.json is missing")[0] == 3
    write_run(other, record)
    (other / METRICS).unlink()
    (other / "run.json").unlink()
    (other / "config.json").write_text("{}")
    assert (
        "this is a model and no run; `python -m profuser.evaluate --tasks TASK --models MODEL`"
        in refused(one, other)[1]
    )
    assert refused(one, tmp_path / "nowhere")[0] == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["one", "two", "--store", "one"], "--store must come with one RUN_DIR, got 2"),
        (["one", "--output", "page.html"], "--output must come with several RUN_DIR"),
        (["one", "two", "--output", "one/scores.json"], "--output must be an .html file, got one/scores.json"),
        (["one", "two", "--output", "one"], "--output must be an .html file, got one"),
    ],
)
def test_options_that_do_not_fit_are_refused(two, monkeypatch, arguments, said):
    monkeypatch.chdir(two[0].parent)
    code, line = refused(*arguments)
    assert code == 2
    assert said in line
