"""Finds where a target's text can be cut so that the text before the cut cannot change the tokens after it.

A candidate is tokenised behind the target's tokens since the last cut, and not behind the whole text.

If the target has a pre-tokenizer that splits text, a cut is where a pre-token begins and its first character is of another
kind than the character before it. The kinds are letter, number, space and other. Inside a run of one kind there is no cut,
because how the run is split may depend on what follows it. This holds for spaces before a word, for groups of digits, and
for DeepSeek's regular expression, which gives a word the last of several format characters.

If the target has no such pre-tokenizer (Llama-2, Mistral), a cut is between two characters that no token of the vocabulary
holds next to each other, because no merge can cross such a place.
"""

from __future__ import annotations

import functools
import itertools
import unicodedata
from collections.abc import Sequence

import numpy as np

from profuser.text.token_bytes import TokenBytes

MAX_PREFIX_TOKENS = 64  # the longest prefix in a text without cuts; a pre-token is far shorter
PROBE = "a b. c1 2\nd"  # a pre-tokenizer that splits text makes more than one pre-token of this
# A pre-tokenizer that cuts at a space between any two of these is taken to cut at spaces everywhere.
KINDS_OF_CHARACTERS = (
    *"aZé好あ한яא1²٣.,'\"(-_/:$+=^`|<©🙂",
    "\u0301",
    "\u200d",
    "'s",
    "...",
    "12",
    "ǅ",
    "ʰ",
    "Ⅻ",
    "‿",
    "«",
)

# What may stand around two characters when the cut between them is probed.
PROBED_AROUND = (("", ""), ("a", "b"), (" ", "7"), ("1", " x"), ("a.", "."), ("x 12", "3x"))

REPLACED = "\ufffd"
# These stand in place of a character where a token has none, or only a part of one: its beginning, or another part.
NO_TEXT, LEAD_BYTE, CONTINUATION = -1, -2, -3


class Boundaries:
    """The cuts in texts of one tokenizer.

    Attributes:
        splits: whether the tokenizer has a pre-tokenizer that splits text.
        first, last: (vocabulary,) int64, the code points of each token's first and last character, or a negative
            number (NO_TEXT, LEAD_BYTE, CONTINUATION) where the token has no whole character there.
    """

    def __init__(self, tokens: TokenBytes):
        self._pieces = tokens.pieces
        self._normalizer, self._pre_tokenizer = tokens.fragment.normalizer, tokens.fragment.pre_tokenizer
        probe = PROBE if self._normalizer is None else self._normalizer.normalize_str(PROBE)
        self.splits = self._pre_tokenizer is not None and len(self._pre_tokenizer.pre_tokenize_str(probe)) > 1
        size = len(tokens.pieces)
        # Added tokens of spaces alone are left out, because no cut lies between spaces anyway.
        self._added = [content for content in tokens.added if len(content) > 1 and not content.isspace()]
        self._added_texts = [content.decode(errors="replace") for content in self._added]
        self._control = np.array([piece is None for piece in tokens.pieces])
        self._empty = np.array([not piece for piece in tokens.pieces])
        # Read the first and last character of every token. Without a pre-tokenizer, also collect the pairs of characters
        # that stand next to each other in a token. They tell where merges can cross only if every token consists of whole
        # characters or of one byte.
        self.first, self.last = np.full(size, NO_TEXT), np.full(size, NO_TEXT)
        pairs: set[tuple[int, int]] = set()
        self._neighbours: np.ndarray | None = None
        whole = True
        for i, piece in enumerate(tokens.pieces):
            if not piece:
                continue
            try:
                codes = [ord(c) for c in piece.decode()]
            except UnicodeDecodeError:
                whole &= len(piece) == 1
                text = piece.decode(errors="replace")
                self.first[i], self.last[i] = ord(text[0]), ord(text[-1])
                if text[0] == REPLACED:
                    self.first[i] = CONTINUATION if piece[0] & 0xC0 == 0x80 else LEAD_BYTE
                if text[-1] == REPLACED:
                    self.last[i] = CONTINUATION
                continue
            self.first[i], self.last[i] = codes[0], codes[-1]
            if not self.splits:
                pairs.update(itertools.pairwise(codes))
        self._first_kind, self._last_kind = _kinds(self.first), _kinds(self.last)
        if not self.splits and whole:
            self._neighbours = np.array(sorted(_pair_key(a, b) for a, b in pairs), dtype=np.int64)

    def prefix_starts(self, ids: Sequence[int] | np.ndarray, words: Sequence[int], start: int) -> np.ndarray:
        """The first token of the prefix of every position from `start` on, and of the text's end.

        The prefix of a position is the text before it in the current pre-token. The current pre-token is that of the byte
        before the position, because a candidate may still extend it.

        Args:
            ids: the text's tokens.
            words: the number of each token's pre-token, from the tokenizer's encoding.
            start: the first token of the response; the tokens before it are template.
        Returns:
            (len(ids) - start + 1,) int32 indices into ids.
        """
        n = len(ids)
        if n == 0:
            return np.zeros(1, dtype=np.int32)
        ids = np.asarray(ids, dtype=np.int64)
        cuts = self._cuts(ids, np.asarray(words)) & ~self._within_added(ids)
        # Find the latest cut before each position. A cut at the position itself does not count, because the text behind it
        # is not known yet. Hence the shift by one.
        latest = np.zeros(n + 1, dtype=np.int64)
        np.maximum.accumulate(np.where(cuts, np.arange(n), 0), out=latest[1:])
        # A control token has no text, so a prefix that would begin with one begins after it.
        latest += self._control[ids[np.minimum(latest, n - 1)]]
        starts = np.minimum(latest, np.arange(n + 1))[start:]
        # Shorten long prefixes. Nothing is lost so far back: tokens that follow each other in a text are also the tokens
        # of this part of the text when it stands alone.
        starts = np.maximum(starts, np.arange(start, n + 1) - MAX_PREFIX_TOKENS)
        # No prefix may begin in the middle of a character.
        while (
            within := (starts < np.arange(start, n + 1)) & (self.first[ids[np.minimum(starts, n - 1)]] == CONTINUATION)
        ).any():
            starts += within
        return starts.astype(np.int32)

    def _within_added(self, ids: np.ndarray) -> np.ndarray:
        """Per token, whether the text before it may be the beginning of an added token that the text behind it completes."""
        if not self._added:
            return np.zeros(len(ids), dtype=bool)
        pieces = [self._pieces[i] or b"" for i in ids.tolist()]
        data, within = b"".join(pieces), set()
        for content in self._added:
            at = data.find(content[:1])
            while at >= 0:
                spelt = 1
                while spelt < len(content) and data.startswith(content[: spelt + 1], at):
                    spelt += 1
                within.update(range(at + 1, at + min(spelt + 1, len(content))))
                at = data.find(content[:1], at + 1)
        begins = itertools.accumulate(map(len, pieces[:-1]), initial=0)
        return np.array([begin in within for begin in begins])

    def closes_before_space(self, codes: np.ndarray | None = None) -> np.ndarray:
        """Whether a space that follows always begins a new pre-token.

        Args:
            codes: (n,) the code points that a text ends in; the last ones of all tokens by default.
        Returns:
            (n,) bool
        """
        codes = self.last if codes is None else codes
        solid = (codes >= 0) & ~_may_be_space(codes)
        if self.splits:
            return solid & self._cuts_words_at_spaces
        if self._neighbours is None:
            return np.zeros_like(solid)
        return solid & ~np.isin(_pair_key(codes, ord(" ")), self._neighbours)

    def cut_between(self, left: str, right: str) -> bool:
        """Whether the text is always cut between two characters, whatever stands before and behind them.

        With a pre-tokenizer this is probed; `right` may be longer than one character then.
        """
        if any(left + right[0] in content for content in self._added_texts):
            return False  # an added token may reach across
        if self._neighbours is not None:
            key = _pair_key(ord(left), ord(right[0]))
            at = np.searchsorted(self._neighbours, key)
            return at == len(self._neighbours) or self._neighbours[at] != key
        if not self.splits:
            return False
        return all(self._cuts_at(before + left, right + behind) for before, behind in PROBED_AROUND)

    def _cuts_at(self, left: str, right: str) -> bool:
        """Whether the pre-tokenizer begins a new pre-token between the two halves of one text."""
        text = left + right
        normalised = text if self._normalizer is None else self._normalizer.normalize_str(text)
        begins = [begin for _, (begin, _) in self._pre_tokenizer.pre_tokenize_str(normalised)]
        return len(normalised) == len(text) and len(left) in begins

    @functools.cached_property
    def _cuts_words_at_spaces(self) -> bool:
        """Whether the pre-tokenizer begins a new pre-token at a space between any two characters that are not spaces."""
        for left, right in itertools.product(KINDS_OF_CHARACTERS, repeat=2):
            normalised = self._normalizer and self._normalizer.normalize_str(f"a{left} {right}b")
            if (normalised is None or len(normalised) == len(left) + len(right) + 3) and not self._cuts_at(
                f"a{left}", f" {right}b"
            ):
                return False
        return True

    def _cuts(self, ids: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Per token, whether the text can be cut where the token begins."""
        cuts = np.zeros(len(ids), dtype=bool)
        if not len(ids):
            return cuts
        before, after = self.last[ids[:-1]], self.first[ids[1:]]
        if self.splits:
            kinds_before, kinds_after = self._last_kind[ids[:-1]], self._first_kind[ids[1:]]
            known = (kinds_before >= 0) & (kinds_after >= 0)
            cuts[1:] = (words[1:] != words[:-1]) & known & (kinds_before != kinds_after)
        elif self._neighbours is not None:
            whole = (before >= 0) & (after >= 0)
            key = _pair_key(before, after)
            found = np.searchsorted(self._neighbours, key)
            known = np.zeros(len(key), dtype=bool)
            inside = found < len(self._neighbours)
            known[inside] = self._neighbours[found[inside]] == key[inside]
            # A character that is spelt in bytes stands in no other token, so no merge crosses its ends.
            spelt = (after == LEAD_BYTE) | ((before == CONTINUATION) & (after != CONTINUATION))
            cuts[1:] = (whole & ~known) | spelt
        # The text can be cut before and after a control token. A token without bytes begins nothing.
        control = self._control[ids]
        cuts |= control
        cuts[1:] |= control[:-1]
        cuts[0] = True
        return cuts & (~self._empty[ids] | control)


def _pair_key(a, b):
    return a * (1 << 21) + b


def _kinds(codes: np.ndarray) -> np.ndarray:
    """The kind of each character: 0 letter or mark, 1 number, 2 space, 3 other, -1 where there is no whole character."""
    known = {code: _kind(chr(code)) for code in np.unique(codes[codes >= 0]).tolist()}
    return np.array([known.get(code, -1) for code in codes.tolist()], dtype=np.int8)


def _kind(character: str) -> int:
    return 2 if character.isspace() else {"L": 0, "M": 0, "N": 1}.get(unicodedata.category(character)[0], 3)


_SPACES = np.array([c for c in range(0x3001) if chr(c).isspace()])


def _may_be_space(codes: np.ndarray) -> np.ndarray:
    """Whether each character is a space, or is not known because there is no whole character."""
    return (codes < 0) | np.isin(codes, _SPACES)
