"""CLAP: sounds in the place of images. Small models with random weights, on transformers' own classes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from equation_10 import Side, assert_same, block_input, equation_10
from small_clap import AUDIO, BANDS, CAPTIONS, FRAMES, RATE, STRIPS, TEXT, save_clap, tone
from torch import Tensor

from lightning_xai.attribution import M2IB, RISE, FeaturePairAttribution
from lightning_xai.models import ClapEncoder, UnsupportedTowerError, load_clap, read_sound
from lightning_xai.models.clap import ClapAudioAtLayer

transformers = pytest.importorskip("transformers", reason="needs the extra [audio]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clap(tmp_path_factory.mktemp("clap"))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> ClapEncoder:
    """In float64; the tests of this file share it, so they must not change it."""
    return load_clap(folder, context_length=12).double().eval()


def sounds(encoder: ClapEncoder, count: int = 2) -> Tensor:
    """Noise that is louder at one place than at others: [count, C, F, T] in decibels."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, *encoder.image_shape, generator=generator).double() * 15 - 45


def features(encoder: ClapEncoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """CLAP's own embedding of sounds before it normalises, and what it returns: both [B, K]."""
    kept: list[Tensor] = []
    handle = encoder.model.audio_projection.register_forward_hook(lambda _, __, output: kept.append(output))
    upright = torch.flip(images, dims=(2,)).transpose(2, 3)  # [B, C, T, F], as transformers has it
    output = encoder.model.get_audio_features(upright, is_longer=torch.zeros(len(images), 1, dtype=torch.bool))
    handle.remove()
    (embedding,) = kept
    return embedding, getattr(output, "pooler_output", output)


# ---- the towers


@torch.no_grad()
def test_embeddings_are_claps_own_before_it_normalises(encoder: ClapEncoder) -> None:
    images, tokens = sounds(encoder), encoder.tokenizer.encode(CAPTIONS)
    own, normalised = features(encoder, images)
    assert_same(encoder.encode_image(images), own)
    assert_same(encoder.encode_image(images) / encoder.encode_image(images).norm(dim=1, keepdim=True), normalised)
    output = encoder.model.get_text_features(tokens, attention_mask=(tokens != 1).long())
    text = encoder.encode_text(tokens)
    assert_same(text / text.norm(dim=1, keepdim=True), getattr(output, "pooler_output", output))
    assert text.shape == (2, encoder.embedding_width)
    assert encoder.encode_text(tokens[:0]).shape == (0, 6)
    assert encoder.logit_scale is encoder.model.logit_scale_a


@pytest.mark.parametrize("layer", [0, 1, 2])
@torch.no_grad()
def test_the_audio_tower_has_its_stages_and_its_head_as_layers(layer: int, encoder: ClapEncoder) -> None:
    images, stages = sounds(encoder), encoder.model.audio_model.audio_encoder.layers
    tower = encoder.image_at_layer(layer)
    hidden = tower.features_before(images)
    assert hidden.shape[2:] == tower.grid == [(4, 16), (2, 8), (2, 8)][layer]
    assert tower.layer == layer
    assert tower.layers == range(2)
    assert tower.is_feature_map
    assert_same(tower.embed_from(hidden), features(encoder, images)[0])
    if layer == 2:
        assert tower.block is None
    else:
        assert tower.block is stages[layer]
        assert_same(tower.captured(block_input(stages[layer], lambda: encoder.encode_image(images))), hidden)


@pytest.mark.parametrize("layer", [0, 1])
@torch.no_grad()
def test_the_text_tower_at_its_layers(layer: int, encoder: ClapEncoder) -> None:
    tokens, blocks = encoder.tokenizer.encode(CAPTIONS), encoder.model.text_model.encoder.layer
    tower = encoder.text_at_layer(layer)
    hidden = tower.features_before(tokens)
    assert hidden.shape[:2] == (2, 9), "padding of the whole batch is cut off"
    own = block_input(blocks[layer], lambda: encoder.encode_text(tokens))
    seen = (tokens != 1)[:, :9]
    assert_same(hidden[seen], own[:, :9][seen])
    assert_same(tower.embed_from(hidden, tokens), encoder.encode_text(tokens))
    assert tower.visible(tokens).sum(dim=1).tolist() == [5, 9]


def test_layers_that_do_not_exist_are_named(encoder: ClapEncoder) -> None:
    assert encoder.image_at_layer(-1).layer == encoder.text_at_layer(-1).layer == 1
    with pytest.raises(ValueError, match=r"layers 0 to 1 .*, and 2, the head where it pools tokens; got layer 3"):
        encoder.image_at_layer(3)
    with pytest.raises(ValueError, match=r"text tower has layers 0 to 1 .*got layer 2"):
        encoder.text_at_layer(2)


def on_spectrogram(values: Tensor, side: int) -> Tensor:
    """Values of the folded square's tokens [side * side] where they belong: the fold of HTS-AT, token by token."""
    rows = side // STRIPS
    placed = torch.full((rows, side * STRIPS), float("nan"), dtype=values.dtype)
    for index, value in enumerate(values):
        strip, band = divmod(index // side, rows)
        placed[rows - 1 - band, strip * side + index % side] = value
    return placed


@pytest.mark.parametrize("layer", [0, 1])
@torch.no_grad()
def test_hidden_states_lie_where_the_fold_took_them_from(layer: int, encoder: ClapEncoder) -> None:
    images = sounds(encoder, 1)
    tower = encoder.image_at_layer(layer)
    stage = encoder.model.audio_model.audio_encoder.layers[layer]
    own = block_input(stage, lambda: encoder.encode_image(images))[0]
    for channel in (0, 5):
        expected = on_spectrogram(own[:, channel], 8 // 2**layer)
        assert_same(tower.features_before(images)[0, channel], expected)


@torch.no_grad()
def test_a_change_at_one_frequency_and_time_moves_the_token_there(encoder: ClapEncoder) -> None:
    cases: list[tuple[int, int]] = [(0, 0), (0, 15), (3, 0), (1, 7), (2, 8), (3, 15)]
    for row, column in cases:
        # 64 frames are not interpolated, so that patches of 4 x 4 are exact.
        before = torch.randn(1, 1, BANDS, 64, generator=torch.Generator().manual_seed(4)).double() * 15 - 45
        after = before.clone()
        after[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 20
        tower = encoder.image_at_layer(0)
        moved = (tower.features_before(after) != tower.features_before(before)).any(dim=1)[0]
        assert moved.nonzero().tolist() == [[row, column]]
        assert tower.on_grid(moved.flatten()).nonzero().tolist() == [[row, column]]


# ---- attributions


@pytest.mark.parametrize(("image_layer", "text_layer"), [(0, 1), (1, 0)])
def test_attributions_agree_with_equation_10_taken_literally(
    image_layer: int, text_layer: int, encoder: ClapEncoder
) -> None:
    images, tokens = sounds(encoder, 1), encoder.tokenizer.encode(CAPTIONS[:1])
    silence = encoder.black_image().double()[None]
    method = FeaturePairAttribution(encoder, image_layer, text_layer, steps=2, image_reference="black")
    result = method.attribute(images, tokens)
    reference = torch.tensor([[0, 1, 2] + [1] * 9])
    model = encoder.model
    expected = equation_10(
        Side(model.text_model.encoder.layer[text_layer], encoder.encode_text, tokens, reference),
        Side(model.audio_model.audio_encoder.layers[image_layer], encoder.encode_image, images, silence),
        steps=2,
    )
    for token, row in enumerate(expected):
        placed = on_spectrogram(row, 8 // 2**image_layer)
        # The text tower takes its softmax in float32, whatever the weights.
        torch.testing.assert_close(result.interactions[0, token], placed, rtol=1e-5, atol=1e-8)
    assert result.interactions.abs().max() > 1e-4


def test_attributions_sum_to_the_change_of_similarity(encoder: ClapEncoder) -> None:
    images, tokens = sounds(encoder), encoder.tokenizer.encode(CAPTIONS)
    for layer in (0, 1, 2):
        method = FeaturePairAttribution(
            encoder, layer, 0, steps=60, rule="gauss_legendre", image_reference="black", internal_batch_size=1
        )
        result = method.attribute(images, tokens)
        with torch.no_grad():
            norms = encoder.encode_image(images).norm(dim=1) * encoder.encode_text(tokens).norm(dim=1)
            heard = encoder.encode_image(images) - encoder.encode_image(encoder.black_image().double()[None])
            text = encoder.text_at_layer(0)
            nothing = text.features_before(encoder.tokenizer.padding_caption()[None], 12)[:, :9].expand(2, -1, -1)
            read = encoder.encode_text(tokens) - text.embed_from(nothing, tokens)
        expected = (heard * read).sum(dim=1) / norms
        torch.testing.assert_close(result.interactions.sum(dim=(1, 2, 3)), expected, rtol=1e-5, atol=1e-8)
        assert result.completeness_error.abs().max() < 1e-6


def test_a_sound_in_silence_is_attributed_where_it_sounds(encoder: ClapEncoder) -> None:
    images, tokens = encoder.black_image()[None].double(), encoder.tokenizer.encode(CAPTIONS[:1])
    images[:, :, 4:8, 40:44] += 60  # the second row of tokens; frames are interpolated, from 63 to 64
    method = FeaturePairAttribution(encoder, 0, image_reference="black")
    image = method.attribute(images, tokens).image[0]
    assert image.nonzero()[:, 0].tolist() == [1] * int(image.count_nonzero())
    assert int(image.abs().argmax()) % 16 in (10, 11)
    assert not image[:, :9].any()
    assert not image[:, 13:].any()


def test_m2ib_finds_capacity_on_the_spectrogram_and_the_words(encoder: ClapEncoder) -> None:
    images, tokens = sounds(encoder), encoder.tokenizer.encode(CAPTIONS)
    for layer, grid in ((0, (2, 8)), (1, (2, 8))):
        result = M2IB(encoder, layer=(layer, 0)).attribute(images, tokens)
        assert result.image.shape == (2, *grid)
        assert result.image.min() >= 0
        assert result.image.isfinite().all()
        assert result.image.flatten(1).std(dim=1).min() > 0
        assert result.text[0, :5].min() > 0
        assert not result.text[0, 5:].any()
    alone = M2IB(encoder, layer=(1, 0)).attribute(images[1:], tokens[1:])
    torch.testing.assert_close(alone.image[0], result.image[1])


def test_masks_of_perturbing_methods_lie_on_the_spectrogram(encoder: ClapEncoder) -> None:
    images, tokens = sounds(encoder), encoder.tokenizer.encode(CAPTIONS)
    result = RISE(encoder, image_masks=20, text_masks=20).attribute(images, tokens)
    assert result.image.isfinite().all()
    assert result.text.shape == tokens.shape


def test_the_model_is_as_it_was(folder: Path) -> None:
    encoder = load_clap(folder, context_length=12).train()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    FeaturePairAttribution(encoder).attribute(sounds(encoder).float(), encoder.tokenizer.encode(CAPTIONS))
    assert all(module.training for module in encoder.modules())
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in encoder.modules())
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, before[key])


# ---- spectrograms


def test_a_spectrogram_shows_low_tones_at_the_bottom_and_late_ones_at_the_right(encoder: ClapEncoder) -> None:
    for hertz, start, low, early in ((60, 0.0, True, True), (60, 0.6, True, False), (420, 0.0, False, True)):
        spectrogram = encoder.spectrogram(tone(hertz, start, start + 0.4), RATE)
        assert spectrogram.shape == encoder.image_shape == (1, BANDS, FRAMES)
        row, column = divmod(int(spectrogram[0].argmax()), FRAMES)
        assert (row >= BANDS // 2) is low
        assert (column < FRAMES // 2) is early


def test_a_spectrogram_is_the_feature_extractors(encoder: ClapEncoder, folder: Path) -> None:
    extractor = transformers.ClapFeatureExtractor.from_pretrained(folder)
    expected = extractor(tone(200), sampling_rate=RATE, return_tensors="np")["input_features"][0, 0]
    spectrogram = encoder.spectrogram(tone(200), RATE)[0]
    np.testing.assert_allclose(spectrogram.numpy(), expected.T[::-1], rtol=1e-6)
    assert torch.equal(encoder.spectrogram(torch.from_numpy(tone(200)), RATE)[0], spectrogram)


@pytest.mark.parametrize("fused", [False, True])
def test_spectrograms_are_the_same_each_time_and_leave_random_numbers_alone(fused: bool, tmp_path: Path) -> None:
    encoder = load_clap(save_clap(tmp_path, fused=fused), context_length=12)
    long = np.concatenate([tone(200), tone(300), tone(100)])
    np.random.seed(1)
    first = encoder.spectrogram(long, RATE)
    drawn = np.random.rand()
    np.random.seed(2)
    assert torch.equal(encoder.spectrogram(long, RATE), first)
    assert torch.equal(encoder.spectrogram(tone(200), RATE), first), "a long sound is cut to the model's clip"
    np.random.seed(1)
    assert np.random.rand() == drawn
    assert first.shape == encoder.image_shape


def test_short_sounds_are_filled_up(encoder: ClapEncoder) -> None:
    short = encoder.spectrogram(tone(200)[:300], RATE)
    assert short.shape == encoder.image_shape
    assert torch.allclose(short[0, :, 2:15], short[0, :, 2 + 300 // 16 + 1 : 15 + 300 // 16 + 1], atol=20)


@torch.no_grad()
def test_a_model_with_fusion_takes_four_channels_and_has_the_same_layers(tmp_path: Path) -> None:
    encoder = load_clap(save_clap(tmp_path, fused=True), context_length=12).double().eval()
    images = encoder.spectrogram(tone(200), RATE)[None].double()
    assert images.shape == (1, 4, BANDS, FRAMES)
    own, _ = features(encoder, images)
    assert_same(encoder.encode_image(images), own)
    for layer in (0, 1, 2):
        tower = encoder.image_at_layer(layer)
        assert_same(tower.embed_from(tower.features_before(images)), own)
    assert encoder.pictures(images).shape == (1, 3, BANDS, FRAMES)


def test_silence_is_black_and_the_loudest_place_white(encoder: ClapEncoder) -> None:
    silence = encoder.black_image()
    assert silence.shape == encoder.image_shape
    assert torch.equal(silence, torch.full_like(silence, -100))
    pictures = encoder.pictures(torch.stack([silence, encoder.spectrogram(tone(200), RATE)]))
    assert pictures.shape == (2, 3, BANDS, FRAMES)
    assert not pictures[0].any()
    assert pictures[1].amax() == 1
    assert pictures[1].amin() >= 0
    levels = encoder.pictures(torch.tensor([[[[10.0, -30.0, -70.0, -90.0]]]]))
    torch.testing.assert_close(levels[0, :, 0], torch.tensor([[1.0, 0.5, 0.0, 0.0]]).expand(3, -1))


@pytest.mark.parametrize(
    ("waveform", "rate", "message"),
    [
        (np.zeros((2, 100)), RATE, r"samples of one channel, at least one; got shape \[2, 100\]"),
        (np.zeros(0), RATE, r"got shape \[0\]"),
        (np.array([0.0, np.nan]), RATE, "NaN or infinity"),
        (np.zeros(100), 44100, "listens to 1000 samples per second, got 44100; resample"),
    ],
)
def test_what_is_no_sound_is_refused(waveform: np.ndarray, rate: int, message: str, encoder: ClapEncoder) -> None:
    with pytest.raises(ValueError, match=message):
        encoder.spectrogram(waveform, rate)


def test_sound_files_are_read_mixed_and_resampled(tmp_path: Path) -> None:
    soundfile: Any = pytest.importorskip("soundfile", reason="needs the extra [audio]")
    stereo = np.stack([tone(50), np.zeros(RATE)], axis=1)
    soundfile.write(tmp_path / "sound.wav", stereo, RATE, subtype="DOUBLE")
    np.testing.assert_allclose(read_sound(tmp_path / "sound.wav", RATE), tone(50) / 2, atol=1e-12)
    doubled = read_sound(tmp_path / "sound.wav", 2 * RATE)
    assert len(doubled) == 2 * RATE
    np.testing.assert_allclose(doubled[200:-200:2], tone(50)[100:-100] / 2, atol=1e-2)
    (tmp_path / "broken.wav").write_bytes(b"RIFF no sound")
    soundfile.write(tmp_path / "empty.wav", stereo[:0], RATE)
    for name, message in (("broken", "cannot be read as a sound"), ("no", "cannot be read"), ("empty", "no samples")):
        with pytest.raises(ValueError, match=rf"{name}\.wav .*{message}"):
            read_sound(tmp_path / f"{name}.wav", RATE)


# ---- loading


def test_a_folder_that_is_no_clap_is_named_with_what_it_lacks(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks config\.json, model\.safetensors, preprocessor_config\.json"):
        load_clap(tmp_path)
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    # A pickle could run code.
    torch.save(load_clap(folder, context_length=12).model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"lacks model\.safetensors;"):
        load_clap(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ValueError, match="model of type 'clip', not 'clap'"):
        load_clap(tmp_path)


@pytest.mark.parametrize(
    ("module", "call"),
    [("transformers", load_clap), ("soundfile", lambda folder: read_sound(folder / "a.wav", RATE))],
)
def test_without_the_extra_the_error_says_what_to_install(
    module: str, call: Callable[[Path], object], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'lightning_xai\[audio\]'"):
        call(folder)


def test_weights_that_are_not_finite_are_refused(encoder: ClapEncoder, folder: Path) -> None:
    model = transformers.ClapModel.from_pretrained(folder)
    with torch.no_grad():
        model.audio_projection.linear2.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="image tower's output is not finite"):
        ClapEncoder(model, encoder.tokenizer, encoder._extractor)


def test_a_tower_that_is_not_the_encoders_own_is_refused(encoder: ClapEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    embed = ClapAudioAtLayer.embed_from
    monkeypatch.setattr(ClapAudioAtLayer, "embed_from", lambda *args: embed(*args) * 1.01)
    with pytest.raises(ValueError, match=r"embed_from\(features_before\(x\)\) of the image tower .* transformers \d"):
        ClapEncoder(encoder.model, encoder.tokenizer, encoder._extractor)


def test_strips_that_cut_through_tokens_are_refused(tmp_path: Path) -> None:
    deep = {"depths": (1, 1, 1, 1), "num_attention_heads": (2, 2, 2, 2), "hidden_size": 64, "num_hidden_layers": 4}
    model = transformers.ClapModel(
        transformers.ClapConfig(audio_config=AUDIO | deep, text_config=TEXT, projection_dim=6)
    )
    with pytest.raises(UnsupportedTowerError, match="2 strips, which do not divide the 1 rows of tokens at layer 3"):
        ClapAudioAtLayer(model.audio_model.audio_encoder, model.audio_projection, 3)
