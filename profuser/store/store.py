"""The store: the prepared targets on disk, as a manifest, safetensors shards and JSON files for texts.

A store is made in three layers:
- sources: what the sources say about the ground truth, and their own responses;
- votes: the judges' scores, and the captures of the responses that won;
- targets: all captures aligned to the target's tokens, which is what the trainer reads.
The manifest records the settings that each layer was made with. If only the alignment's settings change, the targets are
made again from the captures that are there, or from new ones where the alignment wants to know something else of the sources; if
only the judges change, they vote again on the same responses. Other sources need another store. `layout.py` says which shards there are.

Where rows are added to the data, changed or taken out, the shards to which they belong are made again (division.py). A shard records
its origin, which is a digest of what it was made from, so that nothing that follows from it stays when it has become another one.

Every file is written beside its place, synced and renamed, and only then recorded with its sha256: by a record of its own
(records.py), which the manifest takes over when it is next written. Both are sealed. Therefore an interrupted preparation goes on
with the next shard, and a damaged shard is never trained on. Several processes may add shards at a time; what else changes a store
is for one that is alone: `Store.build`, `drop_damaged` and `finish`. Reading never changes a store: `changes` only compares the
settings, and `Store.build`, which profuser.prepare uses, is what acts on a difference.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from mmap import mmap
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors.numpy import save as save_tensors

from profuser.errors import ConfigError, DataError
from profuser.recipe.compare import differing_keys
from profuser.recipe.data import SPLITS, Split
from profuser.store.division import Division, Part, in_order
from profuser.store.files import header_length, mapped, remove_temporary, sha256, tensors_of, write_atomic
from profuser.store.layout import FOLDERS, Kind, kind_of, truth
from profuser.store.manifest import SUMMARY, new_manifest, read_manifest, write_manifest
from profuser.store.records import FOLDER as RECORDS
from profuser.store.records import read_record, read_records, remove_records, write_record
from profuser.store.sealed import digest_of, is_intact
from profuser.typed import checked, parsed

T = TypeVar("T")

EXAMPLES = "examples.safetensors"
"""The file that says for every split which shard covers which example."""
FINDINGS = ("summary.json", "samples.parquet")
"""The files with what a preparation found."""
BESIDE = (EXAMPLES, *FINDINGS)
"""All files that the manifest records beside the shards."""


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """The settings that decide the content of each layer of a store.

    sources: the models, their templates, the data, and how responses are generated and captured.
    votes: `asked` lists the names of the judges in their order, and `judges` says what each of them is. Whatever else is there
        belongs to the rule of the vote, which may change without any judge being asked again.
    targets: how the captures are aligned. `follow_numbers` among them also says whether the captures hold followed numbers.
    """

    sources: dict[str, Any]
    votes: dict[str, Any]
    targets: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Changes:
    """How a store's settings differ from those that it is to be used with.

    foreign: the differing keys of the sources' layer that stand for a model's files or its chat template.
    data: those that stand for the rows of a split. sources: the other differing keys of the sources' layer.
    judges: the names of the judges that have become others, by their weights or their code.
    asked: whether the list of judges, their order or the rule of the vote is another one.
    captured: whether the sources have to be captured again, because what the alignment wants to know of them is another thing.
    targets: the differing keys of the targets' layer.
    """

    foreign: list[str]
    data: list[str]
    sources: list[str]
    judges: list[str]
    asked: bool
    captured: bool
    targets: list[str]

    def check(self, directory: Path, *, renews: bool = False) -> None:
        """Raises DataError or ConfigError if the sources' layer does not fit, which cannot be made again in the same store.

        Args:
            renews: whether the shards of rows that have changed may be made again.
        """
        if self.foreign:
            raise DataError(
                f"store {directory} belongs to other models, tokenizers or chat templates ({', '.join(self.foreign)} differ); "
                "restore them, give another --store, or start over with `python -m profuser.prepare --fresh` and this recipe"
            )
        if self.sources:
            raise ConfigError(
                f"store {directory} was captured with other settings ({', '.join(self.sources)} differ); give another "
                "--store, undo the change, or start over with `python -m profuser.prepare --fresh` and this recipe"
            )
        if self.data and not renews:
            raise ConfigError(
                f"store {directory} was made of other data ({', '.join(self.data)} differ); run `python -m profuser.prepare` with this "
                "recipe, which makes the shards again whose rows have changed, give another --store, or undo the change"
            )

    def __bool__(self) -> bool:
        """Whether there is any change."""
        return bool(self.foreign or self.data or self.sources or self.vote or self.targets)

    @property
    def vote(self) -> bool:
        """Whether the judges have to vote again."""
        return self.asked or bool(self.judges)

    def outdates(self, kind: Kind) -> bool:
        """Whether the shards of this kind have to be made again."""
        if kind.folder == "targets":
            return self.vote or bool(self.targets)
        if kind.folder in ("truth", "winners") and self.captured:
            return True
        return (kind.folder == "winners" and self.vote) or (kind.folder == "scores" and kind.of in self.judges)


@dataclass(slots=True)
class Total:
    """The shards of one folder and split, added up.

    examples: how many one source or judge has, so that an example is counted once. bytes: the size of all files.
    """

    folder: str
    split: str
    shards: int = 0
    examples: int = 0
    bytes: int = 0


class Store:
    """One store directory. A shard counts as present when the manifest lists it or there is a record of it."""

    def __init__(self, directory: Path, manifest: dict[str, Any] | None = None):
        self.directory = directory
        self._verified: set[str] = set()
        self._version: object = None
        self._manifest: dict[str, Any] = {"shards": {}} if manifest is None else manifest
        if manifest is None:
            self._read()

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
            print(
                f"store: {', '.join(changes.data)} changed: making shards again ({store._renew(divisions)})", flush=True
            )
            store._manifest["settings"]["sources"]["data"] = settings.sources["data"]
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
        old = self.settings
        keys = differing_keys(old.sources, settings.sources)
        foreign = [key for key in keys if key.endswith((".files", ".template"))]
        data = [key for key in keys if key in [f"data.{split}" for split in SPLITS]]
        known = old.votes["judges"]
        return Changes(
            foreign=foreign,
            data=data,
            sources=[key for key in keys if key not in foreign + data],
            judges=[name for name, judge in settings.votes["judges"].items() if known.get(name, judge) != judge],
            asked=any(key.partition(".")[0] != "judges" for key in differing_keys(old.votes, settings.votes)),
            captured=bool(old.targets.get("follow_numbers")) != bool(settings.targets.get("follow_numbers")),
            targets=differing_keys(old.targets, settings.targets),
        )

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

    def by_example(self, kind: Kind, read: Callable[[int], Iterable[T]]) -> list[T]:
        """Returns what the shards of a kind have for each example of its split, in the order of the data.

        Args:
            read: returns what one shard has, by its number.
        Raises:
            DataError: what `shard_of` and `read` raise.
        """
        return in_order(self.shard_of(kind.split), map(read, self.numbers(kind)))

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
        return any(self.has(truth(split, name), part.number, part.digest) for name in names)

    # -- shards ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """The number of shards."""
        return len(self._manifest["shards"])

    def has(self, kind: Kind, number: int, origin: str | None = None) -> bool:
        """Whether this shard is present, be it that another process has made it meanwhile. Its file is not looked at.

        Args:
            origin: what it must have been made from; None takes any.
        """
        name = kind.shard(number)

        def is_present() -> bool:
            entry = self._manifest["shards"].get(name)
            return entry is not None and origin in (None, entry["origin"])

        if is_present():
            return True
        if (entry := read_record(self.directory, name)) is not None:
            self._manifest["shards"][name] = entry
        elif self._version != _version(self.directory):  # the manifest may have taken the record over
            self._read()
        return is_present()

    def numbers(self, kind: Kind) -> list[int]:
        """Returns the numbers of the present shards of a kind, in ascending order."""
        found = (kind_of(name) for name in self._manifest["shards"])
        return sorted(number for other, number in found if other == kind)

    def digest(self, kind: Kind) -> str:
        """Returns a short hash of all shards of a kind. It changes when any of them changes."""
        shards = self._manifest["shards"]
        return sha256("".join(shards[kind.shard(n)]["sha256"] for n in self.numbers(kind)).encode())[:16]

    @property
    def digests(self) -> dict[str, str]:
        """The sha256 of every shard, by its name."""
        return {name: entry["sha256"] for name, entry in self._manifest["shards"].items()}

    def totals(self) -> list[Total]:
        """Adds up the shards, examples and bytes by folder and split."""
        totals: dict[tuple[str, str], Total] = {}
        counted: set[tuple[str, str, int]] = set()
        for name, entry in sorted(self._manifest["shards"].items()):
            kind, number = kind_of(name)
            total = totals.setdefault((kind.folder, kind.split), Total(kind.folder, kind.split))
            total.shards += 1
            total.bytes += entry["bytes"]
            # The shards of several sources hold the same examples, which are counted for the first source only.
            if (kind.folder, kind.split, number) not in counted:
                counted.add((kind.folder, kind.split, number))
                total.examples += entry["examples"]
        return list(totals.values())

    def damaged(self) -> list[str]:
        """Returns the names of the shards whose files are missing or no longer what was written."""
        return [name for name in sorted(self._manifest["shards"]) if not self._intact(name)]

    def drop_damaged(self) -> None:
        """Drops the shards whose files are missing or no longer what was written, so that they are made again, and prints them."""
        damaged = self.damaged()
        for name in damaged:
            print(f"store: {self._path(name)} is damaged or missing: building it again", flush=True)
        if damaged:
            self._drop(damaged)

    def sha256(self, kind: Kind, number: int) -> str:
        """The sha256 of a shard's file, which must be present."""
        return self._manifest["shards"][kind.shard(number)]["sha256"]

    def origin(self, kind: Kind, number: int) -> str:
        """What a shard that is present was made from."""
        return self._manifest["shards"][kind.shard(number)]["origin"]

    def put(
        self, kind: Kind, number: int, arrays: Mapping[str, np.ndarray], *, examples: int, origin: str = ""
    ) -> None:
        """Writes a shard of arrays. `examples` is the number of examples that it covers, `origin` a digest of what it is made from."""
        data = save_tensors({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        columns = {name: arrays[name] for name in kind.index}
        facts = {"index": index_digest(data, columns), "examples": examples, "origin": origin}
        self._put(kind.shard(number), data, facts)

    def put_json(self, kind: Kind, number: int, value: Any, *, examples: int, origin: str = "") -> None:
        """Writes a shard of texts as JSON. `examples` and `origin` are those of `put`."""
        data = json.dumps(value, ensure_ascii=False).encode()
        self._put(kind.shard(number), data, {"examples": examples, "origin": origin})

    def get(self, kind: Kind, number: int) -> dict[str, np.ndarray]:
        """Returns a shard's arrays, which are mapped into memory and read-only. The file's hash is checked at the first read.

        Raises:
            DataError: the file is missing, or no longer what was written.
        """
        name = kind.shard(number)
        try:
            return tensors_of(self._bytes(name))
        except (ValueError, KeyError, TypeError):
            raise differs(self._path(name)) from None

    def get_json(self, kind: Kind, number: int, shape: Any = Any) -> Any:
        """Returns a shard's texts, which must have a shape (profuser.typed). It raises what `get` raises."""
        name = kind.shard(number)
        try:
            return checked(parsed(self._bytes(name)[:]), shape)
        except ValueError:
            raise differs(self._path(name)) from None

    def index(self, kind: Kind, number: int) -> dict[str, np.ndarray]:
        """Returns the index columns of a shard, mapped into memory. Only these columns and the header are read and checked.

        Raises:
            DataError: the file is missing, or has another length, header or index than was written.
        """
        name = kind.shard(number)
        entry, path = self._manifest["shards"].get(name, {}), self._path(name)
        try:
            data = mapped(path)
        except (OSError, ValueError) as error:
            raise unreadable(path, error) from None
        try:
            columns = {column: tensors_of(data)[column] for column in kind.index}
        except (ValueError, KeyError, TypeError):
            raise differs(path) from None
        if len(data) != entry.get("bytes") or index_digest(data, columns) != entry.get("index"):
            raise differs(path)
        return columns

    def _put(self, name: str, data: bytes, facts: dict[str, Any]) -> None:
        """Writes a shard's file, then records the shard with its hash, its size and these facts."""
        write_atomic(self._path(name), data)
        self._verified.discard(name)
        entry = {"sha256": sha256(data), "bytes": len(data), **facts}
        write_record(self.directory, name, entry)
        self._manifest["shards"][name] = entry

    def _bytes(self, name: str) -> mmap:
        """Maps a shard's file into memory. Before the first use its hash is checked against the manifest's."""
        entry, path = self._manifest["shards"].get(name), self._path(name)
        try:
            data = mapped(path)
        except (OSError, ValueError) as error:
            raise unreadable(path, error) from None
        if name not in self._verified:
            if entry is None or sha256(data) != entry["sha256"]:
                raise differs(path)
            self._verified.add(name)
        return data

    def _intact(self, name: str) -> bool:
        """Whether a shard's file can be read and has the hash of the manifest."""
        try:
            intact = sha256(mapped(self._path(name))) == self._manifest["shards"][name]["sha256"]
        except (OSError, ValueError):
            return False
        if intact:
            self._verified.add(name)
        return intact

    def _drop(self, names: list[str]) -> None:
        """Takes shards out of the manifest, so that the store is no longer complete and they are made again."""
        self._enter_records()  # a record that is left would bring its shard back
        for name in names:
            del self._manifest["shards"][name]
        self._manifest["complete"] = False
        self._save()

    def _path(self, name: str) -> Path:
        """Returns the path of a shard's file. A name from a manifest that was tampered with must not lead out of the store."""
        path = self.directory / f"{name}{kind_of(name)[0].suffix}"
        if not path.resolve().is_relative_to(self.directory.resolve()):
            raise DataError(
                f"store: a shard must lie inside {self.directory}, got {name!r}; the manifest is not to be trusted"
            )
        return path

    def _read(self) -> None:
        """Reads the manifest, and before it the records of the shards that it may not list yet."""
        records, version = read_records(self.directory), _version(self.directory)
        self._manifest = read_manifest(self.directory)
        self._manifest["shards"] |= records
        self._version = version

    def _save(self) -> None:
        """Writes the manifest, in which the shards have the same order whoever has made them."""
        self._manifest["shards"] = dict(sorted(self._manifest["shards"].items()))
        write_manifest(self.directory, self._manifest)
        self._version = _version(self.directory)

    def _enter_records(self) -> None:
        """Enters all records in the manifest, and removes them."""
        if (self.directory / RECORDS).exists():
            self._save()
            remove_records(self.directory)

    def _tidy(self) -> None:
        """Removes the records, and what killed processes have left while they were writing."""
        self._enter_records()
        remove_temporary([self.directory, *(self.directory / folder for folder in FOLDERS)])


def _version(directory: Path) -> object:
    """Returns what is another thing whenever the manifest has been written again; None where there is none."""
    try:
        found = (directory / "manifest.json").stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def differing_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns the names of the settings in which two StoreSettings differ, in the words of the recipe. Both come as dicts."""
    targets = differing_keys(old["targets"], new["targets"])
    return [
        *differing_keys(old["sources"], new["sources"]),
        *(key.replace("asked", "judges") for key in differing_keys(old["votes"], new["votes"])),
        *(key if "." in key else f"align.{key}" for key in targets),
    ]


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


def index_digest(data: bytes | mmap, columns: Mapping[str, np.ndarray]) -> str:
    """Returns the sha256 of a safetensors file's header and its index columns together."""
    return sha256(b"".join([data[: header_length(data)], *(columns[name].tobytes() for name in sorted(columns))]))


def differs(path: Path) -> DataError:
    """The error for a shard whose content is not what was written."""
    return DataError(
        f"store shard {path} must have the sha256 of the manifest, its content differs; run "
        "`python -m profuser.prepare` with the recipe to build it again"
    )


def unreadable(path: Path, error: Exception) -> DataError:
    """The error for a shard whose file cannot be opened."""
    reason = getattr(error, "strerror", None) or error
    return DataError(
        f"store shard {path} cannot be read ({reason}); run `python -m profuser.prepare` with the recipe again"
    )
