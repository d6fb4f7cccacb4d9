"""A source that writes on and judges what others would write, behind one prompt.

What all sources have written together, the response, is the same text for all of them, and each reads it in its own tokens
and chat template. When a segment is added, the whole conversation is tokenised again, because a tokenizer may merge across the
seam. The key-value cache keeps what stays the same, so only the tokens from the first change on are read. What a source has to
compute is asked for (`asking.py`), so that its model may do it for several prompts at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from profuser.generate.asking import Ask
from profuser.generate.boundaries import word_ends
from profuser.kernels.head import Head
from profuser.models.branches import Branches
from profuser.text.chat import ChatFormat
from profuser.text.conversation import Prompt
from profuser.text.encoded import Encoded
from profuser.text.token_bytes import TokenBytesMismatch

END = -1
"""In place of a token: any of the end tokens."""


@dataclass(frozen=True, slots=True)
class Voice:
    """A source: its name, chat format, model and head."""

    name: str
    chat: ChatFormat
    model: PreTrainedModel
    head: Head


@dataclass(frozen=True, slots=True)
class Writing:
    """What a source writes behind the response, as far as it has been asked.

    text: whole characters only. ended: whether it ends its turn there.
    """

    text: str
    ended: bool


class Speaker:
    """One source behind one prompt.

    Attributes:
        response: what has been written so far.
        tokens: how many tokens it is in the source's own vocabulary.
    """

    def __init__(self, voice: Voice, prompt: Prompt):
        self.voice, self.prompt = voice, prompt
        self.response = ""
        self.tokens = 0
        self._opening = voice.chat.prompt_ids(prompt)  # behind which the source writes
        self._base = self._opening
        self._said: list[int] = []  # the source's own tokens behind the base
        self._entropies: list[float] = []  # of the distributions from which they were taken, in nats
        self._pending = b""  # bytes of a character of which only a part has been said
        # Whether the model can judge segments as branches, before and behind its window.
        self._checked: set[bool] = set()

    @functools.cached_property
    def _read(self) -> Branches:
        """What the source has read: nothing before it is asked, then the prompt and what stands behind it."""
        return Branches(self.voice.model, self._base, "leave the source out, or use decode.method mixture")

    async def writes(self, at_least: int) -> Writing:
        """What the source writes greedily behind the response: `at_least` tokens, unless it ends its turn before."""
        ends, ended = set(self.voice.chat.end_ids), False
        while True:
            ended = bool(self._said) and self._said[-1] in ends
            if ended or len(self._said) >= at_least:
                break
            row = await self.row()
            self._said.append(int(row.argmax()))
            self._entropies.append(float(-(row.exp() * row).nan_to_num().sum()))
        data = self.voice.chat.token_bytes
        said = b"".join(data.pieces[i] or b"" for i in self._said if i < len(data.pieces))
        text = said.decode(errors="ignore") if ended else _whole_characters(said)
        return Writing(text if self.response else text.lstrip(), ended)

    async def row(self) -> torch.Tensor:
        """(V,) fp32, the log-probabilities of the next token behind what the source has read and written."""
        ids = [*self._base, *self._said]
        return (await Ask(self.voice.head, self._read, ids, [(len(ids), ())]))[0]

    def says(self, token: int) -> str:
        """Appends one of the source's own tokens to the response, in place of what it has written itself.

        Returns:
            The text by which the response grows: whole characters only, so it may be empty, and no spaces at its beginning.
        """
        self._base, self._said, self._entropies = [*self._base, token], [], []
        self.tokens += 1
        pieces = self.voice.chat.token_bytes.pieces
        data = self._pending + ((pieces[token] or b"") if token < len(pieces) else b"")
        text = _whole_characters(data)
        self._pending = data[len(text.encode()) :]
        text = text if self.response else text.lstrip()
        self.response += text
        return text

    def cuts_at(self, text: str, place: int) -> bool:
        """Whether one of the source's tokens ends behind the first `place` characters of a text behind the response."""
        encoded = self.encoded(self.response + text)
        if encoded is None:
            return False
        byte = len((self.response + text[:place]).encode())
        return any(stop == byte for _, stop in encoded.spans)

    def encoded(self, response: str, *, complete: bool = False) -> Encoded | None:
        """The conversation with a response in the source's tokens, or None if they cannot hold its text."""
        try:
            return self.voice.chat.encode(self.prompt, response, complete=complete)
        except TokenBytesMismatch:
            return None

    async def likelihoods(self, segments: Sequence[str | None]) -> list[float]:
        """The mean NLL of each segment behind the response, in nats per own token; None is the end of the turn.

        The tokens of a segment are all that hold a byte of it. It is +inf for a segment that the source's tokens cannot hold.
        """
        # The states behind which each of a segment's tokens is predicted. Those that the source has read already, as those of
        # its own segment, cost nothing, and the others are computed in one pass.
        read, done = self._read.ids, len(self.response.encode())
        branches, labels, counts = [], [], []
        for segment in segments:
            encoded = None if segment is None else self.encoded(self.response + segment)
            if segment is None:
                branches.append((len(self._base), ()))
                labels.append(END)
            elif encoded is not None:
                ids = encoded.input_ids[: encoded.stop]
                first = encoded.start + next(n for n, (_, stop) in enumerate(encoded.spans) if stop > done)
                common = next((n for n, (a, b) in enumerate(zip(read, ids)) if a != b), min(len(read), len(ids)))
                branches += [(min(n, common), tuple(ids[common:n])) for n in range(first, len(ids))]
                labels += ids[first:]
            counts.append(len(labels) - sum(counts))
        config = self.voice.model.config.get_text_config()
        if (beyond := len(read) > (getattr(config, "sliding_window", None) or math.inf)) not in self._checked:
            self._read.check()
            self._checked.add(beyond)
        nlls: list[float] = []
        ends = list(self.voice.chat.end_ids)
        if branches:
            log_probabilities = await Ask(self.voice.head, self._read, read, branches)
            for row, label in zip(log_probabilities, labels, strict=True):
                nlls.append(-float(row[ends].logsumexp(0) if label == END else row[label]))
        means, begin = [], 0
        for count in counts:
            means.append(sum(nlls[begin : begin + count]) / count if count else float("inf"))
            begin += count
        return means

    @property
    def entropy(self) -> float:
        """The entropy of the distribution behind the response in nats. `writes` must have been asked before."""
        return self._entropies[0]

    def goes_on_alone(self, segment: str) -> list[float]:
        """Appends the source's own segment to the response, in the tokens that it wrote, if these are the segment.

        Returns:
            The entropies behind which the segment's tokens were taken.
        """
        pieces, wanted = self.voice.chat.token_bytes.pieces, segment.encode()
        data, count = b"", 0
        while count < len(self._said) and len(data) < len(wanted):
            i, count = self._said[count], count + 1
            data += (pieces[i] or b"") if i < len(pieces) else b""
            data = data if self.response else data.lstrip()
        entropies = self._entropies[:count]
        if data != wanted:
            self.goes_on(segment)
            return entropies
        self._base, self._said = [*self._base, *self._said[:count]], self._said[count:]
        self._entropies = self._entropies[count:]
        self.response += segment
        self.tokens += count
        return entropies

    def goes_on(self, segment: str) -> None:
        """Appends a segment to the response."""
        self.response += segment
        encoded = self.encoded(self.response)
        assert encoded is not None, "a segment that a source cannot hold has no finite likelihood"
        known, ids = [*self._base, *self._said], encoded.input_ids[: encoded.stop]
        self._base, self.tokens = ids, encoded.stop - encoded.start
        # What the source has written beyond the segment stays, if its own tokens are those of the segment.
        self._said = known[len(ids) :] if known[: len(ids)] == ids else []
        self._entropies = self._entropies[len(self._entropies) - len(self._said) :]


def segment_of(writing: Writing) -> str | None:
    """The shortest segment of a writing that ends with a word, or None if it has none yet. Empty is the end of the turn."""
    if (place := next(word_ends(writing.text), None)) is not None:
        return writing.text[:place]
    if writing.ended:
        return writing.text if writing.text.strip() else ""
    return None


def _whole_characters(data: bytes) -> str:
    """The text of bytes, without a character of which only a part is there."""
    for size in range(4):
        try:
            return data[: len(data) - size].decode()
        except UnicodeDecodeError:
            continue
    return data.decode(errors="replace")
