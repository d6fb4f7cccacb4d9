"""Hashes a model's files, so that a store notices when a model has become another one."""

from __future__ import annotations

import hashlib
from pathlib import Path

from profuser.recipe.places import resolve

SAMPLE = 1 << 20
"""Bytes that are read at each place of a file."""

BESIDE_SUFFIXES = {".md", ".html", ".png"}
BESIDE = {"run.json", "metrics.jsonl", "scores.json", "evaluation.json"}
"""Files that lie beside a model and are no part of it, such as a run's record, which changes when the run is scored again."""


def fingerprint(location: str) -> str:
    """Returns a short hash of the names, sizes and contents of a model's files. Large files are sampled, not read as a whole.

    `location` is a path, `demo:NAME` or a Hub id. A Hub id is returned as it is: the recipe's `revision` tells its versions
    apart.
    """
    path = Path(resolve(location))
    digest = hashlib.sha256()
    if not path.exists():
        return location
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file() and not _is_beside(p))
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with open(file, "rb") as data:
            # A file of up to 64 MiB is read as a whole; of a larger one, 64 samples of 1 MiB each.
            for start in range(0, size, max(SAMPLE, size // 64)):
                data.seek(start)
                digest.update(data.read(SAMPLE))
    return digest.hexdigest()[:16]


def _is_beside(file: Path) -> bool:
    """Whether a file lies beside a model and is no part of it."""
    return file.suffix in BESIDE_SUFFIXES or file.name in BESIDE
