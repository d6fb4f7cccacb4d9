"""Writes the report of a finished run: report.html, which needs no other file, and its five pictures.

The report is made from run.json, metrics.jsonl, scores.json, evaluation.json and evaluations/ of the run directory and from
summary.json of its store. It computes nothing but intervals and shares. The page contains each picture as two SVGs, for light and for dark
screens; the run directory gets the light ones as PNG files as well. The intervals say how much the choice of the held-out
prompts matters, not how much the seed does. Comparisons between runs are left out on purpose: profuser.experiments.compare
makes them.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from profuser.errors import DataError
from profuser.report import figures
from profuser.report.evaluations import read_evaluations
from profuser.report.figures import Model
from profuser.report.intervals import Score, difference, mean_score, wilson
from profuser.report.metrics import Change, OnePoint, read_metrics, stage_table
from profuser.report.theme import DARK, LIGHT, Theme
from profuser.store.files import write_atomic
from profuser.store.store import Store
from profuser.text.display import visible
from profuser.train.run_record import EVALUATION, METRICS, SCORES, read_measured, read_proven, read_run

MAX_TEXT = 2000  # how many characters of a prompt or response the page shows


def _models(scores: Mapping[str, Any], counts: Mapping[str, int], target: str) -> list[Model]:
    """Returns the models in the order in which the page shows them: fused, target before, sources.

    A target that is also a source, with the same scores, appears only once.
    """
    before = scores["target_before"]
    rows = [("fused", "fused", scores["fused"])] + ([(target, "target", before)] if before else [])
    for name, values in scores["sources"].items():
        if name != target or values != before:
            rows.append((name, "source", values))
    models = []
    for name, role, values in rows:
        per_skill = {
            skill: wilson(_number(value), counts.get(skill)) for skill, value in values.items() if skill != "mean"
        }
        mean = mean_score(_number(values["mean"]), list(per_skill.values())) if "mean" in values else None
        models.append(Model(name, role, per_skill | ({"mean": mean} if mean else {})))
    return models


def _number(value: float | None) -> float:
    """Returns a value of a JSON file as a number, NaN for null."""
    return math.nan if value is None else float(value)


def _title(sources: Sequence[str], target: str, distilled: bool) -> str:
    """Returns the title of the page. `distilled` says whether the target learnt from its sources at all."""
    if not distilled:
        return f"{target} fine-tuned on the ground truth, without its sources"
    names = f"{', '.join(sources[:-1])} and {sources[-1]}" if len(sources) > 1 else sources[0]
    return f"{names} fused into {target}"


def _answer(models: Sequence[Model], skills: Sequence[str]) -> dict[str, Any] | None:
    """Returns what the page begins with: how the fused model compares with the best single one, and what the target forgot.

    It is None where nothing was scored.
    """
    # The fused model against the best of the others.
    fused, others = models[0], [model for model in models[1:] if "mean" in model.scores]
    if "mean" not in fused.scores or not others:
        return None
    best = max(others, key=lambda model: (not math.isnan(model.scores["mean"].value), model.scores["mean"].value))
    before = next((model for model in models if model.role == "target"), None)
    answer: dict[str, Any] = {
        "fused": fused.scores["mean"],
        "best": best.scores["mean"],
        "best_name": best.name,
    }
    answer["gain"] = difference(answer["fused"], answer["best"])
    points = abs(100 * answer["gain"].value)
    answer["verdict"] = (
        f"{points:.1f} points {'above' if answer['gain'].value > 0 else 'below'}" if round(points, 1) else "level with"
    )
    answer["certain"] = answer["gain"].low > 0 or answer["gain"].high < 0

    # The target before and after: its change in the skill that was its best, and the others in which it got worse.
    if before:
        pairs = {skill: (before.scores[skill], fused.scores[skill]) for skill in skills if skill in before.scores}
        changes = {skill: (*pair, difference(pair[1], pair[0])) for skill, pair in pairs.items()}
        strongest = max(changes, key=lambda skill: changes[skill][0].value, default=None)
        fell = [(skill, change[2]) for skill, change in changes.items() if skill != strongest and change[2].value < 0]
        answer["strongest"] = strongest and (strongest, *changes[strongest])
        answer["fell"] = sorted(fell, key=lambda item: item[1].value)
    return answer


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


def _percent(value: float | None, digits: int = 1) -> str:
    """Formats a share in percent, without the sign; a dash stands for a missing value."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.{digits}f}"


def _points(change: Score) -> str:
    """Formats a difference as `+3.1 points (95 % interval -0.4 to +6.6)`, with a true minus sign."""
    value, low, high = (round(100 * part, 1) + 0.0 for part in change)  # adding 0.0 turns -0.0 into 0.0
    text = f"{value:+.1f} points"
    if not math.isnan(low):
        text += f" (95 % interval {low:+.1f} to {high:+.1f})"
    return text.replace("-", "−")


def _duration(seconds: float) -> str:
    """Formats a duration in seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _shorten(text: str) -> str:
    """Cuts a text that is too long for the page, and says how much was cut off."""
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}… ({len(text) - MAX_TEXT:,} more characters)"


def _change(value: Any) -> str:
    """Formats a cell of the table of stages."""
    if isinstance(value, Change):
        return f"{value.first:.3f} → {value.last:.3f}"
    if isinstance(value, OnePoint):
        return f"{value.value:.3f} (one point)"
    return "–" if value is None else value if isinstance(value, str) else f"{value:.3g}"


def _breakable(name: str) -> Markup:
    """Returns a name as HTML in which a line may break after an underscore or a slash."""
    return Markup(re.sub(r"([_/])", r"\1<wbr>", str(escape(visible(name)))))


def _draw(draw: Callable[[Theme], Figure], path: Path) -> dict[str, Markup]:
    """Draws a picture in both themes. The light one is written to `path`; both are returned for the page, as SVG in base64."""
    light, dark = draw(LIGHT), draw(DARK)
    figures.save_png(light, path)
    pictures = {"light": figures.to_svg(light), "dark": figures.to_svg(dark)}
    return {theme: Markup(base64.b64encode(svg).decode()) for theme, svg in pictures.items()}


def _render(**values: Any) -> str:
    """Fills the template of the page with these values."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        # Everything that the page prints goes through here. Whatever a model wrote, it cannot hide or reorder other text.
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _percent,
        "points": _points,
        "duration": _duration,
        "shorten": _shorten,
        "change": _change,
        "breakable": _breakable,
    }
    return environment.get_template("report.html.j2").render(values)


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
    """
    # Read what the run and its store have left. Without held-out prompts there are no scores.
    for directory, what in ((run_dir, "run"), (store_dir, "store")):
        if not directory.is_dir():
            raise DataError(
                f"the {what} must be an existing directory, got {directory}; give the one that training wrote"
            )
    run = read_run(run_dir)
    run.setdefault("peak_rss_bytes", None)
    scores: dict[str, Any] = {"sources": {}, "target_before": {}, "fused": {}}
    evaluation: dict[str, Any] = {"counts": {}}
    if run["recipe"].get("data", {}).get("heldout", "") is not None:
        scores = read_measured(run_dir, run, SCORES)
        evaluation = read_measured(run_dir, run, EVALUATION)
    metrics = read_metrics(read_proven(run_dir, run, METRICS))
    summary = Store.open(store_dir, complete=False).summary

    # What the pictures show.
    sources, target, counts = summary["sources"], summary["target"], evaluation["counts"]
    skills = [skill for skill in scores["fused"] if skill != "mean"]
    models = _models(scores, counts, target)
    single = {model.name for model in models if model.role == "source"}  # all but one that is shown as the target
    min_ce, vote = summary.get("min_ce_wins") or {}, summary.get("vote_wins") or {}
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
    bits = evaluation.get("bits_per_byte") or {}
    keys = {"fused": "fused", "target": "target_before"}
    bits_of = [(m, bits.get(keys[m.role]) if m.role in keys else bits.get("sources", {}).get(m.name)) for m in models]
    handled = {reason.replace("_", " "): count for reason, count in (summary.get("handled") or {}).items()}
    if metrics.unreadable:
        handled["damaged lines of metrics.jsonl, left out"] = metrics.unreadable
    html = _render(
        title=_title(sources, target, distilled=run["recipe"].get("schedule") != "sft"),
        answer=_answer(models, skills),
        run=run,
        summary=summary,
        total_seconds=sum(run["seconds"].values()),
        demo=_demo(run["demo_data"]) if run.get("demo_data") else None,
        models=models,
        rows=rows,
        counts=counts,
        bits=[(model, values) for model, values in bits_of if values],
        wins={"min_ce": min_ce, "vote": vote},
        judges=summary.get("judges") or {},
        abstentions=summary.get("abstentions") or {},
        no_signal=summary.get("no_signal") or {"prompts": 0},
        alignment=alignment,
        heldout={key: evaluation.get(key) for key in ("ce", "kd")},
        curves=figures.curves_caption(metrics) if metrics.training or metrics.validation else None,
        stages=stage_table(metrics, run["recipe"]),
        judged=evaluation.get("votes") or [],
        later=read_evaluations(run_dir),
        examples=_examples(evaluation.get("examples") or [], [name for name in sources if name in single], target),
        handled=handled,
        recipe=yaml.safe_dump(run["recipe"], sort_keys=False, allow_unicode=True, width=100),
        picture={name: _draw(draw, run_dir / f"{name}.png") for name, draw in pictures.items()},
    )
    path = run_dir / "report.html"
    write_atomic(path, html.encode())
    return path
