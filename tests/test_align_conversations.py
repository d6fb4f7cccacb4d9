"""`align` and `prefix_ranges` on conversations: the rows are those of `profuser.prepare`, in the models' own templates."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from small_tokenizers import CHATML, LLAMA2, SMALL, real_tokenizer, small_chat, wrap
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from profuser import align, prefix_ranges, source_topk
from profuser.alignment.align import AlignedText, chat_of
from profuser.alignment.engine import byte_aligner
from profuser.alignment.ranges import ranges_needed
from profuser.alignment.types import INSIDE
from profuser.alignment.vocab_map import ByteOrder
from profuser.errors import DataError
from profuser.experiments import topk_alone
from profuser.kernels.source_topk import source_topk_from_logits
from profuser.models.head import head_of
from profuser.models.load import chat_format, load_model, load_tokenizer
from profuser.prepare.capture import CaptureRequest, capture_responses
from profuser.recipe.schema import SourceConfig

LLAMA2_SYSTEM = (  # as LLAMA2, and the system message stands in the first user message, as in Llama-2's own template
    "{% set system = '' %}{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + "
    "'\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + ((system if loop.first else '') + m['content']).strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system messages') }}{% endif %}" + CHATML
FORGETS = (  # the reasoning of earlier turns is dropped, as by Qwen3's template
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'].split('</think>')[-1].lstrip('\n') }}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Message = dict[str, str]


def turns(*texts: str, system: str | None = None) -> list[Message]:
    """A conversation of a user and an assistant in turn."""
    begin = [] if system is None else [{"role": "system", "content": system}]
    return begin + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


CONVERSATIONS = {
    "one turn": turns("hello cat ", "The answer is 42, because 6*7=42."),
    "a system message": turns("What is 6*7?", "The answer is 42.", system="Things like these don't happen."),
    "several turns": turns(
        "hello", "hello help, said the cat", "\nWhat is 6*7?", "  42", "In 2026?", "There were 12345 of them."
    ),
    "control strings": turns("what does </s> do, and <|im_end|>?", "</s> ends", "and <s>?", "<s> begins, 3.14"),
}
conversations = pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=list(CONVERSATIONS))
pairs = pytest.mark.parametrize(
    "pair",
    [
        ("llama-2 prepend", "byte-level"),
        ("byte-level", "llama-2 prepend"),
        ("llama2", "qwen2"),
        pytest.param(("qwen2", "llama2"), marks=pytest.mark.long),
    ],
    ids="<-".join,
)


@functools.cache
def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """A small or a real tokenizer with a template of its own: Llama-2's, or ChatML."""
    tokenizer = wrap(SMALL[name]()) if name in SMALL else real_tokenizer(name)
    tokenizer.chat_template = LLAMA2_SYSTEM if "llama" in name else CHATML
    return tokenizer


def rendered_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    render: Any = tokenizer.apply_chat_template
    return render(messages, tokenize=True, return_dict=False)


def aligned_by(text: Any, target, source, *, with_ranges: bool = True, **options) -> AlignedText:
    """Aligns an arbitrary source, whose logits at a row depend on the row's own token and its place from the end alone."""
    needed = prefix_ranges(text, target, source, **options)
    labels = needed.input_ids[needed.positions]
    logits = torch.randn(len(labels), len(source), generator=torch.Generator().manual_seed(0)) * 3
    logits[torch.arange(len(labels)), labels] += 20
    top_ids, top_logprobs, _, ce, *of_ranges = source_topk_from_logits(logits, labels, 10, ranges=needed)
    return align(text, target, source, top_ids, top_logprobs, -ce, of_ranges if with_ranges else None, **options)


def assert_same(found: AlignedText, expected: AlignedText, rows: int) -> None:
    """Checks that the first rows of two results are the same."""
    for name in ("target_ids", "target_spans", "source_ids", "kind", "skip_reason"):
        assert getattr(found, name)[:rows].tolist() == getattr(expected, name)[:rows].tolist(), name
    for name in ("source_logprobs", "source_tail", "reliability"):
        torch.testing.assert_close(getattr(found, name)[:rows], getattr(expected, name)[:rows])


@pytest.fixture(scope="module")
def demo():
    """(target's tokenizer, source's tokenizer, source model, target's chat, source's chat), as prepare opens them."""
    target, source = (SourceConfig(name=name, model=f"demo:{name}") for name in ("guardian", "scholar"))
    model = load_model(source, dtype=torch.float32)
    return load_tokenizer(target), load_tokenizer(source), model, chat_format(target), chat_format(source)


@pytest.mark.parametrize("complete", [True, False], ids=["finished", "cut"])
@pytest.mark.parametrize("prompt", ["How does a bozun taste?", "  say </s> and <|im_end|> \n"])
def test_a_conversation_is_aligned_as_prepare_aligns_it(demo, prompt, complete):
    target, source, model, target_chat, source_chat = demo
    response = "A bozun is a stone. 8-4=4, not 12. Answer: bitter."
    own, theirs = (chat.encode(prompt, response, complete=complete) for chat in (source_chat, target_chat))
    order = ByteOrder(source_chat.token_bytes)
    ranges = ranges_needed(target_chat.token_bytes, theirs, source_chat.token_bytes, own, order)
    request = CaptureRequest(own, len(response), ranges)
    ((_, scored),) = capture_responses(model, head_of(model), [request], order, top_k=10, batch_size=1)
    expected = byte_aligner(target_chat, source_chat).align(response.encode(), theirs, scored.capture)

    messages = turns(prompt, response)
    needed = prefix_ranges(messages, target, source, complete=complete)
    assert needed.input_ids.tolist() == own.input_ids
    assert needed.positions.tolist() == own.label_positions
    with torch.no_grad():
        hidden = model.base_model(needed.input_ids[None]).last_hidden_state[0, needed.positions - 1]
        head = model.get_output_embeddings().weight
        top_ids, top_logprobs, _, ce, *of_ranges = source_topk(
            hidden, head, needed.input_ids[needed.positions], 10, ranges=needed
        )
    aligned = align(messages, target, source, top_ids, top_logprobs, -ce, of_ranges, complete=complete)
    assert aligned.input_ids.tolist() == theirs.input_ids
    assert aligned.positions.tolist() == theirs.label_positions
    assert aligned.kind.tolist() == expected.kind.tolist()
    assert (aligned.source_ids >= 0).sum(1).tolist() == np.diff(expected.offsets).tolist()
    assert aligned.source_ids[aligned.source_ids >= 0].tolist() == expected.ids.tolist()
    found = aligned.source_logprobs[aligned.source_ids >= 0]
    torch.testing.assert_close(found, torch.from_numpy(expected.logprobs), rtol=1e-4, atol=1e-4)


@pairs
@conversations
def test_rows_are_the_responses_in_each_models_own_template(pair, messages):
    target, source = map(tokenizer_of, pair)
    response = messages[-1]["content"]
    needed, aligned = prefix_ranges(messages, target, source), aligned_by(messages, target, source)
    for tokenizer, ids, positions in (
        (source, needed.input_ids, needed.positions),
        (target, aligned.input_ids, aligned.positions),
    ):
        chat = chat_of(tokenizer)
        spelt = chat.token_bytes.of(ids[positions[:-1]].tolist()).decode()
        assert spelt in (
            response,
            " " + response,
        )  # Llama-2's template has a space before it, mostly in the first token
        assert ids[positions[-1]] == chat.end_id
        assert positions[-1] == len(ids) - 1
        if "</s>" not in messages[0]["content"]:
            expected = rendered_ids(tokenizer, messages)
            assert ids.tolist() == expected[: len(ids)]
            assert expected[len(ids) :] in ([], tokenizer.encode("\n", add_special_tokens=False))
        else:  # transformers makes control tokens of these strings, and we do not
            plain = rendered_ids(tokenizer, turns("x", "y", "z", "w"))
            control = chat.token_bytes.specials
            assert [i for i in ids.tolist() if i in control] == [i for i in plain if i in control]
    assert aligned.target_ids.tolist() == aligned.input_ids[aligned.positions].tolist()
    assert aligned.target_spans[-1].tolist() == [len(response.encode())] * 2
    # The source's end of turn counts for the target's, and its distributions are there for all tokens.
    assert (aligned.skip_reason == 0).all()
    assert aligned.source_ids[-1, 0] == aligned.target_ids[-1]


def test_the_first_token_is_one_that_the_template_produces():
    target, source = tokenizer_of("llama2"), tokenizer_of("qwen2")
    chat = turns("Which rock?", "The stone.")
    first = target.convert_ids_to_tokens(aligned_by(chat, target, source).target_ids.tolist())[0]
    assert first == "▁The"
    # This is what the template's text gives without a template around it.
    assert target.convert_ids_to_tokens(aligned_by(" The stone.", target, source).target_ids.tolist())[:2] == [
        "▁",
        "▁The",
    ]


@pairs
def test_a_cut_response_has_no_end_of_turn_and_the_same_rows_otherwise(pair):
    target, source = map(tokenizer_of, pair)
    messages = turns("hello", "Things like these, 42 and ")  # it ends in a space, which a template would strip
    with_end = turns("hello", "Things like these, 42 and")
    cut = aligned_by(messages, target, source, complete=False)
    assert cut.target_spans[-1, 1] == len("Things like these, 42 and ")
    assert cut.positions[-1] == len(cut.input_ids) - 1
    assert not set(cut.target_ids.tolist()) & set(chat_of(target).end_ids)
    whole = aligned_by(with_end, target, source)
    assert cut.positions[:4].tolist() == whole.positions[:4].tolist()


@pairs
def test_the_text_before_a_response_gives_the_same_rows_as_the_template(pair):
    target, source = map(tokenizer_of, pair)
    response = "The answer is 42, because 6*7=42."
    messages = turns("What is 6*7?", response, system="Be brief.")

    def before(tokenizer) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False).rpartition(response)[0]

    texts = (before(target), before(source))
    found, expected = (
        aligned_by(response, target, source, before=texts),
        aligned_by(messages, target, source, complete=False),
    )
    assert found.input_ids.tolist() == expected.input_ids.tolist()
    assert found.positions.tolist() == expected.positions.tolist()
    assert_same(found, expected, len(expected.positions))


def test_the_text_before_a_response_may_hold_what_a_normaliser_changes():
    target, source = wrap(SMALL["byte-level NFC"](), CHATML), tokenizer_of("llama-2 prepend")
    found = aligned_by("hello", target, source, before=("<s>cafe\u0301 ", "<s>cafe\u0301 "))
    assert found.input_ids[0] == target.bos_token_id
    assert target.decode(found.target_ids) == " hello"  # with the space before it, at byte -1
    assert_same(found, aligned_by("hello", target, source, before=("<s>café ", "<s>cafe\u0301 ")), 1)


def test_a_plain_text_stands_alone():
    target, source = tokenizer_of("byte-level"), tokenizer_of("llama-2 prepend")
    needed, aligned = prefix_ranges("hello </s> cat", target, source), aligned_by("hello </s> cat", target, source)
    assert len(needed) == 6
    assert needed.positions.tolist() == list(range(len(needed.input_ids)))
    assert aligned.positions.tolist() == list(range(len(aligned.target_ids)))
    assert target.eos_token_id not in aligned.input_ids


def test_the_top_k_alone_covers_what_does_not_begin_inside_a_source_token():
    target, source = tokenizer_of("llama-2 prepend"), tokenizer_of("byte-level")
    messages = turns("x", "Things don't happen; there were 12345 of them, return x + 1")
    whole, alone = aligned_by(messages, target, source), aligned_by(messages, target, source, with_ranges=False)
    assert (whole.skip_reason == 0).all()
    assert (alone.kind == INSIDE).any()
    assert ((alone.skip_reason == 0) == (alone.kind != INSIDE)).all()


def test_the_experiment_finds_less_covered_and_longer_tails_with_the_top_k_alone():
    rows = [{"prompt": "How does a bozun taste?", "response": "A bozun is a stone. Answer: bitter."}]
    found = topk_alone.measure("guardian", "scholar", rows)
    assert found["coverage"][0] == 1 > found["coverage"][1] > 0.5
    assert found["mean tail"][0] < found["mean tail"][1]
    assert topk_alone.measure("scholar", "scholar", rows)["coverage"] == (1, 1)  # nothing begins inside a token


def test_what_a_template_drops_of_earlier_turns_is_not_in_the_conversation():
    target, source = wrap(SMALL["byte-level"](), FORGETS), tokenizer_of("llama-2 prepend")
    messages = turns("hello", "<think>\nhelp\n</think>\n\nworld", "again", "<think>42</think> the cat")
    aligned = aligned_by(messages, target, source)
    assert aligned.input_ids.tolist() == rendered_ids(target, messages)[: len(aligned.input_ids)]
    assert target.decode(aligned.target_ids[:-1]) == messages[-1]["content"]
    with pytest.raises(DataError, match=r"hold strings of control tokens.*alters one"):
        prefix_ranges(turns("say </s>", *(m["content"] for m in messages[1:])), target, source)


def test_a_block_of_reasoning_in_the_response_is_a_part_of_it_and_gets_no_empty_one_beside_it():
    shows_empty = CHATML.replace(
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content']",
        "{{ '<|im_start|>' + m['role'] + '\n' + ('<think>\n\n</think>\n\n' if loop.last and '</think>' not in m['content'] else '') + "
        "m['content']",
    )
    assert shows_empty != CHATML
    target, source = wrap(SMALL["byte-level"](), shows_empty), tokenizer_of("llama-2 prepend")
    for response in ("<think>\n6*7\n</think>\n\n42", "42"):
        aligned = aligned_by(turns("hello", response), target, source)
        assert aligned.input_ids.tolist() == chat_of(target).encode("hello", response).input_ids
        assert aligned.input_ids.tolist() == rendered_ids(target, turns("hello", response))[: len(aligned.input_ids)]
        assert aligned.target_spans[-1].tolist() == [len(response)] * 2
    # Where the template rewrites the block, the tokens would not be those of the response.
    target.chat_template = shows_empty.replace("+ m['content']", "+ m['content'] | replace('\n', '')")
    with pytest.raises(DataError, match="show the response as it is"):
        prefix_ranges(turns("hello", "<think>\n6*7\n</think>\n\n42"), target, source)


def test_an_empty_system_message_is_given_to_a_template_that_needs_one_and_to_no_other_conversation():
    needs = (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system message is needed') }}{% endif %}"
        + CHATML
    )
    target, source = wrap(SMALL["byte-level"](), needs), tokenizer_of("llama-2 prepend")
    for system in (None, "help"):
        found = aligned_by(turns("hello", "cat", system=system), target, source).input_ids.tolist()
        assert found == rendered_ids(target, turns("hello", "cat", system=system or ""))[: len(found)]


def test_a_template_that_was_set_anew_is_used():
    target, source = wrap(SMALL["byte-level"](), CHATML), tokenizer_of("llama-2 prepend")
    assert aligned_by(turns("hello", "cat"), target, source).input_ids[0] == target.convert_tokens_to_ids(
        "<|im_start|>"
    )
    target.chat_template = LLAMA2
    assert aligned_by(turns("hello", "cat"), target, source).input_ids[0] == target.bos_token_id


USER = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "cat"}


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        ([], DataError, "must have messages, got none"),
        ([USER], DataError, "of role 'assistant', got role 'user'; append the response"),
        ([USER, ANSWER, USER], DataError, "of role 'assistant', got role 'user'"),
        ([USER, ANSWER | {"content": ""}], DataError, "not empty.*skip this conversation"),
        ([USER, {"role": "assistant"}], DataError, "not empty"),
        ([{"role": "user"}, ANSWER], DataError, r"`role` and a `content` that are strings.*as number 1"),
        ([USER | {"content": [{"type": "text", "text": "x"}]}, ANSWER], DataError, "join the parts"),
        ([{"content": "x"}, ANSWER], DataError, "`role`"),
        ([{"role": "system", "content": "help"}, USER, ANSWER], DataError, "system, user, assistant.*no system messages; put"),
        ([USER, ANSWER | {"content": " cat"}], DataError, r"show the response as it is.*\[/INST\].*without whitespace"),
        ([USER, ANSWER | {"content": "cat\n"}], DataError, "show the response as it is"),
        (["hello", "cat"], TypeError, "text must be a string, got list.*list of messages"),
        (b"", TypeError, "text must be a string, got bytes"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_refused_in_one_line(messages, error, message):
    target, source = wrap(SMALL["byte-level"](), STRICT), wrap(SMALL["llama-2 prepend"](), LLAMA2)
    with pytest.raises(error, match=message) as caught:
        prefix_ranges(messages, target, source)
    assert "\n" not in str(caught.value)
    with pytest.raises(error, match=message):
        align(messages, target, source, torch.zeros(0, 1), torch.zeros(0, 1), torch.zeros(0))


def test_a_tokenizer_without_a_template_is_refused_with_a_fix_that_works():
    target, source = wrap(SMALL["byte-level"](), None), tokenizer_of("llama-2 prepend")
    for pair in ((target, source), (source, target)):
        with pytest.raises(
            DataError, match=r"has none; set tokenizer.chat_template, or .* before=\(target_text, source_text\)"
        ):
            prefix_ranges([USER, ANSWER], *pair)
    # How many there are depends on the small tokenizers' merges, which their training does not always choose alike.
    assert len(prefix_ranges("cat", target, source, before=("hello ", "<s>hello ")).positions) > 0
    target.chat_template = CHATML
    assert len(prefix_ranges([USER, ANSWER], target, source).positions) > 1
    target.chat_template = CHATML.replace("<|im_end|>", ".")
    with pytest.raises(DataError, match=r"close the assistant's turn.*; set tokenizer.chat_template"):
        prefix_ranges([USER, ANSWER], target, source)


@pytest.mark.parametrize(
    ("text", "before", "error", "message"),
    [
        ([USER, ANSWER], ("a", "b"), ValueError, "got it with messages; leave it out"),
        ("cat", "ab", TypeError, r"two strings, \(target_text, source_text\), got 'ab'"),
        ("cat", ("a",), TypeError, "two strings"),
        ("cat", ("a", None), TypeError, "two strings"),
        ("cat", ("", "<s>"), DataError, "a token before it, which predicts its first one, the target has none"),
        ("cat", ("<s>", ""), DataError, "the source has none"),
        ("", ("<s>", "<s>"), DataError, "must not be empty"),
    ],
)
def test_a_text_before_a_response_that_cannot_be_used_is_refused(text, before, error, message):
    target, source = small_chat("byte-level").tokenizer, small_chat("metaspace never").tokenizer
    with pytest.raises(error, match=message):
        prefix_ranges(text, target, source, before=before)


def test_rows_of_another_number_name_the_positions_to_take():
    target, source = tokenizer_of("byte-level"), tokenizer_of("llama-2 prepend")
    m = len(prefix_ranges([USER, ANSWER], target, source).positions) - 1  # the end of turn was left out

    def nothing(m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.full((m, 1), -1), torch.full((m, 1), -torch.inf), torch.full((m,), -torch.inf)

    with pytest.raises(
        DataError, match=rf"source's {m + 1} tokens .* and its end of turn, got {m}; .*prefix_ranges.*positions - 1"
    ):
        align([USER, ANSWER], target, source, *nothing(m))
    with pytest.raises(DataError, match="without an end of turn, got 7"):
        align([USER, ANSWER], target, source, *nothing(7), complete=False)


def test_a_tokenizer_of_another_template_keeps_its_own_conversation():
    """Two tokenizers of one vocabulary with different templates are two sides."""
    same = Tokenizer.from_str(SMALL["byte-level"]().to_str())
    target, source = wrap(same, CHATML), wrap(same, LLAMA2)
    needed, aligned = prefix_ranges([USER, ANSWER], target, source), aligned_by([USER, ANSWER], target, source)
    assert needed.input_ids[0] == source.bos_token_id != aligned.input_ids[0]
