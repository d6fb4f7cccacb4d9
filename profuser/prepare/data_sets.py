"""Reads the table of a split: a file, or one split of a folder or of a data set on the Hub.

The library `datasets` only finds the files of a split, and fetches them or opens them where they are; the readers of tables.py read
them. A folder or a data set is then read exactly like the files in it. The library's own streaming would give every column one type.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from profuser.errors import DataError, first_line
from profuser.prepare import hub_files
from profuser.prepare.hub_files import ON_HUB
from profuser.prepare.tables import READERS, Table, is_read_in_parts, read_file
from profuser.recipe.data import DataLocation, Split
from profuser.recipe.places import data_files, file_suffix, resolve
from profuser.recipe.utf8 import decode

USUAL_NAMES: dict[Split, str] = {"train": "train", "validation": "validation", "heldout": "test"}
"""What data sets call our splits."""

NOT_ABOUT_READING = {
    "name", "version", "data_dir", "data_files", "description", "features", "delimiter", "chunksize", "batch_size",
}  # fmt: skip
"""Settings of a data set's files that change none of its values, with `features`: declared types change no value here."""


NO_EXAMPLES = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""Files that the library `datasets` writes beside the data."""


def read_tables(
    location: DataLocation,
    split: Split,
    *,
    streams: bool = False,
    alone: bool = False,
    say: Callable[[str], None] = print,
    option: str | None = None,
) -> list[tuple[str, Table]]:
    """Finds the files of a location that the recipe names for a split, and returns what messages call each with its rows.

    The rows are read as they are asked for, and this raises DataError where a file is broken.

    Args:
        streams: whether files on the Hub are read there, as far as rows are asked for, unless they have been downloaded before. Else all
            files of the data set are downloaded. alone: whether the other splits of a data set are then left on the Hub.
        say: is called with a line on what is read there. option: what names the location in place of the recipe's key, such as --data.

    A folder or data set may have several splits of its own. Where the location names none of them, it is the only one, or the
    one that is called as in the recipe. Any other has to be named, so that no score is computed on training rows unnoticed.

    Raises:
        DataError: the location is missing or broken, or holds no data that we read; its configuration or split is unknown, or
            one has to be named; a pattern fits no file.
    """
    reading = _Reading(location, split, streams, alone, say, option)
    found = [file for path in location.paths for file in _located(reading, path)]
    names: dict[str, str] = {}  # of the files themselves, which links may name once more
    for file, name, _ in found:
        itself = _behind_links(file)
        if itself in names:
            first = names[itself]
            twice = f"{name} is named more than once" if name == first else f"{first} and {name} are one file"
            raise DataError(f"{reading.key} must name every file once, {twice} in {location}; take it out of one place")
        names[itself] = name
    return [(name, read_file(file, name, delimiter)) for file, name, delimiter in found]


def _behind_links(file: str) -> str:
    """Returns the path of a file itself. The Hub's cache has one file for equal ones, which are several files all the same."""
    if os.path.islink(file) and Path(os.readlink(file)).parent.name == "blobs":
        return os.path.join(os.path.realpath(os.path.dirname(file)), os.path.basename(file))
    return os.path.realpath(file)


class _Reading(NamedTuple):
    """What `read_tables` is asked for."""

    location: DataLocation
    split: Split
    streams: bool
    alone: bool
    say: Callable[[str], None]
    option: str | None

    @property
    def key(self) -> str:
        """What names the location."""
        return self.option or f"data.{self.split}"

    def to_choose(self, **choice: str) -> str:
        """Says how a configuration or a split of the location is named."""
        location = asdict(replace(self.location, **choice))
        spelt = "{ " + ", ".join(f"{key}: {value}" for key, value in location.items() if value is not None) + " }"
        return f"set {self.key}: {spelt}" if self.option is None else f"write {self.option} '{spelt}'"


def _located(reading: _Reading, named: str) -> Iterator[tuple[str, str, str | None]]:
    """Yields the files of one file, folder, data set or pattern, each with its name and what separates its cells."""
    location = reading.location
    path = Path(resolve(named))
    found = data_files(named) if named else None
    if found is not None and not path.exists():
        for file in found:
            yield from _located(reading, file)
        return
    if not named or path == Path():
        raise DataError(f"data must be a file, a folder or a Hub data set, got {named!r}; name one")
    if not path.is_file():
        yield from _files(reading, named, path)
        return
    for key in ("config", "split"):
        if (value := getattr(location, key)) is not None:
            raise DataError(f"{reading.key}: a file has no {key}, got {value} of {named}; take {key} out")
    yield str(path), named, None


def _files(reading: _Reading, named: str, path: Path) -> Iterator[tuple[str, str, str | None]]:
    """Yields the files of a split, where they can be read, each with its name and what separates its cells."""
    import datasets

    location, split = reading.location, reading.split
    # Find out which files the splits have.
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # our own errors say in one line what is wrong
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of every README without settings
    place = str(path.resolve()) if path.is_dir() else named
    if path.is_dir() and (wild := sorted(set(place) & set("*?[]"))):  # the library would take it for a pattern
        raise DataError(
            f"{reading.key}: a folder's path must be without {' '.join(wild)}, got {place}; rename it, or name a file in it"
        )
    try:
        builder = _builder(named, place, location.config)
        files: dict[str, list[str]] = {str(name): list(found) for name, found in builder.config.data_files.items()}
        base = place if path.is_dir() else builder.base_path
        taken = {file for found in files.values() for file in found}
        # What was downloaded from the Hub, where that is out of reach now, may be one split of several.
        is_whole = path.is_dir() or base.startswith(ON_HUB)
        left_out = _left_out(base, taken) if is_whole else []
    except DataError:
        raise
    except Exception as error:  # a Hub out of reach, a broken README and unknown names each raise their own kinds
        raise _explained(error, reading, named, place) from None
    if left_out:
        kind, fix = "data set", "download its files, and name those that are meant"
        if path.is_dir():
            kind = "folder"
            fix = "give all files one kind and the names of splits, as in train-1.jsonl, take it out of the folder, or name one file in "
            fix += "place of the folder"
        raise DataError(
            f"data {named}: every data file of a {kind} must belong to a split, {left_out[0]} would not be read "
            f"({len(left_out)} of {len(left_out) + len(taken)} files); {fix}"
        )

    # Choose the split.
    is_only = len(files) == 1 and (is_whole or not {split, USUAL_NAMES[split], "train"}.isdisjoint(files))
    name = location.split or next((name for name in files if is_only or name == split), "")
    if name not in files and not is_whole and len(files) == 1:
        raise DataError(
            f"{reading.key} must be on this machine where the Hub cannot be reached, of {named} there is only the split "
            f"{next(iter(files))}, got {name or 'none'}; run once where it can be, without data.limit, or name this one"
        )
    if name not in files:
        # Training rows are never proposed to be scored or validated on where there are others.
        proposed = files if name or split == "train" else {other for other in files if other != "train"} or files
        (nearest,) = difflib.get_close_matches(name or USUAL_NAMES[split], proposed, n=1, cutoff=0)
        raise DataError(
            f"{reading.key} must name one of the splits of {named} ({', '.join(files)}), got {name or 'none'}; "
            f"{reading.to_choose(split=nearest)}"
        )

    if path.is_dir() and (lost := _lost_file(path, files[name])):
        raise DataError(
            f"data {named}: every data file of a folder must be there, {lost}; copy it again, or name those that are meant, as in "
            f"{named}/*{Path(files[name][0]).suffix}"
        )

    # A data set's README may say how its files are to be read. What separates the cells is all that we can obey.
    usual = type(builder.config)()
    options = {field.name: getattr(builder.config, field.name) for field in fields(usual)}
    options = {name: value for name, value in options.items() if value != getattr(usual, name)}
    delimiter = options.pop("sep", None)
    if unknown := sorted(set(options) - NOT_ABOUT_READING):
        raise DataError(
            f"data {named} must be readable as it is, its README sets {', '.join(unknown)}; download its files, "
            "convert them and name them"
        )

    names = [f"{named}/{file.removeprefix(builder.base_path).lstrip('/')}" for file in files[name]]
    if reading.streams and any(file.startswith(ON_HUB) for file in files[name]):
        if whole := next((n for n in names if not is_read_in_parts(n)), None):
            reading.say(f"data {named}: downloaded as a whole, because {whole} cannot be read a part at a time")
        else:
            there = hub_files.here_or_there(files[name])
            if any(file.startswith(ON_HUB) for file in there):
                reading.say(
                    f"data {named}: read on the Hub, only as far as rows are needed, and not kept here (data.limit)"
                )
            yield from ((file, name, delimiter) for file, name in zip(there, names))
            return

    # Fetch the files of all splits, so that they are found again without a network. Those of a folder are here already.
    try:
        asked = {name: files[name]} if reading.alone else files
        fetched: Any = datasets.DownloadManager(record_checksums=False).download(asked)
    except Exception as error:  # the network, the Hub and the disk each raise their own kinds
        raise DataError(
            f"data {named} cannot be downloaded ({first_line(error)}); run again when the Hub answers, what was downloaded is kept"
        ) from None
    yield from ((here, name, delimiter) for here, name in zip(fetched[name], names))


def _left_out(base: str, taken: set[str]) -> list[str]:
    """Returns the data files of a folder, or of a data set on the Hub, that are in none of its splits. Their rows would be lost unnoticed.

    The library takes the files of the most frequent kind only, and leaves out those that are not called after a split where
    others are. A README that lists the files has chosen them on purpose.
    """
    there = _files_below(base)
    for settings in {"README.md", ".huggingface.yaml"}.intersection(there):
        text = hub_files.content(base, settings) if base.startswith(ON_HUB) else Path(base, settings).read_bytes()
        if re.search(r"^configs:", decode(text), re.MULTILINE):
            return []
    return [file for file in _data_files(there) if f"{base}/{file}" not in taken]


def _files_below(base: str) -> list[str]:
    """Returns all files below a folder or in a data set on the Hub, by their paths in it."""
    if base.startswith(ON_HUB):
        return hub_files.files_below(base)
    return [str(file.relative_to(base)) for file in sorted(Path(base).rglob("*")) if file.is_file()]


def _data_files(files: Sequence[str]) -> list[str]:
    """Returns those of some files, by their paths in a folder, that we can read. Hidden ones are not among them."""
    return [
        file
        for file in files
        if file_suffix(file) in READERS
        and Path(file).name not in NO_EXAMPLES
        and not any(part.startswith((".", "__")) for part in Path(file).parts)
    ]


def _builder(named: str, place: str, config: str | None) -> Any:
    """Returns what the library `datasets` knows of a folder or a data set on the Hub: above all, the files of every split.

    Without a network this is read from what was downloaded earlier. It raises DataError where a part of that has been deleted since.
    """
    import datasets
    from huggingface_hub import snapshot_download

    try:
        builder = datasets.load_dataset_builder(place, config)
        # Without a network the library may offer its own tables of an earlier run, whose values have changed their types.
        if builder.config.data_files:
            return builder
        raise ConnectionError(f"Couldn't reach {place!r} on the Hub")
    except Exception as error:
        if Path(place).is_dir() or type(error) is ValueError:  # the library's own ValueErrors are about names
            raise
        try:
            downloaded = snapshot_download(place, repo_type="dataset", local_files_only=True)
        except Exception:  # nothing was downloaded, so that the first error is the one to be told
            raise error from None
        if gone := _deleted(Path(downloaded)):
            raise DataError(
                f"data {named} must be whole on this machine where the Hub cannot be reached, {gone} is missing; run once where it can "
                "be, without data.limit, or name the files"
            ) from None
        try:
            return datasets.load_dataset_builder(downloaded, config)
        except FileNotFoundError:  # what was downloaded is the README alone
            raise error from None


def _deleted(folder: Path) -> str | None:
    """Returns a file that was downloaded from the Hub and is there no more; None where all are. The library would leave it out unnoticed.

    In the Hub's cache a data set's files are links.
    """
    there = sorted(file for file in folder.rglob("*") if not file.is_dir())
    broken = next((file for file in there if not file.exists()), None)
    names = [str(file.relative_to(folder)) for file in there]
    return str(broken.relative_to(folder)) if broken else _missing_part(names)


def _lost_file(folder: Path, of_split: Sequence[str]) -> str | None:
    """Says which data file of a folder is not there, by the files of a split or by a link; None where there is none. The library would
    leave it out unnoticed."""
    missing = _missing_part(of_split)
    if missing is not None and not Path(missing).exists():
        return f"{Path(missing).name} is missing, which the names of the others count"
    links = [
        str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_symlink() and not file.exists()
    ]
    return next((f"{file} is a link to what is not there" for file in _data_files(links)), None)


def _missing_part(names: Sequence[str]) -> str | None:
    """Returns a file that is missing among some that say how many parts there are, such as data-00000-of-00002.arrow; None if none is."""
    there = set(names)
    numbered = (re.fullmatch(r"(.*-)\d{5}-of-(\d{5})(\..*)", name) for name in names)
    for first, count, last in dict.fromkeys(found.groups() for found in numbered if found):
        of_all = (f"{first}{number:05}-of-{count}{last}" for number in range(int(count)))
        if missing := next((name for name in of_all if name not in there), None):
            return missing
    return None


def _explained(error: Exception, reading: _Reading, named: str, place: str) -> DataError:
    """Returns the error of one line for a folder or data set that could not be opened."""
    location = reading.location
    # The library's message lists the configurations where one is unknown or missing.
    listed = re.search(r"available\b[^:]*: (\[.*\])", str(error), re.IGNORECASE)
    configs: list[str] = ast.literal_eval(listed[1]) if listed else []
    if configs == ["default"]:  # what the library calls the whole, where there are none
        inside = Path(place) / str(location.config)
        other = f", or set path: {named}/{location.config}" if inside.is_dir() else ""
        return DataError(f"{reading.key}: {named} has no configurations, got {location.config}; take config out{other}")
    if configs:
        (nearest,) = difflib.get_close_matches(location.config or configs[0], configs, n=1, cutoff=0)
        return DataError(
            f"{reading.key} must name one of the configurations of {named} ({', '.join(configs)}), got "
            f"{location.config or 'none'}; {reading.to_choose(config=nearest)}"
        )
    reason = "its README.md is not UTF-8" if isinstance(error, UnicodeDecodeError) else first_line(error)
    on_hub, is_empty = not Path(place).is_dir(), "data files" in reason
    in_capitals = ""
    if is_empty:  # the library knows no endings in capitals
        with contextlib.suppress(Exception):  # a Hub that is out of reach now
            there = _data_files(_files_below(f"{ON_HUB}datasets/{place}" if on_hub else place))
            in_capitals = next((f for f in there if file_suffix(f) not in f or not Path(f).suffix.islower()), "")
    if in_capitals and on_hub:
        fix = f"download {in_capitals}, whose ending is not in small letters, and name that file"
    elif in_capitals:
        fix = f"write the ending of {in_capitals} in small letters, or name this file in place of the folder"
    elif is_empty:
        fix = (
            "name a data set that has files that we read" if on_hub else "put files there that we read, or fix the path"
        )
    elif on_hub:
        kept = ", without data.limit, so that it is kept" if reading.streams else ""
        fix = f"fix the id, or run once where the Hub can be reached{kept}"
    else:
        fix = "fix the folder, or name a file in it"
    return DataError(f"data {named} cannot be read ({reason}); {fix}")
