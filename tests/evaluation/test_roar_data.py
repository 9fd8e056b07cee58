"""The data sets of ROAR+: which samples take part, and what is removed from them."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_xai.attribution import Attribution, GradCAM
from lightning_xai.data.degradation import degrade_image
from lightning_xai.data.photo_size import PhotoSize
from lightning_xai.data.sample import RecordError, Sample, read_image
from lightning_xai.data.shard_reader import read_samples
from lightning_xai.data.shards import Manifest, write_shards
from lightning_xai.evaluation.roar_data import (
    attribute_pairs,
    count_ties,
    partition,
    read_keys,
    write_degraded,
    write_original,
)
from lightning_xai.models import DualEncoder

KEYS = [f"key{i}" for i in range(50)]


@pytest.fixture
def encoder(make_encoder: Callable[..., DualEncoder]) -> DualEncoder:
    return make_encoder("vit")


def samples_of(folder: Path) -> list[Sample]:
    manifest = Manifest.load(folder)
    records = [sample for _, sample in read_samples(folder, manifest, range(len(manifest.shards)), 0, manifest.samples)]
    assert not [record for record in records if isinstance(record, RecordError)]
    return [record for record in records if isinstance(record, Sample)]


@pytest.fixture
def original(encoder: DualEncoder, shapes: Path, tmp_path: Path) -> Path:
    keys = frozenset(sample.key for sample in samples_of(shapes / "val")[:6])
    write_original(encoder, shapes / "val", keys, tmp_path / "original", "six")
    return tmp_path / "original"


def maps_of(folder: Path, encoder: DualEncoder) -> Attribution:
    count, generator = Manifest.load(folder).samples, torch.Generator().manual_seed(0)
    image = torch.rand(count, 4, 4, generator=generator)
    return Attribution(image, torch.rand(count, encoder.tokenizer.context_length, generator=generator), image[:, 0, 0])


def pixels_of(sample: Sample) -> torch.Tensor:
    return torch.from_numpy(np.array(read_image(sample.image, sample.key))).permute(2, 0, 1)


def test_the_parts_are_those_of_the_keys_whatever_their_order() -> None:
    training, validation = partition(KEYS)
    assert (training, validation) == partition(KEYS[::-1]) != partition(KEYS, seed=1)
    assert (len(training), len(validation)) == (40, 10)
    assert training | validation == set(KEYS)


def test_two_drawings_with_one_seed_do_not_overlap_and_together_are_all() -> None:
    first = frozenset.union(*partition(KEYS, samples=20))
    second = frozenset.union(*partition(KEYS, samples=30, skip=20))
    assert (len(first), len(second), first | second) == (20, 30, frozenset(KEYS))
    assert second == frozenset.union(*partition(KEYS, skip=20))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 51}, "has 50 samples"),
        ({"samples": 10, "skip": 41}, "skip 41 and samples 10"),
        ({"skip": -1}, "skip -1"),
        ({"validation": 0.001}, "leaves a part empty"),
        ({"validation": 1.0}, "leaves a part empty"),
    ],
)
def test_a_drawing_that_cannot_be_made_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition(KEYS, **options)  # type: ignore[arg-type]


def test_originals_are_what_the_model_sees_with_their_first_caption(
    encoder: DualEncoder, original: Path, shapes: Path
) -> None:
    sources = {sample.key: sample for sample in samples_of(shapes / "val")}
    written = samples_of(original)
    assert [sample.key for sample in written] == list(sources)[:6]
    for sample in written:
        source, transform = sources[sample.key], encoder.image_transform
        assert sample.size == (32, 32)  # half of the source's, so that there is something to resize
        seen, before = (transform(read_image(each.image, "")) for each in (sample, source))
        assert torch.equal(seen, before)
        assert sample.captions == source.captions[:1]
        assert (sample.regions, sample.blanks) == ((), {})


def test_what_cannot_be_used_is_left_out_and_counted(encoder: DualEncoder, shapes: Path, tmp_path: Path) -> None:
    good, broken, empty, other = samples_of(shapes / "val")[:4]
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    cut = replace(broken, image=buffer.getvalue()[:60])
    write_shards(
        [good, cut, replace(empty, captions=("&nbsp;",), regions=()), other], tmp_path / "source", name="mixed"
    )
    keys, unreadable = read_keys(tmp_path / "source", Manifest.load(tmp_path / "source"))
    assert (len(keys), unreadable) == (4, 0)
    manifest = write_original(encoder, tmp_path / "source", frozenset(keys[:3]), tmp_path / "out", "some")
    assert [sample.key for sample in samples_of(tmp_path / "out")] == [good.key]
    assert manifest.excluded == {"broken record": 1, "caption without tokens": 1}


def test_photos_that_are_stored_smaller_than_the_model_sees_them_are_refused(
    encoder: DualEncoder, shapes: Path, tmp_path: Path
) -> None:
    samples, side = samples_of(shapes / "val")[:2], encoder.image_transform.size[0]
    for name, short_side in (("small", side - 1), ("enough", side)):
        write_shards(samples, tmp_path / name, name=name, progress=False, photo_size=PhotoSize(short_side))
    keys = frozenset(sample.key for sample in samples)
    with pytest.raises(ValueError, match=rf"small holds photos resized to .* with --short_side {side} or more"):
        write_original(encoder, tmp_path / "small", keys, tmp_path / "out", "two")
    assert not (tmp_path / "out").exists()
    assert write_original(encoder, tmp_path / "enough", keys, tmp_path / "out", "two").samples == 2


def test_keys_of_records_that_cannot_be_read_are_counted(shapes: Path, tmp_path: Path) -> None:
    shutil.copytree(shapes / "val", tmp_path / "val")
    shard = tmp_path / "val" / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    place = data.index(b'"captions"')
    data[place : place + 3] = b"}}}"
    shard.write_bytes(bytes(data))
    keys, unreadable = read_keys(tmp_path / "val", Manifest.load(tmp_path / "val"))
    assert (len(keys), unreadable) == (39, 1)


def test_maps_come_in_the_order_of_the_shards_at_any_batch_size(encoder: DualEncoder, original: Path) -> None:
    method = GradCAM(encoder)
    seen: list[int] = []
    maps = attribute_pairs(method, original, batch_size=4, on_progress=seen.append)
    assert seen == [4, 2]
    samples = samples_of(original)
    images = torch.stack([encoder.image_transform(read_image(sample.image, "")) for sample in samples])
    expected = method.attribute(images, encoder.tokenizer.encode([sample.captions[0] for sample in samples]))
    assert maps.image == pytest.approx(expected.image, rel=1e-4, abs=1e-6)
    assert maps.text == pytest.approx(expected.text, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("fill", ["image_mean", "model_mean"])
def test_images_lose_the_top_of_the_map_that_was_upsampled_and_captions_stay(
    encoder: DualEncoder, original: Path, tmp_path: Path, fill: Literal["image_mean", "model_mean"]
) -> None:
    maps = maps_of(original, encoder)
    write_degraded(
        encoder,
        original,
        maps,
        tmp_path / "out",
        modality="image",
        fraction=0.25,
        fill=fill,
        name="less",
    )
    color = None if fill == "image_mean" else torch.tensor(encoder.image_transform.mean) * 255
    for row, (before, after) in enumerate(zip(samples_of(original), samples_of(tmp_path / "out"), strict=True)):
        heat = torch.nn.functional.interpolate(maps.image[row, None, None], size=(32, 32), mode="bilinear")[0, 0]
        expected = degrade_image(pixels_of(before), heat, 0.25, color)
        assert torch.equal(pixels_of(after), expected)
        assert 0 < int((pixels_of(after) != pixels_of(before)).any(dim=0).sum()) <= 256
        assert replace(after, image=b"") == replace(before, image=b"")


def test_captions_lose_half_of_their_own_tokens_and_images_stay(
    encoder: DualEncoder, original: Path, tmp_path: Path
) -> None:
    maps = maps_of(original, encoder)
    maps.text[:, 0] = 9.0  # a start token is never taken, however it scores
    write_degraded(encoder, original, maps, tmp_path / "out", modality="text", fraction=0.5, name="less")
    for row, (before, after) in enumerate(zip(samples_of(original), samples_of(tmp_path / "out"), strict=True)):
        own = encoder.tokenizer.content_mask(encoder.tokenizer.encode(before.captions))[0].nonzero()[:, 0].tolist()
        ranked = sorted(own, key=lambda place: -maps.text[row, place])
        assert set(after.blanks[0]) == set(ranked[: len(own) // 2])
        assert replace(after, blanks={}) == before


def test_pairs_whose_cut_the_map_does_not_decide_are_counted(encoder: DualEncoder, original: Path) -> None:
    maps = maps_of(original, encoder)
    maps.image[:] = torch.tensor([1.0, 0.0, 0.0, 0.0])[:, None]  # a quarter of the rows, all at the top
    assert count_ties(encoder, original, maps, pixels=0.25, tokens=0.5) == {"image": 0, "text": 0}
    maps.image[1], maps.image[4], maps.text[2] = 0.5, 0.0, 0.0
    assert count_ties(encoder, original, maps, pixels=0.25, tokens=0.5) == {"image": 2, "text": 1}


def test_what_is_there_is_taken_and_nothing_is_left_half_made(
    encoder: DualEncoder, original: Path, tmp_path: Path
) -> None:
    maps = maps_of(original, encoder)
    options = {"modality": "text", "fraction": 0.5, "name": "less"}
    broken = Attribution(maps.image, torch.full_like(maps.text, torch.nan), maps.similarity)
    with pytest.raises(ValueError, match="have to be finite"):
        write_degraded(encoder, original, broken, tmp_path / "made" / "out", **options)  # type: ignore[arg-type]
    assert list((tmp_path / "made").iterdir()) == []
    first = write_degraded(encoder, original, maps, tmp_path / "made" / "out", **options)  # type: ignore[arg-type]
    time = (tmp_path / "made" / "out" / "manifest.json").stat().st_mtime_ns
    assert write_degraded(encoder, original, maps, tmp_path / "made" / "out", **options) == first  # type: ignore[arg-type]
    assert (tmp_path / "made" / "out" / "manifest.json").stat().st_mtime_ns == time


def test_of_two_processes_that_write_the_same_the_slower_takes_what_the_faster_made(
    encoder: DualEncoder, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps, out = maps_of(original, encoder), tmp_path / "out"

    def overtaken(*args: object, **options: object) -> Manifest:
        monkeypatch.undo()
        write_degraded(encoder, original, maps, out, modality="text", fraction=0.5, name="less")
        return write_shards(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("lightning_xai.evaluation.roar_data.write_shards", overtaken)
    manifest = write_degraded(encoder, original, maps, out, modality="text", fraction=0.5, name="less")
    assert manifest == Manifest.load(out)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_maps_of_other_data_are_refused(encoder: DualEncoder, original: Path, tmp_path: Path) -> None:
    maps = maps_of(original, encoder)
    fewer = Attribution(maps.image[:4], maps.text[:4], maps.similarity[:4])
    with pytest.raises(ValueError, match="holds 6 pairs; got maps of 4"):
        write_degraded(encoder, original, fewer, tmp_path / "out", modality="image", fraction=0.5, name="less")
