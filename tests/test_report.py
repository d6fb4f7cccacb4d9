"""The report of a run: its pictures, its page and its errors, on small synthetic run directories."""

from __future__ import annotations

import html
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from command_runs import run, without_pictures
from report_runs import SKILLS, SOURCES, edit, make_run, write_lines

from profuser.cli import main_of
from profuser.errors import DataError
from profuser.report.__main__ import main
from profuser.report.comparison import compare_runs
from profuser.report.intervals import Score, difference, mean_score, wilson
from profuser.report.metrics import Change, Metrics, StageRow, read_metrics, stage_table
from profuser.report.page import write_report
from profuser.report.scores import answer_of, models_of
from profuser.report.theme import DARK, LIGHT, luminance
from profuser.text.display import visible
from profuser.train.run_record import read_run, record_files, write_run

PICTURES = ("win_min_ce.png", "win_vote.png", "alignment.png", "curves.png", "scores.png")


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> Path:
    """The run directory of a demo run with its report. No test may change it."""
    run_dir, store_dir = make_run(tmp_path_factory.mktemp("report"))
    assert write_report(run_dir, store_dir) == run_dir / "report.html"
    return run_dir


class Page(HTMLParser):
    """A parsed page: its tables as lists of rows of texts, all tags with their attributes, and the visible text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.headings: list[tuple[str, str]] = []
        self.stack: list[str] = []
        self.table = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag, attrs):
        attributes = {name: value or "" for name, value in attrs}
        self.tags.append((tag, attributes))
        if tag not in {"meta", "img", "br", "link", "source", "wbr"}:
            self.stack.append(tag)
        if tag == "div" and "aria-label" in attributes:
            self.table = attributes["aria-label"]
            self.tables[self.table] = []
        elif tag == "tr":
            self.tables[self.table].append([])
        elif tag in {"td", "th"}:
            self.tables[self.table][-1].append("")

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag, f"unbalanced </{tag}>"

    def handle_data(self, data):
        if self.stack and self.stack[-1] == "style":
            return
        self.texts.append(data)
        if self.stack and self.stack[-1] in {"h1", "h2"}:
            self.headings.append((self.stack[-1], data))
        if "td" in self.stack or "th" in self.stack:
            self.tables[self.table][-1][-1] += data


def test_report_writes_every_picture_and_one_self_contained_page(reported):
    path = reported / "report.html"
    for name in PICTURES:
        content = (reported / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 5000, name
    page = Page(path)
    assert not page.stack
    assert ("html", {"lang": "en"}) in page.tags
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == len(PICTURES)
    assert [a["media"] for tag, a in page.tags if tag == "source"] == ["screen and (prefers-color-scheme: dark)"] * len(
        PICTURES
    )
    assert all(len(image["alt"]) > 20 for image in images)
    assert not {"link", "script", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name in {"src", "href", "srcset", "data", "action"} & set(attributes):
            assert attributes[name].startswith(("data:image/svg+xml;base64,", "#"))
    assert not re.search(r"@import|url\(", path.read_text())
    headings = [texts for tag, texts in page.headings if tag == "h2"]
    assert headings == [
        "Which source wins where",
        "Alignment of the tokenizers",
        "Loss and KL per stage",
        "Scores per skill",
        "How the sources were judged",
        "Side by side",
        "What was handled",
        "What it took, and the settings",
    ]
    assert {a["href"][1:] for tag, a in page.tags if tag == "a"} <= {a.get("id") for tag, a in page.tags}


def test_numbers_in_the_page_are_those_of_the_score_file(reported):
    page = Page(reported / "report.html")
    scores = json.loads((reported / "scores.json").read_text())
    head, *rows = page.tables["Scores per skill"]
    assert head == ["skill", "fused", "guardian (target before)", "scholar", "reckoner", "n"]
    assert [row[0] for row in rows] == [*SKILLS, "mean"]
    columns = [scores["fused"], scores["target_before"], scores["sources"]["scholar"], scores["sources"]["reckoner"]]
    for row in rows:
        assert [cell.split()[0] for cell in row[1:-1]] == [f"{100 * column[row[0]]:.1f}" for column in columns]
    low, high = wilson(scores["fused"]["safety"], 200)[1:]
    assert rows[1][1].split()[1] == f"{100 * low:.0f}–{100 * high:.0f}"
    best = max(scores["sources"].values(), key=lambda values: values["mean"])["mean"]
    points = 100 * (scores["fused"]["mean"] - best)
    assert f"{points:+.1f} points" in page.text
    assert f"{points:.1f} points above the best single model" in page.text
    bits = json.loads((reported / "evaluation.json").read_text())["bits_per_byte"]
    head, *rows = page.tables["Bits per byte"]
    assert head == ["skill", "fused", "guardian (target before)", "scholar", "reckoner"]
    assert [row[1] for row in rows] == [f"{bits['fused'][skill]:.3f}" for skill in (*SKILLS, "mean")]
    assert [row[3] for row in rows] == [f"{bits['sources']['scholar'][skill]:.3f}" for skill in (*SKILLS, "mean")]
    assert "cross-entropy 2.600 and 0.610 , KL to the Min-CE winner 1.900 and 0.430" in page.text
    strongest = max(SKILLS, key=scores["target_before"].get)
    before, after = 100 * scores["target_before"][strongest], 100 * scores["fused"][strongest]
    assert f"{strongest} , went from {before:.1f} % before to {after:.1f} % after fusion" in page.text


def test_the_demo_data_stand_beside_the_result(reported):
    page = Page(reported / "report.html")
    assert "40 % (about 315) have a terse ground truth" in page.text
    assert "10 % (about 79) have a wrong one" in page.text
    assert "fusion prompts: 788" in page.text
    assert page.text.index("made imperfect on purpose") < page.text.index("Scores per skill")


def test_votes_are_those_of_training_prompts_and_winners_are_words(reported):
    page = Page(reported / "report.html")
    judged = json.loads((reported / "evaluation.json").read_text())["votes"]
    assert page.text.count("★ wins the vote") == page.text.count("▼ wins Min-CE") == len(judged)
    assert page.text.count("1.5 of 2 votes") == 2 * len(judged)
    assert page.text.count("CE not scored") == 1
    assert "Training prompts (held-out ones are never judged)" in page.text
    assert page.text.index(judged[0]["prompt"]) < page.text.index("Held-out prompts, taken in order")


def test_several_responses_of_a_source_each_show_their_votes(tmp_path):
    run_dir, store_dir = make_run(tmp_path)

    def sample_more(content):
        responses = content["votes"][0]["sources"][0]["responses"]
        responses[0]["votes"] = 1.0
        responses += [
            {"text": "the second", "eligible": True, "votes": 0.5, "wins_vote": False},
            {"text": "cut off", "eligible": False, "votes": 0.0, "wins_vote": False},
            {"text": "", "eligible": False, "votes": 0.0, "wins_vote": False},
            {"text": "4<s>2", "eligible": False, "left_out": "it is odd", "votes": 0.0, "wins_vote": False},
        ]

    edit(run_dir / "evaluation.json", sample_more)
    with without_pictures():
        page = Page(write_report(run_dir, store_dir))
    first = page.text[page.text.index("T0:") : page.text.index("T1:")]
    assert re.search(r"wins the vote 1 of 2 votes ★ .* 0\.5 of 2 votes the second", first)
    assert re.search(r"kept from the judges: unfinished cut off kept from the judges: empty empty response", first)
    assert "kept from the judges: it is odd 4<s>2" in first


def test_a_judges_abstentions_stand_beside_its_choices(reported):
    head, *rows = Page(reported / "report.html").tables["First choices per judge"]
    assert head == ["judge", *SOURCES, "abstained"]
    assert [(row[0], row[-1]) for row in rows] == [("judge-a", "0.0"), ("verifier", "25.0")]


@pytest.mark.parametrize(("prompts", "noted"), [(101, False), (157, False), (158, True)])
@pytest.mark.parametrize("rule", ["skip", "ground_truth"])
def test_prompts_without_a_signal_are_counted_and_stand_out_above_a_fifth(tmp_path, prompts, noted, rule):
    run_dir, store_dir = make_run(tmp_path)
    edit(store_dir / "summary.json", lambda summary: summary["no_signal"].update(prompts=prompts, rule=rule))
    with without_pictures():
        path = write_report(run_dir, store_dir)
    text = Page(path).text
    assert f"On {prompts} of 788 prompts no judge preferred a response" in text
    assert "99 × all responses are the same text, 2 × every response is below a judge's floor" in text
    assert ("They are left out of inference mode." in text) == (rule == "skip")
    assert (f'<p class="note">On <b>{prompts}' in path.read_text()) == noted


def test_a_response_that_stood_alone_did_not_win_a_vote(tmp_path):
    run_dir, store_dir = make_run(tmp_path)

    def alone(content):
        content["votes"][0]["sources"][0]["responses"][0]["votes"] = 0.0

    edit(run_dir / "evaluation.json", alone)
    with without_pictures():
        text = Page(write_report(run_dir, store_dir)).text
    assert text.count("★ the only finished response") == 1
    assert text.count("★ wins the vote") == 5


def test_a_summary_from_before_the_abstentions_still_gives_a_report(tmp_path):
    run_dir, store_dir = make_run(tmp_path)
    edit(
        store_dir / "summary.json",
        lambda summary: [summary.pop(key) for key in ("abstentions", "no_signal", "seconds")],
    )
    with without_pictures():
        page = Page(write_report(run_dir, store_dir))
    assert {row[-1] for row in page.tables["First choices per judge"][1:]} == {"–"}
    assert "no judge preferred a response (" not in page.text


def test_a_target_given_by_its_place_and_skills_in_another_order(tmp_path, monkeypatch):
    run_dir, store_dir = make_run(tmp_path, target="./models/my-target")
    columns = {
        skill: {
            "scores": {model: {"value": 0.5, "low": 0.4, "high": 0.6} for model in ("fused", "guardian")},
            "pairs": [{"a": "fused", "b": "guardian", "difference": -0.204, "p": 0.5}],
        }
        for skill in (*reversed(SKILLS), "mean")
    }
    later = {"data": "new.jsonl", "counts": dict.fromkeys(SKILLS, 10), "comparison": columns}
    (run_dir / "evaluations").mkdir()
    (run_dir / "evaluations/new.json").write_text(json.dumps(later))

    def change(summary):
        summary["min_ce_wins"] = dict(reversed(summary["min_ce_wins"].items()))
        summary["agreement"] = {"alone": {}, "length": {}, "pairs": [], "ties": 0.0}

    edit(store_dir / "summary.json", change)
    drawn = {}

    def draw(picture, path):
        if path.stem == "win_min_ce":
            picture(LIGHT)
        return {"light": "", "dark": ""}

    monkeypatch.setattr("profuser.report.page._draw", draw)
    monkeypatch.setattr("profuser.report.figures.draw_wins", lambda wins, *_: drawn.update(order=list(wins)))
    path = write_report(run_dir, store_dir)
    page = Page(path)
    assert ("h1", "guardian, scholar and reckoner fused into my-target") in page.headings
    assert page.tables["Scores per skill"][0][2] == "my-target (target before)"
    assert "./models" not in path.read_text().partition("<h2>What it took")[0]
    assert drawn["order"] == list(SKILLS)
    head, _, row = page.tables["Scores on new.jsonl"]
    assert head == ["model", *SKILLS, "mean", "difference"]
    assert row[-1] == "−20.4 p = 0.500"
    assert "were a tie" not in page.text


def test_a_run_directory_from_before_the_votes_still_gives_a_report(tmp_path):
    run_dir, store_dir = make_run(tmp_path)
    edit(run_dir / "evaluation.json", lambda content: content.pop("votes"))
    with without_pictures():
        page = Page(write_report(run_dir, store_dir))
    assert "How the sources were judged" not in page.text
    assert "Side by side" in page.text


def test_memory_is_measured_as_beside_the_estimate_at_the_end_of_a_run(reported):
    assert "Peak memory 1.40 GiB without mapped files" in " ".join(Page(reported / "report.html").text.split())


def test_the_page_says_which_weights_were_exported_where_the_run_knows(tmp_path):
    run_dir, store_dir = make_run(tmp_path)
    with without_pictures():
        assert "the weights after step" not in Page(write_report(run_dir, store_dir)).text  # an older run does not know
        record = read_run(run_dir)
        record["recipe"].setdefault("optim", {})["export"] = "best"
        write_run(run_dir, record | {"exported_step": 140})
        assert "the weights after step 140 (optim.export: best)" in Page(write_report(run_dir, store_dir)).text


def test_what_a_store_took_that_was_there_already_is_not_the_runs_own_time(tmp_path):
    run_dir, store_dir = make_run(tmp_path)
    said = {}
    for prepared in (True, False):
        write_run(run_dir, read_run(run_dir) | {"prepared": prepared})
        with without_pictures():
            said[prepared] = Page(write_report(run_dir, store_dir)).text
    assert "was there already" not in said[True]
    assert "prepare 43 s (its store was there already), train 1 h 01 min" in re.sub(r" (?=,)", "", said[False])
    assert "the store was there already; what it had taken is not counted: " in said[False]
    page = Page(compare_runs([run_dir, make_run(tmp_path / "other")[0]], tmp_path / "page.html"))
    assert ["its store", "was there already", "–"] in page.tables["Time and memory"]


def test_stages_are_told_with_their_weights_and_changes(reported):
    page = Page(reported / "report.html")
    _, *rows = page.tables["Stages"]
    assert rows[:5] == [
        ["optimizer steps", "1–200", "201–400"],
        ["Weight"],
        ["inference", "1", "0.1"],
        ["training", "0", "1"],
        ["KL (β)", "0.25", "0.25"],
    ]
    assert [row[0] for row in rows[5:]] == [
        *("Cross-entropy", "inference", "training", "validation"),
        *("KL to the source", "inference", "training", "validation"),
    ]
    assert rows[7][1] == "–"  # stage 1 has no training mode


def test_changes_of_a_stage_are_tenths_of_its_lines_and_the_passes_around_it():
    training = [
        {"step": 10 * i, "stage": int(i > 20), "ce_training": float(i), "kd_training": 0.0} for i in range(1, 31)
    ]
    validation = [
        {"step": s, "stage": 0, "eval": {"ce": ce}} for s, ce in ((0, 9.0), (100, 8.0), (200, 7.0), (300, 6.0))
    ]
    stages = [
        {"training_weight": 1.0, "inference_weight": 0.0, "beta": 0.5},
        {"training_weight": 0.5, "inference_weight": 0.0},
    ]
    rows = stage_table(Metrics(training, validation), {"schedule": stages, "optim": {"beta": 2.0}})
    assert rows == [
        StageRow("", "optimizer steps", ["1–200", "201–300"]),
        StageRow("Weight", "inference", [0.0, 0.0]),
        StageRow("Weight", "training", [1.0, 0.5]),
        StageRow("Weight", "KL (β)", [0.5, 2.0]),
        StageRow("Cross-entropy", "training", [Change(1.5, 19.5), Change(21.0, 30.0)]),
        StageRow("Cross-entropy", "validation", [Change(9.0, 7.0), Change(7.0, 6.0)]),
    ]


def test_a_stage_with_one_point_shows_no_change(tmp_path):
    run_dir, store_dir = make_run(tmp_path)
    lines = [
        {"step": 10, "stage": 0, "loss": 1.0, "ce_inference": 0.3111, "kd_inference": 0.0},
        {"step": 12, "stage": 1, "loss": 1.0, "ce_training": 0.3, "ce_inference": 0.25},
        {"step": 24, "stage": 1, "loss": 1.0, "ce_training": 0.2},
        {"step": 0, "stage": 0, "eval": {"ce": 0.6, "kd": None}},
        {"step": 24, "stage": 1, "eval": {"ce": 0.5, "kd": None}},
    ]
    write_lines(run_dir / "metrics.jsonl", lines)
    record_files(run_dir, "metrics.jsonl")
    with without_pictures():
        _, *rows = Page(write_report(run_dir, store_dir)).tables["Stages"]
    assert rows[5:] == [
        ["Cross-entropy"],
        ["inference", "0.311 (one point)", "0.250 (one point)"],
        ["training", "–", "0.300 → 0.200"],
        ["validation", "–", "0.600 → 0.500"],
    ]


# The matrices of Machado, Oliveira and Fernandes (2009) at severity 1, for linear RGB.
SEEN_BY = {
    "anybody": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


def lab(color: str, sight: str) -> np.ndarray:
    """A colour in CIELAB (D65) as somebody with `sight` sees it."""
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(SEEN_BY[sight]) @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    ratio = to_xyz @ seen / (0.95047, 1, 1.08883)
    x, y, z = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_differ_for_every_sight_and_from_the_page(theme):
    colours = (theme.text, theme.fused, *theme.sources)
    page = luminance(theme.page)
    for colour in colours:
        low, high = sorted((page, luminance(colour)))
        assert (high + 0.05) / (low + 0.05) >= 3, colour
    for sight in SEEN_BY:
        for one, other in itertools.combinations(colours, 2):
            assert np.linalg.norm(lab(one, sight) - lab(other, sight)) >= 20, (sight, one, other)


def test_a_loss_against_the_best_source_is_said_plainly(tmp_path):
    run_dir, store_dir = make_run(tmp_path)
    edit(run_dir / "scores.json", lambda s: s["fused"].update(knowledge=0.5, safety=0.5, reasoning=0.5, mean=0.5))
    edit(
        run_dir / "scores.json",
        lambda s: s["sources"]["scholar"].update(knowledge=0.5, safety=0.52, reasoning=0.51, mean=0.51),
    )
    edit(run_dir / "scores.json", lambda s: s["sources"]["reckoner"].update(mean=0.3))
    edit(
        run_dir / "scores.json",
        lambda s: s["target_before"].update(mean=0.3) or s["sources"]["guardian"].update(mean=0.3),
    )
    with without_pictures():
        page = Page(write_report(run_dir, store_dir))
    assert "1.0 points below the best single model ( scholar , 51.0 %)" in page.text
    assert "−1.0 points" in page.text
    assert "cannot tell the two apart" in page.text


def answer(fused, before, other) -> dict:
    """What the page begins with, for the shares of correct answers of each skill, on 200 prompts each."""
    of = [dict(zip(SKILLS, values)) | {"mean": sum(values) / 3} for values in (fused, before, other)]
    scores = {"fused": of[0], "target_before": of[1], "sources": {"other": of[2]}}
    found = answer_of(models_of(scores, dict.fromkeys(SKILLS, 200), "target"), SKILLS)
    assert found is not None
    return found


def test_a_difference_is_certain_in_either_direction_where_its_interval_leaves_out_zero():
    low, high = (0.3, 0.3, 0.3), (0.9, 0.9, 0.9)
    assert answer(high, low, low)["certain"]
    assert answer(low, low, high)["certain"]
    assert not answer(low, low, (0.31, 0.31, 0.31))["certain"]


def test_skills_in_which_the_target_fell_are_told_from_the_largest_loss_on():
    found = answer((0.5, 0.79, 0.6), (0.9, 0.8, 0.7), (0.1, 0.1, 0.1))
    assert found["strongest"][0] == SKILLS[0]
    assert [(skill, round(change.value, 2)) for skill, change in found["fell"]] == [
        (SKILLS[2], -0.1),
        (SKILLS[1], -0.01),
    ]


def test_a_target_that_is_a_source_is_left_out_only_where_its_scores_are_the_same():
    before = dict.fromkeys(SKILLS, 0.5)
    for own, names in ((before, ["fused", "a"]), (dict.fromkeys(SKILLS, 0.4), ["fused", "a", "a"])):
        scores = {"fused": before, "target_before": before, "sources": {"a": own}}
        assert [model.name for model in models_of(scores, {}, "a")] == names


def test_a_model_whose_score_is_no_number_is_not_the_best():
    assert answer((0.5, 0.5, 0.5), (math.nan, math.nan, math.nan), (0.3, 0.3, 0.3))["best_name"] == "other"


def test_model_text_is_escaped_and_control_characters_are_shown(tmp_path):
    run_dir, store_dir = make_run(tmp_path)
    nasty = "<script>alert(1)</script></pre><img src=x onerror=alert(1)> {{ 7 * 7 }} & "
    nasty += "\x1b[31m\x00 \u202eevil \ud800 ✓ 日本\r"

    def spoil(content):
        content["examples"][0]["responses"]["fused"] = nasty
        content["examples"][0]["prompt"] = "<b onmouseover='x'>" + "y" * 5000
        content["examples"][1]["responses"]["fused"] = ""

    edit(run_dir / "evaluation.json", spoil)
    with without_pictures():
        path = write_report(run_dir, store_dir)
    page = Page(path)
    assert not page.stack
    assert "script" not in {tag for tag, _ in page.tags}
    assert all("onerror" not in attributes and "onmouseover" not in attributes for _, attributes in page.tags)
    assert visible(nasty) in page.texts
    assert html.escape("<script>alert(1)</script>") in path.read_text(encoding="utf-8")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", path.read_text(encoding="utf-8"))
    assert "more characters)" in page.text
    assert "empty response" in page.text


def test_marks_are_words_not_colours_alone(reported):
    page = Page(reported / "report.html")
    evaluation = json.loads((reported / "evaluation.json").read_text())
    correct = [value for e in evaluation["examples"] for name, value in e["correct"].items() if name != "guardian"]
    assert page.text.count("✓ correct") == sum(correct)
    assert page.text.count("✗ wrong") == len(correct) - sum(correct)


MANY_SKILLS = tuple(f"elementary_{i}_$kill" for i in range(20))
MANY_SOURCES = tuple(f"Llama-{i}-7b-chat-hf" for i in range(6))


@pytest.mark.parametrize(
    "shape",
    [
        {"method": "sft"},
        pytest.param({"method": "fusellm"}, marks=pytest.mark.long),
        pytest.param({"method": "simultaneous", "sources": ("one",), "skills": ("all",)}, marks=pytest.mark.long),
        pytest.param({"method": "reverse", "target": "another/model-7b", "demo": False}, marks=pytest.mark.long),
        pytest.param({"method": "progressive", "skills": MANY_SKILLS, "sources": MANY_SOURCES}, marks=pytest.mark.long),
        pytest.param({"method": "progressive", "scored": False}, marks=pytest.mark.long),
    ],
    ids=["sft", "fusellm", "one-source-one-skill", "target-is-no-source", "twenty-skills-six-sources", "no-heldout"],
)
def test_runs_of_other_shapes_are_drawn(tmp_path, shape):
    run_dir, store_dir = make_run(tmp_path, **shape)
    page = Page(write_report(run_dir, store_dir))
    assert not page.stack
    assert all((run_dir / name).stat().st_size > 1000 for name in PICTURES)
    assert ("there was no vote in this run" in page.text) == (shape["method"] in ("sft", "fusellm"))
    assert ("took no distributions" in page.text) == (shape["method"] == "sft")
    assert ("fine-tuned on the ground truth, without its sources" in page.text) == (shape["method"] == "sft")
    assert ("imperfect on purpose" in page.text) == shape.get("demo", True)
    assert ("Nothing was scored" in page.text) == (not shape.get("scored", True))
    if shape.get("scored", True):
        rows = page.tables["Scores per skill"][1:]
        assert [row[0] for row in rows] == [
            *shape.get("skills", SKILLS),
            *(["mean"] if len(shape.get("skills", SKILLS)) > 1 else []),
        ]
        assert len(rows[0]) == 2 + len(shape.get("sources", SKILLS)) + (2 if shape.get("target") else 1)
    assert "nan" not in page.text.split("Recipe")[0].lower()


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "scores.json", "evaluation.json", "summary.json"])
def test_a_missing_file_is_one_line_and_exit_3(tmp_path, capsys, name):
    run_dir, store_dir = make_run(tmp_path)
    ((store_dir if name == "summary.json" else run_dir) / name).unlink()
    with pytest.raises(SystemExit) as stop:
        main_of(main, [str(run_dir)])
    assert stop.value.code == 3
    captured = capsys.readouterr()
    assert name in captured.err
    assert captured.err.count("\n") == 1
    assert not (run_dir / "report.html").exists()


def test_missing_directories_and_broken_json_are_data_errors(tmp_path):
    run_dir, store_dir = make_run(tmp_path)
    with pytest.raises(DataError, match="run must be an existing directory"):
        write_report(tmp_path / "nowhere", store_dir)
    with pytest.raises(DataError, match="store must be an existing directory"):
        write_report(run_dir, tmp_path / "nowhere")
    (run_dir / "scores.json").write_text('{"sources": {}')
    with pytest.raises(DataError, match=r"scores\.json must be what was written .*profuser\.evaluate"):
        write_report(run_dir, store_dir)
    record_files(run_dir, "scores.json")
    with pytest.raises(DataError, match=r"scores\.json must hold JSON"):
        write_report(run_dir, store_dir)
    (run_dir / "scores.json").write_text('{"sources": {}}')
    record_files(run_dir, "scores.json")
    with pytest.raises(DataError, match="must hold target_before, which is missing"):
        write_report(run_dir, store_dir)


def test_a_damaged_metrics_line_is_counted_and_repeated_steps_are_read_once(tmp_path):
    lines = ({"step": s, "stage": 0, "loss": loss} for s, loss in ((10, 3.0), (20, 2.0), (10, 2.5), (20, 1.5)))
    evals = ({"step": s, "stage": 0, "eval": {"ce": 1.0, "kd": None}} for s in (0, 20, 20))
    write_lines(tmp_path / "metrics.jsonl", (*lines, *evals))
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    metrics = read_metrics(whole + b'{"step": 30, "sta')
    assert [(line["step"], line["loss"]) for line in metrics.training] == [(10, 2.5), (20, 1.5)]
    assert [line["step"] for line in metrics.validation] == [0, 20]
    assert metrics.unreadable == 1
    assert read_metrics(whole.replace(b"2.5", b"2.4")).unreadable == 1
    assert read_metrics(whole).unreadable == 0


def test_the_command_reads_the_store_from_run_json(tmp_path):
    run_dir, _ = make_run(tmp_path)
    with without_pictures():
        code, out, err = run("report", str(run_dir))
    assert (code, out.strip(), err) == (0, str(run_dir / "report.html"), "")
    with pytest.raises(DataError, match="none"):
        main([str(tmp_path / "none")])


def test_intervals_match_published_values():
    # The two papers of Newcombe (1998) give 81/263 and the difference 56/70 - 48/80, both by the score method.
    assert wilson(81 / 263, 263)[1:] == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert difference(wilson(56 / 70, 70), wilson(48 / 80, 80)) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)
    assert all(math.isnan(limit) for limit in wilson(0.5, None)[1:])
    # The mean of four is half as uncertain as each of them.
    assert mean_score(0.5, [Score(0.5, 0.4, 0.6)] * 4) == pytest.approx((0.5, 0.45, 0.55))
