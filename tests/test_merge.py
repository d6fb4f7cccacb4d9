"""Models on disk are merged: by the command line, by mergekit's YAML, with vocabularies that differ and in several files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_runs import run
from merge_models import LAYERS, changed, config_of, merged, weights, whole, written
from safetensors.torch import save_file
from small_tokenizers import pretrained_tokenizer, sentencepiece, wrap
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from profuser.errors import ConfigError, DataError
from profuser.merge import methods
from profuser.merge import models as opened
from profuser.merge.blocks import Blocks
from profuser.merge.run import merge, merged_blocks
from profuser.merge.settings import MergedModel, MergeSettings, read_settings, settings_of
from profuser.merge.weights import Slot, WeightsWriter
from profuser.recipe.places import resolve
from profuser.text.token_bytes import TokenBytes
from profuser.train.run_record import MEASURED, read_run


def test_a_merged_model_loads_and_speaks(mergeable, tmp_path):
    settings = settings_of("ties", [mergeable["a"], mergeable["b"]], mergeable["base"], [0.5], [0.6], {}, "bfloat16", 0)
    merge(settings, tmp_path / "merged")
    model, loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert model.dtype == torch.bfloat16
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]
    tokenizer = pretrained_tokenizer(tmp_path / "merged")
    ids = torch.tensor([tokenizer.encode("Hello")])
    assert model(input_ids=ids).logits.shape == (1, ids.shape[1], model.config.vocab_size)
    assert json.loads((tmp_path / "merged/merge.json").read_text())["method"] == "ties"
    a, b, base = (weights(mergeable[name]) for name in ("a", "b", "base"))
    name = "model.layers.1.mlp.up_proj.weight"
    expected = whole(methods.ties, [base[name], a[name], b[name]], [0.5, 0.5], [0.6, 0.6])
    assert torch.equal(weights(tmp_path / "merged")[name], expected.bfloat16())


def test_what_belongs_to_the_first_model_is_copied_and_no_record_of_its_run(mergeable, tmp_path):
    shutil.copytree(mergeable["a"], first := tmp_path / "first")
    config = [path.name for path in first.glob("*.json*")]
    own = ["vocab.json", "merges.txt", "spiece.model", "chat_template.jinja", "preprocessor_config.json", "LICENSE.txt"]
    records = ["run.json", *MEASURED, "report.html", "trainer_state.json", "log.txt"]
    for name in (*own, *records):
        (first / name).write_text("{}")
    merge(
        settings_of("slerp", [str(first), mergeable["b"]], None, None, None, {"t": 0.5}, None, 0), tmp_path / "merged"
    )
    found = {path.name for path in (tmp_path / "merged").iterdir()}
    assert found == {*config, *own, "model.safetensors", "merge.json", "README.md"}
    with pytest.raises(DataError, match=r"run.json"):  # it is no run, and does not say that it is one
        read_run(tmp_path / "merged")


def test_the_config_says_the_dtype_of_the_result_and_no_older_one(mergeable, tmp_path):
    first = changed(mergeable["a"], tmp_path / "first", lambda tensors: None)
    config = json.loads(Path(first, "config.json").read_text()) | {"torch_dtype": "float16"}
    Path(first, "config.json").write_text(json.dumps(config))
    settings = settings_of("linear", [first, mergeable["b"]], None, None, None, {}, "bfloat16", 0)
    merge(settings, tmp_path / "merged")
    found = json.loads((tmp_path / "merged/config.json").read_text())
    assert {key: value for key, value in found.items() if key.endswith("dtype")} == {"dtype": "bfloat16"}


def one_parameter(tensors: list[torch.Tensor], number: int = 0, **settings) -> torch.Tensor:
    """A parameter that is merged by itself, from a base and a model."""
    of = MergeSettings(base="base", models=[MergedModel(model="a", parameters={"density": 0.5})], **settings)
    architecture = opened.Architecture({}, {}, frozenset(), "")
    blocks = Blocks(tensors, [None] * len(tensors))
    return torch.cat(list(merged_blocks(of, architecture, blocks, LlamaConfig(), "w", number)))


def test_no_two_parameters_of_two_seeds_drop_by_the_same_random_numbers():
    tensors = [torch.zeros(50, 10), torch.ones(50, 10)]
    found = [
        one_parameter(tensors, number, method="dare_linear", seed=seed) for seed in range(3) for number in range(3)
    ]
    assert len({tuple(merged.flatten().tolist()) for merged in found}) == 9


def test_what_is_a_whole_number_is_the_bases():
    base = torch.tensor([3, 1, 4])
    assert torch.equal(one_parameter([base, base + 2], method="ties"), base)


def test_where_no_filter_of_a_model_fits_the_setting_for_all_counts():
    model = MergedModel(model="a", parameters={"weight": [{"filter": "mlp", "value": 0.9}]})
    settings = MergeSettings(method="ties", base="base", models=[model], parameters={"weight": 0.2})
    assert [settings.value("weight", name, 0.0, model, 1.0) for name in ("layers.0.mlp", "norm")] == [0.9, 0.2]


def test_gradients_and_filters_of_mergekits_yaml(mergeable, tmp_path):
    """The layers stand at 0, 1/3, 2/3 and 1, all other parameters at 0. Of filters the first that fits counts."""
    path = tmp_path / "slerp.yaml"
    path.write_text(
        f"""
        merge_method: slerp
        base_model: {mergeable["a"]}
        slices:
        - sources:
          - {{model: {mergeable["a"]}, layer_range: [0, {LAYERS}]}}
          - {{model: {mergeable["b"]}, layer_range: [0, {LAYERS}]}}
        parameters:
          t:
          - {{filter: self_attn, value: [0, 0.5, 1]}}
          - {{filter: mlp, value: [1, 0]}}
          - value: 0.25
        dtype: float32
        """
    )
    found = merged(tmp_path, read_settings(path))
    a, b = weights(mergeable["a"]), weights(mergeable["b"])
    expected = {
        "model.layers.0.self_attn.q_proj.weight": 0,
        "model.layers.1.self_attn.q_proj.weight": 1 / 3,
        "model.layers.3.self_attn.q_proj.weight": 1,
        "model.layers.1.mlp.up_proj.weight": 2 / 3,
        "model.layers.2.input_layernorm.weight": 0.25,
        "model.embed_tokens.weight": 0.25,
        "lm_head.weight": 0.25,
    }
    for name, t in expected.items():
        torch.testing.assert_close(found[name], whole(methods.slerp, [a[name], b[name]], t), rtol=0, atol=1e-7)


def test_a_models_own_settings_stand_before_those_for_all(mergeable, tmp_path):
    settings = MergeSettings(
        method="linear",
        models=[MergedModel(model=mergeable["a"], parameters={"weight": 3}), MergedModel(model=mergeable["b"])],
        parameters={"weight": 1},
    )
    found, a, b = merged(tmp_path, settings), weights(mergeable["a"]), weights(mergeable["b"])
    for name in a:
        torch.testing.assert_close(found[name], (3 * a[name] + b[name]) / 4, rtol=0, atol=1e-6)


def test_tokens_of_equal_bytes_are_merged_whatever_their_ids(mergeable, tmp_path):
    """The second model has its tokens in the reverse order, and one that the first does not have is left out."""
    folder = tmp_path / "reversed"
    model = AutoModelForCausalLM.from_pretrained(mergeable["b"])
    tokenizer = json.loads((Path(mergeable["b"]) / "tokenizer.json").read_text())
    size = model.config.vocab_size
    written(folder, model, pretrained_tokenizer(mergeable["b"]))
    vocab = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: size - 1 - i for token, i in vocab.items()}
    for token in tokenizer["added_tokens"]:
        token["id"] = size - 1 - token["id"]
    tokenizer["added_tokens"].sort(key=lambda token: token["id"])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    flipped = {
        name: tensor.flip(0).contiguous() if name in ("model.embed_tokens.weight", "lm_head.weight") else tensor
        for name, tensor in weights(mergeable["b"]).items()
    }
    save_file(flipped, folder / "model.safetensors", metadata={"format": "pt"})
    straight = merged(
        tmp_path / "1", settings_of("linear", [mergeable["a"], mergeable["b"]], None, None, None, {}, None, 0)
    )
    mapped = merged(tmp_path / "2", settings_of("linear", [mergeable["a"], str(folder)], None, None, None, {}, None, 0))
    assert all(torch.equal(straight[name], mapped[name]) for name in straight)


def test_byte_tokens_and_characters_of_equal_bytes_are_two_tokens(tmp_path):
    """A model merged with itself is itself, also where its tokenizer has a token more, so that tokens are compared one by one."""
    folders = []
    for extra in (0, 1):
        tokenizer = wrap(Tokenizer.from_str(sentencepiece(400, "first").to_str()))
        tokenizer.add_tokens([f"<extra{n}>" for n in range(extra)], special_tokens=True)
        torch.manual_seed(0)
        folders.append(written(tmp_path / f"{extra}", AutoModelForCausalLM.from_config(config_of(400)), tokenizer))
    shorter, longer = (pretrained_tokenizer(folder) for folder in folders)
    assert len(longer) == len(shorter) + 1
    found = merged(tmp_path, settings_of("linear", folders, None, None, None, {}, None, 0))
    assert all(torch.equal(found[name], tensor) for name, tensor in weights(folders[0]).items())


def test_the_row_of_another_control_token_is_not_merged(mergeable, tmp_path):
    """Two fine-tunes may have given the same id to different control tokens, and have all text in common.

    The old name stands in the tokenizer's configuration still, and becomes a token that has no row in the model.
    """
    folder = changed(mergeable["b"], tmp_path / "renamed", lambda tensors: None)
    tokenizer = json.loads((Path(folder) / "tokenizer.json").read_text())
    rows = len(weights(folder)["lm_head.weight"])
    token = next(token for token in tokenizer["added_tokens"] if token["special"] and token["id"] < rows)
    text = (Path(folder) / "tokenizer.json").read_text().replace(json.dumps(token["content"]), '"<|another|>"')
    (Path(folder) / "tokenizer.json").write_text(text)
    assert len(pretrained_tokenizer(folder)) == rows + 1
    found = merged(tmp_path, settings_of("linear", [mergeable["a"], folder], None, None, None, {}, None, 0))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        a, b = weights(mergeable["a"])[name], weights(folder)[name]
        other = torch.arange(rows) != token["id"]
        assert torch.equal(found[name][token["id"]], a[token["id"]])
        torch.testing.assert_close(found[name][other], ((a + b) / 2)[other])


def test_a_token_that_a_model_lacks_keeps_the_bases_row_exactly(in_blocks):
    """Also where the model is stored in a coarser dtype than the base."""
    torch.manual_seed(0)
    base, other = torch.randn(7, 4), torch.randn(6, 4).bfloat16()
    rows = torch.tensor([5, -1, 0, 3, -1, 2, 1])
    found = list(Blocks([base, other], [None, rows]))
    (ours, theirs) = (torch.cat(parts) for parts in zip(*found, strict=True))
    known = rows >= 0
    assert torch.equal(ours, base)
    assert torch.equal(theirs[known], other[rows[known]].float())
    assert torch.equal(theirs[~known], base[~known])


def test_equal_tokenizer_files_are_not_taken_apart(mergeable, tmp_path, monkeypatch):
    """Only where a file differs, be it in a space, do the tokens have to be compared."""
    taken: list[str] = []

    def tokens(tokenizer):
        taken.append(tokenizer.name_or_path)
        return TokenBytes(tokenizer)

    monkeypatch.setattr(opened, "TokenBytes", tokens)
    settings = settings_of("linear", [mergeable["a"], mergeable["b"]], None, None, None, {}, None, 0)
    found = merged(tmp_path / "1", settings)
    assert not taken
    folder = changed(mergeable["b"], tmp_path / "spaced", lambda tensors: None)
    with open(Path(folder) / "tokenizer.json", "a") as file:
        file.write(" ")
    again = merged(tmp_path / "2", settings_of("linear", [mergeable["a"], folder], None, None, None, {}, None, 0))
    assert len(taken) == 2
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_tied_embeddings_stay_tied(tmp_path):
    tokenizer = pretrained_tokenizer(resolve("demo:guardian"))
    config = config_of(len(tokenizer), tied=True)
    names = [written(tmp_path / name, AutoModelForCausalLM.from_config(config), tokenizer) for name in "ab"]
    found = merged(tmp_path, settings_of("slerp", names, None, None, None, {"t": 0.5}, None, 0))
    assert "lm_head.weight" not in found
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.tie_word_embeddings


def test_large_models_are_written_in_several_files(tmp_path):
    slots = [Slot(f"t{n}", torch.float16, (n + 1, 3)) for n in range(5)]
    tensors = [torch.randn(slot.shape).half() for slot in slots]
    WeightsWriter(tmp_path, slots, max_bytes=40).write(iter(tensors))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 3
    assert index["metadata"]["total_size"] == sum(slot.size for slot in slots)
    found = weights(tmp_path)
    assert all(torch.equal(found[slot.name], tensor) for slot, tensor in zip(slots, tensors, strict=True))
    lengths = [int.from_bytes(path.read_bytes()[:8], "little") for path in tmp_path.glob("*.safetensors")]
    assert not any(length % 8 for length in lengths)  # so that tensors are aligned where a file is mapped
    assert all(index["weight_map"][name] for name in found)


def test_a_head_beside_tied_embeddings_is_merged_or_refused_and_never_lost(tmp_path):
    tokenizer, folders = pretrained_tokenizer(resolve("demo:guardian")), []
    for seed, tied in enumerate((True, False)):
        torch.manual_seed(seed)
        config = config_of(len(tokenizer), tied=tied)
        folders.append(written(tmp_path / str(tied), AutoModelForCausalLM.from_config(config), tokenizer))
    tied, own = folders
    found = merged(tmp_path, settings_of("linear", [own, tied], None, None, None, {}, None, 0))
    heads = weights(own)["lm_head.weight"], weights(tied)["model.embed_tokens.weight"]
    assert torch.equal(found["lm_head.weight"], (heads[0] + heads[1]) / 2)
    with pytest.raises(
        ConfigError, match=r"has a lm_head\.weight of its own, which would be lost, and .* has not; name .*False first"
    ):
        merge(settings_of("linear", [tied, own], None, None, None, {}, None, 0), tmp_path / "other")


def test_a_head_of_its_own_that_the_config_calls_tied_is_merged(tmp_path):
    """transformers loads such a model untied, with a warning."""
    tokenizer, folders = pretrained_tokenizer(resolve("demo:guardian")), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = config_of(len(tokenizer), tied=True)
        folder = written(tmp_path / f"{seed}", AutoModelForCausalLM.from_config(config), tokenizer)
        own = torch.randn(len(tokenizer), config.hidden_size)
        folders.append(
            changed(folder, tmp_path / f"own-{seed}", lambda tensors, own=own: tensors.update({"lm_head.weight": own}))
        )
    found = merged(tmp_path, settings_of("linear", folders, None, None, None, {}, None, 0))
    heads = [weights(folder)["lm_head.weight"] for folder in folders]
    assert torch.equal(found["lm_head.weight"], (heads[0] + heads[1]) / 2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(model.lm_head.weight, found["lm_head.weight"])
    # Where the files hold the shared tensor twice, the head is tied as before.
    embedding = weights(folder)["model.embed_tokens.weight"].clone()
    same = changed(folder, tmp_path / "same", lambda tensors: tensors.update({"lm_head.weight": embedding}))
    merge(settings_of("linear", [same, str(folder)], None, None, None, {}, None, 0), tmp_path / "tied")
    assert "lm_head.weight" not in weights(tmp_path / "tied")


def test_the_command(mergeable, tmp_path):
    command = ["--method", "slerp", "--models", mergeable["a"], mergeable["b"], "--output", str(tmp_path / "merged")]
    code, out, err = run("merge", *command)
    assert (code, err) == (0, "")
    assert "merged 2 models by slerp" in out
    code, _, err = run("merge", *command)
    assert code == 2
    assert "--output must be a new or empty directory" in err
