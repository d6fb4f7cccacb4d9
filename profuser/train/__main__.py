"""`python -m profuser.train` prepares what is missing, fuses, scores and reports. Without arguments it runs the bundled demo."""

from __future__ import annotations

from profuser.cli import main_of


def main(argv: list[str]) -> None:
    from profuser.recipe.parse import parse_run

    flags = {"fresh": "rename an existing run aside and start over (the store stays)"}
    description = "Prepare what is missing, fuse, score, report. Without arguments: the bundled demo."
    run = parse_run("train", argv, flags, description)

    from profuser.pipeline import train_and_report

    train_and_report(run)


if __name__ == "__main__":
    main_of(main)
