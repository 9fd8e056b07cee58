"""A method of another package: found through its entry point, run by `explain`, and reported where it is broken."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_xai.attribution import METHODS
from lightning_xai.cli import main

Install = Callable[..., None]

METHOD = '''
import torch
from torch.nn.functional import adaptive_avg_pool2d, cosine_similarity

from lightning_xai.attribution import Attribution, AttributionMethod


class Brightness(AttributionMethod):
    """Explains by bright patches and by large token ids."""

    has_zero = False

    def __init__(self, encoder, *, factor: float = 1.0, internal_batch_size: int | None = None):
        super().__init__(encoder, internal_batch_size=internal_batch_size)
        if factor < 0:
            raise ValueError(f"factor has to be positive; got {factor}")
        self.factor = factor

    def _attribute(self, images, tokens):
        image = self.factor * adaptive_avg_pool2d(images.mean(dim=1), self.grid)
        return Attribution(image, tokens.float(), cosine_similarity(*self._embeddings(images, tokens)))
'''


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Lay out an installed package "brightness" 1.0 whose entry point adds a method."""

    def forget() -> None:
        METHODS.__dict__.pop("_plugins", None)
        METHODS._loaded.pop("brightness", None)
        sys.modules.pop("brightness", None)

    def lay_out(code: str = METHOD, *, name: str = "brightness") -> None:
        info = tmp_path / "site" / "brightness-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brightness\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[lightning_xai.methods]\n{name} = brightness:Brightness\n")
        (tmp_path / "site" / "brightness.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path / "site")
        forget()

    yield lay_out
    forget()


@pytest.fixture
def explain(architecture_file: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """Run `explain` on a picture; returns the folder that it wrote."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")

    def run(*options: str) -> Path:
        given = ["--image", str(tmp_path / "picture.png"), "--caption", "a red ring", "--model.device", "cpu"]
        given += ["--model.name", str(architecture_file("vit")), "--out", str(tmp_path / "out")]
        main(["explain", *given, *options])
        return tmp_path / "out"

    return run


def test_an_installed_method_runs_with_its_options(install: Install, explain: Callable[..., Path]) -> None:
    install()
    out = explain("--method", "brightness", "--options.factor", "2")
    record = json.loads((out / "explanation.json").read_text())["methods"]["brightness"]
    assert record["options"] == {"factor": 2.0, "internal_batch_size": None}
    assert record["scale"] == "range"
    with np.load(out / "attribution.npz") as arrays, Image.open(out.parent / "picture.png") as picture:
        patches = np.asarray(picture, dtype=float).mean(axis=2).reshape(4, 8, 4, 8).mean(axis=(1, 3))
        assert np.corrcoef(arrays["image"].ravel(), patches.ravel())[0, 1] > 0.99


@pytest.mark.slow
def test_all_methods_include_the_installed_one(install: Install, explain: Callable[..., Path]) -> None:
    install()
    few = ["--options.steps=2", "--options.rise.image_masks=4", "--options.rise.text_masks=4"]
    record = json.loads((explain("--method", "all", *few) / "explanation.json").read_text())
    assert list(record["methods"])[-1] == "brightness"
    assert record["methods"].keys() | record["not_served"].keys() == set(METHODS)


ENTRY = "plug-in brightness 1.0, entry 'brightness' of lightning_xai.methods: "


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        (
            METHOD.replace("Attribution(image,", "Attribution(image[:, :3],"),
            "brightness",
            ENTRY[:-2] + "): `image` of an attribution has to be a tensor [1, 4, 4]; got [1, 3, 4]",
        ),
        (METHOD, "saliency", "the attribution method 'saliency' is taken by lightning_xai; rename or uninstall one"),
        (METHOD.replace("factor", "seed"), "brightness", ENTRY + "a method is `stochastic` where its constructor has"),
        (METHOD.replace("has_zero = False", "has_zero = None"), "brightness", ENTRY + "the flag `has_zero` is True or"),
        (METHOD.replace("(AttributionMethod)", ""), "brightness", ENTRY + "a method is a subclass of lightning_xai."),
        ("import no_such_package", "brightness", ENTRY + "brightness:Brightness cannot be imported (No module named"),
        (METHOD.replace("= 1.0", "= -1.0"), "brightness", "plug-in brightness: factor has to be positive; got -1.0"),
    ],
    ids=["shape", "name taken", "flag missing", "flag without a value", "no method", "no module", "its own error"],
)
def test_a_broken_method_is_reported_with_its_package_and_the_rule(
    install: Install, explain: Callable[..., Path], code: str, name: str, message: str
) -> None:
    install(code, name=name)
    with pytest.raises(SystemExit) as stopped:
        explain("--method", "brightness")
    assert isinstance(stopped.value.code, str), "a traceback or a usage text, not a message"
    assert "plug-in brightness" in stopped.value.code
    assert message in stopped.value.code
