"""Dual encoders of transformers, small and without network: the same numbers as open_clip's, and as its own."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, TEXT, encoder_from
from equation_10 import Side, assert_same, block_input, equation_10, sharing_padding
from PIL import Image
from small_hugging_face import (
    CAPTIONS,
    MODELS,
    PIXELS,
    WIDTHS,
    save_clip,
    save_siglip,
    save_siglip_tokenizer,
    save_small,
    transformers,
)
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lightning_xai.attribution import METHODS, FeaturePairAttribution
from lightning_xai.cli import main
from lightning_xai.models import (
    DualEncoder,
    HuggingFaceEncoder,
    UnsupportedTowerError,
    load_dual_encoder,
    save_hugging_face,
)
from lightning_xai.models.at_layer import TowerAtLayer, differentiable
from lightning_xai.models.processor_transform import ProcessorTransform
from lightning_xai.models.sharding import shard_encoder
from lightning_xai.training.contrastive import ContrastiveModule

OPTIONS: dict[str, dict[str, Any]] = {
    "m2ib": {"steps": 3, "samples": 2},
    "integrated_gradients": {"steps": 5},
    "kernel_shap": {"image_samples": 70, "text_samples": 40},
    "rise": {"image_masks": 12, "text_masks": 8},
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*takes images of any aspect ratio:UserWarning"),
    pytest.mark.filterwarnings("ignore::lightning_xai.attribution.base.ConstantMapWarning"),
]
NEW = hasattr(transformers, "CLIPImageProcessorPil")
PIL, TORCHVISION = (
    ({"backend": "pil"}, {"backend": "torchvision"}) if NEW else ({"use_fast": False}, {"use_fast": True})
)
every_model = pytest.mark.parametrize("kind", MODELS)
Encoders = Callable[[str], HuggingFaceEncoder]


@register_model
def small_square_siglip(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """timm's image tower of SigLIP in a size that float64 is quick in."""
    foreign = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    own = {key: value for key, value in options.items() if key not in foreign}
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 4}
    model: Any = VisionTransformer(**sizes, **{**own, "class_token": False, "global_pool": "map"})
    model.default_cfg = {}
    assert isinstance(model, VisionTransformer)
    return model


SIGLIP: dict[str, Any] = {
    "embed_dim": 24, "init_logit_bias": -10, "custom_text": True,
    "vision_cfg": {
        "image_size": 32, "timm_model_name": "small_square_siglip", "timm_pool": "map", "timm_proj": "none",
    },
    "text_cfg": TEXT | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
}  # fmt: skip
CONVERTED: dict[str, tuple[dict[str, Any], Callable[[DualEncoder, Path], Path]]] = {
    "clip": (ARCHITECTURES["vit"], save_clip),
    "clip_quick_gelu": (ARCHITECTURES["vit"] | {"quick_gelu": True}, save_clip),
    "siglip": (SIGLIP, save_siglip),
}


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[DualEncoder, DualEncoder]]:
    """An open_clip encoder and the one of transformers with equal weights, in float64; shared, so not to be changed."""

    def make(name: str) -> tuple[DualEncoder, DualEncoder]:
        config, save = CONVERTED[name]
        folder = tmp_path_factory.mktemp(name)
        encoder = encoder_from(config, folder, torch.float32)
        converted = load_dual_encoder(f"hf:{save(encoder, folder / 'hf')}")
        return encoder.double(), converted.double().eval()

    return cache(make)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda kind: save_small(kind, tmp_path_factory.mktemp("hf") / kind))


@pytest.fixture(scope="module")
def encoder_of(folder_of: Callable[[str], Path]) -> Encoders:
    """Encoders in float64 that the tests of this file share, so they must not change them."""

    def make(kind: str) -> HuggingFaceEncoder:
        encoder = load_dual_encoder(f"hf:{folder_of(kind)}").double().eval()
        assert isinstance(encoder, HuggingFaceEncoder)
        return encoder

    return cache(make)


def pairs(encoder: DualEncoder) -> tuple[Tensor, Tensor]:
    images = torch.randn(3, *encoder.image_shape, generator=torch.Generator().manual_seed(1))
    return images.to(encoder.logit_scale), encoder.tokenizer.encode(CAPTIONS)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours, so that resizing is not all rounding."""
    noise = np.random.default_rng(seed).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


# ---- the same model in both libraries


@pytest.mark.parametrize("name", CONVERTED)
@torch.no_grad()
def test_a_converted_model_embeds_as_open_clips(name: str, pair_of: Any) -> None:
    own, other = pair_of(name)
    images, tokens = pairs(own)
    assert torch.equal(other.tokenizer.encode(CAPTIONS), tokens)
    assert_same(other.encode_image(images), own.encode_image(images))
    assert_same(other.encode_text(tokens), own.encode_text(tokens))
    assert_same(other.logit_scale, own.logit_scale)
    assert other.logit_scale.shape == ()
    assert other.embedding_width == own.embedding_width
    assert other.tokenizer.padding_id == own.tokenizer.padding_id
    assert torch.equal(other.trim_tokens(tokens), own.trim_tokens(tokens))


@pytest.mark.parametrize("name", CONVERTED)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_explains_a_converted_model_as_open_clips(method: str, name: str, pair_of: Any) -> None:
    own, other = pair_of(name)
    images, tokens = pairs(own)
    made: Any = METHODS[method]
    expected, result = (made(x, **OPTIONS.get(method, {})).attribute(images, tokens) for x in (own, other))
    for part in ("image", "text", "similarity", "interactions", "prefix"):
        if getattr(expected, part) is not None:
            torch.testing.assert_close(getattr(result, part), getattr(expected, part), rtol=1e-6, atol=1e-12)
    assert expected.image.any()


# ---- every class


@every_model
@torch.no_grad()
def test_embeddings_are_transformers_own_of_the_processors_tokens(
    kind: str, encoder_of: Encoders, folder_of: Callable[[str], Path]
) -> None:
    encoder = encoder_of(kind)
    model, tokenizer = encoder.model, transformers.AutoTokenizer.from_pretrained(folder_of(kind))
    # As the processor of SigLIP pads, and those of the others may.
    length = encoder.tokenizer.context_length
    padding = {"padding": "max_length", "max_length": length} if kind.startswith("Siglip") else {"padding": True}
    given = tokenizer(CAPTIONS, return_tensors="pt", **padding)
    if kind.startswith("Siglip"):
        del given["attention_mask"]
    given.pop("token_type_ids", None)
    text = model.get_text_features(**given)
    assert_same(encoder.encode_text(encoder.tokenizer.encode(CAPTIONS)), getattr(text, "pooler_output", text))
    square = photo(32, 32)
    pixels = encoder.image_transform(square)[None].double()
    processed = dict(transformers.AutoImageProcessor.from_pretrained(folder_of(kind), **PIL)(
        square, return_tensors="pt"
    ))  # fmt: skip
    processed["pixel_values"] = processed["pixel_values"].double()
    image = model.get_image_features(**processed)
    torch.testing.assert_close(
        encoder.encode_image(pixels), getattr(image, "pooler_output", image), rtol=1e-5, atol=1e-6
    )


def test_siglips_own_tokenizer_cleans_captions_and_finds_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_small("SiglipModel", tmp_path / "siglip", save_siglip_tokenizer)
    tokenizer = pickle.loads(pickle.dumps(load_dual_encoder(f"hf:{folder}").tokenizer))  # as workers get it
    caption = "A small, green star!"
    tokens = tokenizer.encode([caption])
    assert torch.equal(tokens, tokenizer.encode(["a small green star"]))
    own = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokens.tolist() == own([caption], padding="max_length", max_length=16)["input_ids"]
    span = tokenizer.token_span("a small green star", (8, 13))
    assert tokenizer.decode(tokenizer.encode(["a small green star"])[0][span]) == "green"
    monkeypatch.setattr("lightning_xai.models.hugging_face_folder.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"sentencepiece: pip install 'lightning_xai\[hf\]'"):
        load_dual_encoder(f"hf:{folder}")


def test_an_old_transformers_is_an_error_that_names_the_extra(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of("CLIPModel")
    monkeypatch.setattr("lightning_xai.models.hugging_face_folder.version", lambda name: "4.57.0")
    with pytest.raises(ImportError, match=r"lightning_xai\[hf\]'; found transformers 4.57.0"):
        load_dual_encoder(f"hf:{folder}")


@every_model
def test_attributions_sum_to_the_change_of_similarity_and_agree_with_equation_10(
    kind: str, encoder_of: Encoders
) -> None:
    encoder = encoder_of(kind)
    images, tokens = pairs(encoder)
    result = FeaturePairAttribution(encoder, steps=40, rule="gauss_legendre").attribute(images, tokens)
    assert result.completeness_error.abs().max() < 1e-7
    image, text = encoder.image_at_layer(), encoder.text_at_layer()
    reference = encoder.tokenizer.padding_caption()[None]
    result = FeaturePairAttribution(encoder, steps=2).attribute(images[:1], tokens[:1])
    assert image.block is not None
    assert text.block is not None
    # The text tower runs all tokens here, so that the reference has as many.
    expected = equation_10(
        Side(text.block, encoder._text_tower.encode, tokens[:1], reference),
        Side(
            image.block, encoder.encode_image, images[:1], torch.zeros_like(images[:1]),
            width_axis=1 if image.is_feature_map else -1,
        ),
        steps=2,
    )  # fmt: skip
    # SigLIP's tokenizer pads with the mark of the end, the first of which is the caption's own.
    end = tokens[0].ne(encoder.tokenizer.padding_id).nonzero().max() + (kind == "SiglipModel")
    own, literal = result.interactions[0].flatten(1), sharing_padding(expected, end)
    torch.testing.assert_close(own, literal[:, image.prefix_tokens :], rtol=1e-4, atol=1e-9)
    assert own.abs().max() > 1e-5


@every_model
def test_a_head_that_pools_is_the_reading_layer_and_read_as_its_own_head_reads(kind: str, encoder_of: Encoders) -> None:
    encoder = encoder_of(kind)
    images, _ = pairs(encoder)
    last = encoder.image_at_layer()
    pools = kind.startswith("Siglip")
    assert last.reading_layer == last.layer + (pools or last.is_feature_map)
    assert encoder.text_at_layer().reading_layer == 2
    tower = encoder.image_at_layer(last.layers.stop)
    assert tower.calls_blocks is not pools
    with differentiable(encoder), torch.no_grad():
        hidden = tower.features_before(images)
        reference = torch.randn(hidden[:1].shape, generator=torch.Generator().manual_seed(0)).to(hidden)
        alpha = torch.rand(len(hidden), 2, tower.count(hidden), generator=torch.Generator().manual_seed(1)).to(hidden)
        read, own = (path(hidden, reference)(alpha) for path in (tower.path, partial(TowerAtLayer.path, tower)))
    assert_same(read, own)


@every_model
@torch.no_grad()
def test_every_layer_is_the_blocks_own_input_and_embeds_to_the_encoders_output(kind: str, encoder_of: Encoders) -> None:
    encoder = encoder_of(kind)
    images, tokens = pairs(encoder)
    for layer in range(3):
        image, text = encoder.image_at_layer(layer), encoder.text_at_layer(layer)
        for tower, inputs, encode in ((image, images, encoder.encode_image), (text, tokens, encoder.encode_text)):
            assert tower.block is not None
            hidden = tower.features_before(inputs)
            assert_same(hidden, tower.captured(block_input(tower.block, lambda e=encode, x=inputs: e(x))))  # type: ignore[misc]
            assert_same(tower.embed_from(hidden, inputs), encode(inputs))
    with pytest.raises(ValueError, match="the text tower has layers 0 to 2"):
        encoder.text_at_layer(3)


@every_model
def test_visible_tokens_are_those_that_the_embedding_changes_with(kind: str, encoder_of: Encoders) -> None:
    encoder = encoder_of(kind)
    _, tokens = pairs(encoder)
    tower = encoder.text_at_layer(0)
    hidden = tower.features_before(tokens, tokens.shape[1]).detach().requires_grad_()
    embedding = tower.embed_from(hidden, tokens)
    mixture = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(2)).double()
    (gradient,) = torch.autograd.grad((embedding * mixture).sum(), hidden)
    assert torch.equal(tower.visible(tokens), gradient.abs().sum(dim=2) > 1e-12)


@every_model
def test_the_other_methods_explain_it_or_refuse_with_advice(kind: str, encoder_of: Encoders) -> None:
    encoder = encoder_of(kind)
    images, tokens = pairs(encoder)
    for name, method in METHODS.items():
        made: Any = method
        try:
            result = made(encoder, **OPTIONS.get(name, {})).attribute(images, tokens)
        except UnsupportedTowerError as error:
            eager = encoder.model.config.text_config._attn_implementation != "sdpa"  # in earlier releases
            seen = {"attention_relevance", "clip_surgery", "grad_eclip", "legrad", "mask_clip", "rollout"}
            assert name in seen, error  # noqa: PT017
            assert kind == "AlignModel" or eager or "averages its tokens" in str(error)  # noqa: PT017
            continue
        assert result.image.flatten(1).std(dim=1).max() > 0, name


# ---- training


@every_model
def test_chunks_and_gradient_checkpointing_give_the_same_gradients(kind: str, folder_of: Callable[[str], Path]) -> None:
    encoder = load_dual_encoder(f"hf:{folder_of(kind)}").double()
    assert all(module.training for module in encoder.modules())
    if kind == "AlignModel":
        for option in ({"chunk_size": 2}, {"gradient_checkpointing": True}):
            with pytest.raises(ValueError, match="has batch statistics"):
                ContrastiveModule(encoder, **option)
        return
    for module in encoder.modules():  # chunks draw other numbers than the batch
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0  # type: ignore[assignment]
    for config in (encoder.model.config.text_config, encoder.model.config.vision_config):
        config.attention_probs_dropout_prob = config.attention_dropout = 0.0
    images, tokens = pairs(encoder)

    def gradients(chunk_size: int | None = None) -> dict[str, Tensor]:
        encoder.zero_grad()
        image, text = encoder(images, encoder.trim_tokens(tokens), chunk_size)
        torch.autograd.backward((image * text).sum() * encoder.logit_scale.exp())
        return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}

    plain, chunked = gradients(), gradients(2)
    encoder.checkpoint_blocks()
    runs: list[int] = []
    block = encoder.text_at_layer(0).block
    assert block is not None
    layer = next(module for module in block.modules() if isinstance(module, nn.Linear))
    handle = layer.register_forward_pre_hook(lambda *_: runs.append(1))
    checkpointed = gradients()
    handle.remove()
    assert len(runs) == 2
    for key, gradient in plain.items():
        # SigLIP 2 resizes its positions in float32, whatever the weights.
        torch.testing.assert_close(chunked[key], gradient, rtol=1e-6, atol=1e-7 if kind == "Siglip2Model" else 1e-11)
        assert_same(checkpointed[key], gradient)
    assert {key for key, _ in encoder.named_parameters()} - plain.keys() <= {"model.logit_bias"} | {
        key for key in dict(encoder.named_parameters()) if "pooler" in key
    }


@pytest.mark.parametrize("kind", ["CLIPModel", "SiglipModel"])
def test_listing_blocks_runs_nothing_since_a_sharded_model_could_not(
    kind: str, folder_of: Callable[[str], Path]
) -> None:
    encoder = load_dual_encoder(f"hf:{folder_of(kind)}")
    calls: list[str] = []
    for tower in (encoder.model.vision_model, encoder.model.text_model):
        tower.register_forward_pre_hook(lambda module, _: calls.append(type(module).__name__))
    assert len(encoder.blocks()) == 6
    assert calls == []
    encoder.encode_text(encoder.tokenizer.encode(CAPTIONS))
    assert len(calls) == 1


def test_a_temperature_is_not_sharded(encoder_of: Encoders) -> None:
    with pytest.raises(ValueError, match="take strategy ddp"):
        shard_encoder(encoder_of("AlignModel"), mesh=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["CLIPModel", "SiglipModel", "AlignModel"])
def test_the_factor_on_similarities_is_the_librarys_and_is_kept_in_bounds(kind: str, encoder_of: Encoders) -> None:
    encoder = encoder_of(kind)
    images, tokens = pairs(encoder)
    image, text = (
        nn.functional.normalize(x, dim=1) for x in (encoder.encode_image(images), encoder.encode_text(tokens))
    )
    assert encoder.logit_scale.shape == ()
    bias = getattr(encoder.model, "logit_bias", torch.zeros(1))
    mask = None if kind.startswith(("CLIP", "Siglip")) else (tokens != 1).long()
    output = encoder.model(input_ids=tokens, attention_mask=mask, pixel_values=images)
    # ALIGN's text tower takes its softmax in float32, whatever the weights.
    torch.testing.assert_close(
        encoder.logit_scale.exp() * image @ text.T + bias, output.logits_per_image, rtol=1e-6, atol=1e-8
    )
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    try:
        for scale, expected in ((7.0, np.log(50)), (-1.0, 0.0), (1.5, 1.5)):
            with torch.no_grad():
                if kind == "AlignModel":
                    encoder.model.temperature.fill_(np.exp(-scale))
                else:
                    encoder.model.logit_scale.fill_(scale)
            encoder.clamp_logit_scale(50.0)
            assert float(encoder.logit_scale.detach()) == pytest.approx(expected)
    finally:
        encoder.load_state_dict(before)


# ---- pixels

PROCESSORS: list[tuple[str, dict[str, Any]]] = [
    ("CLIPImageProcessor", {"size": {"shortest_edge": 32}, "crop_size": 32}),
    ("CLIPImageProcessor", {"size": {"shortest_edge": 37}, "crop_size": {"height": 24, "width": 32}, "resample": 2}),
    ("CLIPImageProcessor", {"size": {"shortest_edge": 32}, "crop_size": 32, "do_normalize": False}),
    ("SiglipImageProcessor", {"size": {"height": 24, "width": 32}, "image_mean": [0.1, 0.2, 0.3]}),
    ("ViTImageProcessor", {"size": {"height": 32, "width": 32}}),
    (
        "EfficientNetImageProcessor",
        {
            "size": {"height": 38, "width": 39}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True,
            "rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False, "include_top": False,
        },
    ),
    ("EfficientNetImageProcessor", {"size": {"height": 32, "width": 32}}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings"), PROCESSORS)
def test_pixels_are_the_processors_own(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    getattr(transformers, kind)(**settings).save_pretrained(tmp_path)
    processor, fast = (
        transformers.AutoImageProcessor.from_pretrained(tmp_path, **backend) for backend in (PIL, TORCHVISION)
    )
    transform = ProcessorTransform.of(processor.to_dict())
    # Odd and even differences, both orientations, larger and smaller.
    for size in ((64, 48), (47, 80), (33, 32), (90, 41), (20, 31), (32, 32)):
        image = photo(*size)
        own = transform(image)
        torch.testing.assert_close(own, processor(image, return_tensors="pt")["pixel_values"][0], rtol=1e-5, atol=1e-5)
        rounded = fast(image, return_tensors="pt")["pixel_values"][0]
        assert (own - rounded).abs().max() * torch.tensor(transform.std).max() < 4 / 255
        assert own.shape[1:] == transform.size


def test_boxes_go_where_their_pixels_go() -> None:
    for resize_to in (37, (40, 50)):
        transform = ProcessorTransform(size=(24, 32), mean=(0.0,) * 3, std=(1.0,) * 3, resize_to=resize_to)
        pixels = np.zeros((120, 200, 3), dtype=np.uint8)
        pixels[30:90, 60:130] = 255
        box = transform.boxes(torch.tensor([[60.0, 30.0, 70.0, 60.0]]), (200, 120))[0]
        lit = transform(Image.fromarray(pixels))[0] > 0.5
        rows, columns = lit.any(dim=1).nonzero()[:, 0], lit.any(dim=0).nonzero()[:, 0]
        seen = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
        torch.testing.assert_close(box, seen, rtol=0, atol=0.75)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resample": 0}, "only 2 .bilinear. and 3 .bicubic. are supported"),
        ({"do_resize": False}, "does not resize images to one size"),
        ({"size": {"longest_edge": 32}}, "does not resize images to one size"),
        ({"do_center_crop": False}, "crops nothing, so that images differ in size"),
        ({"size": {"shortest_edge": 16}}, "which are smaller: set its size to at least its crop_size"),
    ],
)
def test_processors_that_cannot_be_served_are_refused_in_words(
    change: dict[str, Any], message: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folder_of("CLIPModel"), tmp_path / "clip")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_dual_encoder(f"hf:{folder}")


def test_options_replace_what_the_processor_says(folder_of: Callable[[str], Path]) -> None:
    model = f"hf:{folder_of('CLIPModel')}"
    encoder = load_dual_encoder(
        model, image_mean=(0.1, 0.2, 0.3), image_std=(1.0, 2.0, 3.0), interpolation="bilinear", resize_mode="squash"
    )
    expected = ProcessorTransform(
        size=(32, 32), mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), interpolation="bilinear", resize_to=(32, 32)
    )
    assert encoder.image_transform == expected
    assert load_dual_encoder(model, resize_mode="shortest").image_transform == load_dual_encoder(model).image_transform
    with pytest.raises(ValueError, match="leave out quick_gelu"):
        load_dual_encoder(model, quick_gelu=True)


@pytest.mark.parametrize("kind", ["CLIPModel", "SiglipModel", "Siglip2Model", "AlignModel"])
@pytest.mark.parametrize("size", [48, (32, 64)])
@torch.no_grad()
def test_images_of_another_size_are_embedded_as_transformers_does(
    kind: str, size: int | tuple[int, int], folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = load_dual_encoder(f"hf:{folder_of(kind)}", image_size=size, fit="letterbox").eval()
        height, width = (size, size) if isinstance(size, int) else size
        assert encoder.image_shape == (3, height, width)
        images = torch.stack([encoder.image_transform(Image.new("RGB", shape, "red")) for shape in ((90, 40), (9, 50))])
        if kind in ("CLIPModel", "SiglipModel"):
            theirs = encoder.model.get_image_features(pixel_values=images, interpolate_pos_encoding=True).pooler_output
            torch.testing.assert_close(encoder.encode_image(images), theirs)
        maps = FeaturePairAttribution(encoder, steps=3).attribute(images, encoder.tokenizer.encode(["a", "b"]))
        if kind != "AlignModel":
            assert maps.image.shape[1:] == (height // 8, width // 8)


def test_an_image_size_that_cuts_patches_is_an_error(folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"whole number of patches of 8 pixels; got \[50, 50\], try \[48, 48\]"):
        load_dual_encoder(f"hf:{folder_of('CLIPModel')}", image_size=50)


# ---- folders, checkpoints and the command line


@every_model
@torch.no_grad()
def test_an_export_is_loaded_by_transformers_with_the_same_embeddings(
    kind: str, encoder_of: Encoders, tmp_path: Path
) -> None:
    encoder = encoder_of(kind)
    save_hugging_face(encoder, tmp_path / "out")
    again = load_dual_encoder(f"hf:{tmp_path / 'out'}").double().eval()
    images, tokens = pairs(encoder)
    assert_same(again.encode_image(images), encoder.encode_image(images))
    assert_same(again.encode_text(tokens), encoder.encode_text(tokens))
    assert again.image_transform == encoder.image_transform
    assert torch.equal(again.tokenizer.encode(CAPTIONS), tokens)
    reloaded = getattr(transformers, kind).from_pretrained(tmp_path / "out")
    own = encoder.model.state_dict()
    assert reloaded.state_dict().keys() == own.keys()
    assert all(torch.equal(value.double(), own[key].double()) for key, value in reloaded.state_dict().items())
    for place in ("out", "new.safetensors"):
        with pytest.raises(ValueError, match="has to be a new folder"):
            save_hugging_face(encoder, tmp_path / place)


def fit(model: str, shapes: Path, run: Path, *more: str) -> Path:
    arguments = [
        "fit", "--model=ContrastiveFineTuning", f"--model.model={model}", "--model.pretrained=null",
        "--data=ShardDataModule", f"--data.train={shapes / 'train'}", "--data.batch_size=16", "--data.num_workers=0",
        "--trainer.accelerator=cpu", "--trainer.max_steps=1", "--trainer.enable_progress_bar=false",
        "--trainer.logger=false", "--trainer.enable_model_summary=false", f"--run={run}", *more,
    ]  # fmt: skip
    main(arguments)
    (checkpoint,) = (run / "checkpoints").glob("*.ckpt")
    return checkpoint


@pytest.mark.filterwarnings("ignore")
def test_a_folder_is_explained_trained_and_exported_from_the_command_line(
    folder_of: Callable[[str], Path], shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(folder_of("SiglipModel"), tmp_path / "siglip")
    photo(40, 30).save(tmp_path / "photo.png")
    explain = ["--image", str(tmp_path / "photo.png"), "--caption", CAPTIONS[0], "--model.device=cpu"]
    main(["explain", "--model.name", f"hf:{folder}", *explain, "--out", str(tmp_path / "before")])
    assert "siglip (SiglipModel)" in (tmp_path / "before" / "explanation.json").read_text()
    checkpoint = fit(f"hf:{folder}", shapes, tmp_path / "run", "--model.chunk_size=8", "--model.final_lr=0.1")
    trained = load_dual_encoder(checkpoint).eval()
    before = load_dual_encoder(f"hf:{folder}").eval()
    images, tokens = pairs(before)
    assert (trained.encode_image(images) - before.encode_image(images)).abs().max() > 0
    assert torch.equal(trained.model.logit_bias, before.model.logit_bias), "the loss knows no bias"
    capsys.readouterr()
    main(["export", str(checkpoint), str(tmp_path / "out")])
    assert "SiglipModel.from_pretrained" in capsys.readouterr().out
    exported = load_dual_encoder(f"hf:{tmp_path / 'out'}").eval()
    assert torch.equal(exported.encode_image(images), trained.encode_image(images))
    # Without the folder: tokenizer's files next to the checkpoint, or elsewhere and named.
    moved = folder.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"needs the tokenizer.*copy the tokenizer's files next to the checkpoint"):
        load_dual_encoder(checkpoint)
    assert torch.equal(
        load_dual_encoder(f"hf:{moved}", checkpoint).eval().encode_text(tokens), trained.encode_text(tokens)
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(moved / name, checkpoint.parent)
    main(["explain", "--model.name", str(checkpoint), *explain, "--out", str(tmp_path / "after")])
    # Another vocabulary would be other words for the same numbers.
    words = json.loads((checkpoint.parent / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
    (checkpoint.parent / "tokenizer.json").write_text(json.dumps(words))
    for name, weights in ((str(checkpoint), None), (f"hf:{moved}", checkpoint)):
        with pytest.raises(ValueError, match="is another one than"):
            load_dual_encoder(name, weights)
        shutil.copy(checkpoint.parent / "tokenizer.json", moved)
    with pytest.raises(ValueError, match=r"holds another model than CLIPModel .*they differ in"):
        load_dual_encoder(f"hf:{folder_of('CLIPModel')}", checkpoint)


def test_folders_that_cannot_be_loaded_are_refused_in_words(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it lacks config.json, model.safetensors, preprocessor_config.json"):
        load_dual_encoder(f"hf:{tmp_path}")
    with pytest.raises(ValueError, match=r"named hf:FOLDER"):
        load_dual_encoder(folder_of("CLIPModel"))
    with pytest.raises(ValueError, match="brings its own weights: set pretrained to null"):
        load_dual_encoder(f"hf:{folder_of('CLIPModel')}", "openai")
    folder = shutil.copytree(folder_of("CLIPModel"), tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"model_type": "blip"}, "model of type 'blip', not 'clip' or 'siglip'"),
        ({"projection_dim": 7}, "do not fit its config.json"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load_dual_encoder(f"hf:{folder}")
    (folder / "config.json").write_text(json.dumps(config))
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"padding_side": "left"}))
    with pytest.raises(ValueError, match="pads on the left"):
        load_dual_encoder(f"hf:{folder}")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_dual_encoder(f"hf:{folder}")


def test_towers_without_a_pooled_output_are_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def config(vocabulary: int) -> Any:
        vision = transformers.ViTConfig(**WIDTHS, **PIXELS)
        text = transformers.DistilBertConfig(dim=32, n_heads=4, n_layers=3, vocab_size=vocabulary)
        return transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=24)

    kind = "VisionTextDualEncoderModel"
    monkeypatch.setitem(MODELS, kind, (config, *MODELS[kind][1:]))
    with pytest.raises(ValueError, match="both towers need a pooler_output"):
        load_dual_encoder(f"hf:{save_small(kind, tmp_path / 'hf')}")


def test_a_naflex_model_says_that_it_squashes(folder_of: Callable[[str], Path]) -> None:
    with pytest.warns(UserWarning, match="each is squashed to 32 x 32 pixels"):
        load_dual_encoder(f"hf:{folder_of('Siglip2Model')}")
