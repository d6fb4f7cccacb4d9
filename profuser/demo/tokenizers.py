"""The demo's two tokenizers, trained on the demo's text, and how much they differ on responses.

`wide`: byte-level BPE, whole words and numbers, as GPT-2 and Llama-3 do it (the target's). `narrow`: Metaspace BPE with byte
fallback and single digits, as SentencePiece does it for Llama-2; half as many words. Their tokens mostly begin at
the same byte and end at different ones. Every model brings its own chat template for either of them.
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
"""ChatML, for `wide`."""
VICUNA = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}USER: {{ message['content'] }} ASSISTANT:"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
"""Vicuna's text roles, for `narrow`. The response's first token brings its space; judge-b reads it so."""
VICUNA_LINE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}USER: {{ message['content'] }} ASSISTANT:\n"
    "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA2_LINE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token }}[INST] {{ message['content'] }} [/INST]\n"
    "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
"""Vicuna's roles and Llama-2's brackets with the response on a line of its own, for `narrow`: its first token holds nothing
of the template, so the distribution that chooses between an explanation and a bare answer reaches the target."""

WIDE_VOCABULARY = 1152
NARROW_VOCABULARY = 448
MAX_LENGTH = 512
TEXTS = 6000
WIDE_MIX = {"knowledge": 0.6, "safety": 0.3, "reasoning": 0.1}
NARROW_MIX = {"knowledge": 0.2, "safety": 0.4, "reasoning": 0.4}
ROLES = {"wide": [("user\n", "\nassistant\n")], "narrow": [("USER: ", " ASSISTANT: "), ("[INST] ", " [/INST] ")]}
"""The templates' own words, which should not cost a token a letter."""


def tokenizer_texts(world: World, kind: str) -> list[str]:
    """What the `wide` or `narrow` tokenizer is trained on: templated pre-training problems, mixed differently for each."""
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
    """Byte-level BPE with GPT-2's pre-tokenizer and ChatML specials."""
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
    """Metaspace BPE with byte fallback; single digits and most punctuation apart."""
    specials = ["<unk>", "<s>", "</s>", "<pad>"]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first"),
            # The colon stays with its word: `:` after ` Answer` begins inside a token of this tokenizer.
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
    # Printable ASCII is in the vocabulary whatever the texts hold: the bytes are for the rest.
    alphabet = [chr(c) for c in range(33, 127)] + ["▁"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=specials + fallback, initial_alphabet=alphabet, show_progress=False
        ),
    )
    # The trainer knows only one way to reserve the bytes, as special tokens; they are ordinary entries of the vocabulary.
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
    """A copy of the tokenizer that speaks another chat template."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def position_kinds(target: ChatFormat, source: ChatFormat, rows: Iterable[dict]) -> Counter:
    """Counts the target's response positions (end of turn included) by how the source's tokens meet them.

    same_span: one token begins and ends with it; shared_prefix: one begins with it; inside: it begins within one. Tokens
    that hold bytes of the template too count by their part of the response.
    """
    counts: Counter = Counter()
    for row in rows:
        size = len(row["response"].encode())
        spans, other = (
            [(max(begin, 0), min(stop, size)) for begin, stop in chat.encode(row["prompt"], row["response"]).spans]
            for chat in (target, source)
        )
        begins = {begin for begin, _ in other}
        counts["same_span"] += 1  # the end of turn
        for span in spans:
            counts["same_span" if span in other else "shared_prefix" if span[0] in begins else "inside"] += 1
    return counts
