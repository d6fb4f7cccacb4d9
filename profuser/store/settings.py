"""The settings that a store is made with, and what becomes of it where others are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profuser.errors import ConfigError, DataError
from profuser.recipe.compare import differing_keys
from profuser.recipe.data import SPLITS
from profuser.store.layout import Kind


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """The settings that decide the content of each layer of a store.

    sources: the models, their templates, the data, and how responses are generated and captured.
    votes: `asked` lists the names of the judges in their order, and `judges` says what each of them is. Whatever else is there
        belongs to the rule of the vote, which may change without any judge being asked again.
    targets: how the captures are aligned. `follow_numbers` among them also says whether the captures hold followed numbers.
    """

    sources: dict[str, Any]
    votes: dict[str, Any]
    targets: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Changes:
    """How a store's settings differ from those that it is to be used with.

    foreign: the differing keys of the sources' layer that stand for a model's files or its chat template.
    data: those that stand for the rows of a split, or for a file with a source's responses to them or its log-probabilities.
    sources: the other differing keys of the sources' layer.
    judges: the names of the judges that have become others, by their weights or their code.
    asked: whether the list of judges, their order or the rule of the vote is another one.
    captured: whether the sources have to be captured again, because what the alignment wants to know of them is another thing.
    targets: the differing keys of the targets' layer.
    """

    foreign: list[str]
    data: list[str]
    sources: list[str]
    judges: list[str]
    asked: bool
    captured: bool
    targets: list[str]

    def check(self, directory: Path, *, renews: bool = False) -> None:
        """Raises DataError or ConfigError if the sources' layer does not fit, which cannot be made again in the same store.

        Args:
            renews: whether the shards of rows that have changed may be made again.
        """
        if self.foreign:
            raise DataError(
                f"store {directory} belongs to other models, tokenizers or chat templates ({', '.join(self.foreign)} differ); "
                "restore them, give another --store, or start over with `python -m profuser.prepare --fresh` and this recipe"
            )
        if self.sources:
            raise ConfigError(
                f"store {directory} was captured with other settings ({', '.join(self.sources)} differ); give another "
                "--store, undo the change, or start over with `python -m profuser.prepare --fresh` and this recipe"
            )
        if self.data and not renews:
            raise ConfigError(
                f"store {directory} was made of other data ({', '.join(self.data)} differ); run `python -m profuser.prepare` with this "
                "recipe, which makes the shards again whose rows have changed, give another --store, or undo the change"
            )

    def __bool__(self) -> bool:
        """Whether there is any change."""
        return bool(self.foreign or self.data or self.sources or self.vote or self.targets)

    @property
    def vote(self) -> bool:
        """Whether the judges have to vote again."""
        return self.asked or bool(self.judges)

    def outdates(self, kind: Kind) -> bool:
        """Whether the shards of this kind have to be made again."""
        if kind.folder == "targets":
            return self.vote or bool(self.targets)
        if kind.folder in ("truth", "winners") and self.captured:
            return True
        return (kind.folder == "winners" and self.vote) or (kind.folder == "scores" and kind.of in self.judges)


def changes_between(old: StoreSettings, new: StoreSettings) -> Changes:
    """Compares a store's settings with those that it is to be used with."""
    keys = differing_keys(old.sources, new.sources)
    foreign = [key for key in keys if key.endswith((".files", ".template"))]
    rows = [f"data.{split}" for split in SPLITS]
    given = (".responses", ".logprobs")
    data = [key for key in keys if key in rows or (key.startswith("sources.") and key.endswith(given))]
    known = old.votes["judges"]
    return Changes(
        foreign=foreign,
        data=data,
        sources=[key for key in keys if key not in foreign + data],
        judges=[name for name, judge in new.votes["judges"].items() if known.get(name, judge) != judge],
        asked=any(key.partition(".")[0] != "judges" for key in differing_keys(old.votes, new.votes)),
        captured=bool(old.targets.get("follow_numbers")) != bool(new.targets.get("follow_numbers")),
        targets=differing_keys(old.targets, new.targets),
    )


def differing_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns the names of the settings in which two StoreSettings differ, in the words of the recipe. Both come as dicts."""
    targets = differing_keys(old["targets"], new["targets"])
    return [
        *differing_keys(old["sources"], new["sources"]),
        *(key.replace("asked", "judges") for key in differing_keys(old["votes"], new["votes"])),
        *(key if "." in key else f"align.{key}" for key in targets),
    ]
