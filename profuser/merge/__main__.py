"""`python -m profuser.merge` merges models of one architecture into one, without training."""

from __future__ import annotations

import argparse
from pathlib import Path

from profuser.cli import main_of
from profuser.errors import ConfigError
from profuser.merge.settings import DTYPES, METHODS


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command's arguments. It raises ConfigError where they contradict each other."""
    parser = argparse.ArgumentParser(
        prog="python -m profuser.merge",
        description="Merges models of one architecture into one, without training.",
        usage="%(prog)s --method METHOD --models A B [--base C] --output DIR [settings]\n"
        "       %(prog)s --config FILE.yaml --output DIR",
        epilog="methods: " + "; ".join(f"{name}: {text}" for name, text in METHODS.items()),
    )
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="each a directory, a Hub id, or demo:NAME")
    parser.add_argument(
        "--base", metavar="MODEL", help="the model that the others were trained from; slerp's first one"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="the settings in mergekit's YAML")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new directory")
    parser.add_argument(
        "--weight", nargs="+", type=float, metavar="W", help="one for all models, or one for each; default 1"
    )
    parser.add_argument(
        "--density", nargs="+", type=float, metavar="D", help="the share of a task vector that is kept; default 1"
    )
    parser.add_argument("--t", type=float, help="slerp's way from the first model (0) to the second (1); default 0.5")
    parser.add_argument(
        "--lambda", type=float, dest="scale", metavar="L", help="the factor of the task vectors' sum; default 1"
    )
    parser.add_argument(
        "--normalize", action=argparse.BooleanOptionalAction, help="divide by the weights; default for linear and ties"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the result; default: as stored")
    parser.add_argument("--seed", type=int, default=0, help="of what DARE drops")
    args = parser.parse_args(argv)
    if (args.config is None) == (args.method is None):
        raise ConfigError(
            "a merge must be given by --config, or by --method and --models, got neither or both; give one"
        )

    return args


def main(argv: list[str]) -> None:
    args = arguments(argv)

    from profuser.merge.settings import read_settings, settings_of
    from profuser.recipe.places import check_model

    if args.config is not None:
        own = ("models", "base", "weight", "density", "t", "scale", "normalize", "dtype")
        if given := [name for name in own if getattr(args, name) is not None]:
            raise ConfigError(f"--config has all settings, got --{given[0]} beside it; set it in {args.config}")
        settings = read_settings(args.config, args.seed)
    else:
        if not args.models:
            raise ConfigError("--models must name the models that are merged, got none")
        shared = {"t": args.t, "lambda": args.scale, "normalize": args.normalize}
        shared = {key: value for key, value in shared.items() if value is not None}
        if args.method == "slerp":
            shared.setdefault("t", 0.5)
        settings = settings_of(
            args.method, args.models, args.base, args.weight, args.density, shared, args.dtype, args.seed
        )
    for model in settings.names:
        check_model(model, model)  # before torch and transformers are imported, which takes seconds

    from profuser.merge.run import merge

    merge(settings, args.output)
    # slerp goes from one model to another, of which the first stands in the base's place.
    count, into = len(settings.models), " into their base"
    if settings.base is None or settings.method == "slerp":
        count, into = count + (settings.base is not None), ""
    print(f"merged {count} model{'s' * (count > 1)}{into} by {settings.method}: {args.output}")


if __name__ == "__main__":
    main_of(main)
