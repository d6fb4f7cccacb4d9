"""The exact bytes of every token of a tokenizer, and the byte span of every token in a text.

The alignment compares tokenizers on bytes. If a piece (the bytes of a token) were one byte off, every later distribution
would be shifted, and nothing would raise an error. The pieces are therefore made by the rules of the tokenizer's own
decoder: the byte-level alphabet, or SentencePiece's U+2581 and `<0xNN>`. An added token stands for its own spelling, unless
other text reaches it, as two spaces reach Gemma's added token `▁▁`. On every text, `spans` checks that the pieces
concatenate to it.

A section is the text between two added tokens. A tokenizer may put a space in front of a section (Prepend normaliser,
Metaspace, `add_prefix_space`). This dummy leading space is a part of the first token's piece, but not of the text.

Undoing a normaliser is left out on purpose. Where the tokens no longer hold the text's bytes (Qwen-2's NFC on a decomposed
character), the text is refused with the reason `normaliser`. WordPiece's continuation marks are not decoded.
"""

from __future__ import annotations

import collections
import functools
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Literal, cast

from tokenizers import Encoding, Tokenizer, models

from profuser.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Reason = Literal["normaliser", "decoder"]
"""Why tokens do not hold a text's bytes: the normaliser changes the text, or the decoder cannot give it back."""

MAX_ID = 1 << 24
"""No tokenizer has so many tokens. An id from here on was damaged, and a table of all ids would take the memory away."""

SPACE_MARK = "\u2581"  # stands for a space in SentencePiece's token strings
WHITESPACE = b" \t\n\r\x0b\x0c"


Spelling = tuple[bytes, bool, int]
"""A token's bytes, whether it is a byte token, and which one it is of those with the same bytes."""


class TokenBytesMismatch(DataError):
    """The pieces of an encoding do not concatenate to the text."""

    def __init__(self, message: str, reason: Reason):
        super().__init__(message)
        self.reason: Reason = reason


class TokenBytes:
    """The exact bytes of every token of a tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer with a `tokenizers` backend.
        control: ids with a role, above all the end of turn, that are control tokens although the tokenizer does not declare
            them special.
    Attributes:
        pieces: the bytes of every token id, with its dummy leading space. They are None for a control (special) token and
            for an id without a token. Ids at or beyond `len(pieces)` have no token either; models have such ids because
            they pad their logits.
        specials: the string that each control token id stands for.
        added: the bytes of the added tokens that are text. Text may be cut into tokens differently where they stand in it.
        byte_tokens: the ids of `<0xNN>`, which text uses only for characters that are in no other token.
        fragment: a private `tokenizers.Tokenizer` for text from the middle of a section. It puts no dummy space in front,
            and the strings of control tokens are plain text to it.
    Raises:
        DataError: the tokenizer has no `tokenizers` backend.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, control: Iterable[int] = ()):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError(
                "a tokenizer must have a `tokenizers` backend (tokenizer.json), "
                f"got {type(tokenizer).__name__}; convert it first"
            )
        # Read the rules of the tokenizer.
        self._backend = backend
        self._rules = _rules_of(backend)
        normalizers = list(_flat(self._rules["normalizer"], "normalizers"))
        pre_tokenizers = list(_flat(self._rules["pre_tokenizer"], "pretokenizers"))
        decoders = list(_flat(self._rules["decoder"], "decoders"))

        # Find out how token strings spell bytes: in the byte-level alphabet, with marks for spaces, or with byte tokens.
        self._byte_level = any(part["type"] == "ByteLevel" for part in decoders + pre_tokenizers)
        self._marked = not self._byte_level and any(
            part["type"] == "Metaspace" or (part["type"] == "Replace" and part["pattern"] == {"String": SPACE_MARK})
            for part in decoders
        )
        fallback = getattr(backend.model, "byte_fallback", False) or any(
            part["type"] == "ByteFallback" for part in decoders
        )
        vocab = tokenizer.get_vocab()
        token, last = max(vocab.items(), key=itemgetter(1), default=("", 0))
        if last >= MAX_ID:
            raise DataError(
                f"the ids of a tokenizer must be below {MAX_ID:,}, {getattr(tokenizer, 'name_or_path', 'it')} gives {token!r} the id "
                f"{last:,}; copy or download it again"
            )
        self.byte_tokens = frozenset(i for token, i in vocab.items() if fallback and _is_byte_token(token))

        # Collect the control tokens, and all added tokens as (bytes, whether the token takes the whitespace before it,
        # whether it takes the whitespace behind it).
        roles = set(control)
        # A special token that the vocabulary lacks has no id, and never occurs.
        special_ids = dict.fromkeys(i for i in [*tokenizer.all_special_ids, *roles] if i is not None)
        self.specials: dict[int, str] = {
            i: token for i in special_ids if isinstance(token := tokenizer.convert_ids_to_tokens(i), str)
        }
        self._added: dict[int, tuple[bytes, bool, bool]] = {
            i: (s.encode(), False, False) for i, s in self.specials.items()
        }
        for i, token in backend.get_added_tokens_decoder().items():
            self._added[i] = (token.content.encode(), token.lstrip, token.rstrip)
            if token.special:
                self.specials[i] = token.content

        # Some added tokens are ordinary tokens all the same: byte tokens that were declared special in training, and tokens
        # without a role that other text than their spelling reaches. To the decoder their spelling means that text, so that a
        # text in which the spelling itself stands is refused.
        reached = [
            i for i in self._added if i in self.byte_tokens or (i not in roles and self._is_reached_by_other_text(i))
        ]
        for i in reached:
            del self._added[i]
            self.specials.pop(i, None)
        # Decode every token.
        self.pieces: list[bytes | None] = [None] * (max(vocab.values(), default=-1) + 1)
        for token, i in vocab.items():
            if i not in self.specials:
                self.pieces[i] = self._added[i][0] if i in self._added else self._spelt(i, token)
        for i in reached:
            self.pieces[i] = self._spelt(i, backend.id_to_token(i))

        # The added tokens of text, and those of them that may take the whitespace beside them. A regular expression finds
        # the strings of control tokens, the longest first, as the tokenizer does.
        self._greedy = {i for i, (_, left, right) in self._added.items() if (left or right) and i not in self.specials}
        self.added = [content for i, (content, *_) in self._added.items() if i not in self.specials]
        self.added += [piece for i in reached if i not in self.byte_tokens and (piece := self.pieces[i])]
        self._control_id = {content: i for i, content in self.specials.items()}
        longest_first = sorted(self._control_id, key=len, reverse=True)
        self._control = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None

        # The sections that get a dummy space in front: "" (none), "always" (all, even before a space), "missing" (those
        # that do not begin with a space already), "first" (the same, but only at the beginning of the text).
        self._dummy = ""
        if any(part["type"] == "Prepend" and part["prepend"] in (SPACE_MARK, " ") for part in normalizers):
            self._dummy = "always"
        for part in pre_tokenizers:
            if part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never":
                self._dummy = {"always": "missing", "first": "first"}[part.get("prepend_scheme", "always")]
            elif part["type"] == "ByteLevel" and part["add_prefix_space"]:
                self._dummy = "missing"

    @functools.cached_property
    def spellings(self) -> list[Spelling | None]:
        """By what every token is known in a tokenizer of the same family; None where `pieces` has no bytes.

        Bytes alone are not enough: `a` and the byte token `<0x61>` have the same, and so have two runs of spaces in GPT-NeoX.
        """
        counts = collections.Counter[tuple[bytes, bool]]()
        found: list[Spelling | None] = []
        for i, piece in enumerate(self.pieces):
            kind = (piece or b"", i in self.byte_tokens)
            found.append((*kind, counts[kind]) if piece else None)
            counts[kind] += 1
        return found

    def _spelt(self, i: int, token: str) -> bytes:
        """The bytes that the decoder makes of the token with this id and string."""
        if self._byte_level:
            return _byte_level_piece(token)
        if i in self.byte_tokens:
            return bytes([int(token[3:5], 16)])
        return (token.replace(SPACE_MARK, " ") if self._marked else token).encode()

    def _is_reached_by_other_text(self, i: int) -> bool:
        """Whether text other than its own spelling is tokenised to an added token, namely what the decoder makes of it."""
        token = self._backend.id_to_token(i)
        spelt = self._spelt(i, token) if token is not None else self._added[i][0]
        if spelt == self._added[i][0]:
            return False
        try:
            text = spelt.decode()
        except (
            UnicodeDecodeError
        ):  # only byte-level tokens that are parts of characters, which no text reaches as they stand
            return False
        # Some tokenizers cut a run of spaces at its end, so that the token is found only where a word follows.
        return any(i in self._backend.encode(t, add_special_tokens=False).ids for t in (text, f"a{text}a"))

    @functools.cached_property
    def _whole(self) -> Tokenizer:
        """A private tokenizer for whole conversations, in which strings of control tokens become control tokens."""
        return _copy(self._backend, self.specials)

    @functools.cached_property
    def _section(self) -> Tokenizer:
        """A private tokenizer for a section from its beginning, in which strings of control tokens are plain text."""
        section = _copy(self._backend, self.specials)
        section.encode_special_tokens = True
        return section

    @functools.cached_property
    def fragment(self) -> Tokenizer:
        """See the attributes of the class."""
        # These normalisers act at the ends of a section only, which a fragment does not have.
        at_ends = ("Prepend", "Strip")
        normalizers = list(_flat(self._rules["normalizer"], "normalizers"))
        if not self._dummy and not any(part["type"] in at_ends for part in normalizers):
            return self._section
        fragment = _copy(self._backend, self.specials)
        fragment.encode_special_tokens = True
        parts = _parts_of(
            normalizer=_without(self._rules["normalizer"], "normalizers", lambda part: part["type"] in at_ends),
            pre_tokenizer=_without_dummy(self._rules["pre_tokenizer"]),
        )
        fragment.normalizer, fragment.pre_tokenizer = parts.normalizer, parts.pre_tokenizer
        return fragment

    @functools.cached_property
    def _normalizer(self):
        """The normaliser without SentencePiece's marks and dummy spaces, or None if nothing is left of it."""
        reduced = _without(
            self._rules["normalizer"],
            "normalizers",
            lambda part: part["type"] == "Prepend" or (part["type"] == "Replace" and part["content"] == SPACE_MARK),
        )
        return _parts_of(normalizer=reduced).normalizer

    def normalised(self, text: str) -> str:
        """`text` after the tokenizer's normaliser (NFC for Qwen-2), but without its dummy spaces and marks."""
        return text if self._normalizer is None else self._normalizer.normalize_str(text)

    def seen(self, text: str) -> str:
        """`text` in the form that its tokens hold: normalised and without literal SentencePiece marks. Its ids are the same."""
        text = self.normalised(text)
        return text.replace(SPACE_MARK, " ") if self._marked else text

    def seen_rendered(self, text: str) -> str:
        """The same for a rendered conversation, in which control strings stand for control tokens and stay as they are."""
        if self._control is None:
            return self.seen(text)
        return "".join(piece if n % 2 else self.seen(piece) for n, piece in enumerate(self._control.split(text)))

    def encode(self, text: str) -> list[int]:
        """The ids of a rendered conversation. Control strings in it become control tokens. No bos or eos is added."""
        return self.encode_words(text)[0]

    def encode_words(self, text: str) -> tuple[list[int], list[int]]:
        """(ids, words): the ids as in `encode`, and the number of the pre-token that each of them belongs to."""
        encoding = self._whole.encode(text, add_special_tokens=False)
        return encoding.ids, _words(encoding)

    def encode_parts(self, parts: Sequence[tuple[str, bool]]) -> tuple[list[int], list[int]]:
        """(ids, words) of a text that is given in parts (string, literal). Control strings in a literal part stay plain text.

        If no literal part holds a control string, the result is that of `encode_words` on the whole text. Only the control
        tokens of the other parts cut the text into sections, so that merges across parts happen in the same way.

        Raises:
            TokenBytesMismatch: a section's text has no tokens of its own (reason "decoder").
        """
        # Collect the text of a section until a control token ends it. A control token may take the whitespace beside it.
        ids: list[int] = []
        words: list[int] = []
        section = ""
        at_start = True
        skip_whitespace = False

        def flush() -> None:
            """Tokenises the section that has been collected."""
            # A Metaspace of scheme "first" puts its dummy space at the beginning of the text and nowhere else.
            encoder = self._section if at_start or self._dummy != "first" else self.fragment
            encoded = encoder.encode(section, add_special_tokens=False)
            control = next((i for i in encoded.ids if i in self.specials), None)
            if control is not None:
                # The text has an unknown character, or the model finds the control string in its own vocabulary.
                raise TokenBytesMismatch(
                    f"text must not become control tokens, {section!r} holds {self.specials[control]!r}; skip this example",
                    "decoder",
                )
            first = len(words)  # larger than the numbers of all pre-tokens so far
            ids.extend(encoded.ids)
            words.extend(first + word for word in _words(encoded))

        for text, literal in parts:
            pieces = [text] if literal or self._control is None else self._control.split(text)
            for n, piece in enumerate(pieces):
                # Every second piece is a control string.
                if n % 2 == 0:
                    section += piece.lstrip() if skip_whitespace and not section else piece
                    continue
                i = self._control_id[piece]
                _, lstrip, rstrip = self._added[i]
                section = section.rstrip() if lstrip else section
                flush()
                ids.append(i)
                words.append(len(words))
                section, at_start, skip_whitespace = "", False, rstrip
        flush()
        return ids, words

    def has_control(self, text: str) -> bool:
        """Whether `text` contains the string of a control token."""
        return self._control is not None and self._control.search(text) is not None

    def check_whole(self, ids: Sequence[int], spans: Sequence[tuple[int, int]], text: str) -> None:
        """Checks that no token of a response covers bytes that are not its own.

        Raises:
            TokenBytesMismatch: an added token has taken the whitespace beside it (reason "decoder").
        """
        for i, (begin, end) in zip(ids, spans) if self._greedy and not self._greedy.isdisjoint(ids) else ():
            if i in self._greedy and len(self.piece(i)) < end - max(begin, 0):
                raise self._mismatch(text, max(begin, 0))

    def piece(self, i: int) -> bytes:
        """The bytes of a token that is not a control token."""
        piece = self.pieces[i]
        assert piece is not None
        return piece

    def of(self, ids: Sequence[int]) -> bytes:
        """The bytes of the tokens, one after the other. Control tokens and unknown ids have none."""
        return b"".join(self.pieces[i] or b"" for i in ids if 0 <= i < len(self.pieces))

    def spans(self, ids: Sequence[int], text: str) -> list[tuple[int, int]]:
        """The byte span (begin, end) of every token in `text`.

        The spans are monotone and cover the text. A token with a dummy leading space begins at -1 if it is the first of the
        text. After an added token in the middle of the text it begins at the first byte of its section. A control token has
        a span of no width unless its string stands in the text. An added token with `lstrip` or `rstrip` covers the
        whitespace that it takes.

        Raises:
            TokenBytesMismatch: the pieces do not concatenate to the text.
        """
        # Collect the tokens up to the next added one as a section, then find the bytes of the added token.
        data = text.encode()
        spans: list[tuple[int, int]] = []
        position = 0
        section: list[int] = []
        for i in ids:
            added = self._added.get(i)
            if added is None:
                section.append(i)
                continue
            position = self._section_spans(section, data, position, spans, text)
            section = []
            content, lstrip, rstrip = added
            begin = _skip_whitespace(data, position) if lstrip else position
            if data.startswith(content, begin):
                end = begin + len(content)
                end = _skip_whitespace(data, end) if rstrip else end
            elif i in self.specials:
                end = position
            else:
                raise self._mismatch(text, position)
            spans.append((position, end))
            position = end
        if self._section_spans(section, data, position, spans, text) != len(data):
            raise self._mismatch(text, spans[-1][1] if spans else 0)
        return spans

    def _section_spans(self, ids: list[int], data: bytes, position: int, spans: list, text: str) -> int:
        """Appends the spans of a section's tokens, which begin at `position`, to `spans`, and returns where they end."""
        if not ids:
            return position
        found = [self.pieces[i] if 0 <= i < len(self.pieces) else None for i in ids]
        pieces = [piece for piece in found if piece is not None]
        if len(pieces) < len(found):
            known = b"".join(pieces[: found.index(None)])
            raise self._mismatch(text, position + len(known))
        joined = b"".join(pieces)
        dummy = self._has_dummy(pieces[0], data, position)
        if not data.startswith(joined[dummy:], position):
            both = zip(joined[dummy:], data[position:])
            raise self._mismatch(text, position + next((n for n, (x, y) in enumerate(both) if x != y), 0))
        ends = list(itertools.accumulate(map(len, pieces), initial=position - dummy))
        begins = ends[:-1]
        begins[0] = position - 1 if dummy and position == 0 else position
        spans.extend(zip(begins, ends[1:]))
        return ends[-1]

    def _has_dummy(self, piece: bytes, data: bytes, position: int) -> bool:
        """Whether `piece`, the first of the section at `position`, begins with a dummy space."""
        if not self._dummy or not piece.startswith(b" ") or position == len(data):
            return False
        if self._dummy == "always":
            return True
        if self._dummy == "first" and position > 0:
            return False
        return not data.startswith(b" ", position)

    def _mismatch(self, text: str, position: int) -> TokenBytesMismatch:
        reason: Reason = "normaliser" if self.normalised(text) != text else "decoder"
        near = text.encode()[max(position - 8, 0) : position + 16].decode(errors="replace")
        return TokenBytesMismatch(
            f"the tokens' bytes must concatenate to the text, they differ at byte {position} ({near!r}, {reason}); "
            "skip this example",
            reason,
        )


PARTS = ("normalizer", "pre_tokenizer", "decoder")


def _words(encoding: Encoding) -> list[int]:
    """The number of each token's pre-token. Only tokens of a post-processor have none, and here it adds no tokens."""
    return cast("list[int]", encoding.word_ids)


def _copy(backend: Tokenizer, specials: Collection[int]) -> Tokenizer:
    """A private tokenizer with the same model, because the backend's owner may change its state.

    This state is truncation, padding and encode_special_tokens.

    Args:
        specials: the ids that are special in the copy.
    """
    copy = Tokenizer(backend.model)
    for part in PARTS:
        if getattr(backend, part) is not None:
            setattr(copy, part, getattr(backend, part))
    added = sorted(backend.get_added_tokens_decoder().items())
    for special, tokens in itertools.groupby(added, key=lambda item: item[0] in specials):
        (copy.add_special_tokens if special else copy.add_tokens)([token for _, token in tokens])
    # Added tokens get consecutive ids. If theirs have gaps, the copy is made from the whole JSON, which takes longer.
    if any(copy.token_to_id(token.content) != i for i, token in added):
        copy = Tokenizer.from_str(backend.to_str())
        copy.no_truncation()
        copy.no_padding()
        copy.add_special_tokens([token for i, token in added if i in specials])
    return copy


def _rules_of(backend: Tokenizer) -> dict:
    """The tokenizer.json of a tokenizer without its vocabulary, which would take most of the time to write."""
    bare = Tokenizer(models.WordLevel({"": 0}, unk_token=""))
    for part in PARTS:
        if getattr(backend, part) is not None:
            setattr(bare, part, getattr(backend, part))
    return json.loads(bare.to_str())


def _parts_of(**rules: dict | None) -> Tokenizer:
    """A tokenizer that has the given parts of a tokenizer.json and no vocabulary."""
    model = {"type": "WordLevel", "vocab": {"": 0}, "unk_token": ""}
    return Tokenizer.from_str(json.dumps({"version": "1.0", "model": model, **rules}))


def _flat(part: dict | None, key: str) -> Iterator[dict]:
    """The parts of a component of tokenizer.json, with nested sequences taken apart."""
    if part is not None and part["type"] == "Sequence":
        for inner in part[key]:
            yield from _flat(inner, key)
    elif part is not None:
        yield part


def _without(part: dict | None, key: str, drop: Callable[[dict], bool]) -> dict | None:
    """The component without the parts for which `drop` holds."""
    kept = [inner for inner in _flat(part, key) if not drop(inner)]
    return {"type": "Sequence", key: kept} if kept else None


def _without_dummy(part: dict | None) -> dict | None:
    """The pre-tokenizer, changed so that it puts nothing in front of a section."""
    if part is None:
        return None
    part = dict(part)
    if part["type"] == "Sequence":
        part["pretokenizers"] = [_without_dummy(inner) for inner in part["pretokenizers"]]
    elif part["type"] == "Metaspace":
        part["prepend_scheme"] = "never"
        part.pop("add_prefix_space", None)
    elif part["type"] == "ByteLevel":
        part["add_prefix_space"] = False
    return part


def _byte_alphabet() -> dict[int, int]:
    """GPT-2's byte-level alphabet, in the form that str.translate takes.

    A printable Latin-1 character stands for its own byte, and the characters from U+0100 on stand for the other bytes. The
    Latin-1 characters that are not printable stand for no byte.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: NO_BYTE for b in others} | {0x100 + n: b for n, b in enumerate(others)}


NO_BYTE = 0xFFFF
BYTE_ALPHABET = _byte_alphabet()


def _byte_level_piece(token: str) -> bytes:
    """The bytes that a token string of the byte-level alphabet spells."""
    try:
        return token.translate(BYTE_ALPHABET).encode("latin-1")
    except UnicodeEncodeError:
        # A character is not of the alphabet. The ByteLevel decoder then takes all characters as they are, too.
        return token.encode()


def _is_byte_token(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _skip_whitespace(data: bytes, position: int) -> int:
    while position < len(data) and data[position] in WHITESPACE:
        position += 1
    return position
