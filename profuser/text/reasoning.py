"""What a model writes between the generation prompt and its answer: blocks of reasoning, and the headers of channels.

Qwen3 writes `<think>…</think>` before its answer, and its template writes an empty block of this kind before a finished answer.
The generation prompt of DeepSeek-R1 writes the opening mark itself. gpt-oss reasons in one channel and answers in another; its
template writes the header of the second before a finished answer. An `Opening` is what can be known of this from how a template
opens a turn that is still to come and one that is finished. Control tokens are spelt out in all texts here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from profuser.text.template import ChatTemplate


class Block(NamedTuple):
    """The marks around a block of reasoning. `begin` is empty where every turn begins inside of the block."""

    begin: str
    end: str


KNOWN_BLOCKS = (
    Block("<think>", "</think>"),
    Block("<thinking>", "</thinking>"),
    Block("<thought>", "</thought>"),
    Block("<reasoning>", "</reasoning>"),
    Block("<seed:think>", "</seed:think>"),
    Block("[THINK]", "[/THINK]"),
    Block("◁think▷", "◁/think▷"),
    Block("<|START_THINKING|>", "<|END_THINKING|>"),
    Block("<|begin_of_thought|>", "<|end_of_thought|>"),
)
"""The marks that reasoning models use. A template may show others, if it renders the reasoning of a message."""

THOUGHT = "profuserTHOUGHTsentinel"


@dataclass(frozen=True, slots=True)
class Opening:
    """How a template opens the assistant's turn.

    finished: its text before a finished response.
    empty: the block without reasoning in which `finished` may end, and bare: `finished` without this block.
    begun: the beginning of a block with which the generation prompt may end. The model goes on inside of this block.
    header: what else `finished` has beyond the generation prompt, without the whitespace around it. The model is expected to
        write it itself before its answer. is_channel: whether there is a control token in it.
    blocks: the blocks of reasoning that a model may write.
    """

    finished: str
    empty: Block | None
    bare: str
    begun: str
    header: str
    is_channel: bool
    blocks: tuple[Block, ...]

    @property
    def marks(self) -> list[str]:
        """The strings by which reasoning is told from an answer."""
        return [mark for mark in (self.header, *(mark for block in self.blocks for mark in block)) if mark]

    def before(self, response: str) -> str:
        """Returns the template's text before a response. One that brings a block of its own gets no empty one beside it."""
        return self.bare if self.empty is not None and response.startswith(self.empty.begin) else self.finished

    def kept(self, turn: str) -> str:
        """Returns a turn with its reasoning. It lacks only the header, which the template writes before it."""
        return turn.lstrip().removeprefix(self.header) if self.header else turn

    def stripped(self, turn: str) -> str | None:
        """Returns a turn without its reasoning. If the reasoning has no end, nothing is left.

        It is None where the answer cannot be told from the reasoning, because a mark is left over: a cut there could take away a
        part of the answer.
        """
        if self.is_channel and self.header in turn:
            return turn.partition(self.header)[2]
        answer = self.kept(turn).lstrip()
        while (block := next((b for b in self.blocks if answer.startswith(b.begin)), None)) is not None:
            _, end, answer = answer.removeprefix(block.begin).partition(block.end)
            answer = answer.lstrip()
            if not end:
                return ""
            if not block.begin:
                break
        return None if any(mark in answer for mark in self.marks if mark != self.header) else answer


def opening_of(
    template: ChatTemplate,
    *,
    finished: str,
    generation: str,
    sentinels: tuple[str, str],
    has_control: Callable[[str], bool],
) -> Opening:
    """Returns how a template opens the assistant's turn.

    Args:
        finished, generation: its text between a prompt and its response, and behind a prompt that is to be answered.
        sentinels: texts that may stand for a prompt and a response.
        has_control: says whether a text spells a control token.
    """
    blocks = (*KNOWN_BLOCKS, *_own_blocks(template, generation, sentinels))
    bare, empty, _ = _without_block(finished, blocks)
    start, block, inside = _without_block(generation, blocks)
    begun = "" if block is None or inside.strip() else block.begin + inside
    start = start.rstrip()
    header = bare.removeprefix(start).strip() if bare.startswith(start) else ""
    return Opening(finished, empty, bare, begun, header, has_control(header), blocks)


def _without_block(text: str, blocks: Sequence[Block]) -> tuple[str, Block | None, str]:
    """Takes a block without any reasoning from the end of a text: (the text before it, the block, what follows its `begin`).

    The last of these is whitespace if the block has no end yet.
    """
    for block in blocks:
        before, begin, inside = text.rpartition(block.begin) if block.begin else ("", "", "")
        if begin and inside.strip() in ("", block.end):
            return before, block, inside
    return text, None, ""


def _own_blocks(template: ChatTemplate, generation: str, sentinels: tuple[str, str]) -> list[Block]:
    """Returns the block in which a template shows the reasoning of a message, if it does so and the block is not known."""
    prompt, response = sentinels
    thoughts = dict.fromkeys(("reasoning_content", "reasoning", "thinking"), THOUGHT)
    user, assistant = {"role": "user", "content": prompt}, {"role": "assistant", "content": response}
    try:
        text = template.text([user, assistant | thoughts])
    except Exception:  # a template that does not expect these keys may raise anything
        return []
    head, thought, rest = text.partition(prompt)[2].partition(THOUGHT)
    end, answer, _ = rest.partition(response)
    if not (thought and answer and end.strip()) or THOUGHT in rest:
        return []
    if any(block.begin in head or block.end in end for block in KNOWN_BLOCKS):
        return []
    return [Block(head.removeprefix(generation.rstrip()).strip(), end.strip())]
