"""`python -m profuser.evaluate` scores a finished run again, a run and other models on a new file, or any models on benchmarks."""

from __future__ import annotations

import argparse
from pathlib import Path

from profuser.cli import main_of
from profuser.errors import ConfigError

MODEL = "a directory, a finished run, a Hub id, demo:NAME, or decode:RECIPE for the sources of a recipe together"


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command's arguments. It raises ConfigError where they contradict each other."""
    parser = argparse.ArgumentParser(
        prog="python -m profuser.evaluate",
        description="Score the fused model of a finished run again, beside its sources; or score any models on benchmarks.",
        usage="%(prog)s RUN_DIR [--data FILE [--models MODEL ...]]\n"
        "       %(prog)s [RUN_DIR] --models MODEL ... --tasks TASK ... [options]",
    )
    parser.add_argument(
        "run_dir", type=Path, nargs="?", metavar="RUN_DIR", help="directory of a finished run, for instance runs/demo"
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="score on the prompts of this file, folder or data set, or '{ path: data, config: main }', instead of the held-out ones",
    )
    parser.add_argument("--models", nargs="+", default=[], metavar="MODEL", help=f"models, each {MODEL}")
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="demo, paper, bits_per_byte:FILE, a task of lm-evaluation-harness, or a YAML file or folder in its format",
    )
    options = parser.add_argument_group("options of --tasks")
    options.add_argument("--judges", metavar="RECIPE", help="let the judges of a recipe score the answers as well")
    options.add_argument(
        "--shots", type=int, metavar="N", help="how many examples a task shows; default: its own number"
    )
    options.add_argument("--limit", type=int, metavar="N", help="ask only the first N items of every task")
    options.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="how many items are answered at a time"
    )
    options.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the models' arithmetic"
    )
    options.add_argument("--output", type=Path, metavar="DIR", help="where results are kept; default: runs/benchmarks")
    options.add_argument("--fresh", action="store_true", help="make results again that are there")
    args = parser.parse_args(argv)

    if args.run_dir is None and args.tasks is None:
        raise ConfigError(
            "evaluate must be given the directory of a finished run, or --models and --tasks, got neither; give for instance runs/demo"
        )
    if args.tasks is not None and args.run_dir is None and not args.models:
        raise ConfigError(f"--tasks must come with --models or a finished run, got {args.tasks[0]} alone; name a model")
    if args.data is not None and args.tasks is not None:
        raise ConfigError("give either --data or --tasks, got both; --data is scored by the match of the run's recipe")
    if args.models and args.data is None and args.tasks is None:
        raise ConfigError(
            f"--models must come with --data or --tasks, got {args.models[0]} without; name what the models are scored on"
        )
    if args.data is not None and args.run_dir is None:
        raise ConfigError(f"--data must come with a finished run, got {args.data} without; give its directory first")
    for name in ("limit", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be > 0, got {value}; give a positive number")
    if args.shots is not None and args.shots < 0:
        raise ConfigError(f"--shots must be >= 0, got {args.shots}; leave it out to take each task's own")
    if args.tasks is None:
        usual = {name: parser.get_default(name) for name in ("judges", "shots", "limit", "output", "fresh", "dtype")}
        if given := [name for name, value in usual.items() if getattr(args, name) != value]:
            raise ConfigError(f"--{given[0]} must come with --tasks, got it without; leave it out")
    return args


def main(argv: list[str]) -> None:
    args = arguments(argv)
    if args.tasks is not None:
        print(on_benchmarks(args))
    elif args.data is not None:
        print(on_new_data(args))
    else:
        print(on_heldout_data(args.run_dir))


def on_heldout_data(directory: Path) -> str:
    """Scores a run again on its held-out data, and returns the table."""
    from profuser.errors import ConfigError, DataError
    from profuser.evaluate.finished import open_run
    from profuser.evaluate.scores import evaluate
    from profuser.evaluate.terminal import score_table
    from profuser.pipeline import check_unchanged
    from profuser.stopping import working
    from profuser.store.store import Store
    from profuser.train.run_record import EVALUATION, SCORES, check_data, record_files

    run, record = open_run(directory)
    store = Store.open(run.store_dir)
    try:
        check_data(directory, record, store.data)
    except ConfigError:
        _ = store.summary  # if the manifest is another store's, this says so
        raise
    try:
        with working():
            scores = evaluate(run, store)
    except DataError:
        check_unchanged(run)  # if the store is not the run's, this says so
        raise
    record_files(directory, SCORES, EVALUATION)
    return score_table(scores)


def on_new_data(args: argparse.Namespace) -> str:
    """Scores a run and further models on a new file, and returns the table and how the fused model differs from the others."""
    from profuser.evaluate.comparison import differences
    from profuser.evaluate.new_data import score_on
    from profuser.evaluate.terminal import score_table
    from profuser.stopping import working
    from profuser.train.run_record import EVALUATIONS

    with working():
        scores, compared = score_on(args.run_dir, args.data, args.models)
    pairs = [(a, b) for a, b in compared[0].pairs if "fused" in (a, b)]
    shown = f"`python -m profuser.report {args.run_dir}` puts them into the run's report"
    return f"{score_table(scores)}\n\n{differences(compared, pairs)}\n\nthe scores are in {args.run_dir / EVALUATIONS}; {shown}"


def on_benchmarks(args: argparse.Namespace) -> str:
    """Scores models on benchmarks, and returns the table and where everything is."""
    from profuser.evaluate.benchmarks import run_benchmarks
    from profuser.evaluate.comparison import as_json, compare, table
    from profuser.evaluate.contestants import contestants_of
    from profuser.evaluate.judging import judge_answers, judges_of
    from profuser.evaluate.picture import draw
    from profuser.evaluate.tasks import select
    from profuser.report.figures import save_png
    from profuser.report.theme import LIGHT
    from profuser.stopping import working
    from profuser.store.files import in_the_way, write_atomic, write_json

    output = args.output or Path("runs/benchmarks")
    if (other := in_the_way(output)) is not None:  # before anything is asked that could not be kept
        raise ConfigError(f"--output must be a directory, got {output}, for which {other} is in the way; name another")
    with working():
        specs = [*([str(args.run_dir)] if args.run_dir is not None else []), *args.models]
        contestants = contestants_of(specs, args.dtype)
        recipe = judges_of(args.judges) if args.judges is not None else None
        benchmarks, columns = select(args.tasks, args.shots)
        results = run_benchmarks(
            contestants, benchmarks, output, limit=args.limit, batch_size=args.batch_size, fresh=args.fresh
        )
        if recipe is not None:
            columns += judge_answers(results, benchmarks, columns, recipe, output, args.fresh)

        compared = compare(results, columns)
        text = table(compared, list(results))
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "benchmarks.json", as_json(compared))
        write_atomic(output / "benchmarks.md", f"{text}\n".encode())
        fused = {contestant.name for contestant in contestants if contestant.is_fused}
        save_png(draw(compared, list(results), fused, LIGHT), output / "benchmarks.png")
    return f"{text}\n\nresults, table and picture: {output}"


if __name__ == "__main__":
    main_of(main)
