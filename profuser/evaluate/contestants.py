"""What can be scored: one model alone, or several that answer together. Each knows its name, and by what it is told apart.

On the command line a contestant is given as the directory of a model or of a finished run, a Hub id (with `@REVISION` behind it, if
need be), `demo:NAME`, or `METHOD:RECIPE`, where METHOD is one of `decode.method` or `decode`, which takes the recipe's own.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from profuser.errors import ConfigError
from profuser.evaluate.finished import open_run
from profuser.generate.decoder import Decoder
from profuser.generate.methods import METHODS, open_decoder
from profuser.generate.voices import chats_of
from profuser.models.load import (
    chat_format,
    check_vocabulary,
    default_device,
    load_model,
    load_tokenizer,
    open_model,
    runtime_dtype,
)
from profuser.models.merged_adapter import model_fingerprint
from profuser.prepare.inputs import settled_date, settled_dtype, without
from profuser.prepare.responses import generate
from profuser.progress import silent
from profuser.recipe.generation import GenerationConfig, Reasoning
from profuser.recipe.parse import parse_run
from profuser.recipe.places import RECIPES_DIR
from profuser.recipe.schema import Recipe, SourceConfig
from profuser.text.chat import ChatFormat


class Answerer(Protocol):
    """A contestant that is loaded."""

    def answer(
        self,
        prompts: Sequence[str],
        generation: GenerationConfig,
        *,
        max_length: int,
        seed: int = 0,
        progress: Callable[..., None] = silent,
    ) -> list[str]:
        """Answers prompts, one response each.

        Args:
            max_length: the longest sequence in tokens, as in `generate`.
            progress: called as `Progress.update` is.
        """
        ...


@dataclass(frozen=True)
class LoadedModel:
    """One model, and what it reads and writes through: its chat format."""

    model: PreTrainedModel
    chat: ChatFormat | None
    reasoning: Reasoning | None

    def answer(
        self,
        prompts: Sequence[str],
        generation: GenerationConfig,
        *,
        max_length: int,
        seed: int = 0,
        progress: Callable[..., None] = silent,
    ) -> list[str]:
        """Answers prompts through the model's own chat format, as the sources of a run answer theirs."""
        assert self.chat is not None, "a model without a chat template is refused before it is loaded"
        answers = generate(
            self.model,
            self.chat,
            prompts,
            generation,
            max_length=max_length,
            seed=seed,
            reasoning=self.reasoning,
            progress=progress,
        )
        return [responses[0].text for responses in answers]


@dataclass(frozen=True)
class LoadedJoint:
    """Sources that answer together."""

    fusion: Decoder

    def answer(
        self,
        prompts: Sequence[str],
        generation: GenerationConfig,
        *,
        max_length: int,
        seed: int = 0,
        progress: Callable[..., None] = silent,
    ) -> list[str]:
        """Answers prompts. `decode` says how, and how many at a time, so that of `generation` only the length counts."""
        self.fusion.max_new_tokens, self.fusion.on_step = generation.max_new_tokens, progress
        answers = []
        for answer in self.fusion.answers(prompts, self.fusion.config.batch_size):
            answers.append(answer.text)
            progress(1)
        return answers


@dataclass(frozen=True)
class Alone:
    """One model.

    name: what it is called in tables. dtype: its arithmetic. date: what its chat template gets; None means today.
    reasoning: what becomes of the reasoning before its answers; None takes the generation's.
    is_fused: whether it is the model of a finished run.
    """

    name: str
    source: SourceConfig
    dtype: torch.dtype
    date: datetime.date | None = None
    reasoning: Reasoning | None = None
    is_fused: bool = False

    joint = False

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the model's answers, wherever its files lie. It opens the model's files and loads no weights.

        Raises:
            DataError: the model is missing or broken.
        """
        config, chat = open_model(self.source), self.chat()
        rows_of_head = getattr(config.get_text_config(), "vocab_size", None)
        if chat is not None and rows_of_head is not None:
            check_vocabulary(self.source.name, chat, rows_of_head)
        return {
            "files": model_fingerprint(self.source),
            "commit": getattr(config, "_commit_hash", None),
            "template": None if chat is None else chat.digest,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def chat(self) -> ChatFormat | None:
        """The model's chat format, or None if it has no chat template, as most models that were only pretrained."""
        has_template = load_tokenizer(self.source).chat_template is not None
        return chat_format(self.source, date=self.date) if has_template else None

    def check_answers(self) -> None:
        """Raises DataError if the model cannot answer, because it has no chat template."""
        if self.identity["template"] is None:
            chat_format(self.source, date=self.date)

    def load(self) -> LoadedModel:
        """Loads the model."""
        return LoadedModel(load_model(self.source, self.dtype, default_device()), self.chat(), self.reasoning)


@dataclass(frozen=True)
class Joint:
    """The sources of a recipe, which answer together as its `decode` says."""

    name: str
    recipe: Recipe

    joint = True
    is_fused = False
    reasoning = None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the answers. It raises DataError where a source is missing or broken."""
        dtype = runtime_dtype(self.recipe.capture.dtype, default_device())
        date = settled_date(self.recipe.date, None)
        sources = [Alone(source.name, source, dtype, date).identity for source in self.recipe.sources]
        return {"sources": sources, "decode": without(vars(self.recipe.decode), "batch_size")}

    def check_answers(self) -> None:
        """Raises DataError if one of the sources cannot answer."""
        chats_of(self.recipe)

    def load(self) -> LoadedJoint:
        """Loads the sources."""
        return LoadedJoint(open_decoder(self.recipe))


Contestant = Alone | Joint


def contestants_of(specs: Sequence[str], dtype: str = "auto", taken: Collection[str] = ()) -> list[Contestant]:
    """Returns the contestants that are given on a command line. Those that would have one name are called what was given.

    Args:
        dtype: the arithmetic of models that no recipe names.
        taken: names that others have already.
    Raises:
        ConfigError: one is given twice, or a recipe is wrong.
        DataError: a model or run is missing or broken.
    """
    if twice := next((spec for spec in specs if specs.count(spec) > 1), None):
        raise ConfigError(f"--models must name each model once, got {twice} twice; take one out")
    found = [contestant_of(spec, dtype) for spec in specs]
    names = [*taken, *(contestant.name for contestant in found)]
    return [
        replace(contestant, name=f"./{spec}" if spec in taken else spec)
        if names.count(contestant.name) > 1
        else contestant
        for spec, contestant in zip(specs, found)
    ]


def contestant_of(spec: str, dtype: str = "auto") -> Contestant:
    """Returns the contestant that is given as a word. It raises what `contestants_of` raises."""
    method, colon, place = spec.partition(":")
    if colon and method in ("decode", *METHODS):
        return joint_of(spec, method, place)
    directory = Path(spec).expanduser()
    if (directory / "run.json").exists():
        return fused_of(directory)
    name = directory.name if directory.exists() else spec
    model, at, revision = spec.rpartition("@")
    if not at or directory.exists():
        model, revision = spec, None
    source = SourceConfig(name=name, model=model, revision=revision)
    contestant = Alone(name, source, runtime_dtype(dtype, default_device()))
    _ = contestant.identity  # whatever is wrong with the model is found before any other is loaded
    return contestant


def joint_of(spec: str, method: str, place: str) -> Joint:
    """Returns the sources of a recipe, the path of which or the name of a bundled one is given, as they answer together."""
    path = Path(place)
    if (
        not path.exists()
        and (bundled := RECIPES_DIR / path.with_suffix(".yaml").name).exists()
        and path.parent == Path()
    ):
        path = bundled
    own = [] if method == "decode" else [f"--decode.method={method}"]
    run = parse_run("evaluate", [f"--config={path}", *own], {}, "")
    joint = Joint(spec, run.recipe)
    _ = joint.identity
    return joint


def fused_of(directory: Path, name: str | None = None) -> Alone:
    """Returns the fused model of a finished run, which answers as it did when the run was scored."""
    run, _ = open_run(directory)
    recipe, device = run.recipe, default_device()
    source = SourceConfig(name=name or directory.resolve().name, model=str(directory.resolve()))
    dtype = runtime_dtype(settled_dtype(recipe.capture.dtype, run.store_dir, device), device)
    date = settled_date(recipe.date, run.store_dir)
    contestant = Alone(source.name, source, dtype, date, recipe.reasoning_of(recipe.target_config), is_fused=True)
    _ = contestant.identity
    return contestant
