"""A short hash of a model's files, so that a store notices when its model is another one."""

from __future__ import annotations

import hashlib
from pathlib import Path

from profuser.recipe.places import resolve

SAMPLE = 1 << 20


def fingerprint(location: str) -> str:
    """Short hash of a model's files: names, sizes, contents (samples of them where a file is large); a Hub id is its own."""
    path = Path(resolve(location))
    digest = hashlib.sha256()
    if not path.exists():
        return location
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file() and p.suffix != ".md")
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with open(file, "rb") as data:
            for start in range(0, size, max(SAMPLE, size // 64)):  # all of a small file, 64 samples of a large one
                data.seek(start)
                digest.update(data.read(SAMPLE))
    return digest.hexdigest()[:16]
