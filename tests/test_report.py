"""The report of a run: pictures, page and errors, on small synthetic run directories."""

from __future__ import annotations

import html
import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from profuser.errors import DataError
from profuser.figures import visible
from profuser.report import _read_metrics, difference, main, wilson, write_report

PICTURES = ("win_min_ce.png", "win_vote.png", "alignment.png", "curves.png", "scores.png")
SOURCES = ("guardian", "scholar", "reckoner")
SKILLS = ("knowledge", "safety", "reasoning")


def make_run(
    root: Path, *, sources=SOURCES, skills=SKILLS, method="progressive", target=None, demo=True, scored=True, seed=0
) -> tuple[Path, Path]:
    """A run directory and its store as training leaves them, with made-up but plausible numbers."""
    rng = random.Random(seed)
    target = target or sources[0]
    distils, votes = method != "sft", method not in ("sft", "fusellm")
    run_dir, store_dir = root / "run", root / "store"
    run_dir.mkdir(parents=True)
    store_dir.mkdir()

    def with_mean(values: dict[str, float]) -> dict[str, float]:
        return values | {"mean": sum(values.values()) / len(values)}

    def accuracies(own: int | None) -> dict[str, float]:
        strong = {skill: own is None or i % max(len(sources), 2) == own for i, skill in enumerate(skills)}
        return with_mean(
            {s: round(200 * (rng.uniform(0.8, 0.95) if strong[s] else rng.uniform(0.1, 0.6))) / 200 for s in skills}
        )

    accuracy = {name: accuracies(i) for i, name in enumerate(sources)}
    before = accuracy.get(target) or accuracies(0)
    bits = {name: with_mean({s: rng.uniform(0.3, 1.4) for s in skills}) for name in sources}
    scores = {"sources": accuracy, "target_before": before, "fused": accuracies(None)}
    examples = []
    for i in range(6):
        texts = {name: f"A bozun is a {name}. Answer: bitter." for name in sources}
        texts |= {"target_before": texts.get(target, "I do not know."), "fused": "A bozun is a stone. Answer: bitter."}
        correct = {name: rng.random() < 0.5 for name in texts}
        examples.append(
            {
                "skill": skills[i % len(skills)],
                "prompt": f"Q{i}: How does a bozun taste?",
                "ground_truth": "A bozun is a stone. Answer: bitter.",
                "responses": texts,
                "correct": correct,
            }
        )
    evaluation = {
        "bits_per_byte": {
            "sources": bits,
            "target_before": bits.get(target, {s: 1.0 for s in (*skills, "mean")}),
            "fused": with_mean({s: rng.uniform(0.2, 0.5) for s in skills}),
        },
        "ce": {"target_before": 2.6, "fused": 0.61},
        "kd": {"target_before": 1.9, "fused": 0.43},
        "counts": {skill: 200 for skill in skills},
        "examples": examples,
    }
    demo_data = {"seed": 0, "terse": 0.4, "wrong": 0.1, "rows": {"fusion": 788, "validation": 450, "heldout": 600}}
    run = {
        "recipe": {
            "sources": [{"name": n, "model": f"demo:{n}"} for n in sources],
            "target": target,
            "schedule": method,
            "data": {"train": "demo:fusion.jsonl", "heldout": "demo:heldout.jsonl" if scored else None},
        },
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "hardware": "x86_64, 2 cores",
        "commit": None,
        "store": str(store_dir),
        "seconds": {"prepare": 43.1, "train": 3671.0, "evaluate": 8.25},
        "peak_rss_bytes": 1_834_000_000,
        "demo_data": demo_data if demo else None,
    }

    def wins(extra: bool) -> dict[str, dict[str, int]]:
        table = {}
        for i, skill in enumerate(skills):
            weights = [rng.uniform(0.5, 1) + 4 * (i % len(sources) == j) for j in range(len(sources))]
            counts = [int(260 * w / sum(weights)) for w in weights]
            table[skill] = dict(zip(sources, counts)) | ({"none": rng.randrange(4)} if extra else {})
        return table

    def aligned(name: str) -> dict[str, object]:
        own = name == target
        weights = [70, 0, 0, 0] if own else [rng.uniform(*span) for span in ((60, 80), (8, 15), (3, 10), (0.2, 2))]
        kinds = dict(zip(("same_span", "shared_prefix", "inside", "skipped"), (w / sum(weights) for w in weights)))
        bins = [0] * 9 + [21034] if own else [0, 55, 90, 110, 150, 180, 240, 410, 900, 18300]
        coverage = 1 - kinds["skipped"]
        return {"positions": 21034, **kinds, "coverage": coverage, "mapped_mass": 0.93, "reliability": bins}

    modes = (["train"] if distils else []) + (["infer"] if votes else [])
    even = {name: 1 / len(sources) for name in sources}
    summary = {
        "sources": list(sources),
        "target": target,
        "skills": list(skills),
        "examples": 788,
        "min_ce_wins": wins(False) if distils else {},
        "vote_wins": wins(True) if votes else {},
        "judges": {"judge-a": even, "verifier": even} if votes else {},
        "alignment": {mode: {name: aligned(name) for name in sources} for mode in modes},
        "handled": {"normaliser": 3, "truncated_response": 41, "empty_response": 0},
        "seconds": {"generate": 22.0, "judge": 6.4, "capture": 9.1, "align": 3.2},
    }
    lines, steps = [], 400
    for step in range(1, steps + 1):
        stage = int(step > steps // 2) if method in ("progressive", "reverse") else 0
        fall = math.exp(-step / 90)
        infer, train = (
            votes and (stage == 0 or method != "reverse"),
            method not in ("progressive", "reverse") or stage == 1,
        )
        ce, kd = 0.25 + 2.2 * fall + rng.gauss(0, 0.03), 0.2 + 1.4 * fall + rng.gauss(0, 0.04)
        line = {
            "step": step,
            "stage": stage,
            "loss_infer": ce + 0.3 * kd if infer else 0.0,
            "loss_train": ce + 0.6 if train else 0.0,
            "ce_infer": ce if infer else None,
            "kd_infer": kd if infer else None,
            "ce_train": ce + 0.5 if train else None,
            "kd_train": kd + 0.3 if train and distils else None,
        }
        lines.append(line | {"loss": line["loss_infer"] * (0.1 if stage else 1) + line["loss_train"]})
    for step in range(0, steps + 1, 50):
        kd = 0.4 + 1.5 * math.exp(-step / 90) if distils else None
        lines.append({"step": step, "stage": 0, "eval": {"ce": 0.6 + 2 * math.exp(-step / 90), "kd": kd}})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, content in ({"run": run} | ({"scores": scores, "evaluation": evaluation} if scored else {})).items():
        (run_dir / f"{name}.json").write_text(json.dumps(content))
    (store_dir / "summary.json").write_text(json.dumps(summary))
    return run_dir, store_dir


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> Path:
    """The run directory of a demo run with its report; read only."""
    run_dir, store_dir = make_run(tmp_path_factory.mktemp("report"))
    assert write_report(run_dir, store_dir) == run_dir / "report.html"
    return run_dir


class Page(HTMLParser):
    """Tables as lists of rows of texts, all tags with attributes, and the visible text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.stack: list[str] = []
        self.table = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in {"meta", "img", "br", "link"}:
            self.stack.append(tag)
        if tag == "div" and "aria-label" in dict(attributes):
            self.table = dict(attributes)["aria-label"]
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
    assert all(len(image["alt"]) > 20 for image in images)
    assert not {"link", "script", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name in {"src", "href", "srcset", "data", "action"} & set(attributes):
            assert attributes[name].startswith(("data:image/png;base64,", "#"))
    assert not re.search(r"@import|url\(", path.read_text())


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
    page = Page(write_report(run_dir, store_dir))
    assert "1.0 points below the best single model (scholar, 51.0 %)" in page.text
    assert "−1.0 points" in page.text
    assert "cannot tell the two apart" in page.text


def test_model_text_is_escaped_and_control_characters_are_shown(tmp_path):
    run_dir, store_dir = make_run(tmp_path)
    nasty = "<script>alert(1)</script></pre><img src=x onerror=alert(1)> {{ 7 * 7 }} & "
    nasty += "\x1b[31m\x00 \u202eevil \ud800 ✓ 日本\r"

    def spoil(content):
        content["examples"][0]["responses"]["fused"] = nasty
        content["examples"][0]["prompt"] = "<b onmouseover='x'>" + "y" * 5000
        content["examples"][1]["responses"]["fused"] = ""

    edit(run_dir / "evaluation.json", spoil)
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
        {"method": "fusellm"},
        {"method": "simultaneous", "sources": ("one",), "skills": ("all",)},
        {"method": "reverse", "target": "another/model-7b", "demo": False},
        {"method": "progressive", "skills": MANY_SKILLS, "sources": MANY_SOURCES},
        {"method": "progressive", "scored": False},
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
    assert ("nothing was scored" in page.text) == (not shape.get("scored", True))
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
    assert main([str(run_dir)]) == 3
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
    with pytest.raises(DataError, match=r"scores\.json must be readable JSON"):
        write_report(run_dir, store_dir)
    (run_dir / "scores.json").write_text('{"sources": {}}')
    with pytest.raises(DataError, match="target_before, fused missing"):
        write_report(run_dir, store_dir)


def test_a_torn_metrics_line_is_counted_and_repeated_steps_are_read_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = ({"step": s, "stage": 0, "loss": loss} for s, loss in ((10, 3.0), (20, 2.0), (10, 2.5), (20, 1.5)))
    evals = ({"step": s, "stage": 0, "eval": {"ce": 1.0, "kd": None}} for s in (0, 20, 20))
    path.write_text("".join(json.dumps(line) + "\n" for line in (*lines, *evals)) + '{"step": 30, "sta')
    training, validation, unreadable = _read_metrics(path)
    assert [(line["step"], line["loss"]) for line in training] == [(10, 2.5), (20, 1.5)]
    assert [line["step"] for line in validation] == [0, 20]
    assert unreadable == 1


def test_the_command_reads_the_store_from_run_json(tmp_path):
    run_dir, _ = make_run(tmp_path)
    command = [sys.executable, "-m", "profuser.report", str(run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(run_dir / "report.html")
    assert done.stderr == ""
    assert main([str(tmp_path / "none")]) == 3


def test_intervals_match_published_values():
    # Newcombe 1998 (two papers): 81/263 and the difference 56/70 - 48/80, both by the score method.
    assert wilson(81 / 263, 263)[1:] == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert difference(wilson(56 / 70, 70), wilson(48 / 80, 80)) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)
    assert all(math.isnan(limit) for limit in wilson(0.5, None)[1:])
