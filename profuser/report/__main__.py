"""`python -m profuser.report RUN_DIR` draws the report of a finished run again."""

from __future__ import annotations

import argparse
from pathlib import Path

from profuser.cli import main_of


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m profuser.report", description="Write report.html and its pictures for a finished run."
    )
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="directory of a finished run, for instance runs/demo"
    )
    parser.add_argument("--store", type=Path, help="directory of its store, if it is not where run.json says")
    arguments = parser.parse_args(argv)

    from profuser.errors import DataError
    from profuser.report.page import write_report
    from profuser.stopping import working
    from profuser.train.run_record import read_run

    if not arguments.run_dir.is_dir():
        raise DataError(
            f"RUN_DIR must be an existing directory, got {arguments.run_dir}; give the one that training wrote"
        )
    record = read_run(arguments.run_dir)
    with working():
        print(write_report(arguments.run_dir, arguments.store or Path(record["store"])))


if __name__ == "__main__":
    main_of(main)
