"""The store: the prepared targets on disk, as a manifest, safetensors shards and JSON files for texts.

A store is made in three layers:
- sources: what the sources say about the ground truth, and their own responses;
- votes: the judges' scores, and the captures of the responses that won;
- targets: all captures aligned to the target's tokens, which is what the trainer reads.
The manifest records the settings that each layer was made with. If only the alignment's settings change, the targets are
made again from the captures that are there, or from new ones where the alignment wants to know something else of the sources; if
only the judges change, they vote again on the same responses. Other sources need another store. `layout.py` says which shards there are.

Where rows are added to the data, changed or taken out, the shards to which they belong are made again (division.py), and what follows
from them (shards.py). An interrupted preparation goes on with the next shard, and a damaged shard is never trained on. Several processes
may add shards at a time; what else changes a store is for one that is alone: `Store.build`, `drop_damaged` and `finish`. Reading never
changes a store: `changes` only compares the settings, and `Store.build`, which profuser.prepare uses, is what acts on a difference.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors.numpy import save as save_tensors

from profuser.disk_list import DiskList
from profuser.errors import ConfigError, DataError
from profuser.recipe.data import SPLITS, Split
from profuser.store.division import Division, Part, places
from profuser.store.files import mapped, tensors_of, write_atomic
from profuser.store.layout import FOLDERS, Kind, kind_of, truth
from profuser.store.manifest import SUMMARY, new_manifest
from profuser.store.sealed import digest_of, is_intact
from profuser.store.settings import Changes, StoreSettings, changes_between
from profuser.store.shards import Shards
from profuser.typed import checked, parsed

T = TypeVar("T")

EXAMPLES = "examples.safetensors"
"""The file that says for every split which shard covers which example."""
FINDINGS = ("summary.json", "samples.parquet")
"""The files with what a preparation found."""
BESIDE = (EXAMPLES, *FINDINGS)
"""All files that the manifest records beside the shards."""


class Store(Shards):
    """One store directory."""

    @classmethod
    def open(cls, directory: Path, *, complete: bool = True) -> Store:
        """Opens an existing store for reading.

        Args:
            complete: whether the store must be complete; False also opens one that is still being made.

        Raises:
            DataError: there is no store, or it is broken, of another schema, or not complete although it must be.
        """
        store = cls(directory)
        if complete and not store.complete:
            raise DataError(
                f"store {directory} is not complete; run `python -m profuser.prepare` with its recipe to finish it"
            )
        return store

    @classmethod
    def finished(cls, directory: Path, settings: StoreSettings) -> Store | None:
        """Opens a store in which nothing is to be made for these settings: it is complete, and every file is what was written.

        Otherwise this returns None. It changes nothing.

        Raises:
            DataError: the directory holds something else than a store, or a broken one.
        """
        check_place(directory)
        if not (directory / "manifest.json").exists():
            return None
        store = cls(directory)
        made = store.complete and not store.changes(settings) and not store.damaged_findings(names=BESIDE)
        return store if made and not store.damaged() else None

    @classmethod
    def build(
        cls, directory: Path, settings: StoreSettings, divisions: Mapping[Split, Division], *, renews: bool = False
    ) -> Store:
        """Begins a store, or opens one to go on with it. Shards that `settings` make obsolete are dropped, and this is printed.

        The caller must hold the directory (profuser.store.lease), because this and what follows changes it.

        Args:
            divisions: how the examples of every split are divided among the shards.
            renews: whether the data may be other than the store was made of, as long as one of its training shards can stay.
        Raises:
            ConfigError: the sources' captures or responses were made with other settings, or of other data.
            DataError: the store belongs to other models or tokenizers; its manifest is broken or of another schema; the
                directory holds something else.
        """
        # Begin a store in an empty directory.
        check_place(directory)
        if not (directory / "manifest.json").exists():
            store = cls(directory, new_manifest(asdict(settings)))
            store._save()  # first of all, because it is what tells a store from anybody's folder
            store._divide(divisions)
            return store

        # Go on with the store that is there, if its sources are the same; drop what other judges or settings outdate.
        store = cls(directory)
        changes = store.checked_changes(settings, renews=renews)
        begun = any(kind_of(name)[0].split == "train" for name in store._manifest["shards"])
        if changes.data and begun and not any(store._stays(part) for part in divisions["train"].parts):
            raise ConfigError(
                f"store {directory} was made of other data ({', '.join(changes.data)} differ), of which no shard can stay; give another "
                "--store, undo the change, or start over with `python -m profuser.prepare --fresh` and this recipe"
            )
        store._tidy()
        if changes.data:
            counts = store._renew(divisions)
            are_rows = any(key.startswith("data.") for key in changes.data)
            again = (
                f"making shards again ({counts})" if are_rows else "making the shards again that hold other things now"
            )
            print(f"store: {', '.join(changes.data)} changed: {again}", flush=True)
            store._manifest["settings"]["sources"] = settings.sources  # of which nothing else differs
        store._divide(divisions)
        if changes.vote:
            same = not changes.judges and store.settings.votes["asked"] == settings.votes["asked"]
            names = ", ".join(changes.judges or settings.votes["asked"] or ["none"])
            print(f"store: {'the vote' if same else 'judges'} changed ({names}): voting again", flush=True)
        if changes.captured or (changes.targets and not changes.vote):
            keys = ", ".join(changes.targets)
            again = (
                "capturing the sources again" if changes.captured else "aligning again from the captures that are there"
            )
            print(f"store: {keys} changed: {again}", flush=True)
        if changes.vote or changes.targets:
            # A judge that is no longer asked stays in the settings, and its scores in the store: it may be asked again.
            judges = store.settings.votes["judges"] | settings.votes["judges"]
            store._manifest["settings"] = asdict(settings) | {"votes": settings.votes | {"judges": judges}}
            store._drop([name for name in store._manifest["shards"] if changes.outdates(kind_of(name)[0])])
        return store

    @property
    def settings(self) -> StoreSettings:
        """The settings that the store was made with."""
        return StoreSettings(**self._manifest["settings"])

    def changes(self, settings: StoreSettings) -> Changes:
        """Compares the store's settings with these. It changes nothing."""
        return changes_between(self.settings, settings)

    def checked_changes(self, settings: StoreSettings, *, renews: bool = False) -> Changes:
        """Compares the store's settings with these, of which the sources' layer must fit.

        Args:
            renews: whether the data may be other.
        Raises:
            ConfigError: the sources' captures or responses were made with other settings.
            DataError: the store belongs to other models or tokenizers, or the manifest is another store's.
        """
        changes = self.changes(settings)
        if (changes.foreign or changes.sources or changes.data) and (damaged := self.damaged()):
            keys = ", ".join([*changes.foreign, *changes.sources, *changes.data])
            raise DataError(
                f"{self.directory / 'manifest.json'} must describe the shards beside it, it has other settings ({keys} differ) and "
                f"{len(damaged)} of {len(self)} shards are not what it says; restore it, or start over with "
                "`python -m profuser.prepare --fresh` and this recipe"
            )
        changes.check(self.directory, renews=renews)
        return changes

    @property
    def date(self) -> datetime.date:
        """The date that chat templates got when the store was made, and get wherever it is used."""
        return datetime.date.fromisoformat(self.settings.sources["date"])

    @property
    def data(self) -> dict[str, str]:
        """A hash of the rows of every split that the store was made of (profuser.prepare.data.data_hash)."""
        data = self.settings.sources["data"]
        return {split: data[split] for split in SPLITS if split in data}

    @property
    def complete(self) -> bool:
        """Whether the preparation of the store has ended."""
        return bool(self._manifest["complete"])

    @property
    def summary(self) -> dict[str, Any]:
        """The content of summary.json, which says what the preparation found (profuser.prepare.summary).

        Raises:
            DataError: the file is missing, or is not what was written.
        """
        path, recorded = self.directory / "summary.json", self._manifest["files"].get("summary.json")
        try:
            content = path.read_bytes()
            if recorded is None or digest_of(content) != recorded:
                raise ValueError("what was written, its sha256 differs")
            return checked(parsed(content), SUMMARY)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"it must hold {error}"
            # Where most files are not what the manifest says, it is the manifest that does not belong here.
            if path.exists() and 2 * len(damaged := self.damaged()) > len(self):
                raise DataError(
                    f"{self.directory / 'manifest.json'} must describe the files beside it, summary.json and {len(damaged)} of "
                    f"{len(self)} shards are not what it says; restore it, or start over with `python -m profuser.prepare --fresh` "
                    "and the recipe"
                ) from None
            raise DataError(
                f"{path} cannot be used ({reason}); run `python -m profuser.prepare` with the recipe, which writes it again"
            ) from None

    def damaged_findings(self, *, names: Sequence[str] = FINDINGS) -> list[str]:
        """Returns which of summary.json and samples.parquet, or of other recorded files, are missing or no longer what was written."""
        return [name for name in names if not is_intact(self.directory / name, self._manifest["files"].get(name))]

    def put_finding(self, name: str, data: bytes) -> None:
        """Writes a file that is no shard, and enters it in the manifest. This is for one process alone."""
        write_atomic(self.directory / name, data)
        self._manifest["files"][name] = digest_of(data)
        self._save()

    def handled(self) -> str:
        """Returns one line that says which texts were skipped, cut or kept as text; it is empty where there were none."""
        counts = self.summary["handled"]
        return "handled: " + "; ".join(f"{n} x {name}" for name, n in counts.items()) if counts else ""

    @property
    def seconds(self) -> dict[str, float]:
        """How long each phase took when the store was completed."""
        return self._manifest["seconds"]

    def finish(self, seconds: Mapping[str, float] | None = None) -> None:
        """Marks the store as complete. This is the last thing that a preparation writes. `seconds` is by phase."""
        self._tidy()
        self._manifest |= {"complete": True, "seconds": dict(seconds or {})}
        self._save()

    def is_finished(self) -> bool:
        """Whether the store is complete with its findings, after what other processes have made of it meanwhile."""
        self._read()
        return self.complete and not self.damaged_findings()

    # -- the division of the examples ---------------------------------------------------------------------------------

    def has_all(self, kind: Kind) -> bool:
        """Whether all shards of a kind are present. It raises what `shard_of` raises."""
        return self.numbers(kind) == np.unique(self.shard_of(kind.split)).tolist()

    def shard_of(self, split: Split) -> np.ndarray:
        """Returns the number of the shard that covers each example of a split, (E,) int32.

        Raises:
            DataError: the file that says so is missing, or is not what was written.
        """
        path = self.directory / EXAMPLES
        if self.damaged_findings(names=[EXAMPLES]):
            raise DataError(
                f"{path} must be what was written, it is missing or its sha256 differs; run `python -m profuser.prepare` with the recipe, "
                "which writes it again"
            )
        return tensors_of(mapped(path))[split]

    def by_example(self, kind: Kind, read: Callable[[int], Iterable[T]]) -> DiskList[T]:
        """Returns what the shards of a kind have for each example of its split, in the order of the data.

        Args:
            read: returns what one shard has, by its number.
        Raises:
            DataError: what `shard_of` and `read` raise.
        """
        found = DiskList(item for number in self.numbers(kind) for item in read(number))
        return found.in_order(places(self.shard_of(kind.split)))

    def array_by_example(self, kind: Kind, name: str) -> np.ndarray:
        """Returns an array that the shards of a kind have with an item for each example, in the order of the data.

        Raises:
            DataError: what `shard_of` and `get` raise.
        """
        found = np.concatenate([self.get(kind, number)[name] for number in self.numbers(kind)])
        return found[places(self.shard_of(kind.split))]

    def _divide(self, divisions: Mapping[Split, Division]) -> None:
        """Writes how the examples are divided among the shards, and the manifest."""
        data = save_tensors({split: division.shard_of for split, division in divisions.items()})
        divided = {split: division.shards for split, division in divisions.items()}
        damaged = bool(self.damaged_findings(names=[EXAMPLES]))
        if damaged and EXAMPLES in self._manifest["files"]:
            print(f"store: {EXAMPLES} is damaged or missing: writing it again", flush=True)
        if damaged or self._manifest["files"][EXAMPLES] != digest_of(data):
            write_atomic(self.directory / EXAMPLES, data)
        self._manifest["files"][EXAMPLES] = digest_of(data)
        self._manifest["divided"] = divided
        self._save()

    def _renew(self, divisions: Mapping[Split, Division]) -> str:
        """Drops the shards whose rows are no longer those of the data, and returns how many of how many parts have them."""
        staying = {
            split: {part.number for part in of.parts if self._stays(part, split)} for split, of in divisions.items()
        }
        shards = [(name, *kind_of(name)) for name in self._manifest["shards"]]
        dropped = [name for name, kind, number in shards if number not in staying.get(kind.split, ())]
        self._drop(dropped)
        for name in dropped:  # rows that were taken out of the data are not kept here
            self._path(name).unlink(missing_ok=True)
        counts = {split: len(division.parts) for split, division in divisions.items()}
        return ", ".join(f"{counts[split] - len(staying[split])} of {counts[split]} of {split}" for split in divisions)

    def _stays(self, part: Part, split: Split = "train") -> bool:
        """Whether the sources have said something about just these rows."""
        names = self.settings.sources["source_names"]
        kinds = [truth(split, name) for name in names]
        return any(
            self.has(kind, part.number) and self.origin(kind, part.number).startswith(part.digest) for kind in kinds
        )


def check_place(directory: Path) -> None:
    """Raises DataError if a directory holds something else than a store. Hidden files may be there."""
    if (directory / "manifest.json").exists() or not directory.exists():
        return
    names = {path.name for path in directory.iterdir() if not path.name.startswith(".")}
    if names.intersection(FOLDERS):
        raise DataError(
            f"{directory} must have the manifest.json of its shards, which is missing; restore it, or start over with "
            "`python -m profuser.prepare --fresh` and this recipe"
        )
    if names:
        raise DataError(
            f"store must be a profuser store or an empty directory, got {directory} without manifest.json; give another --store"
        )
