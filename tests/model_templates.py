"""Chat templates that show conversations as the models of that name do, for tests.

Each has the form of its model: what opens and closes a turn, where the whitespace is, which tokens are control tokens, how often
the text begins. Those with a `generation` block mark what the assistant says, as Hugging Face's assistant mask takes it.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from small_tokenizers import byte_level  # isort: skip


@dataclass(frozen=True)
class ModelTemplate:
    """A template and what is to be expected of it.

    begin, end: the tokens that begin a text and end a turn; begin is None without one. control: all control tokens.
    system: whether it has a place for a system message. begins: how often a text of n turns of the user begins.
    marked: whether it has a generation block.
    """

    text: str
    begin: str | None
    end: str
    control: tuple[str, ...]
    system: bool = True
    begins_each_turn: bool = False
    marked: bool = True


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A small tokenizer with the control tokens of a template."""
    known = MODELS[name]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=type(byte_level(420)).from_str(byte_level(420).to_str()),
        bos_token=known.begin,
        eos_token=known.end,
        chat_template=known.text,
    )
    fast.add_tokens([AddedToken(token, special=True, normalized=False) for token in known.control])
    return fast


IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
CHATML = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MODELS = {
    "llama2": ModelTemplate(
        "{% set first = 1 if messages[0].role == 'system' else 0 %}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ bos_token }}[INST] "
        "{% if loop.index0 == first and first %}<<SYS>>\n{{ messages[0].content.strip() }}\n<</SYS>>\n\n{% endif %}"
        "{{ m.content.strip() }} [/INST]{% elif m.role == 'assistant' %} {{ m.content.strip() }} {{ eos_token }}{% endif %}"
        "{% endfor %}",
        "<s>", "</s>", ("<s>", "</s>"), begins_each_turn=True, marked=False,
    ),
    "vicuna": ModelTemplate(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }} "
        "{% elif m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        "<s>", "</s>", ("<s>", "</s>"), marked=False,
    ),
    "chatml": ModelTemplate(CHATML, None, "<|im_end|>", IM),
    "llama3": ModelTemplate(
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<|eot_id|>{% endgeneration %}"
        "{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|begin_of_text|>", "<|eot_id|>",
        ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
    ),
    "qwen2": ModelTemplate(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}" + CHATML,
        None, "<|im_end|>", IM,
    ),
    "qwen3": ModelTemplate(
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
        "{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}"
        "{% if loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        None, "<|im_end|>", IM, marked=False,
    ),
    "mistral": ModelTemplate(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
        "<s>", "</s>", ("<s>", "</s>"), system=False, marked=False,
    ),
    "gemma": ModelTemplate(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}<start_of_turn>model\n"
        "{% generation %}{{ m.content | trim }}<end_of_turn>{% endgeneration %}\n"
        "{% else %}<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<bos>", "<end_of_turn>", ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), system=False,
    ),
    "phi3": ModelTemplate(
        "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n"
        "{% generation %}{{ m.content }}<|end|>{% endgeneration %}\n"
        "{% else %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        None, "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
    ),
    "deepseek": ModelTemplate(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
        "{% elif m.role == 'user' %}<｜User｜>{{ m.content }}"
        "{% else %}<｜Assistant｜>{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}",
        "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>",
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
    ),
}  # fmt: skip
