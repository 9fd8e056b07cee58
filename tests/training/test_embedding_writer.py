from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from quiet_trainer import quiet_trainer
from training_runs import task_of

from lightning_xai.data import Manifest, Sample, ShardDataModule, write_shards
from lightning_xai.data.sample import read_image
from lightning_xai.data.shard_reader import read_samples
from lightning_xai.training import ContrastiveFineTuning, EmbeddingWriter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:torch")


@pytest.fixture(scope="module")
def samples(shapes: Path) -> list[Sample]:
    """Eleven images, one of which does not decode, with captions in other scripts than Latin."""
    manifest = Manifest.load(shapes / "val")
    found = [sample for _, sample in read_samples(shapes / "val", manifest, [0], 0, 11) if isinstance(sample, Sample)]
    found[4] = replace(found[4], image=found[4].image[:-60])
    found[6] = replace(found[6], captions=(*found[6].captions, "ein blauer Stern – 青い星"))
    return found


@pytest.fixture(scope="module")
def task(architecture_file: Callable[[str], Path]) -> ContrastiveFineTuning:
    return task_of(architecture_file("vit"))


def predict(task: ContrastiveFineTuning, folder: Path, samples: list[Sample], **options: Any) -> None:
    write_shards(samples, folder / "shards", name="test", progress=False)
    data = ShardDataModule(val=folder / "shards", eval_batch_size=4, num_workers=0, max_fault_fraction=0.5)
    quiet_trainer(folder, EmbeddingWriter(), **options).predict(task, data)


def test_the_file_holds_the_unit_embeddings_of_every_image_and_caption_but_broken_ones(
    task: ContrastiveFineTuning, samples: list[Sample], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict(task, tmp_path, samples)
    path = tmp_path / "embeddings" / "rank_0.npz"
    assert f"Saved {path}" in capsys.readouterr().out
    kept = [sample for i, sample in enumerate(samples) if i != 4]
    with np.load(path, allow_pickle=False) as arrays:
        assert arrays["keys"].tolist() == [sample.key for sample in kept]
        assert arrays["captions"].tolist() == [caption for sample in kept for caption in sample.captions]
        assert arrays["caption_key"].tolist() == [sample.key for sample in kept for _ in sample.captions]
        for name in ("image", "text"):
            assert arrays[name].dtype == np.float32
            np.testing.assert_allclose(np.linalg.norm(arrays[name], axis=1), 1, atol=1e-6)
        encoder = task.encoder.eval()
        with torch.no_grad():
            pixels = torch.stack([encoder.image_transform(read_image(s.image, s.key)) for s in kept])
            image = torch.nn.functional.normalize(encoder.encode_image(pixels), dim=1)
            tokens = encoder.tokenizer.encode(arrays["captions"].tolist())
            text = torch.nn.functional.normalize(encoder.encode_text(tokens), dim=1)
        np.testing.assert_allclose(arrays["image"], image.numpy(), atol=1e-6)
        np.testing.assert_allclose(arrays["text"], text.numpy(), atol=1e-6)


def test_a_logger_decides_on_the_folder(task: ContrastiveFineTuning, samples: list[Sample], tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "logs", name="run", version=3)
    predict(task, tmp_path, samples[:2], logger=logger)
    assert (tmp_path / "logs" / "run" / "version_3" / "embeddings" / "rank_0.npz").is_file()
