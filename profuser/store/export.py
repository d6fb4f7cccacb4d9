"""Writes what others can use of a store: the responses, and the vote as preferences, as a data set with a card.

It reads the audit table and the responses of the store, so that neither models nor judges are needed. The preferences have the
columns of TRL's preference trainers (DPO and its kin): `prompt`, `chosen` and `rejected`, each a list of messages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from profuser.disk_list import DiskList
from profuser.errors import ConfigError, DataError
from profuser.recipe.schema import JUDGES
from profuser.store import layout
from profuser.store.files import write_atomic
from profuser.store.parquet import AT_A_TIME, write_rows
from profuser.store.sealed import digest_of
from profuser.store.store import Store
from profuser.text.fit import Verdict

TABLES = ("responses", "preferences")


def export(store: Store, output: Path) -> dict[str, int]:
    """Writes a folder with responses.parquet, preferences.parquet if a judge had any, and README.md.

    Returns:
        How many rows each table has.
    Raises:
        ConfigError: the folder is there and not empty, or lies in the store.
        DataError: the store is not complete, or its audit table is damaged.
    """
    import pyarrow as pa

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output must be a new or empty folder, got {output}; name another one")
    if output.resolve().is_relative_to(store.directory.resolve()):
        raise ConfigError(f"--output must be outside of the store, got {output} in {store.directory}; name another one")
    examples = audit_rows(store)
    if not store.settings.votes["asked"]:
        raise DataError(
            f"store {store.directory} must hold responses to be exported, it was made without judges, so that no source answered; "
            "nothing is written"
        )
    # The library `datasets` reads no empty file, and none is written.
    text, message = pa.string(), pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    scores = {f"score_{judge}": pa.float64() for judge in store.settings.votes["asked"]}
    texts = dict.fromkeys(("prompt", "skill", "source", "response"), text)
    found = {"finished": pa.bool_(), "left_out": text, "votes": pa.float64(), **scores}
    responses = {"example": pa.int64(), **texts, **found, "ground_truth": text}
    preferences = {"prompt": message, "chosen": message, "rejected": message, "skill": text}
    counts = {
        "responses": write_rows(output / "responses.parquet", responses_of(store, examples), pa.schema(responses)),
        "preferences": write_rows(output / "preferences.parquet", preferences_of(examples), pa.schema(preferences)),
    }
    write_atomic(output / "README.md", card(store, counts).encode())
    return counts


def audit_rows(store: Store) -> DiskList[dict[str, Any]]:
    """Reads samples.parquet, which has a row for each training prompt.

    Raises:
        DataError: it is missing, or is not what was written.
    """
    import pyarrow.parquet as pq

    if store.damaged_findings():
        raise DataError(
            f"{store.directory} must hold its findings as they were written, {', '.join(store.damaged_findings())} is damaged or "
            "missing; run `python -m profuser.prepare` with the recipe, which writes it again"
        )
    with pq.ParquetFile(store.directory / "samples.parquet") as table:
        return DiskList(row for some in table.iter_batches(AT_A_TIME) for row in some.to_pylist())


def responses_of(store: Store, examples: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields a row for each response: the prompt, who wrote it, whether it was finished, why it is left out, and its votes and scores."""
    settings = store.settings
    several = settings.sources["generation"]["responses_per_source"]
    written = {source: _written(store, source) for source in settings.sources["source_names"]}
    for number, row in enumerate(examples):
        for source, n in product(settings.sources["source_names"], range(several)):
            label = f"{source}_{n}" if several > 1 else source
            _, finished, verdict = written[source][number][n]
            if verdict == Verdict.NOT_WINNER:  # the prompt is another source's, and this one was not asked
                continue
            yield {
                "example": number,
                "prompt": row["prompt"],
                "skill": row["skill"],
                "source": source,
                "response": row[f"response_{label}"],
                "finished": finished,
                "left_out": None if verdict == Verdict.OK else Verdict(verdict).label,
                "votes": row[f"votes_{label}"],
                **{f"score_{judge}": row[f"score_{judge}_{label}"] for judge in settings.votes["asked"]},
                "ground_truth": row["ground_truth"],
            }


def _written(store: Store, source: str) -> Sequence[list[tuple[str, bool, int]]]:
    """Reads the responses of a source to every training prompt: each text, whether it was finished, and what was found in it."""
    kind = layout.responses("train", source)
    return store.by_example(kind, lambda number: store.get_json(kind, number))


def preferences_of(examples: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields a row for each prompt on which the judges preferred a response to another one."""
    for row in examples:
        chosen, rejected = row["chosen"], row["rejected"]
        if chosen is not None and rejected is not None:
            yield {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:], "skill": row["skill"]}


def card(store: Store, counts: dict[str, int]) -> str:
    """Returns the text of README.md, from which the library `datasets` also reads which file is which table."""
    settings = store.settings
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in TABLES if counts[name])
    sources = "".join(f"- {name}: `{source['model']}`\n" for name, source in settings.sources["sources"].items())
    judges = "".join(
        f"- {name}: `{next((str(judge[kind]) for kind in JUDGES if judge.get(kind) is not None), 'a server')}`\n"
        for name, judge in settings.votes["judges"].items()
        if name in settings.votes["asked"]
    )
    rule = settings.votes.get("judging.rule", "majority")
    return (
        f"---\nconfigs:\n{configs}---\n\n# Responses and preferences of {len(settings.sources['source_names'])} models\n\n"
        f"Written by [profuser](https://github.com/profuser/profuser) from a store that was begun on {settings.sources['date']}.\n\n"
        f"| table | rows | what a row is |\n|---|---:|---|\n"
        f"| `responses` | {counts['responses']:,} | a response of a source to a training prompt, with its votes and scores |\n"
        f"| `preferences` | {counts['preferences']:,} | a prompt, the response that won the vote and one with the fewest votes |\n\n"
        f"Sources:\n\n{sources}\nJudges, whose vote was counted by `{rule}`:\n\n{judges}\n"
        "The licences of the sources, and of the prompts, apply to what was made of them.\n\n"
        f"sha256 of the audit table: `{digest_of((store.directory / 'samples.parquet').read_bytes())['sha256']}`\n"
    )
