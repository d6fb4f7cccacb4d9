"""Opens a finished run to score its model: the record, the recipe, and whether the files are the run's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from profuser.errors import ConfigError, DataError
from profuser.recipe.parse import Run, load_recipe
from profuser.store.sealed import damaged_files
from profuser.train.run_record import check_own, model_files, read_finished


def open_run(directory: Path) -> tuple[Run, dict[str, Any]]:
    """Returns a finished run and its record.

    A model that was edited on purpose is scored as it is, and a line says so. So it does of files that are missing, without which some
    models are others.

    Raises:
        DataError: the directory holds no run, one that is not finished, or another run's files.
    """
    record = read_finished(directory)
    check_own(directory, record)
    try:
        recipe = replace(load_recipe(record["recipe"]), output=str(directory), store=record["store"])
    except ConfigError as error:
        raise DataError(str(error)) from None
    differing = damaged_files(directory, model_files(record))
    if changed := [name for name in differing if (directory / name).exists()]:
        print(f"{', '.join(changed)} in {directory} is not what training wrote; what is there is scored", flush=True)
    if missing := [name for name in differing if name not in changed]:
        print(f"{', '.join(missing)} in {directory} is missing, which training wrote", flush=True)
    return Run(recipe=recipe, name=directory.name), record
