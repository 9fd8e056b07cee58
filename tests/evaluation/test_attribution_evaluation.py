"""The whole evaluation, from shards to result files, through a real trainer."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
import torch.distributed as dist
from conftest import ARCHITECTURES
from distributed import join_lightning, run_distributed
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from lightning_xai.attribution import FeaturePairAttribution, Saliency
from lightning_xai.data import Manifest, Sample, ShardDataModule, write_shards
from lightning_xai.data.sample import HardNegative, Region, read_image
from lightning_xai.data.shapes import prepare_shapes
from lightning_xai.data.shard_reader import read_samples
from lightning_xai.evaluation import AttributionEvaluation, evaluation_cell
from lightning_xai.evaluation.result_cache import CacheError, ResultCache
from lightning_xai.metrics import gamma, patch_mask
from lightning_xai.models import DualEncoder
from lightning_xai.results.schema import TABLES, EvaluationResult, read_examples

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


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def numbers(path: Path, column: str, **where: str) -> list[float]:
    rows = [row for row in rows_of(path) if all(row[name] == value for name, value in where.items())]
    return [float(row[column]) for row in rows if row[column]]


def samples_of(folder: Path) -> list[Sample]:
    manifest = Manifest.load(folder)
    found = [sample for _, sample in read_samples(folder, manifest, range(len(manifest.shards)), 0, manifest.samples)]
    return [sample for sample in found if isinstance(sample, Sample)]


class Done(NamedTuple):
    task: AttributionEvaluation
    out: Path
    result: EvaluationResult


@pytest.fixture(scope="module")
def done(architecture_file: Callable[[str], Path], world: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    out = tmp_path_factory.mktemp("done") / "out"
    task = evaluate(architecture_file("vit"), data_of(world), out)
    assert task.result is not None
    return Done(task, out, task.result)


def inputs_of(encoder: DualEncoder, sample: Sample) -> tuple[Tensor, Tensor]:
    image = encoder.image_transform(read_image(sample.image, sample.key))[None]
    return image, encoder.tokenizer.encode(sample.captions)


def test_every_phrase_has_the_gamma_of_its_own_span_map_computed_alone(done: Done, world: Path) -> None:
    encoder, samples = done.task.encoder.eval(), samples_of(world)
    method = FeaturePairAttribution(encoder)
    rows = [row for row in rows_of(done.out / "feature_pair" / "grounding.csv") if row["reason"] == "measured"]
    assert len(rows) > 20
    for row in rows:
        sample, caption = samples[int(row["index"])], int(row["caption_index"])
        image, tokens = inputs_of(encoder, sample)
        (region,) = (region for region in sample.regions if region.label == row["label"])
        mask = torch.zeros(1, tokens.shape[1], dtype=torch.bool)
        mask[0, encoder.tokenizer.token_span(sample.captions[caption], region.spans[caption][0])] = True
        heat = method.span_map(image, tokens[[caption]], mask)
        box = encoder.boxes(torch.tensor([region.box]), sample.size)
        share = gamma(heat, patch_mask(box.float(), (4, 4), (32, 32)))
        assert float(row["gamma"]) == pytest.approx(float(share), rel=1e-4)


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
        (row,) = (
            row
            for row in rows_of(done.out / "saliency" / "confidence.csv")
            if (row["index"], row["caption_index"]) == ("5", str(caption))
        )
        expected = [cosine_similarity(pictures[i], texts[j], dim=0) for i, j in ((0, 0), (1, 0), (0, 1))]
        found = [float(row[name]) for name in ("similarity", "image_kept", "text_kept")]
        assert found == pytest.approx([float(value) for value in expected], abs=1e-5)


def test_the_numbers_are_the_means_of_the_tables(done: Done) -> None:
    for label, method in done.result.methods.items():
        folder = done.out / label
        for place, seed in enumerate(method.seeds):
            where = {"seed": str(seed)}
            found = {name: values[place] for name, values in method.metrics.items()}
            gammas = numbers(folder / "grounding.csv", "gamma", **where)
            similarity = numbers(folder / "confidence.csv", "similarity", **where)
            kept = numbers(folder / "confidence.csv", "image_kept", **where)
            iou = numbers(folder / "localization.csv", "iou", **where)
            pairs = list(zip(similarity, kept, strict=True))
            expected = {
                "gamma_mean": sum(gammas) / len(gammas),
                "gamma_above_50": sum(value > 0.5 for value in gammas) / len(gammas),
                "rho": sum(numbers(folder / "grounding.csv", "hit", **where)) / len(gammas),
                "image_drop": sum(max(0.0, o - s) for o, s in pairs) / len(pairs),
                "image_increase": sum(s > o for o, s in pairs) / len(pairs),
                "localization_iou": sum(iou) / len(iou),
            }
            if method.signed:
                other, delta = (
                    numbers(folder / f"{table}.csv", column)
                    for table, column in (("other_objects", "other"), ("hard_negatives", "delta"))
                )
                expected["other_negative"] = sum(value < 0 for value in other) / len(other)
                expected["delta_negative"] = sum(value < 0 for value in delta) / len(delta)
            assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-9)
            assert {name for name in found if name.startswith("delta")} == (
                {"delta_mean", "delta_negative"} if method.signed else set()
            )


def test_methods_that_draw_are_repeated_and_others_are_not(done: Done) -> None:
    seeds = {label: method.seeds for label, method in done.result.methods.items()}
    assert seeds == {"feature_pair": (0,), "compressed": (0, 1), "saliency": (0,)}
    repeated = done.result.methods["compressed"]
    assert repeated.method == "m2ib"
    first, second = repeated.metrics["gamma_mean"]
    assert first != second
    assert repeated.estimate("gamma_mean").standard_error == pytest.approx(abs(first - second) / 2)
    assert {row["seed"] for row in rows_of(done.out / "compressed" / "grounding.csv")} == {"0", "1"}


def test_the_files_hold_the_result_every_column_and_what_was_left_out(done: Done) -> None:
    assert EvaluationResult.load(done.out) == EvaluationResult.load(done.out)
    assert EvaluationResult.load(done.out).methods.keys() == METHODS.keys()
    for label, method in done.result.methods.items():
        tables = set(TABLES) if method.signed else {"grounding", "confidence", "localization"}
        assert {path.stem for path in (done.out / label).glob("*.csv")} == tables | {"classes"}
        for table in tables:
            lines = (done.out / label / f"{table}.csv").read_text().splitlines()
            assert tuple(lines[0].split(",")) == TABLES[table]
        counts = method.counts["grounding"]
        assert sum(counts.values()) == len(rows_of(done.out / label / "grounding.csv"))
        assert counts["measured"] == sum(
            row["reason"] == "measured" for row in rows_of(done.out / label / "grounding.csv")
        )
    assert done.result.data["samples"] == 13


def test_examples_are_the_first_some_of_each_class_and_the_worst_with_their_pictures(done: Done) -> None:
    shown = read_examples(done.out / "feature_pair")
    assert all((done.out / example.image).is_file() for example in shown)
    rows = [row for row in rows_of(done.out / "feature_pair" / "grounding.csv") if row["gamma"]]
    worst = min(rows, key=lambda row: float(row["gamma"]))
    failures = [example for example in shown if "failure" in example.why]
    assert min(example.gamma for example in failures) == pytest.approx(float(worst["gamma"]))
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
    for label in METHODS:
        for path in sorted((done.out / label).glob("*.csv")):
            ours, theirs = rows_of(tmp_path / label / path.name), rows_of(path)
            assert len(ours) == len(theirs)
            for one, other in zip(ours, theirs, strict=True):
                assert_alike(one, other)
    assert hooks_in(task.encoder) == 0


def assert_alike(one: dict[str, str], other: dict[str, str]) -> None:
    """Equal, but for rounding in numbers with a point: batches of another size are multiplied in another order."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        if "." in value and name not in ("caption", "negative_caption"):
            assert float(value) == pytest.approx(float(other[name]), rel=1e-3, abs=1e-5)
        else:
            assert value == other[name]


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
    with pytest.raises(CacheError, match=r"keep_tokens was 0.5 and is 0.25.*Choose another folder"):
        evaluate(architecture_file("vit"), data_of(world), done.out, keep_tokens=0.25)
    with pytest.raises(CacheError, match="captions_per_image was None and is 1"):
        evaluate(architecture_file("vit"), data_of(world, captions_per_image=1), done.out)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_cfg": ARCHITECTURES["vit"] | {"quick_gelu": True}}, "architecture was .* and is .*'quick_gelu': True"),
        ({"preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}, r"preprocessing was .* and is .*\[0.1, 0.2, 0.3\]"),
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
        ({"keep_tokens": 1.5}, {}, "keep_tokens has to be in"),
        ({"seeds": 0}, {}, "at least 1"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_computed(
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


def test_a_folder_that_is_a_file_is_told_early(
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
    assert task.result.methods["saliency"].metrics.keys() == {
        "image_drop", "image_increase", "text_drop", "text_increase",
    }  # fmt: skip


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
    assert task.result is not None
    counts = task.result.methods["feature_pair"].counts["hard_negatives"]
    rows = rows_of(tmp_path / "out" / "feature_pair" / "hard_negatives.csv")
    assert counts == {"measured": len(rows), "smaller_than_patch": 1, "span_cut_off": 1}
    assert rows


def test_a_metric_that_was_asked_for_and_has_no_item_is_an_error_after_all_is_written(
    architecture_file: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"no item was left to measure hard_negatives.*swap_objects"):
        evaluate(
            architecture_file("vit"), data_of(world, swap_objects=False), tmp_path, methods={"feature_pair": {}},
            metrics=["grounding", "hard_negatives"],
        )  # fmt: skip
    assert "gamma_mean" in EvaluationResult.load(tmp_path).methods["feature_pair"].metrics


def test_a_method_without_a_sign_has_nothing_where_only_signs_are_asked_for(
    architecture_file: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    both: dict[str, Any] = {"saliency": {}, "feature_pair": {}}
    task = evaluate(architecture_file("vit"), data_of(world), tmp_path, methods=both, metrics=["hard_negatives"])
    assert task.result is not None
    assert task.result.methods["saliency"].metrics == {}
    assert "delta_mean" in task.result.methods["feature_pair"].metrics
    with pytest.raises(ValueError, match=r"no item was left to measure hard_negatives.*a signed method"):
        evaluate(
            architecture_file("vit"), data_of(world), tmp_path / "unsigned", methods={"saliency": {}},
            metrics=["hard_negatives"],
        )  # fmt: skip


def test_broken_records_are_counted(architecture_file: Callable[[str], Path], world: Path, tmp_path: Path) -> None:
    samples = samples_of(world)[:6]
    torn = [Sample(s.key, s.image[:-60], s.size, s.captions, s.regions) if i == 2 else s for i, s in enumerate(samples)]
    write_shards(torn, tmp_path / "torn", name="torn", progress=False)
    data = data_of(tmp_path / "torn", max_fault_fraction=0.5)
    task = evaluate(architecture_file("vit"), data, tmp_path / "out", methods={"feature_pair": {}})
    assert task.result is not None
    assert task.result.data["broken_records"] == 1
    assert {row["index"] for row in rows_of(tmp_path / "out" / "feature_pair" / "confidence.csv")} == set("01345")


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


@pytest.mark.slow
def test_two_processes_find_what_one_finds_item_by_item(
    done: Done, architecture_file: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    one, other = run_distributed(evaluate_on_this_rank, str(architecture_file("vit")), str(world), str(tmp_path), {})
    assert one == other
    assert one["test/feature_pair/gamma_mean"] == pytest.approx(
        done.result.methods["feature_pair"].metrics["gamma_mean"][0], abs=1e-5
    )
    for label in METHODS:
        for path in sorted((done.out / label).glob("*.csv")):
            ours, theirs = rows_of(tmp_path / label / path.name), rows_of(path)
            assert len(ours) == len(theirs)
            for line, expected in zip(ours, theirs, strict=True):
                assert_alike(line, expected)
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


@pytest.mark.slow
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
    assert {Path(label, name) for label in METHODS for name in ("grounding.csv", "examples.json")} <= expected.keys()
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

    evaluation_cell.ResultCache = LateStore  # type: ignore[attr-defined]
    options = join_lightning() | {"limit_test_batches": 1}
    evaluate(Path(config), data_of(Path(world)), Path(out), trainer=options, methods={"saliency": {}})
    return found


@pytest.mark.slow
def test_a_process_that_comes_late_takes_nothing_of_the_others_for_an_earlier_run(
    architecture_file: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    where = (str(architecture_file("vit")), str(world), str(tmp_path))
    assert run_distributed(items_found_on_opening, *where) == [[0], [0]]


def is_result(path: Path) -> bool:
    return path.suffix != "" and path.parts[0] != "rows"
