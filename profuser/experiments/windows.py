"""The experiments' texts, cut into windows that a source model reads, and what a target and the library make of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from profuser.alignment.align import AlignedText, align, prefix_ranges
from profuser.alignment.spans import match_spans
from profuser.alignment.types import INSIDE, SAME_SPAN, SHARED_PREFIX
from profuser.experiments.byte_sampler import ByteVocab, TextModel
from profuser.kernels.source_topk import Ranges, source_topk
from profuser.text.token_bytes import TokenBytes

TEXTS = Path(__file__).resolve().parent / "texts"
LANGUAGES = ("en", "code", "de", "ru", "zh")
KINDS = ("same span", "target longer", "target shorter", "inside")
TOP_K = 10
WINDOW = 512  # in source tokens


@dataclass(slots=True)
class Window:
    """A part of a text that the source reads in one forward pass."""

    language: str
    number: int
    text: str
    ids: list[int]
    spans: list[tuple[int, int]]


def windows(language: str, text: str, tokens: TokenBytes) -> list[Window]:
    """Cuts the text into parts of at most WINDOW source tokens. A line that is longer is a part of its own.

    The cuts are at blank lines where there are any in the second half of a part, and otherwise at the ends of lines.
    """
    lines = text.strip().split("\n")
    found = []
    while lines:
        n = 1
        while n < len(lines) and len(tokens.encode("\n".join(lines[: n + 1]).strip())) <= WINDOW:
            n += 1
        if n < len(lines):
            n = next((i for i in range(n, n // 2, -1) if not lines[i].strip()), n)
        part = "\n".join(lines[:n]).strip()
        lines = lines[n:]
        if part:
            ids = tokens.encode(part)
            found.append(Window(language, len(found), part, ids, tokens.spans(ids, part)))
    return found


def pretrained_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(directory, local_files_only=True))


class Source:
    """The source model with its tokenizer, and its distributions for windows."""

    def __init__(self, directory: Path):
        self.tokenizer = pretrained_tokenizer(directory)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
        self.tokens = TokenBytes(self.tokenizer)
        self.vocab = ByteVocab(self.tokens.pieces)
        self.lead = self.tokens.encode("\n")
        self.windows = [
            w for name in LANGUAGES for w in windows(name, (TEXTS / f"{name}.txt").read_text("utf-8"), self.tokens)
        ]

    def read(self, window: Window) -> TextModel:
        return TextModel(self.model, self.lead, window.ids)

    def topk(self, window: Window, text_model: TextModel, ranges: Ranges | None = None) -> tuple[torch.Tensor, ...]:
        """What `source_topk` gives for the window's tokens."""
        head = self.model.get_output_embeddings().weight.detach()
        return source_topk(text_model.hidden[:-1], head, torch.tensor(window.ids), TOP_K, ranges=ranges)


class Target:
    """A target's tokenizer, and what it makes of windows."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase):
        self.name = name
        self.tokenizer = tokenizer
        self.tokens = TokenBytes(tokenizer)
        self.by_bytes: dict[bytes, int] = {}
        for i, piece in enumerate(self.tokens.pieces):
            # In a SentencePiece vocabulary a byte-fallback token precedes the plain token of the same byte, which text uses.
            if piece and (piece not in self.by_bytes or self.by_bytes[piece] in self.tokens.byte_tokens):
                self.by_bytes[piece] = i
        self._known: dict[tuple[str, int], tuple[list[int], list[tuple[int, int]]]] = {}

    def of(self, window: Window) -> tuple[list[int], list[tuple[int, int]]]:
        """The token ids of a window and their byte spans."""
        key = (window.language, window.number)
        if key not in self._known:
            ids = self.tokens.encode(window.text)
            self._known[key] = ids, self.tokens.spans(ids, window.text)
        return self._known[key]

    def kinds(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """Every token's kind, as an index into KINDS or -1 if it is skipped, and the source token with which it is matched."""
        spans, own = np.array(self.of(window)[1], np.int32), np.array(window.spans, np.int32)
        structure, position = match_spans(spans[:, 0], spans[:, 1], own[:, 0], own[:, 1])
        ends = own[position, 1]
        shared = np.where(spans[:, 1] > ends, KINDS.index("target longer"), KINDS.index("target shorter"))
        kinds = np.full(len(spans), -1)
        kinds[structure == SAME_SPAN] = KINDS.index("same span")
        kinds[structure == SHARED_PREFIX] = shared[structure == SHARED_PREFIX]
        kinds[structure == INSIDE] = KINDS.index("inside")
        return kinds, position

    def align(self, window: Window, source: Source, text_model: TextModel) -> AlignedText:
        """The library's distributions for all tokens of a window."""
        ranges = prefix_ranges(window.text, self.tokenizer, source.tokenizer)
        ids, logprobs, _, ce, *of_ranges = source.topk(window, text_model, ranges)
        return align(window.text, self.tokenizer, source.tokenizer, ids, logprobs, -ce, of_ranges, top_k=TOP_K)
