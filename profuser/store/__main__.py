"""`python -m profuser.store info | verify DIR` says what a store holds, or checks that its files are still what was written."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from profuser.cli import main_of

if TYPE_CHECKING:
    from profuser.store.store import Store


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m profuser.store", description="Look at a store; nothing is changed."
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in (
        ("info", "what it holds: shards, examples and bytes by kind, and what it was made from"),
        ("verify", "whether every file is what was written"),
    ):
        actions.add_parser(name, help=text, description=text).add_argument(
            "directory", type=Path, metavar="DIR", help="a store, for instance runs/demo-store"
        )
    args = parser.parse_args(argv)

    from profuser.errors import DataError
    from profuser.store.store import Store

    store = Store.open(args.directory, complete=False)
    if args.action == "info":
        print(info(store))
    elif damaged := [*store.damaged(), *store.damaged_findings()]:
        raise DataError(
            f"store {store.directory} must hold what was written, {len(damaged)} of {len(store) + 2} files are damaged or missing "
            f"({damaged[0]}); run `python -m profuser.prepare` with its recipe to build them again"
        )
    else:
        print(f"{store.directory}: all {len(store) + 2} files are what was written")


def info(store: Store) -> str:
    """Describes a store: a line with its state, a line on what it was made from, and a table of its shards by kind and split."""
    settings = store.settings
    state = "complete" if store.complete else "not complete: `python -m profuser.prepare` with its recipe goes on"
    lines = [
        f"{store.directory}: {state}",
        f"{', '.join(settings.sources['source_names'])} -> {settings.sources['target']['name']}; "
        f"judges: {', '.join(settings.votes['asked']) or 'none'}; top_k {settings.sources['capture']['top_k']}, "
        f"{settings.sources['capture']['dtype']}; alignment: {settings.targets['mode']}",
        "",
        f"{'kind':<12}{'split':<14}{'shards':>8}{'examples':>10}{'MiB':>10}",
    ]
    for total in store.totals():
        lines.append(
            f"{total.folder:<12}{total.split:<14}{total.shards:>8}{total.examples:>10}{total.bytes / 2**20:>10.1f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main_of(main)
