"""Another package adds a method, a metric and a data set through entry points, without touching the product.

The package is the one that the how-tos build, so that these tests run what the documentation shows.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doc_blocks import TEXT, blocks
from PIL import Image

from lightning_xai.attribution import METHODS
from lightning_xai.cli import main
from lightning_xai.data.sources import SOURCES
from lightning_xai.metrics import METRICS
from lightning_xai.metrics.registry import choose_metrics
from lightning_xai.registry import PluginError
from lightning_xai.results.table import read_result, score_table

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:torch")

REGISTRIES: list[Any] = [METHODS, METRICS, SOURCES]
MODULES = {block.title: block.code for block in blocks(TEXT) if block.title.endswith(".py")}
METHOD = MODULES["my_package/gradient_times_input.py"]
METRIC = MODULES["my_package/half_area.py"]
ENTRIES = "".join(
    f"[{group}]\n{lines.replace(chr(34), '')}"
    for block in blocks(TEXT)
    if block.title == "pyproject.toml"
    for group, lines in re.findall(r'\[project\.entry-points\."(.*?)"\]\n(.*)', block.code, re.DOTALL)
)
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Lay out packages as pip installs them: modules, and metadata with entry points."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
            del sys.modules[name]
        for registry in REGISTRIES:
            vars(registry).pop("_plugins", None)

    def lay_out(entries: str, modules: dict[str, str], *, package: str = "my_package") -> None:
        site = tmp_path / f"site_of_{package}"
        for path, code in modules.items():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            (site / path).write_text(code)
        metadata = site / f"{package}-0.1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1.0\n")
        (metadata / "entry_points.txt").write_text(entries)
        monkeypatch.syspath_prepend(site)
        forget()

    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "_loaded", dict(registry._loaded))
    yield lay_out
    forget()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder as the how-to's data set has it: four captioned pictures, and one without a caption."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")
        if number < 4:
            (folder / f"{number}.txt").write_text("a red ring\n")
    return folder


@pytest.mark.slow
def test_one_package_adds_a_method_a_metric_and_a_data_set(
    install: Install,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture_file: Callable[[str], Path],
) -> None:
    monkeypatch.chdir(tmp_path)
    install(ENTRIES, MODULES)
    assert [list(registry)[-1] for registry in REGISTRIES] == ["gradient_times_input", "half_area", "folder"]

    main(["prepare", "folder", "--images", str(pictures), "--out", "data"])
    manifest = json.loads(Path("data/manifest.json").read_text())
    assert (manifest["samples"], manifest["left_out"]) == (4, {"image_without_caption": 1})

    model, method = str(architecture_file("vit")), ["--method", "gradient_times_input", "--options.absolute", "true"]
    one = ["--image", str(pictures / "0.jpg"), "--caption", "a red ring", "--model.name", model]
    main(["explain", *one, *method, "--model.device", "cpu", "--out", "explained"])
    explained = json.loads(Path("explained/explanation.json").read_text())["methods"]["gradient_times_input"]
    assert explained["options"] == {"absolute": True, "internal_batch_size": None}
    with np.load("explained/attribution.npz") as arrays:
        assert arrays["image"].min() >= 0

    settings: dict[str, Any] = {
        "model": {
            "class_path": "lightning_xai.evaluation.AttributionEvaluation",
            "init_args": {
                "model": model,
                "pretrained": None,
                "out": "result",
                "methods": {"gradient_times_input": {"absolute": True}, "random": {}},
                "metrics": ["half_area", "confidence"],
                "metric_options": {"half_area": {"share": 0.25}},
            },
        },
        "data": {"class_path": "ShardDataModule", "init_args": {"test": "data", "num_workers": 0}},
        "trainer": {"accelerator": "cpu", "logger": False, "enable_progress_bar": False},
    }
    Path("config.yaml").write_text(json.dumps(settings))  # JSON is YAML
    main(["test", "--config", "config.yaml"])
    record, table = read_result(Path("result"))
    assert record.versions["my_package"] == "0.1.0"
    assert record.metrics["half_area"].options == {"share": 0.25}
    scores = list(score_table(table.values, record.metrics["half_area"].scores).itertuples())
    assert [(score.method, score.count) for score in scores] == [("gradient_times_input", 4), ("random", 4)]
    assert all(0 < score.value < 0.25 for score in scores)

    main(["report", "result", "--out", "page"])
    page = Path("page/report.html").read_text()
    assert "Concentration" in page
    assert "half_area" in page
    assert "gradient_times_input" in page


def changed(code: str, was: str, becomes: str) -> str:
    assert was in code
    return code.replace(was, becomes)


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        (
            changed(METHOD, "Attribution(image.detach(),", "Attribution(image.detach()[:, :3],"),
            "mine",
            "): `image` of an attribution has to be a tensor [1, 4, 4]; got [1, 3, 4]",
        ),
        (METHOD, "saliency", ": the attribution method 'saliency' is taken by lightning_xai; rename or uninstall one"),
        (changed(METHOD, "absolute: bool = False", "seed: int = 0"), "mine", ": a method is `stochastic` where its"),
        (changed(METHOD, "signed = True", "signed = None"), "mine", ": the flag `signed` is True or False; got None"),
        (changed(METHOD, "(AttributionMethod)", ""), "mine", ": a method is a subclass of lightning_xai.attribution."),
        ("import no_such_package", "mine", ": my_package.method:GradientTimesInput cannot be imported (No module"),
    ],
    ids=["shape", "name taken", "flag missing", "flag without a value", "no method", "no module"],
)
def test_a_broken_method_is_reported_with_package_entry_and_rule(
    install: Install,
    pictures: Path,
    tmp_path: Path,
    architecture_file: Callable[[str], Path],
    code: str,
    name: str,
    message: str,
) -> None:
    entries = f"[lightning_xai.methods]\n{name} = my_package.method:GradientTimesInput\n"
    install(entries, {"my_package/method.py": code})
    options = ["--caption", "a red ring", "--method", "mine", "--model.device", "cpu", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        main(["explain", "--image", str(pictures / "0.jpg"), "--model.name", str(architecture_file("vit")), *options])
    assert isinstance(stopped.value.code, str), "a traceback or a usage text, not a message"
    assert f"plug-in my_package 0.1.0, entry {name!r} of lightning_xai.methods{message}" in stopped.value.code


def test_an_error_that_a_plug_in_raises_is_a_message_with_its_name(
    install: Install, pictures: Path, tmp_path: Path, architecture_file: Callable[[str], Path]
) -> None:
    own = changed(METHOD, "self._absolute = absolute", 'raise ValueError("absolute has to be false; got true")')
    install("[lightning_xai.methods]\nmine = my_package.method:GradientTimesInput\n", {"my_package/method.py": own})
    given = ["--image", str(pictures / "0.jpg"), "--caption", "a red ring", "--method", "mine"]
    with pytest.raises(SystemExit, match="explain: plug-in my_package: absolute has to be false; got true"):
        main(["explain", *given, "--model.name", str(architecture_file("vit")), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("code", "name", "attribute", "message"),
    [
        (METRIC, "grounding", "HALF_AREA", "the metric 'grounding' is taken by lightning_xai; rename"),
        (
            changed(METRIC, "{\"half_area\": area_M", "{\"half_area\": area_M[:, None]"),
            "half_area", "HALF_AREA", r"compute .* \[0\]; got \[0",
        ),
        (METRIC, "other", "HALF_AREA", "the name of a MetricSpec has to be that of its entry"),
        (METRIC, "half_area", "half_area", "a metric has to be a MetricSpec"),
        (METRIC, "half_area", "MISSING", "my_package.metric:MISSING cannot be imported"),
    ],
    ids=["name taken", "shape", "other name", "no spec", "missing"],
)  # fmt: skip
def test_a_broken_metric_is_reported_with_package_entry_and_rule(
    install: Install, code: str, name: str, attribute: str, message: str
) -> None:
    install(f"[lightning_xai.metrics]\n{name} = my_package.metric:{attribute}\n", {"my_package/metric.py": code})
    with pytest.raises(PluginError, match=f"plug-in my_package 0.1.0, entry '{name}' of .*: {message}"):
        choose_metrics([name], {})


def test_two_packages_with_one_name_are_refused(install: Install) -> None:
    install(ENTRIES, MODULES)
    install(ENTRIES.replace("my_package.", "copy.my_package."), {}, package="copy")
    with pytest.raises(PluginError, match=r"'half_area' is taken by (copy|my_package) 0\.1\.0; rename or uninstall"):
        list(METRICS)
