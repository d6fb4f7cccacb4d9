"""What each shard of a store is made from, by which a preparation knows whether one that is there can stay.

A shard names the rows it covers and, where it was made from other shards, what they held: the scores are those of certain responses,
the winners those of a certain vote, the targets hold certain captures. It is made again as soon as any of that is another thing,
whether rows were added to the data or a source has answered again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from profuser.prepare.inputs import Inputs
from profuser.prepare.votes import Ballots, count_votes
from profuser.recipe.schema import SourceConfig
from profuser.store import layout
from profuser.store.division import Part
from profuser.store.layout import Kind
from profuser.store.store import Store


class Origins:
    """What the shards of a store are made from, for the inputs of a recipe."""

    def __init__(self, inputs: Inputs, store: Store):
        self.inputs, self.store = inputs, store
        self._ballots: Ballots | None = None
        self._known: dict[str, str] = {}  # the origins by the shards' names

    @property
    def ballots(self) -> Ballots | None:
        """The vote over the training split. It is None where there are no judges, and as long as they have not scored all responses."""
        judges = self.inputs.recipe.judges
        if self._ballots is None and judges and all(self._made(layout.scores(judge.name)) for judge in judges):
            self._ballots = count_votes(self.store, self.inputs.recipe)
        return self._ballots

    def is_made(self, kind: Kind, part: Part) -> bool:
        """Whether a part's shard is there, and is made from what there is now."""
        origin = self.of(kind, part)
        return origin is not None and self.store.has(kind, part.number, origin)

    def of(self, kind: Kind, part: Part) -> str | None:
        """Returns a digest of what a part's shard is made from; None as long as not all of that is there."""
        name = kind.shard(part.number)
        if name not in self._known and (origin := self._origin(kind, part)) is not None:
            self._known[name] = origin  # what is there stays as it is, because the store is held
        return self._known.get(name)

    def _origin(self, kind: Kind, part: Part) -> str | None:
        if kind.folder == "truth":
            return self._of_truth(kind, part)
        if kind.folder == "responses":
            return self._of_responses(kind, part)
        names = self.inputs.source_names
        if kind.folder == "scores":
            return self._joined(part, [layout.responses("train", name) for name in names])
        captures = [layout.truth(kind.split, name) for name in names]
        if kind.split != "train" or not self.inputs.recipe.judges:
            return self._joined(part, captures, part.examples)
        if (ballots := self.ballots) is None:
            return None
        if kind.folder == "winners":
            source = names.index(kind.of)
            won = [ballots.winning_source(example) == source for example in part.examples]
            texts = [ballots.winning_text(example) if own else None for example, own in zip(part.examples, won)]
            return self._joined(part, [], [texts, said] if (said := self._said(kind, part, texts)) else texts)
        captures += [layout.winners(name) for name in names]
        return self._joined(part, captures, [part.examples, ballots.winner[part.examples].tolist()])

    def _of_truth(self, kind: Kind, part: Part) -> str:
        """Returns the digest of a part's rows, and behind it that of what a file says about their ground truths, if it has any."""
        if not self.inputs.scores_given(self._source(kind), kind.split):
            return part.digest
        return part.digest + self._said(kind, part, [row["response"] for row in part.of(self.inputs.rows[kind.split])])

    def _said(self, kind: Kind, part: Part, texts: Sequence[str | None]) -> str:
        """Returns a digest of what the file with a source's log-probabilities says about a text for each example of a part.

        It is empty where there is no such file, or where it has none of them.
        """
        if (given := self.inputs.logprobs(self._source(kind))) is None:
            return ""
        rows = part.of(self.inputs.rows[kind.split])
        said = [None if text is None else given.digest(row["prompt"], text) for row, text in zip(rows, texts)]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest() if any(said) else ""

    def _source(self, kind: Kind) -> SourceConfig:
        (source,) = (source for source in self.inputs.recipe.sources if source.name == kind.of)
        return source

    def _of_responses(self, kind: Kind, part: Part) -> str:
        """Returns the digest of a part's rows, and of the responses to them where a file has these."""
        source = self._source(kind)
        if (given := self.inputs.given(source, kind.split)) is None:
            return part.digest
        asked, rows = self.inputs.routed(kind.split, source.name), self.inputs.rows[kind.split]
        answered = [rows[example] for example in part.examples if asked[example]]
        responses = given.of(answered, self.inputs.responses_per_prompt(kind.split))
        return hashlib.sha256(json.dumps([part.digest, responses]).encode()).hexdigest()

    def _made(self, kind: Kind) -> bool:
        """Whether all shards of a kind are made."""
        return all(self.is_made(kind, part) for part in self.inputs.parts(kind.split))

    def _joined(self, part: Part, kinds: list[Kind], more: Any = None) -> str | None:
        """Returns the digest of a part's rows, of its shards of some kinds and of more, which must be JSON."""
        if not all(self.is_made(kind, part) for kind in kinds):
            return None
        shards = [self.store.sha256(kind, part.number) for kind in kinds]
        return hashlib.sha256(json.dumps([part.digest, shards, more]).encode()).hexdigest()
