"""Writes a page that sets finished runs side by side: recipes, scores, losses and KL, times, memory, hardware and commit.

It is made from run.json, metrics.jsonl, scores.json and evaluation.json of the run directories alone, without their stores. Scores
stand beside each other only if they were measured on the same held-out prompts and by the same rule.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from profuser.errors import ConfigError, DataError
from profuser.recipe.compare import decides, differing_values
from profuser.recipe.data import DataLocation
from profuser.report import figures
from profuser.report.figures import Model
from profuser.report.intervals import Score, difference
from profuser.report.metrics import Metrics, compared_stages, count_stages, read_metrics
from profuser.report.rendering import duration, embedded, render
from profuser.report.scores import answer_of, models_of, read_scores
from profuser.report.theme import DARK, LIGHT
from profuser.store.files import write_atomic
from profuser.train.run_record import METRICS, peak_of, read_finished, read_proven

DEFAULT_NAME = "report-comparison.html"

LOSSES_DEPEND_ON = ("sources", "target", "data", "capture", "align", "judges", "judging", "generation")
"""Groups of a recipe that say what the losses are measured on, and how far apart the models are."""

STEPS = "optim.steps"


@dataclass(frozen=True, slots=True)
class ComparedRun:
    """A finished run.

    name: what the page calls it. models: the fused model first; empty where nothing was scored.
    """

    name: str
    directory: Path
    record: dict[str, Any]
    metrics: Metrics
    models: list[Model]
    evaluation: Mapping[str, Any]

    @property
    def scores(self) -> Mapping[str, Score]:
        """The scores of the fused model."""
        return self.models[0].scores

    @property
    def single(self) -> dict[str, Any] | None:
        """How the fused model compares with the best single one; None where that is not known."""
        return answer_of(self.models, [])

    @property
    def before(self) -> Score | None:
        """The mean of the target before; None where that is not known."""
        return next((model.scores.get("mean") for model in self.models if model.role == "target"), None)

    @property
    def steps(self) -> int | None:
        """How many optimizer steps were taken; None where none was logged."""
        return self.metrics.training[-1]["step"] if self.metrics.training else None

    @property
    def scored_on(self) -> str:
        """What two runs must have in common for their scores to be compared: the held-out prompts, and the rule of the match.

        A run that was scored before the digest of the prompts was recorded is known by the place of its prompts, by how many there
        are, and by those that its report shows.
        """
        recipe, known = self.record["recipe"], self.evaluation.get("data")
        if known is None:
            shown = self.evaluation.get("examples") or []
            data = {key: value for key, value in recipe.get("data", {}).items() if key in PLACE}
            asked = [[example[key] for key in ("skill", "prompt", "ground_truth")] for example in shown]
            known = [data, self.evaluation["counts"], asked]
        return json.dumps([known, recipe.get("evaluation", {}).get("match")], sort_keys=True)


PLACE = ("heldout", "prompt_column", "response_column", "skill_column")


@dataclass(frozen=True, slots=True)
class Group:
    """Runs whose scores may be compared.

    heldout: where their prompts are. rows: the skills, and "mean" if there are several. certain: whether the digests say that the
    prompts are the same. lead: the best run, the next one and the difference of their means; None where there is nothing to compare.
    """

    heldout: str
    match: str | None
    runs: list[ComparedRun]
    rows: list[str]
    counts: Mapping[str, int]
    certain: bool
    lead: tuple[ComparedRun, ComparedRun, Score] | None


def compare_runs(directories: Sequence[Path], output: Path | None = None) -> Path:
    """Writes the comparison of several runs.

    Args:
        output: the page; None writes report-comparison.html beside the first run's directory.
    Returns:
        The path of the page.
    Raises:
        ConfigError: a run is given twice, or the page cannot be where it shall be.
        DataError: a run is not complete, is damaged or is of another schema.
    """
    output = directories[0].resolve().parent / DEFAULT_NAME if output is None else output
    _check_given(directories, output)
    runs = [_read(directory, name) for directory, name in zip(directories, _names(directories))]

    recipes = [{k: v for k, v in run.record["recipe"].items() if k not in ("output", "store")} for run in runs]
    differing = differing_values([_by_name(recipe) for recipe in recipes])
    if STEPS in differing:  # null lets the number of examples decide
        taken = [f"null ({run.steps:,} taken)" if run.steps else None for run in runs]
        differing[STEPS] = [own if value is None else value for value, own in zip(differing[STEPS], taken)]
    groups = _groups(runs)
    html = render(
        "comparison.html.j2",
        runs=runs,
        differing=[(key, decides(key), values) for key, values in differing.items()],
        groups=groups,
        unscored=[run for run in runs if not run.models],
        own_losses=sorted({key.split(".")[0] for key in differing} & set(LOSSES_DEPEND_ON)),
        damaged={run.name: run.metrics.unreadable for run in runs if run.metrics.unreadable},
        caption=figures.compared_caption([run.metrics for run in runs]),
        stage_counts={run.name: count for run in runs if (count := count_stages(run.metrics))},
        stages=compared_stages([(run.metrics, run.record["recipe"]) for run in runs]),
        facts=_facts(runs),
        picture={"curves": _curves(runs)},
    )
    write_atomic(output, html.encode())
    return output


def _check_given(directories: Sequence[Path], output: Path) -> None:
    """Raises an error if a directory is missing or given twice, or the page cannot be written as `output`."""
    seen: dict[Path, Path] = {}
    for directory in directories:
        if not directory.is_dir():
            raise DataError(f"RUN_DIR must be an existing directory, got {directory}; give the one that training wrote")
        if (first := seen.setdefault(directory.resolve(), directory)) is not directory:
            also = "" if first == directory else f", which is {first}"
            raise ConfigError(f"every RUN_DIR must be another run, got {directory} twice{also}; leave one out")
    if output.suffix.lower() not in (".html", ".htm") or output.is_dir():
        raise ConfigError(f"--output must be an .html file, got {output}; give another name")


def _names(directories: Sequence[Path]) -> list[str]:
    """Returns the names of directories, with as many of the folders that they are in as it takes to tell them apart."""
    parts = [directory.resolve().parts for directory in directories]
    names: list[str] = []
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(of_one[-count:]) for of_one in parts]
        if len(set(names)) == len(names):
            break
    return names


def _read(directory: Path, name: str) -> ComparedRun:
    """Reads a finished run. It raises DataError where the run is not complete, is damaged or is of another schema."""
    record = read_finished(directory)
    metrics = read_metrics(read_proven(directory, record, METRICS))
    scores, evaluation = read_scores(directory, record)
    target = record["recipe"].get("target", "target")
    models = models_of(scores, evaluation["counts"], target) if scores["fused"] else []
    return ComparedRun(name, directory, record, metrics, models, evaluation)


def _by_name(value: Any) -> Any:
    """Returns a recipe in which every list of entries with names is a mapping by these names."""
    if isinstance(value, dict):
        return {key: _by_name(item) for key, item in value.items()}
    if isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value):
        return {str(item["name"]): item for item in value}
    return value


def _groups(runs: Sequence[ComparedRun]) -> list[Group]:
    """Puts the runs that were scored into groups, within which their scores compare."""
    by_key: dict[str, list[ComparedRun]] = {}
    for run in runs:
        if run.models:
            by_key.setdefault(run.scored_on, []).append(run)
    return [_group(members) for members in by_key.values()]


def _group(runs: list[ComparedRun]) -> Group:
    recipe, counts = runs[0].record["recipe"], runs[0].evaluation["counts"]
    skills = [skill for skill in dict.fromkeys(skill for run in runs for skill in run.scores) if skill != "mean"]
    means = {run.name: run.scores["mean"].value for run in runs if "mean" in run.scores}
    ranked = sorted((run for run in runs if means.get(run.name, math.nan) >= 0), key=lambda run: -means[run.name])
    lead = None
    if len(ranked) > 1:
        best, second, *_ = ranked
        lead = best, second, difference(best.scores["mean"], second.scores["mean"])
    return Group(
        heldout=_heldout(recipe.get("data", {})),
        match=recipe.get("evaluation", {}).get("match"),
        runs=runs,
        rows=[*skills, "mean"] if len(skills) > 1 else skills,
        counts=counts,
        certain=all("data" in run.evaluation for run in runs),
        lead=lead,
    )


def _heldout(data: Mapping[str, Any]) -> str:
    """Says where held-out prompts are, by the group `data` of a recipe."""

    def place(location: str | list[str] | dict[str, Any]) -> str:
        known: dict[str, Any] = location if isinstance(location, dict) else {"path": location}
        return str(DataLocation(path=known["path"], config=known.get("config"), split=known.get("split")))

    if (own := data.get("heldout", "")) is not None:
        return place(own)
    return f"{100 * data['heldout_share']:g} % of {place(data['train'])}"


def _curves(runs: Sequence[ComparedRun]) -> dict[str, Markup]:
    """Draws the losses and KL of all runs, in both themes."""
    metrics = {run.name: run.metrics for run in runs}
    light, dark = (figures.draw_compared_curves(metrics, theme) for theme in (LIGHT, DARK))
    return embedded(light, dark)


def _facts(runs: Sequence[ComparedRun]) -> dict[str, list[str | None]]:
    """Returns what every run took and ran on, a row for each fact. Of the versions only those are shown that differ."""
    records = [run.record for run in runs]
    facts: dict[str, list[str | None]] = {
        "optimizer steps": [None if run.steps is None else f"{run.steps:,}" for run in runs],
        "time": [duration(sum(record["seconds"].values())) for record in records],
    }
    for phase in dict.fromkeys(phase for record in records for phase in record["seconds"]):
        seconds = [record["seconds"].get(phase) for record in records]
        facts[f"time to {phase}"] = [None if s is None else duration(s) for s in seconds]
    if any(record.get("prepared") is False for record in records):
        made = {True: "made in the run", False: "was there already", None: None}
        facts["its store"] = [made[record.get("prepared")] for record in records]
    peaks = map(peak_of, records)
    facts["peak memory"] = [peak and f"{peak[0] / 2**30:.2f} GiB {peak[1]}" for peak in peaks]
    for key in ("precision", "hardware", "commit"):
        facts[key] = [record[key] for record in records]
    for package, versions in differing_values([record["versions"] for record in records]).items():
        facts[package] = versions
    facts |= {"run": [str(run.directory) for run in runs], "store": [record["store"] for record in records]}
    return facts
