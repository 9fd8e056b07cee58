from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, TEXT, encoder_from
from inputs import random_pairs
from timm.models import register_model
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lightning_xai.attribution import METHODS
from lightning_xai.attribution.attention import AttentionReplaced, recording
from lightning_xai.attribution.attention_relevance import AttentionRelevance
from lightning_xai.attribution.method_options import choose_method
from lightning_xai.models import DualEncoder, UnsupportedTowerError, load_dual_encoder

VIT = {"image_size": 32, "layers": 3, "width": 32, "head_width": 8, "patch_size": 8}
SIGLIP: dict[str, Any] = {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none", "image_size": 160}

# Every way that an embedding is read: of images by CLS, average, and pools of one or several queries; of text at its
# end, its start and the last place, under the causal mask and without one.
CONFIGS: dict[str, dict[str, Any]] = {
    "cls": ARCHITECTURES["vit"],
    "quick_gelu": ARCHITECTURES["vit_layer_scale_quick_gelu"],
    "average": ARCHITECTURES["vit_average_pool"],
    "query_norm": ARCHITECTURES["vit_custom_block"],
    "not_causal_last": {
        "embed_dim": 24,
        "vision_cfg": VIT | {"image_size": [32, 48]},
        "text_cfg": TEXT | {"no_causal_mask": True, "pool_type": "last"},
    },
    "not_causal_first": {
        "embed_dim": 32,
        "vision_cfg": VIT,
        "text_cfg": TEXT | {"no_causal_mask": True, "pool_type": "first", "proj_type": "none"},
    },
    "not_causal_end": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT | {"no_causal_mask": True}},
    "pooled_by_queries": {
        "embed_dim": 24,
        "vision_cfg": VIT | {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 17},
        "text_cfg": TEXT,
    },
    "averaged_queries": {
        "embed_dim": 24,
        "vision_cfg": VIT
        | {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 5, "pool_type": "avg"},
        "text_cfg": TEXT,
    },
    "siglip": {"embed_dim": 96, "vision_cfg": SIGLIP, "text_cfg": TEXT | {"no_causal_mask": True, "pool_type": "last"}},
    "timm_average": {
        "embed_dim": 24,
        "vision_cfg": SIGLIP | {"timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear"},
        "text_cfg": TEXT,
    },
    "coca_text": {
        "embed_dim": 24,
        "custom_text": True,
        "vision_cfg": VIT,
        "text_cfg": TEXT | {"embed_cls": True},
    },
}


@pytest.fixture(scope="module")
def encoder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], DualEncoder]:
    """Encoders in float64 that the tests of this file share, so they must not change them."""
    return cache(lambda name: encoder_from(CONFIGS[name], tmp_path_factory.mktemp(name)))


# The literal version: every attention of the whole towers is written out and kept, then multiplied as in Eq. 6.


def plain_attention(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None, kept: list[Any]) -> Any:
    """Softmax attention of projected [1, Q, D] and [1, T, D], head by head, in so many words."""
    context, probabilities = [], []
    for q, k, v in zip(*(x[0].chunk(heads, dim=1) for x in (query, key, value)), strict=True):
        scores = q @ k.T / q.shape[1] ** 0.5
        probabilities.append(torch.softmax(scores if mask is None else scores + mask, dim=1).requires_grad_())
        context.append(probabilities[-1] @ v)
    kept.append(probabilities)
    return torch.cat(context, dim=1)[None]


def with_plain_attention(module: Any, kept: list[Any]) -> Callable[..., Any] | None:
    """The forward pass of an attention of open_clip or timm, written out; None for other modules."""

    def multi_head(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Any:
        if module.in_proj_weight is None:
            weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        else:
            weights = module.in_proj_weight.chunk(3)
        query, key, value = (
            x @ weight.T + bias
            for x, weight, bias in zip((query, key, value), weights, module.in_proj_bias.chunk(3), strict=True)
        )
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask[0]  # the same for every head of the one caption
        return module.out_proj(plain_attention(query, key, value, module.num_heads, attn_mask, kept)), None

    def open_clip_own(
        x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Any:
        def normed(part: Tensor, norm: Any) -> Tensor:
            return torch.cat([norm(head) for head in part.chunk(module.num_heads, dim=2)], dim=2)

        # open_clip 4 has its own attention everywhere, where other keys may be given.
        if getattr(module, "in_proj_weight", None) is None:
            weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        else:
            weights = module.in_proj_weight.chunk(3)
        inputs = (x, x if k_x is None else k_x, x if v_x is None else v_x)
        query, key, value = (
            each @ weight.T + bias
            for each, weight, bias in zip(inputs, weights, module.in_proj_bias.chunk(3), strict=True)
        )
        query, key = normed(query, module.ln_q), normed(key, module.ln_k)
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask[0]  # the same for every head of the one caption
        return module.out_proj(module.ln_inner(plain_attention(query, key, value, module.num_heads, attn_mask, kept)))

    def timm_block(x: Tensor, *_: Any, **__: Any) -> Any:
        query, key, value = module.qkv(x).chunk(3, dim=2)
        return module.proj(plain_attention(query, key, value, module.num_heads, None, kept))

    def timm_pool(x: Tensor, *_: Any) -> Any:
        key, value = module.kv(x).chunk(2, dim=2)
        x = module.proj(plain_attention(module.q(module.latent), key, value, module.num_heads, None, kept))
        return (x + module.mlp(module.norm(x)))[:, 0]

    written_out: dict[str, Callable[..., Any]] = {
        "MultiheadAttention": multi_head,
        "transformer.Attention": open_clip_own,
        "attention.Attention": timm_block,
        "AttentionPoolLatent": timm_pool,
    }
    name = f"{type(module).__module__}.{type(module).__name__}"
    return next((forward for end, forward in written_out.items() if name.endswith(end)), None)


def literal(
    encoder: DualEncoder, tower: str, image: Tensor, tokens: Tensor, start: int, read: Callable[[Tensor], Tensor]
) -> Tensor:
    """Row of R that is read [T], of one pair: full attention matrices of all blocks, full products."""
    model: Any = encoder.model
    kept: list[list[Tensor]] = []
    text = model.text if hasattr(model, "text") else model.transformer
    module = model.visual if tower == "image" else text
    patched = [part for part in module.modules() if with_plain_attention(part, kept) is not None]
    for part in patched:
        part.forward = with_plain_attention(part, kept)
    try:
        embedding = model.encode_image(image[None]) if tower == "image" else model.encode_text(tokens[None])
    finally:
        for part in patched:
            del part.forward
    with torch.no_grad():
        other = model.encode_text(tokens[None]) if tower == "image" else model.encode_image(image[None])
    logit = model.logit_scale.exp() * torch.cosine_similarity(embedding, other).sum()
    relevance = torch.eye(kept[0][0].shape[1], dtype=torch.float64)
    depth = len([part for part in module.modules() if type(part).__name__ in BLOCKS])
    for number, heads in enumerate(kept):
        gradients = torch.autograd.grad(logit, heads, retain_graph=True)
        if number < range(depth)[start]:
            continue
        step = torch.stack([(a * g).clamp(min=0) for a, g in zip(heads, gradients, strict=True)]).mean(dim=0)
        relevance = relevance + step @ relevance if number < depth else step @ relevance
    return read(relevance).detach()


BLOCKS = ("ResidualAttentionBlock", "CustomResidualAttentionBlock", "Block")
FIRST: Callable[[Tensor], Tensor] = lambda rows: rows[0]  # noqa: E731
READ_IMAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "average": lambda rows: rows[1:].mean(dim=0),  # open_clip averages without CLS
    "timm_average": lambda rows: rows[1:].mean(dim=0),
    "averaged_queries": lambda rows: rows[1:].mean(dim=0),
}
READ_TEXT: dict[str, Callable[[Tensor], Tensor]] = {
    "average": lambda rows: rows[-1],
    "not_causal_last": lambda rows: rows[-1],
    "siglip": lambda rows: rows[-1],
    "not_causal_first": FIRST,
    "coca_text": lambda rows: rows[-1, :-1],  # the class token stands after the caption
}


@pytest.mark.filterwarnings("ignore::lightning_xai.attribution.base.ConstantMapWarning")
@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_the_literal_product_over_stored_attention(
    name: str, encoder_of: Callable[[str], DualEncoder]
) -> None:
    encoder = encoder_of(name)
    images, tokens = random_pairs(encoder)
    for start in (-1, 0, 1) if name == "cls" else (-1, 0):
        result = AttentionRelevance(encoder, start_layer=start).attribute(images, tokens)
        patches = result.image[0].numel()
        for row, end in enumerate(tokens.argmax(dim=1).tolist()):
            pair = (images[row], tokens[row], start)
            expected = literal(encoder, "image", *pair, READ_IMAGE.get(name, FIRST))[-patches:]
            torch.testing.assert_close(result.image[row].flatten(), expected, rtol=1e-8, atol=1e-13)

            expected = literal(encoder, "text", *pair, READ_TEXT.get(name, itemgetter(end)))
            torch.testing.assert_close(result.text[row, 1:end], expected[1:end], rtol=1e-8, atol=1e-13)
            assert not result.text[row, 0]
            assert not result.text[row, end:].any()
        for part in (result.image, result.text):
            assert part.min() >= 0
            assert part.max() > 1e-4


def test_agrees_with_the_attentions_that_a_hugging_face_tower_gives_out_itself(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.RobertaConfig(
        vocab_size=49408,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
        pad_token_id=0,
    ).save_pretrained(tmp_path)
    text = {"hf_model_name": str(tmp_path), "context_length": 16, "hf_pooler_type": "mean_pooler"}
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"embed_dim": 24, "vision_cfg": VIT, "text_cfg": text | {"hf_proj_type": "mlp"}}))
    torch.manual_seed(0)
    encoder = load_dual_encoder(path).double().eval()
    model: Any = encoder.model
    for weight in model.text.parameters():
        # As they are initialised, hardly anything passes from token to token.
        torch.nn.init.normal_(weight, std=0.3)
    images, tokens = random_pairs(encoder)
    result = AttentionRelevance(encoder, start_layer=0).attribute(images, tokens)

    model.text.transformer.set_attn_implementation("eager")
    for row in range(len(tokens)):
        own = tokens[row] != 0
        output = model.text.transformer(tokens[row][None], attention_mask=own[None].long(), output_attentions=True)
        embedding = model.text.proj(output.last_hidden_state[:, own].mean(dim=1))
        logit = model.logit_scale.exp() * torch.cosine_similarity(embedding, model.encode_image(images[row][None]))
        relevance = torch.eye(tokens.shape[1]).double()
        for attention in output.attentions:
            (gradient,) = torch.autograd.grad(logit, attention, retain_graph=True)
            relevance = relevance + (attention * gradient).clamp(min=0).mean(dim=1)[0] @ relevance
        expected = relevance[own].mean(dim=0) * encoder.tokenizer.content_mask(tokens)[row]
        torch.testing.assert_close(result.text[row], expected, rtol=1e-8, atol=1e-13)
    assert result.text.max() > 0.1


def test_the_gradient_is_of_the_cosine_times_the_logit_scale(encoder_of: Callable[[str], DualEncoder]) -> None:
    encoder = encoder_of("cls")
    images, tokens = random_pairs(encoder)
    before = AttentionRelevance(encoder).attribute(images, tokens)
    kept = encoder.logit_scale.detach().clone()
    try:
        with torch.no_grad():
            encoder.logit_scale.add_(1.0)
        after = AttentionRelevance(encoder).attribute(images, tokens)
    finally:
        with torch.no_grad():
            encoder.logit_scale.copy_(kept)
    torch.testing.assert_close(after.image, before.image * torch.e)
    torch.testing.assert_close(after.text, before.text * torch.e)
    torch.testing.assert_close(after.similarity, before.similarity)


@pytest.mark.parametrize(("start", "with_graph"), [(-1, 0), (1, 1), (0, 2)])
def test_blocks_before_the_first_of_the_product_run_without_graph(
    start: int, with_graph: int, encoder_of: Callable[[str], DualEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of("cls")
    own = encoder.own_similarity(*random_pairs(encoder))
    monkeypatch.setattr(encoder, "own_similarity", lambda *_: own)  # whose pass is not counted here
    visual: Any = encoder.model.visual
    method = AttentionRelevance(encoder, start_layer=start)
    seen: list[bool] = []
    # The last block is not called as a whole: only the one row that is read is computed.
    handles = [
        block.register_forward_hook(lambda _, __, output: seen.append(output.requires_grad))
        for block in visual.transformer.resblocks
    ]
    method._check_towers()  # hooks are new to it, and could change something
    seen.clear()
    method.attribute(*random_pairs(encoder))
    for handle in handles:
        handle.remove()
    assert seen == [False] * (2 - with_graph) + [True] * with_graph


def tiny_swin(pretrained: bool = False, num_classes: int = 0, img_size: int = 64, **_: Any) -> nn.Module:
    model: Any = SwinTransformer(
        img_size, 4, num_classes=num_classes, embed_dim=8, depths=(2, 2), num_heads=(2, 2), window_size=4
    )
    model.default_cfg = {}
    swin: nn.Module = model
    return swin


register_model(tiny_swin)


def vision(name: str) -> dict[str, Any]:
    config = {"timm_model_name": name, "timm_pool": "avg", "timm_proj": "linear", "image_size": 64}
    return {"embed_dim": 24, "vision_cfg": config, "text_cfg": TEXT}


def test_a_tower_of_feature_maps_is_refused_and_the_other_methods_are_named(tmp_path: Path) -> None:
    others = ", ".join(name for name in METHODS if name != "attention_relevance")
    for config in (ARCHITECTURES["resnet"], vision("test_convnext"), vision("tiny_swin")):
        encoder = encoder_from(config, tmp_path)
        with pytest.raises(UnsupportedTowerError, match=r"image tower.*feature maps.*such as FeaturePairAttribution"):
            AttentionRelevance(encoder)
        with pytest.raises(UnsupportedTowerError, match=rf"feature maps.*; other methods: {others}$"):
            choose_method(encoder, "attention_relevance", {})


def test_attention_that_is_computed_by_other_means_is_refused(tmp_path: Path) -> None:
    encoder = encoder_from(CONFIGS["siglip"], tmp_path)
    visual: Any = encoder.model.visual
    AttentionRelevance(encoder)
    visual.trunk.blocks[1].attn.fused_attn = False
    with pytest.raises(UnsupportedTowerError, match=r"scaled_dot_product_attention.*once in each block; use a method"):
        AttentionRelevance(encoder, start_layer=0)


def test_a_layer_that_does_not_exist_is_an_error_in_words(encoder_of: Callable[[str], DualEncoder]) -> None:
    with pytest.raises(ValueError, match=r"image tower has layers 0 to 2 .*got layer 4"):
        AttentionRelevance(encoder_of("cls"), start_layer=4)


@pytest.mark.parametrize("name", ["attention_relevance", "grad_eclip", "legrad", "rollout"])
def test_the_head_is_no_block_to_start_at(name: str, encoder_of: Callable[[str], DualEncoder]) -> None:
    with pytest.raises(ValueError, match="start_layer is a block: the image tower has layers 0 to 2; got 3, its head"):
        choose_method(encoder_of("cls"), name, {"start_layer": 3})


def test_attention_written_out_is_pytorchs_own() -> None:
    cases: list[dict[str, Any]] = [
        {},
        {"is_causal": True},
        {"scale": 0.7},
        {"attn_mask": torch.tensor([[True, False, True, True, False]]).expand(5, 5)},
        {"attn_mask": torch.full((5, 5), float("-inf")).triu(1)},
        {"attn_mask": torch.randn(2, 1, 5, 5, generator=torch.Generator().manual_seed(1)).double()},
    ]
    for options in cases:
        query, key, value = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(0)).double()
        expected = scaled_dot_product_attention(query, key, value, **options)
        kept: list[Tensor] = []
        with AttentionReplaced(recording(kept)):
            torch.testing.assert_close(scaled_dot_product_attention(query, key, value, **options), expected)
        torch.testing.assert_close(kept[0] @ value, expected)
        torch.testing.assert_close(kept[0].sum(dim=3), torch.ones(2, 4, 5).double())


def test_attention_is_replaced_inside_multi_head_attention_and_nowhere_else() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    hidden = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).double()
    expected = attention(hidden, hidden, hidden, need_weights=False)[0]
    kept: list[Tensor] = []
    with AttentionReplaced(recording(kept)):
        torch.testing.assert_close(attention(hidden, hidden, hidden, need_weights=False)[0], expected)
    assert [probabilities.shape for probabilities in kept] == [(2, 2, 5, 5)]
    with pytest.raises(AssertionError), AttentionReplaced(recording(kept)):
        attention(hidden[:, :, :7], hidden, hidden)
    torch.testing.assert_close(attention(hidden, hidden, hidden, need_weights=False)[0], expected)
    assert len(kept) == 1
