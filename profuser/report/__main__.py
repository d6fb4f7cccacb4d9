"""`python -m profuser.report RUN_DIR` draws the report of a finished run again, and of several it writes a comparison."""

from __future__ import annotations

import argparse
from pathlib import Path

from profuser.cli import main_of


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m profuser.report",
        description="Write report.html and its pictures for a finished run, or one page that sets several runs side by side.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="directory of a finished run, for instance runs/demo"
    )
    parser.add_argument(
        "--store", type=Path, help="of one run: directory of its store, if it is not where run.json says"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="of several runs: the page to write; by default report-comparison.html beside the first run's directory",
    )
    arguments = parser.parse_args(argv)

    from profuser.errors import ConfigError, DataError
    from profuser.report.comparison import compare_runs
    from profuser.report.page import write_report
    from profuser.stopping import working
    from profuser.train.run_record import read_run

    run_dir, *others = arguments.run_dirs
    if others:
        if arguments.store is not None:
            raise ConfigError(
                f"--store must come with one RUN_DIR, got {len(arguments.run_dirs)}; leave it out, a comparison needs no store"
            )
        with working():
            print(compare_runs(arguments.run_dirs, arguments.output))
        return
    if arguments.output is not None:
        raise ConfigError(
            f"--output must come with several RUN_DIR, got {run_dir} alone; leave it out, its report is {run_dir / 'report.html'}"
        )
    if not run_dir.is_dir():
        raise DataError(f"RUN_DIR must be an existing directory, got {run_dir}; give the one that training wrote")
    record = read_run(run_dir)
    with working():
        print(write_report(run_dir, arguments.store or Path(record["store"])))


if __name__ == "__main__":
    main_of(main)
