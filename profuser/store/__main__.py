"""`python -m profuser.store info | verify | export | diff` says what a store holds, writes it for others, or compares it.

`python -m profuser.store distillkit` turns what DistillKit has captured into what a store can be made from.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from profuser.cli import main_of

if TYPE_CHECKING:
    from profuser.store.store import Store


def arguments(argv: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m profuser.store", description="Look at stores, in which nothing is changed."
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in (
        ("info", "what it holds: shards, examples and bytes by kind, and what it was made from"),
        ("verify", "whether every file is what was written"),
        ("export", "write its responses, and its votes as preferences, as a data set with a card"),
        ("diff", "in which settings and shards two stores differ; the exit code is 1 if they do"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("directory", type=Path, metavar="DIR", help="a store, for instance runs/demo-store")
        if name == "export":
            action.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a new or empty folder")
        elif name == "diff":
            action.add_argument("other", type=Path, metavar="OTHER", help="another store")
    text = "write what DistillKit has captured of a source as a file for `sources[].logprobs`"
    action = actions.add_parser("distillkit", help=text, description=text)
    action.add_argument("folder", type=Path, metavar="FOLDER", help="DistillKit's, with compression_config.yaml")
    action.add_argument("--config", required=True, metavar="RECIPE", help="a recipe with the source and the data")
    action.add_argument("--source", required=True, metavar="NAME", help="the source of it that was captured")
    action.add_argument("--output", type=Path, required=True, metavar="FILE", help="a new Parquet file")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = arguments(argv)
    if args.action == "distillkit":
        convert(args)
        return

    from profuser.store.export import export
    from profuser.store.store import Store

    store = Store.open(args.directory, complete=args.action == "export")
    if args.action == "info":
        print(info(store))
    elif args.action == "export":
        counts = export(store, args.output)
        print(f"{args.output}: {', '.join(f'{count:,} {name}' for name, count in counts.items())}")
    elif args.action == "diff":
        lines = difference(store, Store.open(args.other, complete=False))
        print("\n".join(lines) or "the stores are the same")
        sys.exit(bool(lines))
    else:
        print(verified(store))


def convert(args: argparse.Namespace) -> None:
    """Does what `distillkit` asks for, and says what was found."""
    from profuser.errors import ConfigError
    from profuser.prepare import distillkit
    from profuser.recipe.parse import parse_run

    recipe = parse_run("store", ["--config", args.config]).recipe
    source = next((source for source in recipe.sources if source.name == args.source), None)
    if source is None:
        names = ", ".join(source.name for source in recipe.sources)
        raise ConfigError(f"--source must be one of the recipe's, {names}, got {args.source}; name one")
    counts = distillkit.convert(recipe, source, args.folder, args.output)
    print(f"{args.output}: {counts.found:,} of {counts.wanted:,} rows of the data are there")
    if counts.missing:
        print(f"not there is for instance {counts.missing}; take such rows out of the data, or capture them as well")
    if counts.outside:
        print(
            f"{counts.outside:,} of {counts.learnt:,} tokens are not among the most probable: their log-probability is taken as the lowest "
            "that is there, so that the source's cross-entropy is a bit too low"
        )


def difference(one: Store, other: Store) -> list[str]:
    """Says in which settings and shards two stores differ, by what their manifests record, and which of these shards are not there; nothing
    where they are the same.

    The shards of a split that is divided among another number of them hold other examples, whatever the models said. What was said on
    the training prompts is then compared by the audit tables.
    """
    from profuser.store.layout import kind_of
    from profuser.store.settings import differing_settings

    lines = [f"settings differ: {key}" for key in differing_settings(asdict(one.settings), asdict(other.settings))]
    apart = {split: n for split, n in one.divided.items() if other.divided.get(split, n) != n}
    for split, count in apart.items():
        lines.append(
            f"shards of {split} cannot be compared one by one, because their examples are divided among {count} and {other.divided[split]}"
        )
    if "train" in apart and one.complete and other.complete:
        lines.extend(differing_samples(one, other))
    digests = [
        {name: digest for name, digest in store.digests.items() if kind_of(name)[0].split not in apart}
        for store in (one, other)
    ]
    for name in sorted({*digests[0], *digests[1]}):
        here, there = (of_store.get(name) for of_store in digests)
        if here is None or there is None:
            lines.append(f"only in {(other if here is None else one).directory}: {name}")
        elif here != there:
            lines.append(f"shards differ: {name}")
    lines += [f"missing in {store.directory}: {name}" for store in (one, other) for name in store.missing()]
    return lines


def differing_samples(one: Store, other: Store) -> list[str]:
    """Says which columns of the audit tables differ, and in how many training prompts; or that they cannot be read."""
    from profuser.store.export import audit_rows

    if damaged := [f"{store.directory / name}" for store in (one, other) for name in store.damaged_findings()]:
        return [f"training prompts cannot be compared, because of {', '.join(damaged)}, damaged or missing"]
    rows = [audit_rows(store) for store in (one, other)]
    if len(rows[0]) != len(rows[1]):
        return [f"samples.parquet differs: it has {len(rows[0]):,} and {len(rows[1]):,} training prompts"]
    differing: dict[str, int] = {}
    for a, b in zip(*rows):
        for column in dict.fromkeys([*a, *b]):
            # As texts, NaN is itself.
            differing[column] = differing.get(column, 0) + (str(a.get(column)) != str(b.get(column)))
    return [
        f"samples.parquet differs: {column}, in {count:,} of {len(rows[0]):,} training prompts"
        for column, count in differing.items()
        if count
    ]


def verified(store: Store) -> str:
    """Checks all files of a store, and returns the line that says so.

    Raises:
        DataError: files are damaged or missing, or the store is not complete.
    """
    from profuser.errors import DataError
    from profuser.store.store import BESIDE, EXAMPLES

    beside = BESIDE if store.complete else (EXAMPLES,)  # what a preparation has found is written at its end
    files = len(store) + len(beside)
    if damaged := [*store.damaged(), *store.damaged_findings(names=beside)]:
        raise DataError(
            f"store {store.directory} must hold what was written, {len(damaged)} of {files} files are damaged or missing "
            f"({damaged[0]}); run `python -m profuser.prepare` with its recipe to build them again"
        )
    if not store.complete:
        raise DataError(
            f"store {store.directory} is not complete, all {files} files that it has are what was written; run "
            "`python -m profuser.prepare` with its recipe to finish it"
        )
    return f"{store.directory}: all {files} files are what was written"


def info(store: Store) -> str:
    """Describes a store: a line with its state, a line on what it was made from, and a table of its shards by kind and split."""
    settings, totals = store.settings, store.totals()
    state = "complete" if store.complete else "not complete: `python -m profuser.prepare` with its recipe goes on"
    lines = [
        f"{store.directory}: {state}",
        f"{', '.join(settings.sources['source_names'])} -> {settings.sources['target']['name']}; "
        f"judges: {', '.join(settings.votes['asked']) or 'none'}; top_k {settings.sources['capture']['top_k']}, "
        f"{settings.sources['capture']['dtype']}; alignment: {settings.targets['mode']}"
        + (
            f"; answers: {answered_by(settings.sources['sources'])}"
            if any(total.folder == "responses" for total in totals)
            else ""
        ),
        "",
        f"{'kind':<12}{'split':<14}{'shards':>8}{'examples':>10}{'MiB':>10}",
    ]
    for total in totals:
        lines.append(
            f"{total.folder:<12}{total.split:<14}{total.shards:>8}{total.examples:>10}{total.bytes / 2**20:>10.1f}"
        )
    return "\n".join(lines)


def answered_by(sources: Mapping[str, Mapping[str, Any]]) -> str:
    """Says what has answered for the sources, once if it is the same for all: an engine, the model of a server, or a file."""
    by = {
        # transformers is not named in a manifest.
        name: "a file, as far as it goes"
        if "responses" in source
        else source.get("served", source.get("engine", "transformers"))
        for name, source in sources.items()
    }
    kinds = set(by.values())
    return kinds.pop() if len(kinds) == 1 else ", ".join(f"{name} by {kind}" for name, kind in by.items())


if __name__ == "__main__":
    main_of(main)
