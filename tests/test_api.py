"""`import lightning_xai as lx`: the same numbers and sentences as `explain`, from pixels in memory as well."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import lightning_xai as lx
from lightning_xai.cli import main
from lightning_xai.models import DualEncoder, save_open_clip

CAPTION = "a red ring and a blue ring"
METHOD = "feature_pair"


@pytest.fixture
def encoder(make_encoder: Callable[..., DualEncoder]) -> DualEncoder:
    return make_encoder("vit")


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)


@pytest.fixture
def photo(tmp_path: Path, pixels: NDArray[np.uint8]) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def same(first: Any, second: Any) -> bool:
    return first.methods == second.methods and all(
        np.allclose(first.maps[label], second.maps[label], atol=1e-6)
        and np.allclose(first.words[label], second.words[label], atol=1e-6)
        for label in first.methods
    )


def test_importing_the_package_and_listing_its_names_loads_no_torch() -> None:
    code = "import sys, lightning_xai as lx; dir(lx); lx.__version__; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    assert {*lx.__all__} <= {*dir(lx)}
    assert "rise" in lx.METHODS
    with pytest.raises(AttributeError, match="no attribute 'explian'"):
        _ = lx.explian


def test_path_image_and_array_give_what_the_command_gives(
    architecture_file: Callable[[str], Path],
    encoder: DualEncoder,
    photo: Path,
    pixels: NDArray[np.uint8],
    tmp_path: Path,
) -> None:
    save_open_clip(encoder, tmp_path / "vit.safetensors")
    architecture, weights = str(architecture_file("vit")), str(tmp_path / "vit.safetensors")
    chosen = ["--model.name", architecture, "--model.pretrained", weights, "--model.device", "cpu"]
    main(["explain", "--image", str(photo), "--caption", CAPTION, *chosen, "--out", str(tmp_path / "command")])
    result = lx.explain(photo, CAPTION, model=architecture, pretrained=weights, device="cpu")
    out = result.save(tmp_path / "python")
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "command").iterdir()}
    with np.load(out / "attribution.npz") as mine, np.load(tmp_path / "command" / "attribution.npz") as other:
        assert {*mine} == {*other} == {*result.arrays}
        assert all(np.allclose(mine[name], other[name], atol=1e-6, equal_nan=True) for name in mine)
    loaded = lx.load(architecture, weights, device="cpu")
    for image in (str(photo), Image.open(photo), pixels, pixels / 255, torch.from_numpy(pixels)):
        assert same(lx.explain(image, CAPTION, model=loaded), result)


def test_a_photo_in_memory_is_turned_upright_as_its_file_is(encoder: DualEncoder, tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 64, 4), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    of_file = lx.explain(tmp_path / "turned.png", CAPTION, model=encoder, method="saliency")
    with Image.open(tmp_path / "turned.png") as opened:
        assert same(lx.explain(opened, CAPTION, model=encoder, method="saliency"), of_file)
    assert of_file.record["image_size"] == [40, 64]


def test_phrases_and_boxes_are_read_off_without_running_the_method_again(
    encoder: DualEncoder, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {
        "span": lx.explain(photo, CAPTION, model=encoder, span="blue ring"),
        "box": lx.explain(photo, CAPTION, model=encoder, box=(24, 12.5, 24, 24)),
    }
    whole = lx.explain(photo, CAPTION, model=encoder)
    monkeypatch.setattr("lightning_xai.attribution.AttributionMethod.attribute", None)
    monkeypatch.setattr(encoder, "read", None)
    span, box = whole.span("blue ring"), whole.box(24, 12.5, 24, 24)
    several: Any = ["blue ring"]
    with pytest.raises(ValueError, match="a span is one phrase of the caption, as text"):
        whole.span(several)
    assert same(span, asked["span"])
    assert same(box, asked["box"])
    assert same(span.box(24, 12.5, 24, 24), box)
    assert not same(span, whole)
    assert span.record["span"]["tokens"] == ["blue", "ring"]
    table = box.to_frame().query("method == @METHOD")
    assert {*zip(table["row"], table["column"], strict=True)} == {(0, 2), (0, 3), (1, 2), (1, 3)}
    words = table.groupby("position")["value"].sum()
    np.testing.assert_allclose(words, box.words[METHOD], atol=1e-6)
    assert [*span.to_frame()["token"].unique()] == ["blue", "ring"]


def test_lists_of_one_and_numbers_of_any_library_are_taken(encoder: DualEncoder, photo: Path) -> None:
    span = lx.explain(photo, CAPTION, model=encoder, span=["blue ring"], against=None)
    assert same(span, lx.explain(photo, CAPTION, model=encoder, span="blue ring"))
    box = [24.0, 12.5, 24.0, 24.0]
    given = lx.explain(photo, CAPTION, model=encoder, box=box)
    for other in (np.array(box), torch.tensor(box), tuple(torch.tensor(box)), [box]):
        assert same(lx.explain(photo, CAPTION, model=encoder, box=other), given)
    both = lx.explain([photo, photo], CAPTION, model=encoder, box=np.array([box, box]), against=[["a dog"], None])
    assert [len(result.record.get("against", ())) for result in both] == [1, 0]
    np.testing.assert_allclose(both[1].words[METHOD], given.words[METHOD], atol=1e-6)


def test_the_image_itself_is_not_replaced(encoder: DualEncoder, photo: Path) -> None:
    image = photo.rename(photo.with_name("explanation.png"))
    with pytest.raises(ValueError, match="is the image itself, and would be replaced"):
        lx.explain(image, CAPTION, model=encoder, method="saliency").save(image.parent)


def test_a_phrase_against_the_similarity_has_a_scale_with_a_sign(encoder: DualEncoder, photo: Path) -> None:
    result = lx.explain(photo, CAPTION, model=encoder)
    explanation = result._explained.explanations[0]
    given = explanation.arrays | {name: np.abs(explanation.arrays[name]) for name in ("image", "text")}
    assert explanation.arrays["interactions"].min() < 0 <= min(given["image"].min(), given["text"].min())
    asked = replace(explanation, arrays=given).about(result._prepared)
    assert asked.saliency.scale == "signed"


def test_a_table_has_a_line_for_each_number(encoder: DualEncoder, photo: Path) -> None:
    pairs = lx.explain(photo, CAPTION, model=encoder, against="a dog").to_frame()
    assert pairs.groupby(["method", "caption"]).size().to_dict()[METHOD, CAPTION] == 7 * 16
    assert pairs.groupby(["method", "caption"]).size().to_dict()[METHOD, "a dog"] == 2 * 16
    both = lx.explain(photo, CAPTION, model=encoder, at_inputs=True)
    assert both.methods == [*both.to_frame()["method"].unique()] == ["feature_pair,0,0", "feature_pair,2,2"]
    result = lx.explain(photo, CAPTION, model=encoder, method="saliency")
    table = result.to_frame()
    assert table.groupby("part").size().to_dict() == {"image": 16, "text": 7}
    image = table[table["part"] == "image"]
    np.testing.assert_array_equal(image["value"].to_numpy().reshape(4, 4), result.maps["saliency"])
    assert [*table[table["part"] == "text"]["token"]] == result.tokens == CAPTION.split()


def test_a_list_keeps_its_order_and_names_what_cannot_be_used(
    encoder: DualEncoder, photo: Path, pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    images = [pixels, tmp_path / "gone.png", photo, tmp_path / "broken.png"]
    captions = [CAPTION, CAPTION, "a dog", CAPTION]
    with pytest.warns(UserWarning, match="Skipped 2:\n  0001-gone: .*cannot be read"):
        results = lx.explain(images, captions, model=encoder, span=["ring", None, None, None], batch_size=3)
    assert results.places == [0, 2]
    assert {place: "decode" in reason for place, reason in results.skipped.items()} == {1: False, 3: True}
    assert same(results[0], lx.explain(photo, CAPTION, model=encoder, span="ring"))
    assert same(results[1], lx.explain(photo, "a dog", model=encoder))
    assert {*results.to_frame()["item"]} == {0, 2}
    assert results._repr_html_().startswith("<iframe")
    out = results.save(tmp_path / "out")
    assert {"0000-image", "0002-photo", "summary.csv"} <= {path.name for path in out.iterdir()}
    assert [result.caption for result in lx.explain(photo, ["a dog", "a cat"], model=encoder)] == ["a dog", "a cat"]
    with pytest.raises(ValueError, match="none of the 1 entries can be used:\n  0000-gone"):
        lx.explain([tmp_path / "gone.png"], CAPTION, model=encoder)


def test_the_picture_shows_itself_in_a_notebook(encoder: DualEncoder, photo: Path) -> None:
    result = lx.explain(photo, "a <b>dog</b>", model=encoder, method="saliency")
    figure: Any = result.plot()
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert re.match(r'<iframe [^<>]* srcdoc="[^"<>]*"></iframe>$', result._repr_html_()), "nothing leaves the frame"


def test_a_model_in_training_is_explained_as_it_evaluates_and_left_in_training(
    encoder: DualEncoder, photo: Path
) -> None:
    before = lx.explain(photo, CAPTION, model=encoder)
    encoder.train()
    assert same(lx.explain(photo, CAPTION, model=encoder), before)
    assert all(module.training for module in encoder.modules())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"span": "cat"}, f"the span 'cat' is not in the caption: {CAPTION!r}"),
        ({"box": (0, 0, 90, 9)}, "the box 0,0,90,9 (x,y,width,height) leaves the image, which has 48 x 64 pixels"),
        ({"box": "1,2"}, "a box is x,y,width,height in pixels, such as 10,20,64,48; got '1,2'"),
        ({"span": "ring", "box": (0, 0, 9, 9)}, "give one of them"),
        ({"method": "magic"}, "unknown method 'magic'; there are feature_pair, "),
        ({"method": "saliency", "span": "ring"}, "--span needs a method with token-patch attributions"),
        ({"at_inputs": True, "method": "grad_cam"}, "--at-inputs needs a method that integrates between layers"),
        ({"options": {"stepz": 9}}, "feature_pair has no option stepz; it has image_layer, text_layer, steps"),
        ({"target": "probability"}, "--target is of captions that are compared: give --against TEXT"),
        ({"batch_size": 0}, "--batch-size has to be at least 1; got 0"),
        ({"fit": "crop"}, "the model is loaded already: leave out fit"),
        ({"model": 3}, "model is a name, a file, or what lightning_xai.load returns; got int"),
        ({"model": "ViT-B-61"}, "unknown model 'ViT-B-61'; did you mean ViT-B-16"),
        ({"caption": None}, "give a caption"),
        ({"caption": " "}, "is empty"),
        ({"caption": ["a", "b"], "image": ["a.png"] * 3}, "expected one or 3 captions, for as many entries; got 2"),
        ({"image": []}, "the list is empty"),
        ({"image": 3}, "an image is a path, a PIL image or an array [height, width, 3]; got int"),
        ({"image": "gone.png"}, "gone.png does not exist"),
        ({"image": np.zeros((2, 9, 9, 3), np.uint8)}, "got the shape [2, 9, 9, 3]: give a list"),
        ({"span": 3}, "a span is a phrase of the caption, as text"),
        ({"box": 3}, "a box is (x, y, width, height) in pixels of the image; got 3"),
        ({"image": ".", "caption": ["a", "b"]}, ". stands for many images: give one caption for them all"),
        ({"image": np.zeros((3, 9, 9), np.uint8)}, "channels last; got the shape [3, 9, 9]"),
        ({"image": np.full((9, 9, 3), 255.0)}, "floats has values in [0, 1]; got 255 to 255"),
        ({"image": np.full((9, 9, 3), np.nan)}, "floats has values in [0, 1]; got nan to nan"),
        ({"image": np.zeros((9, 9, 3), int)}, "values of uint8, or floats in [0, 1]; got int64"),
    ],
    ids=str,
)
def test_bad_input_is_told_in_one_sentence(
    encoder: DualEncoder, pixels: NDArray[np.uint8], given: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {"image": pixels, "caption": CAPTION, "model": encoder} | given
    with pytest.raises(ValueError, match=re.escape(message)):
        lx.explain(**arguments)
