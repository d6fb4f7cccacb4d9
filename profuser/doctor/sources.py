"""Says which of a recipe's sources are worth combining, and how."""

from __future__ import annotations

import contextlib
import json
import sys

from profuser.doctor.comparison import compare
from profuser.doctor.source_tables import describe_sources, source_tables
from profuser.recipe.parse import Run
from profuser.stopping import working


def show_sources(run: Run, base: str | None, as_json: bool) -> None:
    """Compares the sources of a recipe and prints what was found, as tables or as one JSON object. It raises what `compare` raises."""
    # Beside a JSON object nothing else may be printed, so that progress goes to the other stream.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext(), working():
        comparison = compare(run, base)
    print(json.dumps(describe_sources(comparison)) if as_json else source_tables(comparison))
