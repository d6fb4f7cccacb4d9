"""Makes small synthetic run directories with their stores, for the tests of the report."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from profuser.store.manifest import new_manifest, read_manifest, write_manifest
from profuser.store.sealed import digest_of_file, sealed
from profuser.train.run_record import read_run, record_files, write_run

SOURCES = ("guardian", "scholar", "reckoner")
SKILLS = ("knowledge", "safety", "reasoning")


def make_run(
    root: Path, *, sources=SOURCES, skills=SKILLS, method="progressive", target=None, demo=True, scored=True, seed=0
) -> tuple[Path, Path]:
    """Writes a run directory and its store as training leaves them, with made-up but plausible numbers."""
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
    judged = [
        {
            "skill": skills[i % len(skills)],
            "prompt": f"T{i}: How does a feget taste?",
            "ground_truth": "A feget is a song. Answer: bland.",
            "sources": [
                {
                    "name": name,
                    "ce": None if i == 2 and s == 2 else 0.125 * (1 + (s + i) % len(sources)),
                    "wins_min_ce": (s + i) % len(sources) == 0,
                    "responses": [
                        {"text": f"A feget is a {name}.", "eligible": True, "votes": 1.5 * (s < 2), "wins_vote": s == 0}
                    ]
                    if votes
                    else [],
                }
                for s, name in enumerate(sources)
            ],
            "fused": "A feget is a song. Answer: bland.",
        }
        for i in range(6)
    ]
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
        "votes": judged,
    }
    demo_data = {"seed": 0, "terse": 0.4, "wrong": 0.1, "rows": {"fusion": 788, "validation": 450, "heldout": 600}}
    run = {
        "status": "complete",
        "recipe": {
            "sources": [{"name": n, "model": f"demo:{n}"} for n in sources],
            "target": target,
            "schedule": method,
            "optim": {"beta": 0.25},
            "data": {"train": "demo:fusion.jsonl", "heldout": "demo:heldout.jsonl" if scored else None},
        },
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "hardware": "x86_64, 2 cores",
        "commit": None,
        "precision": "fp32",
        "store": str(store_dir),
        "seconds": {"prepare": 43.1, "train": 3671.0, "evaluate": 8.25},
        "peak_rss_bytes": 1_834_000_000,
        "peak_owned_bytes": 1_503_000_000,
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

    modes = (["training"] if distils else []) + (["inference"] if votes else [])
    even = {name: 1 / len(sources) for name in sources}
    summary = {
        "sources": list(sources),
        "target": target,
        "skills": list(skills),
        "examples": 788,
        "min_ce_unit": "byte",
        "min_ce_wins": wins(False) if distils else {},
        "vote_wins": wins(True) if votes else {},
        "judges": {"judge-a": even, "verifier": even} if votes else {},
        "abstentions": {"judge-a": 0.0, "verifier": 0.25} if votes else {},
        "no_signal": {
            "prompts": 101,
            "rule": "skip",
            "reasons": {"all responses are the same text": 99, "every response is below a judge's floor": 2},
        }
        if votes
        else None,
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
            "loss_inference": ce + 0.3 * kd if infer else 0.0,
            "loss_training": ce + 0.6 if train else 0.0,
            "ce_inference": ce if infer else None,
            "kd_inference": kd if infer else None,
            "ce_training": ce + 0.5 if train else None,
            "kd_training": kd + 0.3 if train and distils else None,
        }
        lines.append(line | {"loss": line["loss_inference"] * (0.1 if stage else 1) + line["loss_training"]})
    for step in range(0, steps + 1, 50):
        kd = 0.4 + 1.5 * math.exp(-step / 90) if distils else None
        lines.append({"step": step, "stage": 0, "eval": {"ce": 0.6 + 2 * math.exp(-step / 90), "kd": kd}})
    write_lines(run_dir / "metrics.jsonl", lines)
    write_run(run_dir, run)
    for name, content in ({"scores": scores, "evaluation": evaluation} if scored else {}).items():
        (run_dir / f"{name}.json").write_text(json.dumps(content))
    record_files(run_dir, *(path.name for path in run_dir.iterdir() if path.name != "run.json"))
    (store_dir / "summary.json").write_text(json.dumps(summary))
    settings = {
        "sources": {
            "source_names": list(sources),
            "sources": {},
            "target": {"name": target},
            "capture": {"top_k": 10, "dtype": "float32"},
            "data": {},
            "date": "2026-01-31",
        },
        "votes": {"asked": [], "judges": {}},
        "targets": {"mode": "bytes"},
    }
    write_manifest(store_dir, new_manifest(settings))
    record_summary(store_dir)
    return run_dir, store_dir


def write_lines(path: Path, lines) -> None:
    path.write_text("".join(json.dumps(sealed(line)) + "\n" for line in lines))


def record_summary(store_dir: Path) -> None:
    manifest = read_manifest(store_dir)
    manifest["files"]["summary.json"] = digest_of_file(store_dir / "summary.json")
    write_manifest(store_dir, manifest)


def edit(path: Path, change) -> None:
    """Changes a file of a run or store as if it had been written like this."""
    content = read_run(path.parent) if path.name == "run.json" else json.loads(path.read_text())
    change(content)
    if path.name == "run.json":
        write_run(path.parent, content)
        return
    path.write_text(json.dumps(content))
    if path.name == "summary.json":
        record_summary(path.parent)
    else:
        record_files(path.parent, path.name)


def rich_run(root: Path) -> tuple[Path, Path]:
    """Writes a run that is hard to lay out: six skills, four sources, three stages, long names and hostile texts."""
    sources = (
        "guardian",
        "Qwen-2.5-7B-Instruct-fine-tuned-on-everything",
        "anunbrokennameofmorethanthirtyletters",
        "b",
    )
    skills = (
        "knowledge",
        "grade_school_mathematics_word_problems",
        "x" * 48,
        "safety",
        "עברית",
        "code <b>generation</b>",
    )
    run_dir, store_dir = make_run(root, sources=sources, skills=skills)

    def three_stages(run):
        weights = ((1.0, 0.0), (0.5, 0.5), (0.1, 1.0))
        run["recipe"]["schedule"] = [{"inference_weight": i, "training_weight": t, "beta": None} for i, t in weights]
        run["seconds"]["train"] = 45296.0
        run["hardware"] = "A processor with a very long name @ 3.14159 GHz, 128 threads"

    def hostile(evaluation):
        texts = (
            "</pre><script>alert(1)</script><img src='https://example.org/x.png'>",
            "שלום עולם, זהו טקסט מימין לשמאל \u202e with an override",
            "https://example.org/" + "an-address-without-a-break" * 12,
            "def f(x):\n    return [x] * 3\n" * 30,
            "",
        )
        for i, example in enumerate(evaluation["examples"]):
            example["prompt"] = texts[i % len(texts)] or "?"
            example["responses"]["fused"] = texts[(i + 1) % len(texts)]
        for i, example in enumerate(evaluation["votes"]):
            example["ground_truth"] = texts[i % len(texts)]
            for source in example["sources"]:
                source["responses"] *= 2
            example["sources"][1]["responses"][0] = {"text": "", "eligible": False, "votes": 0.0, "wins_vote": False}

    edit(run_dir / "run.json", three_stages)
    edit(run_dir / "evaluation.json", hostile)
    edit(store_dir / "summary.json", lambda summary: summary["handled"].update({"unusually " * 12: 1234567}))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    late = ({**line, "stage": 2} if line["step"] > 300 else line for line in lines)
    write_lines(run_dir / "metrics.jsonl", late)
    record_files(run_dir, "metrics.jsonl")
    return run_dir, store_dir
