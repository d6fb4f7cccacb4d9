"""The manifest of a store, manifest.json, which proves all other files of the store and itself (sealed.py).

It holds the settings that the store was made with, into how many shards each split is divided, the shards, and the digests of
examples.safetensors, summary.json and samples.parquet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from profuser.errors import DataError
from profuser.store.layout import kind_of
from profuser.store.sealed import FILES, read_record, write_sealed
from profuser.typed import COUNT, DATE, DIGEST, NUMBER, SECONDS, SHARE, Rule

SCHEMA_VERSION = 8

SETTINGS = {
    "sources": {
        "source_names": [str],
        "sources": {str: {str: Any}},
        "target": {"name": str},
        "capture": {"top_k": COUNT, "dtype": Rule("float32 or bfloat16", lambda x: x in ("float32", "bfloat16"))},
        "data": {str: Any},
        "date": DATE,
    },
    "votes": {"asked": [str], "judges": {str: Any}},
    "targets": {"mode": str},
}
SHARD = {"sha256": DIGEST, "bytes": COUNT, "examples": COUNT, "origin": str, "index?": DIGEST}
MANIFEST = {
    "schema": COUNT,
    "settings": SETTINGS,
    "divided": {str: COUNT},
    "shards": {str: SHARD},
    "files": FILES,
    "seconds": {str: SECONDS},
    "complete": bool,
}
"""The shape of manifest.json."""

WINS = {str: {str: COUNT}}
HISTOGRAM = Rule("ten counts", lambda x: isinstance(x, list) and len(x) == 10 and all(map(COUNT.holds, x)))
ALIGNED = {"positions": COUNT, "coverage": SHARE, "mapped_mass": NUMBER, "reliability": HISTOGRAM, str: NUMBER}
SUMMARY = {
    "sources": [str],
    "target": str,
    "examples": COUNT,
    "min_ce_unit?": str,
    "min_ce_wins?": WINS,
    "vote_wins?": WINS,
    "judges?": {str: {str: SHARE}},
    "abstentions?": {str: SHARE},
    "no_signal?": (
        {
            "prompts": COUNT,
            "rule": Rule("skip or ground_truth", lambda x: x in ("skip", "ground_truth")),
            "reasons": {str: COUNT},
        },
        None,
    ),
    "agreement?": (
        {
            "pairs": [{"judges": [str], "tau": (NUMBER, None)}],
            "length": {str: (NUMBER, None)},
            "alone": {str: SHARE},
            "ties": SHARE,
            "prompts?": COUNT,
            "preferences?": {str: COUNT},
        },
        None,
    ),
    "alignment?": {str: {str: ALIGNED}},
    "handled": {str: COUNT},
    "seconds?": {str: SECONDS},
}
"""The shape of summary.json."""


def new_manifest(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the manifest of a store that begins."""
    return {
        "schema": SCHEMA_VERSION,
        "settings": settings,
        "divided": {},
        "shards": {},
        "files": {},
        "seconds": {},
        "complete": False,
    }


def read_manifest(directory: Path) -> dict[str, Any]:
    """Reads a store's manifest.

    Raises:
        DataError: the manifest is missing, is not what was written, is of another schema, or lists something that is no shard.
    """
    path = directory / "manifest.json"
    again = "prepare it again with `python -m profuser.prepare --fresh` and this recipe"
    fix = (
        "restore it, or start over with `python -m profuser.prepare --fresh` and the recipe"
        if path.exists()
        else "give the directory of a store, or move this one away and run `python -m profuser.prepare` with the recipe"
    )
    manifest = read_record(path, MANIFEST, SCHEMA_VERSION, what="store", fix=fix, again=again)
    for name in manifest["shards"]:
        try:
            kind_of(name)
        except ValueError:
            raise DataError(
                f"store {directory}: the manifest must list shards, got {name!r}; it is not to be trusted, restore it"
            ) from None
    return manifest


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Writes a store's manifest."""
    write_sealed(directory / "manifest.json", manifest)
