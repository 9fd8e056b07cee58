"""The whole evaluation, from shards to result files, through a real trainer."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from conftest import ARCHITECTURES
from distributed import join_lightning, run_distributed
from numpy.typing import NDArray
from pycocotools import mask as coco
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from lightning_xai.attribution import BanzhafInteractions, FeaturePairAttribution, Saliency
from lightning_xai.data import Manifest, Sample, ShardDataModule, write_shards
from lightning_xai.data.masks import Mask, encode_mask
from lightning_xai.data.sample import HardNegative, RecordError, Region, encode_sample, read_image
from lightning_xai.data.shapes import prepare_shapes
from lightning_xai.data.shard_reader import read_samples
from lightning_xai.evaluation import AttributionEvaluation, method_run
from lightning_xai.evaluation.method_run import CacheError, ResultCache
from lightning_xai.metrics import gamma, patch_mask
from lightning_xai.models import DualEncoder
from lightning_xai.results.examples import read_examples
from lightning_xai.results.record import ResultRecord
from lightning_xai.results.table import ResultTable, exclusions, read_result, score_table

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning:torch")

METHODS: dict[str, Any] = {
    "feature_pair": None,
    "compressed": {"method": "m2ib", "steps": 2, "samples": 2},
    "saliency": {},
}
Evaluate = Callable[..., AttributionEvaluation]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 images of shapes, an odd number."""
    root = tmp_path_factory.mktemp("world") / "shapes"
    prepare_shapes(root, 1, 13, progress=False)
    return root / "val"


def data_of(folder: Path, **options: Any) -> ShardDataModule:
    return ShardDataModule(test=folder, **({"eval_batch_size": 4, "num_workers": 0, "swap_objects": True} | options))


def evaluate(
    architecture: Path, data: ShardDataModule, out: Path, *, trainer: dict[str, Any] | None = None, **options: Any
) -> AttributionEvaluation:
    torch.manual_seed(0)
    chosen: dict[str, Any] = {"methods": METHODS, "seeds": 2} | options
    task = AttributionEvaluation(str(architecture), None, out=out, **chosen)
    defaults: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    settings = defaults | {"inference_mode": False, "default_root_dir": out} | (trainer or {})
    L.Trainer(**settings).test(task, data, verbose=False)
    return task


def rows_of(folder: Path, method: str, metric: str, seed: int = 0) -> list[dict[str, Any]]:
    """Every target that a metric looks at, with the columns that describe it."""
    _, table = read_result(folder)
    frame = table.frame
    rows = frame[(frame["method"] == method) & (frame["metric"] == metric) & (frame["seed"] == seed)]
    return [{str(name): value for name, value in row.items()} for row in rows.to_dict("records")]


def numbers(folder: Path, method: str, metric: str, seed: int = 0) -> list[float]:
    return [row["value"] for row in rows_of(folder, method, metric, seed) if not row["excluded"]]


def scores_of(table: ResultTable, record: ResultRecord) -> dict[tuple[str, int, str], float]:
    summed = score_table(table.values, record.scores.values())
    return {(row.method, row.seed, row.score): row.value for row in summed.itertuples()}


def samples_of(folder: Path) -> list[Sample]:
    manifest = Manifest.load(folder)
    found = [sample for _, sample in read_samples(folder, manifest, range(len(manifest.shards)), 0, manifest.samples)]
    return [sample for sample in found if isinstance(sample, Sample)]


class Done(NamedTuple):
    task: AttributionEvaluation
    out: Path
    result: ResultRecord
    table: ResultTable


@pytest.fixture(scope="module")
def done(architecture_file: Callable[[str], Path], world: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    out = tmp_path_factory.mktemp("done") / "out"
    task = evaluate(architecture_file("vit"), data_of(world), out)
    assert task.result is not None
    assert task.table is not None
    return Done(task, out, task.result, task.table)


def inputs_of(encoder: DualEncoder, sample: Sample) -> tuple[Tensor, Tensor]:
    image = encoder.image_transform(read_image(sample.image, sample.key))[None]
    return image, encoder.tokenizer.encode(sample.captions)


def test_every_phrase_has_the_gamma_of_its_own_span_map_computed_alone(done: Done, world: Path) -> None:
    encoder, samples = done.task.encoder.eval(), samples_of(world)
    method = FeaturePairAttribution(encoder)
    rows = [row for row in rows_of(done.out, "feature_pair", "gamma") if not row["excluded"]]
    assert len(rows) > 20
    for row in rows:
        sample, caption = samples[row["index"]], row["caption_index"]
        image, tokens = inputs_of(encoder, sample)
        (region,) = (region for region in sample.regions if region.label == row["label"])
        mask = torch.zeros(1, tokens.shape[1], dtype=torch.bool)
        mask[0, encoder.tokenizer.token_span(sample.captions[caption], region.spans[caption][0])] = True
        heat = method.span_map(image, tokens[[caption]], mask)
        box = encoder.boxes(torch.tensor([region.box]), sample.size)
        share = gamma(heat, patch_mask(box.float(), (4, 4), (32, 32)))
        assert row["value"] == pytest.approx(float(share), rel=1e-4)


def seen_mask(mask: Mask) -> NDArray[np.bool_]:
    """The pixels of a mask of 64x64 pixels in the image of 32x32 that the model sees."""
    pixels = coco.decode({"size": list(mask.size), "counts": mask.counts.encode()})
    assert pixels.shape == (64, 64)
    return np.array([[pixels[2 * y + 1, 2 * x + 1] for x in range(32)] for y in range(32)], dtype=bool)


def test_gamma_and_rho_by_mask_are_as_counted_pixel_by_pixel(done: Done, world: Path) -> None:
    encoder, samples = done.task.encoder.eval(), samples_of(world)
    method = FeaturePairAttribution(encoder)
    rows = [rows_of(done.out, "feature_pair", f"{name}_mask") for name in ("gamma", "rho")]
    assert [row["excluded"] for row in rows[0]] == [
        row["excluded"] for row in rows_of(done.out, "feature_pair", "gamma")
    ]
    measured = [pair for pair in zip(*rows, strict=True) if not pair[0]["excluded"]]
    assert len(measured) > 20
    for row, hit in measured:
        sample, caption = samples[row["index"]], row["caption_index"]
        image, tokens = inputs_of(encoder, sample)
        (region,) = (region for region in sample.regions if region.label == row["label"])
        span = torch.zeros(1, tokens.shape[1], dtype=torch.bool)
        span[0, encoder.tokenizer.token_span(sample.captions[caption], region.spans[caption][0])] = True
        heat = method.span_map(image, tokens[[caption]], span)[0].tolist()
        x0, y0, x1, y1 = (row[side] for side in ("x0", "y0", "x1", "y1"))
        box = patch_mask(torch.tensor([[x0, y0, x1, y1]]), (4, 4), (32, 32))[0]
        assert region.mask is not None
        mask = seen_mask(region.mask)
        in_mask, in_box = np.zeros((4, 4), dtype=int), np.zeros((4, 4), dtype=int)
        for y in range(32):
            for x in range(32):
                if x0 <= x + 0.5 < x1 and y0 <= y + 0.5 < y1:
                    in_box[y // 8, x // 8] += 1
                    in_mask[y // 8, x // 8] += int(mask[y, x])
        places = [(i, j) for i in range(4) for j in range(4)]
        own = [(i, j) for i, j in places if box[i, j] and in_mask[i, j] and 2 * in_mask[i, j] >= in_box[i, j]]
        own = own or [place for place in places if in_mask[place] == max(in_mask[each] for each in places)]
        total = math.fsum(max(heat[i][j], 0) for i, j in places)
        assert row["value"] == pytest.approx(math.fsum(max(heat[i][j], 0) for i, j in own) / total, rel=1e-4)
        best = max(places, key=lambda place: heat[place[0]][place[1]])
        assert hit["value"] == float(best in own)


def test_iou_by_mask_is_that_of_the_strongest_quarter_with_all_masks_that_a_caption_names(
    done: Done, world: Path
) -> None:
    encoder, samples = done.task.encoder.eval(), samples_of(world)
    for row in rows_of(done.out, "saliency", "iou_mask")[:8]:
        sample, caption = samples[row["index"]], row["caption_index"]
        image, tokens = inputs_of(encoder, sample)
        heat = Saliency(encoder).attribute(image, tokens[[caption]]).image
        pixels = torch.nn.functional.interpolate(heat[None].float(), size=(32, 32), mode="bilinear")[0, 0].numpy()
        strong = pixels > np.sort(pixels.flatten())[767]
        truth = np.any(
            [seen_mask(region.mask) for region in sample.regions if region.mask and caption in region.spans], 0
        )
        assert row["value"] == pytest.approx((strong & truth).sum() / (strong | truth).sum())


def test_masks_that_cannot_be_used_are_counted_by_reason_and_change_no_other_number(
    done: Done, architecture_file: Callable[[str], Path], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong: dict[int, tuple[Mask | None, str]] = {
        0: (None, "no_mask"),
        1: (encode_mask(np.ones((64, 32), dtype=bool)), "mask_size"),
        2: (Mask((64, 64), "o" * 40), "mask_broken"),
        3: (encode_mask(np.zeros((64, 64), dtype=bool)), "mask_broken"),
    }
    samples = samples_of(world)
    for index, (mask, _) in wrong.items():
        samples[index] = replace(samples[index], regions=tuple(replace(r, mask=mask) for r in samples[index].regions))
    with pytest.raises(
        RecordError, match=r"the mask of '\w+' has \(64, 32\) pixels \(height, width\), its image \(64, 64\)"
    ):
        encode_sample(samples[1])
    monkeypatch.setattr("lightning_xai.data.sample.mask_faults", lambda sample: ())  # as of another program
    write_shards(samples, tmp_path / "wrong", name="wrong", progress=False)
    metrics = ["grounding", "localization", "mask_grounding", "mask_localization"]
    evaluate(
        architecture_file("vit"),
        data_of(tmp_path / "wrong"),
        tmp_path / "out",
        methods={"saliency": {}},
        metrics=metrics,
    )
    for metric in ("gamma", "iou", "gamma_mask", "iou_mask", "ap_box"):
        expected = rows_of(done.out, "saliency", metric)
        for before, after in zip(expected, rows_of(tmp_path / "out", "saliency", metric), strict=True):
            if after["index"] in wrong and metric not in ("gamma", "iou") and not before["excluded"]:
                assert after["excluded"] == wrong[after["index"]][1]
            else:
                assert (after["excluded"], after["target"]) == (before["excluded"], before["target"])
                assert after["value"] == pytest.approx(before["value"], nan_ok=True, rel=1e-5)


def test_masks_are_not_decoded_where_no_metric_needs_them(
    done: Done, architecture_file: Callable[[str], Path], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(mask: Mask) -> NDArray[np.bool_]:
        raise AssertionError("decoded")

    monkeypatch.setattr("lightning_xai.models.image_transform.decode_mask", refuse)
    evaluate(
        architecture_file("vit"),
        data_of(world),
        tmp_path,
        methods={"saliency": {}},
        metrics=["grounding", "localization"],
    )
    assert numbers(tmp_path, "saliency", "gamma") == pytest.approx(numbers(done.out, "saliency", "gamma"), rel=1e-5)


def test_data_without_masks_are_measured_by_box_alone(
    architecture_file: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    plain = [
        replace(sample, regions=tuple(replace(region, mask=None) for region in sample.regions))
        for sample in samples_of(world)[:3]
    ]
    write_shards(plain, tmp_path / "plain", name="plain", progress=False)
    with pytest.raises(ValueError, match="mask_grounding cannot be measured without segmentation masks"):
        evaluate(architecture_file("vit"), data_of(tmp_path / "plain"), tmp_path / "out", metrics=["mask_grounding"])
    task = evaluate(architecture_file("vit"), data_of(tmp_path / "plain"), tmp_path / "out", methods={"saliency": {}})
    assert task.result is not None
    assert not [name for name in task.result.metrics if "mask" in name]


def test_confidence_is_that_of_images_and_captions_masked_by_hand(done: Done, world: Path) -> None:
    encoder, sample = done.task.encoder.eval(), samples_of(world)[5]
    image, tokens = inputs_of(encoder, sample)
    method = Saliency(encoder)
    for caption in range(len(sample.captions)):
        given = method.attribute(image, tokens[[caption]])
        heat = torch.nn.functional.interpolate(given.image[None], size=(32, 32), mode="bilinear", align_corners=False)
        heat = (heat - heat.min()) / (heat.max() - heat.min())
        own = encoder.tokenizer.content_mask(tokens[[caption]])[0].nonzero()[:, 0].tolist()
        best = sorted(own, key=lambda place: -float(given.text[0, place]))[: math.ceil(len(own) / 2)]
        short = tokens[[caption]].clone()
        for place in set(own) - set(best):
            short[0, place] = encoder.tokenizer.padding_id
        with torch.no_grad():
            pictures = torch.cat([encoder.encode_image(image), encoder.encode_image(image * heat)])
            texts = torch.cat([encoder.encode_text(tokens[[caption]]), encoder.encode_text(short)])
        found = [
            row["value"]
            for metric in ("similarity", "image_kept", "text_kept")
            for row in rows_of(done.out, "saliency", metric)
            if (row["index"], row["caption_index"]) == (5, caption)
        ]
        expected = [cosine_similarity(pictures[i], texts[j], dim=0) for i, j in ((0, 0), (1, 0), (0, 1))]
        assert found == pytest.approx([float(value) for value in expected], abs=1e-5)


def test_scores_are_the_means_and_shares_of_the_values(done: Done) -> None:
    scores = scores_of(done.table, done.result)
    for label, method in done.result.methods.items():
        for seed in method.seeds:
            values = {name: numbers(done.out, label, name, seed) for name in set(done.table.values["metric"])}
            gammas, pairs = values["gamma"], list(zip(values["similarity"], values["image_kept"], strict=True))
            expected = {
                "gamma_mean": sum(gammas) / len(gammas),
                "gamma_above_50": sum(value > 0.5 for value in gammas) / len(gammas),
                "rho": sum(values["rho"]) / len(gammas),
                "image_drop": sum(max(0.0, o - s) for o, s in pairs) / len(pairs),
                "image_increase": sum(s > o for o, s in pairs) / len(pairs),
                "localization_iou": sum(values["iou"]) / len(values["iou"]),
            }
            if method.signed:
                other, delta = values["other"], values["delta"]
                expected["other_negative"] = sum(value < 0 for value in other) / len(other)
                expected["delta_negative"] = sum(value < 0 for value in delta) / len(delta)
            found = {name: value for (of, at, name), value in scores.items() if (of, at) == (label, seed)}
            assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)
            assert ("delta_mean" in found) == method.signed
    logged = done.task.trainer.callback_metrics
    assert float(logged["test/compressed/rho/seed=1"]) == pytest.approx(scores["compressed", 1, "rho"])
    assert float(logged["test/saliency/gamma_std"]) == pytest.approx(scores["saliency", 0, "gamma_std"])


def test_stochastic_methods_are_repeated_and_others_are_not(done: Done) -> None:
    seeds = {label: method.seeds for label, method in done.result.methods.items()}
    assert seeds == {"feature_pair": (0,), "compressed": (0, 1), "saliency": (0,)}
    assert done.result.methods["compressed"].name == "m2ib"
    assert numbers(done.out, "compressed", "gamma", 0) != numbers(done.out, "compressed", "gamma", 1)


def test_seconds_of_the_pass_and_of_each_method_are_recorded(done: Done) -> None:
    speed = done.result.speed
    assert {name for name in speed if name.startswith("seconds_per_pair")} == {
        "seconds_per_pair",
        *(f"seconds_per_pair/{label}" for label in METHODS),
    }
    assert all(value > 0 for value in speed.values())


def test_the_folder_holds_the_record_and_the_table_to_the_last_bit(done: Done) -> None:
    record, table = read_result(done.out)
    assert (record.kind, record.data["samples"], list(record.methods)) == ("evaluation", 13, list(METHODS))
    assert record.metrics == done.result.metrics
    assert record.metrics["confidence"].options["keep_tokens"] == 0.5
    assert table.values.equals(done.table.values)
    assert table.targets.equals(done.table.targets)


def test_examples_are_the_first_some_of_each_class_and_the_worst_with_their_pictures(done: Done) -> None:
    shown = read_examples(done.out / "feature_pair")
    assert all((done.out / example.image).is_file() for example in shown)
    rows = [row for row in rows_of(done.out, "feature_pair", "gamma") if not row["excluded"]]
    failures = [example.gamma for example in shown if "failure" in example.why]
    assert min(gamma for gamma in failures if gamma is not None) == min(row["value"] for row in rows)
    assert {example.label for example in shown if "class" in example.why} == {row["label"] for row in rows}
    assert len([example for example in shown if "fixed" in example.why]) == 6
    for example in shown:
        heat = torch.tensor(example.heat)[None]
        share = gamma(heat, patch_mask(torch.tensor([example.box]), (4, 4), (32, 32)))
        assert example.gamma == pytest.approx(float(share), rel=1e-2)
        assert all(example.caption[start:end] in example.phrase for start, end in example.spans)


def hooks_in(module: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(child, kind)) for child in module.modules() for kind in kinds)


class StopError(RuntimeError):
    """What kills a run in the middle."""


def test_a_run_that_dies_goes_on_with_what_it_has_and_ends_with_the_same_numbers(
    done: Done,
    architecture_file: Callable[[str], Path],
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    whole = Saliency.attribute

    def counting(self: Saliency, images: Tensor, tokens: Tensor) -> Any:
        if len(asked) == 4:  # each batch asks twice, for its captions and its phrases: in the middle of the third
            raise StopError
        asked.append(len(images))
        return whole(self, images, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(Saliency, "attribute", counting)
        with pytest.raises(StopError):
            evaluate(architecture_file("vit"), data_of(world), tmp_path)
    assert not (tmp_path / "result.json").exists()
    stored = [path for path in (tmp_path / "rows" / "saliency,seed=0").glob("*.jsonl")]
    assert sum(len(path.read_text().splitlines()) for path in stored) == 8
    # The last line was being written when the power went.
    stored[0].write_text(stored[0].read_text()[:-30])
    asked.clear()

    def recording(self: Saliency, images: Tensor, tokens: Tensor) -> Any:
        asked.append(len(images))
        return whole(self, images, tokens)

    monkeypatch.setattr(Saliency, "attribute", recording)
    # Other batches than before: 13 images in batches of 5, of which the first holds nothing new.
    task = evaluate(architecture_file("vit"), data_of(world, eval_batch_size=5), tmp_path)
    assert len(asked) == 2 * 2
    assert_alike(tmp_path, done.out)
    assert hooks_in(task.encoder) == 0


def assert_alike(folder: Path, expected: Path) -> None:
    """Equal, but for rounding: batches of another size are multiplied in another order."""
    (_, ours), (_, theirs) = read_result(folder), read_result(expected)
    assert ours.targets.equals(theirs.targets)
    columns = ["method", "seed", "target", "metric", "excluded"]
    assert ours.values[columns].equals(theirs.values[columns])
    assert ours.values["value"].tolist() == pytest.approx(
        theirs.values["value"].tolist(), rel=1e-3, abs=1e-5, nan_ok=True
    )


def test_what_is_there_is_never_computed_again_and_other_settings_are_refused(
    done: Done, architecture_file: Callable[[str], Path], world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = json.loads((done.out / "result.json").read_text())

    def never(*_: Any) -> Any:
        raise AssertionError("nothing is left to compute")

    with monkeypatch.context() as patch:
        patch.setattr(DualEncoder, "encode_image", never)
        evaluate(architecture_file("vit"), data_of(world), done.out)
    after = json.loads((done.out / "result.json").read_text())
    assert {key: value for key, value in after.items() if key != "speed"} == {
        key: value for key, value in before.items() if key != "speed"
    }
    with pytest.raises(CacheError, match=r"confidence.keep_tokens was 0.5 and is 0.25.*Choose another folder"):
        evaluate(
            architecture_file("vit"), data_of(world), done.out, metric_options={"confidence": {"keep_tokens": 0.25}}
        )
    with pytest.raises(CacheError, match="captions_per_image was None and is 1"):
        evaluate(architecture_file("vit"), data_of(world, captions_per_image=1), done.out)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_cfg": ARCHITECTURES["vit"] | {"quick_gelu": True}}, "architecture.quick_gelu was None and is True"),
        ({"preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}, r"preprocessing.mean was .* and is \[0.1, 0.2, 0.3\]"),
    ],
)
def test_the_same_weights_with_another_activation_or_other_images_are_another_model(
    done: Done, changed: dict[str, Any], message: str, world: Path, tmp_path: Path
) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"model_cfg": ARCHITECTURES["vit"]} | changed))
    with pytest.raises(CacheError, match=message) as refused:
        evaluate(path, data_of(world), done.out)
    assert "weights was" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "trainer", "message"),
    [
        ({}, {"inference_mode": True}, "inference_mode=False"),
        ({"methods": {"nonsense": {}}}, {}, "unknown method 'nonsense'"),
        ({"methods": {"all": {}}}, {}, "expected one method, got 'all'"),
        ({"methods": {"../up": {"method": "m2ib"}}}, {}, "a label has"),
        ({"methods": {"m2ib": {"colour": 1}}}, {}, "m2ib has no option colour"),
        ({"metric_options": {"confidence": {"keep_tokens": 1.5}}}, {}, "keep_tokens has to be in"),
        ({"metrics": ["nonsense"]}, {}, "unknown metric 'nonsense'"),
        ({"seeds": 0}, {}, "at least 1"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_computed(
    options: dict[str, Any],
    trainer: dict[str, Any],
    message: str,
    architecture_file: Callable[[str], Path],
    world: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(architecture_file("vit"), data_of(world), tmp_path, trainer=trainer, **options)
    assert not (tmp_path / "rows").exists() or not list((tmp_path / "rows").rglob("*.jsonl"))


def test_a_folder_that_is_a_file_is_refused_early(
    architecture_file: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        evaluate(architecture_file("vit"), data_of(world), tmp_path / "taken")


def without_boxes(folder: Path, samples: list[Sample]) -> Path:
    plain = [Sample(sample.key, sample.image, sample.size, sample.captions) for sample in samples]
    write_shards(plain, folder, name="plain", progress=False)
    return folder


def test_data_without_boxes_have_confidence_and_nothing_that_needs_boxes(
    architecture_file: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    plain = without_boxes(tmp_path / "plain", samples_of(world)[:3])
    with pytest.raises(ValueError, match="grounding cannot be measured without boxes"):
        evaluate(architecture_file("vit"), data_of(plain), tmp_path / "out", metrics=["confidence", "grounding"])
    task = evaluate(architecture_file("vit"), data_of(plain), tmp_path / "out", methods={"saliency": {}})
    assert task.result is not None
    assert list(task.result.metrics) == ["confidence"]


def test_hard_negatives_that_cannot_be_measured_are_counted_by_reason(
    architecture_file: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    first, second = samples_of(world)[:2]
    start, end = 0, len(first.captions[0])
    tiny = Region("dot", (0.0, 0.0, 3.0, 3.0))  # smaller than a patch of 16 pixels
    regions = (*first.regions, tiny)
    stored = (
        HardNegative("a dot", (2, 5), 0, (start, end), len(regions) - 1),
        HardNegative("and " * 30 + "a dot", (122, 125), 0, (start, end), 0),  # behind the context length
    )
    write_shards(
        [replace(first, regions=regions, negatives=stored), second], tmp_path / "data", name="x", progress=False
    )
    task = evaluate(
        architecture_file("vit"), data_of(tmp_path / "data"), tmp_path / "out", methods={"feature_pair": None},
        metrics=["hard_negatives"],
    )  # fmt: skip
    assert task.table is not None
    counts = exclusions(task.table.values[task.table.values["metric"] == "delta"], ["metric"])
    found = dict(zip(counts["excluded"], counts["count"], strict=True))
    assert found == {"": found[""], "smaller_than_patch": 1, "span_cut_off": 1}
    assert found[""] > 0


def test_a_metric_that_was_asked_for_and_has_no_item_is_an_error_after_all_is_written(
    architecture_file: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"no item was left to measure hard_negatives.*swap_objects"):
        evaluate(
            architecture_file("vit"), data_of(world, swap_objects=False), tmp_path, methods={"feature_pair": {}},
            metrics=["grounding", "hard_negatives"],
        )  # fmt: skip
    assert numbers(tmp_path, "feature_pair", "gamma")


def test_a_method_without_a_sign_has_nothing_where_only_signs_are_asked_for(
    architecture_file: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    both: dict[str, Any] = {"saliency": {}, "feature_pair": {}}
    task = evaluate(architecture_file("vit"), data_of(world), tmp_path, methods=both, metrics=["hard_negatives"])
    assert task.table is not None
    assert set(task.table.values["method"]) == {"feature_pair"}


@pytest.mark.parametrize(("metric", "what"), [("hard_negatives", "signed maps"), ("prefix_share", "interactions")])
def test_a_metric_that_no_method_serves_is_refused_at_once(
    architecture_file: Callable[[str], Path], tmp_path: Path, metric: str, what: str
) -> None:
    with pytest.raises(ValueError, match=f"{metric} reads .*{what}, which none of the methods saliency, rise has"):
        AttributionEvaluation(
            str(architecture_file("vit")), None, out=tmp_path, methods={"saliency": {}, "rise": {}}, metrics=[metric]
        )


def test_broken_records_are_counted(architecture_file: Callable[[str], Path], world: Path, tmp_path: Path) -> None:
    samples = samples_of(world)[:6]
    torn = [Sample(s.key, s.image[:-60], s.size, s.captions, s.regions) if i == 2 else s for i, s in enumerate(samples)]
    write_shards(torn, tmp_path / "torn", name="torn", progress=False)
    data = data_of(tmp_path / "torn", max_fault_fraction=0.5)
    task = evaluate(architecture_file("vit"), data, tmp_path / "out", methods={"feature_pair": {}})
    assert task.result is not None
    assert task.result.data["broken_records"] == 1
    assert {row["index"] for row in rows_of(tmp_path / "out", "feature_pair", "similarity")} == {0, 1, 3, 4, 5}


def test_it_only_tests(architecture_file: Callable[[str], Path], world: Path, tmp_path: Path) -> None:
    task = AttributionEvaluation(str(architecture_file("vit")), None, out=tmp_path)
    trainer = L.Trainer(accelerator="cpu", logger=False, inference_mode=False, default_root_dir=tmp_path)
    task.validation_step = lambda batch, index: None  # type: ignore[method-assign, misc]
    with pytest.raises(ValueError, match="measures a model in `test`"):
        trainer.validate(task, ShardDataModule(val=world, num_workers=0), verbose=False)


# --- several processes ---


def evaluate_on_this_rank(config: str, world: str, out: str, options: dict[str, Any]) -> dict[str, float]:
    task = evaluate(Path(config), data_of(Path(world), **options), Path(out), trainer=join_lightning())
    return {name: float(value) for name, value in task.trainer.callback_metrics.items()}


@pytest.mark.distributed
def test_two_processes_find_what_one_finds_item_by_item(
    done: Done, architecture_file: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    one, other = run_distributed(evaluate_on_this_rank, str(architecture_file("vit")), str(world), str(tmp_path), {})
    assert one == other
    expected = scores_of(done.table, done.result)["feature_pair", 0, "gamma_mean"]
    assert one["test/feature_pair/gamma_mean"] == pytest.approx(expected, abs=1e-5)
    assert_alike(tmp_path, done.out)
    for label in METHODS:
        mine, alone = read_examples(tmp_path / label), read_examples(done.out / label)
        assert [(example.key, example.phrase, example.why) for example in mine] == [
            (example.key, example.phrase, example.why) for example in alone
        ]


class Torn(NamedTuple):
    shards: Path
    alone: Path


@pytest.fixture(scope="module")
def torn(architecture_file: Callable[[str], Path], world: Path, tmp_path_factory: pytest.TempPathFactory) -> Torn:
    """Six samples, one of them broken, in two shards, and what one process finds, a sample at a time."""
    root = tmp_path_factory.mktemp("torn")
    samples = [replace(s, image=s.image[:-60]) if i == 3 else s for i, s in enumerate(samples_of(world)[:6])]
    write_shards(samples, root / "shards", name="torn", samples_per_shard=4, progress=False)
    evaluate(architecture_file("vit"), data_of(root / "shards", **ONE_AT_A_TIME), root / "alone")
    return Torn(root / "shards", root / "alone")


ONE_AT_A_TIME = {"eval_batch_size": 1, "max_fault_fraction": 1.0}


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])  # of four, one has padding only
def test_with_one_sample_a_batch_any_number_of_processes_writes_the_very_same_files(
    torn: Torn, architecture_file: Callable[[str], Path], tmp_path: Path, size: int
) -> None:
    where = (str(architecture_file("vit")), str(torn.shards), str(tmp_path))
    run_distributed(evaluate_on_this_rank, *where, ONE_AT_A_TIME | {"num_workers": 1}, world_size=size)
    expected, found = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if is_result(path.relative_to(root))}
        for root in (torn.alone, tmp_path)
    )
    assert found.keys() == expected.keys()
    assert {
        Path("values.csv"),
        Path("targets.csv"),
        *(Path(label, "examples.json") for label in METHODS),
    } <= found.keys()
    for path, content in expected.items():
        if path.name != "result.json":
            assert found[path] == content, path
    mine, alone = (json.loads(files[Path("result.json")]) for files in (found, expected))
    assert mine["data"]["broken_records"] == 1
    assert mine["speed"]["pairs"] == alone["speed"]["pairs"] > 0
    assert {name: part for name, part in mine.items() if name != "speed"} == {
        name: part for name, part in alone.items() if name != "speed"
    }


def items_found_on_opening(config: str, world: str, out: str) -> list[int]:
    found: list[int] = []

    class LateStore(ResultCache):
        def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
            time.sleep(dist.get_rank())
            super().__init__(folder, settings)
            found.append(len(self))

    pytest.MonkeyPatch().setattr(method_run, "ResultCache", LateStore)
    options = join_lightning() | {"limit_test_batches": 1}
    evaluate(Path(config), data_of(Path(world)), Path(out), trainer=options, methods={"saliency": {}})
    return found


@pytest.mark.distributed
def test_a_process_that_comes_late_takes_nothing_of_the_others_for_an_earlier_run(
    architecture_file: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    where = (str(architecture_file("vit")), str(world), str(tmp_path))
    assert run_distributed(items_found_on_opening, *where) == [[0], [0]]


def is_result(path: Path) -> bool:
    return path.suffix != "" and path.parts[0] != "rows"


def test_a_method_is_measured_at_several_layers_under_labels_that_say_which(
    architecture_file: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    both: dict[str, Any] = {"methods": {"feature_pair": {"steps": 3}, "random": None}, "layers": [(-1, -1), (0, 1)]}
    evaluate(architecture_file("vit"), data_of(world), tmp_path / "all", seeds=1, metrics=["grounding"], **both)
    alone = {"feature_pair": {"steps": 3, "image_layer": 0, "text_layer": 1}}
    evaluate(architecture_file("vit"), data_of(world), tmp_path / "alone", methods=alone, metrics=["grounding"])
    record, _ = read_result(tmp_path / "all")
    assert list(record.methods) == ["feature_pair,-1,-1", "feature_pair,0,1", "random"]
    assert numbers(tmp_path / "all", "feature_pair,0,1", "gamma") == numbers(
        tmp_path / "alone", "feature_pair", "gamma"
    )


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"random": None}, "layers would do nothing: none of random attributes"),
        ({"feature_pair": {"image_layer": 0}}, "has image_layer, which layers would replace"),
    ],
)
def test_layers_that_cannot_be_taken_are_refused(
    methods: dict[str, Any], message: str, architecture_file: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        AttributionEvaluation(str(architecture_file("vit")), None, out=tmp_path, methods=methods, layers=[(0, 0)])


def faithful_on_this_rank(config: str, world: str, out: str, trainer: dict[str, Any] | None = None) -> bool:
    methods = {"feature_pair": {"steps": 3}, "random": None}
    metrics = ["faithfulness", "insertion_deletion", "prefix_share"]
    trainer = join_lightning() if trainer is None else trainer
    evaluate(
        Path(config), data_of(Path(world), **ONE_AT_A_TIME), Path(out),
        trainer=trainer, methods=methods, metrics=metrics, seeds=1,
    )  # fmt: skip
    return True


@pytest.mark.distributed
def test_coalitions_and_curves_are_the_same_on_two_processes(
    architecture_file: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    where = (str(architecture_file("vit")), str(world))
    run_distributed(faithful_on_this_rank, *where, str(tmp_path / "two"))
    faithful_on_this_rank(*where, str(tmp_path / "one"), {})
    for name in ("values.csv", "targets.csv"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    measured = set(pd.read_csv(tmp_path / "one" / "values.csv").dropna(subset="value")["metric"])
    assert {"r2", "insertion", "prefix_share"} <= measured


# --- layers and a referee ---

SWEEP: dict[str, Any] = {
    "methods": {
        "feature_pair": {"steps": 2, "rule": "midpoint"},
        "judge": {"method": "banzhaf_pairs", "image_samples": 64, "text_samples": 32},
        "saliency": None,
    },
    "layers": {"every": 2},
    "referee": "judge",
    "metrics": ["completeness"],
}


class Swept(NamedTuple):
    encoder: DualEncoder
    out: Path


@pytest.fixture(scope="module")
def swept(architecture_file: Callable[[str], Path], world: Path, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    out = tmp_path_factory.mktemp("swept") / "out"
    return Swept(evaluate(architecture_file("vit"), data_of(world), out, **SWEEP).encoder, out)


def test_a_sweep_measures_every_pair_of_layers_as_single_runs_do(
    swept: Swept, architecture_file: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    record, _ = read_result(swept.out)
    # Of the three blocks of both towers every second and the last, which here is the same.
    pairs = ["0,0", "0,-1", "-1,0", "-1,-1"]
    assert list(record.methods) == [*(f"feature_pair,{pair}" for pair in pairs), "judge", "saliency"]
    at = {"steps": 2, "rule": "midpoint", "image_layer": -1, "text_layer": 0}
    alone: dict[str, Any] = SWEEP | {"methods": SWEEP["methods"] | {"feature_pair": at}, "layers": None}
    evaluate(architecture_file("vit"), data_of(world), tmp_path, **alone)
    for metric in ("gamma", "rho", "agreement", "completeness_error"):
        mine = numbers(swept.out, "feature_pair,-1,0", metric)
        assert mine
        assert mine == numbers(tmp_path, "feature_pair", metric)


def test_agreement_is_that_of_the_maps_that_the_methods_give_alone(swept: Swept, world: Path) -> None:
    encoder, samples = swept.encoder.eval(), samples_of(world)
    judge = BanzhafInteractions(encoder, image_samples=64, text_samples=32)
    method = FeaturePairAttribution(encoder, 0, 0, steps=2, rule="midpoint")
    rows = [row for row in rows_of(swept.out, "feature_pair,0,0", "agreement") if not row["excluded"]]
    assert len(rows) > 20
    for row in rows[:6]:
        sample, caption = samples[row["index"]], row["caption_index"]
        image, tokens = inputs_of(encoder, sample)
        (region,) = (region for region in sample.regions if region.label == row["label"])
        mask = torch.zeros(1, tokens.shape[1], dtype=torch.bool)
        mask[0, encoder.tokenizer.token_span(sample.captions[caption], region.spans[caption][0])] = True
        maps = [each.span_map(image, tokens[[caption]], mask).flatten() for each in (method, judge)]
        # Rounding may swap two of the sixteen patches.
        assert row["value"] == pytest.approx(spearmanr(*maps).statistic, abs=0.01)


def test_the_referee_is_compared_with_itself_at_its_other_seeds_only(swept: Swept) -> None:
    assert rows_of(swept.out, "judge", "agreement", seed=0) == []
    assert all(value < 1 for value in numbers(swept.out, "judge", "agreement", seed=1))
    assert numbers(swept.out, "saliency", "agreement")


def test_a_resumed_sweep_computes_the_referee_again_and_finds_the_same(
    swept: Swept, architecture_file: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    evaluate(architecture_file("vit"), data_of(world), tmp_path, trainer={"limit_test_batches": 2}, **SWEEP)
    for label in ("feature_pair,0,-1", "saliency"):  # the referee's rows stay
        for path in (tmp_path / "rows" / f"{label},seed=0").glob("*.jsonl"):
            path.unlink()
    evaluate(architecture_file("vit"), data_of(world, eval_batch_size=5), tmp_path, **SWEEP)
    assert_alike(tmp_path, swept.out)
    changed = SWEEP | {"methods": SWEEP["methods"] | {"judge": {"method": "banzhaf_pairs", "image_samples": 65}}}
    with pytest.raises(CacheError, match="image_samples was 64 and is 65"):
        evaluate(architecture_file("vit"), data_of(world), tmp_path, **changed)


def sweep_on_this_rank(config: str, world: str, out: str) -> None:
    evaluate(Path(config), data_of(Path(world)), Path(out), trainer=join_lightning(), **SWEEP)


@pytest.mark.distributed
def test_two_processes_sweep_as_one(
    swept: Swept, architecture_file: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    run_distributed(sweep_on_this_rank, str(architecture_file("vit")), str(world), str(tmp_path))
    assert_alike(tmp_path, swept.out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"referee": "absent"}, r"the referee has to be one of the methods \(feature_pair\); got 'absent'"),
        ({"layers": {"every": 0}}, r"layers are pairs such as .* got \{'every': 0\}"),
        ({"layers": {"step": 2}}, r"layers are pairs such as"),
        ({"layers": [(9, 0)]}, "layer"),
    ],
)
def test_a_sweep_that_cannot_be_made_is_refused(
    options: dict[str, Any], message: str, architecture_file: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(architecture_file("vit"), data_of(world), tmp_path, methods={"feature_pair": None}, **options)


def test_agreement_without_a_referee_is_refused(
    architecture_file: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="agreement needs a referee"):
        evaluate(architecture_file("vit"), data_of(world), tmp_path, metrics=["agreement"])
