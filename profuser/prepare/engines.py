"""What lets a source answer: transformers in this process, in batches or continuously, vLLM in a process of its own, or a server.

Whatever engine answers, a prompt without room for a response gets an empty one, and a response that was not finished, is empty or cannot
be used is recorded as such. transformers answers a whole shard in batches that follow from the shard alone. Of the others, each response
is kept as soon as it is there, so that none has to be paid for twice.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from transformers import AutoConfig, PreTrainedModel

from profuser.errors import ConfigError
from profuser.models.continuation import Sampling
from profuser.models.load import weights_of
from profuser.models.merged_adapter import adapter_folder
from profuser.prepare.continuous import ContinuousBatches
from profuser.prepare.draws import names_of, seed_of
from profuser.prepare.responses import Response, generate, is_answer, response_of
from profuser.prepare.server import Reply, Server
from profuser.prepare.vllm_engine import VllmProcess, engine_arguments, has_vllm
from profuser.progress import silent
from profuser.recipe.data import Split
from profuser.recipe.generation import Engine, GenerationConfig
from profuser.recipe.schema import Recipe, SourceConfig
from profuser.recipe.server import ServerConfig
from profuser.store.manifest import read_manifest
from profuser.store.unfinished import Unfinished
from profuser.text.chat import ChatFormat
from profuser.text.conversation import Conversation, Prompt, Turn, as_messages
from profuser.text.fit import Verdict
from profuser.text.said import said_elsewhere


class Asked(NamedTuple):
    """The prompts of one shard that a source answers.

    names: what stands for the prompts in the draws (profuser.prepare.draws.names_of), where they are not all there are of a shard.
    responses: how many each prompt gets.
    kept: where responses are kept until the shard is complete.
    """

    split: Split
    prompts: Sequence[Prompt]
    responses: int = 1
    kept: Unfinished | None = None
    names: Sequence[str] = ()


class Answering(Protocol):
    """A source that is ready to answer."""

    def __call__(self, asked: Asked, progress: Callable[..., None] = silent) -> list[list[Response]]:
        """Returns the responses to every prompt. `progress` is called as `Progress.update` is."""
        ...


class Wanted(NamedTuple):
    """One response that an engine is to give.

    place: the prompt's number in the shard, and the response's among those to it. ids: the prompt's tokens.
    room: how many tokens it may have. seed: what it is sampled with.
    """

    place: tuple[int, int]
    prompt: Prompt
    ids: list[int]
    room: int
    seed: int


Given = tuple[Wanted, Response, int]
"""A response, what was wanted, and how many tokens were written for it."""

Stream = Callable[[Sequence[Wanted]], Iterator[Given]]
"""Gives what is wanted, in any order."""


class Source(NamedTuple):
    """A source that answers: what its recipe says, how it reads and writes, and with what arithmetic."""

    config: SourceConfig
    generation: GenerationConfig
    chat: ChatFormat
    max_length: int
    seed: int
    dtype: torch.dtype

    @classmethod
    def of(cls, recipe: Recipe, config: SourceConfig, chat: ChatFormat, dtype: torch.dtype) -> Source:
        """A source of a recipe."""
        return cls(config, recipe.generation_of(config), chat, recipe.data.max_length, recipe.seed, dtype)


IN_PROCESS: tuple[Engine, ...] = ("transformers", "continuous")
"""The engines that need the model in this process."""


def settled_engine(recipe: Recipe, source: SourceConfig, store_dir: Path, device: torch.device) -> Engine:
    """Returns the engine that `generation.engine` means for a source. "auto" is what the store was begun with, or else vllm where it is
    installed and the device is a GPU, and transformers otherwise.

    A preparation that goes on with a store on another machine keeps the store's engine, so that one store never holds two.
    """
    generation = recipe.generation_of(source)
    if generation.engine != "auto":
        return generation.engine
    if (store_dir / "manifest.json").exists():
        made = read_manifest(store_dir)["settings"]["sources"]["sources"].get(source.name)
        engine = made.get("engine", "transformers") if isinstance(made, dict) else "transformers"
        if engine in (*IN_PROCESS, "vllm"):
            return engine
    fits = adapter_folder(source) is None and "gguf_file" not in weights_of(source)[1]
    return "vllm" if device.type == "cuda" and fits and has_vllm(generation.python) else "transformers"


def check_engine(engine: Engine, source: SourceConfig, generation: GenerationConfig) -> None:
    """Finds out whether an engine can answer for a source, before any model runs.

    Raises:
        ConfigError: it is not installed, or cannot answer for this source; the server refuses the key or has not the model.
        ProfuserError: the server cannot be reached.
    """
    if engine == "vllm":
        if "gguf_file" in weights_of(source)[1]:
            raise ConfigError(
                f"{source.name}: generation.engine vllm must have a model in safetensors, got the GGUF file {source.model}; set "
                "generation: { engine: transformers } for this source"
            )
        if adapter_folder(source) is not None:
            raise ConfigError(
                f"{source.name}: generation.engine vllm must have a whole model, {source.model} is an adapter; merge it, or set "
                "generation: { engine: transformers } for this source"
            )
        if not has_vllm(generation.python):
            raise ConfigError(
                f"generation.engine vllm needs the package vllm, {generation.python or 'this Python'} has none; install it, set "
                "generation.python to a Python that has it, or set generation.engine: transformers"
            )
    elif engine == "server":
        assert isinstance(source.server, ServerConfig)
        Server(source.server, f"sources: {source.name}: server").check()


@contextlib.contextmanager
def answering(engine: Engine, source: Source, model: PreTrainedModel | None = None) -> Generator[Answering]:
    """Starts an engine that answers for a source, until the context ends.

    Args:
        model: the source's model, for the engines that run in this process.
    """
    if engine == "transformers":
        assert model is not None
        yield _by_transformers(source, model)
    elif engine == "continuous":
        assert model is not None
        with _batches_of(source, model) as batches:
            yield _one_by_one(source, partial(_continuously, source, batches))
    elif engine == "server":
        with _server_of(source) as stream:
            yield _one_by_one(source, stream)
    else:
        location, options = weights_of(source.config)
        source = source._replace(max_length=longest_of(source, location, options))
        arguments = engine_arguments(location, options, source.dtype, source.max_length)
        with VllmProcess(source.generation.python, arguments) as process:
            yield _one_by_one(source, partial(_by_vllm, source, process))


def _by_transformers(source: Source, model: PreTrainedModel) -> Answering:
    def answer(asked: Asked, progress: Callable[..., None] = silent) -> list[list[Response]]:
        return generate(
            model,
            source.chat,
            asked.prompts,
            source.generation,
            max_length=source.max_length,
            seed=source.seed,
            of=drawn_for(source, asked),
            names=asked.names,
            responses=asked.responses,
            progress=progress,
        )

    return answer


def _one_by_one(source: Source, stream: Stream) -> Answering:
    """Makes an engine of one that gives each response as soon as it has it."""

    def answer(asked: Asked, progress: Callable[..., None] = silent) -> list[list[Response]]:
        # What is wanted: the responses for which there is room, but for those that are there already.
        answers = [[Response("", True, Verdict.OK)] * asked.responses for _ in asked.prompts]
        left = Counter({i: asked.responses for i in range(len(asked.prompts))})
        wanted = []
        for i, (prompt, name) in enumerate(zip(asked.prompts, asked.names or names_of(asked.prompts))):
            ids = source.chat.prompt_ids(prompt)
            room = min(source.generation.max_new_tokens, source.max_length - len(ids))
            for n in range(asked.responses):
                if room > 0 and not _is_kept(asked.kept, (i, n), answers):
                    seed = seed_of(source.seed, drawn_for(source, asked), name, n)
                    wanted.append(Wanted((i, n), prompt, ids, room, seed))
                else:
                    left[i] -= 1
        progress(sum(n == 0 for n in left.values()))

        # Ask for them.
        for of, response, tokens in stream(wanted) if wanted else ():
            i, n = of.place
            answers[i][n] = response
            if asked.kept is not None:
                asked.kept.add(of.place, list(response))
            left[i] -= 1
            progress(int(left[i] == 0), tokens=tokens)
        return answers

    return answer


def _is_kept(kept: Unfinished | None, place: tuple[int, int], answers: list[list[Response]]) -> bool:
    """Whether a response is there already. It is then put in its place."""
    found = kept.results.get(place) if kept is not None else None
    if found is None or not is_answer(found):
        return False
    answers[place[0]][place[1]] = Response(found[0], found[1], Verdict(found[2]))
    return True


def _batches_of(source: Source, model: PreTrainedModel) -> ContinuousBatches:
    generation = source.generation
    return ContinuousBatches(
        source.config.name,
        model,
        ends=source.chat.end_ids,
        at_once=generation.batch_size,
        longest=source.max_length,
        sampling=Sampling(generation.temperature, generation.top_p) if generation.temperature > 0 else None,
    )


def _continuously(source: Source, batches: ContinuousBatches, wanted: Sequence[Wanted]) -> Iterator[Given]:
    """Lets transformers answer by continuous batching."""
    prompts, rooms = ({n: one.ids for n, one in enumerate(wanted)}, {n: one.room for n, one in enumerate(wanted)})
    # The seed is that of all responses which are still wanted. If those that are kept left it as it was, the others to the same prompt
    # would be sampled with the numbers of the kept ones, and be copies of them.
    for n, tokens in batches.answers(prompts, rooms, sum(one.seed for one in wanted)):
        strip = source.generation.reasoning == "strip"
        yield wanted[n], response_of(source.chat, tokens, strip_reasoning=strip), len(tokens)


def _by_vllm(source: Source, process: VllmProcess, wanted: Sequence[Wanted]) -> Iterator[Given]:
    """Lets vLLM answer. A response ends with one of the ends of the turn, and with nothing else."""
    generation = source.generation
    sampling = {
        "temperature": generation.temperature,
        "top_p": generation.top_p,
        "stop_token_ids": list(source.chat.end_ids),
        "detokenize": False,
    }
    of = {str(n): one for n, one in enumerate(wanted)}
    requests = [
        {
            "id": key,
            "prompt": one.ids,
            "sampling": sampling
            | {"max_tokens": one.room}
            | ({"seed": one.seed} if generation.temperature > 0 else {}),
        }
        for key, one in of.items()
    ]
    strip = generation.reasoning == "strip"
    for answer in process.answers(requests):
        tokens = answer["tokens"]
        # An end of the turn may be left out of the tokens, which are then followed by the reason alone.
        ended = answer["reason"] == "stop" and not set(tokens) & set(source.chat.end_ids)
        response = response_of(source.chat, [*tokens, source.chat.end_id] if ended else tokens, strip_reasoning=strip)
        yield of[answer["id"]], response, len(tokens)


@contextlib.contextmanager
def _server_of(source: Source) -> Generator[Stream]:
    """Opens the source's server. At the end it is said how much reasoning it kept apart."""
    assert isinstance(source.config.server, ServerConfig)
    server = Server(source.config.server, f"sources: {source.config.name}: server")
    generation, chat = source.generation, source.chat
    apart: list[Wanted] = []

    def ask(wanted: Wanted) -> Reply:
        seen = chat.template.seen(wanted.prompt)
        turns = seen.turns if isinstance(seen, Conversation) else (Turn("user", seen),)
        options: dict[str, Any] = {"max_tokens": wanted.room, "temperature": generation.temperature}
        if generation.temperature > 0:
            options |= {"top_p": generation.top_p, "seed": wanted.seed}
        return server.chat(as_messages(turns), **options)

    def stream(wanted: Sequence[Wanted]) -> Iterator[Given]:
        for of, reply in server.all(wanted, ask):
            if reply.reasoning:
                apart.append(of)
            said = said_elsewhere(chat, reply.text, strip_reasoning=generation.reasoning == "strip")
            yield of, Response(said.text, reply.finished, said.verdict), reply.tokens

    yield stream
    if apart and generation.reasoning == "keep":
        print(
            f"{source.config.name}: its server gave the reasoning of {len(apart)} responses apart, and it is not in them although "
            "`reasoning` is keep; start the server without a reasoning parser, or set `reasoning: strip`",
            flush=True,
        )


def drawn_for(source: Source, asked: Asked) -> str:
    """For whom the random numbers of a sampled response are drawn."""
    return f"{source.config.name} {asked.split}"


def longest_of(source: Source, location: str, options: dict[str, Any]) -> int:
    """Returns the longest sequence in tokens that vLLM may read: `data.max_length`, or fewer where the model has fewer positions."""
    config = AutoConfig.from_pretrained(location, **options).get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if not isinstance(positions, int) or rope.get("rope_type", "default") != "default":
        return source.max_length
    return min(source.max_length, positions)
