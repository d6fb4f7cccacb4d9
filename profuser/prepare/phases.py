"""Makes a store of aligned targets from models and prompts, in four phases. Each can be interrupted between two shards.

1. Every source scores the ground truth, for the training mode, and answers the prompts.
2. The judges score the answers to the training prompts and vote on them, for the inference mode.
3. Of every prompt, the source that won is captured on its own response.
4. All captures are aligned to the target's tokens.

A store has up to three splits: `train` with both modes, `validation` with the ground truth only, and `heldout` with the
ground truth and with the sources' answers, which are scored beside the fused model's.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import product

import numpy as np
import torch
from transformers import PreTrainedModel

from profuser.alignment.engine import CppByteAligner, byte_aligner
from profuser.alignment.follow_numbers import NumberFollower, number_rows
from profuser.alignment.fusellm import FuseLLMAligner
from profuser.alignment.ranges import ranges_needed
from profuser.alignment.reference import PythonByteAligner
from profuser.alignment.types import Aligned
from profuser.alignment.vocab_map import ByteOrder
from profuser.kernels.head import Head
from profuser.models.head import head_of
from profuser.models.load import check_vocabulary, load_model
from profuser.prepare.agreement import warnings_of
from profuser.prepare.capture import (
    BatchSize,
    CaptureRequest,
    ScoredResponse,
    capture_responses,
    pack_captures,
    unpack_captures,
)
from profuser.prepare.data import Row
from profuser.prepare.engines import Answering, Asked, Source, answering
from profuser.prepare.inputs import Inputs, Part
from profuser.prepare.judges import judge_fingerprint, load_judge
from profuser.prepare.responses import Response
from profuser.prepare.summary import no_signal_warning, write_summary
from profuser.prepare.target_writer import TargetText, TargetWriter
from profuser.prepare.vote_rules import NOBODY
from profuser.prepare.votes import Ballots, candidates_of, count_votes
from profuser.progress import Progress
from profuser.recipe.data import Split
from profuser.recipe.generation import Engine, Reasoning
from profuser.recipe.parse import Run
from profuser.recipe.schedule import Mode
from profuser.recipe.schema import SourceConfig
from profuser.stopping import working
from profuser.store import layout
from profuser.store.layout import Kind
from profuser.store.lease import Lease, hold
from profuser.store.store import Store, check_place, differing_settings
from profuser.store.unfinished import Unfinished
from profuser.text.chat import ChatFormat
from profuser.text.encoded import Encoded
from profuser.text.fit import Fitted, Verdict
from profuser.text.token_bytes import TokenBytesMismatch

Aligner = CppByteAligner | PythonByteAligner | FuseLLMAligner


@dataclass(frozen=True, slots=True)
class LoadedSource:
    """A source whose model is in memory, with what capturing needs of it."""

    name: str
    chat: ChatFormat
    model: PreTrainedModel
    head: Head
    byte_order: ByteOrder
    reasoning: Reasoning
    follower: NumberFollower | None
    batch_size: BatchSize


def prepare(run: Run) -> Store:
    """Makes the store of a recipe, or what is missing of it. It raises what Inputs.open and Preparation.begin raise."""
    with contextlib.ExitStack() as held:
        return Preparation.begin(Inputs.open(run), held).run()


class Preparation:
    """The phases of one preparation, which fill one store.

    Args:
        finished: the store, if nothing is to be made in it. Otherwise a store is begun, or the one that is there goes on.
        lease: this process's hold on the store.
    """

    def __init__(self, inputs: Inputs, finished: Store | None = None, lease: Lease | None = None):
        self.inputs, self.recipe, self.lease = inputs, inputs.recipe, lease
        self.seconds: dict[str, float] = {}
        self.finished = finished is not None
        self.store = finished if finished is not None else Store.build(inputs.store_dir, inputs.settings())

    @classmethod
    def begin(cls, inputs: Inputs, held: contextlib.ExitStack) -> Preparation:
        """Begins a preparation and holds its store in `held`, so that no other process makes another store of it meanwhile.

        A store in which nothing is to be made is held together with others that use it as it is.

        Raises:
            ConfigError: another process uses the store with other settings. And what Store.build raises.
        """
        directory, settings = inputs.store_dir, inputs.settings()
        check_place(directory)
        held.enter_context(working())
        held_with = partial(hold, directory, "store", asdict(settings), differing_settings)
        with contextlib.ExitStack() as reading:
            lease = reading.enter_context(held_with(writes=False))
            if (store := Store.finished(directory, settings)) is not None:
                held.enter_context(reading.pop_all())
                return cls(inputs, store, lease)
        lease = held.enter_context(held_with(writes=True))
        return cls(inputs, lease=lease)

    def run(self) -> Store:
        """Makes what is missing or damaged, and returns the complete store. From then on others may use it as well."""
        if not self.finished:
            if not self.store.complete or self.store.damaged():
                self._make()
            elif damaged := self.store.damaged_findings():
                print(f"store: {', '.join(damaged)} is damaged or missing: writing it again", flush=True)
                self._write_summary(self.store.seconds)
        if self.lease is not None:
            self.lease.share()
        for warning in (no_signal_warning(self.store.summary), *warnings_of(self.store.summary)):
            if warning:
                print(warning, flush=True)
        return self.store

    def _make(self) -> None:
        """Makes all shards that are missing or damaged, and the summary."""
        self.inputs.try_judges([judge for judge in self.recipe.judges if self.unmade(layout.scores(judge.name))])
        self.inputs.check_engines([source for source in self.recipe.sources if self._asks(source)])
        for phase in (self.capture_truth_and_answer, self.judge, self.capture_winners, self.align):
            start = time.monotonic()
            phase()
            self.seconds[phase.__name__] = round(time.monotonic() - start, 1)
            gc.collect()  # a model in a reference cycle would stay in memory beside those of the next phase
        self._write_summary(self.seconds)
        self.store.finish(self.seconds)

    def missing(self, kind: Kind) -> list[Part]:
        """Returns the parts whose shard of this kind is still to be made. A damaged shard counts as missing, and is dropped."""
        return [part for part in self.inputs.parts(kind.split) if not self.store.keep_intact(kind, part.number)]

    def unmade(self, kind: Kind) -> int:
        """Returns how many examples are in the missing shards of a kind. It looks at the manifest only."""
        return examples_in([part for part in self.inputs.parts(kind.split) if not self.store.has(kind, part.number)])

    def _asks(self, source: SourceConfig) -> bool:
        """Whether a source is still to answer prompts."""
        return any(
            self.inputs.given(source, split) is None and self.unmade(layout.responses(split, source.name))
            for split in self.inputs.rows
            if self.inputs.answered(split)
        )

    def settled_engines(self) -> list[Engine]:
        """Returns what "auto" has become for the sources that are still to answer prompts."""
        asked = [source for source in self.recipe.sources if self.recipe.generation_of(source).engine == "auto"]
        return [self.inputs.engines[source.name] for source in asked if self._asks(source)]

    # -- phase 1 ---------------------------------------------------------------------------------------------------

    def capture_truth_and_answer(self) -> None:
        """Lets every source score the ground truth and answer the prompts. It is loaded once for both."""
        splits = list(self.inputs.rows)
        for source, split in product(self.recipe.sources, splits):
            self._take_truth(split, source)
        for source in self.recipe.sources:
            # A source of which nothing is missing is not loaded at all.
            truth = {split: self.missing(layout.truth(split, source.name)) for split in splits}
            answers = {
                split: self.missing(layout.responses(split, source.name))
                for split in splits
                if self.inputs.answered(split)
            }
            for split in [split for split in answers if self.inputs.given(source, split) is not None]:
                self._take(split, answers.pop(split), source)
            to_score, to_answer = sum(map(examples_in, truth.values())), sum(map(examples_in, answers.values()))
            if not to_score + to_answer:
                continue

            engine = self.inputs.engines[source.name]
            loaded = self._load(source) if to_score or engine == "transformers" else None
            if loaded is not None:
                with Progress(f"{source.name}: score the ground truth", to_score, "examples") as bar:
                    for split, parts in truth.items():
                        for part in parts:
                            fitted = self._truth_of(split, part, source)
                            self._capture(layout.truth(split, source.name), part, loaded, fitted, bar)
            # Another engine may need all memory, so that the model is let go before it starts.
            model = loaded.model if loaded is not None and engine == "transformers" else None
            loaded = None
            if to_answer:
                if model is None:
                    free_memory()
                self._answer_all(source, engine, answers, to_answer, model)
            model = None  # frees the memory before the next source is loaded

    def _truth_of(self, split: Split, part: Part, source: SourceConfig) -> list[Fitted]:
        """Returns the ground truths of a part that a source is to score, one per example."""
        routed = part.of(self.inputs.routed(split, source.name))
        of_part = part.of(self.inputs.fitted[split])
        return [text if asked else Fitted.unused(Verdict.NOT_WINNER) for text, asked in zip(of_part, routed)]

    def _take_truth(self, split: Split, source: SourceConfig) -> None:
        """Writes the shards of a source's captures of the ground truth, if the user has given its log-probabilities."""
        if source.logprobs is None or not self.inputs.scores_given(source, split):
            return
        parts = self.missing(layout.truth(split, source.name))
        for part in parts:
            texts = [row["response"] for row in part.of(self.inputs.rows[split])]
            self._take_captures(
                layout.truth(split, source.name), part, source, self._truth_of(split, part, source), texts
            )
        if parts:
            print(
                f"{source.name}: {examples_in(parts)} {split} examples have their log-probabilities from {source.logprobs}",
                flush=True,
            )

    def _take_captures(
        self, kind: Kind, part: Part, source: SourceConfig, fitted: Sequence[Fitted], texts: Sequence[str]
    ) -> None:
        """Writes one shard of captures from the log-probabilities that the user has given.

        Args:
            fitted: the texts, one per example. An example whose verdict is not OK has none.
            texts: the same, before any of them was cut.
        """
        given, chat = self.inputs.logprobs(source), self.inputs.chats[source.name]
        verdicts, rows = [f.verdict for f in fitted], part.of(self.inputs.rows[kind.split])
        scored: dict[int, ScoredResponse] = {}
        for i, own, _ in self._encodings(rows, chat, fitted, verdicts):
            assert given is not None
            scored[i] = given.scored(rows[i]["prompt"], texts[i], own, len(fitted[i].text.encode()))
        arrays = pack_captures(fitted, verdicts, scored, self.recipe.capture.top_k, len(chat.tokenizer))
        self.store.put(kind, part.number, arrays, examples=len(part))

    def _encodings(
        self, rows: Sequence[Row], chat: ChatFormat, fitted: Sequence[Fitted], verdicts: list[Verdict]
    ) -> Iterator[tuple[int, Encoded, Encoded]]:
        """Encodes texts for a source and for the target.

        Yields:
            (index of the text, in the source's tokens, in the target's tokens) for every text whose verdict is OK. Where a tokenizer
            does not hold its bytes, `verdicts` gets that instead.
        """
        for i, (row, text) in enumerate(zip(rows, fitted, strict=True)):
            if text.verdict != Verdict.OK:
                continue
            try:
                own = chat.encode(row["prompt"], text.text, complete=not text.cut)
                theirs = self.inputs.target.encode(row["prompt"], text.text, complete=not text.cut)
            except TokenBytesMismatch as error:
                verdicts[i] = Verdict.of(error)
                continue
            yield i, own, theirs

    def _take(self, split: Split, parts: Sequence[Part], source: SourceConfig) -> None:
        """Writes the shards of a source's responses that the user has given."""
        given = self.inputs.given(source, split)
        assert given is not None
        for part in parts:
            count = self.inputs.responses_per_prompt(split)
            asked = self._asked_of(split, part, source)
            rows = [self.inputs.rows[split][number] for number in asked]
            responses = self._with_others(part, asked, given.of(rows, count), count)
            self.store.put_json(layout.responses(split, source.name), part.number, responses, examples=len(part))
        if parts:
            print(
                f"{source.name}: {examples_in(parts)} {split} prompts have their responses from {source.responses}",
                flush=True,
            )

    def _load(self, source: SourceConfig) -> LoadedSource:
        """Loads a source's model and checks that it fits its tokenizer."""
        model = load_model(source, self.inputs.dtype, self.inputs.device, spreads=True)
        head, chat = head_of(model), self.inputs.chats[source.name]
        check_vocabulary(source.name, chat, len(head.weight))
        order = ByteOrder(chat.token_bytes, head.weight.shape[0])
        follower = None
        if self.recipe.align.follow_numbers:
            top_k = min(self.recipe.capture.top_k, head.weight.shape[0])
            follower = NumberFollower(self.inputs.target.token_bytes, chat.token_bytes, model, head, top_k)
        size = BatchSize(self.recipe.capture.batch_size, lambda line: print(f"{source.name}: {line}", flush=True))
        return LoadedSource(source.name, chat, model, head, order, self.recipe.reasoning_of(source), follower, size)

    def _answer_all(
        self,
        source: SourceConfig,
        engine: Engine,
        missing: Mapping[Split, Sequence[Part]],
        prompts: int,
        model: PreTrainedModel | None,
    ) -> None:
        """Lets a source answer the prompts of all parts that are missing. `model` is its model, where transformers answers."""
        asked = Source.of(self.recipe, source, self.inputs.chats[source.name], self.inputs.dtype)
        left_out: Counter[Verdict] = Counter()
        by = "" if engine == "transformers" else f" ({engine})"
        with (
            answering(engine, asked, model) as answer,
            Progress(f"{source.name}: answer the prompts{by}", prompts, "prompts") as bar,
        ):
            for split, parts in missing.items():
                for part in parts:
                    left_out += self._answer(split, part, source, answer, bar)
        if line := self._left_out(source, left_out):
            print(line, flush=True)

    def _answer(
        self, split: Split, part: Part, source: SourceConfig, answer: Answering, bar: Progress
    ) -> Counter[Verdict]:
        """Writes one shard of a source's responses to the prompts of a part.

        Returns:
            How many of them the training has to leave out although they are finished, by the reason.
        """
        numbers = self._asked_of(split, part, source)
        prompts = [self.inputs.rows[split][number]["prompt"] for number in numbers]
        count = self.inputs.responses_per_prompt(split)
        kind, engine = layout.responses(split, source.name), self.inputs.engines[source.name]
        with Unfinished(self.store.directory, kind, part.number, engine) as kept:
            answers = answer(Asked(split, prompts, numbers, count, kept), bar.update)
            whole = self._with_others(part, numbers, answers, count)
            self.store.put_json(kind, part.number, whole, examples=len(part))
        bar.update(len(part) - len(numbers))
        finished = [r for of_prompt in answers for r in of_prompt if r.finished and split == "train"]
        return Counter(r.verdict for r in finished if r.verdict != Verdict.OK)

    def _asked_of(self, split: Split, part: Part, source: SourceConfig) -> list[int]:
        """Returns the numbers of a part's examples that a source is asked about."""
        routed = self.inputs.routed(split, source.name)
        return [number for number in range(part.first, part.stop) if routed[number]]

    def _with_others(
        self, part: Part, numbers: Sequence[int], answers: Sequence[list[Response]], count: int
    ) -> list[list[Response]]:
        """Returns the responses to all examples of a part. Those about which the source was not asked have empty ones."""
        given = dict(zip(numbers, answers, strict=True))
        nothing = [Response("", True, Verdict.NOT_WINNER)] * count
        return [given.get(number, nothing) for number in range(part.first, part.stop)]

    def _left_out(self, source: SourceConfig, verdicts: Counter[Verdict]) -> str:
        """Returns the line that says which of a source's responses are left out, and what helps; it is empty without any."""
        if not verdicts:
            return ""
        found = "; ".join(f"{n} x {verdict.label}" for verdict, n in sorted(verdicts.items()))
        keeps = self.recipe.reasoning_of(source) == "keep" and Verdict.CONTROL in verdicts
        fix = "; `reasoning: strip` for this source drops what stands before an answer" if keeps else ""
        return f"{source.name}: {found}{fix}"

    def _capture(self, kind: Kind, part: Part, source: LoadedSource, fitted: Sequence[Fitted], bar: Progress) -> None:
        """Writes one shard of captures: what a source says about one text per example of a part.

        Args:
            fitted: the texts, one per example. An example whose verdict is not OK has none.
        """
        # Encode the texts, and find out which prefix ranges and numbers the target will need of each.
        rows, tokens = part.of(self.inputs.rows[kind.split]), self.inputs.target.token_bytes
        its = source.chat.token_bytes
        verdicts = [f.verdict for f in fitted]
        requests: list[CaptureRequest] = []
        asked: list[int] = []  # the example, counted within the part, of every request
        for i, own, theirs in self._encodings(rows, source.chat, fitted, verdicts):
            ranges = ranges_needed(tokens, theirs, its, own, source.byte_order)
            numbers = number_rows(tokens, theirs, its, own) if source.follower else ()
            requests.append(CaptureRequest(own, len(fitted[i].text.encode()), ranges, numbers))
            asked.append(i)

        # Score them, and write the shard.
        top_k = self.recipe.capture.top_k
        scored: dict[int, ScoredResponse] = {}
        for i, response in capture_responses(
            source.model,
            source.head,
            requests,
            source.byte_order,
            top_k=top_k,
            batch_size=source.batch_size,
            follower=source.follower,
        ):
            scored[asked[i]] = response
            bar.update(1, tokens=len(requests[i].encoded.input_ids))
        bar.update(len(part) - len(scored))  # the examples that were not asked for are done as well
        arrays = pack_captures(fitted, verdicts, scored, top_k, source.head.weight.shape[0])
        self.store.put(kind, part.number, arrays, examples=len(part))

    # -- phase 2 ---------------------------------------------------------------------------------------------------

    def judge(self) -> None:
        """Lets every judge score every eligible response to the training prompts."""
        for config in self.recipe.judges:
            kind = layout.scores(config.name)
            missing = self.missing(kind)
            if not missing:
                continue
            score = load_judge(config, self.inputs.device, date=self.inputs.date)
            with Progress(f"{config.name}: score the responses", examples_in(missing), "prompts") as bar:
                for part in missing:
                    candidates = candidates_of(self.store, self.inputs.source_names, part.number)
                    # Judges are not shown empty texts, so that an empty text in a response's place keeps it from them.
                    shown = [[c.text if c.eligible else "" for c in of_prompt] for of_prompt in candidates]
                    with Unfinished(self.store.directory, kind, part.number, judge_fingerprint(config)) as kept:
                        scores = score(part.of(self.inputs.rows["train"]), shown, bar.update, kept)
                        self.store.put(kind, part.number, {"scores": scores}, examples=len(part))
            del score

    @cached_property
    def ballots(self) -> Ballots | None:
        """The vote over the training split; None where there are no judges. It needs the responses and all scores."""
        return count_votes(self.store, self.recipe) if self.recipe.judges else None

    # -- phase 3 ---------------------------------------------------------------------------------------------------

    def capture_winners(self) -> None:
        """Captures what each source says about those of its responses that won the vote."""
        if self.ballots is None:
            return
        for index, source in enumerate(self.recipe.sources):
            kind = layout.winners(source.name)
            missing = self.missing(kind)
            if not missing:
                continue
            won = {part: self._won(index, part) for part in missing}
            nothing = all(text.verdict != Verdict.OK for of_part in won.values() for text in of_part)
            if nothing or self._winners_given(index, source):
                for part, fitted in won.items():
                    texts = [
                        self.ballots.winning_text(part.first + i) if text.verdict == Verdict.OK else ""
                        for i, text in enumerate(fitted)
                    ]
                    self._take_captures(kind, part, source, fitted, texts)
                if not nothing:
                    print(
                        f"{source.name}: its responses that won have their log-probabilities from {source.logprobs}",
                        flush=True,
                    )
                continue
            loaded = self._load(source)
            with Progress(f"{source.name}: capture the responses that won", examples_in(missing), "prompts") as bar:
                for part, fitted in won.items():
                    self._capture(kind, part, loaded, fitted, bar)
            del loaded

    def _won(self, source: int, part: Part) -> list[Fitted]:
        """Returns the responses of a source to the prompts of a part that won, one per example; those of others are unused."""
        assert self.ballots is not None
        return [
            self._winning(example)
            if self.ballots.winning_source(example) == source
            else Fitted.unused(Verdict.NOT_WINNER)
            for example in range(part.first, part.stop)
        ]

    def _winners_given(self, index: int, source: SourceConfig) -> bool:
        """Whether a source's log-probabilities of its winning responses are in a file. They are where it has any of them."""
        given, ballots = self.inputs.logprobs(source), self.ballots
        return (
            given is not None
            and ballots is not None
            and any(
                ballots.winning_source(example) == index and given.has(row["prompt"], ballots.winning_text(example))
                for example, row in enumerate(self.inputs.rows["train"])
            )
        )

    def _winning(self, example: int) -> Fitted:
        """Returns the response to a training prompt that won the vote, cut if it is too long for its source or the target."""
        assert self.ballots is not None
        winner = self.ballots.winning_source(example)
        if winner == NOBODY:
            return Fitted.unused(Verdict.NOT_WINNER)
        source = self.inputs.chats[self.recipe.sources[winner].name]
        prompt, text = self.inputs.rows["train"][example]["prompt"], self.ballots.winning_text(example)
        return self.inputs.fit([source], prompt, text)

    # -- phase 4 ---------------------------------------------------------------------------------------------------

    def align(self) -> None:
        """Aligns all captures to the target's tokens and writes the shards that the trainer reads."""
        aligners = [self._aligner(self.inputs.chats[source.name]) for source in self.recipe.sources]
        for split in self.inputs.rows:
            kind = layout.targets(split)
            missing = self.missing(kind)
            with Progress(f"align {split}", examples_in(missing), "examples") as bar:
                for part in missing:
                    arrays = self._align_part(split, part, aligners, bar)
                    self.store.put(kind, part.number, arrays, examples=len(part))

    def _aligner(self, source: ChatFormat) -> Aligner:
        """Makes the aligner from a source's tokens to the target's that the recipe asks for."""
        config, top_k = self.recipe.align, self.recipe.capture.top_k
        target = self.inputs.target
        if config.mode == "fusellm":
            return FuseLLMAligner(target, source, top_k=top_k, fallback=config.fallback)
        threads = torch.get_num_threads()
        return byte_aligner(target, source, top_k=top_k, min_reliability=config.min_reliability, threads=threads)

    def _align_part(
        self, split: Split, part: Part, aligners: Sequence[Aligner], bar: Progress
    ) -> dict[str, np.ndarray]:
        """Returns the arrays of one shard of targets. It has both modes in the training split, else the ground truth only."""
        # Read what the sources said about the part's examples, by mode and source.
        kinds = {Mode.TRAINING: [layout.truth(split, name) for name in self.inputs.source_names]}
        if split == "train" and self.recipe.judges:
            kinds[Mode.INFERENCE] = [layout.winners(name) for name in self.inputs.source_names]
        scored = {
            mode: [unpack_captures(self.store.get(kind, part.number)) for kind in of_mode]
            for mode, of_mode in kinds.items()
        }

        # Collect the texts that the target learns, one per example and mode. What is left out is counted with its reason.
        writer = TargetWriter(
            len(self.recipe.sources), len(self.inputs.target.tokenizer), self.recipe.align.min_ce_unit
        )
        texts: list[TargetText] = []
        for i, row in enumerate(part.of(self.inputs.rows[split])):
            for mode in kinds:
                example = part.first + i
                of_mode = scored[Mode.TRAINING if self._teaches_truth(mode, example) else mode]
                text = self._target_text(split, mode, example, row, [source[i] for source in of_mode])
                if isinstance(text, Verdict):
                    writer.skip(mode, text)
                else:
                    texts.append(text)

        # Align all texts for one source after the other, then write each text with what all sources say about it.
        by_source = [align_source(aligner, texts, source) for source, aligner in enumerate(aligners)]
        for n, text in enumerate(texts):
            writer.add(text, [aligned.get(n) for aligned in by_source])
        bar.update(len(part), tokens=sum(len(text.encoded.input_ids) for text in texts))
        return writer.arrays()

    def _teaches_truth(self, mode: Mode, example: int) -> bool:
        """Whether an example teaches its ground truth in a mode: in inference mode where the vote gave no signal, if so asked."""
        if mode == Mode.TRAINING:
            return True
        assert self.ballots is not None
        return self.recipe.judging.no_signal == "ground_truth" and self.ballots.winning_source(example) == NOBODY

    def _target_text(
        self, split: Split, mode: Mode, example: int, row: Row, scored: list[ScoredResponse | None]
    ) -> TargetText | Verdict:
        """Returns the text that the target learns from an example in one mode, or the reason why there is none."""
        fitted = self.inputs.fitted[split][example] if self._teaches_truth(mode, example) else self._winning(example)
        if fitted.verdict != Verdict.OK:
            return fitted.verdict
        try:
            encoded = self.inputs.target.encode(row["prompt"], fitted.text, complete=not fitted.cut)
        except TokenBytesMismatch as error:
            return Verdict.of(error)
        return TargetText(example, mode, fitted.text, encoded, scored)

    def _write_summary(self, seconds: Mapping[str, float]) -> None:
        write_summary(self.inputs, self.store, self.ballots, seconds)


def align_source(aligner: Aligner, texts: Sequence[TargetText], source: int) -> dict[int, Aligned]:
    """Aligns what one source says about the texts. The result is by index in `texts`.

    A text is missing from the result where the source was not captured on it, or gave NaN.
    """
    scored = {n: r for n, text in enumerate(texts) if (r := text.scored[source]) is not None and np.isfinite(r.nll)}
    found = aligner.align_batch(
        [texts[n].text.encode() for n in scored],
        [texts[n].encoded for n in scored],
        [response.capture for response in scored.values()],
    )
    return dict(zip(scored, found))


def free_memory() -> None:
    """Gives back what a model that is no longer needed has left in memory, and what torch keeps of a GPU's."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def examples_in(parts: Sequence[Part]) -> int:
    """Returns how many examples some parts have together."""
    return sum(map(len, parts))
