"""What a model said: the text of the tokens that it wrote, after the rule for reasoning.

The text is exactly what the tokens spell, or it comes with the verdict that it cannot be used. A control token has no text: if
it were left out, what stands beside it would be joined as if it had never been there.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple, cast

from profuser.text.chat import ChatFormat
from profuser.text.fit import Verdict


class Said(NamedTuple):
    """What a model said, without the whitespace around it, and whether that can be used.

    Where it cannot, the text is there to be read. Control tokens are spelt out in it.
    """

    text: str
    verdict: Verdict


def said(chat: ChatFormat, ids: Sequence[int], *, strip_reasoning: bool) -> Said:
    """Returns what a model said with the tokens that it wrote between the generation prompt and the end of turn."""
    # The turn as text. It is noted where its control tokens end; an id that stands for no token counts as one.
    opening, pieces = chat.opening, chat.token_bytes.pieces
    marks = [mark for mark in opening.marks if chat.token_bytes.has_control(mark)]
    turn, control_ends, broken, quoted = opening.begun, [0], False, False
    for is_text, run in groupby(ids, lambda i: i < len(pieces) and pieces[i] is not None):
        part = list(run)
        if is_text:
            text = cast("str", chat.tokenizer.decode(part, clean_up_tokenization_spaces=False))
            broken |= not _is_utf8(chat.token_bytes.of(part))
            quoted |= any(mark in text for mark in marks)
            turn += text
            continue
        for i in part:
            turn += chat.token_bytes.specials.get(i, f"<token {i}>")
            control_ends.append(len(turn))

    # The rule. A mark that is quoted in plain text could not be told from the mark itself.
    answer = opening.kept(turn)
    if strip_reasoning:
        stripped = None if quoted else opening.stripped(turn)
        if not stripped:
            return Said(turn.strip() if stripped is None else "", Verdict.REASONING if turn.strip() else Verdict.OK)
        answer = stripped

    # What is left is an end of the turn. It must be nothing but text.
    if control_ends[-1] > len(turn) - len(answer):
        return Said(answer.strip(), Verdict.CONTROL)
    return Said(answer.strip(), Verdict.BROKEN if broken and "\ufffd" in answer else Verdict.OK)


def said_elsewhere(chat: ChatFormat, text: str, *, strip_reasoning: bool) -> Said:
    """Returns what a model said whose text another program has written down, so that its tokens are not known.

    Such a program leaves control tokens out. Where one is spelt in the text, or a character stands for broken bytes, it cannot be known
    whether the model wrote just this, and the text is not used.
    """
    answer = _turn(chat, text)
    if strip_reasoning:
        found = without_reasoning(chat, text)
        if not found.text:
            return found
        answer = found.text
    if chat.token_bytes.has_control(answer):
        return Said(answer.strip(), Verdict.CONTROL)
    return Said(answer.strip(), Verdict.BROKEN if "\ufffd" in answer else Verdict.OK)


def without_reasoning(chat: ChatFormat, text: str) -> Said:
    """Returns the answer in a text that a program or a user has written down, without the reasoning before it."""
    turn = _turn(chat, text)
    answer = (chat.opening.stripped(turn) or "").strip()
    return Said(answer, Verdict.REASONING if turn.strip() and not answer else Verdict.OK)


def _turn(chat: ChatFormat, text: str) -> str:
    """The turn whose text was written down elsewhere.

    The generation prompt may have opened a block of reasoning, in which the text then begins. Or all of the block was taken out.
    """
    opening = chat.opening
    ends = any(block.end in text for block in opening.blocks)
    return opening.kept(opening.begun + text if ends and not text.lstrip().startswith(opening.begun) else text)


def _is_utf8(data: bytes) -> bool:
    """Whether bytes are a text."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
