"""Shows one conversation as a model sees it, for a terminal: its tokens and, under them, which of them are learnt.

    tokens  <|im_start|>│user│⏎│Hi│<|im_end|>│⏎│<|im_start|>│assistant│⏎│Hello│.│<|im_end|>
    mask    ............│....│.│..│..........│.│............│.........│.│^^^^^│^│$$$$$$$$$$

`^` marks the tokens of the response and `$` the end of turn. Both are labels; the rest is context. What a terminal would not
print is escaped as in token_rows.
"""

from __future__ import annotations

from typing import Any

from profuser.doctor.token_rows import LABEL, paint
from profuser.text.chat import ChatFormat
from profuser.text.conversation import Prompt
from profuser.text.display import column_width, printable
from profuser.text.encoded import Encoded

CONTEXT, RESPONSE, END = ".^$"
MASK_LEGEND = (
    "^ a token of the response, $ the end of turn: what the target learns and the sources are scored on; . is context"
)
COLORED = {RESPONSE: 0, END: 2}  # the marks that have a colour, each with its index in token_rows.COLORS


def describe(chat: ChatFormat, prompt: Prompt, response: str, *, complete: bool = True) -> dict[str, Any]:
    """Returns what `--json` prints about one conversation.

    Args:
        complete: False for a response that was cut, which has no end of turn.
    Raises:
        TokenBytesMismatch: the tokens do not hold the response.
    """
    encoded = chat.encode(prompt, response, complete=complete)
    prompt_ids = chat.prompt_ids(prompt)
    return {
        "rendered": "".join(text for text, _ in cells(chat, encoded)),
        "generation_prompt": "".join(token_text(chat, i) for i in prompt_ids),
        "generation_prompt_is_prefix": encoded.input_ids[: len(prompt_ids)] == prompt_ids,
        "tokens": [token_text(chat, i) for i in encoded.input_ids],
        "input_ids": encoded.input_ids,
        "label_mask": encoded.label_mask,
        "response_tokens": encoded.stop - encoded.start,
        "end_of_turn": None if encoded.end_of_turn is None else encoded.input_ids[encoded.end_of_turn],
        "end_ids": list(chat.end_ids),
    }


def conversation_rows(
    chat: ChatFormat, prompt: Prompt, response: str, *, color: bool, width: int, complete: bool = True
) -> list[str]:
    """Returns the same for a person: the rows of tokens and marks, broken at the width, and two lines that sum them up.

    Args:
        complete: False for a response that was cut, which has no end of turn.
    Raises:
        TokenBytesMismatch: the tokens do not hold the response.
    """
    # The two rows, side by side with bars between the tokens. A new pair of rows begins where the width is used up.
    encoded = chat.encode(prompt, response, complete=complete)
    lines: list[str] = []
    tokens, marks, used = "", "", 0

    def flush() -> None:
        """Ends the present pair of rows."""
        lines.extend((f"{'tokens':<{LABEL}}{tokens}", f"{'mask':<{LABEL}}{marks}", ""))

    for text, mark in cells(chat, encoded):
        shown = "".join("·" if c == " " else printable(c) for c in text) or "∅"
        columns = column_width(shown)
        if used and used + columns + 1 > width - LABEL:
            flush()
            tokens, marks, used = "", "", 0
        bar = "│" if used else ""
        tokens += bar + shown
        marks += bar + (paint(mark * columns, COLORED[mark], color) if mark in COLORED else mark * columns)
        used += columns + len(bar)
    flush()

    # How many labels there are, which token ends the turn, and whether a response would be generated behind the same tokens.
    ends = ", ".join(f"{token_text(chat, i)} ({i})" for i in chat.end_ids)
    end = (
        "(none: the response was cut)"
        if encoded.end_of_turn is None
        else token_text(chat, encoded.input_ids[encoded.end_of_turn])
    )
    opened = chat.prompt_ids(prompt)
    same = encoded.input_ids[: len(opened)] == opened
    closing = f", behind {chat.closing!r}" if chat.closing else ""
    return [
        *lines,
        f"{len(encoded.input_ids)} tokens, {sum(encoded.label_mask)} of them labels: {encoded.stop - encoded.start} of the "
        f"response (^) and the end of turn ($) {end}{closing}",
        f"generation begins behind {len(opened)} tokens, "
        + (
            "the same as above"
            if same
            else f"not quite the same: ...{''.join(token_text(chat, i) for i in opened[-6:])!r}"
        )
        + f", and ends at {ends}",
    ]


def cells(chat: ChatFormat, encoded: Encoded) -> list[tuple[str, str]]:
    """Returns the text and the mark of every token of a conversation."""
    labels = encoded.label_mask
    marks = (END if n == encoded.end_of_turn else RESPONSE if labels[n] else CONTEXT for n in range(len(labels)))
    return [(token_text(chat, token), mark) for token, mark in zip(encoded.input_ids, marks)]


def token_text(chat: ChatFormat, token: int) -> str:
    """Returns a token's own text. Bytes that do not make a character are escaped."""
    if token in chat.token_bytes.specials:
        return chat.token_bytes.specials[token]
    return (chat.token_bytes.pieces[token] or b"").decode(errors="backslashreplace")
