"""Benchmarks: lm-evaluation-harness without a network, the same answers as the trainer's and Cool-Fusion's own, and kept results."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command_runs import rows, run

from profuser.demo.verify import score as verifier
from profuser.errors import DataError
from profuser.evaluate import benchmarks, judging
from profuser.evaluate.benchmarks import run_benchmarks
from profuser.evaluate.comparison import compare, table
from profuser.evaluate.contestants import Alone, Joint, LoadedJoint, LoadedModel, contestants_of
from profuser.evaluate.picture import draw
from profuser.evaluate.results import Column, Result
from profuser.evaluate.scoring import HarnessTask, passages_of
from profuser.evaluate.statistics import Sample, mcnemar, paired_p, score
from profuser.evaluate.tasks import PAPER, manager_for, select
from profuser.generate.methods import open_decoder
from profuser.recipe.generation import GenerationConfig
from profuser.recipe.parse import parse_run
from profuser.recipe.schema import JudgeConfig
from profuser.report.intervals import wilson
from profuser.report.theme import LIGHT

pytestmark = pytest.mark.usefixtures("in_run")

RUN = "runs/recipe"
DEMO = ("demo_knowledge", "demo_safety", "demo_reasoning")
OUT = Path("runs/benchmarks")


def items_of(model: str, task: str) -> list[dict]:
    (path,) = (OUT / model).glob(f"{task}-*.json")
    return json.loads(path.read_text())["items"]


def done(*arguments: str) -> str:
    code, out, err = run("evaluate", *arguments)
    assert (code, err) == (0, "")
    return out


OWN_TASK = """\
task: own
dataset_path: json
dataset_kwargs: { data_files: { test: HERE/heldout.jsonl } }
test_split: test
output_type: generate_until
doc_to_text: prompt
doc_to_target: response
process_results: !function own.verdict
generation_kwargs: { until: [], do_sample: false, max_gen_toks: 16 }
metric_list: [{ metric: acc, aggregation: mean, higher_is_better: true }]
"""
VERDICT = """\
from profuser.demo.verify import exact_match

def verdict(row, responses):
    return {"acc": float(exact_match(row, responses[0]))}
"""


def test_a_fused_model_has_the_score_and_the_answers_that_the_trainer_gave_it(in_run):
    Path("own.yaml").write_text(OWN_TASK.replace("HERE", str(in_run)))
    Path("own.py").write_text(VERDICT)
    done(RUN, "--models", "./guardian", "--tasks", "own.yaml")
    evaluation = json.loads(Path(RUN, "evaluation.json").read_text())
    for model, key in (("recipe", "fused"), ("guardian", "target_before")):
        items = {item["prompt"]: item for item in items_of(model, "own")}
        assert len(items) == 3
        for example in evaluation["examples"]:
            item = items[example["prompt"]]
            assert item["answer"] == example["responses"][key]
            assert item["values"]["acc,none"] == example["correct"][key]


def test_the_bundled_tasks_hold_the_demos_heldout_prompts_and_its_match():
    done("--models", "demo:scholar", "--tasks", "demo", "--limit", "4")
    heldout = rows("heldout", 600)
    for task in DEMO:
        skill = task.removeprefix("demo_")
        items = items_of("demo_scholar", task)
        assert [item["prompt"] for item in items] == [r["prompt"] for r in heldout if r["skill"] == skill][:4]
    written = json.loads((OUT / "benchmarks.json").read_text())
    assert list(written) == [*DEMO, "demo"]
    scores = [written[task]["scores"]["demo:scholar"]["value"] for task in DEMO]
    assert written["demo"]["scores"]["demo:scholar"]["value"] == pytest.approx(sum(scores) / 3)
    assert scores[0] == 1


@pytest.mark.long
@pytest.mark.parametrize("model", ["guardian", "scholar", "reckoner"])
def test_the_bundled_tasks_give_the_demos_own_scores(model):
    from profuser.evaluate.scores import accuracies
    from profuser.recipe.places import resolve

    done("--models", f"demo:{model}", "--tasks", "demo", "--batch-size", "100")
    own = parse_run("train", [], {}, "").recipe
    (contestant,) = contestants_of([f"demo:{model}"])
    heldout = [json.loads(line) for line in Path(resolve("demo:heldout.jsonl")).read_text().splitlines()]
    texts = contestant.load().answer([r["prompt"] for r in heldout], own.generation, max_length=own.data.max_length)
    from profuser.demo.verify import exact_match

    expected = accuracies(heldout, [exact_match(row, text) for row, text in zip(heldout, texts)])
    written = json.loads((OUT / "benchmarks.json").read_text())
    for skill in ("knowledge", "safety", "reasoning"):
        assert written[f"demo_{skill}"]["scores"][f"demo:{model}"]["value"] == expected[skill]


@pytest.mark.parametrize("method", ["decode", pytest.param("gated", marks=pytest.mark.long)])
def test_sources_that_answer_together_answer_in_the_harness_as_by_themselves(method):
    done("--models", f"{method}:recipe.yaml", "--tasks", "demo_knowledge", "--limit", "2")
    own = [] if method == "decode" else [f"--decode.method={method}"]
    fusion = open_decoder(parse_run("generate", ["--config", "recipe.yaml", *own], {}, "").recipe)
    fusion.max_new_tokens = 64  # the task's
    items = items_of(f"{method}_recipe.yaml", "demo_knowledge")
    assert [item["answer"] for item in items] == [fusion.answer(item["prompt"]).text for item in items]


def test_results_are_kept_until_the_model_the_task_or_the_options_change(monkeypatch):
    loaded, real = [], benchmarks.loaded

    def load(contestant, *rest):
        loaded.append(contestant.name)
        return real(contestant, *rest)

    monkeypatch.setattr(benchmarks, "loaded", load)

    def again(*more: str) -> list[str]:
        loaded.clear()
        done("--models", "./guardian", "--tasks", "demo_safety", "--limit", "1", *more)
        return list(loaded)

    assert again() == ["guardian"]
    assert again() == []
    assert again("--fresh") == ["guardian"]
    (path,) = OUT.glob("guardian/*.json")
    path.write_text(path.read_text().replace('"id": 0', '"id": 1'))
    assert again() == ["guardian"]
    config = Path("guardian/generation_config.json")
    config.write_text(config.read_text().replace("{", '{"a": 1,', 1))
    assert again() == ["guardian"]
    monkeypatch.setattr(benchmarks, "code_digest", lambda: "another commit")
    assert again() == ["guardian"]


def test_the_digest_of_a_task_says_what_it_asks_and_not_where_its_functions_lie():
    def digest(place: int, question: str, shots: int = 0, shown: str = "") -> str:
        task: Any = SimpleNamespace(
            task_name="own",
            dump_config=lambda: {"process_results": f"<function verdict at 0x{place:x}>"},
            get_config=lambda key: shots,
            fewshot_docs=lambda: [{"q": shown}],
            eval_docs=[{"q": question}],
        )
        return HarnessTask(task).digest

    assert digest(0x7F01, "Why?") == digest(0xA2, "Why?") == digest(0xA2, "Why?", shown="not shown")
    others = [digest(1, "How?"), digest(1, "Why?", 1, "Where?"), digest(1, "Why?", 1, "When?")]
    assert len({digest(1, "Why?"), *others}) == 4


def test_the_score_of_a_task_is_its_usual_value_or_the_first_that_every_item_has():
    def primary(name: str, *items: list[str]) -> str:
        task: Any = SimpleNamespace(task_name=name)
        return HarnessTask(task)._primary([{"values": dict.fromkeys(keys, 1.0)} for keys in items])

    both = ["acc,none", "acc_norm,none"]
    assert primary("arc_challenge", both, both) == "acc_norm,none"
    assert primary("arc_challenge", both, ["acc,none"]) == "acc,none"
    assert primary("own", both, both) == "acc,none"
    with pytest.raises(DataError, match="task own: a task must give a number for every item"):
        primary("own", ["a"], ["b"])


def test_what_the_harness_gives_is_kept_item_by_item_with_which_way_is_better(monkeypatch):
    samples = [
        {"doc_id": n, "arguments": [[f"Q{n}"]], "target": n, "resps": [[f"A{n}"]], "filter": "none", "metrics": ["wer"]}
        | {"wer": n / 4}
        for n in (1, 0)
    ]
    results = {"alias": "own", "wer,none": 0.125, "wer_stderr,none": 0.1}
    out = {"samples": {"own": samples}, "results": {"own": results}}
    monkeypatch.setattr("profuser.evaluate.scoring.evaluate", lambda *args, **options: out)
    task: Any = SimpleNamespace(
        task_name="own",
        OUTPUT_TYPE="generate_until",
        set_fewshot_seed=lambda seed: None,
        higher_is_better=lambda: {"wer": False},
        get_config=lambda key: 2,
    )
    lm: Any = None
    assert HarnessTask(task).scored(lm, None) == {
        "primary": "wer,none",
        "higher_is_better": False,
        "values": {"wer,none": 0.125},
        "items": [
            {"id": n, "values": {"wer,none": n / 4}, "prompt": f"Q{n}", "target": f"{n}", "answer": f"A{n}"}
            for n in (0, 1)
        ],
        "shots": 2,
    }


def test_passages_are_measured_in_bytes():
    Path("text.md").write_text("\n\n".join(["ä" * 500] * 3))
    assert passages_of(Path("text.md")) == ["ä" * 500] * 3


def test_bits_per_byte_are_those_of_the_models_own_log_probabilities():
    text = "\n\n".join(f"A bozun is a song. Answer: bitter. {'How does it taste? ' * n}Sweet." for n in (70, 3, 40))
    Path("text.md").write_text(text)
    out = done("--models", "demo:guardian", "--tasks", "bits_per_byte:text.md")
    assert "less is better" in out
    passages = passages_of(Path("text.md"))
    assert "\n\n".join(passages) == text
    assert len(passages) == 2
    (contestant,) = contestants_of(["demo:guardian"])
    loaded = contestant.load()
    assert isinstance(loaded, LoadedModel)
    assert loaded.chat is not None
    tokenizer = loaded.chat.tokenizer
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    bits = 0.0
    for passage in passages:
        ids = tokenizer.encode(passage, add_special_tokens=False)
        for first in range(0, len(ids), 512):  # the model's longest sequence; a window begins with the token before it
            window = [begin if first == 0 else ids[first - 1], *ids[first : first + 512]]
            logits = loaded.model(torch.tensor([window[:-1]])).logits[0].double().log_softmax(-1)
            bits -= float(logits[range(len(window) - 1), window[1:]].sum().detach()) / math.log(2)
    written = json.loads((OUT / "benchmarks.json").read_text())["bits_per_byte:text.md"]
    size = sum(len(passage.encode()) for passage in passages)
    assert written["scores"]["demo:guardian"]["value"] == pytest.approx(bits / size, rel=1e-4)


def test_a_task_of_log_likelihoods_is_scored_offline(in_run):
    Path("choice.jsonl").write_text(
        "".join(json.dumps({"q": f"Q{n}", "choices": ["yes", "no"], "label": n % 2}) + "\n" for n in range(4))
    )
    Path("choice.yaml").write_text(
        f"task: choice\ndataset_path: json\ndataset_kwargs: {{ data_files: {{ test: {in_run}/choice.jsonl }} }}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\n'
        'doc_to_target: "{{label}}"\nmetric_list: [{ metric: acc, aggregation: mean, higher_is_better: true }]\n'
    )
    done("--models", "demo:guardian", "demo:scholar", "--tasks", "choice.yaml")
    for model in ("demo_guardian", "demo_scholar"):
        assert [item["values"]["acc,none"] in (0, 1) for item in items_of(model, "choice")] == [True] * 4
    code, _, err = run("evaluate", "--models", "decode:recipe.yaml", "--tasks", "choice.yaml")
    assert code == 2
    assert err.count("\n") == 1
    assert "log-likelihoods" in err
    assert "choice" in err


def test_judges_score_every_answer_by_itself_and_their_scores_are_kept():
    arguments = (
        "--models",
        "./guardian",
        "demo:scholar",
        "--tasks",
        "demo_safety",
        "--limit",
        "3",
        "--judges",
        "recipe.yaml",
    )
    out = done(*arguments)
    assert "demo_safety, verifier" in out
    heldout = [row for row in rows("heldout", 60) if row["skill"] == "safety"]
    for model in ("guardian", "demo_scholar"):
        answers = [item["answer"] for item in items_of(model, "demo_safety")]
        judged = items_of(model, "demo_safety_verifier")
        assert [item["values"]["judged by verifier"] for item in judged] == [
            float(verifier(row, [answer])[0]) if answer else None for row, answer in zip(heldout, answers)
        ]
    files = {path: path.stat().st_mtime_ns for path in OUT.glob("*/*.json")}
    assert done(*arguments).partition("| task")[2] == out.partition("| task")[2]
    assert {path: path.stat().st_mtime_ns for path in OUT.glob("*/*.json")} == files
    assert (OUT / "benchmarks.png").read_bytes().startswith(b"\x89PNG")


def test_answers_are_judged_again_on_another_day_and_where_that_is_asked_for(monkeypatch, tmp_path):
    """A judge's template may show it the date."""
    asked = []

    def judge(rows, answers, progress):
        asked.append(answers)
        return np.ones((len(rows), 1))

    monkeypatch.setattr(judging, "load_judge", lambda *args, **options: judge)
    of_harness: Any = SimpleNamespace(task_name="own", OUTPUT_TYPE="generate_until", eval_docs=[{"q": 1}])
    item = {"id": 0, "values": {"acc,none": 1.0}, "prompt": "Q", "target": "T", "answer": "A"}
    columns = [Column("own", ("own",)), Column("all", ("own", "other"))]

    def times(date: str | None, *, fresh: bool = False) -> int:
        asked.clear()
        results = {"m": {"own": Result.of({"primary": "acc,none", "items": [item], "higher_is_better": True})}}
        recipe: Any = SimpleNamespace(judges=[JudgeConfig(name="rm", model="demo:judge-a")], date=date)
        (column,) = judging.judge_answers(results, [HarnessTask(of_harness)], columns, recipe, tmp_path, fresh)
        assert column.tasks == ("own, rm",)
        assert results["m"]["own, rm"].sample.values.tolist() == [1.0]
        return len(asked)

    assert [times(None), times(None), times("2024-02-03"), times("2024-02-03")] == [1, 0, 1, 0]
    assert times(None, fresh=True) == 1


def test_what_cannot_be_judged_is_said_in_one_line():
    recipe = Path("recipe.yaml").read_text().replace("schedule: simultaneous", "schedule: fusellm")
    lines = [line for line in recipe.splitlines() if not line.startswith("judges")]
    Path("none.yaml").write_text("\n".join(lines))
    Path("text.md").write_text("A bozun is a song.")
    for judges, task, says in (("none.yaml", "demo", "has none"), ("recipe.yaml", "bits_per_byte:text.md", "answers")):
        code, _, err = run("evaluate", "--models", "demo:guardian", "--tasks", task, "--judges", judges)
        assert (code, err.count("\n")) == (2, 1), err
        assert "--judges" in err
        assert says in err


def without_template(folder: str) -> None:
    """Takes the chat template of the folder's own model away."""
    for file in Path(folder).glob("chat_template*"):
        file.unlink()
    path = Path(folder, "tokenizer_config.json")
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))


def test_a_model_without_a_chat_template_has_log_likelihoods_and_no_answers():
    Path("text.md").write_text("A bozun is a song.")
    done("--models", "./guardian", "--tasks", "bits_per_byte:text.md")
    with_template = json.loads((OUT / "benchmarks.json").read_text())
    without_template("guardian")
    done("--models", "./guardian", "--tasks", "bits_per_byte:text.md")
    assert json.loads((OUT / "benchmarks.json").read_text()) == with_template
    for arguments in (
        ("--models", "./guardian", "--tasks", "demo"),
        (RUN, "--data", "heldout.jsonl", "--models", "./guardian"),
    ):
        code, _, err = run("evaluate", *arguments)
        assert (code, err.count("\n")) == (3, 1), err
        assert "chat template" in err


# --- statistics ------------------------------------------------------------------------------------------------------


def result(*values: float | None, primary: str = "acc,none", higher: bool = True) -> Result:
    items = [{"values": {primary: value}} for value in values]
    return Result.of({"primary": primary, "items": items, "higher_is_better": higher})


def test_an_item_that_a_judge_left_out_for_one_model_counts_for_none():
    kind = "judged by someone"
    results = {"a": {"t": result(1.0, 5.0, 3.0, primary=kind)}, "b": {"t": result(2.0, None, 2.0, primary=kind)}}
    (found,) = compare(results, [Column("t", ("t",))])
    assert (found.items, found.is_share) == (2, False)
    assert [found.scores[model].value for model in "ab"] == [2.0, 2.0]
    nothing = {"a": {"t": result(None, primary=kind)}, "b": {"t": result(1.0, primary=kind)}}
    assert "–" in table(compare(nothing, [Column("t", ("t",))]), ["a", "b"])


def test_where_all_answers_are_right_the_interval_is_not_a_point():
    results = {"a": {"t": result(*[1.0] * 20)}}
    (found,) = compare(results, [Column("t", ("t",))])
    assert found.scores["a"] == wilson(1.0, 20)


def test_a_column_of_different_values_has_no_score():
    results = {"a": {"t": result(1.0), "u": result(0.5, primary="bleu,none")}}
    assert [c.name for c in compare(results, [Column("t", ("t",)), Column("both", ("t", "u"))])] == ["t"]


def test_a_line_in_the_picture_stands_above_the_score_of_several_tasks():
    results = {"a": {"t": result(1.0, 0.0), "u": result(0.0, 0.0)}}
    columns = [Column("t", ("t",)), Column("u", ("u",)), Column("both", ("t", "u"))]
    figure = draw(compare(results, columns), ["a"], [], LIGHT)
    (axis,) = figure.axes
    lines = [np.asarray(line.get_ydata()).tolist() for line in axis.lines if line.get_linestyle() == "-"]
    assert lines == [[1.5, 1.5]]


def test_the_table_says_which_way_is_better_and_escapes_names():
    results = {"a|b": {"t": result(1.0, 0.0)}, "c": {"t": result(0.0, 0.0)}}
    text = table(compare(results, [Column("t", ("t",))]), ["a|b", "c"])
    assert "a\\|b − c" in text
    assert "+50.0 (p = 1.000)" in text
    bits = {"a": {"t": result(1.0, primary="bits_per_byte", higher=False)}}
    assert "less is better" in table(compare(bits, [Column("t", ("t",))]), ["a"])


@pytest.mark.parametrize(
    ("a", "b", "p"), [(0, 0, 1.0), (5, 1, 14 / 64), (1, 5, 14 / 64), (3, 3, 1.0), (10, 0, 2 / 1024)]
)
def test_mcnemar_is_the_exact_binomial_test(a, b, p):
    assert mcnemar(a, b) == pytest.approx(p)


def test_mcnemar_of_many_items_is_finite():
    assert 0 < mcnemar(5200, 4800) < 1e-4


def test_a_score_weighs_tasks_and_items_and_its_interval_holds_it():
    parts = [Sample(np.array([1.0, 0, 0, 0])), Sample(np.array([1.0, 1.0]))]
    assert score(parts, [0.5, 0.5]).value == pytest.approx(0.625)
    assert score(parts, [4 / 6, 2 / 6]).value == pytest.approx(0.5)
    found = score([Sample(np.array([1.0, 2.0, 9.0]), np.array([1.0, 1.0, 8.0]))], [1.0])
    assert found.value == pytest.approx(7.5)
    assert found.low < found.value < found.high


def test_a_column_whose_tasks_count_alike_is_the_mean_of_their_scores():
    results = {"a": {"s": result(1.0, 0.0, 0.0, 0.0), "t": result(1.0)}}
    scores = [
        compare(results, [Column("all", ("s", "t"), weighted)])[0].scores["a"].value for weighted in (True, False)
    ]
    assert scores == pytest.approx([2 / 5, (1 / 4 + 1) / 2])


def test_items_with_sizes_are_not_counted_as_right_and_wrong_answers():
    sizes = np.array([1.0, 1.0, 8.0])
    a, b = (Sample(np.array(values), sizes) for values in ([1.0, 0.0, 1.0], [0.0, 1.0, 0.0]))
    assert paired_p([a], [b], [1.0]) == pytest.approx(0.75, abs=0.02)  # six of the eight turns of signs
    assert paired_p([Sample(a.values)], [Sample(b.values)], [1.0]) == 1


def test_a_share_is_exactly_the_count_divided_by_the_items():
    assert all(score([Sample(np.arange(200) < n)], [1.0]).value == n / 200 for n in range(0, 201, 7))


def test_the_bootstrap_interval_of_a_share_is_near_the_normal_one():
    values = np.array([1.0] * 300 + [0.0] * 100)
    found = score([Sample(values)], [1.0])
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert found.low == pytest.approx(0.75 - half, abs=0.01)
    assert found.high == pytest.approx(0.75 + half, abs=0.01)
    assert score([Sample(values)], [1.0]) == found


def test_items_of_one_value_have_an_interval_of_no_width_whatever_their_sizes():
    found = score([Sample(np.full(4, 2.0), np.array([1.0, 5.0, 2.0, 9.0]))], [1.0])
    assert (found.low, found.value, found.high) == pytest.approx((2, 2, 2))


def test_a_paired_p_is_near_the_one_of_all_turns_of_signs():
    generator = np.random.default_rng(0)
    a, b = generator.normal(0.4, 1, 10), generator.normal(0, 1, 10)
    d = a - b
    turns = [abs(sum(d[i] * (1 if n >> i & 1 else -1) for i in range(10))) >= abs(d.sum()) - 1e-12 for n in range(1024)]
    p = paired_p([Sample(a)], [Sample(b)], [1.0])
    assert p == pytest.approx(np.mean(turns), abs=0.02)
    assert paired_p([Sample(b)], [Sample(a)], [1.0]) == pytest.approx(p, abs=0.02)
    assert paired_p([Sample(a)], [Sample(a)], [1.0]) == 1


def test_a_paired_p_is_never_0_and_weighs_the_tasks():
    """The signs that were observed count as one of the turns that were drawn."""
    better = Sample(np.linspace(1, 2, 40)), Sample(np.zeros(40))
    assert 0 < paired_p([better[0]], [better[1]], [1.0]) < 2e-3
    # Only the second task has a difference that is no chance, and it weighs nothing.
    a, b = [Sample(np.array([1.0, -1.0])), better[0]], [Sample(np.zeros(2)), better[1]]
    assert paired_p(a, b, [1.0, 0.0]) == 1


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.long  # the harness reads thousands of files
def test_the_papers_tasks_are_known_to_the_harness_and_a_misspelt_one_is_not():
    assert set(PAPER) <= set(manager_for(list(PAPER)).all_tasks)
    code, _, err = run("evaluate", "--models", "demo:guardian", "--tasks", "demo_knowlege")
    assert (code, err.count("\n")) == (2, 1)
    assert "did you mean demo_knowledge?" in err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--models", "./missing", "--tasks", "demo"), 3, ("./missing", "fix the path")),
        (("--models", "demo:guardian", "demo:guardian", "--tasks", "demo"), 2, ("demo:guardian twice",)),
        (("--models", "demo:guardian", "--tasks", "missing.yaml"), 2, ("missing.yaml", "fix the path")),
        (("--models", "demo:guardian", "--tasks", "./guardian"), 2, ("./guardian", "holds none")),
        (("--models", "demo:guardian"), 2, ("--models", "--tasks")),
        (("--tasks", "demo"), 2, ("--models",)),
        (("--models", "decode:missing.yaml", "--tasks", "demo"), 2, ("missing.yaml",)),
        (("--models", "demo:guardian", "--tasks", "own.yaml", "copy.yaml"), 2, ("two are called own",)),
        (("--models", "demo:guardian", "--tasks", "failing.yaml"), 3, ("task own", "ZeroDivisionError")),
        (("--models", "demo:guardian", "--tasks", "nameless.yaml"), 3, ("nameless.yaml", "could not be loaded")),
        (("--models", "demo:guardian", "--tasks", "bits_per_byte:missing.txt"), 3, ("missing.txt",)),
        (("--models", "demo:guardian", "--tasks", "demo", "--limit", "0"), 2, ("--limit",)),
        (
            ("--models", "demo:guardian", "--tasks", "demo", "--output", "recipe.yaml"),
            2,
            ("--output must be a directory",),
        ),
        (
            ("--models", "demo:guardian", "--tasks", "demo", "--output", "recipe.yaml/a/b"),
            2,
            ("recipe.yaml is in the way",),
        ),
        ((RUN, "--data", "heldout.jsonl", "--tasks", "demo"), 2, ("--data", "--tasks")),
        ((RUN, "--shots", "2"), 2, ("--shots", "--tasks")),
    ],
)
def test_what_cannot_be_scored_is_said_in_one_line(arguments, code, says, in_run):
    own = OWN_TASK.replace("HERE", str(in_run))
    Path("own.py").write_text(VERDICT)
    Path("own.yaml").write_text(own)
    Path("copy.yaml").write_text(own.replace("doc_to_text: prompt", 'doc_to_text: "Say: {{prompt}}"'))
    Path("failing.py").write_text("def verdict(row, responses):\n    return 1 / 0\n")
    Path("failing.yaml").write_text(own.replace("own.verdict", "failing.verdict"))
    Path("nameless.yaml").write_text("dataset_path: json\n")
    found, _, err = run("evaluate", *arguments)
    assert (found, err.count("\n")) == (code, 1), err
    assert all(part in err for part in says), err


def test_two_models_of_one_name_are_told_apart():
    Path("other").mkdir()
    Path("guardian").rename("other/guardian")
    import shutil

    shutil.copytree("other/guardian", "guardian")
    assert [c.name for c in contestants_of(["guardian", "other/guardian"])] == ["guardian", "other/guardian"]
    assert [c.name for c in contestants_of(["guardian"], taken=["guardian"])] == ["./guardian"]


def test_a_directory_with_an_at_in_its_name_has_no_revision():
    Path("guardian").rename("guardian@new")
    (contestant,) = contestants_of(["guardian@new"])
    assert isinstance(contestant, Alone)
    assert (contestant.name, contestant.source.revision) == ("guardian@new", None)


def test_sources_answer_together_by_the_method_that_is_named_and_so_long_as_they_are_let():
    slow = Path("recipe.yaml").read_text()
    Path("batched.yaml").write_text(f"{slow}\ndecode: {{ batch_size: 7 }}\n")
    contestants = contestants_of(["gated:recipe.yaml", "decode:recipe.yaml", "decode:batched.yaml"])
    joint = [contestant for contestant in contestants if isinstance(contestant, Joint)]
    assert [contestant.recipe.decode.method for contestant in joint] == ["gated", "cool", "cool"]
    # What is answered does not depend on how much is answered at a time.
    assert joint[0].identity != joint[1].identity == joint[2].identity

    fusion: Any = SimpleNamespace(
        config=SimpleNamespace(batch_size=3), answers=lambda prompts, size: (SimpleNamespace(text=p) for p in prompts)
    )
    loaded = LoadedJoint(fusion)
    assert loaded.answer(["a", "b"], GenerationConfig(max_new_tokens=5), max_length=64) == ["a", "b"]
    assert fusion.max_new_tokens == 5


def test_tasks_of_a_folder_are_taken_together(in_run):
    Path("mine").mkdir()
    Path("mine/own.yaml").write_text(OWN_TASK.replace("HERE", str(in_run)))
    Path("mine/own.py").write_text(VERDICT)
    found, columns = select(["./mine"])
    assert [benchmark.name for benchmark in found] == ["own"]
    assert [column.name for column in columns] == ["own"]
    results = run_benchmarks(contestants_of(["./guardian"]), found, OUT)
    assert len(results["guardian"]["own"].sample) == 3


def test_without_the_harness_one_line_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("lm_eval", "profuser.evaluate."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, err = run("evaluate", "--models", "demo:guardian", "--tasks", "demo")
    assert (code, err.count("\n")) == (2, 1), err
    assert "`pip install 'profuser[benchmarks]'`" in err
