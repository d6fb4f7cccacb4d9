"""Conversations through a model's own chat template, with the response located exactly in bytes.

The template is rendered with sentinels in place of the prompt and the response. The text around the sentinels is the
frame. A conversation is the frame with the real texts in it. It is tokenised as a whole, so that its ids are those that the
model sees, with merges across the seams: in `[/INST] answer` the response begins with one token ` answer`, at byte -1 of
the response. If a text contains the string of a control token, this string stays plain text, and only the template's own
control tokens are control tokens. The end of turn is found by its role and not by its string. The template's bytes between
the response and the end of turn are part of no label, and what follows the end of turn is dropped.

Two things are left out on purpose. There is only one turn. And of what a template does to the texts, only the stripping of
the prompt is repeated (some templates also cut the reasoning out of a response). The response is compared byte by byte, so
it is always put in as it is. If it begins with reasoning, an empty block of reasoning does not stand before it
(`reasoning.py`).
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from profuser.errors import DataError
from profuser.text.encoded import Encoded
from profuser.text.reasoning import opening_of
from profuser.text.template import ChatTemplate, conversation
from profuser.text.token_bytes import TokenBytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PROMPT = "profuserPROMPTsentinel"
RESPONSE = "profuserRESPONSEsentinel"


class ChatFormat:
    """Prompts and responses in the chat template of one tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer with a `tokenizers` backend and a chat template.
        end_ids: all of the model's end tokens, e.g. its generation config's `eos_token_id`. None means the tokenizer's eos.
            The first control token that the template puts after a response has the role, too.
        date: the date that the template gets; None means today.
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
        date: datetime.date | None = None,
    ):
        self.template = ChatTemplate(tokenizer, date=date)
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
                "set `chat_template` for that source in the recipe"
            )
        self.end_id: int = closing_id
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys([*known, closing_id]))
        end_begin = next(b for i, (b, _) in zip(ids, spans, strict=True) if b >= response_end and i == closing_id)
        self.closing: bytes = self._suffix.encode()[: end_begin - response_end]

    def prompt_ids(self, prompt: str) -> list[int]:
        """The ids that a model continues with its response: the prompt in the template, with the generation prompt."""
        before, after = self._generation
        parts = [(before, False), (self._prompt(prompt), True), (after, False)]
        if self.token_bytes.has_control(prompt):
            return self.token_bytes.encode_parts(parts)[0]
        return self.token_bytes.encode("".join(text for text, _ in parts))

    def encode(self, prompt: str, response: str, *, complete: bool = True) -> Encoded:
        """Tokenises the conversation of a prompt and a response.

        Args:
            response: it is put in as it is. The caller strips it once, before any template, because several templates would
                strip it.
            complete: False for a response that was cut. Nothing follows it, and it has no end of turn.
        Raises:
            TokenBytesMismatch: the tokens do not hold the response's bytes exactly (reason "normaliser" or "decoder").
        """
        # Put the texts into the frame, and find the bytes of each. The prompt is used in the form that its tokens hold,
        # because only the response must be kept byte by byte.
        prompt = self.token_bytes.seen(self._prompt(prompt))
        between, suffix = self.opening.before(response), self._suffix if complete else ""
        parts = [(self._before, False), (prompt, True), (between, False), (response, True), (suffix, False)]
        text = "".join(part for part, _ in parts)
        prompt_begin = len(self._before.encode())
        prompt_end = prompt_begin + len(prompt.encode())
        begin = prompt_end + len(between.encode())
        end = begin + len(response.encode())

        # Tokenise the whole. If a control token covers a byte of the prompt or of the response, tokenise again in parts, so
        # that strings of control tokens in these texts stay plain text.
        ids, words = self.token_bytes.encode_words(text)
        spans = self.token_bytes.spans(ids, text)
        specials = self.token_bytes.specials
        if any(
            i in specials and b < f and ((prompt_begin < f and b < prompt_end) or (begin < f and b < end))
            for i, (b, f) in zip(ids, spans, strict=True)
        ):
            ids, words = self.token_bytes.encode_parts(parts)
            spans = self.token_bytes.spans(ids, text)

        # Find the tokens that hold the response's bytes. An empty response has none.
        held = [n for n, (b, f) in enumerate(spans) if b < end and f > begin and b < f]
        if held and begin < end:
            start, stop = held[0], held[-1] + 1
        else:
            start = stop = next((n for n, (b, _) in enumerate(spans) if b >= begin), len(ids))
        self.token_bytes.check_whole(ids[start:stop], spans[start:stop], text)
        # Find the end of turn, and drop what follows it.
        end_of_turn = next((n for n in range(stop, len(ids)) if ids[n] in self.end_ids), None) if complete else None
        length = stop if end_of_turn is None else end_of_turn + 1
        return Encoded(
            input_ids=ids[:length],
            spans=[(b - begin, f - begin) for b, f in spans[start:stop]],
            start=start,
            stop=stop,
            end_of_turn=end_of_turn,
            words=words[:length],
        )

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
                "set `chat_template` for that source in the recipe"
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
                f"a chat template must show the prompt once, {name}'s renders {text!r}; set `chat_template` for that source"
            )
        before, after = text.split(PROMPT)
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
