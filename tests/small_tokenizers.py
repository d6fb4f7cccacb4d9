"""Tokenizers and chat templates for tests.

Small tokenizers are trained or put together in memory. Real ones are used where their folder is there.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from profuser.alignment.ranges import ranges_needed
from profuser.alignment.types import PrefixRanges, SourceCapture
from profuser.alignment.vocab_map import ByteOrder
from profuser.text.chat import ChatFormat
from profuser.text.encoded import Encoded
from profuser.text.token_bytes import TokenBytes

LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEMPLATES = {"llama2": LLAMA2, "chatml": CHATML, "vicuna": VICUNA}

CORPUS = [
    "Things like these don't happen, said the cat; hello world, hello help.",
    "The answer is 42, because 6*7=42. In 2026 there were 12345 of them.",
    "def f(x):\n    if x > 10:\n        return x + 1\n    else:\n        return  None\n",
    "你好，世界！我们今天去北京。 русский текст, Straße, café 👩‍👩‍👧 🙂",
    "[INST] [/INST] USER: ASSISTANT: user assistant system",
] * 3

CONTROL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def wrap(tokenizer: Tokenizer, template: str | None = VICUNA) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=template,
    )


@functools.cache
def byte_level(size: int, nfc: bool = False, prefix_space: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC() if nfc else None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=CONTROL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@functools.cache
def sentencepiece(size: int, scheme: str) -> Tokenizer:
    """A BPE with byte fallback.

    `scheme` is Metaspace's "first", "always" or "never", or "prepend" for the normaliser of Llama-2.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always" if scheme == "prepend" else scheme)
    tokenizer.pre_tokenizer = metaspace
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<unk>", *CONTROL, *bytes_], limit_alphabet=80, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    config = json.loads(tokenizer.to_str())
    config["added_tokens"] = [t for t in config["added_tokens"] if not t["content"].startswith("<0x")]
    if scheme == "prepend":
        config["pre_tokenizer"] = None
        config["normalizer"] = {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        }
    return Tokenizer.from_str(json.dumps(config))


@functools.cache
def gemma(size: int) -> Tokenizer:
    """A BPE as in Gemma: its runs of spaces and of line ends are added tokens, and plain spaces reach those of spaces."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁{2,}|\n+|▁?[^▁\n]+"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<unk>", *CONTROL, *bytes_], limit_alphabet=80, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    config = json.loads(tokenizer.to_str())
    config["added_tokens"] = [t for t in config["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(config))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    runs = sorted(token for token in tokenizer.get_vocab() if len(token) > 1 and set(token) in ({"▁"}, {"\n"}))
    tokenizer.add_tokens([AddedToken(run, normalized=False) for run in runs])
    return tokenizer


def chained(*words: str, split: bool = True) -> Tokenizer:
    """A byte-level BPE that builds each word from left to right, earlier words first.

    With `split` it has GPT-2's pre-tokenizer.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*CONTROL, *alphabet])}
    visible = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merges = []
    for word in words:
        ((word, _),) = visible.pre_tokenize_str(word)
        for n in range(1, len(word)):
            if word[: n + 1] not in vocab:
                merges.append((word[:n], word[n]))
                vocab[word[: n + 1]] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in CONTROL])
    return tokenizer


@dataclass(eq=False)
class Side:
    """One side of an alignment, and its vocabulary."""

    tokenizer: PreTrainedTokenizerFast
    token_bytes: TokenBytes
    end_ids: tuple[int, ...]
    end_id: int | None
    closing: bytes
    vocab: dict[str, int]


def side(*tokens: str, control: tuple[str, ...] = ("<end>",), end: str | None = "<end>") -> Side:
    """A side with exactly these token strings, the control tokens first.

    A ▁ in one of them makes its tokens those of SentencePiece.
    """
    vocab = {token: i for i, token in enumerate([*control, *tokens])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=control[0]))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    marked = any("▁" in token for token in tokens)
    tokenizer.decoder = decoders.Metaspace() if marked else decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    end_id = None if end is None else vocab[end]
    ends = () if end_id is None else (end_id,)
    return Side(fast, TokenBytes(fast), ends, end_id, closing=b"", vocab=vocab)


SMALL = {
    "byte-level": lambda: byte_level(500),
    "byte-level NFC": lambda: byte_level(460, nfc=True),
    "byte-level prefix space": lambda: byte_level(480, prefix_space=True),
    "metaspace first": lambda: sentencepiece(620, "first"),
    "metaspace always": lambda: sentencepiece(640, "always"),
    "metaspace never": lambda: sentencepiece(600, "never"),
    "llama-2 prepend": lambda: sentencepiece(700, "prepend"),
    "gemma": lambda: gemma(640),
}


@functools.cache
def small_chat(name: str, template: str = "vicuna") -> ChatFormat:
    return ChatFormat(wrap(SMALL[name](), TEMPLATES[template]))


def pretrained_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def ids_of(tokenizer: PreTrainedTokenizerBase, *tokens: str) -> list[int]:
    vocab = tokenizer.get_vocab()
    return [vocab[token] for token in tokens]


REAL = ("llama2", "mistral_v1", "qwen2", "gpt_neox", "gpt2", "deepseek_v3")


@functools.cache
def real_tokenizer(name: str) -> PreTrainedTokenizerBase:
    root = Path(__file__).resolve().parent.parent
    folder = Path(os.environ.get("PROFUSER_TOKENIZERS", root.parent / "shared" / "tokenizers")) / name
    if not folder.is_dir():
        pytest.skip(f"no tokenizer in {folder}; set PROFUSER_TOKENIZERS to the folder with the real ones")
    return pretrained_tokenizer(folder)


@functools.cache
def real_chat(name: str, template: str) -> ChatFormat:
    tokenizer = real_tokenizer(name)
    tokenizer.chat_template = TEMPLATES[template]
    return ChatFormat(tokenizer)


def labels(encoded: Encoded) -> list[int]:
    """The ids that ByteAligner.align takes: the response's tokens and the end of turn."""
    end = [] if encoded.end_of_turn is None else [encoded.input_ids[encoded.end_of_turn]]
    return encoded.input_ids[encoded.start : encoded.stop] + end


def capture_of(
    source: ChatFormat, encoded: Encoded, n: int, rows: list[dict[int, float]], k: int, target=None
) -> SourceCapture:
    """A capture of full distributions {id: probability}, one per label, of which the top k are kept.

    `target` is a (ChatFormat, Encoded) whose prefix ranges are captured, too.
    """
    ids = labels(encoded)
    assert len(rows) == len(ids)
    spans = [*encoded.spans, *([(n, n)] if encoded.end_of_turn is not None else [])]
    needed = None
    if target is not None:
        needed = ranges_needed(target[0].token_bytes, target[1], source.token_bytes, encoded, order_of(source))
    among, masses = [], []
    for r, j in enumerate(needed.rows.tolist()) if needed else ():
        assert needed is not None
        tokens = order_of(source).ids[needed.lo[r] : needed.hi[r]].tolist()
        merged = None if needed.map_of[r] < 0 else needed.maps[needed.map_of[r]]
        found: dict[int, float] = {}
        for place, i in enumerate(tokens):
            counts_for = i + needed.target_size if merged is None else int(merged[place])
            if counts_for >= 0 and i in rows[j] and (merged is None or i != ids[j]):
                found[counts_for] = found.get(counts_for, 0.0) + rows[j][i]
        among.append(found)
        masses.append(sum(rows[j].get(i, 0.0) for i in tokens))
    with np.errstate(divide="ignore"):  # a range may have no mass at all
        logmass = np.log(np.array(masses)).astype(np.float32)
    top_ids, top_logprobs = top_of(rows, k)
    range_ids, range_logprobs = top_of(among, k)
    return SourceCapture(
        ids=np.array(ids, np.int32),
        begin=np.array([b for b, _ in spans], np.int32),
        stop=np.array([f for _, f in spans], np.int32),
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        own_logprobs=np.array([np.log(row[i]) for i, row in zip(ids, rows)], np.float32),
        ranges=PrefixRanges(
            rows=needed.rows if needed else np.zeros(0, np.int32),
            strip=needed.strip if needed else np.zeros(0, np.int32),
            logmass=logmass,
            ids=range_ids,
            logprobs=range_logprobs,
        ),
    )


def top_of(rows: list[dict[int, float]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k most probable entries of n rows in falling order: ids (n, k) int32, -1 = padding; log-probabilities (n, k)."""
    ids = np.full((len(rows), k), -1, np.int32)
    logprobs = np.full((len(rows), k), -np.inf, np.float32)
    for j, row in enumerate(rows):
        best = sorted(row.items(), key=lambda item: (-item[1], item[0]))[:k]
        for c, (i, p) in enumerate(best):
            ids[j, c], logprobs[j, c] = i, np.log(p)
    return ids, logprobs


@functools.cache
def order_of(chat) -> ByteOrder:
    return ByteOrder(chat.token_bytes)


def random_rows(encoded: Encoded, pool, rng: np.random.Generator, own: float = 0.3) -> list[dict[int, float]]:
    """Full distributions over random tokens from `pool` and the row's own token, which has the mass `own`."""
    rows = []
    for i in labels(encoded):
        others = [int(c) for c in rng.choice(pool, min(24, len(pool)), replace=False) if c != i]
        masses = (1 - own) * rng.dirichlet(np.full(len(others), 0.5)) + 1e-9
        row = {i: own, **dict(zip(others, masses.tolist()))}
        total = sum(row.values())
        rows.append({c: p / total for c, p in row.items()})
    return rows


def distribution(aligned, t: int) -> dict[int, float]:
    part = slice(aligned.offsets[t], aligned.offsets[t + 1])
    return dict(zip(aligned.ids[part].tolist(), np.exp(aligned.logprobs[part].astype(np.float64)).tolist()))
