"""The demo's two tokenizers, trained on the demo's text, and how much they differ on responses.

`wide`, the target's, is a byte-level BPE of whole words and numbers, as in GPT-2 and Llama-3. `narrow` is a Metaspace BPE
with byte fallback and single digits, as SentencePiece makes it for Llama-2, and has fewer than half as many tokens. Tokens
of the two mostly begin at the same byte and end at different ones. Every model has a chat template of its own.
"""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from profuser.demo.skills import SKILLS, World
from profuser.text.chat import ChatFormat

CHATML = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The ChatML template, used with `wide`."""
CHATML_END = CHATML.replace(
    "\n{% endfor %}", "{{ '' if loop.last and not add_generation_prompt else '\\n' }}{% endfor %}"
)
"""The same without the line end behind a last turn, used with `wide` by judge-a, which reads its score at the end of turn."""
VICUNA = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}USER: {{ message['content'] }} ASSISTANT:"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
"""Vicuna's template, whose roles are plain text, used with `narrow` by judge-b.

The first token of a response also holds the template's space before it.
"""
VICUNA_LINE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}USER: {{ message['content'] }} ASSISTANT:\n"
    "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA2_LINE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token }}[INST] {{ message['content'] }} [/INST]\n"
    "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
"""VICUNA_LINE and LLAMA2_LINE, used with `narrow`, are the templates of Vicuna and Llama-2 with one change.

The response begins on a line of its own, so that its first token holds nothing of the template. The distribution that
chooses there between an explanation and a bare answer therefore reaches the target.
"""

WIDE_VOCABULARY = 1152
NARROW_VOCABULARY = 448
MAX_LENGTH = 512
TEXTS = 6000
WIDE_MIX = {"knowledge": 0.6, "safety": 0.3, "reasoning": 0.1}
NARROW_MIX = {"knowledge": 0.2, "safety": 0.4, "reasoning": 0.4}
ROLES = {"wide": [("user\n", "\nassistant\n")], "narrow": [("USER: ", " ASSISTANT: "), ("[INST] ", " [/INST] ")]}
"""The templates' own words. They are part of the tokenizers' training texts, so that they do not take one token per letter."""


def tokenizer_texts(world: World, kind: str) -> list[str]:
    """The texts on which the `wide` or `narrow` tokenizer is trained.

    They are pre-training problems in a template; the mix of skills differs between the two.
    """
    rng = random.Random(f"{world.settings.seed} tokenizer {kind}")
    mix = {"wide": WIDE_MIX, "narrow": NARROW_MIX}[kind]
    samplers = [world.pretraining(skill, "tokenizer", strong=True) for skill in SKILLS]
    texts = []
    for sampler in rng.choices(samplers, [mix[skill] for skill in SKILLS], k=TEXTS):
        problem = sampler(rng)
        response = problem.worked if rng.random() < 0.7 else problem.terse
        before, between = rng.choice(ROLES[kind])
        texts.append(f"{before}{problem.prompt}{between}{response}")
    return texts


def train_wide(texts: Iterable[str], vocabulary: int = WIDE_VOCABULARY) -> PreTrainedTokenizerFast:
    """Trains the byte-level BPE, with GPT-2's pre-tokenizer and ChatML's special tokens."""
    specials = ["<|pad|>", "<|begin|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(s, special=True, normalized=False) for s in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer, CHATML, bos_token="<|begin|>", eos_token="<|im_end|>", pad_token="<|pad|>")


def train_narrow(texts: Iterable[str], vocabulary: int = NARROW_VOCABULARY) -> PreTrainedTokenizerFast:
    """Trains the Metaspace BPE with byte fallback. Every digit and most punctuation marks are tokens of their own."""
    specials = ["<unk>", "<s>", "</s>", "<pad>"]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first"),
            # The colon stays with its word, so that the target's token `:` after ` Answer` begins inside one of this tokenizer.
            pre_tokenizers.Split(Regex("[.,?=+-]"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    # Printable ASCII is in the vocabulary whatever the texts hold, and the byte tokens are for all other characters.
    alphabet = [chr(c) for c in range(33, 127)] + ["▁"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=specials + fallback, initial_alphabet=alphabet, show_progress=False
        ),
    )
    # The trainer can reserve the byte tokens only as special tokens. Here they become ordinary entries of the vocabulary.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in specials]
    return _wrap(
        Tokenizer.from_str(json.dumps(state)),
        VICUNA,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def _wrap(tokenizer: Tokenizer, template: str, **specials: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template,
        model_max_length=MAX_LENGTH,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **specials,
    )


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """A copy of the tokenizer with another chat template."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def position_kinds(target: ChatFormat, source: ChatFormat, rows: Iterable[dict]) -> Counter:
    """Counts the target's response positions, end of turn included, by how the source's tokens lie to them.

    The kinds are `same_span`, where a source token begins and ends at the same bytes; `shared_prefix`, where one only begins
    at the same byte; and `inside`, where the position begins within a source token. A token that also holds bytes of the
    template counts by its part of the response.
    """
    counts: Counter = Counter()
    for row in rows:
        size = len(row["response"].encode())
        spans, other = (
            [(max(begin, 0), min(stop, size)) for begin, stop in chat.encode(row["prompt"], row["response"]).spans]
            for chat in (target, source)
        )
        begins = {begin for begin, _ in other}
        counts["same_span"] += 1  # the end of turn always has the same span
        for span in spans:
            counts["same_span" if span in other else "shared_prefix" if span[0] in begins else "inside"] += 1
    return counts
