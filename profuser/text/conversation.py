"""What is to be answered: the text of one user's turn, or a conversation, as chat APIs and data sets write it down.

A conversation may begin with a system message. Then the user and the assistant speak in turn, and the last turn is the user's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from profuser.errors import DataError, in_short

ROLES = ("system", "user", "assistant")


class Turn(NamedTuple):
    """Who speaks, one of ROLES, and what is said."""

    role: str
    text: str


def as_messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as chat templates and APIs take them."""
    return [{"role": role, "content": text} for role, text in turns]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Several turns, of which the last waits for a response.

    given: the messages as they stand in a file.
    """

    turns: tuple[Turn, ...]
    given: Sequence[Mapping[str, Any]] = field(default=(), compare=False)

    @classmethod
    def of(cls, messages: object) -> Conversation:
        """Reads messages. A content may be a text, or a list of parts, whose texts are joined as they are.

        Raises:
            DataError: they are no conversation that waits for a response, or hold anything else than texts.
        """
        if not isinstance(messages, list) or not messages:
            raise DataError(
                f"messages must be a list with at least the user's turn, got {in_short(messages)}; give a role and a content for each"
            )
        turns = [_turn(number, message) for number, message in enumerate(messages, start=1)]
        spoken = turns[1:] if turns[0].role == "system" else turns
        for number, turn in enumerate(spoken):
            expected = ROLES[1 + number % 2]
            if turn.role != expected:
                place = number + len(turns) - len(spoken) + 1
                fix = (
                    "join the two, or add the turn between them"
                    if number
                    else "take it out, or add the user's before it"
                )
                if turn.role == "system":
                    fix = "give all of it in one message, the first"
                raise DataError(
                    f"the user and the assistant must speak in turn, the user first, got the role {turn.role} in place of {expected} in "
                    f"message {place}; {fix}"
                )
        if turns[-1].role != "user":
            raise DataError(
                f"the last message must be the user's, which is answered, got the role {turns[-1].role}; take it off, or add the user's"
            )
        return cls(tuple(turns), messages)

    def __str__(self) -> str:
        """The text of a single turn, or all turns with their roles."""
        if self.is_prompt:
            return self.turns[0].text
        return "\n".join(f"{turn.role}: {turn.text}" for turn in self.turns)

    def without_system(self) -> tuple[Turn, ...]:
        """The turns with the text of the system message in front of the first user message."""
        (_, system), (role, text), *others = self.turns
        return (Turn(role, f"{system}\n\n{text}" if system.strip() else text), *others)

    @property
    def is_prompt(self) -> bool:
        """Whether there is nothing but one turn of the user."""
        return len(self.turns) == 1


Prompt = str | Conversation
"""What is to be answered. The text stands for a single turn of the user."""


def _turn(number: int, message: object) -> Turn:
    where = f"message {number}"
    if not isinstance(message, Mapping):
        raise DataError(f"{where} must have a role and a content, got {in_short(message)}; fix the message")
    role = message.get("role")
    if role not in ROLES:
        raise DataError(
            f"the role of {where} must be one of {', '.join(ROLES)}, got {in_short(role)}; give it one of these, or take it out"
        )
    _check_keys(where, message, ("role", "content"))
    content = message.get("content")
    text = content_text(where, content)
    if not text.strip() and role != "system":
        raise DataError(f"the content of {where} must be a text, got {in_short(content)}; fill it in, or take it out")
    return Turn(role, text)


def content_text(where: str, content: object) -> str:
    """The text of a message's content, which may be a list of parts: their texts are then joined as they are.

    Args:
        where: what messages call the message.
    Raises:
        DataError: it is something else, or has a part that is no text.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"the content of {where} must be a text, got {in_short(content)}; fill it in, or take it out")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, Mapping) and kind == "text" and isinstance(text := part.get("text"), str):
            _check_keys(f"a part of {where}", part, ("type", "text"))
            texts.append(text)
        else:
            found = kind if isinstance(kind, str) and kind != "text" else part
            raise DataError(
                f"every part of {where} must be a text, because nothing else is read here, got {in_short(found)}; take it out"
            )
    return "".join(texts)


def _check_keys(where: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises DataError for a key that holds anything and that nobody would look at, such as the call of a tool."""
    for key, value in given.items():
        if key not in known and value not in (None, "", [], {}):
            raise DataError(
                f"{where} may have {' and '.join(known)}, got {in_short(key)}, which is not read here; take it out"
            )
