"""What bench_align.py aligns: pairs of tokenizers, a corpus that comes with Python, and synthetic captures of it.

In every row of a capture the source's own token comes first, and nine others are drawn by their frequency in the corpus;
the masses are drawn from a Dirichlet distribution. A prefix range takes its tokens at even distances from the byte-sorted
vocabulary. They are rarer than those that a model would name, so the cache has more to hold than with a model. Everything is
seeded.
"""

from __future__ import annotations

import functools
import itertools
import pydoc_data.topics
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from profuser.alignment.align import PlainText
from profuser.alignment.engine import CppByteAligner
from profuser.alignment.ranges import RangeRequest, ranges_needed
from profuser.alignment.reference import PythonByteAligner
from profuser.alignment.types import WHOLE, PrefixRanges, SourceCapture
from profuser.recipe.places import resolve
from profuser.text.encoded import Encoded
from profuser.text.token_bytes import TokenBytesMismatch

CORPUS_BYTES = 1_200_000
SEQUENCE_TOKENS = 2048
K = 10
BATCH = 16

# Pairs (target, source).
REAL_PAIRS = (
    ("llama2", "gpt_neox"),
    ("llama2", "qwen2"),
    ("gpt2", "deepseek_v3"),
    ("qwen2", "llama2"),
    ("gpt_neox", "llama2"),
)
LARGEST_PAIR = ("qwen2", "deepseek_v3")  # vocabularies of 152k and 128k tokens; only the tables are built for it
BUNDLED_PAIRS = (("demo:guardian", "demo:scholar"),)


@functools.cache
def corpus() -> str:
    """Python's help topics, followed by its top-level library sources in the order of their names: 1.2 MB together."""
    parts = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    size = sum(len(part.encode()) for part in parts)
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if size >= CORPUS_BYTES:
            break
        parts.append(path.read_text(encoding="utf-8"))
        size += len(parts[-1].encode())
    return "\n\n".join(parts)


@functools.cache
def tokenizer(name: str, folder: str | None) -> PreTrainedTokenizerBase:
    location = Path(resolve(name) if folder is None else Path(folder).expanduser() / name)
    if not location.is_dir():
        pytest.skip(f"no tokenizer in {location}; give --tokenizers a folder that holds {name}")
    found = AutoTokenizer.from_pretrained(location, local_files_only=True)
    assert isinstance(found, PreTrainedTokenizerBase)
    return found


def sequences_of(tokenizer) -> list[str]:
    """The corpus in parts of 2048 tokens, cut between characters. The shorter part that is left at the end is dropped."""
    text = corpus()
    offsets = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).offsets
    cuts = [begin for begin, _ in offsets[::SEQUENCE_TOKENS]]
    return [text[begin:end] for begin, end in itertools.pairwise(cuts)]


@dataclass
class Case:
    """The corpus for one pair of tokenizers: encodings and captures of its sequences, and engines that have seen them.

    `skipped` counts the sequences that are left out because a tokenizer's normaliser changes them.
    """

    pair: str
    target: PlainText
    source: PlainText
    texts: list[str]
    raw: list[bytes]
    encoded: list[Encoded]
    own: list[Encoded]
    captures: list[SourceCapture]
    skipped: int

    @functools.cached_property
    def aligner(self) -> CppByteAligner:
        aligner = CppByteAligner(self.target, self.source, top_k=K)
        self.align_all(aligner)
        return aligner

    @functools.cached_property
    def oracle(self) -> PythonByteAligner:
        return PythonByteAligner(self.target, self.source, top_k=K)

    @functools.cached_property
    def batches(self) -> list[dict]:
        """The batches in the form that the C++ engine reads."""
        return [self.aligner.batch_of(*self.part(first, BATCH)) for first in range(0, len(self.raw), BATCH)]

    def part(self, first: int, size: int) -> tuple[list[bytes], list[Encoded], list[SourceCapture]]:
        part = slice(first, first + size)
        return self.raw[part], self.encoded[part], self.captures[part]

    def align_all(self, aligner: CppByteAligner, batch: int = BATCH) -> None:
        for first in range(0, len(self.raw), batch):
            aligner.align_batch(*self.part(first, batch))

    def needed(self, n: int) -> RangeRequest:
        return ranges_needed(
            self.target.token_bytes, self.encoded[n], self.source.token_bytes, self.own[n], self.source.byte_order
        )


def make_case(pair: tuple[str, str], folder: str | None, sequences: int | None = None) -> Case:
    """The case of a pair over the corpus, or over its first `sequences` sequences only."""
    target, source = (PlainText(tokenizer(name, folder)) for name in pair)
    case = Case(pair_name(pair), target, source, [], [], [], [], [], 0)
    for text in sequences_of(target.tokenizer)[:sequences]:
        try:
            encoded, own = target.encode(text), source.encode(text)
        except TokenBytesMismatch:
            case.skipped += 1
            continue
        case.texts.append(text)
        case.raw.append(text.encode())
        case.encoded.append(encoded)
        case.own.append(own)
    frequent = np.concatenate([np.array(own.input_ids, dtype=np.int32) for own in case.own])
    rng = np.random.default_rng(0)
    case.captures += [make_capture(source, own, case.needed(n), frequent, rng) for n, own in enumerate(case.own)]
    return case


def pair_name(pair: tuple[str, str]) -> str:
    return " <- ".join(name.removeprefix("demo:") for name in pair)


def make_capture(
    source: PlainText, own: Encoded, needed: RangeRequest, frequent: np.ndarray, rng: np.random.Generator
) -> SourceCapture:
    """A capture with K entries per row. `frequent`, (n,) int32, holds every source token as often as the corpus has it."""
    ids = np.array(own.input_ids, dtype=np.int32)
    begin, stop = np.array(own.spans, dtype=np.int32).T
    own_mass = rng.beta(3, 1, len(ids))
    draws = np.concatenate([ids[:, None], rng.choice(frequent, (len(ids), 4 * K))], axis=1)
    top = [[*dict.fromkeys(row), *K * [-1]][:K] for row in draws.tolist()]
    masses = np.concatenate([own_mass[:, None], shares(1 - own_mass, rng)], axis=1)

    rows, strip = needed.rows, needed.strip
    longer = np.array([len(piece or b"") for piece in source.token_bytes.pieces])[ids[rows]] > strip
    entered_mass = np.where(longer, own_mass[rows], 0)
    rest = (1 - own_mass[rows]) * rng.uniform(0.1, 0.9, len(rows))
    order = source.byte_order.ids
    step = np.maximum((needed.hi - needed.lo) // K, 1)
    among = needed.lo[:, None] + np.arange(K - 1) * step[:, None]
    others = np.where(among < needed.hi[:, None], order[np.minimum(among, len(order) - 1)], -1)
    others[others == ids[rows][:, None]] = -1
    first = np.where(longer, ids[rows], -1)
    spelt = needed.spelt(np.concatenate([first[:, None], others], axis=1))
    # Merged ranges hold what tokens count for: in whole rows those of the row's top k, elsewhere those of the range.
    place = np.full(max(len(source.token_bytes.pieces), order.max() + 1), -1)
    place[order] = np.arange(len(order))
    for r in np.flatnonzero(needed.map_of >= 0).tolist():
        tokens = np.array(top[rows[r]] if strip[r] == WHOLE else others[r])
        tokens = tokens[(tokens >= 0) & (tokens != ids[rows[r]])]
        tokens = tokens[place[tokens] >= 0]
        counted = dict.fromkeys(needed.maps[needed.map_of[r]][place[tokens] - needed.lo[r]].tolist())
        spelt[r] = [*(i for i in counted if i >= 0), *K * [-1]][:K]
    return SourceCapture(
        ids=ids,
        begin=np.ascontiguousarray(begin),
        stop=np.ascontiguousarray(stop),
        top_ids=np.array(top, dtype=np.int32),
        top_logprobs=log(masses),
        own_logprobs=log(own_mass),
        ranges=PrefixRanges(
            rows=rows,
            strip=strip,
            logmass=log(entered_mass + rest),
            ids=spelt,
            logprobs=log(np.concatenate([entered_mass[:, None], shares(rest, rng)], axis=1)),
        ),
    )


def shares(mass: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Parts of each of n masses in falling order, (n, K - 1). The K-th part is left for the tail."""
    parts = rng.dirichlet(np.full(K, 0.5), len(mass))[:, : K - 1]
    return -np.sort(-parts, axis=1) * mass[:, None]


def log(mass: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(mass, 1e-30)).astype(np.float32)
