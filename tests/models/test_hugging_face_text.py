"""Text towers that open_clip builds from Hugging Face's transformers, small and without network, at every layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, randomised
from equation_10 import Side, assert_same, block_input, equation_10, replacing
from torch import Tensor, nn

from lightning_xai.attribution import FeaturePairAttribution
from lightning_xai.models import DualEncoder, UnsupportedTowerError, load_dual_encoder

tokenizers = pytest.importorskip("tokenizers", reason="needs transformers, as these towers themselves do")
transformers = pytest.importorskip("transformers")

CAPTIONS = ["a dog on a red mat", "two cats", "one very long caption of nine tokens"]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
LENGTH = 12
BERT = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 20, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
M2M = {
    "d_model": 16, "encoder_layers": 3, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "encoder_layerdrop": 0.0,
    "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "max_position_embeddings": 20,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2, "pad_token_id": 1}
# Configuration class, its settings, open_clip's pooler and projection: what open_clip's own models have, and BERT's.
TOWERS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "roberta": ("RobertaConfig", BERT, "mean_pooler", "mlp"),
    "xlm_roberta": ("XLMRobertaConfig", BERT, "mean_pooler", "linear"),
    "roberta_cls": ("RobertaConfig", BERT, "cls_last_hidden_state_pooler", "linear"),
    "bert_pooler": ("BertConfig", BERT, "cls_pooler", "mlp"),
    "nllb": ("M2M100Config", M2M, "cls_pooler", "linear"),
    "mt5": ("MT5Config", T5, "mean_pooler", "mlp"),
}
# MT5's norms and softmax compute in float32, whatever the weights.
SINGLE = {"mt5"}


def save_tokenizer(folder: Path) -> int:
    """A tokenizer with one token for each word of the captions; returns the size of its vocabulary."""
    words = sorted({word for caption in CAPTIONS for word in caption.split()} | {"b"})
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    marks = [("<s>", 0), ("</s>", 2)]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=marks)
    names = ("bos", "pad", "eos", "unk")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{name}_token": token for name, token in zip(names, SPECIAL, strict=True)},
    ).save_pretrained(folder)
    return len(vocabulary)


def build(name: str, folder: Path) -> DualEncoder:
    kind, settings, pooler, projection = TOWERS[name]
    config = getattr(transformers, kind)(vocab_size=save_tokenizer(folder / "tokenizer"), **settings)
    config.save_pretrained(folder)
    text_cfg = {
        "hf_model_name": str(folder), "hf_tokenizer_name": str(folder / "tokenizer"), "context_length": LENGTH,
        "hf_pooler_type": pooler, "hf_proj_type": projection,
    }  # fmt: skip
    model_cfg = {"embed_dim": 6, "vision_cfg": ARCHITECTURES["vit"]["vision_cfg"], "text_cfg": text_cfg}
    path = folder / "model.json"
    path.write_text(json.dumps(model_cfg))
    torch.manual_seed(0)
    encoder = load_dual_encoder(path)
    with torch.no_grad():
        for weight in encoder.model.text.parameters():
            if weight.ndim > 1:  # as initialised, hardly anything passes from token to token
                weight.normal_(std=weight.shape[1] ** -0.5)
    made: DualEncoder = randomised(encoder).double().eval()
    return made


@pytest.fixture(scope="module")
def encoder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], DualEncoder]:
    """Encoders in float64 that the tests of this file share, so they must not change them."""
    return cache(lambda name: build(name, tmp_path_factory.mktemp(name)))


def blocks_of(encoder: DualEncoder, name: str) -> Any:
    transformer: Any = encoder.model.text.transformer
    if name == "mt5":
        return transformer.block
    return transformer.layers if name == "nllb" else transformer.encoder.layer


def images_of(encoder: DualEncoder, count: int) -> Tensor:
    return torch.randn(count, *encoder.image_shape, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_features_are_the_layers_own_input_and_embed_to_the_encoders_output(
    name: str, encoder_of: Callable[[str], DualEncoder]
) -> None:
    encoder = encoder_of(name)
    tokens, text = encoder.tokenizer.encode(CAPTIONS), encoder.model.text
    assert_same(encoder.encode_text(tokens), text(tokens))
    longest = int((tokens != 1).sum(dim=1).max())
    assert longest < LENGTH, "some padding has to be left out"
    seen = (tokens != 1)[:, :longest]
    for layer, block in enumerate(blocks_of(encoder, name)):
        tower, own = encoder.text_at_layer(layer), block_input(block, lambda: text(tokens))
        hidden = tower.features_before(tokens)
        assert hidden.shape[:2] == (3, longest)
        assert_same(hidden[seen], own[:, :longest][seen])
        assert_same(tower.embed_from(hidden, tokens), text(tokens))
        assert tower.block is block
        assert_same(tower.features_before(tokens, LENGTH), own)
        assert_same(tower.captured(own), own)


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_a_tower_that_averages_tokens_reads_at_its_head(name: str, encoder_of: Callable[[str], DualEncoder]) -> None:
    encoder = encoder_of(name)
    tokens, text, last = encoder.tokenizer.encode(CAPTIONS), encoder.model.text, encoder.text_at_layer()
    # The blocks of T5 cannot be left out, since the first one makes what all of them use.
    if TOWERS[name][2] != "mean_pooler" or name == "mt5":
        assert last.reading_layer == last.layer
        with pytest.raises(ValueError, match=f"text tower has layers 0 to {last.layer} .*got layer {last.layer + 1}$"):
            encoder.text_at_layer(last.layer + 1)
        return
    assert last.reading_layer == last.layer + 1
    head, kept = encoder.text_at_layer(last.reading_layer), list[Tensor]()
    handle = head.listen(kept.append)
    expected = text(tokens)
    handle.remove()
    text(tokens)
    assert len(kept) == 1
    hidden = head.features_before(tokens)
    seen = (tokens != 1)[:, : hidden.shape[1]]
    assert_same(hidden[seen], kept[0][:, : hidden.shape[1]][seen])
    assert_same(head.embed_from(hidden, tokens), expected)


@pytest.mark.parametrize("name", TOWERS)
def test_visible_tokens_are_those_that_the_embedding_changes_with(
    name: str, encoder_of: Callable[[str], DualEncoder]
) -> None:
    encoder = encoder_of(name)
    tokens = encoder.tokenizer.encode(CAPTIONS)
    tokens[0, 3] = 1  # padding amid a caption is masked as well
    block = blocks_of(encoder, name)[0]
    hidden = block_input(block, lambda: encoder.model.text(tokens)).requires_grad_()
    embedding = replacing(block, hidden, lambda: encoder.model.text(tokens))
    mixture = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(2)).double()
    (gradient,) = torch.autograd.grad((embedding * mixture).sum(), hidden)
    visible = encoder.text_at_layer(0).visible(tokens)
    assert torch.equal(visible, gradient.abs().sum(dim=2) > 1e-12)
    assert visible.sum(dim=1).tolist() == [7, 4, 9]


@pytest.mark.parametrize("name", TOWERS)
def test_attributions_agree_with_equation_10_taken_literally(
    name: str, encoder_of: Callable[[str], DualEncoder]
) -> None:
    encoder, model = encoder_of(name), encoder_of(name).model
    tokens, images = encoder.tokenizer.encode(CAPTIONS[:1]), images_of(encoder, 1)
    reference = torch.tensor([[0, 1, 2] + [1] * (LENGTH - 3)])
    image = Side(model.visual.transformer.resblocks[-1], model.encode_image, images, torch.zeros_like(images))
    relative, absolute = (1e-4, 1e-7) if name in SINGLE else (1e-8, 1e-12)
    for layer, block in enumerate(blocks_of(encoder, name)):
        result = FeaturePairAttribution(encoder, text_layer=layer, steps=2).attribute(images, tokens)
        expected = equation_10(Side(block, model.encode_text, tokens, reference), image, steps=2)
        own = result.interactions[0].flatten(1)
        torch.testing.assert_close(own, expected[:, 1:], rtol=relative, atol=absolute)
        assert result.interactions.abs().max() > 1e-4


@pytest.mark.parametrize(
    ("name", "steps", "tolerance"),
    [
        *((name, 32, 1e-9) for name in TOWERS if name not in ("nllb", "mt5")),
        # ReLUs leave kinks on the path, on which quadrature converges slowly; so do norms that subtract no mean, where
        # hidden states pass close to zero.
        ("nllb", 32, 1e-4),
        ("mt5", 128, 1e-6),
    ],
)
def test_attributions_sum_to_the_change_of_similarity(
    name: str, steps: int, tolerance: float, encoder_of: Callable[[str], DualEncoder]
) -> None:
    encoder = encoder_of(name)
    tokens, images = encoder.tokenizer.encode(CAPTIONS[:2]), images_of(encoder, 2)
    attribution = FeaturePairAttribution(encoder, text_layer=1, steps=steps, rule="gauss_legendre")
    result = attribution.attribute(images, tokens)
    assert result.completeness_error.abs().max() < tolerance
    assert result.text.abs().max() > 1e-3


def test_neighbours_and_padding_change_nothing(encoder_of: Callable[[str], DualEncoder]) -> None:
    for name in TOWERS:
        encoder = encoder_of(name)
        tokens, images = encoder.tokenizer.encode(CAPTIONS), images_of(encoder, 3)
        attribution = FeaturePairAttribution(encoder, text_layer=1)
        whole = attribution.attribute(images, tokens)
        alone = attribution.attribute(images[1:2], tokens[1:2, :6])
        torch.testing.assert_close(alone.interactions[0], whole.interactions[1, :6], rtol=1e-5, atol=1e-7)
        assert not whole.interactions[1, 4:].any()
        order = torch.tensor([2, 0, 1])
        torch.testing.assert_close(
            attribution.attribute(images[order], tokens[order]).interactions,
            whole.interactions[order],
            rtol=1e-5,
            atol=1e-7,
        )


class BrokenError(Exception):
    """Raised by a tower in the middle of its forward pass."""


@pytest.mark.parametrize("name", ["roberta", "nllb", "mt5"])
def test_hooks_and_layers_are_as_they_were_also_after_an_exception(
    name: str, encoder_of: Callable[[str], DualEncoder]
) -> None:
    encoder = encoder_of(name)
    tokens, blocks, modules = encoder.tokenizer.encode(CAPTIONS), blocks_of(encoder, name), list(encoder.modules())
    tower = encoder.text_at_layer(1)
    hidden = tower.features_before(tokens)

    def fail(*ignored: Any) -> None:
        raise BrokenError

    handle = blocks[-1].register_forward_pre_hook(fail)
    with pytest.raises(BrokenError):
        tower.embed_from(hidden, tokens)
    handle.remove()
    handle = blocks[0].register_forward_pre_hook(fail)
    with pytest.raises(BrokenError):
        tower.features_before(tokens)
    handle.remove()
    assert blocks_of(encoder, name) is blocks
    assert list(encoder.modules()) == modules
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules)
    assert_same(tower.embed_from(hidden, tokens), encoder.model.text(tokens))


def test_text_without_token_ids_says_what_is_missing(encoder_of: Callable[[str], DualEncoder]) -> None:
    tower = encoder_of("roberta").text_at_layer()
    with pytest.raises(ValueError, match="give them as inputs"):
        tower.embed_from(torch.zeros(1, 4, 16).double())


def test_a_model_without_a_list_of_layers_is_named(tmp_path: Path) -> None:
    encoder = build("roberta", tmp_path)
    encoder.model.text.transformer.encoder = nn.Identity()
    with pytest.raises(UnsupportedTowerError, match="type RobertaModel is not supported: it has no list of layers"):
        encoder.text_at_layer()


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
@pytest.mark.parametrize("name", ["roberta", "nllb", "mt5"])
def test_gradient_checkpointing_and_chunks_give_the_same_gradients(name: str, tmp_path: Path) -> None:
    encoder = build(name, tmp_path).train()
    images, tokens = images_of(encoder, 3), encoder.tokenizer.encode(CAPTIONS)

    def gradients(chunk_size: int | None = None) -> dict[str, Tensor]:
        encoder.zero_grad()
        torch.manual_seed(2)  # of dropout
        image, text = encoder(images, tokens, chunk_size)
        torch.autograd.backward((image * text).sum())
        return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}

    plain = gradients()
    encoder.checkpoint_blocks()
    runs: list[int] = []
    layer = next(module for module in blocks_of(encoder, name)[0].modules() if isinstance(module, nn.Linear))
    handle = layer.register_forward_pre_hook(lambda *_: runs.append(1))
    checkpointed = gradients()
    handle.remove()
    assert len(runs) == 2
    for key, gradient in plain.items():
        assert_same(checkpointed[key], gradient)
    encoder.eval()  # in training, chunks draw other numbers than the batch
    whole, chunked = gradients(), gradients(2)
    for key, gradient in whole.items():
        assert_same(chunked[key], gradient)
