"""The prepared targets on disk: a manifest, safetensors shards in CSR form, and JSON for texts.

A store has two layers. `capture/` holds what the sources said (their own tokens, top-k entries, log-sum-exp), with
their responses and the judges' scores; `targets/` holds what the trainer reads. Each layer carries the settings it was
made with: another alignment rebuilds `targets/` from `capture/` without a pass of the sources; other judges vote again
on the same answers; another capture needs another store. Every file is written to a temporary sibling, synced and renamed,
then entered in the manifest with its sha256, so an interrupted preparation goes on with the next shard and a damaged shard
is never trained on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from profuser.config import differing_keys
from profuser.errors import ConfigError, DataError

SCHEMA_VERSION = 3
MANIFEST_KEYS = ("schema", "settings", "shards", "complete")


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is either the old one or the whole new one, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path, *keys: str) -> Any:
    """A JSON file, an object with these keys if there are any; DataError when it is missing, broken or something else."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path} is missing; prepare it again or fix the path") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} must hold JSON, got {error}; restore it or start over with --fresh") from None
    if absent := [key for key in keys if not isinstance(value, dict) or value.get(key) is None]:
        raise DataError(
            f"{path} must hold {', '.join(keys)}, without {', '.join(absent)}; restore it or start over with --fresh"
        )
    return value


def set_aside(path: Path) -> Path | None:
    """Rename an old directory out of the way, for --fresh; nothing is deleted."""
    if not path.exists():
        return None
    aside = path.with_name(f"{path.name}.{datetime.now():%Y%m%d-%H%M%S}")
    for n in range(1, 1000):
        if not aside.exists():
            break
        aside = path.with_name(f"{path.name}.{datetime.now():%Y%m%d-%H%M%S}-{n}")
    path.rename(aside)
    return aside


class Store:
    """One store directory. `open` checks that it was made with these settings.

    Shard names look like `capture/train-gt-scholar-00000`; a shard is present once the manifest lists it.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]):
        self.directory = directory
        self.manifest = manifest

    @classmethod
    def open(cls, directory: Path, settings: dict[str, dict[str, Any]]) -> Store:
        """Open or create.

        Args:
            settings: for each layer what decides its content.

        Raises:
            ConfigError: the store's captures were made with other settings.
            DataError: they were made with other models or tokenizers; the manifest is broken or of another schema.
        """
        path = directory / "manifest.json"
        if not path.exists():
            if directory.exists() and any(p for p in directory.iterdir() if not p.name.startswith(".")):
                raise DataError(
                    f"store must be a profuser store or an empty directory, got {directory} without manifest.json; "
                    "give another --store"
                )
            store = cls(directory, {"schema": SCHEMA_VERSION, "settings": settings, "shards": {}, "complete": False})
            store._save()
            return store
        manifest = read_json(path, *MANIFEST_KEYS)
        if manifest["schema"] != SCHEMA_VERSION:
            raise DataError(
                f"store {directory} has schema {manifest['schema']}, this version reads {SCHEMA_VERSION}; "
                "prepare it again with `python -m profuser.prepare --fresh` and this recipe"
            )
        store = cls(directory, manifest)
        keys = differing_keys(manifest["settings"]["capture"], settings["capture"])
        if foreign := [key for key in keys if key.endswith((".files", ".template"))]:
            raise DataError(
                f"store {directory} belongs to other models, tokenizers or chat templates ({', '.join(foreign)} differ); restore "
                "them, give another --store, or start over with `python -m profuser.prepare --fresh` and this recipe"
            )
        if keys:
            raise ConfigError(
                f"store {directory} was captured with other settings ({', '.join(keys)} differ); give another "
                "--store, undo the change, or start over with `python -m profuser.prepare --fresh` and this recipe"
            )
        store._vote_again(settings["votes"])
        if keys := differing_keys(manifest["settings"]["targets"], settings["targets"]):
            print(f"store: {', '.join(keys)} changed: aligning again from the captures that are there", flush=True)
            manifest["settings"]["targets"] = settings["targets"]
            store._drop("targets/")
        return store

    def _vote_again(self, votes: dict[str, Any]) -> None:
        """Other judges than before: what depends on the vote is made again, what the sources answered stays.

        The scores of a judge that is no longer asked stay, too; he may come back.
        """
        old = self.manifest["settings"]["votes"]
        changed = [name for name, judge in votes["judges"].items() if old["judges"].get(name, judge) != judge]
        if not changed and old["asked"] == votes["asked"]:
            return
        print(f"store: judges changed ({', '.join(changed or votes['asked'] or ['none'])}): voting again", flush=True)
        votes = votes | {"judges": old["judges"] | votes["judges"]}
        self.manifest["settings"]["votes"] = votes
        self._drop("targets/", "capture/train-infer-", *(f"capture/train-scores-{name}-" for name in changed))

    def _drop(self, *prefixes: str) -> None:
        """Take shards out of the manifest; they are made again."""
        for name in [n for n in self.manifest["shards"] if n.startswith(prefixes)]:
            del self.manifest["shards"][name]
        self.manifest["complete"] = False
        self._save()

    @classmethod
    def load(cls, directory: Path) -> Store:
        """An existing, complete store, whatever its settings."""
        store = cls(directory, read_json(directory / "manifest.json", *MANIFEST_KEYS))
        if not store.complete:
            raise DataError(
                f"store {directory} is not complete; run `python -m profuser.prepare` with its recipe to finish it"
            )
        return store

    @property
    def complete(self) -> bool:
        return bool(self.manifest["complete"])

    def finish(self) -> None:
        """Mark complete; the last write of a preparation."""
        self.manifest["complete"] = True
        self._save()

    def names(self, prefix: str) -> list[str]:
        return sorted(n for n in self.manifest["shards"] if n.startswith(prefix))

    def shards(self, kind: str) -> list[str]:
        """The shards `kind-00000`, `kind-00001`, …; a name that merely begins like `kind` is not meant."""
        return sorted(n for n in self.manifest["shards"] if re.fullmatch(re.escape(kind) + r"-\d{5}", n))

    def digest(self, kind: str) -> str:
        """Changes when any shard of a kind does."""
        return _sha256("".join(self.manifest["shards"][n]["sha256"] for n in self.shards(kind)).encode())[:16]

    def valid(self, name: str) -> bool:
        """Whether a shard is present and its bytes are those that were written; a damaged one is dropped and announced."""
        entry = self.manifest["shards"].get(name)
        if entry is None:
            return False
        path = self._path(name)
        if path.exists() and _sha256(path.read_bytes()) == entry["sha256"]:
            return True
        print(f"store: {path} is damaged or missing: building it again", flush=True)
        del self.manifest["shards"][name]
        self.manifest["complete"] = False
        self._save()
        return False

    def put(self, name: str, tensors: dict[str, np.ndarray], **counts: int) -> None:
        data = save_tensors({k: np.ascontiguousarray(v) for k, v in tensors.items()})
        write_atomic(self._path(name), data)
        self.manifest["shards"][name] = {"sha256": _sha256(data), **counts}
        self._save()

    def get(self, name: str) -> dict[str, np.ndarray]:
        """A shard's arrays, checked against the manifest.

        Raises:
            DataError: missing, truncated or changed since it was written.
        """
        entry, path = self.manifest["shards"].get(name), self._path(name)
        try:
            data = path.read_bytes()
            if entry is None or _sha256(data) != entry["sha256"]:
                raise DataError(
                    f"store shard {path} must have the sha256 of the manifest, its content differs; run "
                    "`python -m profuser.prepare` with the recipe to build it again"
                )
            return load_tensors(data)
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"store shard {path} cannot be read ({error}); run `python -m profuser.prepare` again"
            ) from None

    def put_json(self, name: str, value: Any, **counts: int) -> None:
        data = json.dumps(value, ensure_ascii=False).encode()
        write_atomic(self._path(name, ".json"), data)
        self.manifest["shards"][name] = {"sha256": _sha256(data), "json": True, **counts}
        self._save()

    def get_json(self, name: str) -> Any:
        path = self._path(name)
        if (
            name not in self.manifest["shards"]
            or not path.exists()
            or _sha256(path.read_bytes()) != self.manifest["shards"][name]["sha256"]
        ):
            raise DataError(
                f"store file {path} is missing or changed; run `python -m profuser.prepare` with the recipe again"
            )
        return json.loads(path.read_bytes())

    def _path(self, name: str, suffix: str | None = None) -> Path:
        if suffix is None:
            suffix = ".json" if self.manifest["shards"].get(name, {}).get("json") else ".safetensors"
        path = self.directory / f"{name}{suffix}"
        if not path.resolve().is_relative_to(self.directory.resolve()):
            raise DataError(
                f"store: a shard must lie inside {self.directory}, got {name!r}; the manifest is not to be trusted"
            )
        return path

    def _save(self) -> None:
        write_json(self.directory / "manifest.json", self.manifest)


def ragged(parts: Sequence[np.ndarray], dtype) -> tuple[np.ndarray, np.ndarray]:
    """(offsets int64 [n + 1], the parts end to end) of arrays that agree in all but the first axis."""
    offsets = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum([len(p) for p in parts], out=offsets[1:])
    return offsets, (np.concatenate(parts) if len(parts) else np.zeros(0)).astype(dtype)


def id_dtype(vocabulary: int):
    return np.uint16 if vocabulary <= 1 << 16 else np.int32


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
