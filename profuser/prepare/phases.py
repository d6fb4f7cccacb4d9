"""Makes a store of aligned targets from models and prompts, in four phases. Each can be interrupted between two shards.

Any number of processes may do so together (sharing.py). None begins a phase before all shards of the one before are there.

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
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial

import numpy as np
import torch

from profuser.alignment.engine import CppByteAligner, byte_aligner
from profuser.alignment.fusellm import FuseLLMAligner
from profuser.alignment.reference import PythonByteAligner
from profuser.alignment.types import Aligned
from profuser.models.load import free_memory
from profuser.prepare.agreement import warnings_of
from profuser.prepare.capture import (
    ScoredResponse,
    unpack_captures,
)
from profuser.prepare.capture_shards import LoadedSource, captured, load_source, taken
from profuser.prepare.data import Row
from profuser.prepare.engines import IN_PROCESS, Answering, Asked, Source, answering
from profuser.prepare.inputs import Inputs
from profuser.prepare.judges import judge_fingerprint, load_judge
from profuser.prepare.origins import Origins
from profuser.prepare.responses import Response
from profuser.prepare.sharing import Sharing, in_turn
from profuser.prepare.summary import no_signal_warning, write_summary
from profuser.prepare.target_writer import TargetText, TargetWriter
from profuser.prepare.vote_rules import NOBODY
from profuser.prepare.votes import Ballots, candidates_of
from profuser.progress import Progress
from profuser.recipe.data import Split
from profuser.recipe.generation import Engine
from profuser.recipe.parse import Run
from profuser.recipe.schedule import Mode
from profuser.recipe.schema import JudgeConfig, SourceConfig
from profuser.stopping import working
from profuser.store import layout
from profuser.store.division import Part
from profuser.store.layout import Kind
from profuser.store.lease import POLL_SECONDS, Lease, hold
from profuser.store.settings import differing_settings
from profuser.store.store import Store, check_place
from profuser.store.unfinished import Unfinished
from profuser.text.chat import ChatFormat
from profuser.text.fit import Fitted, Verdict
from profuser.text.token_bytes import TokenBytesMismatch

Aligner = CppByteAligner | PythonByteAligner | FuseLLMAligner


def prepare(run: Run) -> Store:
    """Makes the store of a recipe, or what is missing of it. Where rows of the data have changed, their shards are made again.

    It raises what Inputs.open and Preparation.begin raise.
    """
    with contextlib.ExitStack() as held:
        return Preparation.begin(Inputs.open(run), held, renews=True).run()


class Preparation:
    """The phases of one preparation, which fill one store.

    Args:
        store: the store, as far as it is there. lease: this process's hold on it.
    """

    def __init__(self, inputs: Inputs, store: Store, lease: Lease):
        self.inputs, self.recipe, self.store, self.lease = inputs, inputs.recipe, store, lease
        self.origins = Origins(inputs, store)
        self.sharing = Sharing(self.origins, lease)
        self.seconds: dict[str, float] = {}

    @classmethod
    def begin(cls, inputs: Inputs, held: contextlib.ExitStack, *, renews: bool = False) -> Preparation:
        """Begins a preparation and holds its store in `held`, so that no other process makes another store of it meanwhile.

        A store in which nothing is to be made is held together with others that use it as it is. Where something is to be made,
        it is held together with others that make it.

        Args:
            renews: whether the shards of rows that have changed may be made again (Store.build).
        Raises:
            ConfigError: another process uses the store with other settings. And what Store.build raises.
        """
        directory, settings = inputs.store_dir, inputs.settings()
        check_place(directory)
        held.enter_context(working())
        held_with = partial(hold, directory, "store", asdict(settings), differing_settings)
        with contextlib.ExitStack() as reading:
            lease = reading.enter_context(held_with(use="reads"))
            if (store := Store.finished(directory, settings)) is not None:
                held.enter_context(reading.pop_all())
                return cls(inputs, store, lease)
        inputs.try_logprobs()  # before a store is begun, which another file would not fit
        lease = held.enter_context(held_with(use="works"))
        if lease.use == "works":  # the others have put the store in order
            return cls(inputs, Store.open(directory, complete=False), lease)
        store = Store.build(directory, settings, inputs.divisions, renews=renews)
        store.drop_damaged()
        lease.share("works")
        return cls(inputs, store, lease)

    def run(self) -> Store:
        """Makes what is missing or damaged, and returns the complete store. From then on others may use it as well."""
        if self.lease.use == "works":
            self._make()
            self.lease.share("reads")
        for warning in (no_signal_warning(self.store.summary), *warnings_of(self.store.summary)):
            if warning:
                print(warning, flush=True)
        return self.store

    def _make(self) -> None:
        """Makes all shards that are missing, and the summary, or waits for those that others make."""
        self.inputs.try_judges([judge for judge in self.recipe.judges if self.unmade(layout.scores(judge.name))])
        self.inputs.check_engines([source for source in self.recipe.sources if self._asks(source)])
        for phase, kinds in self._phases().items():
            start = time.monotonic()
            phase()
            missing = len(self.sharing.missing(kinds))
            with Progress("wait for the other processes", missing, "shards", brief=True) as bar:
                while left := len(self.sharing.missing(kinds)):
                    bar.update(missing - left - bar.done)
                    time.sleep(POLL_SECONDS)
                    phase()  # in which a shard is free again if its process has been lost
            self.seconds[phase.__name__] = round(time.monotonic() - start, 1)
            gc.collect()  # a model in a reference cycle would stay in memory beside those of the next phase
        while not self.store.is_finished():
            if self.lease.claim(["summary"], lambda _: self.store.is_finished()) is None:
                time.sleep(POLL_SECONDS)
            else:
                self._conclude()

    def _phases(self) -> dict[Callable[[], None], list[Kind]]:
        """Returns the phases in their order, each with the kinds of shard that it makes."""
        splits, names = list(self.inputs.rows), self.inputs.source_names
        answered = [split for split in splits if self.inputs.answered(split)]
        return {
            self.capture_truth_and_answer: [
                *(layout.truth(split, name) for name in names for split in splits),
                *(layout.responses(split, name) for name in names for split in answered),
            ],
            self.judge: [layout.scores(judge.name) for judge in self.recipe.judges],
            self.capture_winners: [layout.winners(name) for name in names] if self.recipe.judges else [],
            self.align: [layout.targets(split) for split in splits],
        }

    def _conclude(self) -> None:
        """Writes the summary of a store whose shards are all there, and marks it as complete."""
        if self.store.complete:
            print(
                f"store: {', '.join(self.store.damaged_findings())} is damaged or missing: writing it again", flush=True
            )
            self.seconds = self.store.seconds
        write_summary(self.inputs, self.store, self.ballots, self.seconds)
        self.store.finish(self.seconds)

    def unmade(self, kind: Kind) -> int:
        """Returns how many examples are in the missing shards of a kind."""
        return sum(len(part) for _, part in self.sharing.missing([kind]).values())

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

    def _put(self, kind: Kind, part: Part, arrays: dict[str, np.ndarray]) -> None:
        """Writes the shard of a part, unless it is there: another machine makes it if this process has stood still for long."""
        if not self.origins.is_made(kind, part):
            self.store.put(kind, part.number, arrays, examples=len(part), origin=self._origin(kind, part))

    def _put_responses(self, kind: Kind, part: Part, responses: list[list[Response]]) -> None:
        """Writes the shard of a source's responses to a part, unless it is there."""
        if not self.origins.is_made(kind, part):
            self.store.put_json(kind, part.number, responses, examples=len(part), origin=self._origin(kind, part))

    def _origin(self, kind: Kind, part: Part) -> str:
        """What the shard of a part is made from, all of which is there."""
        origin = self.origins.of(kind, part)
        assert origin is not None, kind
        return origin

    # -- phase 1 ---------------------------------------------------------------------------------------------------

    def capture_truth_and_answer(self) -> None:
        """Lets every source score the ground truth and answer the prompts. It is loaded once for both."""
        for source in in_turn(self.recipe.sources):
            answers = [
                layout.responses(split, source.name) for split in self.inputs.rows if self.inputs.answered(split)
            ]
            given = [kind for kind in answers if self.inputs.given(source, kind.split) is not None]
            self._take(source, given)
            asked = [kind for kind in answers if kind not in given]
            self._answer_all(source, asked, self._capture_truth(source))

    def _take(self, source: SourceConfig, kinds: Sequence[Kind]) -> None:
        """Writes the shards of a source's responses that the user has given."""
        taken: Counter[Split] = Counter()
        label = f"{source.name}: read its responses"
        with closing(self.sharing.claimed(label, "prompts", kinds, lambda: None)) as claimed:
            for kind, part, _, bar in claimed:
                given, count = self.inputs.given(source, kind.split), self.inputs.responses_per_prompt(kind.split)
                assert given is not None
                asked = self._asked_of(kind.split, part, source)
                rows = [self.inputs.rows[kind.split][number] for number in asked]
                responses = self._with_others(part, asked, given.of(rows, count), count)
                self._put_responses(kind, part, responses)
                taken[kind.split] += len(part)
                bar.update(len(part))
        for split, prompts in taken.items():
            print(f"{source.name}: {prompts} {split} prompts have their responses from {source.responses}", flush=True)

    def _capture_truth(self, source: SourceConfig) -> LoadedSource | None:
        """Lets a source score the ground truth. It returns the source if it has been loaded for this."""
        loaded, label = None, f"{source.name}: score the ground truth"
        kinds = [layout.truth(split, source.name) for split in self.inputs.rows]
        given = [kind for kind in kinds if self.inputs.scores_given(source, kind.split)]
        self._take_truth(source, given)
        kinds = [kind for kind in kinds if kind not in given]
        with closing(
            self.sharing.claimed(label, "examples", kinds, partial(load_source, self.inputs, source))
        ) as claimed:
            for kind, part, loaded, bar in claimed:
                fitted = self._truth_of(kind.split, part, source)
                self._put(kind, part, captured(self.inputs, kind.split, part, loaded, fitted, bar))
        return loaded

    def _take_truth(self, source: SourceConfig, kinds: Sequence[Kind]) -> None:
        """Writes the shards of a source's captures of the ground truth whose log-probabilities the user has given."""
        label = f"{source.name}: read its log-probabilities"
        with closing(self.sharing.claimed(label, "examples", kinds, lambda: None)) as claimed:
            for kind, part, _, bar in claimed:
                fitted, rows = self._truth_of(kind.split, part, source), self.inputs.rows[kind.split]
                arrays = taken(
                    self.inputs, kind.split, part, source, fitted, lambda n, rows=rows: rows[n]["response"], bar
                )
                self._put(kind, part, arrays)

    def _truth_of(self, split: Split, part: Part, source: SourceConfig) -> list[Fitted]:
        """Returns the ground truths of a part that a source is to score, one per example."""
        routed = self.inputs.routed(split, source.name)[part.examples]
        of_part = part.of(self.inputs.fitted[split])
        return [text if asked else Fitted.unused(Verdict.NOT_WINNER) for text, asked in zip(of_part, routed)]

    def _answer_all(self, source: SourceConfig, kinds: Sequence[Kind], loaded: LoadedSource | None) -> None:
        """Lets a source answer the prompts. `loaded` is the source where it has just been loaded for something else."""
        engine = self.inputs.engines[source.name]
        # Another engine may need all memory, so that the model is let go before it starts.
        model = loaded.model if loaded is not None and engine in IN_PROCESS else None
        del loaded

        def begin() -> Answering:
            if engine not in IN_PROCESS:
                free_memory()
                return engines.enter_context(answering(engine, asked))
            return engines.enter_context(answering(engine, asked, model or load_source(self.inputs, source).model))

        asked = Source.of(self.recipe, source, self.inputs.chats[source.name], self.inputs.dtype)
        left_out: Counter[Verdict] = Counter()
        label = f"{source.name}: answer the prompts{'' if engine == 'transformers' else f' ({engine})'}"
        with (
            contextlib.ExitStack() as engines,
            closing(self.sharing.claimed(label, "prompts", kinds, begin)) as claimed,
        ):
            for kind, part, answer, bar in claimed:
                left_out += self._answer(kind.split, part, source, answer, bar)
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
        with Unfinished(self.store.directory, kind, part.number, f"{engine} {part.digest}") as kept:
            answers = answer(Asked(split, prompts, count, kept), bar.update)
            whole = self._with_others(part, numbers, answers, count)
            self._put_responses(kind, part, whole)
        bar.update(len(part) - len(numbers))
        finished = [r for of_prompt in answers for r in of_prompt if r.finished and split == "train"]
        return Counter(r.verdict for r in finished if r.verdict != Verdict.OK)

    def _asked_of(self, split: Split, part: Part, source: SourceConfig) -> list[int]:
        """Returns the numbers of a part's examples that a source is asked about."""
        routed = self.inputs.routed(split, source.name)
        return [number for number in part.examples if routed[number]]

    def _with_others(
        self, part: Part, numbers: Sequence[int], answers: Sequence[list[Response]], count: int
    ) -> list[list[Response]]:
        """Returns the responses to all examples of a part. Those about which the source was not asked have empty ones."""
        given = dict(zip(numbers, answers, strict=True))
        nothing = [Response("", True, Verdict.NOT_WINNER)] * count
        return [given.get(number, nothing) for number in part.examples]

    def _left_out(self, source: SourceConfig, verdicts: Counter[Verdict]) -> str:
        """Returns the line that says which of a source's responses are left out, and what helps; it is empty without any."""
        if not verdicts:
            return ""
        found = "; ".join(f"{n} x {verdict.label}" for verdict, n in sorted(verdicts.items()))
        keeps = self.recipe.reasoning_of(source) == "keep" and Verdict.CONTROL in verdicts
        fix = "; `reasoning: strip` for this source drops what stands before an answer" if keeps else ""
        return f"{source.name}: {found}{fix}"

    # -- phase 2 ---------------------------------------------------------------------------------------------------

    def judge(self) -> None:
        """Lets every judge score every eligible response to the training prompts."""
        for config in in_turn(self.recipe.judges):
            self._judge_by(config)

    def _judge_by(self, config: JudgeConfig) -> None:
        """Lets one judge score the responses."""
        label, kinds = f"{config.name}: score the responses", [layout.scores(config.name)]
        load = partial(load_judge, config, self.inputs.device, date=self.inputs.date)
        with closing(self.sharing.claimed(label, "prompts", kinds, load)) as claimed:
            for kind, part, score, bar in claimed:
                candidates = candidates_of(self.store, self.inputs.source_names, part.number)
                # Judges are not shown empty texts, so that an empty text in a response's place keeps it from them.
                shown = [[c.text if c.eligible else "" for c in of_prompt] for of_prompt in candidates]
                judged_by = f"{judge_fingerprint(config)} {self._origin(kind, part)}"
                with Unfinished(self.store.directory, kind, part.number, judged_by) as kept:
                    scores = score(part.of(self.inputs.rows["train"]), shown, bar.update, kept)
                    self._put(kind, part, {"scores": scores})

    @property
    def ballots(self) -> Ballots | None:
        """The vote over the training split; None where there are no judges. It needs the responses and all scores."""
        return self.origins.ballots

    # -- phase 3 ---------------------------------------------------------------------------------------------------

    def capture_winners(self) -> None:
        """Captures what each source says about those of its responses that won the vote."""
        if not self.recipe.judges:
            return
        for index, source in in_turn([*enumerate(self.recipe.sources)]):
            self._capture_won(index, source)

    def _capture_won(self, index: int, source: SourceConfig) -> None:
        """Captures what a source says about those of its responses that won the vote."""
        label, kinds = f"{source.name}: capture the responses that won", [layout.winners(source.name)]
        won = {name: self._won(index, part) for name, (_, part) in self.sharing.missing(kinds).items()}
        nothing = all(text.verdict != Verdict.OK for of_part in won.values() for text in of_part)
        if nothing or self._winners_given(index, source):
            with closing(self.sharing.claimed(label, "prompts", kinds, lambda: None)) as claimed:
                for kind, part, _, bar in claimed:
                    assert self.ballots is not None
                    fitted, whole = self._won(index, part), self.ballots.winning_text
                    self._put(kind, part, taken(self.inputs, kind.split, part, source, fitted, whole, bar))
            return
        with closing(
            self.sharing.claimed(label, "prompts", kinds, partial(load_source, self.inputs, source))
        ) as claimed:
            for kind, part, loaded, bar in claimed:
                fitted = self._won(index, part)
                self._put(kind, part, captured(self.inputs, kind.split, part, loaded, fitted, bar))

    def _won(self, source: int, part: Part) -> list[Fitted]:
        """Returns the responses of a source to the prompts of a part that won, one per example; those of others are unused."""
        assert self.ballots is not None
        return [
            self._winning(example)
            if self.ballots.winning_source(example) == source
            else Fitted.unused(Verdict.NOT_WINNER)
            for example in part.examples
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
        kinds = [layout.targets(split) for split in self.inputs.rows]
        with closing(self.sharing.claimed("align", "examples", kinds, self._aligners)) as claimed:
            for kind, part, aligners, bar in claimed:
                arrays = self._align_part(kind.split, part, aligners, bar)
                self._put(kind, part, arrays)

    def _aligners(self) -> list[Aligner]:
        """Makes the aligners from every source's tokens to the target's."""
        return [self._aligner(self.inputs.chats[source.name]) for source in self.recipe.sources]

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
        recipe = self.recipe
        writer = TargetWriter(
            len(recipe.sources),
            len(self.inputs.target.tokenizer),
            recipe.capture.top_k,
            recipe.align.min_ce_unit,
            self.inputs.keep,
        )
        texts: list[TargetText] = []
        for i, example in enumerate(part.examples):
            row = self.inputs.rows[split][example]
            for mode in kinds:
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
        truth = self._teaches_truth(mode, example)
        fitted = self.inputs.fitted[split][example] if truth else self._winning(example)
        if fitted.verdict != Verdict.OK:
            return fitted.verdict
        try:
            encoded = self.inputs.target.encode(row["prompt"], fitted.text, complete=not fitted.cut)
        except TokenBytesMismatch as error:
            return Verdict.of(error)
        # A response that won the vote is learnt from its own source, whatever the row says of the others.
        weights = self.inputs.weights(row) if truth else [1.0] * len(scored)
        return TargetText(example, mode, fitted.text, encoded, scored, weights)


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
