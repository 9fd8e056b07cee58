"""Self-attention on contiguous tokens against `nn.MultiheadAttention`, and where it leaves the work to that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_xai.models import contiguous_tokens
from lightning_xai.models.contiguous_tokens import ContiguousTokens
from lightning_xai.models.dual_encoder import DualEncoder

CAUSAL = torch.full((5, 5), -torch.inf).triu(1)


def attention(**options: Any) -> nn.MultiheadAttention:
    """A layer with random weights and biases."""
    torch.manual_seed(0)
    made = nn.MultiheadAttention(8, 2, **{"batch_first": True, **options})
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What was given to our own self-attention."""
    own, found = contiguous_tokens._self_attention, list[Tensor]()

    def counted(x: Tensor, *others: Any) -> Tensor:
        found.append(x)
        return own(x, *others)

    monkeypatch.setattr(contiguous_tokens, "_self_attention", counted)
    return found


def outcome(layer: nn.MultiheadAttention, x: Tensor, **options: Any) -> list[Tensor]:
    """Output, and gradients by the input and all weights."""
    x = x.clone().requires_grad_()
    output = layer(x, x, x, need_weights=False, **options)[0]
    return [output, *torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("mask", [None, CAUSAL], ids=["unmasked", "causal"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("batch", [0, 3])
def test_output_and_gradients_are_those_of_the_layer_itself(
    mask: Tensor | None, batch_first: bool, batch: int, calls: list[Tensor]
) -> None:
    layer = attention(batch_first=batch_first)
    x = torch.randn(*((batch, 5) if batch_first else (5, batch)), 8)
    expected = outcome(layer, x, attn_mask=mask)
    with ContiguousTokens():
        found = outcome(layer, x, attn_mask=mask)
    assert len(calls) == 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_half_precision_is_as_near_to_the_numbers_as_the_layer_itself(calls: list[Tensor]) -> None:
    layer, x = attention(), torch.randn(3, 5, 8)
    exact = layer(x, x, x, need_weights=False, attn_mask=CAUSAL)[0]
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x, x, x, need_weights=False, attn_mask=CAUSAL)[0]
        with ContiguousTokens():
            found = layer(x, x, x, need_weights=False, attn_mask=CAUSAL)[0]
    assert len(calls) == 1
    assert found.dtype == expected.dtype == torch.bfloat16
    assert (found - exact).norm() < 1.5 * (expected - exact).norm()


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({"dropout": 0.5}, {}),
        ({}, {"key_padding_mask": torch.tensor([[False] * 4 + [True]] * 3)}),
        ({}, {"need_weights": True}),
        ({}, {"attn_mask": CAUSAL.expand(6, 5, 5)}),
        ({"add_zero_attn": True}, {}),
    ],
    ids=["dropout", "padding", "weights", "a mask for each head", "a zero"],
)
def test_what_is_not_plain_self_attention_is_left_to_the_layer(
    options: dict[str, Any], call: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contiguous_tokens, "_self_attention", None)
    layer, x = attention(**options), torch.randn(3, 5, 8)
    torch.manual_seed(1)
    expected = layer(x, x, x, **call)[0]
    torch.manual_seed(1)
    with ContiguousTokens():
        found = layer(x, x, x, **call)[0]
    torch.testing.assert_close(found, expected)


def test_a_training_pass_goes_with_gradient_checkpointing_that_was_set_on_the_model_itself(
    make_encoder: Callable[..., DualEncoder], calls: list[Tensor]
) -> None:
    gradients, used = [], []
    for checkpointing in (False, True):
        encoder = make_encoder("vit", torch.float64)
        encoder.model.set_grad_checkpointing(checkpointing)
        images = torch.randn(2, *encoder.image_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        image, text = encoder(images, encoder.tokenizer.encode(["a dog", "two cats"]))
        (image @ text.T).sum().backward()
        used.append(len(calls))
        gradients.append({name: each.grad for name, each in encoder.named_parameters() if each.grad is not None})
    assert used[0] == used[1] > 0  # only where blocks are not run again
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-10, atol=1e-12)
