"""Writes the report of a finished run: report.html, which needs no other file, and its five pictures.

The report is made from run.json, metrics.jsonl, scores.json, evaluation.json and evaluations/ of the run directory and from
summary.json of its store. It computes nothing but intervals and shares. The page contains each picture as two SVGs, for light and for dark
screens; the run directory gets the light ones as PNG files as well. The intervals say how much the choice of the held-out
prompts matters, not how much the seed does. comparison.py, beside this file, sets several runs side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup
from matplotlib.figure import Figure

from profuser.errors import DataError
from profuser.report import figures
from profuser.report.evaluations import read_evaluations
from profuser.report.metrics import read_metrics, stage_table
from profuser.report.rendering import embedded, render
from profuser.report.scores import answer_of, called, in_order, models_of, read_scores
from profuser.report.theme import DARK, LIGHT, Theme
from profuser.store.files import write_atomic
from profuser.store.store import Store
from profuser.train.run_record import METRICS, check_data, peak_of, read_proven, read_run


def _title(sources: Sequence[str], target: str, distilled: bool) -> str:
    """Returns the title of the page. `distilled` says whether the target learnt from its sources at all."""
    if not distilled:
        return f"{target} fine-tuned on the ground truth, without its sources"
    names = f"{', '.join(sources[:-1])} and {sources[-1]}" if len(sources) > 1 else sources[0]
    return f"{names} fused into {target}"


def _demo(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what demo_data.json records: the flaws of the fusion prompts, and the number of rows per file.

    A flaw has a name, a share of the prompts, and about how many prompts that is.
    """
    rows = record.get("rows", {})
    shares = [(name, record[name]) for name in ("terse", "wrong") if name in record]
    flaws = [(name, share, round(share * rows.get("fusion", 0))) for name, share in shares]
    return {"flaws": flaws, "rows": rows}


def _examples(entries: Sequence[Mapping[str, Any]], sources: Sequence[str], target: str) -> list[dict[str, Any]]:
    """Returns the held-out examples, each with its cards: the answers of `sources`, of the target before, and of the fused model.

    A card has a label, the model's key, the answer's text, and whether it is correct.
    """
    labels = {"target_before": f"{target} (target before)"}
    shown = []
    for entry in entries:
        keys = [key for key in (*sources, "target_before", "fused") if key in entry["responses"]]
        cards = [(labels.get(key, key), key, entry["responses"][key], entry["correct"].get(key)) for key in keys]
        shown.append({**entry, "cards": cards})
    return shown


def _draw(draw: Callable[[Theme], Figure], path: Path) -> dict[str, Markup]:
    """Draws a picture in both themes. The light one is written to `path`; both are returned for the page, as SVG in base64."""
    light, dark = draw(LIGHT), draw(DARK)
    figures.save_png(light, path)
    return embedded(light, dark)


def write_report(run_dir: Path, store_dir: Path) -> Path:
    """Writes report.html and its five PNG files into `run_dir`.

    Args:
        run_dir: the directory of a finished run. It holds run.json and metrics.jsonl and, if the recipe has held-out prompts,
            scores.json and evaluation.json.
        store_dir: the directory of the run's store, which holds manifest.json and summary.json.
    Returns:
        The path of report.html.
    Raises:
        DataError: a directory or file is missing, or a file is not what was written.
        ConfigError: the store was made of other data than the run learnt from.
    """
    # Read what the run and its store have left. Without held-out prompts there are no scores.
    for directory, what in ((run_dir, "run"), (store_dir, "store")):
        if not directory.is_dir():
            raise DataError(
                f"the {what} must be an existing directory, got {directory}; give the one that training wrote"
            )
    run = read_run(run_dir)
    run.setdefault("prepared", None)
    scores, evaluation = read_scores(run_dir, run)
    metrics = read_metrics(read_proven(run_dir, run, METRICS))
    store = Store.open(store_dir, complete=False)
    summary = store.summary
    check_data(run_dir, run, store.data)

    # What the pictures show.
    sources, target, counts = summary["sources"], summary["target"], evaluation["counts"]
    skills = [skill for skill in scores["fused"] if skill != "mean"]
    models = models_of(scores, counts, target)
    single = {model.name for model in models if model.role == "source"}  # all but one that is shown as the target
    wins = [summary.get(key) or {} for key in ("min_ce_wins", "vote_wins")]
    min_ce, vote = ({skill: by_skill[skill] for skill in in_order(by_skill, skills)} for by_skill in wins)
    alignment = {mode: rows for mode, rows in (summary.get("alignment") or {}).items() if rows}
    rows = [*skills, "mean"] if len(skills) > 1 else skills
    pictures: dict[str, Callable[[Theme], Figure]] = {
        "scores": lambda theme: figures.draw_scores(models, rows, theme),
        "win_min_ce": lambda theme: figures.draw_wins(min_ce, sources, "Min-CE", theme),
        "win_vote": lambda theme: figures.draw_wins(vote, sources, "vote", theme),
        "alignment": lambda theme: figures.draw_alignment(alignment, sources, theme),
        "curves": lambda theme: figures.draw_curves(metrics, theme),
    }

    # What the text and the tables show, and the page itself.
    bits, align = evaluation.get("bits_per_byte") or {}, run["recipe"].get("align") or {}
    keys = {"fused": "fused", "target": "target_before"}
    bits_of = [(m, bits.get(keys[m.role]) if m.role in keys else bits.get("sources", {}).get(m.name)) for m in models]
    handled = {reason.replace("_", " "): count for reason, count in (summary.get("handled") or {}).items()}
    if metrics.unreadable:
        handled["damaged lines of metrics.jsonl, left out"] = metrics.unreadable
    html = render(
        "report.html.j2",
        title=_title(sources, called(target), distilled=run["recipe"].get("schedule") != "sft"),
        answer=answer_of(models, skills),
        run=run,
        summary=summary,
        target=called(target),
        peak=peak_of(run),
        total_seconds=sum(run["seconds"].values()),
        demo=_demo(run["demo_data"]) if run.get("demo_data") else None,
        models=models,
        rows=rows,
        counts=counts,
        bits=[(model, values) for model, values in bits_of if values],
        wins={"min_ce": min_ce, "vote": vote},
        judges=summary.get("judges") or {},
        abstentions=summary.get("abstentions") or {},
        agreement=summary.get("agreement"),
        no_signal=summary.get("no_signal") or {"prompts": 0},
        alignment=alignment,
        least=None if align.get("mode") == "fusellm" else align.get("min_reliability", 0.1),
        heldout={key: evaluation.get(key) for key in ("ce", "kd")},
        curves=figures.curves_caption(metrics) if metrics.training or metrics.validation else None,
        stages=stage_table(metrics, run["recipe"]),
        judged=evaluation.get("votes") or [],
        later=read_evaluations(run_dir, skills),
        examples=_examples(
            evaluation.get("examples") or [], [name for name in sources if name in single], called(target)
        ),
        handled=handled,
        recipe=yaml.safe_dump(run["recipe"], sort_keys=False, allow_unicode=True, width=100),
        picture={name: _draw(draw, run_dir / f"{name}.png") for name, draw in pictures.items()},
    )
    path = run_dir / "report.html"
    write_atomic(path, html.encode())
    return path
