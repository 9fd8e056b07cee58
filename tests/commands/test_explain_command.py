"""`explain` through the command line's own function: arrays, settings, lists, and messages about bad input."""

from __future__ import annotations

import ast
import base64
import csv
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lightning_xai.attribution import (
    METHODS,
    RISE,
    Attribution,
    AttributionMethod,
    ConstantMapWarning,
    Contrast,
    FeaturePairAttribution,
    Probability,
    Saliency,
    SimilarityGradCAM,
)
from lightning_xai.cli import main
from lightning_xai.commands.outputs import shown_tokens
from lightning_xai.data import CaptionTokenizer
from lightning_xai.models import (
    DualEncoder,
    UnsupportedTowerError,
    load_clap,
    load_dual_encoder,
    load_imagebind,
    save_open_clip,
)
from lightning_xai.models.towers import VisionTransformerAtLayer
from lightning_xai.report.explanation import comparison_sheet

Explained = Callable[..., tuple[dict[str, NDArray[Any]], Any]]
CAPTION = "a red ring and a blue ring"
INPUTS, LAST = "feature_pair,0,0/", "feature_pair,2,2/"  # the two readings of the small model's 3 + 3 blocks
SIZE = (48, 64)  # the encoder sees 32 x 32: the upper and lower 5 of 42 rows are cropped


class Constant(AttributionMethod):
    """Says the same of every part."""

    def _attribute(self, images: Tensor, tokens: Tensor) -> Attribution:
        own = self.encoder.own_similarity(images, tokens)
        return Attribution(torch.ones(len(images), 4, 4), torch.ones(tokens.shape), own)


class Supporting(AttributionMethod):
    """Knows a sign, and finds nothing that speaks against a caption."""

    signed = True

    def _attribute(self, images: Tensor, tokens: Tensor) -> Attribution:
        own = self.encoder.own_similarity(images, tokens)
        return Attribution(1 + torch.rand(len(images), 4, 4), 1 + torch.rand(tokens.shape), own)


class Unsupported(AttributionMethod):
    def __init__(self, encoder: DualEncoder, *, internal_batch_size: int | None = None) -> None:
        raise UnsupportedTowerError("this tower has no attention; saliency serves it")

    def _attribute(self, images: Tensor, tokens: Tensor) -> Attribution:
        raise AssertionError


@pytest.fixture(scope="module")
def model(architecture_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that choose a small model, the same in every call."""
    torch.manual_seed(0)
    encoder = load_dual_encoder(architecture_file("vit"))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    weights = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_open_clip(encoder, weights)
    return ["--model.name", str(architecture_file("vit")), "--model.pretrained", str(weights), "--model.device", "cpu"]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return picture(tmp_path / "picture.png", 0)


def picture(path: Path, seed: int, size: tuple[int, int] = SIZE) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def explain(*options: object) -> None:
    main(["explain", *map(str, options)])


def message_of(*options: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        explain(*options)
    assert isinstance(stopped.value.code, str), "a traceback or a usage text, not a message"
    return stopped.value.code


def arrays_of(folder: Path) -> dict[str, NDArray[Any]]:
    with np.load(folder / "attribution.npz", allow_pickle=False) as file:
        return dict(file)


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "explanation.json").read_text(encoding="utf-8"))
    return record


def page_of(path: Path) -> dict[str, Any]:
    """What an explorer's page shows."""
    (found,) = re.findall('<script type="application/json">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)
    data: dict[str, Any] = json.loads(found)
    return data


def loaded(model: Sequence[str]) -> DualEncoder:
    return load_dual_encoder(model[1], model[3]).eval()


def inputs(encoder: DualEncoder, path: Path, caption: str = CAPTION) -> tuple[Tensor, Tensor]:
    with Image.open(path) as opened:
        pixels = encoder.image_transform(opened.convert("RGB"))
    return pixels[None], encoder.tokenizer.encode([caption])


def assert_equal(arrays: dict[str, NDArray[Any]], result: Attribution, prefix: str = "") -> None:
    for name in ("image", "text", "interactions", "prefix", "similarity", "completeness_error"):
        expected = getattr(result, name)
        assert (prefix + name in arrays) == (expected is not None)
        if expected is not None:
            np.testing.assert_allclose(arrays[prefix + name], expected[0], rtol=1e-4, atol=1e-6)


def of(arrays: dict[str, NDArray[Any]], reading: str) -> dict[str, NDArray[Any]]:
    """The arrays of one reading, by their plain names."""
    return {name.removeprefix(reading): values for name, values in arrays.items() if name.startswith(reading)}


@pytest.fixture
def explained(model: list[str], image: Path, tmp_path: Path) -> Explained:
    """Explain `image` and CAPTION with some options; returns arrays and record."""

    def run(*options: object) -> tuple[dict[str, NDArray[Any]], Any]:
        explain("--image", image, "--caption", CAPTION, *model, "--out", tmp_path / "out", *options)
        return arrays_of(tmp_path / "out"), record_of(tmp_path / "out")

    return run


# --- one image ---


def test_the_arrays_are_those_of_the_method_and_the_span_chooses_the_map(
    explained: Explained, model: list[str], image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (arrays, _), out, encoder = explained("--span", "Blue  RING", "--at-inputs"), tmp_path / "out", loaded(model)
    assert arrays["tokens"].tolist() == encoder.tokenizer.encode([CAPTION])[0].tolist()
    assert arrays["span_mask"].nonzero()[0].tolist() == [6, 7]
    for reading, method in (
        (INPUTS, FeaturePairAttribution(encoder, 0, 0, rule="midpoint")),
        (LAST, FeaturePairAttribution(encoder)),
    ):
        result, found = method.attribute(*inputs(encoder, image)), of(arrays, reading)
        assert_equal(found, result)
        expected = result.interactions[0, 6] + result.interactions[0, 7]
        np.testing.assert_allclose(found["shown_image"], expected, atol=1e-6)
        np.testing.assert_array_equal(found["shown_text"], found["text"])
    assert Image.open(out / "explanation.png").size[0] > 800
    said = capsys.readouterr().out
    assert f"Saved {out / 'explanation.png'}" in said
    assert "--at-inputs" not in said
    assert sorted(path.name for path in out.iterdir()) == [
        "attribution.npz",
        "explanation.html",
        "explanation.json",
        "explanation.png",
    ]


def test_layers_that_are_given_are_the_only_ones_and_no_layer_0_means_the_first(
    explained: Explained, architecture_file: Callable[[str], Path], image: Path, tmp_path: Path
) -> None:
    arrays, record = explained("--options.image_layer", "0")
    method = record["methods"]["feature_pair"]
    assert (method["where"], method["options"]["rule"]) == ("layers (0, 2)", "right")
    assert "interactions" in arrays
    resnet = ["--model.name", str(architecture_file("resnet")), "--model.device", "cpu"]
    explain("--image", image, "--caption", CAPTION, *resnet, "--at-inputs", "--out", tmp_path / "resnet")
    methods = record_of(tmp_path / "resnet")["methods"]
    assert [each["where"] for each in methods.values()] == ["first layers (1, 0)", "last blocks (4, 2)"]


@pytest.mark.parametrize("options", [[], ["--options.image_layer", "-1", "--options.text_layer", "-1"]])
def test_last_blocks_cost_no_pass_of_the_others_and_as_the_default_name_the_inputs(
    explained: Explained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    layers, embed_from = set[int](), VisionTransformerAtLayer.embed_from

    def embed(self: VisionTransformerAtLayer, *given: Tensor) -> Tensor:
        layers.add(self.layer)
        return embed_from(self, *given)

    monkeypatch.setattr(VisionTransformerAtLayer, "embed_from", embed)
    _, record = explained(*options)
    assert [method["where"] for method in record["methods"].values()] == ["last blocks (2, 2)"]
    assert layers == {2}
    hint = "feature_pair is read at the last blocks (2, 2); --at-inputs adds the inputs of both towers"
    assert (hint in capsys.readouterr().out) is not bool(options)


def test_every_occurrence_of_the_span_counts(explained: Explained) -> None:
    arrays, record = explained("--span", "ring")
    assert record["span"] == {
        "phrase": "ring", "characters": [[6, 10], [22, 26]], "positions": [3, 7], "tokens": ["ring", "ring"],
    }  # fmt: skip
    np.testing.assert_allclose(arrays["shown_image"], arrays["interactions"][[3, 7]].sum(axis=0), atol=1e-7)


def test_a_box_goes_through_the_transform_and_its_patches_colour_the_tokens(
    explained: Explained, model: list[str]
) -> None:
    # Two thirds of 48 x 64 pixels, less the 5 rows cropped above: x from 16 to 32 are the patches 2 and 3 across, y
    # from 3 to 19 the patches 0 and 1 down.
    arrays, record = explained("--box", "24,12.5,24,24")
    expected = np.zeros((4, 4), dtype=bool)
    expected[0:2, 2:4] = True
    np.testing.assert_array_equal(arrays["box_mask"], expected)
    shown = arrays["interactions"][:, 0:2, 2:4].sum(axis=(1, 2))
    np.testing.assert_allclose(arrays["shown_text"], shown, atol=1e-7)
    np.testing.assert_array_equal(arrays["shown_image"], arrays["image"])
    boxes = loaded(model).image_transform.boxes(torch.tensor([[24.0, 12.5, 24.0, 24.0]]), SIZE)
    assert record["box"]["x,y,width,height"] == [24, 12.5, 24, 24]
    np.testing.assert_allclose(record["box"]["x0,y0,x1,y1 transformed"], boxes[0])


def test_the_record_has_every_setting_with_defaults_resolved(
    explained: Explained, model: list[str], image: Path
) -> None:
    arrays, record = explained("--options.steps", "4", "--options.rule", "midpoint")
    assert (record["span"], "span_mask" in arrays) == (None, False)
    assert arrays.keys() == record["arrays"].keys()
    assert record["model"] | {"parameters": 0} == {
        "name": model[1], "pretrained": model[3], "device": "cpu", "architecture": "vit", "image_size": [32, 32],
        "context_length": 16, "parameters": 0, "random_weights_seed": None,
        "preprocessing": loaded(model).preprocessing,
    }  # fmt: skip
    assert record["command"]["options"] == {"steps": 4, "rule": "midpoint"}
    assert record["image"] == str(image)
    assert record["image_size"] == list(SIZE)
    assert record["caption"] == CAPTION
    assert record["token_strings"][1:-1] == CAPTION.split()
    assert {"python", "torch", "lightning_xai", "captum", "open_clip_torch"} <= record["versions"].keys()
    method = record["methods"]["feature_pair"]
    assert method["where"] == "last blocks (2, 2)"
    assert method["layers"] == {"image": 2, "text": 2}
    assert method["options"] == {
        "image_layer": -1, "text_layer": -1, "steps": 4, "rule": "midpoint", "preset": "paper",
        "image_reference": "zeros",
        "text_reference": "padding", "internal_batch_size": None,
    }  # fmt: skip
    assert method["similarity"] == pytest.approx(float(arrays["similarity"]))
    assert method["completeness_error"] == pytest.approx(float(arrays["completeness_error"]))
    assert method["patches"] == [4, 4]
    assert method["scale"] == "signed"
    assert method["range"]["image"] == pytest.approx([arrays["shown_image"].min(), arrays["shown_image"].max()])
    encoder = loaded(model)
    assert_equal(arrays, FeaturePairAttribution(encoder, steps=4, rule="midpoint").attribute(*inputs(encoder, image)))


def test_options_are_also_taken_as_json_and_the_scale_follows_the_method(
    explained: Explained, model: list[str], image: Path
) -> None:
    arrays, record = explained("--method=rise", "--options", '{"image_masks": 9, "text_masks": 5, "seed": 3}')
    encoder = loaded(model)
    assert_equal(arrays, RISE(encoder, image_masks=9, text_masks=5, seed=3).attribute(*inputs(encoder, image)))
    assert record["methods"]["rise"]["scale"] == "range"
    record = explained("--method=saliency")[1]["methods"]["saliency"]
    assert (record["scale"], record["completeness_error"]) == ("positive", None)


def test_maps_of_a_signed_method_are_drawn_with_their_sign_also_where_nothing_is_negative(
    explained: Explained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_xai.attribution.method_options.METHODS", {**METHODS, "supporting": Supporting})
    record = explained("--method=supporting")[1]["methods"]["supporting"]
    assert record["range"]["image"][0] > 0
    assert record["scale"] == "signed"


def test_constant_maps_are_warned_of_and_in_a_list_counted_and_named(
    model: list[str], image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightning_xai.attribution.method_options.METHODS", {**METHODS, "constant": Constant})
    with pytest.warns(ConstantMapWarning, match="image map of pair"):
        explain("--image", image, "--caption", CAPTION, "--method", "constant", *model, "--out", tmp_path / "one")
    faults = record_of(tmp_path / "one")["methods"]["constant"]["fault"]
    assert faults == {"image": "constant map", "text": "constant map"}
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(3):
        picture(folder / f"{i}.png", i)
    command = ["--image", folder, "--caption", CAPTION, *model, "--batch-size", "2"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConstantMapWarning)
        explain(*command, "--method", "constant", "--out", tmp_path / "constant")
    assert "Constant maps in 3 rows" in capsys.readouterr().out
    explain(*command, "--out", tmp_path / "real")
    assert "Constant maps" not in capsys.readouterr().out
    for name, faults in (("constant", ["image: constant map; text: constant map"] * 3), ("real", [""] * 3)):
        with (tmp_path / name / "summary.csv").open(newline="") as file:
            assert [row["fault"] for row in csv.DictReader(file)] == faults


# --- every method ---


def test_all_methods_share_a_sheet_and_those_that_do_not_serve_the_model_are_named(
    explained: Explained,
    model: list[str],
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    some: dict[str, type[AttributionMethod]] = {
        "similarity_grad_cam": SimilarityGradCAM, "unsupported": Unsupported, "saliency": Saliency, "rise": RISE,
    }  # fmt: skip
    monkeypatch.setattr("lightning_xai.attribution.method_options.METHODS", some)
    options = "--options.rise.image_masks 9 --options.rise.text_masks 5 --options.internal_batch_size 2"
    arrays, record = explained("--method", "all", *options.split())
    encoder = loaded(model)
    pair = inputs(encoder, image)
    assert_equal(arrays, SimilarityGradCAM(encoder).attribute(*pair), "similarity_grad_cam/")
    assert_equal(arrays, Saliency(encoder).attribute(*pair), "saliency/")
    assert_equal(arrays, RISE(encoder, image_masks=9, text_masks=5).attribute(*pair), "rise/")
    assert list(record["methods"]) == ["similarity_grad_cam", "saliency", "rise"]
    assert [each["options"]["internal_batch_size"] for each in record["methods"].values()] == [2, 2, 2]
    assert record["methods"]["rise"]["options"]["image_masks"] == 9
    assert record["not_served"] == {"unsupported": "this tower has no attention; saliency serves it"}
    assert "Skipped unsupported: this tower has no attention" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="saliency serves it; other methods: similarity_grad_cam, saliency, rise"):
        explained("--method", "unsupported")


def test_the_page_shows_the_values_of_the_arrays(explained: Explained, tmp_path: Path) -> None:
    for given in (("--span", "blue ring"), ("--box", "24,12.5,24,24", "--against", "a <b>dog</b>")):
        arrays, record = explained(*given, "--at-inputs")
        (item,) = page_of(tmp_path / "out" / "explanation.html")["items"]
        own, *others = item["captions"]
        x0, y0, x1, y1 = item["frame"]  # of 48 x 64 pixels the model sees all columns and 32 of 42 rows
        assert (x0, x1, y0 + y1) == pytest.approx((0, 1, 1), abs=0.02)
        assert y0 == pytest.approx(5 / 42, abs=0.01)
        assert [token["text"] for token in own["tokens"] if token["marked"]] == (["blue", "ring"] if not others else [])
        assert item["asksBox"] == ("--box" in given)
        assert [other["text"] for other in others] == record.get("against", [])
        for reading, name in zip(own["readings"], (INPUTS, LAST), strict=True):
            found = of(arrays, name)
            pairs = np.frombuffer(base64.b64decode(reading["pairs"]), "<i2").reshape(-1, *reading["grid"])
            np.testing.assert_allclose(pairs * reading["step"], found["interactions"][1:8], atol=reading["step"])
            image = np.frombuffer(base64.b64decode(reading["image"]), "<f4").reshape(reading["grid"])
            np.testing.assert_array_equal(image, found["image"])
            text = np.frombuffer(base64.b64decode(reading["text"]), "<f4")
            np.testing.assert_array_equal(text, found["text"][1:8])
            assert reading["similarity"] == pytest.approx(found["similarity"].item())
            assert reading["error"] == pytest.approx(found["completeness_error"].item())
            marks = found["text"][[0, *range(8, len(found["text"]))]].sum()
            assert f"marks of start and end of the text, {marks:+.2g} together" in reading["note"]
        for other in others:
            assert other["readings"][1]["similarity"] == pytest.approx(arrays[f"{LAST}against_similarity"][0].item())


# --- one caption rather than another ---


def test_captions_are_compared_by_every_method_and_named_with_their_similarities(
    explained: Explained, model: list[str], image: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    others = ["a blue ring and, a red [ring]", "a dog"]
    given = [option for other in others for option in ("--against", other)]
    arrays, record = explained(*given)
    encoder = loaded(model)
    result = FeaturePairAttribution(encoder).attribute(*inputs(encoder, image), Contrast(others))
    assert_equal(arrays, result)
    assert result.explained is not None
    assert result.others is not None
    for name, expected in (
        ("explained", result.explained),
        ("against_similarity", result.others.similarity),
        ("against_text", result.others.text),
        ("against_interactions", result.others.interactions),
        ("against_tokens", encoder.tokenizer.encode(others)[None]),
    ):
        assert isinstance(expected, Tensor)
        np.testing.assert_allclose(arrays[name], expected[0], rtol=1e-4, atol=1e-6)
    assert record["against"] == others
    own = record["methods"]["feature_pair"]
    assert own["target"] == {
        "name": "contrast", "options": {"weight": "mean"}, "value": pytest.approx(result.explained.item(), abs=1e-5),
    }  # fmt: skip
    assert [other["caption"] for other in own["against"]] == others
    some: dict[str, type[AttributionMethod]] = {"rollout": METHODS["rollout"], "saliency": Saliency}
    monkeypatch.setattr("lightning_xai.attribution.method_options.METHODS", some)
    arrays, record = explained(*given, "--method", "all", "--target", "probability")
    assert list(record["methods"]) == ["saliency"]
    assert "does not explain the target Probability: take" in record["not_served"]["rollout"]
    probability = Saliency(encoder).attribute(*inputs(encoder, image), Probability(others))
    np.testing.assert_allclose(arrays["saliency/image"], probability.image[0], rtol=1e-4, atol=1e-6)


def test_a_list_compares_each_caption_with_its_own_others(model: list[str], tmp_path: Path) -> None:
    rows = ["image,caption,against", "0.png,a ring,a dog | two rings", "1.png,a ring,", "2.png,a ring,A Ring"]
    for i in range(3):
        picture(tmp_path / f"{i}.png", i)
    (tmp_path / "list.csv").write_text("\n".join(rows))
    explain("--image", tmp_path / "list.csv", *model, "--out", tmp_path / "out", "--method", "saliency")
    with (tmp_path / "out" / "summary.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["against"] for row in found] == ["a dog | two rings", "", "A Ring"]
    assert [row["skipped"][:44] for row in found] == ["", "", "the caption to compare with (--against) 'A R"]
    encoder = loaded(model)
    expected = Saliency(encoder).attribute(
        *inputs(encoder, tmp_path / "0.png", "a ring"), Contrast(["a dog", "two rings"])
    )
    np.testing.assert_allclose(arrays_of(tmp_path / "out" / "0000-0")["image"], expected.image[0], rtol=1e-4, atol=1e-6)
    assert "against_text" not in arrays_of(tmp_path / "out" / "0001-1")


def test_the_title_says_which_mean_of_the_others_is_subtracted(
    explained: Explained, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []

    def sheet(*given: Any, asked: str, **more: Any) -> Any:
        titles.append(asked)
        return comparison_sheet(*given, asked=asked, **more)

    monkeypatch.setattr("lightning_xai.commands.explain_pair.comparison_sheet", sheet)
    two = ["--method", "saliency", "--against", "a dog", "--against", "two rings"]
    explained(*two)
    explained(*two, "--target_options.weight", "softmax")
    assert [re.findall(r"\(.*\)", title) for title in titles] == [["(mean of 2)"], ["(softmax mean of 2)"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--against", ""], "a caption to compare with (--against) is empty"),
        (["--against", CAPTION.upper()], "is the same as the caption to the model, which reads 16 tokens"),
        (["--against", "a dog", "--span", "ring"], "--span asks about a phrase within its caption"),
        (["--against", "a dog", "--target", "similarity"], "compared by: contrast, probability; got 'similarity'"),
        (["--target", "probability"], "--target is of captions that are compared: give --against TEXT"),
        (
            ["--against", "a dog", "--target", "probability"],
            "methods that explain it: m2ib, grad_cam, attention_relevance",
        ),
        (["--against", "a dog", "--method", "rollout"], "methods that explain it: feature_pair, m2ib, grad_cam"),
        (["--against", "a dog", "--target_options.scale", "2"], "contrast has no option scale; it has weight"),
        (["--against", "a dog", "--target_options.weight", "max"], "--target_options of contrast: "),
    ],
    ids=["empty", "same", "span", "similarity", "nothing", "refused", "rollout", "option", "value"],
)
def test_comparisons_of_captions_of_no_use_are_reported(
    model: list[str], image: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    given = ["--image", image, "--caption", CAPTION, *model, "--out", tmp_path / "out"]
    assert message in message_of(*given, *options)


# --- two of a kind ---


def test_another_image_is_compared_with_the_box_of_the_first(
    model: list[str], image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = picture(tmp_path / "other.jpg", 1, (40, 40))
    given = ["--image", image, "--other-image", other, *model]
    explain(*given, "--out", tmp_path / "whole")
    explain(*given, "--box", "24,12.5,24,24", "--out", tmp_path / "box")
    encoder = loaded(model)
    first, second = (inputs(encoder, path)[0] for path in (image, other))
    result = FeaturePairAttribution(encoder).attribute_images(first, second)
    whole, box = arrays_of(tmp_path / "whole"), arrays_of(tmp_path / "box")
    np.testing.assert_allclose(whole["interactions"], result.interactions[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(whole["first"], result.first[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(whole["shown_second"], result.second[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(box["shown_second"], whole["interactions"][0:2, 2:4].sum(axis=(0, 1)), atol=1e-6)
    record = record_of(tmp_path / "box")
    assert record["images"] == [str(image), str(other)]
    assert record["box"] == "24,12.5,24,24"
    assert record["methods"]["feature_pair"]["similarity"] == pytest.approx(result.similarity.item(), abs=1e-5)
    assert (tmp_path / "box" / "explanation.png").is_file()
    assert "Saved" in capsys.readouterr().out


def test_another_caption_is_compared_with_the_span_of_the_first(model: list[str], tmp_path: Path) -> None:
    given = ["--caption", CAPTION, "--other_caption", "two circles", *model]
    explain(*given, "--out", tmp_path / "whole")
    explain(*given, "--span", "blue ring", "--out", tmp_path / "span")
    encoder = loaded(model)
    tokens = encoder.tokenizer.encode([CAPTION, "two circles"])
    result = FeaturePairAttribution(encoder).attribute_texts(tokens[:1], tokens[1:])
    whole, span = arrays_of(tmp_path / "whole"), arrays_of(tmp_path / "span")
    np.testing.assert_allclose(whole["interactions"], result.interactions[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(whole["shown_second"], result.second[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(span["shown_second"], whole["interactions"][6] + whole["interactions"][7], atol=1e-6)
    assert span["other_tokens"].tolist() == tokens[1].tolist()
    assert record_of(tmp_path / "span")["positions"] == [6, 7]
    assert record_of(tmp_path / "span")["where"] == "at the last block (2)"
    assert (tmp_path / "span" / "explanation.png").is_file()


# --- lists ---


def test_a_list_explains_what_it_can_and_counts_the_rest(
    model: list[str], image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "second.jpg", 1, (64, 40))
    (tmp_path / "broken.png").write_bytes(b"no image")
    lines = [
        ("image", "caption", "span", "box"),
        ("picture.png", CAPTION, "red ring", ""),
        ("gone.png", CAPTION, "", ""),
        ("broken.png", CAPTION, "", ""),
        ("picture.png", CAPTION, "cat", ""),
        ("second.jpg", "a cat, and a dog", "", "0,0,99,99"),
        ("second.jpg", "a cat, and a dog", "", "12,0,40,20"),
        ("second.jpg", " ", "", ""),
        ("second.jpg", "a cat", "", "1,2,3"),
    ]
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    out = tmp_path / "out"
    explain("--image", tmp_path / "list.csv", *model, "--batch-size", 3, "--out", out)
    with (out / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"][:4] for row in rows] == [f"{i:04d}" for i in range(8)]
    reasons = [row["skipped"] for row in rows]
    assert [i for i, reason in enumerate(reasons) if not reason] == [0, 5]
    expected = ["cannot be read", "does not decode", "'cat' is not in the caption", "64 x 40 pixels"]
    assert all(part in reason for part, reason in zip(expected, reasons[1:5], strict=True))
    assert "is empty" in reasons[6]
    assert "such as 10,20,64,48" in reasons[7]
    said = capsys.readouterr().out
    assert "Saved explanations of 2 of 8 entries" in said
    assert "and 1 more" in said
    explain("--image", image, "--caption", CAPTION, "--span", "red ring", *model, "--out", tmp_path / "alone")
    alone, listed = arrays_of(tmp_path / "alone"), arrays_of(out / "0000-picture")
    assert alone.keys() == listed.keys()
    for name, values in alone.items():
        np.testing.assert_allclose(listed[name], values, rtol=1e-4, atol=1e-6)
    assert float(rows[0]["similarity"]) == pytest.approx(float(alone["similarity"]), abs=1e-5)
    assert sorted(path.name for path in out.iterdir()) == [
        "0000-picture",
        "0005-second",
        "explanations.html",
        "summary.csv",
    ]
    explain("--image", tmp_path / "list.csv", *model, "--at-inputs", "--out", out)
    with (out / "summary.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if not row["skipped"]]
    assert [row["method"] for row in rows] == [INPUTS[:-1], LAST[:-1]] * 2
    assert (out / "0005-second" / "explanation.png").is_file()
    page = page_of(out / "explanations.html")
    assert [item["key"] for item in page["items"]] == ["picture.png", "second.jpg"]
    assert page["mode"] == "strip"


def test_a_folder_takes_one_caption_for_all_or_a_list_of_them(model: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(2):
        picture(folder / f"{i}.png", i)
    (folder / "notes.txt").write_text("no image")
    explain("--image", folder, "--caption", CAPTION, *model, "--out", tmp_path / "one")
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "0000-0",
        "0001-1",
        "explanations.html",
        "summary.csv",
    ]
    (tmp_path / "captions.csv").write_text("\ufeffimage,caption\n1.png,a cat\n1.png,a dog\n", encoding="utf-8")
    explain("--image", folder, "--captions", tmp_path / "captions.csv", *model, "--out", tmp_path / "two")
    records = [record_of(tmp_path / "two" / name) for name in ("0000-1", "0001-1")]
    assert [record["caption"] for record in records] == ["a cat", "a dog"]
    assert records[0]["image"] == str(folder / "1.png")


# --- bad input ---


BAD: dict[str, dict[str, str]] = {
    "spans": {
        "--span=cat": f"the span 'cat' is not in the caption: {CAPTION!r}",
        "--span=in": f"the span 'in' is not in the caption as whole words: {CAPTION!r}",
        "--span= ": "the span is empty",
        "--caption=  ": "is empty",
        "--caption=&nbsp;": "nothing of the caption",
    },
    "boxes": {
        "--box=0,0,90,9": "the box 0,0,90,9 (x,y,width,height) leaves the image, which has 48 x 64 pixels",
        "--box=0,0,9,4": "nothing of the box 0,0,9,4 is left of an image of 48 x 64 pixels",
        "--box=0,0,nan,9": "a box needs a positive width and height",
        "--box=1,2": "a box is x,y,width,height in pixels, such as 10,20,64,48; got '1,2'",
    },
    "methods": {
        "--method=magic": "unknown method 'magic'; there are feature_pair, ",
        "--method=saliency --span=ring": "--span needs a method with token-patch attributions",
        "--method=all --box=0,0,9,9": "--box needs a method with token-patch attributions",
        "--options.stepz=9": "feature_pair has no option stepz; it has image_layer, text_layer, steps",
        "--options.steps=many": '--options of feature_pair: "steps": expected int; got many',
        "--options.preset=fsat": "\"preset\": expected one of 'paper', 'fast', 'inputs'; got fsat",
        "--options.rule=mid": "\"rule\": expected one of 'right', 'left', 'midpoint', 'trapezoid', 'gauss_legendre'",
        "--options.image_reference=grey": "expected one of 'zeros', 'black', 'features'; got grey",
        "--options.image_reference=3": "expected one of 'zeros', 'black', 'features'; got 3",
        "--options.image_layer=a": '"image_layer": expected int; got a',
        "--options.steps=0": "needs at least 1 integration step(s); got steps=0",
        "--options.image_layer=7": "layers 0 to 2 (or -3 to -1), and 3, the head where it pools tokens; got layer 7",
        "--method=all --options.stepz=9": "no method has the option stepz",
        "--method=all --options.rise=9": "--options.rise holds options of the method rise; got 9",
        "--at-inputs --method=grad_cam": "--at-inputs needs a method that integrates between layers (feature_pair)",
        "--at-inputs --options.image_layer=0": "--options.image_layer says where to read instead: give one of them",
        "--at-inputs --method=all --options.feature_pair.text_layer=0": "--options.feature_pair.text_layer says",
    },
    "files": {
        "--image=gone.png": "gone.png does not exist",
        "--image=broken.png": "broken.png: the image does not decode",
        "--image=drawing.ps": "drawing.ps: the image does not decode",
        "--model.pretrained=nothing": "neither a file nor a tag",
        "--model.name=ViT-B-61": "unknown model 'ViT-B-61'; did you mean ViT-B-16",
        "--model.device=toaster": "'toaster' is no device",
    },
    "combinations": {
        "--span=ring --box=0,0,9,9": "give one of them",
        "--other-image=a.png --other-caption=b": "give one of them",
        "--other-image=broken.png --span=ring": "a --span has no place there",
        "--other-image=broken.png": "--other-image needs no --caption",
        "--other-caption=b --box=0,0,9,9": "a --box has no place there",
        "--other-caption=b": "--other-caption no --image: leave it out",
        "--captions=broken.png": "is a single image: give its caption",
        "--batch-size=0": "--batch-size has to be at least 1; got 0",
    },
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_reported_in_plain_words(
    model: list[str], image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.png").write_bytes(b"this is no image")
    Path("drawing.ps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    for options, message in BAD[kind].items():
        given = re.split(" (?=--)", options)
        said = message_of("--image", image, "--caption", CAPTION, *model, "--out", tmp_path / "out", *given)
        assert message in said
        assert len(said) < 700
    assert not (tmp_path / "out").exists()


def test_bad_input_of_comparisons_is_reported_in_plain_words(model: list[str], image: Path, tmp_path: Path) -> None:
    broken, out = tmp_path / "broken.png", tmp_path / "out"
    broken.write_bytes(b"this is no image")
    said = message_of("--image", image, "--other-image", broken, *model, "--out", out)
    assert "broken.png: the image does not decode (no JPEG, PNG or WebP file)" in said
    assert "one of the captions is empty" in message_of("--caption", "a", "--other-caption", " ", *model, "--out", out)
    said = message_of("--caption", "a", "--other-caption", "b", "--at-inputs", *model, "--out", out)
    assert "--at-inputs is for an image and its caption; two images are compared at their inputs with" in said
    said = message_of("--caption", "a", "--other-caption", "b", "--method", "saliency", *model, "--out", out)
    assert "--other-caption needs a method that compares two images or two captions" in said


def test_a_sound_is_explained_on_its_spectrogram(tmp_path: Path) -> None:
    from small_clap import BANDS, CAPTIONS, FRAMES, RATE, save_clap, tone

    soundfile: Any = pytest.importorskip("soundfile", reason="needs the extra [audio]")
    clap, sound = save_clap(tmp_path / "clap"), tmp_path / "sounds" / "bell.wav"
    sound.parent.mkdir()
    soundfile.write(sound, tone(200).astype("float32"), RATE, subtype="FLOAT")
    name = ["--model.name", str(clap), "--model.device", "cpu"]
    explain("--image", sound, "--caption", CAPTIONS[0], "--box", "2,1,20,8", *name, "--out", tmp_path / "out")
    encoder = load_clap(clap).eval()
    spectrogram = encoder.spectrogram(tone(200).astype("float32"), RATE)
    expected = FeaturePairAttribution(encoder).attribute(spectrogram[None], encoder.tokenizer.encode([CAPTIONS[0]]))
    arrays = arrays_of(tmp_path / "out")
    np.testing.assert_allclose(arrays["interactions"], expected.interactions[0], rtol=1e-4, atol=1e-7)
    assert record_of(tmp_path / "out")["image_size"] == [FRAMES, BANDS]
    explain("--image", sound.parent, "--caption", CAPTIONS[0], *name, "--out", tmp_path / "folder")
    assert (tmp_path / "folder" / "0000-bell" / "explanation.png").is_file()
    sound.write_bytes(b"no sound")
    said = message_of("--image", sound, "--caption", CAPTIONS[0], *name, "--out", tmp_path / "none")
    assert "bell.wav cannot be read as a sound" in said
    said = message_of("--image", sound, "--caption", CAPTIONS[0], *name, "--model.image_size", "32", "--out", tmp_path)
    assert "takes sounds, no images: leave out --model.image_size" in said
    (tmp_path / "empty").mkdir()
    empty = ["--model.name", f"hf:{tmp_path / 'empty'}", "--fit", "letterbox"]
    assert "lacks config.json" in message_of("--image", sound, "--caption", "a", *empty, "--out", tmp_path)


@pytest.fixture
def imagebind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options that choose a small ImageBind, and weights for it in place of the published ones."""
    from small_imagebind import SIZES, package, small_imagebind

    torch.save(small_imagebind().state_dict(), tmp_path / "small.pth")
    monkeypatch.setattr(package, "imagebind_huge", lambda pretrained: package.ImageBindModel(**SIZES))
    return ["--model.name", f"imagebind:{tmp_path / 'small.pth'}", "--model.device", "cpu"]


@pytest.fixture
def bark(tmp_path: Path) -> Path:
    soundfile: Any = pytest.importorskip("soundfile", reason="needs the extra [audio]")
    wave = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000) / 2
    soundfile.write(tmp_path / "bark.wav", wave, 16_000, subtype="FLOAT")
    return tmp_path / "bark.wav"


@pytest.mark.parametrize("method", ["feature_pair", "m2ib"])
def test_an_image_and_a_sound_are_compared_by_imagebind(
    method: str, imagebind: list[str], image: Path, bark: Path, tmp_path: Path
) -> None:
    explain("--image", image, "--other-image", bark, "--method", method, *imagebind, "--out", tmp_path / "out")
    images, sounds = load_imagebind(imagebind[1].removeprefix("imagebind:"))
    seen, heard = images.eval().read(image)[0][None], sounds.eval().read(bark)[0][None]
    by: Any = METHODS[method](sounds)
    made: Any = METHODS[method](images)
    expected = made.attribute_images(seen, heard, by=by)
    arrays, record = arrays_of(tmp_path / "out"), record_of(tmp_path / "out")
    np.testing.assert_allclose(arrays["first"], expected.first[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(arrays["shown_second"], expected.second[0], rtol=1e-4, atol=1e-6)
    assert record["images"] == [str(image), str(bark)]
    assert record["model"]["preprocessing"]["resize_mode"] == "shortest"
    assert record["other"]["preprocessing"]["sampling_rate"] == 16_000
    assert record["methods"][method]["similarity"] == pytest.approx(expected.similarity.item(), abs=1e-5)
    assert record["arrays"].keys() <= arrays.keys()
    assert ("interactions" in arrays) is (method == "feature_pair")
    assert (tmp_path / "out" / "explanation.png").is_file()


def test_imagebind_takes_the_tower_of_the_file(imagebind: list[str], image: Path, bark: Path, tmp_path: Path) -> None:
    for file, grid, architecture in ((image, (4, 4), "ImageBind (vision)"), (bark, (3, 6), "ImageBind (audio)")):
        out = tmp_path / file.stem
        explain("--image", file, "--caption", CAPTION, "--method", "m2ib", *imagebind, "--out", out)
        assert arrays_of(out)["image"].shape == grid
        assert record_of(out)["model"]["architecture"] == architecture
    said = message_of("--image", image, "--caption", "a", "--model.pretrained", "openai", *imagebind, "--out", tmp_path)
    assert "holds its own weights and knows its own transform: leave out --model.pretrained" in said
    given = ["--image", image, "--other-image", bark, "--box", "1,1,30,30", "--method", "m2ib"]
    assert "--box needs a method with token-patch" in message_of(*given, *imagebind, "--out", tmp_path / "box")


def test_the_users_own_image_is_never_replaced(model: list[str], image: Path, tmp_path: Path) -> None:
    same_folder = ["--caption", CAPTION, *model, "--out", image.parent]
    before = image.read_bytes()
    explain("--image", image, *same_folder)
    assert image.read_bytes() == before
    own = image.rename(image.with_name("explanation.png"))
    assert "is the image to explain, and would be replaced" in message_of("--image", own, *same_folder)
    assert own.read_bytes() == before


def test_random_weights_are_said_to_be_random_and_are_the_same_again(
    architecture_file: Callable[[str], Path], image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for run in ("first", "second"):
        name = ["--model.name", str(architecture_file("vit")), "--model.device", "cpu"]
        explain("--image", image, "--caption", CAPTION, *name, "--out", tmp_path / run)
        assert "has random weights (seed 0)" in capsys.readouterr().err
        record = record_of(tmp_path / run)
        assert record["model"]["random_weights_seed"] == 0
        found.append(record["methods"]["feature_pair"]["similarity"])
    assert found[0] == found[1]


def test_a_phrase_past_the_context_length_is_reported_as_cut_off(model: list[str], image: Path, tmp_path: Path) -> None:
    caption = "a dog " * 9 + "a cat"
    said = message_of("--image", image, "--caption", caption, "--span", "cat", *model, "--out", tmp_path / "out")
    assert "the span is cut off: 'cat' at (56, 59) ends with token 20" in said
    explain("--image", image, "--caption", caption, "--span", "dog", *model, "--out", tmp_path / "out")
    assert record_of(tmp_path / "out")["span"]["positions"] == [2, 4, 6, 8, 10, 12, 14]


def test_weights_that_are_not_finite_are_reported(
    model: list[str], image: Path, tmp_path: Path, architecture_file: Callable[[str], Path]
) -> None:
    encoder = loaded(model)
    with torch.no_grad():
        next(encoder.parameters())[:] = torch.nan
    save_open_clip(encoder, tmp_path / "nan.safetensors")
    broken = ["--model.name", model[1], "--model.pretrained", str(tmp_path / "nan.safetensors")]
    assert "finite" in message_of("--image", image, "--caption", CAPTION, *broken, "--out", tmp_path / "out")


def test_a_list_of_no_use_is_reported(model: list[str], tmp_path: Path) -> None:
    for content, message in {
        "image,caption\n": "lists no image",
        "image,text\na.png,b\n": "expected the columns image,caption and if need be span,box,against; got image,text",
        "image,caption\ngone.png,b\n": "none of the 1 entries can be used:\n  0000-gone: ",
        "image,caption\na.png,b, c\n": "list.csv, line 2: expected 2 fields as in the header, found 3; put fields with",
        'image,caption\na.png,"b\n': "not a CSV file in UTF-8",
    }.items():
        (tmp_path / "list.csv").write_text(content)
        assert message in message_of("--image", tmp_path / "list.csv", *model, "--out", tmp_path / "out")


def test_a_list_keeps_its_captions_spans_and_boxes_to_itself(model: list[str], tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("image,caption,span\na.png,a b,a\n")
    given = ["--image", tmp_path / "list.csv", *model, "--out", tmp_path / "out"]
    assert "leave out --caption and --captions" in message_of(*given, "--caption", "a cat")
    assert "leave out --span and --box" in message_of(*given, "--span", "cat")
    assert "a list with spans or boxes needs a method with token-patch attributions" in message_of(
        *given, "--method", "saliency"
    )
    assert "not with many" in message_of(*given, "--other-image", tmp_path / "list.csv")
    (tmp_path / "empty").mkdir()
    given = ["--image", tmp_path / "empty", *model, "--out", tmp_path / "out"]
    assert "give one --caption for all its images, or --captions FILE.csv" in message_of(*given)
    assert "holds no image" in message_of(*given, "--caption", "a cat")


def test_the_help_teaches_with_an_example_and_loads_no_torch() -> None:
    code = (
        "import sys\nfrom lightning_xai.cli import main\n"
        "try:\n    main(['explain', '--help'])\nexcept SystemExit:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert '  python -m lightning_xai explain --image dog.jpg --caption "A dog on a sofa" --span "dog"\n' in done.stdout
    assert "--other_image" in done.stdout
    assert "the same with --at-inputs" in done.stdout


def test_a_photo_is_explained_without_loading_what_only_training_and_reports_need(
    model: list[str], image: Path, tmp_path: Path
) -> None:
    given = ["explain", "--image", str(image), "--caption", CAPTION, *model, "--out", str(tmp_path / "out"), "--method"]
    code = (
        "import sys\nfrom lightning_xai.cli import main\n"
        f"for method in ('feature_pair', 'grad_cam'):\n    main([*{given}, method])\n"
        "print({name.partition('.')[0] for name in sys.modules} | {'matplotlib.pyplot'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded: set[str] = ast.literal_eval(done.stdout.splitlines()[-1])
    assert {"torch", "open_clip", "matplotlib"} <= loaded
    assert not loaded & {"IPython", "captum", "lightning", "matplotlib.pyplot", "pandas", "torchmetrics", "webdataset"}


def test_a_pair_that_one_method_cannot_explain_is_named_and_the_rest_goes_on(
    model: list[str], image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = tmp_path / "list.csv"
    listed.write_text(f"image,caption\n{image},a dog\n{image},a dog on a mat and a cat on a red sofa\n")
    options = ["--options.image_masks", "8", "--options.image_samples", "40", "--options.text_samples", "8"]
    every = ["--method", "all", "--at-inputs", *options]
    main(["explain", "--image", str(listed), *model, *every, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "Saved explanations of 2 of 2 entries" in said
    assert re.search(r"Skipped 2:\n  0001-\S+, kernel_shap: text_samples has to be at least \d+ for \d+ tokens", said)
    with (tmp_path / "out" / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows if row["skipped"]] == ["kernel_shap", "banzhaf_pairs"]
    assert len(rows) == 2 * (len(METHODS) + 1)  # feature_pair has two rows
    record = json.loads((tmp_path / "out" / rows[-1]["name"] / "explanation.json").read_text())
    assert "text_samples" in record["not_served"]["kernel_shap"]


def test_the_bytes_of_one_character_are_shown_as_one_token(tokenizer: CaptionTokenizer) -> None:
    caption = "a \u72d7 dog"
    groups, shown = shown_tokens(tokenizer, caption, tokenizer.encode([caption])[0])
    assert [token.text for token in shown] == ["a", "\u72d7", "dog"]
    assert [len(group) for group in groups] == [1, 3, 1]


def test_a_crop_is_said_and_a_letterbox_shows_the_whole_photo(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = picture(tmp_path / "wide.png", 3, (160, 40))
    given = ["--image", wide, "--caption", CAPTION, "--span", "ring", "--at-inputs", *model]
    explain(*given, "--out", tmp_path / "crop")
    assert "The model's crop hides 75% of the photo; --fit letterbox shows it all." in capsys.readouterr().out
    explain(*given, "--fit", "letterbox", "--out", tmp_path / "letterbox")
    assert "crop hides" not in capsys.readouterr().out
    crop, letterbox = (record_of(tmp_path / name) for name in ("crop", "letterbox"))
    assert crop["geometry"]["seen"] == pytest.approx(0.25)
    assert letterbox["geometry"]["seen"] == 1
    assert "hides 75%" in crop["hidden"]
    assert letterbox["model"]["preprocessing"]["resize_mode"] == "letterbox"
    assert crop["methods"][INPUTS[:-1]]["on_padding"] is None
    # At the inputs padding is the reference itself, so that whole patches of it get nothing: rows 0 and 3 of 4.
    padding = letterbox["methods"][INPUTS[:-1]]["on_padding"]
    assert padding == {"patches": 0.75, "sum": padding["sum"], "share_of_positive": padding["share_of_positive"]}
    found = of(arrays_of(tmp_path / "letterbox"), INPUTS)
    np.testing.assert_allclose(found["shown_image"][[0, 3]], 0, atol=1e-7)
    for folder, record, hidden in (("crop", crop, 120), ("letterbox", letterbox, 0)):
        arrays = arrays_of(tmp_path / folder)
        scale, offset = arrays["geometry"][:2], arrays["geometry"][2:]
        assert [*scale, *offset] == record["geometry"]["scale_x_y"] + record["geometry"]["offset_x_y"]
        assert arrays[f"{LAST}on_photo"].shape == (40, 160)
        assert np.isnan(arrays[f"{LAST}on_photo"]).sum() == hidden * 40
    said = message_of(*given, "--fit", "stretch", "--out", tmp_path / "none")
    assert "fit is crop or letterbox; got 'stretch'" in said


def test_photos_of_one_pixel_and_of_extreme_shape_are_explained(model: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, size in (("one", (1, 1)), ("tall", (1, 300)), ("wide", (300, 2))):
        picture(folder / f"{name}.png", 0, size)
    for fit in ("crop", "letterbox"):
        out = tmp_path / fit
        explain("--image", folder, "--caption", CAPTION, *model, "--fit", fit, "--out", out)
        assert len(list(out.glob("*/explanation.png"))) == 3
