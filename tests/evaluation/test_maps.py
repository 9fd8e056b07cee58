"""The maps of a batch against each of them computed alone, by the method itself."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import encoder_from
from evaluation_batches import evaluation_batch
from photo_shards import write_captioned_photo_shards
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_xai.attribution import (
    AttributionMethod,
    FeaturePairAttribution,
    InteractionAttribution,
    PairwiseMethod,
    Saliency,
    SimilarityGradCAM,
)
from lightning_xai.data.batch import Batch
from lightning_xai.data.datamodule import ShardDataModule
from lightning_xai.data.phrases import Phrases
from lightning_xai.evaluation.rows import BatchMaps, BatchRows, MethodMaps, Wanted, maps_of, measure_batch
from lightning_xai.exclusion import Exclusion
from lightning_xai.metrics.registry import choose_metric
from lightning_xai.models import DualEncoder

MakeEncoder = Callable[..., DualEncoder]
ENCODERS = pytest.mark.parametrize("name", ["vit", "resnet"])
DEEP = {  # as many blocks and tokens as ViT-B-32 has
    "embed_dim": 32,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 64, "head_width": 16, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 40, "heads": 4, "layers": 12},
}
CASES = pytest.mark.parametrize(
    ("name", "batch_size", "captions"),
    [("vit", 2, True), ("vit", 64, False), ("resnet", 2, False), ("resnet", 64, True)],
)
CAPTIONS = pytest.mark.parametrize("captions", [True, False], ids=["captions", "spans"])


def encoder_and_batch(make_encoder: MakeEncoder, name: str) -> tuple[DualEncoder, Batch]:
    encoder = make_encoder(name, torch.float64)
    return encoder, evaluation_batch(encoder.image_transform.size, encoder.tokenizer)


def everything(batch: Batch, captions: bool = True) -> Wanted:
    """All phrases that captions name but one, and all negatives, in another order than the batch's."""
    assert batch.negatives is not None
    phrases = (batch.phrases.reason == Exclusion.MEASURED).nonzero()[:, 0]
    negatives = torch.arange(len(batch.negatives)).flip(0)
    assert len(phrases) == 6
    assert len(negatives) >= 4
    return Wanted(phrases[[4, 0, 2, 1, 3]], negatives, captions)


def forward(encoder: DualEncoder, images: Tensor, tokens: Tensor) -> None:
    with torch.no_grad():
        encoder.encode_image(images)
        encoder.encode_text(tokens)


def made(maps: MethodMaps, batch: Batch, wanted: Wanted) -> BatchMaps:
    """The maps as an evaluation asks for them, after a forward pass of the model."""
    encoder = maps.method.encoder
    assert isinstance(encoder, DualEncoder)
    with maps.forward_pass():
        forward(encoder, batch.images, batch.tokens)
    return maps.maps(batch, wanted)


def assert_spans_agree(maps: BatchMaps, method: PairwiseMethod, batch: Batch, wanted: Wanted) -> None:
    """Every phrase, true word and replacement is the span map of one image and one caption."""
    phrases, negatives = batch.phrases, batch.negatives
    assert negatives is not None
    for number, row in enumerate(wanted.phrases.tolist()):
        image, caption = int(phrases.image_row[row]), int(phrases.caption_row[row])
        alone = method.span_map(batch.images[[image]], batch.tokens[[caption]], phrases.span_mask[[row]])[0]
        torch.testing.assert_close(maps.phrases[number], alone, rtol=1e-8, atol=1e-13)
        assert alone.abs().max() > 1e-6
    for number, row in enumerate(wanted.negatives.tolist()):
        picture, caption = batch.images[[int(negatives.image_row[row])]], int(negatives.caption_row[row])
        true = method.span_map(picture, batch.tokens[[caption]], negatives.true_mask[[row]])[0]
        wrong = method.span_map(picture, negatives.tokens[[row]], negatives.mask[[row]])[0]
        torch.testing.assert_close(maps.true[number], true, rtol=1e-8, atol=1e-13)
        torch.testing.assert_close(maps.replacements[number], wrong, rtol=1e-8, atol=1e-13)
        assert (true - wrong).abs().max() > 1e-6
    assert len(maps.phrases) == len(wanted.phrases)
    assert len(maps.true) == len(maps.replacements) == len(wanted.negatives)


def assert_captions_agree(maps: BatchMaps, method: AttributionMethod, batch: Batch) -> None:
    assert len(maps.image) == len(maps.text) == len(batch.tokens) == 5
    for row, image in enumerate(batch.caption_image.tolist()):
        alone = method.attribute(batch.images[[image]], batch.tokens[[row]])
        torch.testing.assert_close(maps.image[row], alone.image[0], rtol=1e-8, atol=1e-13)
        torch.testing.assert_close(maps.text[row], alone.text[0], rtol=1e-8, atol=1e-13)


@CASES
def test_interactions_are_those_of_each_phrase_within_its_caption(
    make_encoder: MakeEncoder, name: str, batch_size: int, captions: bool
) -> None:
    encoder, batch = encoder_and_batch(make_encoder, name)
    method, wanted = FeaturePairAttribution(encoder, steps=3), everything(batch, captions)
    maps = made(maps_of(method, batch_size), batch, wanted)
    assert_spans_agree(maps, method, batch, wanted)
    if captions:
        assert_captions_agree(maps, method, batch)
    else:
        assert len(maps.image) == len(maps.text) == 0


@pytest.mark.parametrize("layers", [(0, 1), (1, 0)])
def test_interactions_at_other_layers_and_of_grad_cam_alike(make_encoder: MakeEncoder, layers: tuple[int, int]) -> None:
    encoder, batch = encoder_and_batch(make_encoder, "vit")
    wanted = everything(batch, captions=False)
    for method in (FeaturePairAttribution(encoder, *layers, steps=2), SimilarityGradCAM(encoder, *layers)):
        assert_spans_agree(made(maps_of(method, 2), batch, wanted), method, batch, wanted)


@CASES
def test_a_method_with_one_map_a_caption_explains_each_phrase_as_a_separate_caption(
    make_encoder: MakeEncoder, name: str, batch_size: int, captions: bool
) -> None:
    encoder, batch = encoder_and_batch(make_encoder, name)
    method, wanted = Saliency(encoder), everything(batch, captions)
    maps = made(maps_of(method, batch_size), batch, wanted)
    negatives = batch.negatives
    assert negatives is not None

    def alone(image: int, words: str) -> Tensor:
        return method.attribute(batch.images[[image]], encoder.tokenizer.encode([words])).image[0]

    for number, row in enumerate(wanted.phrases.tolist()):
        expected = alone(int(batch.phrases.image_row[row]), batch.phrases.text[row])
        torch.testing.assert_close(maps.phrases[number], expected, rtol=1e-8, atol=1e-13)
    for number, row in enumerate(wanted.negatives.tolist()):
        image = int(negatives.image_row[row])
        for found, words in ((maps.true, negatives.text[row]), (maps.replacements, negatives.replacement[row])):
            torch.testing.assert_close(found[number], alone(image, words), rtol=1e-8, atol=1e-13)
    if captions:
        assert_captions_agree(maps, method, batch)
    else:
        assert len(maps.image) == len(maps.text) == 0


def test_the_same_question_is_answered_once_and_no_more_at_a_time_than_allowed(
    make_encoder: MakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, batch = encoder_and_batch(make_encoder, "vit")
    method, wanted, negatives = Saliency(encoder), everything(batch, captions=False), batch.negatives
    assert negatives is not None
    asked: list[tuple[bytes, tuple[int, ...]]] = []
    sizes: list[int] = []
    plain = method.attribute

    def recorded(images: Tensor, tokens: Tensor) -> Any:
        sizes.append(len(images))
        asked.extend((image.numpy().tobytes(), tuple(row)) for image, row in zip(images, tokens.tolist(), strict=True))
        return plain(images, tokens)

    monkeypatch.setattr(method, "attribute", recorded)
    made(maps_of(method, 3), batch, wanted)
    rows = [(int(batch.phrases.image_row[row]), batch.phrases.text[row]) for row in wanted.phrases.tolist()]
    for row in wanted.negatives.tolist():
        image = int(negatives.image_row[row])
        rows += [(image, negatives.text[row]), (image, negatives.replacement[row])]
    assert len(asked) == len(set(asked)) == len(set(rows)) < len(rows)
    assert max(sizes) == 3


def stems_run(method: FeaturePairAttribution, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """How many inputs went through each stem, call by call, besides the model's own forward pass."""
    sizes: dict[str, list[int]] = {"image": [], "text": []}

    def listen(name: str, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def recorded(inputs: Tensor, *rest: Any) -> Tensor:
            sizes[name].append(len(inputs))
            return plain(inputs, *rest)

        return recorded

    monkeypatch.setattr(method.image, "features_before", listen("image", method.image.features_before))
    monkeypatch.setattr(method.text, "features_before", listen("text", method.text.features_before))
    return sizes


@ENCODERS
def test_hidden_states_of_the_forward_pass_are_taken_and_no_stem_is_run_again(
    make_encoder: MakeEncoder, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, batch = encoder_and_batch(make_encoder, name)
    method = FeaturePairAttribution(encoder, steps=2)
    wanted = replace(everything(batch), negatives=torch.arange(3))
    sizes = stems_run(method, monkeypatch)
    maps = made(maps_of(method, 64), batch, wanted)
    assert sizes == {"image": [1], "text": [1, 3]}  # references, and wrong captions
    assert_spans_agree(maps, method, batch, wanted)


def no_pass(encoder: DualEncoder, batch: Batch) -> None:
    pass


def two_passes(encoder: DualEncoder, batch: Batch) -> None:
    forward(encoder, batch.images.flip(0), batch.tokens.flip(0))
    forward(encoder, batch.images, batch.tokens)


def fewer_inputs(encoder: DualEncoder, batch: Batch) -> None:
    forward(encoder, batch.images[1:], batch.tokens[1:])


@ENCODERS
@pytest.mark.parametrize("passes", [no_pass, two_passes, fewer_inputs])
def test_own_stems_are_run_where_the_forward_pass_was_another(
    make_encoder: MakeEncoder,
    name: str,
    passes: Callable[[DualEncoder, Batch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder, batch = encoder_and_batch(make_encoder, name)
    method, wanted = FeaturePairAttribution(encoder, steps=2), everything(batch)
    maps, sizes = maps_of(method, 64), stems_run(method, monkeypatch)
    with maps.forward_pass():
        passes(encoder, batch)
    found = maps.maps(batch, wanted)
    assert (sizes["image"][0], sizes["text"][0]) == (4, 5)
    assert_spans_agree(found, method, batch, wanted)
    assert_captions_agree(found, method, batch)


def test_what_passed_before_the_batch_is_forgotten_and_batches_follow_each_other(
    make_encoder: MakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, batch = encoder_and_batch(make_encoder, "vit")
    method, wanted = FeaturePairAttribution(encoder, steps=2), everything(batch, captions=False)
    maps, other = maps_of(method, 64), replace(batch, images=batch.images.flip(3))
    forward(encoder, other.images, other.tokens)  # a sanity check, say
    for current in (batch, other, batch):
        sizes = stems_run(method, monkeypatch)
        found = made(maps, current, wanted)
        assert sizes["image"] in ([1], [])  # the reference, once
        assert_spans_agree(found, method, current, wanted)


def test_the_phrases_of_five_captions_an_image_cost_a_seventh_of_the_forward_pass_at_most(tmp_path: Path) -> None:
    write_captioned_photo_shards(tmp_path / "photos", 20)
    encoder = encoder_from(DEEP, tmp_path, torch.float32)
    data = ShardDataModule(val=tmp_path / "photos", eval_batch_size=20, num_workers=0)
    data.bind(encoder.image_transform, encoder.tokenizer)
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    assert isinstance(batch, Batch)
    metric = choose_metric("grounding", {})

    def flops(run: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return int(counter.get_total_flops())

    def measured(maps: MethodMaps) -> BatchRows:
        with maps.forward_pass():
            forward(encoder, batch.images, batch.tokens)
        return measure_batch(batch, maps, [metric])

    plain = flops(lambda: forward(encoder, batch.images, batch.tokens))
    maps = maps_of(FeaturePairAttribution(encoder), 128)
    assert len(measured(maps).phrases) >= 4 * len(batch.images)  # and the references, once in all
    assert plain < flops(lambda: measured(maps)) < 1.15 * plain


@pytest.mark.parametrize("size", [1, 3, 64])
def test_spans_of_one_image_are_asked_about_together_where_they_fit(
    make_encoder: MakeEncoder, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    encoder, batch = encoder_and_batch(make_encoder, "vit")
    method, wanted = FeaturePairAttribution(encoder, steps=2), everything(batch, captions=False)
    asked: list[list[int]] = []
    plain = method.span_maps_of

    def recorded(states: Any, images: Tensor, *rest: Any) -> Tensor:
        asked.append(images.tolist())
        return plain(states, images, *rest)

    monkeypatch.setattr(method, "span_maps_of", recorded)
    made(maps_of(method, size), batch, replace(wanted, negatives=wanted.negatives[:0]))
    of_image = Counter(batch.phrases.image_row[wanted.phrases].tolist())
    assert Counter(image for images in asked for image in images) == of_image
    assert max(of_image.values()) == 3
    assert max(map(len, asked)) == min(size, len(wanted.phrases))
    for image, count in of_image.items():
        assert sum(image in images for images in asked) == (1 if size >= count else count)


def test_words_of_a_caption_are_mapped_from_the_batchs_own_pass_and_those_after_its_end_are_zero(
    make_encoder: MakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, batch = encoder_and_batch(make_encoder, "vit")
    method = FeaturePairAttribution(encoder, steps=2)
    long = " ".join(["a red dog on a mat"] * encoder.tokenizer.context_length)
    batch = replace(batch, tokens=torch.cat([batch.tokens[:-1], encoder.tokenizer.encode([long])]))
    maps, image, caption = maps_of(method, 64), 1, len(batch.tokens) - 1
    states = made(maps, batch, everything(batch, captions=False)).states
    sizes = stems_run(method, monkeypatch)
    found = maps.word_maps(states, image, caption, long)
    assert sizes == {"image": [], "text": []}
    assert found is not None
    seen = int(found.flatten(1).any(dim=1).sum())
    assert 0 < seen < len(found) == len(long.split())
    assert not found[seen:].any()
    for word in (0, 2, seen - 1):
        span = torch.zeros(1, batch.tokens.shape[1], dtype=torch.bool)
        span[0, 1 + word] = True  # each word is a token, the first of which starts the caption
        alone = method.span_map(batch.images[[image]], batch.tokens[[caption]], span)[0]
        torch.testing.assert_close(found[word].double(), alone, rtol=1e-5, atol=1e-8)


def hooks_in(module: nn.Module) -> int:
    return sum(len(child._forward_pre_hooks) + len(child._forward_hooks) for child in module.modules())


def test_the_hooks_are_gone_after_the_forward_pass_and_after_an_exception(make_encoder: MakeEncoder) -> None:
    encoder, batch = encoder_and_batch(make_encoder, "vit")
    before, maps = hooks_in(encoder), maps_of(FeaturePairAttribution(encoder, steps=2), 64)
    with contextlib.suppress(KeyError), maps.forward_pass():
        assert hooks_in(encoder) == before + 3
        raise KeyError
    made(maps, batch, everything(batch, captions=False))
    assert hooks_in(encoder) == before


@pytest.mark.parametrize("kind", [FeaturePairAttribution, Saliency])
def test_nothing_wanted_has_the_usual_shapes(make_encoder: MakeEncoder, kind: type[AttributionMethod]) -> None:
    encoder, full = encoder_and_batch(make_encoder, "vit")
    none = torch.zeros(0, dtype=torch.int64)
    for batch in (full, replace(full, negatives=None), replace(full, phrases=Phrases.empty(16))):
        maps = made(maps_of(kind(encoder), 2), batch, Wanted(none, none, captions=False))
        assert maps.phrases.shape == maps.true.shape == maps.replacements.shape == (0, 4, 4)
        assert maps.image.shape == (0, 4, 4)
        assert maps.text.shape == (0, 16)


class Product(PairwiseMethod):
    """Another pairwise method: outer products of gradients, without hidden states."""

    signed = True

    def _attribute(self, images: Tensor, tokens: Tensor) -> InteractionAttribution:
        found = Saliency(self.encoder).attribute(images, tokens)
        interactions = torch.einsum("bl,bhw->blhw", found.text - 0.1, found.image)
        prefix = torch.zeros_like(found.text)
        error = torch.zeros_like(found.similarity)
        sums = (interactions.sum(dim=1), interactions.sum(dim=(2, 3)))
        return InteractionAttribution(*sums, found.similarity, interactions, prefix, error)


@CAPTIONS
def test_any_pairwise_method_explains_phrases_within_their_captions(make_encoder: MakeEncoder, captions: bool) -> None:
    encoder, batch = encoder_and_batch(make_encoder, "vit")
    method, wanted = Product(encoder), everything(batch, captions)
    maps = made(maps_of(method, 2), batch, wanted)
    assert_spans_agree(maps, method, batch, wanted)
    if captions:
        assert_captions_agree(maps, method, batch)
