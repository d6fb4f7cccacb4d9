"""The recipe's group `data`: where the examples of each split are, how they are written down, and which of them are used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from profuser.errors import ConfigError
from profuser.recipe.checks import check_positive

Split = Literal["train", "validation", "heldout"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(kw_only=True)
class DataLocation:
    """Where the examples of a split are: `train`, and `heldout` and `validation` alike.

    A folder or Hub data set may have several configurations and splits of its own. Where nothing but the path is to be said, it
    stands alone: `train: data.jsonl`.
    """

    path: str | list[str]
    """The file, the folder, the id of the Hub data set, a pattern such as data/*.jsonl, or a list of these."""
    config: str | None = None
    """The configuration of the folder or data set. It is needed where there are several and none is its default."""
    split: str | None = None
    """The split of the folder or data set. null takes its only split, or the one with the recipe's name for the split."""

    def __str__(self) -> str:
        details = ", ".join(
            f"{key} {value}" for key in ("config", "split") if (value := getattr(self, key)) is not None
        )
        path = ", ".join(self.paths)
        return f"{path} ({details})" if details else path

    @property
    def paths(self) -> list[str]:
        """The files, folders, ids and patterns."""
        return [self.path] if isinstance(self.path, str) else self.path


@dataclass(kw_only=True)
class DataConfig:
    """Prompts or conversations with their ground truth, in JSONL, JSON, CSV, TSV, Parquet or Arrow files, compressed or not.

    Each split is a file, a folder of such files, the id of a Hub data set, a pattern of files or a list of these, or a mapping
    that also names a configuration and a split: `heldout: { path: org/set, config: main, split: test }`.
    """

    train: str | list[str] | DataLocation
    """The examples that the target is trained on."""
    heldout: str | list[str] | DataLocation | None = None
    """Examples that are used for the final scores only. Without them, and without `heldout_share`, nothing is scored."""
    validation: str | list[str] | DataLocation | None = None
    """Examples on which CE and KD are measured during training. The held-out examples are not used for that."""
    heldout_share: float = 0.0
    """The share of `train` that is held out where `heldout` is null, by a hash of each conversation's first prompt."""
    validation_share: float = 0.0
    """The same for `validation`."""
    prompt_column: str = "prompt"
    """The column that holds the prompts. Where neither of the two is there, columns of other names are looked for."""
    response_column: str = "response"
    """The column that holds the ground truth."""
    messages_column: str | None = None
    """The column that holds conversations, which end with the ground truth. Those of the usual names are found."""
    turns: Literal["last", "all"] = "last"
    """Which turns of the assistant are learnt: all gives an example for each turn, with the conversation before it."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """What becomes of a row that is no example, such as a conversation that ends with the user's turn: refuse ends the command and names
    the row; skip leaves it out, and counts such rows by what is wrong with them."""
    drop_duplicates: bool = False
    """Whether only the first of several training examples with the same prompt is used."""
    skill_column: str | None = "skill"
    """The column that groups the examples in tables. A data set without it forms one group, "all"."""
    route_column: str = "route"
    """The column that names the source of each example, with capture.choice: route. Validation examples may lack it."""
    weights_column: str = "weights"
    """The column that says how much each source counts, as a mapping from their names to numbers, with capture.choice: weights. Other
    examples than those of training may lack it."""
    limit: int | None = None
    """How many training examples are used, counted from the first; null uses all of them. Of the training data on the Hub, if it has not
    been downloaded before, no more is then fetched than that takes, and nothing is kept, unless other splits are shares of `train`."""
    max_length: int = 2048
    """The longest sequence in tokens, prompt and response together (FuseLLM's value)."""
    too_long: Literal["cut", "skip"] = "cut"
    """What becomes of a longer response: cut learns its beginning, without an end of turn; skip leaves it out, as longer prompts are."""

    def __post_init__(self) -> None:
        check_positive("data", self, "max_length", "limit")
        # A mapping that says nothing but the path is the path, and a list of one is the one, so that two recipes do not differ in
        # how they say it.
        for split in SPLITS:
            location = getattr(self, split)
            path = location.path if isinstance(location, DataLocation) else location
            if isinstance(path, list) and not path:
                raise ConfigError(
                    f"data.{split} must name a file, a folder or a Hub data set, got an empty list; name one"
                )
            if isinstance(path, str) and path.startswith("[") and path.endswith("]"):
                raise ConfigError(
                    f"data.{split} must be a path or a list of paths, got the text {path}; write each of them in quotes, as in "
                    "'[\"a*.jsonl\", b.jsonl]'"
                )
            if isinstance(path, list) and len(path) == 1:
                (path,) = path
            if isinstance(location, DataLocation) and (location.config is not None or location.split is not None):
                path = DataLocation(path=path, config=location.config, split=location.split)
            setattr(self, split, path)
        for split in ("heldout", "validation"):
            share = getattr(self, f"{split}_share")
            if not 0 <= share < 1:
                raise ConfigError(
                    f"data.{split}_share must be at least 0 and below 1, got {share}; set a share such as 0.05"
                )
            if share and getattr(self, split) is not None:
                raise ConfigError(
                    f"data.{split}_share must be 0 where data.{split} names the examples, got {share}; take one of them out"
                )
        if self.heldout_share + self.validation_share >= 1:
            raise ConfigError(
                f"data.heldout_share and data.validation_share must leave training examples, got {self.heldout_share} and "
                f"{self.validation_share}; lower them"
            )
        if self.messages_column is not None and (self.prompt_column, self.response_column) != ("prompt", "response"):
            raise ConfigError(
                f"data.messages_column must stand alone, got {self.messages_column} beside data.prompt_column "
                f"{self.prompt_column} and data.response_column {self.response_column}; take those two out"
            )
        if self.prompt_column == self.response_column:
            raise ConfigError(
                f"data.prompt_column and data.response_column must differ, got {self.prompt_column!r} as both; name two columns"
            )

    @property
    def streams(self) -> bool:
        """Whether training data on the Hub is read there. Where other splits are parts of it, all of it is read, limit or not."""
        return self.limit is not None and not (self.heldout_share or self.validation_share)

    def location(self, split: Split) -> DataLocation | None:
        """Returns where the examples of a split are; None where the recipe has no such split."""
        location = getattr(self, split)
        if location is None and split != "train" and getattr(self, f"{split}_share"):
            location = self.train
        return location if isinstance(location, DataLocation | None) else DataLocation(path=location)

    def part(self, split: Split) -> tuple[float, float]:
        """Returns which hashes of prompts belong to a split, where splits share their examples: from the first, below the second."""
        held, shared = self.heldout_share, self.heldout_share + self.validation_share
        parts: dict[Split, tuple[float, float]] = {
            "heldout": (0.0, held),
            "validation": (held, shared),
            "train": (shared, 1.0),
        }
        derived = split == "train" or getattr(self, f"{split}_share")
        return parts[split] if derived else (0.0, 1.0)
