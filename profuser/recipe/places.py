"""Where the things lie that a recipe names: bundled files, paths, Hub ids and Python functions."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from profuser.errors import ConfigError, first_line

PACKAGE_DIR = Path(__file__).resolve().parent.parent
RECIPES_DIR = PACKAGE_DIR / "recipes"
DEFAULT_RECIPE = RECIPES_DIR / "demo.yaml"

BUNDLED_PREFIX = "demo:"
"""`demo:NAME` in a recipe names a file or folder of the bundled demo, wherever profuser is installed."""

FILE_SUFFIXES = {".jsonl", ".json", ".csv", ".parquet", ".gguf"}
"""A name that ends in one of these is never a Hub id."""


def is_path(location: str) -> bool:
    """Whether a model or data set means a local path, and is therefore never looked up on the Hub."""
    looks_local = location.startswith((BUNDLED_PREFIX, "/", ".", "~")) or location.count("/") > 1 or "\\" in location
    in_folder = "/" in location and Path(location).parent.is_dir()
    return looks_local or in_folder or Path(location).suffix in FILE_SUFFIXES or Path(location).exists()


def resolve(location: str) -> str:
    """A path or Hub id with `demo:NAME` replaced by the bundled file's place."""
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


def load_function(path: str, key: str) -> Callable:
    """The function that `module:function` names; `key` is the recipe's key that names it, for the error."""
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module of the user's own may raise anything when it is imported
        raise ConfigError(
            f"{key} must be an importable module:function, got {path!r} ({first_line(error)}); fix the name, or run where the "
            "module lies (or set PYTHONPATH)"
        ) from None
    if not callable(function):
        raise ConfigError(f"{key} must be a function, got {path!r}, a {type(function).__name__}; fix the name")
    return function
