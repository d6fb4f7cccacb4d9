"""`python -m profuser.report RUN_DIR` draws the report of a finished run again, and of several it writes a comparison."""

from __future__ import annotations

import argparse
from pathlib import Path

from profuser.cli import main_of
from profuser.errors import ConfigError


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command's own arguments.

    Raises:
        ConfigError: they contradict each other.
    """
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
    args = parser.parse_args(argv)
    first, *others = args.run_dirs
    if others and args.store is not None:
        raise ConfigError(
            f"--store must come with one RUN_DIR, got {len(args.run_dirs)}; leave it out, a comparison needs no store"
        )
    if not others and args.output is not None:
        raise ConfigError(
            f"--output must come with several RUN_DIR, got {first} alone; leave it out, its report is {first / 'report.html'}"
        )
    return args


def main(argv: list[str]) -> None:
    args = arguments(argv)

    from profuser.errors import DataError
    from profuser.report.comparison import compare_runs
    from profuser.report.page import write_report
    from profuser.stopping import working
    from profuser.train.run_record import read_run

    run_dir, *others = args.run_dirs
    if others:
        with working():
            print(compare_runs(args.run_dirs, args.output))
        return
    if not run_dir.is_dir():
        raise DataError(f"RUN_DIR must be an existing directory, got {run_dir}; give the one that training wrote")
    record = read_run(run_dir)
    with working():
        print(write_report(run_dir, args.store or Path(record["store"])))


if __name__ == "__main__":
    main_of(main)
