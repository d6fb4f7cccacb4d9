"""`python -m profuser.prepare`: from models and prompts to a store of aligned targets.

Phases, each resumable by shard: every source scores the ground truth (training mode) and answers the prompts; the
judges vote on the answers (inference mode); the winners are captured on their own responses; all captures are aligned
to the target's tokens. A store holds up to three splits: `train` (both modes), `validation` and `heldout` (ground truth
only; on `heldout` the sources' answers too, which are scored against the fused model's).
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from profuser.alignment.engine import byte_aligner
from profuser.alignment.fusellm import FuseLLMAligner
from profuser.alignment.ranges import RangeRequest, ranges_needed
from profuser.alignment.spans import ENGINE
from profuser.alignment.types import Aligned
from profuser.alignment.vocab_map import ByteOrder
from profuser.ballots import candidates, count_votes
from profuser.capture import (
    DECODER,
    EMPTY,
    NORMALISER,
    NOT_WINNER,
    OK,
    TOO_LONG,
    Scored,
    capture,
    label_positions,
    pack_captures,
    unpack_captures,
)
from profuser.chat import ChatFormat, Encoded
from profuser.cli import main_of
from profuser.config import Recipe, Run, parse_run, target_config
from profuser.data import data_hash, load_examples
from profuser.errors import ConfigError, DataError
from profuser.estimate import expected, sentence
from profuser.kernels.head import Head
from profuser.models import (
    chat_format,
    check_vocabulary,
    default_device,
    fingerprint,
    head_of,
    load_model,
    load_tokenizer,
    runtime_dtype,
)
from profuser.progress import Progress
from profuser.responses import generate
from profuser.reward import judge_fingerprint, load_function, load_judge
from profuser.schedule import plan, stages_of
from profuser.store import Store, read_json, set_aside, write_json
from profuser.summary import handled_line, summarise
from profuser.targets import INFER, TRAIN, TargetBuilder
from profuser.token_bytes import TokenBytesMismatch

ALIGNMENT_RULES = 2
"""Version of what alignment does with the same captures; another one aligns again."""


class Preparation:
    """The phases of one preparation, over one store."""

    def __init__(self, run: Run):
        self.recipe, self.name = run.recipe, run.name
        recipe = run.recipe
        self.device = default_device()
        self.sources = recipe.sources
        self.splits = {
            split: load_examples(recipe.data, location, recipe.data.limit if split == "train" else None)
            for split in ("train", "validation", "heldout")
            if (location := getattr(recipe.data, split)) is not None
        }
        self.chats = {s.name: chat_format(s, load_tokenizer(s)) for s in self.sources}
        target = target_config(recipe)
        self.target = (
            self.chats[r] if (r := recipe.target) in self.chats else chat_format(target, load_tokenizer(target))
        )
        self.seconds: Counter[str] = Counter()
        self._byte_orders: dict[str, ByteOrder] = {}
        self.store = Store.open(run.store_dir, self._settings())

    def _settings(self) -> dict[str, dict]:
        """What decides each layer of the store, for its manifest."""
        r = self.recipe
        capture = {
            "source_names": [s.name for s in r.sources],
            "sources": {
                s.name: {
                    "model": s.model,
                    "files": fingerprint(s.model),
                    "revision": s.revision,
                    "template": self._template(self.chats[s.name]),
                }
                for s in r.sources
            },
            "target": {
                "name": r.target,
                "files": fingerprint(target_config(r).model),
                "template": self._template(self.target),
            },
            "data": {split: data_hash(rows) for split, rows in self.splits.items()} | {"max_length": r.data.max_length},
            "generation": without(vars(r.generation), "batch_size")
            | ({"seed": r.seed} if r.generation.temperature > 0 else {}),
            "capture": without(vars(r.capture), "batch_size"),
        }
        votes = {
            "asked": [j.name for j in r.judges],
            "judges": {
                j.name: {"model": j.model, "function": j.function, "files": judge_fingerprint(j)} for j in r.judges
            },
        }
        return {"capture": capture, "votes": votes, "targets": vars(r.align) | {"rules": ALIGNMENT_RULES}}

    @staticmethod
    def _template(chat: ChatFormat) -> str:
        return hashlib.sha256(str(chat.tokenizer.chat_template).encode()).hexdigest()[:16]

    # -- shards ---------------------------------------------------------------------------------------------------

    def _shards(self, split: str) -> Iterator[tuple[int, slice]]:
        size, total = self.recipe.capture.shard_size, len(self.splits[split])
        for number, first in enumerate(range(0, total, size)):
            yield number, slice(first, min(first + size, total))

    def _missing(self, split: str, prefix: str) -> list[tuple[str, slice]]:
        """The shards of one kind that are still to be made: (name, examples)."""
        names = [(f"{prefix}-{number:05d}", part) for number, part in self._shards(split)]
        return [(name, part) for name, part in names if not self.store.valid(name)]

    def unmade(self, split: str, prefix: str) -> int:
        """Examples of one kind of shard that the manifest does not list."""
        listed = self.store.manifest["shards"]
        return sum(p.stop - p.start for n, p in self._shards(split) if f"{prefix}-{n:05d}" not in listed)

    def answered(self, split: str) -> bool:
        """Whether the sources answer a split's prompts: the held-out ones for the scores, the training ones for the vote."""
        return split == "heldout" or (split == "train" and bool(self.recipe.judges))

    def run(self) -> Store:
        if self.store.complete and self._intact():
            if not (self.store.directory / "summary.json").exists():
                self._write_summary()
            return self.store
        for phase in (self.capture_ground_truth_and_answer, self.judge, self.capture_winners, self.align):
            start = time.monotonic()
            phase()
            self.seconds[phase.__name__] = round(time.monotonic() - start, 1)
            gc.collect()
        self._write_summary()
        self.store.finish()
        return self.store

    def _intact(self) -> bool:
        return all([self.store.valid(name) for name in self.store.names("")])

    # -- phase 1 ---------------------------------------------------------------------------------------------------

    def capture_ground_truth_and_answer(self) -> None:
        """Every source is loaded once: it scores the ground truth and answers the prompts."""
        for source in self.sources:
            truth = [
                (split, *m) for split in self.splits for m in self._missing(split, f"capture/{split}-gt-{source.name}")
            ]
            answers = [
                (split, *m)
                for split in filter(self.answered, self.splits)
                for m in self._missing(split, f"capture/{split}-responses-{source.name}")
            ]
            if not truth and not answers:
                continue
            model = load_model(source, runtime_dtype(self.recipe.capture.dtype, self.device), self.device)
            head = head_of(model)
            check_vocabulary(source.name, self.chats[source.name], head.weight)
            with Progress(f"{source.name}: score the ground truth", examples_in(truth), "examples") as bar:
                for split, name, part in truth:
                    rows = self.splits[split][part]
                    texts = [self._fitted[split][i] for i in range(part.start, part.stop)]
                    self._capture_shard(name, source.name, model, head, rows, texts, bar)
            with Progress(f"{source.name}: answer the prompts", examples_in(answers), "prompts") as bar:
                for split, name, part in answers:
                    responses = generate(
                        model,
                        self.chats[source.name],
                        [row["prompt"] for row in self.splits[split][part]],
                        self.recipe.generation,
                        max_length=self.recipe.data.max_length,
                        seed=self.recipe.seed + part.start,
                        responses=self.recipe.generation.responses_per_source if split == "train" else 1,
                        progress=bar.update,
                    )
                    self.store.put_json(name, responses, examples=len(responses))
            del model, head

    @cached_property
    def _fitted(self) -> dict[str, list[tuple[str, bool, int]]]:
        """Ground truths of every split as (text, cut, reason): one cut for all sources, so that they score the same bytes."""
        chats = [self.target, *self.chats.values()]
        return {
            split: [fit(chats, row["prompt"], row["response"], self.recipe.data.max_length) for row in rows]
            for split, rows in self.splits.items()
        }

    def _capture_shard(self, name: str, source: str, model, head: Head, rows, texts, bar: Progress) -> None:
        chat = self.chats[source]
        if source not in self._byte_orders:
            self._byte_orders[source] = ByteOrder(chat.token_bytes, head.weight.shape[0])
        order = self._byte_orders[source]
        encoded: list[Encoded] = []
        ranges: list[RangeRequest] = []
        reason = np.array([r for _, _, r in texts], dtype=np.uint8)
        places = []
        for i, (row, (text, cut, why)) in enumerate(zip(rows, texts)):
            if why == OK:
                try:
                    own = chat.encode(row["prompt"], text, complete=not cut)
                    target = self.target.encode(row["prompt"], text, complete=not cut)
                    encoded.append(own)
                    ranges.append(ranges_needed(self.target.token_bytes, target, chat.token_bytes, own, order))
                    places.append(i)
                except TokenBytesMismatch as error:
                    reason[i] = NORMALISER if error.reason == "normaliser" else DECODER
        lengths = [len(texts[i][0].encode()) for i in places]
        scored: dict[int, Scored] = {}
        config = self.recipe.capture
        for i, result in capture(
            model, head, encoded, lengths, ranges, order, top_k=config.top_k, batch_size=config.batch_size
        ):
            scored[places[i]] = result
            bar.update(1, tokens=len(encoded[i].input_ids))
        bar.update(len(rows) - len(scored))
        self.store.put(
            name,
            pack_captures(len(rows), reason, [t[1] for t in texts], scored, config.top_k, head.weight.shape[0]),
            examples=len(rows),
        )

    # -- phase 2 ---------------------------------------------------------------------------------------------------

    def judge(self) -> None:
        """Every judge scores every eligible response of the training prompts."""
        for config in self.recipe.judges:
            missing = self._missing("train", f"capture/train-scores-{config.name}")
            if not missing:
                continue
            score = load_judge(config, self.device)
            with Progress(f"{config.name}: score the responses", examples_in(missing), "prompts") as bar:
                for name, part in missing:
                    shown = [[text if ok else "" for text, ok in c] for c in self.candidates(part)]
                    scores = score(self.splits["train"][part], shown, bar.update)
                    self.store.put(name, {"scores": scores}, examples=len(shown))
            del score

    def candidates(self, part: slice, split: str = "train") -> list[list[tuple[str, bool]]]:
        """(text, eligible) of all responses to the prompts of one shard, source by source."""
        return candidates(
            self.store, [s.name for s in self.sources], part.start // self.recipe.capture.shard_size, split
        )

    @cached_property
    def ballots(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(winner (E,) candidate index or -1, votes (E, C), scores (E, R, C)) over the whole training split."""
        return count_votes(self.store, [s.name for s in self.sources], [j.name for j in self.recipe.judges])

    # -- phase 3 ---------------------------------------------------------------------------------------------------

    def capture_winners(self) -> None:
        """The winner of every vote is captured on its own response."""
        if not self.recipe.judges:
            return
        winner, _, _ = self.ballots
        per_source = self.recipe.generation.responses_per_source
        for s, source in enumerate(self.sources):
            missing = self._missing("train", f"capture/train-infer-{source.name}")
            if not missing:
                continue
            model = load_model(source, runtime_dtype(self.recipe.capture.dtype, self.device), self.device)
            head = head_of(model)
            with Progress(f"{source.name}: capture the responses that won", examples_in(missing), "prompts") as bar:
                for name, part in missing:
                    rows, candidates = self.splits["train"][part], self.candidates(part)
                    texts = []
                    for row, answers, c in zip(rows, candidates, winner[part]):
                        if c < 0 or c // per_source != s:
                            texts.append(("", False, NOT_WINNER))
                        else:
                            texts.append(
                                fit(
                                    [self.target, self.chats[source.name]],
                                    row["prompt"],
                                    answers[c][0],
                                    self.recipe.data.max_length,
                                )
                            )
                    self._capture_shard(name, source.name, model, head, rows, texts, bar)
            del model, head

    # -- phase 4 ---------------------------------------------------------------------------------------------------

    def align(self) -> None:
        """All captures onto the target's tokens: the trainer's view."""
        aligners = {s.name: self._aligner(self.chats[s.name]) for s in self.sources}
        for split, rows in self.splits.items():
            missing = self._missing(split, f"targets/{split}")
            with Progress(f"align {split}", examples_in(missing), "examples") as bar:
                for name, part in missing:
                    self.store.put(
                        name, self._align_shard(split, part, rows[part], aligners, bar), examples=part.stop - part.start
                    )

    def _aligner(self, source: ChatFormat):
        config, top_k = self.recipe.align, self.recipe.capture.top_k
        if config.mode == "fusellm":
            return FuseLLMAligner(self.target, source, top_k=top_k, fallback=config.fallback)
        threads = torch.get_num_threads()
        return byte_aligner(self.target, source, top_k=top_k, min_reliability=config.min_reliability, threads=threads)

    def _align_shard(
        self, split: str, part: slice, rows: list[dict], aligners: dict, bar: Progress
    ) -> dict[str, np.ndarray]:
        number = part.start // self.recipe.capture.shard_size
        modes = [(TRAIN, "gt")] + ([(INFER, "infer")] if split == "train" and self.recipe.judges else [])
        shards = {
            mode: [
                unpack_captures(self.store.get(f"capture/{split}-{kind}-{s.name}-{number:05d}")) for s in self.sources
            ]
            for mode, kind in modes
        }
        builder = TargetBuilder(len(self.sources), len(self.target.tokenizer))
        sequences: list[tuple[int, int, str, Encoded, list]] = []  # example, mode, text, in target tokens, captures
        for i, row in enumerate(rows):
            for mode, _ in modes:
                text, cut, reason = self._text(split, mode, part, i)
                if reason == OK:
                    try:
                        encoded = self.target.encode(row["prompt"], text, complete=not cut)
                    except TokenBytesMismatch as error:
                        reason = NORMALISER if error.reason == "normaliser" else DECODER
                if reason == OK:
                    sequences.append((part.start + i, mode, text, encoded, [shard[i] for shard in shards[mode]]))
                else:
                    builder.skip(mode, reason)
        aligned = [self._align_source(aligners[s.name], sequences, n) for n, s in enumerate(self.sources)]
        for n, (example, mode, text, encoded, captures) in enumerate(sequences):
            # In inference mode the vote has chosen: only the winner was captured and takes part.
            source_ce = [np.inf if c is None else c.cross_entropy(self.recipe.align.min_ce_unit) for c in captures]
            per_source = [found.get(n) for found in aligned]
            builder.add(example, mode, encoded, label_positions(encoded), source_ce, len(text.encode()), per_source)
        bar.update(len(rows), tokens=sum(len(encoded.input_ids) for _, _, _, encoded, _ in sequences))
        return builder.arrays()

    @staticmethod
    def _align_source(aligner, sequences: list[tuple], source: int) -> dict[int, Aligned]:
        """By index in `sequences` what one source says; it says nothing where it was not captured or gave NaN."""
        there = [n for n, s in enumerate(sequences) if s[4][source] is not None and np.isfinite(s[4][source].nll)]
        found = aligner.align_batch(
            [sequences[n][2].encode() for n in there],
            [sequences[n][3] for n in there],
            [sequences[n][4][source].capture for n in there],
        )
        return dict(zip(there, found))

    def _text(self, split: str, mode: int, part: slice, i: int) -> tuple[str, bool, int]:
        if mode == TRAIN:
            return self._fitted[split][part.start + i]
        winner = self.ballots[0][part.start + i]
        if winner < 0:
            return "", False, NOT_WINNER
        text, _ = self._train_candidates[part.start + i][winner]
        source = self.sources[winner // self.recipe.generation.responses_per_source]
        return fit(
            [self.target, self.chats[source.name]],
            self.splits["train"][part.start + i]["prompt"],
            text,
            self.recipe.data.max_length,
        )

    @cached_property
    def _train_candidates(self) -> list[list[tuple[str, bool]]]:
        return [row for _, part in self._shards("train") for row in self.candidates(part)]

    # -- summary ---------------------------------------------------------------------------------------------------

    def _write_summary(self) -> None:
        summary, samples = summarise(self)
        write_json(self.store.directory / "summary.json", summary)
        samples.to_parquet(str(self.store.directory / "samples.parquet"))


def examples_in(missing: Sequence[tuple]) -> int:
    """Number of examples in shards that end with their slice."""
    return sum(entry[-1].stop - entry[-1].start for entry in missing)


def without(settings: dict, key: str) -> dict:
    """A copy that leaves out what does not decide the content."""
    return {k: v for k, v in settings.items() if k != key}


def fit(chats: list[ChatFormat], prompt: str, response: str, max_length: int) -> tuple[str, bool, int]:
    """(text, cut, reason): the response if it fits every tokenizer, else its longest prefix at a target-token boundary.

    `chats[0]` is the target's. A text that the target's own tokenizer changes cannot be aligned at all; for a source
    that is found out where it is captured.
    """
    if not response:
        return "", False, EMPTY
    encoded, able = [], []
    for i, chat in enumerate(chats):
        try:
            encoded.append(chat.encode(prompt, response))
            able.append(chat)
        except TokenBytesMismatch as error:
            if i == 0:
                return "", False, NORMALISER if error.reason == "normaliser" else DECODER
    if all(len(e.input_ids) <= max_length for e in encoded):
        return response, False, OK
    raw = response.encode()
    limit = min(last_byte(e, max_length) for e in encoded)
    for stop in sorted({f for _, f in encoded[0].spans if 0 < f <= limit}, reverse=True):
        try:
            text = raw[:stop].decode()
        except UnicodeDecodeError:
            continue
        if all(len(c.encode(prompt, text, complete=False).input_ids) <= max_length for c in able):
            return text, True, OK
    return "", False, TOO_LONG


def last_byte(encoded: Encoded, max_length: int) -> int:
    """Bytes of the response that lie in the first max_length tokens."""
    kept = max(0, min(encoded.stop, max_length) - encoded.start)
    return encoded.spans[kept - 1][1] if kept else 0


def announce(command: str, preparation: Preparation, processes: int = 1, first_step: int | None = None) -> None:
    """The first line of a run: what it does, on what, with which alignment engine, and how long it should take."""
    p, recipe = preparation, preparation.recipe
    schedule = recipe.schedule if isinstance(recipe.schedule, str) else f"{len(recipe.schedule)} stages"
    size = f"{len(p.splits['train'])} instructions"
    if first_step is not None:
        size += f", {plan(recipe, len(p.splits['train']))[-1].stop - first_step} steps ({schedule})"
    ranks = f", {processes} processes" if processes > 1 else ""
    print(
        f"profuser.{command} {p.name}: {', '.join(s.name for s in recipe.sources)} -> {recipe.target}, {size}; {p.device}, "
        f"{torch.get_num_threads()} threads{ranks}; alignment: {ENGINE}; {sentence(expected(p, first_step))}",
        flush=True,
    )


def open_preparation(run: Run) -> Preparation:
    """A recipe's preparation, checked and not yet run.

    Raises:
        ConfigError: the schedule needs judges and there are none; a function that the recipe names cannot be imported.
    """
    recipe = run.recipe
    if needs_inference(recipe) and not recipe.judges:
        schedule = recipe.schedule if isinstance(recipe.schedule, str) else "with an infer_weight"
        raise ConfigError(
            f"a schedule {schedule} needs judges for its inference mode, got none; add judges or set schedule: fusellm"
        )
    for judge in recipe.judges:
        if judge.function is not None:
            load_function(judge.function, f"judges: {judge.name}: function")
    if recipe.evaluation.match is not None:
        load_function(recipe.evaluation.match, "evaluation.match")
    preparation = Preparation(run)
    heldout = preparation.splits.get("heldout")
    if heldout and recipe.evaluation.match is None and not any(row["response"] for row in heldout):
        raise DataError(
            f"{recipe.data.heldout} must hold a ground truth to score by, every response is empty; fill them in, or give a "
            "function as evaluation.match"
        )
    return preparation


def prepare(run: Run) -> Store:
    """Bring the store of a recipe to completeness and return it; raises what open_preparation does."""
    return open_preparation(run).run()


def needs_inference(recipe: Recipe) -> bool:
    return any(s.infer_weight > 0 for s in stages_of(recipe))


def run_command(argv: list[str]) -> None:
    run = parse_run("prepare", argv, {"fresh": "rename an existing store aside and start over"}, __doc__.split("\n")[0])
    if run.options["fresh"] and (aside := set_aside(run.store_dir)):
        print(f"renamed the old store to {aside}")
    preparation = open_preparation(run)
    announce("prepare", preparation)
    store = preparation.run()
    if line := handled_line(read_json(store.directory / "summary.json")):
        print(line)
    print(
        f"store complete: {store.directory} ({len(store.manifest['shards'])} shards); summary in {Path(store.directory) / 'summary.json'}"
    )


if __name__ == "__main__":
    main_of(run_command)
