"""Mutated shards, manifests and result files: each is used, counted or refused in plain words, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from captioned_shards import TRANSFORM, make_samples
from fuzzing import broken_bytes, broken_file, broken_json, fuzz, in_time, result_or_refusal
from hypothesis import given
from hypothesis import strategies as st
from result_folders import write_evaluation, write_roar, write_training

from lightning_xai.data import CaptionTokenizer
from lightning_xai.data.batch import EvaluationCollate, TrainingCollate
from lightning_xai.data.sample import HardNegative, RecordError, Sample, WrongCaption, decode_sample, encode_sample
from lightning_xai.data.shard_reader import read_samples
from lightning_xai.data.shard_store import open_store
from lightning_xai.data.shards import Manifest, describe, write_shards
from lightning_xai.data.verification import Verification, read_reports
from lightning_xai.report.build import build_sections
from lightning_xai.report.sections.significance import OrderTest
from lightning_xai.results.runs import load_runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of one shard with six samples."""
    folder = tmp_path_factory.mktemp("fuzz") / "set"
    write_shards(make_samples(6), folder, name="test", progress=False)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[Sample | RecordError]:
    manifest = Manifest.load(folder)
    return [item for _, item in read_samples(folder, manifest, [0], 0, manifest.samples)]


@fuzz(80)
@given(st.data())
def test_each_record_of_a_broken_shard_is_itself_or_a_fault(
    folder: Path, whole: list[Sample | RecordError], tokenizer: CaptionTokenizer, data: st.DataObject
) -> None:
    manifest = Manifest.load(folder)
    broken = folder.parent / "broken"
    broken.mkdir(exist_ok=True)
    content = data.draw(broken_bytes((folder / "shard-000000.tar").read_bytes()))
    (broken / "shard-000000.tar").write_bytes(content)
    with in_time():
        records = list(read_samples(broken, manifest, [0], 0, manifest.samples))
        assert [index for index, _ in records] == list(range(6))
        batch = EvaluationCollate(TRANSFORM, tokenizer, manifest.labels)(records)
        assert int(batch.valid.sum()) + len(batch.faults) == 6
        verification = Verification(manifest)
        for report in read_reports(open_store(broken), manifest):
            verification.add(report)
        verification.compare()
    by_key = {sample.key: sample for sample in whole if isinstance(sample, Sample)}
    for _, item in records:
        if isinstance(item, Sample) and item != by_key.get(item.key):
            # Damage that still makes a record, as a digit in a caption, is what checksums are for.
            assert verification.counts
    if content != (folder / "shard-000000.tar").read_bytes():
        assert verification.counts


@fuzz(120)
@given(st.data())
def test_a_record_with_strange_values_is_used_or_refused(tokenizer: CaptionTokenizer, data: st.DataObject) -> None:
    sample = next(make_samples(1))
    negative = HardNegative("a cat number 0", (2, 5), 0, (2, 5), 0)
    sample = Sample(**{**vars(sample), "negatives": (negative,), "blanks": {0: (1, 2)}, "group": "7"})
    sample = Sample(**{**vars(sample), "wrong_captions": (WrongCaption("a cat", 0, "swap"),)})
    members = encode_sample(sample)
    record = data.draw(broken_json(json.loads(members["json"])))
    changed = {"jpg": data.draw(st.sampled_from((members["jpg"], members["jpg"][:-30]))), "json": _dump(record)}
    found = result_or_refusal(lambda: decode_sample("key", changed, "shard-000000.tar"))
    item = RecordError("broken") if found is None else found
    with in_time():
        for collate in (EvaluationCollate(TRANSFORM, tokenizer, ("cat", "dog")), TrainingCollate(TRANSFORM, tokenizer)):
            batch = collate([(0, item), (1, sample)])
            assert batch.valid.tolist() == [not batch.faults, True]
            assert batch.images.isfinite().all()


@fuzz(100)
@given(st.data())
def test_a_broken_manifest_is_read_or_refused(folder: Path, tmp_path_factory: Any, data: st.DataObject) -> None:
    broken = folder.parent / "manifest"
    broken.mkdir(exist_ok=True)
    shutil.copy(folder / "shard-000000.tar", broken)
    (broken / "manifest.json").write_bytes(data.draw(broken_file((folder / "manifest.json").read_bytes())))
    manifest = result_or_refusal(lambda: Manifest.load(broken))
    if manifest is not None:
        assert describe(manifest)
        assert {entry.name for entry in manifest.shards} <= {path.name for path in broken.iterdir()}
        manifest.save(folder.parent)
        assert Manifest.read(folder.parent) == manifest


Write = Callable[[Path], Any]
WRITERS: dict[str, Write] = {
    "evaluation": lambda folder: write_evaluation(folder, {"feature_pair": 0.3, "random": 0.1}, images=12),
    "training": lambda folder: write_training(folder, [0.2, 0.4], images=12),
    "roar": lambda folder: write_roar(folder, {("m2ib", "image"): (2.1, 2.3), ("m2ib", "text"): (2.5, 2.4)}),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_broken_file_of_results_is_reported_or_refused(kind: str, tmp_path: Path) -> None:
    WRITERS[kind](tmp_path / "run")
    paths = (path for suffix in ("json", "csv", "yaml") for path in sorted((tmp_path / "run").rglob(f"*.{suffix}")))
    files = {path: path.read_bytes() for path in paths}

    @fuzz(20)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(list(files)))
        try:
            path.write_bytes(data.draw(broken_file(files[path], path.suffix)))
            runs = result_or_refusal(lambda: load_runs([tmp_path / "run"]))
            if runs is not None:
                result_or_refusal(lambda: build_sections(runs, OrderTest(0.2, 0.005, 20, 0)))
        finally:
            path.write_bytes(files[path])

    check()


def _dump(record: Any) -> bytes:
    return json.dumps(record).encode()
