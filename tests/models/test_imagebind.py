"""ImageBind: images, sounds and texts. A small model with random weights, of the package's own class."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from equation_10 import Side, assert_same, block_input, equation_10
from small_imagebind import CAPTIONS, SIZES, package, small_imagebind
from torch import Tensor

from lightning_xai.attribution import M2IB, METHODS, FeaturePairAttribution, GradCAM
from lightning_xai.models import (
    ImageBindImages,
    ImageBindSounds,
    UnsupportedTowerError,
    load_dual_encoder,
    load_imagebind,
)

Encoder = ImageBindImages | ImageBindSounds
RATE = 16_000
KINDS = ("vision", "audio")
ATTENTION = (
    "attention_relevance",
    "grad_eclip",
    "legrad",
    "mask_clip",
    "clip_surgery",
    "rollout",
)  # methods that read it
GOLDEN = [(22, 100, 0.692186), (24, 150, 0.792931), (30, 197, -0.357465), (127, 30, -1.277565)]


@pytest.fixture(scope="module")
def encoders() -> dict[str, Encoder]:
    """In float64; the tests of this file share them, so they must not change them."""
    model = small_imagebind().double()
    return {"vision": ImageBindImages(model).eval(), "audio": ImageBindSounds(model).eval()}


def pictures(encoder: Encoder, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, *encoder.image_shape, generator=generator).double()


def as_the_package(encoder: Encoder, images: Tensor) -> Tensor:
    """Spectrograms with the lowest frequency first, images as they are."""
    return images.flip(2) if isinstance(encoder, ImageBindSounds) else images


def nothing(encoder: Encoder) -> Tensor:
    return encoder.neutral_image().double()[None]


# ---- the towers


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_embeddings_are_the_packages_own_before_it_normalises(kind: str, encoders: dict[str, Encoder]) -> None:
    encoder = encoders[kind]
    images, tokens = pictures(encoder), encoder.tokenizer.encode(CAPTIONS)
    own = encoder.model({kind: as_the_package(encoder, images), "text": tokens})
    image, text = encoder.encode_image(images), encoder.encode_text(tokens)
    assert image.shape == text.shape == (2, 12) == (2, encoder.embedding_width)
    factor = encoder.logit_scale.exp()
    torch.testing.assert_close(
        factor * torch.cosine_similarity(image, text), (own[kind] * own["text"]).sum(dim=1), rtol=1e-10, atol=1e-12
    )
    for embedding, theirs in ((image, own[kind]), (text, own["text"])):
        unit = embedding / embedding.norm(dim=1, keepdim=True)
        torch.testing.assert_close(unit, theirs / theirs.norm(dim=1, keepdim=True), rtol=1e-10, atol=1e-12)
    assert encoder.encode_text(tokens[:0]).shape == (0, 12)


def test_the_tokenizer_is_the_packages_own(encoders: dict[str, Encoder]) -> None:
    preprocessors = sys.modules["imagebind.models.multimodal_preprocessors"]
    folder = Path(str(preprocessors.__file__)).parents[1]
    own = preprocessors.SimpleTokenizer(bpe_path=str(folder / "bpe" / "bpe_simple_vocab_16e6.txt.gz"))
    captions = [*CAPTIONS, "  Two  RED rings, &amp; 3 blue ones\u2019 caf\u00e9. ", "a dog " * 50]
    ours = encoders["vision"].tokenizer
    with pytest.warns(UserWarning, match="a caption of 100 tokens is cut off"):
        assert torch.equal(ours.encode(captions), torch.stack([own(caption) for caption in captions]))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_towers_have_every_block_as_a_layer(kind: str, encoders: dict[str, Encoder]) -> None:
    encoder = encoders[kind]
    images, tokens = pictures(encoder), encoder.tokenizer.encode(CAPTIONS)
    blocks = encoder.model.modality_trunks[kind].blocks
    for layer in (0, 1, 2):
        tower = encoder.image_at_layer(layer)
        hidden = tower.features_before(images)
        assert tower.grid == {"vision": (4, 4), "audio": (3, 6)}[kind]
        assert hidden.shape[1] == 1 + tower.grid[0] * tower.grid[1]
        assert tower.block is blocks[layer]
        own = block_input(blocks[layer], lambda: encoder.encode_image(images))
        assert_same(tower.captured(own), hidden)
        assert_same(tower.embed_from(hidden), encoder.encode_image(images))
        text = encoder.text_at_layer(layer)
        read = text.features_before(tokens)
        assert read.shape[:2] == (2, 9), "what comes after the end of the longest caption is not run"
        assert_same(text.embed_from(read, tokens), encoder.encode_text(tokens))
        assert text.visible(tokens).sum(dim=1).tolist() == [6, 9]
    with pytest.raises(ValueError, match=r"layers 0 to 2 .*got layer 4"):
        encoder.image_at_layer(4)


@torch.no_grad()
def test_a_change_at_one_frequency_and_time_moves_the_patches_there(encoders: dict[str, Encoder]) -> None:
    encoder = encoders["audio"]
    # Patches of 40 x 40 begin every 30 bands from the lowest, which is the last row of the picture.
    for (low, start), places in {
        (5, 5): [(2, 0)],
        (65, 185): [(0, 5), (1, 5)],
        (110, 20): [],
        (95, 75): [(0, 2)],
    }.items():
        before = pictures(encoder, 1)
        after = before.clone()
        after[:, :, 127 - low, start] += 2
        tower = encoder.image_at_layer(0)
        moved = (tower.features_before(after) != tower.features_before(before)).any(dim=2)
        assert [tuple(place) for place in tower.on_grid(moved)[0].nonzero().tolist()] == places


# ---- attributions


@pytest.mark.parametrize("kind", KINDS)
def test_attributions_agree_with_equation_10_taken_literally(kind: str, encoders: dict[str, Encoder]) -> None:
    encoder = encoders[kind]
    images, tokens = pictures(encoder, 1), encoder.tokenizer.encode(CAPTIONS[:1])
    trunks, reference = encoder.model.modality_trunks, encoder.tokenizer.padding_caption()[None]
    head = encoder.model.modality_heads["text"]

    def read_text(given: Tensor) -> Tensor:
        # Of the package, read at the caption's own end.
        text = encoder.model.modality_preprocessors["text"](text=given)
        embedding: Tensor = head(trunks["text"](**text["trunk"]), seq_len=tokens.argmax(dim=1))
        return embedding

    for image_layer, text_layer in ((0, 2), (2, 0)):
        result = FeaturePairAttribution(encoder, image_layer, text_layer, steps=2).attribute(images, tokens)
        image_block = trunks[kind].blocks[image_layer]
        expected = equation_10(
            Side(trunks["text"].blocks[text_layer], read_text, tokens, reference, batch_axis=1),
            Side(image_block, encoder.encode_image, images, nothing(encoder), batch_axis=1),
            steps=2,
        )
        placed = expected[:, 1:].reshape(77, *result.image.shape[1:])
        placed = placed.flip(1) if kind == "audio" else placed
        torch.testing.assert_close(result.interactions[0], placed, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(result.prefix[0], expected[:, 0], rtol=1e-8, atol=1e-12)
        assert placed.abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_attributions_sum_to_the_change_of_similarity(kind: str, encoders: dict[str, Encoder]) -> None:
    encoder = encoders[kind]
    images, tokens = pictures(encoder), encoder.tokenizer.encode(CAPTIONS)
    options: dict[str, Any] = {"steps": 60, "rule": "gauss_legendre", "internal_batch_size": 1}
    result = FeaturePairAttribution(encoder, 0, 0, **options).attribute(images, tokens)
    text = encoder.text_at_layer(0)
    with torch.no_grad():
        seen = encoder.encode_image(images) - encoder.encode_image(nothing(encoder))
        padding = text.features_before(encoder.tokenizer.padding_caption()[None], 9).expand(2, -1, -1)
        read = encoder.encode_text(tokens) - text.embed_from(padding, tokens)
        norms = encoder.encode_image(images).norm(dim=1) * encoder.encode_text(tokens).norm(dim=1)
    total = result.interactions.sum(dim=(1, 2, 3)) + result.prefix.sum(dim=1)
    torch.testing.assert_close(total, (seen * read).sum(dim=1) / norms, rtol=1e-8, atol=1e-10)
    assert result.completeness_error.abs().max() < 1e-8


def test_an_image_and_a_sound_agree_with_equation_10_and_sum_to_the_change(encoders: dict[str, Encoder]) -> None:
    images, sounds = encoders["vision"], encoders["audio"]
    seen, heard = pictures(images), pictures(sounds)
    result = FeaturePairAttribution(images, 1, steps=2).attribute_images(
        seen, heard, by=FeaturePairAttribution(sounds, 2)
    )
    assert result.interactions.shape == (2, 4, 4, 3, 6)
    first, second = (
        Side(encoder.model.modality_trunks[kind].blocks[layer], encoder.encode_image, x[1:], nothing(encoder), -1, 1)
        for (kind, encoder), layer, x in zip(encoders.items(), (1, 2), (seen, heard), strict=True)
    )
    expected = equation_10(first, second, steps=2)[1:, 1:].reshape(4, 4, 3, 6).flip(2)
    torch.testing.assert_close(result.interactions[1], expected, rtol=1e-8, atol=1e-12)
    assert expected.abs().max() > 1e-4
    turned = FeaturePairAttribution(sounds, 2, steps=2).attribute_images(
        heard, seen, by=FeaturePairAttribution(images, 1)
    )
    torch.testing.assert_close(turned.interactions.permute(0, 3, 4, 1, 2), result.interactions)
    options: dict[str, Any] = {"steps": 40, "rule": "gauss_legendre"}
    exact = FeaturePairAttribution(images, 0, **options)
    error = exact.attribute_images(seen, heard, by=FeaturePairAttribution(sounds, 0)).completeness_error
    assert error.abs().max() < 1e-7
    with torch.no_grad():
        cosine = torch.cosine_similarity(images.encode_image(seen), sounds.encode_image(heard))
    torch.testing.assert_close(result.similarity, cosine)


def test_m2ib_explains_sounds_with_texts_and_sounds_with_images(encoders: dict[str, Encoder]) -> None:
    images, sounds = encoders["vision"], encoders["audio"]
    seen, heard = pictures(images), pictures(sounds)
    tokens = sounds.tokenizer.encode(CAPTIONS)
    with_text = M2IB(sounds).attribute(heard, tokens)
    assert with_text.image.shape == (2, 3, 6)
    assert with_text.text[0, :6].min() > 0
    assert not with_text.text[0, 6:].any()
    both = M2IB(images).attribute_images(seen, heard, by=M2IB(sounds))
    assert (both.first.shape, both.second.shape) == ((2, 4, 4), (2, 3, 6))
    for maps in (with_text.image, both.first, both.second):
        assert maps.min() >= 0
        assert maps.flatten(1).std(dim=1).min() > 0
    with torch.no_grad():
        cosine = torch.cosine_similarity(images.encode_image(seen), sounds.encode_image(heard))
    torch.testing.assert_close(both.similarity, cosine)
    turned = M2IB(sounds).attribute_images(heard, seen, by=M2IB(images))
    torch.testing.assert_close(turned.first, both.second)
    torch.testing.assert_close(turned.second, both.first)
    alone = M2IB(images, internal_batch_size=1).attribute_images(seen, heard, by=M2IB(sounds))
    torch.testing.assert_close(alone.first, both.first)
    # The map of a side depends on what it is compared with.
    other = M2IB(images).attribute_images(seen, heard.flip(0), by=M2IB(sounds))
    assert (other.first - both.first).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_explains_it_or_says_why_not(kind: str, encoders: dict[str, Encoder]) -> None:
    encoder = encoders[kind]
    images, tokens = pictures(encoder, 1), encoder.tokenizer.encode(CAPTIONS[1:])
    samples, masks = {"image_samples": 60, "text_samples": 60}, {"image_masks": 20, "text_masks": 20}
    few = {"kernel_shap": samples, "banzhaf_pairs": samples, "rise": masks}
    for name, method in METHODS.items():
        options: dict[str, Any] = few.get(name, {})
        if kind == "audio" and name in ATTENTION:
            with pytest.raises(UnsupportedTowerError, match="attends to learned keys that are no tokens"):
                method(encoder).attribute(images, tokens)
            continue
        result = method(encoder, **options).attribute(images, tokens)
        assert result.image.shape == (1, *encoder.image_at_layer().grid)


def test_grad_cam_lies_on_the_spectrogram(encoders: dict[str, Encoder]) -> None:
    encoder = encoders["audio"]
    images, tokens = pictures(encoder), encoder.tokenizer.encode(CAPTIONS)
    tower = encoder.image_at_layer(1)
    hidden = tower.features_before(images).detach().requires_grad_()
    score = torch.cosine_similarity(tower.embed_from(hidden), encoder.encode_text(tokens)).sum()
    (gradient,) = torch.autograd.grad(score, hidden)
    expected = (hidden * gradient[:, 1:].mean(dim=1, keepdim=True)).sum(dim=2)[:, 1:].relu().detach()
    result = GradCAM(encoder, image_layer=1).attribute(images, tokens)
    torch.testing.assert_close(result.image, expected.reshape(2, 3, 6).flip(1))


def test_the_model_is_as_it_was(encoders: dict[str, Encoder]) -> None:
    model = small_imagebind()
    images, sounds = ImageBindImages(model), ImageBindSounds(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images.train()
    seen, heard = pictures(images).float(), pictures(sounds).float()
    FeaturePairAttribution(images).attribute_images(seen, heard, by=FeaturePairAttribution(sounds))
    M2IB(images).attribute_images(seen, heard, by=M2IB(sounds))
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_what_cannot_be_compared_is_refused(encoders: dict[str, Encoder]) -> None:
    images, sounds = encoders["vision"], encoders["audio"]
    seen, heard = pictures(images), pictures(sounds)
    methods: list[Any] = [FeaturePairAttribution, M2IB]
    for method in methods:
        with pytest.raises(
            ValueError, match=r"two batches of images of one shape; got \[2, 3, 224, 224\] and \[2, 1, "
        ):
            method(images).attribute_images(seen, heard)
        with pytest.raises(ValueError, match=r"the model takes images \[1, 128, 204\]"):
            method(images).attribute_images(seen, seen, by=method(sounds))


# ---- sounds and images


def test_a_spectrogram_is_the_packages(encoders: dict[str, Encoder]) -> None:
    sounds = encoders["audio"]
    assert isinstance(sounds, ImageBindSounds)
    wave = np.sin(2 * np.pi * 440 * np.arange(2 * RATE) / RATE) * np.linspace(0, 0.5, 2 * RATE)
    spectrogram = sounds.spectrogram(wave, RATE)
    assert spectrogram.shape == sounds.image_shape == (1, 128, 204)
    # The package's own numbers: torchaudio 2.11's kaldi.fbank of this wave, shifted and scaled.
    upright = spectrogram[0].flip(0)
    for band, frame, expected in GOLDEN:
        assert float(upright[band, frame]) == pytest.approx(expected, abs=1e-4)
    assert (upright[:, 198:] - 4.268 / 9.138).abs().max() < 1e-6, "two seconds are 198 frames"
    picture = sounds.pictures(spectrogram[None])[0]
    assert picture.amax() == 1
    assert not picture[:, :, 198:].any()
    assert not sounds.pictures(sounds.black_image()[None]).any()
    assert int(picture[0].sum(dim=1).argmax()) in range(100, 110), "440 Hz is low in the picture"


def test_longer_sounds_are_cut_and_other_rates_refused(encoders: dict[str, Encoder]) -> None:
    sounds = encoders["audio"]
    assert isinstance(sounds, ImageBindSounds)
    noise = np.random.default_rng(0).normal(size=3 * RATE) * 0.1
    assert torch.equal(sounds.spectrogram(noise, RATE), sounds.spectrogram(noise[: 2 * RATE], RATE))
    with pytest.raises(ValueError, match="listens to 16000 samples per second, got 44100"):
        sounds.spectrogram(noise, 44_100)
    with pytest.raises(ValueError, match="a sound has to have 400 samples for one frame; got 399"):
        sounds.spectrogram(noise[:399], RATE)


def test_files_are_read_by_the_encoder_of_their_kind(encoders: dict[str, Encoder], tmp_path: Path) -> None:
    soundfile: Any = pytest.importorskip("soundfile", reason="needs the extra [audio]")
    images, sounds = encoders["vision"], encoders["audio"]
    assert images.reading(tmp_path / "dog.jpg") is images
    assert sounds.reading(tmp_path / "bark.WAV") is sounds
    other = images.reading(tmp_path / "bark.flac")
    assert isinstance(other, ImageBindSounds)
    assert other.model is images.model
    assert not other.training
    for seconds, frames, share in ((1, 204, 1.0), (5, 510, 0.4)):
        soundfile.write(tmp_path / "bark.flac", np.zeros(seconds * RATE), RATE)
        spectrogram, size = other.read(tmp_path / "bark.flac")
        assert (spectrogram.shape, size) == ((1, 128, 204), (frames, 128))
        assert other.seen(size) == pytest.approx(share)
    boxes = torch.tensor([[190.0, 100.0, 100.0, 50.0], [300.0, 0.0, 10.0, 10.0]])
    assert other.boxes(boxes, (510, 128)).tolist() == [[190, 100, 204, 128], [204, 0, 204, 10]]


# ---- loading


def test_weights_are_read_as_tensors_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_imagebind()
    torch.save(model.state_dict(), tmp_path / "small.pth")
    monkeypatch.setattr(package, "imagebind_huge", lambda pretrained: package.ImageBindModel(**SIZES))
    images, sounds = load_imagebind(tmp_path / "small.pth")
    assert images.model is sounds.model
    for key, value in model.state_dict().items():
        assert torch.equal(images.model.state_dict()[key], value)
    torch.save({**model.state_dict(), "more": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth holds no weights of imagebind_huge"):
        load_imagebind(tmp_path / "other.pth")
    with pytest.raises(ValueError, match="explained, but not trained"):
        load_dual_encoder("imagebind:small.pth")
    with pytest.raises(TypeError, match="expected an ImageBindModel of the package imagebind; got a Linear"):
        ImageBindImages(torch.nn.Linear(1, 1))


def test_without_the_package_the_error_names_extra_and_licence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "imagebind.models.imagebind_model")
    monkeypatch.setitem(sys.modules, "einops", None)
    monkeypatch.delitem(sys.modules, "imagebind.models.helpers")
    with pytest.raises(ImportError, match=r"CC BY-NC-SA 4\.0\): pip install 'lightning_xai\[imagebind\]' \(.*einops"):
        load_imagebind("imagebind_huge.pth")
    assert "imagebind" not in sys.modules, "a later import has to find all of the package"
