"""What all phases of a preparation use: the recipe, the data's rows, every model's chat format, and the store's settings.

Opening these inputs reads the data, the tokenizers and the models' configurations. It loads no model and changes nothing on the
disk.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from profuser.disk_list import DiskList
from profuser.errors import ConfigError, DataError, in_short
from profuser.models.load import chat_format, check_vocabulary, default_device, open_model, runtime_dtype
from profuser.models.merged_adapter import model_fingerprint
from profuser.prepare.chosen import SourceChoice, weights_of
from profuser.prepare.columns import is_empty
from profuser.prepare.data import Examples, Row, data_hash, load_examples, prompt_digest, row_digest
from profuser.prepare.engines import check_engine, settled_engine
from profuser.prepare.given import GivenResponses, file_digest
from profuser.prepare.given_logprobs import GivenLogprobs
from profuser.prepare.given_preferences import GivenPreferences, given_scores
from profuser.prepare.judges import check_conversations, judge_fingerprint, open_judge, try_function_judge
from profuser.prepare.server import Server
from profuser.recipe.compare import decides
from profuser.recipe.data import SPLITS, Split
from profuser.recipe.generation import Engine
from profuser.recipe.parse import Run
from profuser.recipe.places import load_function
from profuser.recipe.schedule import needs_inference, schedule_words
from profuser.recipe.schema import JudgeConfig, Recipe, SourceConfig
from profuser.recipe.server import ServerConfig
from profuser.store.division import Division, Part
from profuser.store.manifest import read_manifest
from profuser.store.settings import Changes, StoreSettings
from profuser.store.store import Store, check_place
from profuser.text.chat import ChatFormat
from profuser.text.conversation import Prompt
from profuser.text.fit import Fitted, Verdict, fit
from profuser.text.said import without_reasoning
from profuser.text.token_bytes import TokenBytesMismatch

ALIGNMENT_RULES = 3
"""The version of the alignment's rules. It is part of a store's settings, so that another version aligns the captures again."""

VOTE_RULES = 3
"""The version of the vote's rules. Another version votes again on the scores that are there."""


@dataclass
class Inputs:
    """The inputs of one preparation.

    name: the recipe's name. store_dir: the directory of the store. rows: the data by split.
    chats: the chat formats of the sources, by name. target: the chat format of the target.
    device: the device that the models run on.
    date: the date that the chat templates get.
    """

    recipe: Recipe
    name: str
    store_dir: Path
    rows: dict[Split, Examples]
    chats: dict[str, ChatFormat]
    target: ChatFormat
    device: torch.device
    date: datetime.date

    @classmethod
    def open(cls, run: Run, *, fresh: bool = False) -> Inputs:
        """Opens and checks the inputs of a recipe.

        Args:
            fresh: whether the store that is there will be set aside, so that nothing of it counts.
        Raises:
            ConfigError: the schedule needs judges and there are none; a function that the recipe names cannot be imported.
            DataError: a model, a data file or a tokenizer is missing or broken, as far as that is seen without loading a model;
                there is no ground truth to score the held-out answers by.
        """
        # Whatever a recipe names is opened here, so that nothing of it is found missing after the first models have run.
        recipe = run.recipe
        if needs_inference(recipe) and not recipe.judges:
            schedule = recipe.schedule if isinstance(recipe.schedule, str) else "with an inference_weight"
            raise ConfigError(
                f"a schedule {schedule} needs judges for its inference mode, got none; add judges or set schedule: fusellm"
            )
        for judge in recipe.judges:
            open_judge(judge)
        if recipe.evaluation.match is not None:
            load_function(recipe.evaluation.match, "evaluation.match")

        # The models' configurations, the data and the tokenizers.
        target = recipe.target_config
        models = {model.name: model for model in (*recipe.sources, target)}
        configs = {
            name: open_model(model, weights=model.logprobs is None or name == recipe.target)
            for name, model in models.items()
        }
        rows = {split: load_split(recipe, split) for split in SPLITS if recipe.data.location(split) is not None}
        date = settled_date(recipe.date, None if fresh else run.store_dir)
        chats = {source.name: chat_format(source, date=date) for source in recipe.sources}
        inputs = cls(
            recipe=recipe,
            name=run.name,
            store_dir=run.store_dir,
            rows=rows,
            chats=chats,
            target=chats.get(recipe.target) or chat_format(target, date=date),
            device=default_device(),
            date=date,
        )

        for source, split in product(recipe.sources, rows):
            inputs.given(source, split)
        for source in recipe.sources:
            inputs.check_logprobs(source)
            if source.logprobs is not None and inputs.is_run(source):
                open_model(source)
        for judge in recipe.judges:
            inputs.check_scores(judge)
            check_conversations(judge, rows["train"])
            if recipe.optim.eval_rewards:
                check_conversations(judge, rows["validation"])
        for name, config in configs.items():
            check_head(name, chats.get(name) or inputs.target, config)

        if heldout := rows.get("heldout"):
            check_ground_truth(recipe, heldout)
        return inputs

    @cached_property
    def dtype_name(self) -> str:
        """The arithmetic of the sources, which is no longer "auto"."""
        return settled_dtype(self.recipe.capture.dtype, self.store_dir, self.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the sources are run."""
        return runtime_dtype(self.dtype_name, self.device)

    @cached_property
    def engines(self) -> dict[str, Engine]:
        """What lets each source answer, by its name. It is no longer "auto"."""
        return {
            source.name: settled_engine(self.recipe, source, self.store_dir, self.device)
            for source in self.recipe.sources
        }

    @cached_property
    def keep(self) -> str:
        """Whose distributions the targets hold: the winner's, or all sources' where they are mixed or the store has them already."""
        if self.recipe.keep == "all" or not (self.store_dir / "manifest.json").exists():
            return self.recipe.keep
        return read_manifest(self.store_dir)["settings"]["targets"].get("keep", "all")

    @property
    def source_names(self) -> list[str]:
        """The names of the sources, in the recipe's order."""
        return [source.name for source in self.recipe.sources]

    @property
    def schedule(self) -> str:
        """The schedule in words."""
        return schedule_words(self.recipe)

    def try_judges(self, judges: Sequence[JudgeConfig]) -> None:
        """Calls once those of some judges that are functions, and looks for the servers of others.

        Raises:
            ConfigError: a server refuses its key, or has not the model.
            DataError: a function fails.
            ProfuserError: a server cannot be reached.
        """
        candidates = len(self.recipe.sources) * self.recipe.generation.responses_per_source
        for judge in judges:
            try_function_judge(judge, self.rows["train"][0], candidates)
            if isinstance(judge.server, ServerConfig):
                Server(judge.server, f"judges: {judge.name}: server").check()

    def check_engines(self, sources: Sequence[SourceConfig]) -> None:
        """Finds out whether some sources can be answered for. It raises what `check_engine` raises."""
        for source in sources:
            check_engine(self.engines[source.name], source, self.recipe.generation_of(source))

    @cached_property
    def data_hashes(self) -> dict[str, str]:
        """A hash of the rows of every split."""
        return {split: data_hash(rows) for split, rows in self.rows.items()}

    @cached_property
    def divisions(self) -> dict[Split, Division]:
        """How the examples of every split are divided among the shards of the store. One that is there keeps its number of shards."""
        there = (self.store_dir / "manifest.json").exists()
        begun: dict[str, int] = read_manifest(self.store_dir)["divided"] if there else {}
        return {
            split: Division.of(
                [prompt_digest(row["prompt"]) for row in rows],
                [row_digest(row) for row in rows],
                begun.get(split, math.ceil(len(rows) / self.recipe.capture.shard_size)),
            )
            for split, rows in self.rows.items()
        }

    def parts(self, split: Split) -> list[Part]:
        """The parts of a split that the shards of a store cover."""
        return self.divisions[split].parts

    def given(self, source: SourceConfig, split: Split) -> GivenResponses | None:
        """The file that has a source's responses to a split's prompts; None where the source answers them itself.

        Raises:
            DataError: the file is missing or broken, or has not the number of responses that it should.
        """
        if source.responses is None or not self.answered(split):
            return None
        if source.name not in self._given:
            strips = self.recipe.reasoning_of(source) == "strip"
            answer = partial(without_reasoning, self.chats[source.name]) if strips else None
            self._given[source.name] = GivenResponses(source.name, source.responses, answer)
        given, key = self._given[source.name], (source.name, split)
        if key not in self._has_given:
            count, routed = self.responses_per_prompt(split), self.routed(split, source.name)
            self._has_given[key] = given.check(split, self.rows[split], count, routed)
        return given if self._has_given[key] else None

    def logprobs(self, source: SourceConfig) -> GivenLogprobs | None:
        """The file that has a source's log-probabilities; None where there is none. It raises what GivenLogprobs raises."""
        if source.logprobs is not None and source.name not in self._given_logprobs:
            chat, top_k = (
                self.chats[source.name],
                min(self.recipe.capture.top_k, len(self.chats[source.name].tokenizer)),
            )
            self._given_logprobs[source.name] = GivenLogprobs(source.name, source.logprobs, chat, top_k)
        return self._given_logprobs.get(source.name)

    def scores_given(self, source: SourceConfig, split: Split) -> bool:
        """Whether a source's log-probabilities of the ground truth of a split are in a file. They are where it has any of them."""
        if (given := self.logprobs(source)) is None:
            return False
        if (key := (source.name, split)) not in self._has_scores:
            self._has_scores[key] = any(given.has(row["prompt"], row["response"]) for row in self.rows[split])
        return self._has_scores[key]

    def check_logprobs(self, source: SourceConfig) -> None:
        """Raises DataError where the file with a source's log-probabilities is broken, or has nothing that is asked for."""
        if (
            source.logprobs is None
            or self.recipe.judges
            or any(self.scores_given(source, split) for split in self.rows)
        ):
            return
        first = self.rows["train"][0]
        raise DataError(
            f"sources: {source.name}: logprobs {source.logprobs} must have responses of the data, it has none of them, for instance not "
            f"{in_short(first['response'])} to {in_short(first['prompt'])}; fix the prompts and responses of its rows"
        )

    def check_scores(self, judge: JudgeConfig) -> None:
        """Raises DataError where the file with a judge's scores lacks that of a response which is in a file as well, or has preferences
        between none of these."""
        if judge.scores is None:
            return
        compared: list[bool] = []
        scores, count = given_scores(judge.name, judge.scores), self.responses_per_prompt("train")
        for source in self.recipe.sources:
            if (given := self.given(source, "train")) is not None:
                for row, asked in zip(self.rows["train"], self.routed("train", source.name)):
                    for response in given.of([row], count)[0] if asked else ():
                        if response.eligible:
                            scores.score(row, response.text)
                            if isinstance(scores, GivenPreferences):
                                compared.append(scores.compares(row, response.text))
        if compared and not any(compared):
            raise DataError(
                f"judges: {judge.name}: scores {judge.scores} must have preferences between the sources' responses, it has none that is "
                "theirs; fix the prompts and texts of its rows"
            )

    def try_logprobs(self) -> None:
        """Raises DataError where a file with log-probabilities does not fit its source's tokenizer, or lacks a ground truth of a split of
        which it has others. This encodes all of them."""
        for source, split in product(self.recipe.sources, self.rows):
            given = self.logprobs(source)
            if given is None or not self.scores_given(source, split):
                continue
            texts = zip(self.rows[split], self.fitted[split], self.routed(split, source.name), strict=True)
            for row, text, asked in texts:
                if asked and text.verdict == Verdict.OK:
                    with contextlib.suppress(TokenBytesMismatch):  # such a text is left out of what the source says
                        own = self.chats[source.name].encode(row["prompt"], text.text, complete=not text.cut)
                        given.scored(row["prompt"], row["response"], text, own)

    def answers(self, source: SourceConfig, split: Split) -> bool:
        """Whether a source is asked to answer the prompts of a split, instead of a file that has its answers."""
        asked = split in self.rows and self.answered(split) and bool(self.routed(split, source.name).any())
        return asked and self.given(source, split) is None

    def is_run(self, source: SourceConfig) -> bool:
        """Whether a source has to be loaded to score the ground truth or to answer, as far as that is known before the vote."""
        return any(
            not self.scores_given(source, split) or (source.server is None and self.answers(source, split))
            for split in self.rows
        )

    def routed(self, split: Split, source: str) -> np.ndarray:
        """Returns (E,) bool, which examples of a split a source is asked about: all, unless a column names the source of each."""
        if self.recipe.capture.choice != "route" or split == "heldout":
            return np.ones(len(self.rows[split]), bool)
        if (split, source) not in self._routed:
            column = self.recipe.data.route_column
            self._routed[split, source] = np.array([row.get(column, source) == source for row in self.rows[split]])
        return self._routed[split, source]

    def weights(self, row: Row) -> list[float]:
        """How much each source counts on an example: all alike, unless a column says it."""
        column = self.recipe.data.weights_column
        if self.recipe.capture.choice != "weights" or is_empty(row.get(column)):
            return [1.0] * len(self.recipe.sources)
        return weights_of(row[column], self.source_names, column)

    def responses_per_prompt(self, split: Split) -> int:
        """How many responses each source gives to a prompt of a split: several only to those that are voted on."""
        return self.recipe.generation.responses_per_source if split == "train" else 1

    @cached_property
    def _routed(self) -> dict[tuple[Split, str], np.ndarray]:
        return {}

    @cached_property
    def _given(self) -> dict[str, GivenResponses]:
        return {}

    @cached_property
    def _has_given(self) -> dict[tuple[str, Split], bool]:
        """Whether these files have responses to the prompts of a split, by source and split."""
        return {}

    @cached_property
    def _has_scores(self) -> dict[tuple[str, Split], bool]:
        """Whether the files with log-probabilities have ground truths of a split, by source and split."""
        return {}

    @cached_property
    def _given_logprobs(self) -> dict[str, GivenLogprobs]:
        return {}

    def answered(self, split: Split) -> bool:
        """Whether the sources answer the prompts of a split: held-out prompts for the scores, training prompts for the vote."""
        return split == "heldout" or (split == "train" and bool(self.recipe.judges))

    @cached_property
    def fitted(self) -> dict[Split, DiskList[Fitted]]:
        """The ground truths of every split. A long one is cut once for all sources, so that they score the same bytes."""
        sources = list(self.chats.values())

        def fitted(split: Split, number: int, row: Row) -> Fitted:
            try:
                return self.fit(sources, row["prompt"], row["response"])
            except DataError as error:  # a template that cannot show this conversation
                location = self.recipe.data.location(split)
                raise DataError(f"data {location}, example {number} (from 0): {error}") from None

        return {
            split: DiskList(fitted(split, n, row) for n, row in enumerate(rows)) for split, rows in self.rows.items()
        }

    def fit(self, sources: Sequence[ChatFormat], prompt: Prompt, response: str) -> Fitted:
        """Returns what is learnt of a response: `profuser.text.fit.fit` to the target and some sources, as the recipe asks for it."""
        data = self.recipe.data
        return fit(self.target, sources, prompt, response, data.max_length, cuts=data.too_long == "cut")

    def changes(self, *, renews: bool = False) -> Changes | None:
        """Compares the recipe's store with these inputs; None where there is no store yet. Nothing is changed.

        Args:
            renews: whether the store may have been made of other data.
        Raises:
            ConfigError, DataError: what check_place, Store.open and Store.checked_changes raise.
        """
        check_place(self.store_dir)
        if not (self.store_dir / "manifest.json").exists():
            return None
        return Store.open(self.store_dir, complete=False).checked_changes(self.settings(), renews=renews)

    def settings(self) -> StoreSettings:
        """Returns the settings that decide each layer of the store, for its manifest. Batch sizes are not among them."""
        recipe = self.recipe
        sources = {
            "source_names": self.source_names,
            "sources": {
                source.name: source_settings(recipe, source, self.chats[source.name], self.engines[source.name])
                for source in recipe.sources
            },
            "target": {
                "name": recipe.target,
                "files": model_fingerprint(recipe.target_config),
                "template": template_hash(self.target),
            },
            "data": self.data_hashes
            | {"max_length": recipe.data.max_length}
            | ({"too_long": recipe.data.too_long} if recipe.data.too_long != "cut" else {})
            | ({"route_column": recipe.data.route_column} if recipe.capture.choice == "route" else {})
            | ({"weights_column": recipe.data.weights_column} if recipe.capture.choice == "weights" else {}),
            "generation": generation_settings(recipe),
            # Before there was a choice, all stores were made with min_ce.
            "capture": without(
                {key: value for key, value in vars(recipe.capture).items() if decides(f"capture.{key}")},
                *(["choice"] if recipe.capture.choice == "min_ce" else []),
            )
            | {"dtype": self.dtype_name},
            "date": self.date.isoformat(),
        }
        votes = {
            "asked": [judge.name for judge in recipe.judges],
            "judges": {
                judge.name: {"model": judge.model, "function": judge.function, "files": judge_fingerprint(judge)}
                | ({} if judge.scores is None else {"scores": judge.scores})
                | ({} if judge.grader is None else {"grader": judge.grader})
                | ({"server": judge.server.model} if isinstance(judge.server, ServerConfig) else {})
                for judge in recipe.judges
            },
        }
        # Before there was a choice, all stores were made with all rows.
        targets = without(vars(recipe.align), "keep") | {"rules": ALIGNMENT_RULES}
        if self.keep != "all":
            targets |= {"keep": self.keep}
        if recipe.judges:
            votes |= {"rules": VOTE_RULES, "floors": {j.name: j.floor for j in recipe.judges if j.floor is not None}}
            if recipe.judging.rule != "majority":
                votes |= {"judging.rule": recipe.judging.rule}
            targets |= {"judging.no_signal": recipe.judging.no_signal}
        return StoreSettings(sources=sources, votes=votes, targets=targets)


def source_settings(recipe: Recipe, source: SourceConfig, chat: ChatFormat, engine: Engine) -> dict[str, Any]:
    """Returns what decides what a source says: its model, its chat template, what becomes of its reasoning, and how it answers
    otherwise than the others.

    transformers is not named, with which all stores were made before there were other engines.
    """
    files = {"responses": source.responses, "logprobs": source.logprobs}
    given = {
        key: file_digest(f"sources: {source.name}: {key}", path) for key, path in files.items() if path is not None
    }
    by: dict[str, Any] = {} if engine == "transformers" else {"engine": engine}
    if isinstance(source.server, ServerConfig):
        by |= {"served": source.server.model}  # wherever the server is
    own = without(source.generation_changes, "engine", "batch_size")
    if own.get("temperature"):
        own |= {"seed": recipe.seed}
    return {
        "model": source.model,
        "files": model_fingerprint(source),
        "revision": source.revision,
        "template": template_hash(chat),
        "reasoning": recipe.reasoning_of(source),
        **given,
        **by,
        **({"generation": own} if own else {}),
    }


def generation_settings(recipe: Recipe) -> dict[str, Any]:
    """Returns what decides how the sources answer, but for the reasoning and the engine, of which each may have its own."""
    seed = {"seed": recipe.seed} if recipe.generation.temperature > 0 else {}
    return without(vars(recipe.generation), "batch_size", "reasoning", "engine", "python") | seed


def check_ground_truth(recipe: Recipe, heldout: Sequence[Row]) -> None:
    """Raises DataError for held-out rows without any ground truth, where the default match has nothing to compare with."""
    if recipe.evaluation.match is None and not any(row["response"] for row in heldout):
        raise DataError(
            f"{recipe.data.location('heldout')} must hold a ground truth to score the answers by, every response is empty; "
            "fill them in, or give a function as evaluation.match"
        )


def check_head(name: str, chat: ChatFormat, config: PreTrainedConfig) -> None:
    """Raises DataError where a model's head, which has as many rows as its configuration says, lacks a row for a token."""
    if (rows_of_head := getattr(config.get_text_config(), "vocab_size", None)) is not None:
        check_vocabulary(name, chat, rows_of_head)


def load_split(recipe: Recipe, split: Split) -> Examples:
    """Reads the rows of one split of a recipe's data. Only the training split obeys data.limit."""
    location = recipe.data.location(split)
    if location is None:
        raise ConfigError(f"data.{split} must name a data file or set, the recipe names none; add it")
    limit = recipe.data.limit if split == "train" else None
    named = "train" if getattr(recipe.data, split) is None else split
    # Held-out prompts are answered and scored by all sources.
    choice = "min_ce" if recipe.capture.choice == "route" and split == "heldout" else recipe.capture.choice
    names = [source.name for source in recipe.sources]
    return load_examples(
        recipe.data, location, limit, split, recipe.data.part(split), named, SourceChoice(choice, names)
    )


def settled_dtype(name: str, store_dir: Path, device: torch.device) -> str:
    """Returns the arithmetic that `capture.dtype` means. "auto" is what the store was begun with, or else what suits the device.

    A preparation that goes on with a store on another device keeps the store's arithmetic, so that one store never holds two.
    """
    if name != "auto":
        return name
    if (store_dir / "manifest.json").exists():
        return read_manifest(store_dir)["settings"]["sources"]["capture"]["dtype"]
    return "bfloat16" if device.type == "cuda" else "float32"


def settled_date(date: str | None, store_dir: Path | None) -> datetime.date:
    """Returns the date that chat templates get: the recipe's `date`, or else the day on which the store was begun.

    A preparation that goes on with a store on another day keeps the store's date, so that one store never holds two.
    """
    if date is not None:
        return datetime.date.fromisoformat(date)
    if store_dir is not None and (store_dir / "manifest.json").exists():
        return datetime.date.fromisoformat(read_manifest(store_dir)["settings"]["sources"]["date"])
    return datetime.date.today()


def template_hash(chat: ChatFormat) -> str:
    """Returns a short hash of a chat template."""
    return hashlib.sha256(str(chat.tokenizer.chat_template).encode()).hexdigest()[:16]


def without(settings: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Returns a copy of some settings without keys that do not decide the store's content, or do so in another place."""
    return {k: v for k, v in settings.items() if k not in keys}
