from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import callback
import pytest
import torch
from photo_shards import CAPTIONS, PHRASES, write_captioned_photo_shards

from lightning_xai.data import Batch, ShardDataModule
from lightning_xai.models import load_dual_encoder


def test_drawn_photos_have_five_captions_and_as_many_measurable_phrases_as_cocos(
    architecture_file: Callable[[str], Path], tmp_path: Path
) -> None:
    images = 80
    write_captioned_photo_shards(tmp_path / "photos", images)
    encoder = load_dual_encoder(architecture_file("vit"))
    data = ShardDataModule(val=tmp_path / "photos", eval_batch_size=images, num_workers=0)
    data.bind(encoder.image_transform, encoder.tokenizer)
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    assert isinstance(batch, Batch)
    assert torch.bincount(batch.caption_image).tolist() == [CAPTIONS] * images
    assert not batch.phrases.reason.any()
    found = Counter(torch.bincount(batch.phrases.image_row, minlength=images).tolist())
    assert found.keys() <= PHRASES.keys()
    expected = sum(count * often for count, often in PHRASES.items()) / sum(PHRASES.values())
    assert len(batch.phrases) / images == pytest.approx(expected, rel=0.3)
    for text, caption in zip(batch.phrases.text, batch.phrases.caption_row.tolist(), strict=True):
        assert text in batch.captions[caption].split()[:3]


DRAWN = (8, 5, 8, 4, 5, 9, 12, 5, 4, 7, 0, 0)
"""Phrases of the first images that are drawn."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_the_callback_and_test_are_measured_beside_a_plain_epoch(
    architecture_file: Callable[[str], Path], tmp_path: Path
) -> None:
    write_captioned_photo_shards(tmp_path / "photos", 12)
    bench = callback.Bench(str(architecture_file("vit")), "cpu", tmp_path / "photos", batch_size=4)
    table = callback.table(bench, 12, rounds=2, inputs=True)
    (phrases,) = re.findall(r"\n(\d+) phrases", table)
    assert 0.9 * sum(DRAWN) <= int(phrases) <= sum(DRAWN)  # some boxes fill less than one patch
    rows = [line for line in table.splitlines() if re.search(r"\d\.\d", line)]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == [
        "plain epoch, 12 images in each of 2 rounds",
        "with GroundingCallback at the last blocks",
        "`test` of gamma and rho",
        "with GroundingCallback as it is by default",
    ]
    for row in rows:
        wall, _, cpu, _, once = map(float, re.findall(r"\d+\.\d+", row))
        assert wall > 0
        assert cpu > once >= 0
