"""M2IB against Eqs. 4-15 taken literally, one pair and one noise sample at a time through the whole encoders."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT, encoder_from
from inputs import random_pairs
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from lightning_xai.attribution.m2ib import M2IB, capacity
from lightning_xai.models import DualEncoder, ImageBindImages, ImageBindSounds, UnsupportedTowerError

MakeEncoder = Callable[..., DualEncoder]
SMALL = {"steps": 4, "samples": 3}


@contextmanager
def output_replaced(block: nn.Module, output: Tensor) -> Any:
    handle = block.register_forward_hook(lambda *_: output)
    try:
        yield
    finally:
        handle.remove()


def block_output(block: nn.Module, run: Callable[[], Tensor]) -> Tensor:
    kept: list[Tensor] = []
    handle = block.register_forward_hook(lambda _, __, output: kept.append(output.detach()))
    with torch.no_grad():
        run()
    handle.remove()
    (output,) = kept
    return output


def literal(
    block: nn.Module,
    encode: Callable[[], Tensor],
    other: Tensor,
    *,
    beta: float = 0.1,
    variance: float = 1.0,
    steps: int = 10,
    samples: int = 10,
    lr: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Nats of each token of one input, [T], or [H * W]: `steps` forwards, an update of lambda after each of them.

    The tokens that count are those whose output of the block moves the embedding at all.
    """
    features = block_output(block, encode)

    def embed(hidden: Tensor) -> Tensor:
        with output_replaced(block, hidden):
            return encode()[0]

    def tokens_first(hidden: Tensor) -> Tensor:
        # Batches of one: [1, C, H, W], [1, T, D] or [T, 1, D].
        return hidden[0].flatten(1).T if hidden.ndim == 4 else hidden.flatten(0, 1)

    probe = features.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(embed(probe).sum(), probe)
    seen = tokens_first(gradient).abs().sum(dim=1) > 0
    sigma = math.sqrt(variance)
    lambda_ = torch.full_like(features, 5.0, requires_grad=True)
    optimizer = torch.optim.Adam([lambda_], lr=lr)
    generator = torch.Generator().manual_seed(seed)
    nats = torch.empty(0)
    for _ in range(steps):
        h = torch.sigmoid(lambda_)
        kl = kl_divergence(Normal(h * features, sigma * (1 - h)), Normal(0.0, 1.0))
        noise = torch.randn(samples, *tokens_first(features).shape, generator=generator).to(features)
        fit = torch.zeros_like(features[0].flatten()[0])
        for sample in range(samples):
            epsilon = (
                noise[sample].T.reshape(features.shape) if features.ndim == 4 else noise[sample].reshape(features.shape)
            )
            z = h * features + sigma * (1 - h) * epsilon
            fit = fit + torch.cosine_similarity(other, embed(z), dim=0) / samples
        objective = fit - beta * tokens_first(kl)[seen].mean()
        optimizer.zero_grad()
        torch.autograd.backward(-objective, inputs=[lambda_])
        optimizer.step()
        nats = (tokens_first(kl).sum(dim=1) * seen).detach()
    return nats


def towers(encoder: DualEncoder, image_block: int, text_block: int) -> tuple[nn.Module, nn.Module]:
    model: Any = encoder.model
    visual, text = model.visual, getattr(model, "text", model)
    stages = [getattr(visual, f"layer{stage}") for stage in range(1, 5)] if hasattr(visual, "layer1") else None
    blocks = stages or visual.transformer.resblocks
    return blocks[image_block], text.transformer.resblocks[text_block]


def expected(encoder: DualEncoder, row: int, blocks: tuple[nn.Module, nn.Module], **options: Any) -> Any:
    images, tokens = random_pairs(encoder)
    image, caption, model = images[row : row + 1], tokens[row : row + 1], encoder.model

    def embed_image() -> Tensor:
        embedding: Tensor = model.encode_image(image)
        return embedding

    def embed_text() -> Tensor:
        embedding: Tensor = model.encode_text(caption)
        return embedding

    with torch.no_grad():
        image_embedding, text_embedding = embed_image()[0], embed_text()[0]
    return (
        literal(blocks[0], embed_image, text_embedding, **options),
        literal(blocks[1], embed_text, image_embedding, **options),
    )


def assert_literal(encoder: DualEncoder, method: M2IB, blocks: tuple[nn.Module, nn.Module], **options: Any) -> None:
    images, tokens = random_pairs(encoder)
    result = method.attribute(images, tokens)
    for row in range(2):
        image, text = expected(encoder, row, blocks, **options)
        patches = result.image[row].flatten()
        torch.testing.assert_close(patches, image[-len(patches) :], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(result.text[row], text[: tokens.shape[1]], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "layers", "options"),
    [
        ("vit", {}, {}),
        ("vit", {"layer": (0, -3)}, {"beta": 0.02, "variance": 0.25, "lr": 0.5, "seed": 3}),
        ("resnet", {}, {"variance": 2.0}),
        ("vit", {"layer": 0}, {}),
        ("resnet", {"layer": (-1, 0)}, {"beta": 0.01}),
        ("vit_average_pool", {}, {}),
        ("vit_custom_block", {}, {"beta": 0.01}),
    ],
)
def test_agrees_with_equations_4_to_15_taken_literally(
    make_encoder: MakeEncoder, name: str, layers: dict[str, Any], options: dict[str, Any]
) -> None:
    encoder = make_encoder(name, torch.float64)
    depth = {"vit": 3, "resnet": 4}.get(name, 2)
    layer = layers.get("layer", (min(3 * depth // 4, depth - 2), 1))
    blocks = towers(encoder, *(layer if isinstance(layer, tuple) else (layer, layer)))
    assert_literal(encoder, M2IB(encoder, **SMALL, **layers, **options), blocks, **SMALL, **options)


def test_its_defaults_are_the_published_ones(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit", torch.float64)
    assert_literal(encoder, M2IB(encoder), towers(encoder, 1, 1))


def test_a_class_token_after_the_caption_passes_the_bottleneck_too(tmp_path: Path) -> None:
    config = {
        "embed_dim": 24,
        "custom_text": True,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 16},
        "text_cfg": TEXT | {"embed_cls": True},
    }
    encoder = encoder_from(config, tmp_path)
    assert_literal(encoder, M2IB(encoder, **SMALL), towers(encoder, 0, 1), **SMALL)


def test_the_bottleneck_is_three_quarters_up_and_before_the_last_block(tmp_path: Path) -> None:
    cases: list[tuple[int, int]] = [(12, 9), (24, 18), (32, 24), (4, 2), (3, 1), (2, 0)]
    for depth, block in cases:
        config = {
            "embed_dim": 8,
            "vision_cfg": {"image_size": 8, "layers": depth, "width": 8, "head_width": 8, "patch_size": 4},
            "text_cfg": TEXT | {"width": 8, "heads": 1, "layers": depth},
        }
        method = M2IB(encoder_from(config, tmp_path))
        assert (method.image.layer, method.text.layer) == (block + 1, block + 1)


def test_before_any_update_the_capacity_is_that_of_lambda_5(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder)
    result = M2IB(encoder, steps=1, variance=0.5).attribute(images, tokens)
    kept = 1 / (1 + math.exp(-5))
    sigma = math.sqrt(0.5) * (1 - kept)
    image_block, text_block = towers(encoder, 1, 1)
    for block, encode, batch, actual in (
        (image_block, encoder.model.encode_image, images, result.image.flatten(1)),
        (text_block, encoder.model.encode_text, tokens, result.text),
    ):
        features = block_output(block, lambda: encode(batch))  # noqa: B023
        nats = (kept * features).square() / 2 + (sigma**2 - 1) / 2 - math.log(sigma)
        known = nats.sum(dim=2)[:, -actual.shape[1] :]
        visible = actual > 0
        torch.testing.assert_close(actual[visible], known[visible])
    assert [int((row > 0).sum()) for row in result.text] == [8, 4, 12]


def test_capacity_is_the_divergence_of_two_normals_and_stays_exact_where_almost_all_or_nothing_passes() -> None:
    gates = torch.linspace(-12, 12, 25, dtype=torch.float64)
    features = torch.linspace(-3, 3, 25, dtype=torch.float64)
    kept = gates.sigmoid()
    normal = Normal(kept * features, math.sqrt(0.3) * (1 - kept))
    torch.testing.assert_close(capacity(features, gates, 0.3), kl_divergence(normal, Normal(0.0, 1.0)))
    # In float32 1 - h is 0 from lambda = 17 on, and the divergence of almost nothing drowns in the rounding of 1.
    assert capacity(torch.zeros(1), torch.tensor([50.0]), 1.0).item() == pytest.approx(49.5)
    # With f = 0 it is (u^2 / 4) for small u = 2 log(1 - h), and log(1 - h) = -e^lambda.
    assert capacity(torch.zeros(1), torch.tensor([-6.0]), 1.0).item() == pytest.approx(math.exp(-12), rel=1e-2)


def test_nothing_passes_where_passing_costs_much_and_more_where_it_costs_less(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder)
    closed = M2IB(encoder, beta=1e4, steps=40, samples=1).attribute(images, tokens)
    cheap, dear = (M2IB(encoder, beta=beta).attribute(images, tokens) for beta in (1e-3, 1.0))
    for part in ("image", "text"):
        assert getattr(closed, part).min() >= 0
        assert getattr(closed, part).max() < 1e-3
        assert getattr(dear, part).min() >= 0
        sums = [getattr(result, part).flatten(1).sum(dim=1) for result in (dear, cheap)]
        assert (sums[1] > 1.5 * sums[0]).all()


def test_noise_comes_from_the_seed_alone(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit")
    images, tokens = random_pairs(encoder)
    method = M2IB(encoder, **SMALL)
    first = method.attribute(images, tokens)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    again = method.attribute(images, tokens)
    assert torch.equal(torch.get_rng_state(), state)
    other = M2IB(encoder, **SMALL, seed=1).attribute(images, tokens)
    for part in ("image", "text"):
        assert torch.equal(getattr(first, part), getattr(again, part))
        assert not torch.allclose(getattr(first, part), getattr(other, part), rtol=1e-3)


def test_only_the_blocks_after_the_bottleneck_run_again(
    make_encoder: MakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = make_encoder("vit")
    images, tokens = random_pairs(encoder)
    own = encoder.own_similarity(images, tokens)
    monkeypatch.setattr(encoder, "own_similarity", lambda *_: own)  # whose pass is not counted here
    method = M2IB(encoder, **SMALL)
    runs: dict[str, int] = {}
    blocks = {"image": encoder.model.visual.transformer.resblocks, "text": encoder.model.transformer.resblocks}
    handles = [
        block.register_forward_hook(lambda *_, key=f"{tower} {number}": runs.update({key: runs.get(key, 0) + 1}))
        for tower, layers in blocks.items()
        for number, block in enumerate(layers)
    ]
    method._check_towers()  # hooks are new to it, and could change something
    runs.clear()
    method.attribute(images, tokens)
    for handle in handles:
        handle.remove()
    assert [runs[f"{tower} {number}"] for tower in blocks for number in (0, 1)] == [1, 1, 1, 1]


def test_options_that_make_no_sense_are_errors_in_words(make_encoder: MakeEncoder) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("vit", {"beta": 0}, "beta has to be a positive number; got 0"),
        ("vit", {"variance": -1.0}, "variance has to be a positive number"),
        ("vit", {"lr": math.nan}, "lr has to be a positive number; got nan"),
        ("vit", {"variance": math.inf}, "variance has to be a positive number"),
        ("vit", {"steps": 0}, "steps has to be at least 1; got 0"),
        ("vit", {"samples": 0}, "samples has to be at least 1; got 0"),
        ("vit", {"layer": (2, None)}, "layer .* 0 to 1 of the image tower's 0 to 2 .*got 2"),
        ("vit", {"layer": -1}, "layer .*got -1"),
        ("vit", {"layer": (None, -4)}, "layer .* 0 to 1 of the text tower's 0 to 2 .*got -4"),
        ("resnet", {"layer": 0}, "1 to 4 of the image tower's 1 to 4 .*got 0"),
        ("resnet", {"layer": (5, None)}, "got 5"),
    ]
    for name, options, message in cases:
        with pytest.raises(ValueError, match=message):
            M2IB(make_encoder(name), **options)


def test_a_tower_of_a_single_block_is_refused(tmp_path: Path) -> None:
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 16},
        "text_cfg": TEXT | {"layers": 1},
    }
    with pytest.raises(UnsupportedTowerError, match="after its bottleneck; the text tower has 1 only"):
        M2IB(encoder_from(config, tmp_path))


# ---- two images, or an image and a sound


def pair_of_maps(sides: list[tuple[nn.Module, Callable[[], Tensor]]], **options: Any) -> list[Tensor]:
    """Nats of each token of two inputs, each given as its tower's block and its encoding, against the other."""
    with torch.no_grad():
        embeddings = [encode()[0] for _, encode in sides]
    return [
        literal(block, encode, other, **options)
        for (block, encode), other in zip(sides, reversed(embeddings), strict=True)
    ]


def test_two_images_agree_with_the_equations_taken_literally(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, _ = random_pairs(encoder)
    result = M2IB(encoder, layer=0, **SMALL).attribute_images(images[:1], images[1:2])
    model, (block, _) = encoder.model, towers(encoder, 0, 0)
    first, second = pair_of_maps(
        [(block, lambda: model.encode_image(images[:1])), (block, lambda: model.encode_image(images[1:2]))], **SMALL
    )
    for mine, theirs in ((result.first, first), (result.second, second)):
        torch.testing.assert_close(mine[0], theirs[1:].reshape(mine.shape[1:]), rtol=1e-6, atol=1e-9)


def test_an_image_and_a_sound_agree_with_the_equations_taken_literally() -> None:
    from small_imagebind import small_imagebind

    bind = small_imagebind().double()
    images, sounds = ImageBindImages(bind).eval(), ImageBindSounds(bind).eval()
    generator = torch.Generator().manual_seed(2)
    seen, heard = (torch.randn(1, *each.image_shape, generator=generator).double() for each in (images, sounds))
    options: dict[str, Any] = {"beta": 0.3, "variance": 0.5, **SMALL}
    made = M2IB(images, layer=(0, None), **options), M2IB(sounds, layer=(1, None), **options)
    result = made[0].attribute_images(seen, heard, by=made[1])
    blocks = bind.modality_trunks["vision"].blocks[0], bind.modality_trunks["audio"].blocks[1]
    first, second = pair_of_maps(
        [(blocks[0], lambda: images.encode_image(seen)), (blocks[1], lambda: sounds.encode_image(heard))], **options
    )
    torch.testing.assert_close(result.first[0], first[1:].reshape(4, 4), rtol=1e-6, atol=1e-9)
    # The package's first row is the lowest frequency.
    torch.testing.assert_close(result.second[0], second[1:].reshape(3, 6).flip(0), rtol=1e-6, atol=1e-9)
