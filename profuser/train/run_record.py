"""The record of a run, run.json, and the files that it proves: the fused model, its scores, and the metrics of the training.

The record is sealed (profuser.store.sealed). Its entry `files` has the digests of the files of a complete run. The model may be
edited on purpose, so that whoever uses one that differs says so and goes on. Of what was measured there is no second truth: the
report is not drawn from files that are not what was written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from profuser.errors import ConfigError, DataError, in_short
from profuser.recipe.compare import differing_keys
from profuser.recipe.schedule import NAMED
from profuser.store.files import write_atomic
from profuser.store.sealed import (
    FILES,
    FileDigest,
    damaged_files,
    digest_of,
    digest_of_file,
    is_intact,
    read_record,
    write_sealed,
)
from profuser.typed import COUNT, NUMBER, SECONDS, SHARE, Rule, checked, parsed

SCHEMA_VERSION = 3
METRICS, SCORES, EVALUATION = "metrics.jsonl", "scores.json", "evaluation.json"
MEASURED = (METRICS, SCORES, EVALUATION)
"""The files of a complete run that hold what was measured. All other recorded files are the model's."""
EVALUATIONS = "evaluations"
"""The folder of what was measured later, on other files or with other models. No record covers it."""

STAGE = {"inference_weight?": NUMBER, "training_weight?": NUMBER, "beta?": (NUMBER, None)}
PATH = (str, [str])
LOCATION = (*PATH, {"path": PATH, "config?": (str, None), "split?": (str, None)})
RECIPE = {
    "schedule": (Rule("a schedule", lambda x: isinstance(x, str) and x in NAMED), [STAGE]),
    "data?": {"train?": LOCATION, "heldout?": (*LOCATION, None), "heldout_share?": SHARE},
    "target?": str,
    "evaluation?": {"match?": (str, None)},
    "align?": {"mode?": str},
    "optim?": {"beta?": (NUMBER, None), "export?": str},
}
"""The shape of what the report reads of a recipe. Whoever runs the recipe checks all of it."""
RUN = {
    "schema": COUNT,
    "status": Rule("running or complete", lambda x: x in ("running", "complete")),
    "recipe": RECIPE,
    "store": str,
    "seconds": {str: SECONDS},
    "prepared?": bool,
    "precision": Rule("fp32 or bf16", lambda x: x in ("fp32", "bf16")),
    "files?": FILES,
    "data?": {str: str},
    "exported_step?": COUNT,
    "versions": {str: str},
    "hardware": str,
    "commit": (str, None),
    "uploaded?": str,
    "peak_rss_bytes?": COUNT,
    "peak_owned_bytes?": COUNT,
    "peak_device_bytes?": COUNT,
    "demo_data?": ({"terse?": SHARE, "wrong?": SHARE, "rows?": {str: COUNT}}, None),
}
"""The shape of run.json."""

PEAKS = {
    "peak_device_bytes": "of the GPU",
    "peak_owned_bytes": "without mapped files",
    "peak_rss_bytes": "with mapped files",
}
"""The measures of a run's memory, the one that counts first, in the words that stand beside it."""

BY_SKILL = {str: SHARE}
BITS = {str: (NUMBER, None)}
RESPONSE = {"text": str, "eligible": bool, "left_out?": str, "votes": NUMBER, "wins_vote": bool}
JUDGED = {
    "skill": str,
    "prompt": str,
    "ground_truth": str,
    "fused": str,
    "sources": [{"name": str, "ce": (NUMBER, None), "wins_min_ce": bool, "responses": [RESPONSE]}],
}
EXAMPLE = {
    "skill": str,
    "prompt": str,
    "ground_truth": str,
    "responses": {"target_before": str, "fused": str, str: str},
    "correct": {str: (bool, None)},
}
BEFORE_AND_AFTER = ({"target_before": float, "fused": float}, None)
SHAPES: dict[str, Any] = {
    SCORES: {"sources": {str: BY_SKILL}, "target_before": BY_SKILL, "fused": BY_SKILL},
    EVALUATION: {
        "data?": str,
        "counts": {str: COUNT},
        "bits_per_byte?": {"sources": {str: BITS}, "target_before": BITS, "fused": BITS},
        "ce?": BEFORE_AND_AFTER,
        "kd?": BEFORE_AND_AFTER,
        "examples?": [EXAMPLE],
        "votes?": [JUDGED],
    },
}
"""The shapes of scores.json and evaluation.json."""


def peak_of(record: Mapping[str, Any]) -> tuple[int, str] | None:
    """Returns the most memory that a run's main process took, in bytes, and which memory it is; None where that is not recorded."""
    return next(((record[key], words) for key, words in PEAKS.items() if key in record), None)


def read_run(directory: Path) -> dict[str, Any]:
    """Reads the run.json of a run directory.

    Raises:
        DataError: the file is missing, is not what was written, or is of another schema.
    """
    path = directory / "run.json"
    again = "start over with `python -m profuser.train --fresh` and its recipe"
    if path.exists():
        fix = f"restore it, or {again}"
    elif (directory / "config.json").exists() and not (directory / METRICS).exists():
        fix = "this is a model and no run; `python -m profuser.evaluate --tasks TASK --models MODEL` scores a model by itself"
    else:
        fix = "give the directory of a run, or move this one away and run `python -m profuser.train` with its recipe"
    return read_record(path, RUN, SCHEMA_VERSION, what="run", fix=fix, again=again)


def read_finished(directory: Path) -> dict[str, Any]:
    """Reads the run.json of a finished run. It raises what `read_run` raises, and DataError where the run is not complete."""
    record = read_run(directory)
    if record["status"] != "complete":
        raise DataError(
            f"RUN_DIR must hold a finished run, {directory} is not complete; run `python -m profuser.train` with its recipe again"
        )
    return record


def check_data(directory: Path, record: Mapping[str, Any], data: Mapping[str, str]) -> None:
    """Raises ConfigError where a complete run has learnt from other rows than those of which these are the hashes, by split."""
    if "data" in record and (keys := differing_keys(record["data"], data, "data.")):
        raise ConfigError(
            f"{directory} holds a run of other data ({', '.join(keys)} differ); give another --output, restore the data, or start "
            "over with `python -m profuser.train --fresh` and its recipe"
        )


def write_run(directory: Path, record: dict[str, Any]) -> None:
    """Writes the run.json of a run directory."""
    write_sealed(directory / "run.json", {"schema": SCHEMA_VERSION} | record)


def record_files(directory: Path, *names: str) -> None:
    """Enters the digests of files in a run's record, as they are now."""
    record = read_run(directory)
    files = record.get("files", {}) | {name: digest_of_file(directory / name) for name in names}
    write_run(directory, record | {"files": files})


def model_files(record: dict[str, Any]) -> dict[str, FileDigest]:
    """Returns the digests of the fused model's files."""
    return {name: digest for name, digest in record.get("files", {}).items() if name not in MEASURED}


def check_own(directory: Path, record: dict[str, Any]) -> None:
    """Raises DataError where neither the metrics nor any weights are what the record says: it is another run's."""
    telling = {n: digest for n, digest in record.get("files", {}).items() if n == METRICS or n.endswith(".safetensors")}
    if len(telling) > 1 and len(damaged_files(directory, telling)) == len(telling):
        raise DataError(
            f"{directory / 'run.json'} must describe the files beside it, neither the weights nor the metrics are what it says; "
            "restore it, or start over with `python -m profuser.train --fresh` and the recipe"
        )


def read_proven(directory: Path, record: dict[str, Any], name: str) -> bytes:
    """Reads one of the files with what was measured.

    Raises:
        DataError: the run is not complete, or the file is missing or not what was written.
    """
    path, recorded = directory / name, record.get("files", {}).get(name)
    if recorded is None:
        raise DataError(f"{path} is not there yet; let the run finish: run `python -m profuser.train` with its recipe")
    try:
        if digest_of(content := path.read_bytes()) == recorded:
            return content
        reason = "its sha256 differs"
    except OSError as error:
        reason = str(error.strerror)
    check_own(directory, record)
    fix = (
        f"run `python -m profuser.evaluate {directory}`, which scores again"
        if name in (SCORES, EVALUATION)
        else "run `python -m profuser.train` with its recipe, which restores it as far as its checkpoints hold it"
    )
    raise DataError(f"{path} must be what was written ({reason}); {fix}")


def read_measured(directory: Path, record: dict[str, Any], name: str) -> dict[str, Any]:
    """Reads scores.json or evaluation.json. It raises what `read_proven` raises, and DataError where the shape is another."""
    try:
        content = checked(parsed(read_proven(directory, record, name)), SHAPES[name])
        if name == SCORES and (odd := _uneven(content)):
            raise ValueError(odd)
    except ValueError as error:
        raise DataError(
            f"{directory / name} must hold {error}; run `python -m profuser.evaluate {directory}`, which scores again"
        ) from None
    return content


def _uneven(scores: dict[str, Any]) -> str:
    """Returns which model of scores.json is not scored on the skills of the fused one; it is empty if there is none."""
    skills = set(scores["fused"])
    for name, values in {**scores["sources"], "target_before": scores["target_before"]}.items():
        if set(values) != skills:
            return f"a score of every model for each of {in_short(sorted(skills))}, {in_short(name)} has {in_short(sorted(values))}"
    return ""


def restore_metrics(directory: Path, record: dict[str, Any]) -> None:
    """Puts metrics.jsonl back from a checkpoint if it is not what was written, and prints that it does.

    Where no checkpoint holds it, the file is recorded as it is: its lines are sealed, and the report leaves out the others.
    """
    path, recorded = directory / METRICS, record.get("files", {}).get(METRICS)
    if recorded is None or is_intact(path, recorded):
        return
    for kept in sorted(directory.glob(f"checkpoints/step-*/{METRICS}"), reverse=True):
        if is_intact(kept, recorded):
            write_atomic(path, kept.read_bytes())
            print(f"{path} was damaged or missing: restored from {kept.parent}", flush=True)
            return
    if not path.exists():
        write_atomic(path, b"")
    print(f"{path} is damaged, and no checkpoint holds it: the report shows the lines that are intact", flush=True)
    record_files(directory, METRICS)
