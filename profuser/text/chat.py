"""Conversations through a model's own chat template, with the response located exactly in bytes.

The template is rendered with sentinels in place of the prompt and the response. The text around the sentinels is the
frame. A conversation is the frame with the real texts in it. It is tokenised as a whole, so that its ids are those that the
model sees, with merges across the seams: in `[/INST] answer` the response begins with one token ` answer`, at byte -1 of
the response. If a text contains the string of a control token, this string stays plain text, and only the template's own
control tokens are control tokens. The end of turn is found by its role and not by its string. The template's bytes between
the response and the end of turn are part of no label, and what follows the end of turn is dropped.

Conversations of several turns are rendered as they are (`turns.py`), and so is a prompt of which a template makes something else than
to show it, stripped at most. Left out is how a template opens the assistant's turn because of what the prompt says (some turn
reasoning off at `/no_think`), and, on purpose, what it does to a response (some cut the reasoning out of it): a response is
compared byte by byte, so that it is always put in as it is. If it begins with reasoning, an empty block of reasoning does not stand
before it (`reasoning.py`).
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from profuser.errors import DataError
from profuser.text.conversation import Conversation, Prompt, Turn, as_messages
from profuser.text.encoded import Encoded, encode_response
from profuser.text.reasoning import opening_of
from profuser.text.template import FIX_IN_RECIPE, ChatTemplate, conversation
from profuser.text.token_bytes import TokenBytes
from profuser.text.turns import Waiting, around_response, rendered, waiting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PROMPT = "profuserPROMPTsentinel"
RESPONSE = "profuserRESPONSEsentinel"

RENDERED = 1024
"""So many conversations are kept as the template shows them, because each is encoded again for every segment of its answer."""


class ChatFormat:
    """Prompts and responses in the chat template of one tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer with a `tokenizers` backend and a chat template.
        end_ids: all of the model's end tokens, e.g. its generation config's `eos_token_id`. None means the tokenizer's eos.
            The first control token that the template puts after a response has the role, too.
        name, date, fix: those of `ChatTemplate`.
    Attributes:
        end_ids: the ids with the role end of turn.
        end_id: the one of them with which the template closes the turn.
        closing: the template's bytes between a response and the end of turn (" " for Llama-2, usually none).
        opening: how the template opens the assistant's turn, and what reasoning may stand there.
    Raises:
        DataError: there is no chat template, or the template does not show the prompt and the response once each, or it
            never ends the turn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        end_ids: Sequence[int] | None = None,
        name: str | None = None,
        date: datetime.date | None = None,
        fix: str = FIX_IN_RECIPE,
    ):
        self.template = ChatTemplate(tokenizer, name=name, date=date, fix=fix)
        name = self.template.name
        self.tokenizer = tokenizer
        known = [tokenizer.eos_token_id] if end_ids is None else list(end_ids)
        known = [i for i in known if i is not None]
        self.token_bytes = TokenBytes(tokenizer, control=known)

        # The frame, and whether the template strips the whitespace around a prompt.
        before, after, self._suffix = self._frame(name, PROMPT, RESPONSE)
        self._before, self._between = before, after
        padded_before, padded_after, _ = self._frame(name, f" \n{PROMPT}\n ", RESPONSE)
        self._strip_left = not padded_before.endswith(before + " \n")
        self._strip_right = not padded_after.startswith("\n " + after)
        self._generation = self._generation_frame(name)
        self._rendered = functools.lru_cache(RENDERED)(self._render)
        # A template may strip a prompt that waits for its response otherwise than one that has it.
        self._shows_alone = self.template.shows_alone and not self._makes_other(f" \n{PROMPT}\n ")
        self._alters = functools.lru_cache(RENDERED)(self._makes_other)
        self.opening = opening_of(
            self.template,
            finished=self._between,
            generation=self._generation[1],
            sentinels=(PROMPT, RESPONSE),
            has_control=self.token_bytes.has_control,
        )

        # The end of turn is the first control token after the response.
        ids = self.token_bytes.encode(before + PROMPT + after + RESPONSE + self._suffix)
        spans = self.token_bytes.spans(ids, before + PROMPT + after + RESPONSE + self._suffix)
        response_end = len((before + PROMPT + after + RESPONSE).encode())
        following = [i for i, (begin, _) in zip(ids, spans, strict=True) if begin >= response_end]
        closing_id = next((i for i in following if i in known or i in self.token_bytes.specials), None)
        if closing_id is None:
            raise DataError(
                f"a chat template must close the assistant's turn with an end token, {name}'s ends in {self._suffix!r}; "
                f"{self.template.fix}"
            )
        self.end_id: int = closing_id
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys([*known, closing_id]))
        end_begin = next(b for i, (b, _) in zip(ids, spans, strict=True) if b >= response_end and i == closing_id)
        self.closing: bytes = self._suffix.encode()[: end_begin - response_end]

    @property
    def digest(self) -> str:
        """A short hash of how the template shows a conversation, and of what ends a turn. It holds the date where the template does."""
        text = f"{self.tokenizer.chat_template} {self.template.text(conversation('x', 'y'))} {self.end_ids}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The ids that a model continues with its response: the prompt in the template, with the generation prompt.

        Raises:
            DataError: the template does not render a conversation, or does not show all of it.
        """
        parts = self._waiting(prompt).generation
        if any(literal and self.token_bytes.has_control(text) for text, literal in parts):
            return self.token_bytes.encode_parts(parts)[0]
        return self.token_bytes.encode("".join(text for text, _ in parts))

    def encode(self, prompt: Prompt, response: str, *, complete: bool = True) -> Encoded:
        """Tokenises the conversation of a prompt and a response.

        Args:
            response: it is put in as it is. The caller strips it once, before any template, because several templates would
                strip it.
            complete: False for a response that was cut. Nothing follows it, and it has no end of turn.
        Raises:
            DataError: as in `prompt_ids`.
            TokenBytesMismatch: the tokens do not hold the response's bytes exactly (reason "normaliser" or "decoder").
        """
        around = self._waiting(prompt)
        before = around.finished if self.opening.before(response) == self.opening.finished else around.bare
        return encode_response(self.token_bytes, before, response, around.behind if complete else "", self.end_ids)

    def encode_messages(self, messages: Sequence[Mapping[str, Any]], *, complete: bool = True) -> Encoded:
        """Tokenises a conversation of any number of turns, the last of which is the response.

        Args:
            messages: as `apply_chat_template` takes them. The response must be in the form in which the template shows it.
            complete: as in `encode`.
        Raises:
            DataError: the last message is no response, or the template does not render the messages or alters the response.
            TokenBytesMismatch: as in `encode`.
        """
        before, response, after = around_response(
            self.template, self.token_bytes, self.opening, messages, complete=complete
        )
        return encode_response(self.token_bytes, before, response, after, self.end_ids)

    def _waiting(self, prompt: Prompt) -> Waiting:
        """The template's text around the response to a prompt. A single turn is put into the frame, if the template shows it so."""
        if isinstance(prompt, Conversation) and not prompt.is_prompt:
            return self._rendered(prompt)
        if not self._shows_alone and self._alters(str(prompt)):
            return self._rendered(Conversation((Turn("user", str(prompt)),)))
        text = self._prompt(str(prompt))
        before, after = self._generation
        # The prompt is used in the form that its tokens hold, because only the response must be kept byte by byte.
        seen = self.token_bytes.seen(text)
        finished, bare = (
            [(self._before, False), (seen, True), (between, False)]
            for between in (self.opening.finished, self.opening.bare)
        )
        return Waiting([(before, False), (text, True), (after, False)], finished, bare, self._suffix)

    def _makes_other(self, prompt: str) -> bool:
        """Whether the template makes something else of a prompt than the frame with it.

        Where it also opens the assistant's turn otherwise, the frame is kept: what was written after another opening could not be told from
        its reasoning, because `opening` is one for all prompts.
        """
        shown = rendered(self.template, [{"role": "user", "content": prompt}], generation=True)
        return shown != self._prompt(prompt).join(self._asked) and shown.endswith(self._asked[1])

    def _render(self, prompt: Conversation) -> Waiting:
        """The template's text around the response to a conversation."""
        turns = prompt.turns
        if turns[0].role == "system" and not self._has_system:
            turns = prompt.without_system()
        return waiting(self.template, self.token_bytes, self.opening, as_messages(turns))

    @functools.cached_property
    def _has_system(self) -> bool:
        """Whether the template has a place for a system message. If it has none, this is said once."""
        has_system = self.template.has_system
        if not has_system:
            logger.warning(
                "%s's chat template has no system role: the text of a system message is put in front of the first user message",
                self.template.name,
            )
        return has_system

    def _prompt(self, prompt: str) -> str:
        """The prompt without the whitespace that the template strips."""
        prompt = prompt.lstrip() if self._strip_left else prompt
        return prompt.rstrip() if self._strip_right else prompt

    def _frame(self, name: str, prompt: str, response: str) -> tuple[str, str, str]:
        """The template's text before the prompt, between the prompt and the response, and after the response."""
        text = self.template.text(conversation(prompt, response))
        if text.count(PROMPT) != 1 or text.count(RESPONSE) != 1 or text.index(PROMPT) > text.index(RESPONSE):
            raise DataError(
                f"a chat template must show the prompt and then the response once each, {name}'s renders {text!r}; "
                f"{self.template.fix}"
            )
        before, rest = text.split(PROMPT)
        between, after = rest.split(RESPONSE)
        return before, between, after

    def _generation_frame(self, name: str) -> tuple[str, str]:
        """The text around the prompt when the response is still to come."""
        user = [{"role": "user", "content": PROMPT}]
        text = self.template.text(user, generation=True)
        if text.count(PROMPT) != 1:
            raise DataError(
                f"a chat template must show the prompt once, {name}'s renders {text!r}; {self.template.fix}"
            )
        self._asked = before, after = text.split(PROMPT)
        if text == self.template.text(user) and self._between.rstrip() != after.rstrip():
            # The template ignores add_generation_prompt.
            after = self._between.rstrip(" ")
        if before != self._before or not self._between.startswith(after.rstrip()):
            logger.warning(
                "%s's chat template opens a turn to generate with %r and a finished one with %r: responses are generated "
                "after the first and scored after the second",
                name, before + PROMPT + after, self._before + PROMPT + self._between,
            )  # fmt: skip
        return before, after
