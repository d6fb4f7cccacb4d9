"""A model's own chat template, rendered for one date.

Some templates write the current date into every conversation, with the function `strftime_now`. A conversation that is
rendered again on another day would then have other tokens than before, and no error would be raised. A `ChatTemplate`
therefore has a date of its own. A macro is put in front of such a template, which hides the function of the same name and
knows this date alone, at midnight.
"""

from __future__ import annotations

import datetime
import json
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError

from profuser.errors import DataError, first_line, in_short
from profuser.text.bounded import BoundedRenderer, Render, renderer_of
from profuser.text.conversation import Conversation, Prompt, Turn, as_messages
from profuser.text.shows_alone import shows_texts_alone

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
"""One turn of a conversation: its `role`, its `content`, and whatever else a template may know of."""

FIX_IN_RECIPE = (
    "set `chat_template` for that source or judge in the recipe, or put a chat_template.jinja beside its tokenizer"
)
"""What can be done about a chat template. The file also helps where the recipe has no such key: for a target that is no source."""
FIX_OF_RECIPES_OWN = "correct the `chat_template` of that source or judge in the recipe"
"""What can be done about one that the recipe gives."""

SYSTEM = "profuserSYSTEMsentinel"

TEMPLATE_CHARACTERS = 1 << 20
"""The most characters that a chat template may have. The longest in use have some 20,000."""
TOGETHER = 64
"""How many conversations are rendered together."""


def conversation(prompt: Prompt, response: str) -> list[Message]:
    """Returns a prompt and a response as the messages of a conversation, two where the prompt is a text."""
    turns = prompt.turns if isinstance(prompt, Conversation) else (Turn("user", prompt),)
    return as_messages((*turns, Turn("assistant", response)))


class ChatTemplate:
    """The chat template of one tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        name: what messages call the model; None takes the name of the tokenizer, which is its folder or its id on the Hub.
        date: the date that the template gets, whenever it is rendered. None means today.
        fix: what to do about a template that does not fit, for messages.
    Raises:
        DataError: there is no chat template, or it does not render a conversation of a user and an assistant.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        date: datetime.date | None = None,
        fix: str = FIX_IN_RECIPE,
    ):
        self.tokenizer = tokenizer
        self.fix = fix
        self.name = name or getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not tokenizer.chat_template:
            raise DataError(f"a model needs a chat template, {self.name} has none; {fix}")
        # The tokenizer may have several templates, of which the default one is for conversations without tools.
        try:
            self._template = tokenizer.get_chat_template()
        except ValueError as error:
            raise DataError(
                f"one of {self.name}'s chat templates must be the default, got {', '.join(tokenizer.chat_template)} "
                f"({first_line(error)}); {fix}"
            ) from None
        if len(self._template) > TEMPLATE_CHARACTERS:
            raise DataError(
                f"a chat template must have at most {TEMPLATE_CHARACTERS:,} characters, {self.name}'s has {len(self._template):,}; "
                f"{fix}"
            )
        self._code = self._template if _renders_as_all_do(tokenizer) else None  # None: its code does not tell all
        if "strftime_now" in self._template:
            self._template = _clock_at(date or datetime.date.today()) + self._template
        render, renderer = partial(tokenizer.apply_chat_template, chat_template=self._template, tokenize=False), None
        if self._code is not None:
            special = dict(tokenizer.special_tokens_map)
            renderer = renderer_of(self._template, json.dumps(special, sort_keys=True, default=str))
            # Whoever changes the tokenizer later, these are rendered.
            render = partial(render, **special)
        self._render = partial(renderer or BoundedRenderer(), cast("Render", render), self.name)
        self._system = self._needs_system()

    def text(self, messages: list[Message], *, generation: bool = False) -> str:
        """Renders messages. `generation` adds what opens the assistant's turn."""
        return self._render([self._with_system(messages)], add_generation_prompt=generation)[0]

    def ids(self, messages: list[Message]) -> list[int]:
        """Returns the tokens that the tokenizer's `apply_chat_template` gives for messages. It raises what `many_ids` raises."""
        return self.many_ids([messages])[0]

    def many_ids(self, conversations: Sequence[list[Message]]) -> list[list[int]]:
        """Returns the tokens that the tokenizer's `apply_chat_template` gives for each conversation.

        Raises:
            DataError: the template does not render one of them.
        """
        ids: list[list[int]] = []
        for first in range(0, len(conversations), TOGETHER):
            texts = self.many_texts(conversations[first : first + TOGETHER])
            ids.extend(cast("list[list[int]]", self.tokenizer(texts, add_special_tokens=False)["input_ids"]))
        return ids

    def many_texts(self, conversations: Sequence[list[Message]]) -> list[str]:
        """Renders conversations together. It raises what `many_ids` raises."""
        try:
            return self._render(list(map(self._with_system, conversations)), add_generation_prompt=False)
        except Exception:  # one by one, so that the conversation can be named
            return list(map(self._text_of, conversations))

    @cached_property
    def shows_alone(self) -> bool:
        """Whether it is certain to do nothing with the text of a message but show it, stripped at most."""
        return self._code is not None and shows_texts_alone(self._code)

    @cached_property
    def has_system(self) -> bool:
        """Whether it has a place for a system message, and shows one otherwise than what the user or the assistant says."""

        def shown(role: str) -> str | None:
            try:
                return self.text([{"role": role, "content": SYSTEM}, {"role": "user", "content": "x"}], generation=True)
            except DataError:
                raise
            except Exception:  # a template's code may raise anything
                return None

        text = shown("system")
        return text is not None and SYSTEM in text and text not in (shown("user"), shown("assistant"))

    def seen(self, prompt: Prompt) -> Prompt:
        """A prompt as the template can show it: a system message goes in front of the user's first where there is no place for it."""
        if isinstance(prompt, Conversation) and prompt.turns[0].role == "system" and not self.has_system:
            return Conversation(prompt.without_system())
        return prompt

    def _with_system(self, messages: list[Message]) -> list[Message]:
        """Returns messages with an empty system message in front, if the template needs one and there is none."""
        has_system = bool(messages) and messages[0]["role"] == "system"
        return [{"role": "system", "content": ""}, *messages] if self._system and not has_system else messages

    def _text_of(self, messages: list[Message]) -> str:
        """Renders messages. It raises DataError where the template does not render them."""
        try:
            return self.text(messages)
        except DataError:
            raise
        except Exception as error:  # a template's code may raise anything
            raise DataError(
                f"{self.name}'s chat template must render every conversation, on the prompt {in_short(messages[0]['content'])} it "
                f"raised {type(error).__name__}: {first_line(error)}; {self.fix}"
            ) from error

    def _needs_system(self) -> bool:
        """Whether the template renders only with a system message. If so, an empty one is given to it."""
        self._system = False
        try:
            self.text(conversation("x", "y"))
            return False
        except Exception as error:
            # A template's own refusals are TemplateErrors, but its code may raise anything.
            if isinstance(error, DataError):
                raise
            if not isinstance(error, TemplateError):
                raise DataError(
                    f"{self.name}'s chat template must render, it raised {type(error).__name__}: {first_line(error)}; {self.fix}"
                ) from None
        self._system = True
        try:
            self.text(conversation("x", "y"))
            return True
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"{self.name}'s chat template must render a user and an assistant message, got: {first_line(error)}; {self.fix}"
            ) from error


def _renders_as_all_do(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer has no way of its own to render a template."""
    from transformers import PreTrainedTokenizerBase

    methods = ("apply_chat_template", "get_chat_template")
    return not any(
        method in vars(tokenizer) or getattr(type(tokenizer), method) is not getattr(PreTrainedTokenizerBase, method)
        for method in methods
    )


def _clock_at(date: datetime.date) -> str:
    """Returns the macro `strftime_now(format)`, which writes a date in any format of Python's `strftime`.

    A macro can call no function of ours, so that it holds what each directive of a format gives (`Y` for `%Y`, `-d` for the
    `%-d` of some systems). The line end behind it is not rendered, and lets the template begin at the beginning of a line.
    """
    midnight = datetime.datetime.combine(date, datetime.time())
    directives = [flag + letter for flag in ("", "-") for letter in "aAbBcdfGHIjmMpSuUVwWxXyYzZ"]
    given = json.dumps({directive: midnight.strftime(f"%{directive}") for directive in directives})
    return (
        "{%- macro strftime_now(format) -%}"
        "{%- set given, parts = " + given + r", format.replace('%%', '\x00').split('%') -%}"
        r"{{- parts[0].replace('\x00', '%') -}}"
        "{%- for part in parts[1:] -%}"
        "{%- set size = 2 if part[:1] == '-' else 1 -%}"
        r"{{- (given.get(part[:size], '%' ~ part[:size]) ~ part[size:]).replace('\x00', '%') -}}"
        "{%- endfor -%}{%- endmacro %}\n"
    )
