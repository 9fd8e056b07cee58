"""open_clip's own training command as a contestant: the same shards, and its log."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from captioned_shards import TRANSFORM, make_samples
from open_clip_training import OpenClipTraining, peer_options, step_seconds, write_shared_shards

from lightning_xai.data import ShardDataModule
from lightning_xai.data.spans import CaptionTokenizer

# As open_clip_torch 3.3 writes it.
LOG = """\
2026-11-29,16:33:56 | INFO | Start epoch 0
2026-11-29,16:34:10 | INFO | Train Epoch: 0 [ 16/112 (14%)] Data (t): 2.101 Batch (t): 6.400, 2.50000/s, 2.50000/s/gpu \
LR: 0.000010 Logit Scale: 14.286 Contrastive_loss: 2.7725 (2.7725) Loss: 2.7725 (2.7725)
2026-11-29,16:34:12 | INFO | Train Epoch: 0 [ 32/112 (29%)] Data (t): 1.055 Batch (t): 4.200, 8.00000/s, 8.00000/s/gpu \
LR: 0.000010 Logit Scale: 14.286 Contrastive_loss: 2.7725 (2.7725) Loss: 2.7725 (2.7725)
"""


def test_a_step_is_as_long_as_its_own_rate_says_and_not_as_the_mean_so_far() -> None:
    assert list(step_seconds(LOG.splitlines(), 16)) == [6.4, 2.0]


def test_both_loaders_find_what_they_need_in_the_same_shards(tmp_path: Path, tokenizer: CaptionTokenizer) -> None:
    manifest = write_shared_shards(tmp_path / "shared", make_samples(10), samples_per_shard=4)
    assert [entry.samples for entry in manifest.shards] == [4, 4, 2]
    with tarfile.open(tmp_path / "shared" / "shard-000001.tar") as tar:
        names = tar.getnames()
        assert [name for name in names if name.startswith("k4.")] == ["k4.jpg", "k4.json", "k4.txt"]
        caption = tar.extractfile("k4.txt")
        assert caption is not None
        assert caption.read() == b"a dog number 4"
    data = ShardDataModule(train=tmp_path / "shared", batch_size=5, num_workers=0, verify=True)
    data.bind(TRANSFORM, tokenizer)
    data.setup("fit")
    assert sorted(key for batch in data.train_dataloader() for key in batch.keys) == [f"k{i}" for i in range(10)]
    assert data.fault_counts == {"train": 0}


def test_a_command_that_fails_shows_the_end_of_its_output(tmp_path: Path) -> None:
    (tmp_path / "packages" / "open_clip_train").mkdir(parents=True)
    (tmp_path / "packages" / "open_clip_train" / "__init__.py").touch()
    (tmp_path / "packages" / "open_clip_train" / "main.py").write_text("raise SystemExit('no such model')\n")
    options = peer_options("ViT-B-32", "cpu", "32-true", 16, 1, 7)
    with pytest.raises(RuntimeError, match=r"ended with 1:\nno such model"):
        OpenClipTraining(tmp_path, tmp_path / "packages", options).run(tmp_path, 1, warm=3)


def test_counted_steps_are_those_after_the_warm_ones(tmp_path: Path) -> None:
    (tmp_path / "packages" / "open_clip_train").mkdir(parents=True)
    (tmp_path / "packages" / "open_clip_train" / "__init__.py").touch()
    (tmp_path / "packages" / "open_clip_train" / "main.py").write_text(f"print({LOG!r}, flush=True)\n")
    options = peer_options("ViT-B-32", "cpu", "32-true", 16, 1, 7)
    seconds, core_seconds = OpenClipTraining(tmp_path, tmp_path / "packages", options).run(tmp_path, 1, warm=1)
    assert seconds == 2.0
    assert 0 <= core_seconds < 10
