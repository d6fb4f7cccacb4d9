"""FusionModel with log-probabilities at another temperature than the loss's."""

import pytest
import torch
from test_fusion_model import SMALL_LLAMA, demo_model, examples, loss_and_gradients, padded, random_model

from profuser import FusionModel


def test_source_logprobs_are_brought_to_the_losss_temperature():
    model, batch = demo_model(), padded(examples())
    batch["source_logprobs"] = batch["source_logprobs"].masked_fill(batch["source_logprobs"] < -4, -torch.inf)
    tail = batch.pop("source_tail")
    for given, wanted in ((1.0, 2.0), (2.0, 1.0), (2.0, 2.0), (0.5, 1.5)):
        options = {"temperature": wanted, "tail": "renormalize", "beta": 0.5}
        by_hand = batch | {"source_logprobs": batch["source_logprobs"] / (wanted / given)}
        expected = loss_and_gradients(FusionModel(model, **options), by_hand)
        fusion = FusionModel(model, **options, source_temperature=given)
        found = loss_and_gradients(fusion, batch)
        assert torch.equal(found[0], expected[0])
        assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])
        # Renormalising divides the tail out, so a tail that is given has no effect.
        assert torch.equal(fusion(**batch, source_tail=tail)["loss"], expected[0])


def test_a_source_temperature_changes_the_sources_as_a_temperature_on_their_logits_would():
    """If the whole vocabulary is kept, its log-softmax at 1, brought to T, is its log-softmax at T."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 2, 6, 40, generator=g) * 3
    ids = torch.arange(40).expand_as(logits)
    tokens = torch.randint(40, (2, 6), generator=g)
    model = random_model("llama", **SMALL_LLAMA | {"vocab_size": 40})
    losses = []
    for logprobs, source_temperature in ((logits.log_softmax(-1), 1.0), ((logits / 2).log_softmax(-1), None)):
        fusion = FusionModel(model, temperature=2.0, tail="renormalize", source_temperature=source_temperature)
        losses.append(fusion(tokens, labels=tokens, source_ids=ids, source_logprobs=logprobs)["loss"])
    torch.testing.assert_close(*losses)


def test_a_bucket_has_no_other_temperature():
    with pytest.raises(
        ValueError, match=r"source_temperature must be the loss's temperature 2.0 with tail='bucket'.*got 1.0"
    ):
        FusionModel(demo_model(), temperature=2.0, source_temperature=1.0)
    with pytest.raises(ValueError, match=r"source_temperature must be > 0"):
        FusionModel(demo_model(), tail="renormalize", source_temperature=0.0)
    batch = padded(examples())
    loss = FusionModel(demo_model(), temperature=2.0)(**batch)["loss"]
    assert torch.equal(FusionModel(demo_model(), temperature=2.0, source_temperature=2.0)(**batch)["loss"], loss)


def test_without_a_source_temperature_logprobs_are_as_given_and_a_tail_beside_renormalize_is_an_error():
    batch = padded(examples())
    fusion = FusionModel(demo_model(), temperature=2.0, tail="renormalize")
    with pytest.raises(ValueError, match=r"source_tail needs tail='bucket', got 'renormalize'; drop it"):
        fusion(**batch)
    del batch["source_tail"]
    same = FusionModel(demo_model(), temperature=2.0, tail="renormalize", source_temperature=2.0)
    assert torch.equal(fusion(**batch)["loss"], same(**batch)["loss"])


@pytest.mark.long
def test_a_source_temperature_compiles_in_one_graph():
    fusion = FusionModel(demo_model(), temperature=2.0, tail="renormalize", source_temperature=1.0)
    batch = padded(examples())
    plain = loss_and_gradients(fusion, batch)
    loss = torch.compile(fusion, backend="aot_eager", fullgraph=True)(**batch)["loss"]
    torch.testing.assert_close(loss, plain[0], rtol=1e-5, atol=1e-5)
