"""A model in GGUF form is read as it is, or it is refused with a hint at what to do."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, GgufConfig, modeling_gguf_pytorch_utils

from profuser.errors import DataError
from profuser.models.fingerprint import fingerprint
from profuser.models.gguf_header import gguf_tensors
from profuser.models.head import head_of
from profuser.models.load import chat_format, load_model, load_tokenizer, open_model, stored_dtype, weights_of
from profuser.prepare.estimate import Size, size_of
from profuser.recipe.places import is_path
from profuser.recipe.schema import SourceConfig

gguf = pytest.importorskip("gguf", reason="pip install gguf")

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WIDTH, LAYERS, HEADS, INNER = 32, 2, 2, 64


def write_model(path: Path, blocks: int = LAYERS, **more: tuple[int, ...]) -> None:
    """Writes a tiny Llama of LAYERS blocks in GGUF form, with the tensors of `blocks` and `more` tensors of these shapes."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    writer = gguf.GGUFWriter(path, "llama")
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
    for n in range(blocks):
        shapes |= {f"blk.{n}.attn_{x}": (WIDTH, WIDTH) for x in ("q", "k", "v", "output")}
        shapes |= {f"blk.{n}.ffn_{x}": (INNER, WIDTH) for x in ("gate", "up")} | {f"blk.{n}.ffn_down": (WIDTH, INNER)}
        shapes |= {f"blk.{n}.{x}_norm": (WIDTH,) for x in ("attn", "ffn")}
    for name, shape in (shapes | more).items():
        values = np.ones(shape) if len(shape) == 1 else rng.normal(size=shape) / WIDTH**0.5
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with nothing in it but a tiny Llama in GGUF form."""
    path = tmp_path_factory.mktemp("gguf-model")
    write_model(path / "tiny.gguf")
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


def test_a_file_is_read_for_its_configuration_once(tmp_path, monkeypatch):
    """transformers reads the whole vocabulary of a GGUF file for it, which takes seconds where it is large."""
    write_model(tmp_path / "tiny.gguf")
    source, read = SourceConfig(name="tiny", model=str(tmp_path)), []
    checkpoint = modeling_gguf_pytorch_utils.load_gguf_checkpoint

    def noting(*arguments, return_tensors=False, **options):
        read.extend([1] * (not return_tensors))
        return checkpoint(*arguments, return_tensors=return_tensors, **options)

    monkeypatch.setattr(modeling_gguf_pytorch_utils, "load_gguf_checkpoint", noting)
    expected = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    assert read == [1]
    config = open_model(source)
    config.vocab_size = 7  # what a caller does to it is its own
    loaded = load_model(source, torch.float32)
    assert stored_dtype(source) == torch.float32
    assert read == [1, 1]
    assert loaded.config.to_dict() == expected.config.to_dict()
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected.parameters(), strict=True))
    write_model(tmp_path / "tiny.gguf", **{"rope_freqs": (WIDTH // HEADS // 2,)})  # another file of this name
    open_model(source)
    assert read == [1, 1, 1]


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
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "an architecture of its own")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
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


@pytest.mark.parametrize("blocks", [LAYERS + 1, LAYERS + 3])
def test_half_a_model_is_refused_before_and_when_it_is_loaded(tmp_path, blocks):
    write_model(tmp_path / "half.gguf", blocks)
    source = SourceConfig(name="half", model=str(tmp_path))
    with pytest.raises(DataError, match=rf"{9 * (blocks - LAYERS)} have no place in it .* which is {LAYERS}"):
        open_model(source)
    with pytest.raises(DataError, match="a model must use all weights of its GGUF file"):
        load_model(source, torch.float32)


def test_a_tensor_that_transformers_drops_is_noticed(tmp_path):
    write_model(tmp_path / "more.gguf", **{"blk.0.attn_q_norm": (WIDTH,)})
    with pytest.raises(DataError, match="a model must use all weights of its GGUF file"):
        load_model(SourceConfig(name="more", model=str(tmp_path)), torch.float32)


def test_the_factors_of_the_rotation_are_no_weights_that_are_missing(tmp_path):
    write_model(tmp_path / "rope.gguf", rope_freqs=(8,))
    source = SourceConfig(name="rope", model=str(tmp_path))
    open_model(source)
    load_model(source, torch.float32)


def test_the_header_says_what_the_gguf_package_says(model):
    file = model / "tiny.gguf"
    assert gguf_tensors("tiny", file) == {tensor.name: tensor.n_elements for tensor in gguf.GGUFReader(file).tensors}


def header(tensors: int = 0, entries: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + rest


def text(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


HUGE = 1 << 40


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (header(tensors=HUGE), "1,099,511,627,776 tensors, and the limit is 1,048,576"),
        (header(entries=HUGE), "entries of metadata, and the limit is 65,536"),
        (header(entries=1, rest=text(b"", HUGE)), "bytes in a string, and the limit is"),
        (
            header(entries=1, rest=text(b"a") + struct.pack("<IIQ", 9, 8, HUGE)),
            "elements in an array, and the limit is",
        ),
        (
            header(entries=1, rest=text(b"a") + struct.pack("<IIQ", 9, 0, HUGE)),
            "elements in an array, and the limit is",
        ),
        (header(entries=1, rest=text(b"a") + struct.pack("<IIQ", 9, 9, 5)), "unknown type"),
        (header(entries=1, rest=text(b"a") + struct.pack("<I", 99)), "unknown type"),
        (header(tensors=1, rest=text(b"a") + struct.pack("<I", 1 << 30)), "dimensions, and the limit is 8"),
        (header(tensors=1, rest=text(b"\xff")), "utf-8"),
        (b"GGUF" + struct.pack("<IQQ", 7, 0, 0), "version 2 or 3"),
        (b"no such file", "version 2 or 3"),
        (b"", "empty"),
        (header(tensors=1)[:20], "cut off"),
    ],
)
@pytest.mark.parametrize("sparse", [False, True])
def test_a_header_that_asks_for_too_much_is_refused_at_once(tmp_path, content, says, sparse):
    file = tmp_path / "odd.gguf"
    file.write_bytes(content)
    if sparse:
        if says in ("empty", "cut off"):
            return
        with open(file, "ab") as opened:
            opened.truncate(1 << 33)  # zeros that take no room on the disk
    source = SourceConfig(name="odd", model=str(file))
    for action in (open_model, load_tokenizer, lambda source: load_model(source, torch.float32)):
        with pytest.raises(DataError) as error:
            action(source)
        assert says in str(error.value)
        assert "\n" not in str(error.value)


def test_a_file_that_is_cut_off_in_its_header_is_refused(model, tmp_path):
    whole = (model / "tiny.gguf").read_bytes()
    for length in range(24, 6000, 487):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"^cut: .*again$"):
            open_model(SourceConfig(name="cut", model=str(tmp_path)))
