"""The sources' answers to the held-out prompts, each of which is generated once.

They come from the recipe's store, if it was prepared with the same settings; then they are those that a run's scores count.
Otherwise they are generated as `prepare` does it, and kept in files of a few batches each, under what decides them: the model's
files, the tokens that it reads, and how it generates. An interrupted command goes on behind the last of these files, and with
other sources in the recipe nothing is lost of those that stay. No store is changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from profuser.errors import DataError
from profuser.evaluate.scores import source_answers
from profuser.models.head import head_of
from profuser.models.load import check_vocabulary, default_device, load_model, runtime_dtype
from profuser.prepare.data import Row, data_hash
from profuser.prepare.draws import names_of
from profuser.prepare.engines import IN_PROCESS, Asked, Source, answering, check_engine, settled_engine
from profuser.prepare.inputs import generation_settings, settled_dtype, source_settings
from profuser.progress import Progress
from profuser.recipe.generation import Engine
from profuser.recipe.parse import Run
from profuser.recipe.schema import Recipe, SourceConfig
from profuser.store import layout
from profuser.store.files import remove_left_over
from profuser.store.sealed import unsealed, write_sealed
from profuser.store.store import Store
from profuser.text.chat import ChatFormat
from profuser.typed import COUNT, Rule, checked, read_json

BATCHES = 4  # how many batches of answers a file holds
KEPT = {"answers": [str], "of": str, "first": COUNT}
"""The shape of such a file: the answers, the name of its directory, and the number of the first prompt. A file that was copied to
another place is right in itself, and still not what was written there."""


def answers_folder(run: Run) -> Path:
    """Returns the directory in which answers are kept, beside the run's."""
    return run.output_dir.with_name(f"{run.output_dir.name}-sources")


def heldout_answers(
    run: Run, rows: Sequence[Row], asked: Sequence[int], chats: Mapping[str, ChatFormat]
) -> dict[str, list[str]]:
    """Returns every source's answers to some of the held-out prompts, by the source's name.

    Args:
        rows: all held-out rows. asked: the numbers of those that are answered. chats: the chat format of every source.
    Raises:
        DataError: a source cannot be loaded, or the store is damaged.
    """
    recipe, device = run.recipe, default_device()
    dtype = settled_dtype(recipe.capture.dtype, run.store_dir, device)
    prompts = [rows[i]["prompt"] for i in asked]
    answers = {}
    for source in recipe.sources:
        chat = chats[source.name]
        engine = settled_engine(recipe, source, run.store_dir, device)
        decides = source_settings(recipe, source, chat, engine)
        prepared = prepared_answers(run, source, decides, rows, dtype)
        if prepared is not None:
            answers[source.name] = [prepared[i] for i in asked]
            continue
        folder = answers_folder(run) / f"{source.name}-{key_of(recipe, decides, chat, prompts, dtype)}"
        asking = Source.of(recipe, source, chat, runtime_dtype(dtype, device))
        answers[source.name] = kept_or_made(asking, engine, prompts, folder, device)
    return answers


def prepared_answers(
    run: Run, source: SourceConfig, decides: Mapping[str, Any], rows: Sequence[Row], dtype: str
) -> list[str] | None:
    """Returns a source's answers to all held-out prompts from the recipe's store; None unless they are there.

    Args:
        decides: the source's settings, by which those of the store are known.
    Raises:
        DataError: the store is broken, or of another version.
    """
    if not (run.store_dir / "manifest.json").exists():
        return None
    recipe, store = run.recipe, Store.open(run.store_dir, complete=False)
    made = store.settings.sources
    same = (
        made["sources"].get(source.name) == decides
        and made.get("generation") == generation_settings(recipe)
        and made["capture"]["dtype"] == dtype
        and made["data"].get("heldout") == data_hash(rows)
        and made["data"].get("max_length") == recipe.data.max_length
        and (recipe.date is None or made["date"] == recipe.date)
    )
    there = same and store.has_all(layout.responses("heldout", source.name))
    return source_answers(store, source.name) if there else None


def key_of(recipe: Recipe, source: Mapping[str, Any], chat: ChatFormat, prompts: Sequence[str], dtype: str) -> str:
    """Returns a short hash of what decides a source's answers. Batch sizes are not a part of it. `source` are its settings."""
    decides = {
        "source": source,
        "generation": generation_settings(recipe),
        "max_length": recipe.data.max_length,
        "dtype": dtype,
        "ends": list(chat.end_ids),
        "prompts": [chat.prompt_ids(prompt) for prompt in prompts],  # a template may write the date
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def kept_or_made(
    source: Source, engine: Engine, prompts: Sequence[str], folder: Path, device: torch.device
) -> list[str]:
    """Returns a source's answers: those that are kept in a directory, and the others, which are made and kept."""
    answers: list[str] = []
    size = BATCHES * source.generation.batch_size
    for number in range(0, len(prompts), size):
        remove_left_over(folder / name_of(number))
    while part := kept(folder, len(answers), len(prompts)):
        answers += part
    if len(answers) == len(prompts):
        return answers

    # A file that was damaged is made again, and those behind it are used as they are.
    name, done, model = source.config.name, len(answers), None
    names = names_of(prompts)
    check_engine(engine, source.config, source.generation)
    if engine in IN_PROCESS:
        model = load_model(source.config, source.dtype, device, spreads=True)
        check_vocabulary(name, source.chat, len(head_of(model).weight))
    with (
        answering(engine, source, model) as answer,
        Progress(f"{name}: answer the held-out prompts", len(prompts), "prompts", initial=done) as bar,
    ):
        while (first := len(answers)) < len(prompts):
            part = prompts[first : first + size]
            asked = Asked("heldout", part, names=names[first : first + len(part)])
            responses = answer(asked, bar.update)
            texts = [of_prompt[0].text for of_prompt in responses]
            write_sealed(folder / name_of(first), {"answers": texts, "of": folder.name, "first": first})
            answers += texts
            while part := kept(folder, len(answers), len(prompts)):
                answers += part
                bar.update(len(part))
    return answers


def name_of(first: int) -> str:
    """Returns the name of the file that holds the answers from the prompt with this number on."""
    return f"{first:06d}.json"


def kept(folder: Path, first: int, prompts: int) -> list[str]:
    """Returns the answers that are kept from a prompt on; none where there is no file, or a damaged one.

    Args:
        prompts: how many prompts there are.
    """
    path = folder / name_of(first)
    if not path.exists():
        return []
    try:
        content = unsealed(read_json(path), KEPT)
        room = Rule("answers to these prompts", lambda answers: 0 < len(answers) <= prompts - first)
        place = {
            "of": Rule("its directory", folder.name.__eq__),
            "first": Rule("its name", first.__eq__),
            "answers": room,
        }
        return checked(content, place)["answers"]
    except (DataError, ValueError):
        print(f"{path} is not what was written: answering again", flush=True)
        return []
