"""Conversations of any number of turns, of which the last is the response, or waits for one: the template's text around it.

The messages are rendered with a sentinel in place of the response, and once more with sentinels in place of the other texts,
because strings of control tokens in these are plain text. The whitespace around a text stays where it is, for the template to
strip or keep. A template may also look into a text (some drop the reasoning of earlier turns). Then what it makes of the whole
conversation counts, and the texts cannot be told from it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from profuser.errors import DataError, first_line, in_short
from profuser.text.encoded import Part
from profuser.text.reasoning import Opening
from profuser.text.template import ChatTemplate, Message
from profuser.text.token_bytes import TokenBytes

TURN = "profuserTURN{}sentinel"


def around_response(
    template: ChatTemplate,
    tokens: TokenBytes,
    opening: Opening,
    messages: Sequence[Mapping[str, Any]],
    *,
    complete: bool,
) -> tuple[list[Part], str, str]:
    """Returns the text before the last message in parts, this message's content, and the template's text behind it.

    Args:
        opening: how the template opens the assistant's turn.
        complete: False for a response that was cut. Nothing stands behind it.
    Raises:
        DataError: the last message is no response, or the template does not render the messages or alters the response.
    """
    *earlier, last = checked(messages)
    response = last["content"]

    # A response that brings a block of reasoning of its own gets no empty one beside it.
    before, behind = _around(template, earlier, last)
    bare = _bare(before, opening, response)
    # Nothing was written behind a response that was cut, so that the template may strip the whitespace with which it ends.
    shown = response if complete else response.rstrip()
    expected = bare + shown + behind
    found = rendered(template, [*earlier, last | {"content": shown}])
    if found not in (expected, before + shown + behind):
        n = next((n for n, (a, b) in enumerate(zip(found, expected)) if a != b), len(expected))
        raise DataError(
            f"a chat template must show the response as it is, {template.name}'s renders {found[max(n - 20, 0) : n + 20]!r} in place "
            f"of {expected[max(n - 20, 0) : n + 20]!r}; give the response as the template shows it, without whitespace around it"
        )

    def render(turns: list[Message]) -> str:
        return _bare(_around(template, turns, last)[0], opening, response)

    return _in_parts(template, tokens, earlier, bare, render), response, behind if complete else ""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A conversation that waits for its response: the template's text before it, in parts.

    generation: what a model continues. finished: what stands before a response in a finished turn. bare: the same before a
    response that begins with reasoning of its own. behind: the text behind the response.
    """

    generation: list[Part]
    finished: list[Part]
    bare: list[Part]
    behind: str


def waiting(
    template: ChatTemplate, tokens: TokenBytes, opening: Opening, messages: Sequence[Mapping[str, Any]]
) -> Waiting:
    """Returns the template's text around the response to messages, the last of which is the user's.

    Raises:
        DataError: the template does not render the messages, or does not show all of them.
    """
    earlier, last = [dict(message) for message in messages], {"role": "assistant"}

    def generation(turns: list[Message]) -> str:
        text = rendered(template, turns, generation=True)
        if text == rendered(template, turns):
            before = _around(template, turns, last)[0]
            if text.rstrip() != before.rstrip():  # the template ignores add_generation_prompt
                return before.rstrip(" ")
        return text

    def in_parts(render: Callable[[list[Message]], str]) -> list[Part]:
        return _in_parts(template, tokens, earlier, render(earlier), render, whole=True)

    def before(response: str) -> Callable[[list[Message]], str]:
        return lambda turns: _bare(_around(template, turns, last)[0], opening, response)

    finished = in_parts(before(""))
    bare = finished if opening.empty is None else in_parts(before(opening.empty.begin))
    return Waiting(in_parts(generation), finished, bare, _around(template, earlier, last)[1])


def _around(template: ChatTemplate, turns: list[Message], last: Message) -> tuple[str, str]:
    """Renders turns and a sentinel in place of the last message's content. The text around the sentinel is returned."""
    sentinel = TURN.format(len(turns))
    text = rendered(template, [*turns, last | {"content": sentinel}])
    if text.count(sentinel) != 1:
        raise DataError(
            f"a chat template must show the response once, {template.name}'s renders {text!r}; {template.fix}"
        )
    before, behind = text.split(sentinel)
    return before, behind


def _in_parts(
    template: ChatTemplate,
    tokens: TokenBytes,
    messages: list[Message],
    text: str,
    render: Callable[[list[Message]], str],
    *,
    whole: bool = False,
) -> list[Part]:
    """Returns in parts the text that `render` makes of messages, by rendering them with sentinels in place of their texts.

    Args:
        whole: whether every message must be seen in it.
    Raises:
        DataError: the template alters a text in which there is the string of a control token, or leaves out a message.
    """
    contents = [m["content"] if isinstance(m["content"], str) else "" for m in messages]
    texts = {TURN.format(n): text.strip() for n, text in enumerate(contents) if text.strip()}
    if not texts:
        return [(text, False)]
    framed = [
        m | {"content": text.replace(text.strip(), TURN.format(n))} if text.strip() else m
        for n, (m, text) in enumerate(zip(messages, contents))
    ]
    pieces = re.split(f"({'|'.join(texts)})", render(framed))
    if whole and (unseen := next((text for turn, text in texts.items() if turn not in pieces), None)) is not None:
        raise DataError(
            f"a chat template must show every message, {template.name}'s leaves out {in_short(unseen)[:60]}; {template.fix}, or leave "
            "the model out"
        )
    parts = [(texts.get(piece, piece), piece in texts) for piece in pieces]
    if "".join(part for part, _ in parts) == text:
        return [(tokens.seen(part) if literal else part, literal) for part, literal in parts]
    if any(map(tokens.has_control, texts.values())):
        raise DataError(
            f"a chat template must show messages as they are where they hold strings of control tokens, {template.name}'s alters one; "
            "skip this conversation"
        )
    return [(tokens.seen_rendered(text), False)]


def checked(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Returns the messages of a conversation as dicts.

    Raises:
        DataError: there are none, they lack a role or content, or the last of them is no response.
    """
    turns = [dict(message) for message in messages]
    if not turns:
        raise DataError("a conversation must have messages, got none; skip it")
    for n, turn in enumerate(turns):
        # An assistant that calls tools may say nothing.
        silent = turn.get("role") == "assistant" and turn.setdefault("content", None) is None
        if not isinstance(turn.get("role"), str) or not (silent or isinstance(turn.get("content"), str)):
            raise DataError(
                f"a message must have a `role` and a `content` that are strings, got {in_short(turn)} as number {n + 1}; "
                "join the parts of a content to one string"
            )
    if turns[-1]["role"] != "assistant":
        raise DataError(
            f"the last message must be the response, of role 'assistant', got role {turns[-1]['role']!r}; append the response"
        )
    if not turns[-1]["content"]:
        raise DataError("the last message must be a response that is not empty, got no text; skip this conversation")
    return turns


def _bare(before: str, opening: Opening, response: str) -> str:
    """The text before a response without an empty block of reasoning, if the response brings one of its own."""
    if not before.endswith(opening.finished):
        return before
    return before.removesuffix(opening.finished) + opening.before(response)


def rendered(template: ChatTemplate, messages: list[Message], *, generation: bool = False) -> str:
    """Returns the text of messages. It raises DataError where the template does not render them."""
    try:
        return template.text(messages, generation=generation)
    except DataError:
        raise
    except Exception as error:  # a template's code may raise anything
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"{template.name}'s chat template must render the roles {roles}, it raised {type(error).__name__}: {first_line(error)}; "
            "put the text into messages that it renders, for instance a system message's into the first user message"
        ) from error
