"""A model in GGUF form is read as it is, or it is refused with a hint at what to do."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from profuser.errors import DataError
from profuser.models.fingerprint import fingerprint
from profuser.models.head import head_of
from profuser.models.load import chat_format, load_model, load_tokenizer, stored_dtype, weights_of
from profuser.prepare.estimate import Size, size_of
from profuser.recipe.places import is_path
from profuser.recipe.schema import SourceConfig

gguf = pytest.importorskip("gguf", reason="pip install gguf")

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WIDTH, LAYERS, HEADS, INNER = 32, 2, 2, 64


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with nothing in it but a tiny Llama in GGUF form."""
    path = tmp_path_factory.mktemp("gguf-model")
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    writer = gguf.GGUFWriter(path / "tiny.gguf", "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 257)
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), WIDTH), "output": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    for n in range(LAYERS):
        shapes |= {f"blk.{n}.attn_{x}": (WIDTH, WIDTH) for x in ("q", "k", "v", "output")}
        shapes |= {f"blk.{n}.ffn_{x}": (INNER, WIDTH) for x in ("gate", "up")} | {f"blk.{n}.ffn_down": (WIDTH, INNER)}
        shapes |= {f"blk.{n}.{x}_norm": (WIDTH,) for x in ("attn", "ffn")}
    for name, shape in shapes.items():
        values = np.ones(shape) if len(shape) == 1 else rng.normal(size=shape) / WIDTH**0.5
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("place", ["", "tiny.gguf"])
def test_a_directory_with_one_gguf_file_and_the_file_itself_are_the_model(model, place):
    source = SourceConfig(name="tiny", model=str(model / place))
    loaded = load_model(source, torch.float32)
    assert head_of(loaded).weight.shape == (260, WIDTH)
    assert not hasattr(loaded, "hf_quantizer") or loaded.hf_quantizer is None
    chat = chat_format(source)
    encoded = chat.encode("hi", "hello he")
    assert chat.token_bytes.of(encoded.input_ids[encoded.start : encoded.stop]) == b"hello he"
    assert encoded.end_of_turn is not None
    assert encoded.input_ids[encoded.end_of_turn] == 2
    assert stored_dtype(source) == torch.float32
    assert size_of(source) == Size(sum(p.numel() for p in loaded.parameters()), LAYERS)


def test_what_was_fused_from_a_gguf_file_is_saved_as_safetensors(model, tmp_path):
    source = SourceConfig(name="tiny", model=str(model))
    load_model(source, torch.float32).save_pretrained(tmp_path)
    load_tokenizer(source).save_pretrained(tmp_path)
    again = load_model(SourceConfig(name="again", model=str(tmp_path)), torch.float32)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, load_model(source, torch.float32)(ids).logits)


def test_a_tokenizer_beside_the_file_is_preferred(model, tmp_path):
    shutil.copy(model / "tiny.gguf", tmp_path)
    tokenizer = load_tokenizer(SourceConfig(name="tiny", model=str(model)))
    tokenizer.add_tokens(["a token of its own"])
    tokenizer.save_pretrained(tmp_path)
    assert "a token of its own" in load_tokenizer(SourceConfig(name="tiny", model=str(tmp_path))).get_vocab()


def test_the_fingerprint_is_of_the_files_content(model, tmp_path):
    shutil.copy(model / "tiny.gguf", tmp_path)
    file = tmp_path / "tiny.gguf"
    before = fingerprint(str(file))
    assert before != str(file)
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert fingerprint(str(file)) != before


def test_a_file_that_transformers_cannot_read_is_refused_with_what_to_give(tmp_path):
    (tmp_path / "odd.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(DataError, match=r"odd: .*give"):
        load_model(SourceConfig(name="odd", model=str(tmp_path)), torch.float32)
    with pytest.raises(DataError, match="no tokenizer could be loaded"):
        load_tokenizer(SourceConfig(name="odd", model=str(tmp_path)))


def test_without_the_package_the_line_says_what_to_install(model, monkeypatch):
    monkeypatch.setattr("profuser.models.load.importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install gguf"):
        weights_of(SourceConfig(name="tiny", model=str(model)))


def test_a_gguf_file_is_never_looked_up_on_the_hub():
    assert is_path("model.gguf")
