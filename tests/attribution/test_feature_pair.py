from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import encoder_from
from equation_10 import Side, block_input, replacing, sharing_padding
from inputs import CAPTIONS, random_pairs
from torch import Tensor, nn

from lightning_xai.attribution import FeaturePairAttribution, SimilarityGradCAM
from lightning_xai.models import DualEncoder

MakeEncoder = Callable[..., DualEncoder]


def literal(
    encoder: DualEncoder, image: Tensor, tokens: Tensor, blocks: tuple[nn.Module, nn.Module], steps: int
) -> Tensor:
    """Eq. 10 as it is written: both Jacobians in full, from the whole encoders with the block's input replaced."""
    reference_tokens = torch.zeros_like(tokens)
    reference_tokens[0], reference_tokens[2] = 49406, 49407
    model: Any = encoder.model
    image_side = one_side(blocks[0], model.encode_image, image, torch.zeros_like(image), steps)
    text_side = one_side(blocks[1], model.encode_text, tokens, reference_tokens, steps)
    return torch.einsum("ks,kp->sp", text_side, image_side)


def one_side(block: nn.Module, encode: Any, inputs: Tensor, reference: Tensor, steps: int) -> Tensor:
    """[K, tokens]: the integrated Jacobian of Eq. 9 of one input, times its difference from the reference."""
    width_axis = 1 if isinstance(block, nn.Sequential) else -1  # a ResNet's stages pass on feature maps
    return Side(block, encode, inputs[None], reference[None], width_axis).jacobian(steps)


@pytest.mark.parametrize(
    ("name", "image_layer", "text_layer"),
    [
        ("vit", -1, -1),
        ("vit", 0, 1),
        ("vit", 1, 0),
        ("resnet", -1, -1),
        ("resnet", 2, -1),
        ("vit_layer_scale_quick_gelu", -1, -1),
        ("vit_average_pool", -1, -1),
        ("vit_custom_block", -1, -1),
    ],
)
def test_agrees_with_equation_10_taken_literally(
    make_encoder: MakeEncoder, name: str, image_layer: int, text_layer: int
) -> None:
    encoder = make_encoder(name, torch.float64)
    images, tokens = random_pairs(encoder, CAPTIONS[:2])
    attribution = FeaturePairAttribution(encoder, image_layer, text_layer, steps=3)
    result = attribution.attribute(images, tokens)
    model: Any = encoder.model
    visual = model.visual
    image_block = (
        visual.transformer.resblocks[image_layer]
        if hasattr(visual, "transformer")
        else getattr(visual, f"layer{image_layer % 5}")
    )
    blocks = (image_block, model.transformer.resblocks[text_layer])
    for row in range(len(images)):
        expected = sharing_padding(literal(encoder, images[row], tokens[row], blocks, steps=3), tokens[row].argmax())
        prefix = expected.shape[1] - result.interactions[row].flatten(1).shape[1]
        torch.testing.assert_close(result.interactions[row].flatten(1), expected[:, prefix:], rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(result.prefix[row], expected[:, :prefix].sum(dim=1), rtol=1e-8, atol=1e-12)
        assert result.interactions[row].abs().max() > 1e-4


def image_block(encoder: DualEncoder, number: int = -1) -> nn.Module:
    visual: Any = encoder.model.visual
    block: nn.Module = visual.transformer.resblocks[number] if hasattr(visual, "transformer") else visual.layer4
    return block


@pytest.mark.parametrize("name", ["vit", "resnet", "vit_average_pool"])
def test_two_images_agree_with_equation_10_taken_literally_on_one_tower(make_encoder: MakeEncoder, name: str) -> None:
    encoder = make_encoder(name, torch.float64)
    images, _ = random_pairs(encoder)
    result = FeaturePairAttribution(encoder, steps=3).attribute_images(images[:2], images[1:])
    model: Any = encoder.model
    height, width = result.interactions.shape[1:3]
    assert result.interactions.shape == (2, height, width, height, width)
    for row in range(2):
        sides = [
            one_side(image_block(encoder), model.encode_image, image, torch.zeros_like(image), 3)[:, -height * width :]
            for image in (images[row], images[row + 1])
        ]
        expected = (sides[0].T @ sides[1]).reshape(height, width, height, width)
        torch.testing.assert_close(result.interactions[row], expected, rtol=1e-8, atol=1e-12)
        assert expected.abs().max() > 1e-5
    torch.testing.assert_close(result.first, result.interactions.sum(dim=(3, 4)))
    torch.testing.assert_close(result.second, result.interactions.sum(dim=(1, 2)))
    embeddings = model.encode_image(images, normalize=True)
    torch.testing.assert_close(result.similarity, (embeddings[:2] * embeddings[1:]).sum(dim=1))


def test_two_captions_agree_with_equation_10_taken_literally_on_one_tower(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit", torch.float64)
    tokens = encoder.tokenizer.encode([CAPTIONS[0], CAPTIONS[2]])
    others = encoder.tokenizer.encode([CAPTIONS[1], CAPTIONS[0]])
    result = FeaturePairAttribution(encoder, steps=3).attribute_texts(tokens, others)
    assert result.interactions.shape == (2, 16, 16)
    model: Any = encoder.model
    reference = torch.zeros_like(tokens[0])
    reference[0], reference[2] = 49406, 49407
    block = model.transformer.resblocks[-1]
    for row in range(2):
        sides = [one_side(block, model.encode_text, text[row], reference, 3) for text in (tokens, others)]
        torch.testing.assert_close(result.interactions[row], sides[0].T @ sides[1], rtol=1e-8, atol=1e-12)
        assert result.interactions[row].abs().max() > 1e-5
    torch.testing.assert_close(result.first, result.interactions.sum(dim=2))
    torch.testing.assert_close(result.second, result.interactions.sum(dim=1))
    embeddings = [model.encode_text(text, normalize=True) for text in (tokens, others)]
    torch.testing.assert_close(result.similarity, (embeddings[0] * embeddings[1]).sum(dim=1))


def test_attributions_within_a_modality_are_complete_symmetric_and_the_same_in_chunks(
    make_encoder: MakeEncoder,
) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder)
    order = torch.tensor([1, 2, 0])
    attribution = FeaturePairAttribution(encoder, steps=40, rule="gauss_legendre")
    for compare, batch, axes in (
        (attribution.attribute_images, images, (0, 3, 4, 1, 2)),
        (attribution.attribute_texts, tokens, (0, 2, 1)),
    ):
        result = compare(batch, batch[order])
        assert result.completeness_error.abs().max() < 1e-9
        torch.testing.assert_close(compare(batch[order], batch).interactions.permute(axes), result.interactions)
        torch.testing.assert_close(compare(batch[:1], batch[order][:1]).interactions, result.interactions[:1])
    chunked = FeaturePairAttribution(encoder, internal_batch_size=2)
    whole = FeaturePairAttribution(encoder)
    torch.testing.assert_close(
        chunked.attribute_images(images, images[order]).interactions,
        whole.attribute_images(images, images[order]).interactions,
    )
    torch.testing.assert_close(
        chunked.attribute_texts(tokens, tokens[order]).interactions,
        whole.attribute_texts(tokens, tokens[order]).interactions,
    )


def test_inputs_of_one_modality_that_do_not_pair_up_are_an_error(make_encoder: MakeEncoder) -> None:
    cases: list[tuple[int, int]] = [(2, 3), (3, 2)]
    for shapes in cases:
        encoder = make_encoder()
        attribution = FeaturePairAttribution(encoder)
        images, tokens = random_pairs(encoder)
        with pytest.raises(ValueError, match="two batches of images of one shape"):
            attribution.attribute_images(images[: shapes[0]], images[: shapes[1]])
        with pytest.raises(ValueError, match="two batches of captions of one shape"):
            attribution.attribute_texts(tokens[: shapes[0]], tokens[: shapes[1]])


@pytest.mark.parametrize("name", ["vit", "resnet", "vit_custom_block"])
def test_gradcam_for_similarity_is_gradient_times_input_on_both_sides(make_encoder: MakeEncoder, name: str) -> None:
    encoder = make_encoder(name, torch.float64)
    images, tokens = random_pairs(encoder)
    result = SimilarityGradCAM(encoder).attribute(images, tokens)
    model: Any = encoder.model
    for row in range(len(images)):
        sides = []
        for block, encode, batch in (
            (model.transformer.resblocks[-2], model.encode_text, tokens[row : row + 1]),
            (image_block(encoder, -2), model.encode_image, images[row : row + 1]),
        ):
            hidden = block_input(block, lambda: encode(batch))  # noqa: B023

            def embed(states: Tensor) -> Tensor:
                normalised: Tensor = replacing(block, states, lambda: encode(batch, normalize=False))[0]  # noqa: B023
                return normalised

            jacobian: Any = torch.autograd.functional.jacobian
            weighted = jacobian(embed, hidden)[:, 0] * hidden
            width = 1 if weighted.ndim == 4 else 2
            sides.append(weighted.sum(dim=width).flatten(1) / encode(batch).norm())
        expected = sides[0].T @ sides[1]
        patches = result.interactions[row].flatten(1)
        torch.testing.assert_close(patches, expected[:, -patches.shape[1] :], rtol=1e-8, atol=1e-12)
        assert patches.abs().max() > 1e-4


def test_gradcam_for_similarity_has_nothing_to_say_at_the_input_of_a_block_of_which_one_token_is_read(
    make_encoder: MakeEncoder,
) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder)
    last = SimilarityGradCAM(encoder, image_layer=-1).attribute(images, tokens).interactions
    default = SimilarityGradCAM(encoder).attribute(images, tokens).interactions
    # Not exactly nothing: layer norms add a small number to the variance.
    assert last.abs().max() < 1e-3 * default.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-16", "RN50"])
def test_agrees_with_the_authors_package_on_random_weights(tmp_path: Path, name: str) -> None:
    explanation: Any = pytest.importorskip("exclip.explanation", reason="exclip needs Python 3.11")
    import open_clip

    # The true architectures on small images and with a small embedding: exclip's memory grows with the square of what a
    # layer holds, and its time with the embedding.
    config = open_clip.get_model_config(name)
    config["vision_cfg"]["image_size"] = 64
    config["embed_dim"] = 16
    encoder = encoder_from(config, tmp_path, torch.float32)
    images, tokens = random_pairs(encoder, ["a red ring"])
    explainer = explanation.OpenClipExplainer(encoder.model, image_dim=64, device=torch.device("cpu"))
    if name == "RN50":
        # exclip hooks ResNets in its class for OpenAI's layout only; the hook itself fits both.
        hook = explanation.OpenAIExplainer.init_image_attribution
        explainer.init_image_attribution = lambda layer, N_interpolations: hook(explainer, layer, N_interpolations)
    layer = 4 if name == "RN50" else 11
    expected = explainer.explain(tokens, images, text_layer=11, image_layer=layer, N=10)
    explainer.reset_attribution()  # it leaves its hooks on the model
    result = FeaturePairAttribution(encoder).attribute(images, tokens).interactions[0]
    error = (result[: len(expected)] - expected).norm() / expected.norm()
    assert error < 1e-5
    assert not result[len(expected) :].any()


@pytest.mark.parametrize("name", ["vit", "resnet", "vit_average_pool"])
def test_a_span_map_is_the_sum_of_its_tokens_rows(make_encoder: MakeEncoder, name: str) -> None:
    encoder = make_encoder(name, torch.float64)
    images, tokens = random_pairs(encoder)
    attribution = FeaturePairAttribution(encoder)
    span = torch.zeros_like(tokens, dtype=torch.bool)
    span[0, 5:7], span[1, 2], span[2, 1:4] = True, True, True
    pairs = attribution.attribute(images, tokens).interactions
    expected = (pairs * span[:, :, None, None]).sum(dim=1)
    for method in (attribution, FeaturePairAttribution(encoder, internal_batch_size=2)):
        torch.testing.assert_close(method.span_map(images, tokens, span), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["vit", "resnet"])
@pytest.mark.parametrize("reference", ["zeros", "black"])
def test_attributions_sum_to_equation_2(make_encoder: MakeEncoder, name: str, reference: Any) -> None:
    encoder = make_encoder(name, torch.float64)
    images, tokens = random_pairs(encoder)
    attribution = FeaturePairAttribution(encoder, steps=40, rule="gauss_legendre", image_reference=reference)
    result = attribution.attribute(images, tokens)
    model: Any = encoder.model
    transform = encoder.image_transform
    black = (-torch.tensor(transform.mean) / torch.tensor(transform.std)).double()[:, None, None]
    reference_image = torch.zeros_like(images[:1]) + (black if reference == "black" else 0)
    with torch.no_grad():
        image = model.encode_image(images) - model.encode_image(reference_image)
        # The reference's hidden states read at the caption's own end: a causal model gives them for a shifted end.
        text_block = model.transformer.resblocks[-1]
        reference_tokens = torch.zeros_like(tokens[:1])
        reference_tokens[0, 0], reference_tokens[0, 2] = 49406, 49407
        hidden = block_input(text_block, lambda: model.encode_text(reference_tokens)).expand(len(tokens), -1, -1)
        text = model.encode_text(tokens) - replacing(text_block, hidden, lambda: model.encode_text(tokens))
        norms = model.encode_image(images).norm(dim=1) * model.encode_text(tokens).norm(dim=1)
        similarity = (model.encode_image(images, normalize=True) * model.encode_text(tokens, normalize=True)).sum(dim=1)
    expected = (image * text).sum(dim=1) / norms
    total = result.interactions.sum(dim=(1, 2, 3)) + result.prefix.sum(dim=1)
    # ReLUs leave kinks in a ResNet's path, on which quadrature converges slowly.
    tolerance = 1e-9 if name == "vit" else 2e-3
    torch.testing.assert_close(total, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(result.completeness_error, total - expected, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(result.similarity, similarity)


def test_the_completeness_error_falls_with_the_number_of_steps(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder)
    errors = [
        float(FeaturePairAttribution(encoder, steps=n).attribute(images, tokens).completeness_error.abs().max())
        for n in (5, 10, 20, 40)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] / errors[-1] == pytest.approx(8, rel=0.3)  # a Riemann sum converges as 1/N


@pytest.mark.parametrize("name", ["vit", "vit_layer_scale_quick_gelu"])
def test_the_shortcut_through_the_last_block_is_exact(make_encoder: MakeEncoder, name: str) -> None:
    encoder = make_encoder(name, torch.float64)
    images, tokens = random_pairs(encoder)
    short, general = FeaturePairAttribution(encoder), FeaturePairAttribution(encoder)
    towers: list[Any] = [short.image, short.text, general.image, general.text]
    assert all(tower._pooled is not None for tower in towers)
    for tower in towers[2:]:
        tower._pooled = None
    torch.testing.assert_close(
        short.attribute(images, tokens).interactions, general.attribute(images, tokens).interactions
    )


def test_a_tensor_can_be_the_reference(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder)
    text = encoder.tokenizer.encode(["a"])[0]
    text[1] = 0
    same = FeaturePairAttribution(encoder, image_reference=torch.zeros(3, 32, 32), text_reference=text)
    default = FeaturePairAttribution(encoder).attribute(images, tokens).interactions
    torch.testing.assert_close(same.attribute(images, tokens).interactions, default)
    other = (
        FeaturePairAttribution(encoder, image_reference=torch.ones(3, 32, 32)).attribute(images, tokens).interactions
    )
    assert (other - default).abs().max() > 1e-6
    # An input that is its own reference has nothing to attribute.
    own = FeaturePairAttribution(encoder, image_reference=images[0]).attribute(images[:1], tokens[:1]).interactions
    assert own.abs().max() < 1e-12


def test_an_encoder_in_training_mode_is_explained_as_in_evaluation(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("resnet")
    images, tokens = random_pairs(encoder)
    expected = FeaturePairAttribution(encoder).attribute(images, tokens).interactions
    encoder.train()
    torch.testing.assert_close(FeaturePairAttribution(encoder).attribute(images, tokens).interactions, expected)


def test_what_does_not_exist_is_an_error_at_once(make_encoder: MakeEncoder) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("vit", {"image_layer": 4}, "layers 0 to 2 .*and 3, the head where it pools tokens; got layer 4"),
        ("vit", {"image_layer": 3}, "at the head, layer 3, no patch has a part .*take image_layer=2"),
        ("vit", {"text_layer": -4}, "text tower has layers 0 to 2 .*got layer -4"),
        ("resnet", {"image_layer": 0}, "layers 1 to 4"),
        ("vit", {"steps": 0}, "steps=0"),
        ("vit", {"internal_batch_size": 0}, "at least 1"),
    ]
    for name, options, message in cases:
        with pytest.raises(ValueError, match=message):
            FeaturePairAttribution(make_encoder(name), **options)


def test_inputs_that_do_not_fit_are_errors_that_name_the_shapes(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder()
    images, tokens = random_pairs(encoder)
    attribution = FeaturePairAttribution(encoder)
    with pytest.raises(ValueError, match="one caption an image"):
        attribution.attribute(images, tokens[:2])
    with pytest.raises(ValueError, match="span_mask has to be of the tokens' shape"):
        attribution.span_map(images, tokens, torch.ones(3, 4, dtype=torch.bool))
    after_the_end = torch.zeros_like(tokens, dtype=torch.bool)
    after_the_end[:, -1] = True
    with pytest.raises(ValueError, match=r"rows \[0, 1, 2\] of span_mask select no token"):
        attribution.span_map(images, tokens, after_the_end)
    references: tuple[dict[str, Any], ...] = (
        {"image_reference": "grey"},
        {"image_reference": torch.zeros(3, 5, 5)},
        {"text_reference": "x"},
    )
    for reference in references:
        with pytest.raises(ValueError, match="_reference"):
            FeaturePairAttribution(encoder, **reference).attribute(images, tokens)


@pytest.mark.parametrize(
    ("name", "layers"), [("vit", (0, 0)), ("vit", (-1, -1)), ("vit", (1, 0)), ("resnet", (1, 0)), ("resnet", (-1, -1))]
)
def test_phrases_that_share_images_and_captions_have_the_maps_of_each_alone_in_any_order(
    make_encoder: MakeEncoder, name: str, layers: tuple[int, int]
) -> None:
    encoder = make_encoder(name, torch.float64)
    images, tokens = random_pairs(encoder)
    method = FeaturePairAttribution(encoder, *layers, steps=3, rule="midpoint")
    # Image 0 has four phrases, two of them of one caption, image 2 one, image 1 two of different captions.
    image, caption = torch.tensor([0, 2, 1, 0, 0, 1, 0]), torch.tensor([1, 2, 0, 0, 1, 2, 2])
    spans = torch.zeros(len(image), tokens.shape[1], dtype=torch.bool)
    spans[torch.arange(len(image)), torch.tensor([1, 2, 3, 2, 2, 1, 3])] = True
    alone = torch.cat(
        [
            method.span_map(images[i : i + 1], tokens[c : c + 1], spans[row : row + 1])
            for row, (i, c) in enumerate(zip(image.tolist(), caption.tolist(), strict=True))
        ]
    )
    states, references = method.hidden_states(images, tokens), method.references()
    for size in (None, 1, 3):
        method.internal_batch_size = size
        shared = method.span_maps_of(states, image, caption, spans, references)
        torch.testing.assert_close(shared, alone, rtol=1e-9, atol=1e-13)
        none = method.span_maps_of(states, image[:0], caption[:0], spans[:0], references)
        assert torch.equal(none, shared[:0])
    assert alone.abs().max() > 1e-4


def test_phrases_of_one_image_run_its_path_once_and_phrases_of_one_caption_the_captions(
    make_encoder: MakeEncoder,
) -> None:
    encoder = make_encoder()
    images, tokens = random_pairs(encoder)
    method = FeaturePairAttribution(encoder, 0, 0, steps=3, rule="midpoint")
    states, references = method.hidden_states(images, tokens), method.references()
    rows = {"image": 0, "text": 0}
    model: Any = encoder.model
    for side, tower in (("image", model.visual.transformer), ("text", model.transformer)):

        def count(_: object, inputs: tuple[Tensor, ...], side: str = side) -> None:
            rows[side] += len(inputs[0])

        tower.resblocks[0].register_forward_pre_hook(count)
    spans = torch.zeros(5, tokens.shape[1], dtype=torch.bool)
    spans[:, 1] = True
    which = torch.zeros(5, dtype=torch.int64)
    method.span_maps_of(states, which, which, spans, references)
    assert rows == {"image": 3 + 1, "text": 3 + 1}  # three points, and the embedding whose norm is divided by
