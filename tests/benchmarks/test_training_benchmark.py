"""The contest of benchmarks/training.py is a fair one: everybody does the same work."""

from __future__ import annotations

import copy
import json
from itertools import islice
from pathlib import Path

import pytest
import torch
import training
from photo_shards import CAPTION_TOKENS, SIZE, write_photo_shards

from lightning_xai.data.shards import Manifest

MODEL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}


@pytest.fixture
def setting(tmp_path: Path, shapes: Path) -> training.Setting:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(MODEL))
    return training.Setting(
        model=str(path),
        device="cpu",
        precision="32-true",
        train=shapes / "train",
        folder=tmp_path,
        batch_size=4,
        workers=1,
        steps=2,
        learning_rates=(1e-3, 1e-2),
    )


@pytest.mark.slow
def test_every_contestant_trains_the_same_model(setting: training.Setting) -> None:
    contest = training.Contest(setting)
    encoder, batch = contest.encoder, contest.batches[0]

    # What a model does, not its weights: Adam moves key biases, which have no effect, by what rounding leaves.
    def trained() -> torch.Tensor:
        with torch.no_grad():
            features = encoder.encode_image(batch.images), encoder.encode_text(batch.tokens)
            return torch.cat([*features, encoder.logit_scale.exp().expand(4, 1)], dim=1)

    start, before = copy.deepcopy(encoder.state_dict()), trained()
    results = {}
    for name, run in contest.runs.items():
        encoder.load_state_dict(start)
        assert run().seconds > 0
        results[name] = trained()
    moved = float((results[training.OURS] - before).norm())
    assert moved > 0.1
    for name in (training.PLAIN, training.LOADED, training.PADDED):
        assert float((results[name] - results[training.OURS]).norm()) < 1e-3 * moved, name


def test_what_is_told_of_our_own_steps_are_shares_of_them(setting: training.Setting) -> None:
    contest = training.Contest(setting)
    contest.runs[training.OURS]()
    (measured,) = contest.ours
    assert measured.spent.seconds > 0
    assert measured.spent.core_seconds > 0
    assert 0 <= measured.waiting < 1
    assert 0 < measured.callbacks < 1
    assert measured.reading_cpu > 0


def test_rates_and_ratios_are_medians_over_the_rounds(setting: training.Setting) -> None:
    contest = training.Contest(setting)
    names = list(contest.runs)
    # Eight pairs in 2, 4 and 8 seconds of ours; the others need half as long, as long, and three times as long.
    rounds = [
        dict.fromkeys(names, training.Spent(ours * factor, 4.0)) | {training.OURS: training.Spent(ours, 5.0)}
        for ours, factor in ((2, 0.5), (4, 1), (8, 3))
    ]
    table = training.rates_table(contest, rounds)
    assert table[2] == f"| {training.OURS} | 2.00 | 1.000 | 1.000 to 1.000 | 625.0 | 1.000 |"
    assert table[3] == f"| {training.PLAIN} | 2.00 | 1.000 | 0.500 to 3.000 | 500.0 | 1.250 |"


def test_flops_are_counted_forward_and_backward(setting: training.Setting) -> None:
    contest = training.Contest(setting)
    batch = contest.batches[-1]
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        contest.encoder.encode_image(batch.images)
        contest.encoder.encode_text(batch.tokens)
    assert 2.5 * counter.get_total_flops() < contest.flops() <= 3.1 * counter.get_total_flops()


@pytest.mark.slow
def test_photographs_are_as_large_as_cocos_and_their_captions_as_long(tmp_path: Path) -> None:
    from lightning_xai.data.shard_reader import read_samples
    from lightning_xai.models import load_dual_encoder

    path = tmp_path / "small.json"
    path.write_text(json.dumps(MODEL))
    tokenizer = load_dual_encoder(path).tokenizer
    manifest = write_photo_shards(tmp_path / "photos", 300)
    assert 150_000 < manifest.bytes / manifest.samples < 175_000
    samples = read_samples(tmp_path / "photos", Manifest.load(tmp_path / "photos"), [0], 0, 300)
    read = [sample for _, sample in islice(samples, 300)]
    assert {sample.size for sample in read} == {SIZE}  # type: ignore[union-attr]
    lengths = (tokenizer.encode([sample.captions[0] for sample in read]) != 0).sum(dim=1).float()  # type: ignore[union-attr]
    expected = sum(length * count for length, count in CAPTION_TOKENS.items()) / sum(CAPTION_TOKENS.values())
    assert float(lengths.mean()) == pytest.approx(expected, abs=0.5)
