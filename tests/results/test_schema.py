"""Result files: read as they were written, and refused by name where they are of another kind, broken or hostile."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from image_files import UNSAFE_NAMES

from lightning_xai.results.schema import (
    EXAMPLES_NAME,
    RESULT_NAME,
    VERSION,
    Estimate,
    EvaluationResult,
    ExampleRecord,
    MethodResult,
    ResultError,
    RoarMethod,
    RoarResult,
    check_label,
    load_result,
    package_versions,
    read_examples,
    write_examples,
    write_json,
)

EVALUATION = EvaluationResult(
    model={"name": "ViT-B-16", "parameters": 149_620_737, "pretrained": None},
    data={"name": "shapes", "samples": 3},
    settings={"keep_tokens": 0.1 + 0.2, "metrics": ["grounding"]},
    versions={"torch": "2.6.0"},
    methods={
        "feature_pair": MethodResult(
            method="feature_pair",
            options={"steps": 10, "rule": "right"},
            signed=True,
            seeds=(0,),
            metrics={"gamma_mean": (1 / 3,), "rho": (math.nan,)},
            counts={"grounding": {"measured": 3, "not_mentioned": 1}},
        ),
        "m2ib,beta=0.1": MethodResult("m2ib", {"beta": 0.1}, False, (0, 1), {"rho": (0.5, math.nan)}, {}),
    },
    speed={"pairs_per_second": 7.25},
)
ROAR = RoarResult(
    model={"name": "ViT-B-16"},
    data={"name": "shapes"},
    settings={"epochs": 5},
    versions={"torch": "2.6.0"},
    original={0: 2.0, 1: 4.0, 2: 8.0},
    methods={"m2ib": RoarMethod("m2ib", {"beta": 0.1}, {"image": {0: 3.0, 1: 3.0, 7: 1.0}, "text": {2: math.nan}})},
    missing=("m2ib/text/0",),
    grid={"beta": (0.1, 1.0), "layer": (7, 8)},
    base_loss=1.5,
)
EXAMPLE = ExampleRecord(
    why=("fixed", "failure"),
    image="examples/val_1.jpg",
    key="val_1",
    caption="a „ring“ \U0001f600 and \ud800",
    phrase="ring",
    spans=((3, 7), (20, 24)),
    label="ring",
    box=(0.0, 1.5, 3.25, 4.0),
    gamma=math.nan,
    hit=False,
    heat=((0.1 + 0.2, -1.0), (math.nan, 2e-30)),
)
Change = Callable[[dict[str, Any]], Any]


def changed(result: EvaluationResult | RoarResult, folder: Path, change: Change) -> Path:
    """A result file whose record was changed after it was written."""
    result.save(folder)
    record = json.loads((folder / RESULT_NAME).read_text(encoding="utf-8"))
    change(record)
    (folder / RESULT_NAME).write_text(json.dumps(record), encoding="utf-8")
    return folder


@pytest.mark.parametrize("result", [EVALUATION, ROAR], ids=["evaluation", "roar"])
def test_a_result_is_read_as_it_was_written(tmp_path: Path, result: EvaluationResult | RoarResult) -> None:
    folder = tmp_path / "new" / "folder"
    result.save(folder)
    assert [path.name for path in folder.iterdir()] == [RESULT_NAME]
    found = load_result(folder)
    assert type(found) is type(result)
    assert repr(found) == repr(result) == repr(type(result).load(folder))  # repr: floats in full, NaN equals itself


def test_a_result_without_anything_measured_is_one(tmp_path: Path) -> None:
    empty = EvaluationResult({}, {}, {}, {}, {})
    empty.save(tmp_path)
    assert EvaluationResult.load(tmp_path) == empty
    nothing = RoarResult({}, {}, {}, {}, {}, {})
    nothing.save(tmp_path)
    assert repr(RoarResult.load(tmp_path)) == repr(nothing)


def test_numbers_that_json_does_not_know_are_null_and_read_as_nan(tmp_path: Path) -> None:
    broken = (math.nan, math.inf, -math.inf)
    method = MethodResult("m2ib", {}, False, (0, 1, 2), {"rho": broken}, {})
    dataclasses.replace(EVALUATION, methods={"m2ib": method}, speed={"a": math.nan, "b": 1.0}).save(tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = (tmp_path / RESULT_NAME).read_text(encoding="utf-8")
    record = json.loads(text, parse_constant=refuse)
    assert record["methods"]["m2ib"]["metrics"]["rho"] == [None] * 3
    found = EvaluationResult.load(tmp_path)
    assert len(found.methods["m2ib"].metrics["rho"]) == 3
    assert all(map(math.isnan, found.methods["m2ib"].metrics["rho"]))
    assert math.isnan(found.speed["a"])
    assert found.speed["b"] == 1.0


def test_a_retraining_that_diverged_is_read_as_one(tmp_path: Path) -> None:
    methods = {"m2ib": RoarMethod("m2ib", {}, {"image": {0: math.inf, 1: 5.0}})}
    dataclasses.replace(ROAR, methods=methods, original={0: 2.0, 1: math.nan}, base_loss=math.nan).save(tmp_path)
    found = RoarResult.load(tmp_path)
    assert math.isnan(found.base_loss)
    assert all(map(math.isnan, found.score("m2ib", "image").values))


def test_a_score_is_the_relative_loss_of_the_seeds_that_have_both() -> None:
    assert ROAR.score("m2ib", "image").values == (0.5, -0.25)
    assert ROAR.score("m2ib", "sound").values == ()
    with pytest.raises(KeyError):
        ROAR.score("rise", "image")
    assert math.isnan(dataclasses.replace(ROAR, original={0: 0.0}).score("m2ib", "image").mean)


def test_estimates_agree_with_the_textbook() -> None:
    values = (0.2, 0.5, 0.3, 0.9)
    mean = sum(values) / 4
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / 3 / 4)
    assert Estimate(values).mean == pytest.approx(mean, abs=1e-15)
    assert Estimate(values).standard_error == pytest.approx(error, abs=1e-15)
    assert error == pytest.approx(statistics.stdev(values) / 2)


@pytest.mark.parametrize("values", [(), (0.5,), (0.5, math.nan)])
def test_too_few_numbers_have_no_error(values: tuple[float, ...]) -> None:
    assert math.isnan(Estimate(values).standard_error)
    assert math.isnan(Estimate(values).mean) == (values != (0.5,))


def test_a_metric_that_was_not_measured_has_no_values() -> None:
    method = EVALUATION.methods["feature_pair"]
    assert method.estimate("gamma_mean").values == (1 / 3,)
    assert method.estimate("delta_mean").values == ()


@pytest.mark.parametrize("found", [0, VERSION + 1, str(VERSION), None])
@pytest.mark.parametrize("result", [EVALUATION, ROAR], ids=["evaluation", "roar"])
def test_another_version_is_refused(tmp_path: Path, result: EvaluationResult | RoarResult, found: Any) -> None:
    folder = changed(result, tmp_path, lambda record: record.update(version=found))
    with pytest.raises(ResultError, match=rf"result\.json: schema version {found!r}, this release reads {VERSION}"):
        load_result(folder)


def test_another_kind_is_refused(tmp_path: Path) -> None:
    EVALUATION.save(tmp_path)
    with pytest.raises(ResultError, match="expected a result of kind 'roar', found 'evaluation'"):
        RoarResult.load(tmp_path)
    ROAR.save(tmp_path)
    with pytest.raises(ResultError, match="expected a result of kind 'evaluation', found 'roar'"):
        EvaluationResult.load(tmp_path)


@pytest.mark.parametrize("kind", ["pickle", None, ["roar"], {}])
def test_an_unknown_kind_is_refused(tmp_path: Path, kind: Any) -> None:
    with pytest.raises(ResultError, match="of kind 'evaluation', found"):
        load_result(changed(EVALUATION, tmp_path, lambda record: record.update(kind=kind)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "broken JSON"),
        (b'{"kind": "evaluation"', "broken JSON"),
        (b"\xff\xfe", "broken JSON"),
        (b"[" * 100_000, "broken JSON"),
        (b'{"version": ' + b"9" * 5000 + b"}", "broken JSON"),
        (b"[]", "holds a list"),
        (b"null", "holds a NoneType"),
        (b"{}", "kind"),
    ],
    ids=range(8),
)
def test_what_is_no_result_file_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    for name in (RESULT_NAME, EXAMPLES_NAME):
        (tmp_path / name).write_bytes(text)
    for load in (load_result, EvaluationResult.load, RoarResult.load):
        with pytest.raises(ResultError, match=rf"{RESULT_NAME}: .*{message}"):
            load(tmp_path)
    with pytest.raises(ResultError, match=rf"{EXAMPLES_NAME}: "):
        read_examples(tmp_path)


def test_a_folder_without_a_result_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="not found; give the folder of a finished run"):
        load_result(tmp_path)
    (tmp_path / RESULT_NAME).mkdir()
    with pytest.raises(ResultError, match=RESULT_NAME):
        load_result(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("model"),
        lambda record: record.pop("speed"),
        lambda record: record.update(methods=[]),
        lambda record: record.update(methods="abc"),
        lambda record: record.update(settings=7),
        lambda record: record["methods"]["feature_pair"].pop("seeds"),
        lambda record: record["methods"]["feature_pair"].update(seeds=["one"]),
        lambda record: record["methods"]["feature_pair"].update(seeds=[math.inf]),
        lambda record: record["methods"]["feature_pair"].update(seeds=None),
        lambda record: record["methods"]["feature_pair"].update(metrics=[1.0]),
        lambda record: record["methods"]["feature_pair"].update(metrics={"rho": 1.0}),
        lambda record: record["methods"]["feature_pair"].update(metrics={"rho": ["high"]}),
        lambda record: record["methods"]["feature_pair"].update(metrics={"rho": [10**400]}),
        lambda record: record["methods"]["feature_pair"].update(counts={"grounding": 3}),
        lambda record: record["methods"]["feature_pair"].update(counts={"grounding": {"measured": math.inf}}),
        lambda record: record["methods"].update(other=None),
        lambda record: record.update(speed={"pairs": "many"}),
    ],
    ids=range(17),
)
def test_fields_that_are_missing_or_of_the_wrong_type_are_refused(tmp_path: Path, change: Change) -> None:
    with pytest.raises(ResultError, match=r"result\.json: field missing or of the wrong type"):
        load_result(changed(EVALUATION, tmp_path, change))


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("missing"),
        lambda record: record.update(original=[1.0]),
        lambda record: record.update(original={"first": 1.0}),
        lambda record: record.update(base_loss="low"),
        lambda record: record.update(grid={"beta": 1}),
        lambda record: record["methods"]["m2ib"].update(losses={"image": [1.0]}),
        lambda record: record["methods"]["m2ib"].update(losses={"image": {"0": "low"}}),
        lambda record: record["methods"]["m2ib"].update(losses={"image": {"0": 10**400}}),
    ],
    ids=range(8),
)
def test_fields_of_roar_that_are_missing_or_of_the_wrong_type_are_refused(tmp_path: Path, change: Change) -> None:
    with pytest.raises(ResultError, match=r"result\.json: field missing or of the wrong type"):
        load_result(changed(ROAR, tmp_path, change))


@pytest.mark.parametrize(
    "label", ["..", ".", "a/b", "../a", "/etc", "a\\b", "C:a", "", "a b", "a\0", "a\n", "é", "a" * 121]
)
@pytest.mark.parametrize("result", [EVALUATION, ROAR], ids=["evaluation", "roar"])
def test_labels_that_would_leave_the_folder_are_refused(
    tmp_path: Path, result: EvaluationResult | RoarResult, label: str
) -> None:
    with pytest.raises(ValueError, match="a label has 1 to 120 letters"):
        check_label(label)
    with pytest.raises(ResultError, match="a label has 1 to 120 letters"):
        load_result(
            changed(result, tmp_path, lambda record: record["methods"].update({label: record["methods"].popitem()[1]}))
        )


@pytest.mark.parametrize("label", ["a", "a" * 120, "m2ib,beta=0.1", "...a", "-x+1_2"])
def test_plain_labels_are_taken(label: str) -> None:
    assert check_label(label) == label


def test_examples_are_read_as_they_were_written(tmp_path: Path) -> None:
    other = dataclasses.replace(EXAMPLE, gamma=0.25, hit=True, spans=(), heat=((1.0,),))
    write_examples(tmp_path / "label", [EXAMPLE, other])
    assert repr(read_examples(tmp_path / "label")) == repr([EXAMPLE, other])


def test_no_file_is_no_examples(tmp_path: Path) -> None:
    assert read_examples(tmp_path) == []
    write_examples(tmp_path, [])
    assert read_examples(tmp_path) == []


@pytest.mark.parametrize("image", UNSAFE_NAMES)
def test_a_picture_outside_of_the_folder_is_refused(tmp_path: Path, image: str) -> None:
    image = image.replace("{absolute}", str(tmp_path / "secret.jpg"))
    write_examples(tmp_path, [EXAMPLE, dataclasses.replace(EXAMPLE, image=image)])
    with pytest.raises(ResultError, match="lies outside of the evaluation's folder"):
        read_examples(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("why", None),
        ("image", None),
        ("spans", [[1]]),
        ("spans", [["a", "b"]]),
        ("spans", [[0, math.inf]]),
        ("box", [0, 1, 2]),
        ("box", None),
        ("box", [0, 1, 2, 10**400]),
        ("gamma", "high"),
        ("gamma", []),
        ("heat", 3),
        ("heat", [3]),
        ("heat", [["hot"]]),
    ],
)
def test_examples_of_the_wrong_type_are_refused(tmp_path: Path, field: str, value: Any) -> None:
    write_examples(tmp_path, [EXAMPLE])
    record = json.loads((tmp_path / EXAMPLES_NAME).read_text(encoding="utf-8"))
    if value is None:
        del record["examples"][0][field]
    else:
        record["examples"][0][field] = value
    (tmp_path / EXAMPLES_NAME).write_text(json.dumps(record))
    with pytest.raises(ResultError, match=r"examples\.json: field missing or of the wrong type.*evaluate again"):
        read_examples(tmp_path)


@pytest.mark.parametrize(
    "change", [{"version": VERSION + 1}, {"examples": 3}, {"examples": {"a": 1}}, {"examples": [1]}]
)
def test_files_of_examples_of_another_form_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / EXAMPLES_NAME).write_text(json.dumps({"version": VERSION, "examples": []} | change))
    with pytest.raises(ResultError, match=EXAMPLES_NAME):
        read_examples(tmp_path)


def test_json_is_plain_whatever_the_keys_and_values_are(tmp_path: Path) -> None:
    record: dict[Any, Any] = {"path": Path("x"), 3: (1, {4: math.inf}), "text": "ä\ud800"}
    write_json(tmp_path / "a.json", record)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"path": "x", "3": [1, {"4": None}], "text": "ä\ud800"}
    assert "ä" in text
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_versions_are_those_of_this_process() -> None:
    found = package_versions()
    assert found["torch"] == version("torch")
    assert found["lightning_xai"] == version("lightning_xai")
    assert found["python"].count(".") == 2
