"""FusionModel as the model of other people's trainers: the shift, packing, tied and adapted models, and saving."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, DataCollatorWithFlattening

from profuser import IGNORE_INDEX, FusionModel
from profuser.errors import DataError
from profuser.kernels.reference import fusion_loss_reference
from profuser.models.head import head_of
from profuser.recipe.places import resolve

LENGTHS = (7, 1, 5, 9)
S, K = 2, 4


def demo_model(name="guardian", **changes):
    """One of the bundled models, or, with `changes` of its config, a model of random weights that is otherwise like it."""
    location = resolve(f"demo:{name}")
    if not changes:
        return AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(location, **changes), dtype=torch.float32)


def tied_model():
    return demo_model(tie_word_embeddings=True)


def examples(lengths=LENGTHS, vocabulary=400, seed=0):
    """Single sequences: tokens, labels (even on first tokens), what the sources say of every token, and their CE."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for n in lengths:
        ids = torch.randint(4, vocabulary, (n,), generator=g)
        logprobs, kept = torch.randn(S, n, 50, generator=g).log_softmax(-1).topk(K)
        found.append(
            {
                "input_ids": ids,
                "labels": torch.where(torch.rand(n, generator=g) < 0.3, IGNORE_INDEX, ids),
                "ce_weight": torch.rand(n, generator=g),
                "source_ids": kept + 4,
                "source_logprobs": logprobs,
                "source_tail": torch.rand(S, n, generator=g),
                "source_ce": torch.rand(S, generator=g),
            }
        )
    return found


def padded(found) -> dict[str, Any]:
    """The examples as rows, padded on the right."""
    columns = {name: [e[name] for e in found] for name in found[0] if name != "source_ce"}
    columns["attention_mask"] = [torch.ones_like(e["input_ids"]) for e in found]
    fill = {"labels": IGNORE_INDEX, "source_ids": -1}
    batch: dict[str, Any] = {}
    for name, values in columns.items():
        by_source = name.startswith("source_")
        values = [v.transpose(0, 1) if by_source else v for v in values]  # the axis of tokens comes first
        rows = pad_sequence(values, batch_first=True, padding_value=fill.get(name, 0))
        batch[name] = rows.movedim(2, 0) if by_source else rows
    return batch | {"source_ce": torch.stack([e["source_ce"] for e in found], 1)}


def packed(found, **options) -> dict[str, Any]:
    """The same examples in one row, as transformers' collator packs them, with the sources beside it."""
    plain = [{k: e[k] for k in ("input_ids", "labels")} for e in found]
    batch: dict[str, Any] = DataCollatorWithFlattening(**options)(plain, return_tensors="pt")
    batch["ce_weight"] = torch.cat([e["ce_weight"] for e in found])[None]
    for name in ("source_ids", "source_logprobs", "source_tail"):
        batch[name] = torch.cat([e[name] for e in found], 1)[:, None]
    return batch | {"source_ce": torch.stack([e["source_ce"] for e in found], 1)}


def loss_and_gradients(fusion, batch):
    fusion.zero_grad()
    loss = fusion(**batch)["loss"]
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in fusion.named_parameters() if p.grad is not None}


def assert_same(ours, other):
    assert ours[1].keys() == other[1].keys()
    torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)


FAMILY: list[dict[str, Any]] = [
    {},
    {"divergence": "jsd", "divergence_beta": 0.3, "tail": "bucket"},
    {"divergence": "skew_kl", "divergence_beta": 0.1, "combine": "softmax", "combine_temperature": 2.0},
    {"z_loss": 1e-3, "label_smoothing": 0.1},
]


@pytest.mark.parametrize("options", FAMILY, ids=str)
def test_the_loss_is_the_dense_formula_on_the_models_own_logits(options):
    model, batch = demo_model(), padded(examples())
    stats = FusionModel(model, beta=0.5, **options)(**batch, return_stats=True)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].flatten(0, 1)
    width = batch["input_ids"].shape[1] - 1
    expected = fusion_loss_reference(
        logits,
        torch.eye(logits.shape[1]),
        batch["labels"][:, 1:].flatten(),
        *(batch[name][:, :, 1:].flatten(1, 2) for name in ("source_ids", "source_logprobs")),
        source_tail=batch["source_tail"][:, :, 1:].flatten(1),
        source_ce=batch["source_ce"],
        ce_weight=batch["ce_weight"][:, 1:].flatten(),
        cu_seqlens=torch.arange(len(LENGTHS) + 1) * width,
        beta=0.5,
        **options,
    )
    torch.testing.assert_close(stats["loss"], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(stats["winner"], batch["source_ce"].argmin(0))


@pytest.mark.parametrize("name", ["guardian", "scholar"])  # Llama and GPT-NeoX
@pytest.mark.parametrize("options", [{}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}], ids=str)
def test_packed_examples_are_as_if_each_had_a_row_of_its_own(name, options):
    fusion, found = FusionModel(demo_model(name)), examples()
    rows = loss_and_gradients(fusion, padded(found))
    assert_same(loss_and_gradients(fusion, packed(found, **options)), rows)
    batch = packed(found)
    batch["labels"] = torch.cat([e["labels"] for e in found])[
        None
    ]  # first tokens are never predicted, with a label or without
    batch["source_index"] = batch.pop("source_ce").argmin(0)
    assert_same(loss_and_gradients(fusion, batch), rows)


def test_several_packed_rows_keep_their_examples_in_order():
    fusion, found = FusionModel(demo_model()), examples((6, 4, 3, 1, 6))
    rows = [packed(found[:2]), packed(found[2:])]
    batch = {name: torch.cat([row[name] for row in rows], int(name.startswith("source_"))) for name in rows[0]}
    assert_same(loss_and_gradients(fusion, batch), loss_and_gradients(fusion, padded(found)))


def test_position_ids_of_left_padding_change_nothing():
    fusion, batch = FusionModel(demo_model()), padded(examples((6, 6)))
    plain = fusion(**batch)["loss"]
    left = {k: v for k, v in batch.items() if k != "source_ce"}
    pad = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE_INDEX, "ce_weight": 0, "source_tail": 0}
    for name, value in pad.items():
        left[name] = torch.nn.functional.pad(batch[name], (2, 0), value=value)
    for name in ("source_ids", "source_logprobs"):
        left[name] = torch.nn.functional.pad(batch[name], (0, 0, 2, 0))
    left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).masked_fill(left["attention_mask"] == 0, 1)
    # Padding now stands before the first real token, but this token is not predicted from it.
    torch.testing.assert_close(fusion(**left, source_ce=batch["source_ce"])["loss"], plain, rtol=1e-5, atol=1e-5)


def test_packed_examples_under_an_attention_mask_are_refused():
    batch = packed(examples())
    with pytest.raises(ValueError, match=r"attention_mask must be None where position_ids restart.*drop"):
        FusionModel(demo_model())(**batch, attention_mask=torch.ones_like(batch["input_ids"]))


SMALL = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_LLAMA = SMALL | {"intermediate_size": 48, "num_key_value_heads": 1, "max_position_embeddings": 64}


def random_model(architecture, **config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **config), dtype=torch.float32)


# Architectures that do not read position_ids, or do not see in them where an example begins.
LEAKING = {
    "opt": SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "falcon": SMALL,
    "mpt": {"vocab_size": 400, "d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 64},
    "bloom": {"vocab_size": 400, "hidden_size": 32, "n_layer": 2, "n_head": 2},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LEAKING)
def test_packed_examples_are_refused_where_a_model_would_not_keep_them_apart(name, dtype):
    fusion, found = FusionModel(random_model(name, **LEAKING[name]).to(dtype)), examples()
    fusion(**padded(found))
    with pytest.raises(ValueError, match=r"a row must hold one example.*pad instead"):
        fusion(**packed(found))


@pytest.mark.parametrize("name", ["mixtral", "qwen3", "gpt2"])
def test_packed_examples_are_taken_where_a_model_keeps_them_apart(name):
    config = {"vocab_size": 400, "n_embd": 32, "n_layer": 2, "n_head": 2} if name == "gpt2" else SMALL_LLAMA
    fusion, found = FusionModel(random_model(name, **config)).eval(), examples()
    torch.testing.assert_close(fusion(**packed(found))["loss"], fusion(**padded(found))["loss"], rtol=1e-5, atol=1e-5)


def test_bounds_without_positions_are_an_error():
    batch = packed(examples(), return_flash_attn_kwargs=True)
    del batch["position_ids"]
    with pytest.raises(ValueError, match="position_ids must come with"):
        FusionModel(demo_model())(**batch)


# The next tests are about models whose logits are more than head(hidden).


@pytest.mark.parametrize(
    ("name", "config"),
    [
        (
            "recurrent_gemma",
            SMALL
            | {"logits_soft_cap": 2.0, "intermediate_size": 48, "lru_width": 32, "head_dim": 16, "use_cache": False},
        ),
        ("gemma2", SMALL_LLAMA | {"final_logit_softcapping": 2.0, "head_dim": 16}),
        ("cohere", SMALL_LLAMA | {"logit_scale": 0.25}),
        ("granite", SMALL_LLAMA | {"logits_scaling": 4.0}),
    ],
)
def test_softcaps_and_scales_are_those_of_the_model(name, config):
    model = random_model(name, **config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight *= 20  # so large that the softcap shows
    batch = padded([{k: e[k] for k in ("input_ids", "labels", "source_ce")} for e in examples((9, 9))])
    batch = {name: batch[name] for name in ("input_ids", "labels", "attention_mask")}
    fused = loss_and_gradients(FusionModel(model), batch)
    own = loss_and_gradients(OwnLoss(model), batch)
    torch.testing.assert_close(fused[0], own[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused[1], own[1], rtol=1e-4, atol=1e-5)


def capped_at_50(model):
    """Caps a model's logits at 50, as a subclass may do. Nothing in its config says so, and small logits do not show it."""
    forward = type(model).forward

    def capped(*args, **kwargs):
        out = forward(model, *args, **kwargs)
        out.logits = 50 * torch.tanh(out.logits / 50)
        return out

    model.forward = capped
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: capped_at_50(random_model("llama", **SMALL_LLAMA)), "logits must be softcap"),
        (lambda: random_model("mixtral", **SMALL_LLAMA, output_router_logits=True), "output_router_logits = False"),
        (lambda: AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(
            "t5", vocab_size=400, d_model=32, d_kv=16, num_layers=1, num_heads=2, d_ff=48)), "has an encoder"),
        (lambda: demo_model().model, "linear language-model head"),
    ],
)  # fmt: skip
def test_models_that_the_loss_would_get_wrong_are_refused(make, message):
    with pytest.raises(DataError, match=message):
        FusionModel(make())


@pytest.mark.parametrize("make", [lambda: "gpt2", lambda: torch.nn.DataParallel(demo_model())], ids=["name", "wrapped"])
def test_what_is_no_model_is_named(make):
    with pytest.raises(TypeError, match=r"must be a loaded one.*AutoModelForCausalLM"):
        FusionModel(make())


def test_a_head_of_zeros_is_a_head():
    model = demo_model().half()
    torch.nn.init.zeros_(model.lm_head.weight)
    FusionModel(model)


def test_a_module_in_evaluation_mode_stays_so():
    model = demo_model().train()
    model.model.layers[0].eval()
    FusionModel(model)
    assert model.training
    assert model.model.layers[1].training
    assert not model.model.layers[0].training
    assert not model.model.layers[0].mlp.training


# What surrounds the model must not take its loss away.


def test_a_trainer_with_a_loss_of_its_own_is_refused():
    fusion = FusionModel(demo_model())
    with pytest.raises(AttributeError, match=r"compute_loss = transformers\.Trainer\.compute_loss"):
        _ = fusion.base_model
    assert not hasattr(fusion, "base_model")


def test_a_trainer_that_keeps_the_labels_is_named():
    with pytest.raises(TypeError, match="label_smoothing_factor or compute_loss_func"):
        FusionModel(demo_model())(input_ids=torch.ones(1, 4).long())


def test_training_without_sources_is_said(recwarn):
    batch = {name: padded(examples())[name] for name in ("input_ids", "labels", "attention_mask")}
    with pytest.warns(UserWarning, match=r"no source_ids.*remove_unused_columns=False"):
        FusionModel(demo_model()).train()(**batch)
    recwarn.clear()
    FusionModel(demo_model(), beta=0.0).train()(**batch)
    FusionModel(demo_model()).eval()(**batch)
    assert not recwarn


def test_weights_of_no_divergence_are_as_good_as_sources(recwarn):
    """Whoever gives the weights knows that there are no sources, as a trainer does in a stage without distillation."""
    batch = {name: padded(examples())[name] for name in ("input_ids", "labels", "attention_mask")}
    FusionModel(demo_model()).train()(**batch, kd_weight=torch.zeros(batch["labels"].shape))
    assert not recwarn


@pytest.mark.parametrize(
    "option",
    [{"tail": "x"}, {"temperature": 0.0}, {"beta": -1.0}, {"divergence": "kl"}, {"combine": "x"}, {"z_loss": -1.0},
     {"label_smoothing": 1.0}, {"divergence_beta": "half"}, {"combine_temperature": 0.0}, {"left_out": 1.0}],
    ids=str,
)  # fmt: skip
def test_a_wrong_option_is_an_error_at_once(option):
    with pytest.raises((ValueError, TypeError), match=f"{next(iter(option))} must be"):
        FusionModel(demo_model(), **option)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": lambda x: x[:, 1:]}, r"labels must be \(B, T\).*not shifted"),
        ({"source_ids": lambda x: x[0]}, r"source_ids must be \(S, B, T, K\)"),
        ({"source_logprobs": lambda x: x.transpose(0, 1)}, r"source_logprobs must be \(S, B, T, K\)"),
        ({"source_ce": lambda x: x[:, :1]}, r"source_ce must be \(S, E\) with E=4 examples"),
        (
            {"source_ce": lambda x: None, "source_weight": lambda x: torch.ones(2, 3)},
            r"source_weight must be \(S, E\) or \(S, B, T\)",
        ),
        (
            {"source_ce": lambda x: None, "source_weight": lambda x: torch.ones(2, 4, 1)},
            r"source_weight must be \(S, B, T\)",
        ),
    ],
)
def test_wrong_shapes_are_named_as_the_caller_gave_them(change, message):
    batch = padded(examples())
    with pytest.raises(ValueError, match=message):
        FusionModel(demo_model())(**batch | {name: edit(batch.get(name)) for name, edit in change.items()})


def test_weights_of_examples_are_weights_of_their_tokens():
    batch = padded(examples())
    del batch["source_ce"]
    S, B, T = batch["source_tail"].shape
    weight = torch.rand(S, B)
    fusion = FusionModel(demo_model())
    of_tokens = fusion(**batch, source_weight=weight[..., None].expand(S, B, T))
    torch.testing.assert_close(fusion(**batch, source_weight=weight), of_tokens)
    rows = packed(examples())
    del rows["source_ce"]
    torch.testing.assert_close(fusion(**rows, source_weight=weight)["loss"], of_tokens["loss"], rtol=1e-5, atol=1e-5)


def test_a_misspelt_argument_is_an_error():
    batch = padded(examples())
    with pytest.raises(TypeError, match=r"got \['source_tails'\]"):
        FusionModel(demo_model())(**batch, source_tails=torch.zeros(1))


@pytest.mark.parametrize("count", [30, torch.tensor(30), torch.tensor(30.0)], ids=str)
def test_num_items_in_batch_is_the_divisor(count):
    fusion, batch = FusionModel(demo_model()), padded(examples())
    torch.testing.assert_close(
        fusion(**batch, num_items_in_batch=count)["loss"], fusion(**batch, reduction="sum")["loss"] / 30
    )


@pytest.mark.parametrize("make", [demo_model, tied_model], ids=["untied", "tied"])
def test_gradient_checkpointing_and_autocast_keep_the_gradients(make):
    fusion, batch = FusionModel(make()).train(), padded(examples())
    plain = loss_and_gradients(fusion, batch)
    fusion.gradient_checkpointing_enable()
    assert_same(loss_and_gradients(fusion, batch), plain)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(fusion, batch)
    assert loss.dtype == torch.float32
    assert abs(loss - plain[0]) < 0.02 * plain[0]
    name = "model.model.embed_tokens.weight"
    assert (gradients[name] - plain[1][name]).norm() < 0.05 * plain[1][name].norm()


def test_compiles_in_one_graph():
    fusion, batch = FusionModel(demo_model()), padded(examples())
    plain = loss_and_gradients(fusion, batch)
    loss = torch.compile(fusion, backend="aot_eager", fullgraph=True)(**batch)["loss"]
    torch.testing.assert_close(loss, plain[0], rtol=1e-5, atol=1e-5)


def test_a_tied_head_is_saved_once_and_restored():
    fusion = FusionModel(tied_model())
    state = fusion.state_dict()
    assert "model.lm_head.weight" not in state
    other = FusionModel(tied_model())
    torch.nn.init.zeros_(other.model.lm_head.weight)
    other.load_state_dict(state)
    assert other.model.lm_head.weight is other.model.model.embed_tokens.weight
    assert torch.equal(other.model.lm_head.weight, fusion.model.lm_head.weight)


def test_copies_and_pickles_compute_the_same_loss():
    fusion, batch = FusionModel(demo_model(), beta=0.2), padded(examples())
    loss = fusion(**batch)["loss"]
    for other in (copy.deepcopy(fusion), pickle.loads(pickle.dumps(fusion))):
        assert torch.equal(other(**batch)["loss"], loss)


# LoRA


def lora(model, **options):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("head", [{}, {"modules_to_save": ["lm_head"]}], ids=["attention", "attention-and-head"])
def test_lora_has_the_gradients_of_the_models_own_loss(head):
    model, batch = lora(demo_model(), target_modules=["q_proj", "v_proj"], **head), padded(examples())
    batch = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    if head:  # this changes the head's copy that is trained, and not the original
        torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.1)
    ours = loss_and_gradients(FusionModel(model), batch)
    own = loss_and_gradients(OwnLoss(model), batch)
    torch.testing.assert_close(ours[0], own[0], rtol=1e-5, atol=1e-5)
    assert ours[1].keys() == own[1].keys()
    assert all("lora_" in name or "modules_to_save" in name for name in ours[1])
    torch.testing.assert_close(ours[1], own[1], rtol=1e-4, atol=1e-6)


class OwnLoss(torch.nn.Module):
    """The model with its own loss, under FusionModel's parameter names."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **batch):
        return {"loss": self.model(**batch).loss}


def test_lora_on_the_head_is_refused():
    with pytest.raises(DataError, match=r"an adapter.*modules_to_save=\['lm_head'\]"):
        FusionModel(lora(demo_model(), target_modules=["q_proj", "lm_head"]))


def test_an_adapter_put_on_the_head_later_is_refused():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    fusion, batch = FusionModel(demo_model()), padded(examples())
    fusion.add_adapter(peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    with pytest.raises(DataError, match="an adapter"):
        fusion(**batch)


def test_prompt_tuning_is_refused():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(DataError, match="gives 11 for 8; prompt tuning"):
        FusionModel(peft.get_peft_model(demo_model(), config))


def test_a_head_behind_flash_attention_is_tried_in_16_bits(monkeypatch):
    """It computes in nothing else, and the weights of a target are fp32."""
    model: Any = AutoModelForCausalLM.from_pretrained(resolve("demo:guardian"), dtype=torch.float32)
    seen: list[torch.dtype] = []
    layer = model.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda layer, args, out: seen.append(out.dtype))
    head_of(model)
    assert set(seen) == {torch.float32}
    seen.clear()
    monkeypatch.setattr("profuser.models.head.uses_flash_attention", lambda model: True)
    head_of(model)
    assert set(seen) == {torch.bfloat16}
