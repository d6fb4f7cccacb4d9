"""Finds what a recipe names: a bundled file, a local path, a model or data set on the Hugging Face Hub, a Python function."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from glob import glob
from pathlib import Path

from profuser.errors import ConfigError, DataError, first_line
from profuser.recipe.utf8 import read_utf8

PACKAGE_DIR = Path(__file__).resolve().parent.parent
RECIPES_DIR = PACKAGE_DIR / "recipes"
DEFAULT_RECIPE = RECIPES_DIR / "demo.yaml"

BUNDLED_PREFIX = "demo:"
"""`demo:NAME` in a recipe stands for a file or folder of the bundled demo, wherever profuser is installed."""

FILE_SUFFIXES = {".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".gguf"}
"""A name with one of these endings, in small or capital letters, is always taken for a file, never for a Hub id."""

COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
"""Endings that may follow one of a data file, in small or capital letters, each with pyarrow's name for the compression."""


def is_path(location: str) -> bool:
    """Whether the place of a model or data set is a local path, which is then never looked up on the Hub."""
    looks_local = location.startswith((BUNDLED_PREFIX, "/", ".", "~")) or location.count("/") > 1 or "\\" in location
    try:
        there = ("/" in location and Path(location).parent.is_dir()) or Path(location).exists()
    except OSError:  # such as a name that is too long for any file
        there = False
    return looks_local or there or file_suffix(location) in FILE_SUFFIXES


def file_suffix(location: str) -> str:
    """Returns the ending that says what a file holds, in small letters: .jsonl for train.JSONL and for train.jsonl.gz."""
    path = Path(location.lower())
    return (path.with_suffix("") if path.suffix in COMPRESSIONS else path).suffix


def resolve(location: str) -> str:
    """Returns the path or Hub id that a recipe means: `demo:NAME` becomes the bundled file's path, `~` the home directory."""
    if not location.startswith(BUNDLED_PREFIX):
        return str(Path(location).expanduser()) if is_path(location) else location
    name = location.removeprefix(BUNDLED_PREFIX)
    demo = PACKAGE_DIR / "demo"
    folder = "data" if "." in name else "models"
    path = (demo / folder / name).resolve()
    if not path.is_relative_to(demo):
        raise ConfigError(
            f"{BUNDLED_PREFIX}NAME must stay inside the bundled demo, got {location!r}; give a plain path"
        )
    return str(path)


def check_model(name: str, location: str) -> None:
    """Raises DataError where a model is a local path or a `demo:NAME`, and there is nothing. `name` is its name in the recipe."""
    if not is_path(location) or Path(resolve(location)).exists():
        return
    if location.startswith(BUNDLED_PREFIX):
        bundled = sorted(model.name for model in (PACKAGE_DIR / "demo/models").iterdir() if model.is_dir())
        raise DataError(f"{name}: a bundled model must be one of {', '.join(bundled)}, got {location}; fix the name")
    raise DataError(
        f"{name}: model must be an existing directory or GGUF file, got {location} (no such place); fix the path"
    )


def files_of(location: str) -> list[str]:
    """Returns the local files and folders that a path or a pattern stands for; none where there are none."""
    path = resolve(location)
    return [path] if Path(path).exists() else sorted(glob(path, recursive=True))


def data_files(named: str) -> list[str] | None:
    """Returns the files and folders that a local path or a pattern of the data stands for; None for an id on the Hub.

    Raises:
        DataError: there are none, or one is a link to nothing, or neither a file nor a folder.
    """
    is_pattern = bool(set(named) & set("*?["))
    if found := files_of(named):
        if wrong := next((file for file in found if not (Path(file).is_file() or Path(file).is_dir())), None):
            kind = "a pipe or a device" if Path(wrong).exists() else "a link to what is not there"
            raise DataError(f"data must be files and folders, {wrong} is {kind}; name others")
        return found
    if not (is_path(named) or is_pattern):
        return None
    kind = "no file fits the pattern" if is_pattern else "no such file"
    raise DataError(f"data must be an existing file or folder, or a Hub data set, got {named} ({kind}); fix the path")


def text_or_file(key: str, text: str) -> str:
    """Returns a text that a recipe has at `key`, be it spelt out or in a .txt or .md file.

    Raises:
        DataError: the file is missing or not UTF-8.
    """
    if not text.lower().endswith((".txt", ".md")) or "\n" in text:
        return text
    if not Path(text).is_file():
        raise DataError(f"{key} must be a text or an existing .txt or .md file, got {text}; fix the path")
    try:
        return read_utf8(Path(text))
    except ValueError as error:
        raise DataError(f"{key} {text} must be UTF-8, {error}") from None


def load_function(path: str, key: str) -> Callable:
    """Imports the function that `module:function` names. `key` is the recipe's key, for the error message.

    Raises:
        ConfigError: the module cannot be imported, or what the name stands for is missing or cannot be called.
    """
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (
        Exception,
        SystemExit,
    ) as error:  # the module may be the user's own, which may raise anything when it is imported
        fix = "fix the module"
        if "/" in module or module.endswith(".py"):
            fix = f"write {Path(module).stem}:{name or 'function'} and run where the file lies, or set PYTHONPATH to its folder"
        elif module in sys.modules or not all(part.isidentifier() for part in module.split(".")):
            fix = "fix the name"
        elif isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            fix = "fix the name, or run where the module lies (or set PYTHONPATH)"
        elif isinstance(error, ModuleNotFoundError):
            fix = f"install {error.name}, which the module imports, or fix the module"
        raise ConfigError(
            f"{key} must be an importable module:function, got {path!r} ({first_line(error)}); {fix}"
        ) from None
    if not callable(function):
        raise ConfigError(f"{key} must be a function, got {path!r}, a {type(function).__name__}; fix the name")
    return function
