"""Packages of other people add metrics, methods and data sets through entry points, without touching the product."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from lightning_xai.data import ShardDataModule
from lightning_xai.data.shapes import prepare_shapes
from lightning_xai.evaluation import AttributionEvaluation
from lightning_xai.metrics import METRICS
from lightning_xai.metrics.base import choose_metrics
from lightning_xai.registry import PluginError
from lightning_xai.results.table import read_result, score_table

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:torch")

REGISTRIES: list[Any] = [METRICS]
METRIC = """
from lightning_xai.exclusion import Exclusion
from lightning_xai.metrics import MetricSpec, PhraseTargets
from lightning_xai.results.record import Score


def largest(targets: PhraseTargets, *, power: float = 1.0):
    top = targets.maps.flatten(1).amax(dim=1) if len(targets) else targets.maps.new_zeros(0)
    return {"largest": top.clamp(min=0) ** power}


SPEC = MetricSpec(
    name="largest",
    kind="phrase",
    compute=largest,
    values=("largest",),
    scores=(Score(name="largest_mean", value="largest", heading="largest", better="up"),),
    title="Largest entry",
    note="The largest entry of a map.",
    needs_boxes=True,
)


def wrong(targets):
    return {"largest": targets.maps}


WRONG = MetricSpec(**{**{n: getattr(SPEC, n) for n in SPEC.__dataclass_fields__}, "name": "wrong", "compute": wrong})
NOT_A_SPEC = largest
"""
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a package with entry points on the path: group -> name -> "module:attribute"."""

    def forget() -> None:
        for registry in REGISTRIES:
            vars(registry).pop("_plugins", None)

    def add(name: str, source: str, **groups: dict[str, str]) -> None:
        site = tmp_path / f"site_{name}"
        info = site / f"{name}-1.2.dist-info"
        info.mkdir(parents=True)
        (site / f"{name}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        lines = [
            line
            for group, entries in groups.items()
            for line in (f"[lightning_xai.{group}]", *(f"{key} = {value}" for key, value in entries.items()))
        ]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        monkeypatch.syspath_prepend(site)
        forget()

    yield add
    forget()
    sys.modules.pop("my_metrics", None)
    for name in ("largest", "wrong"):
        METRICS._loaded.pop(name, None)


def test_a_metric_of_another_package_works_as_a_built_in_one(
    install: Install, architecture_file: Callable[[str], Path], tmp_path: Path
) -> None:
    install("my_metrics", METRIC, metrics={"largest": "my_metrics:SPEC"})
    assert METRICS.origin("largest") == "my_metrics 1.2"
    prepare_shapes(tmp_path / "shapes", 1, 4, progress=False)
    task = AttributionEvaluation(
        str(architecture_file("vit")), None, out=tmp_path / "out", methods={"saliency": {}},
        metrics=["largest", "grounding"], metric_options={"largest": {"power": 2}},
    )  # fmt: skip
    settings: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    trainer = L.Trainer(**settings, inference_mode=False, default_root_dir=tmp_path)
    trainer.test(task, ShardDataModule(test=tmp_path / "shapes" / "val", num_workers=0), verbose=False)
    record, table = read_result(tmp_path / "out")
    assert list(record.metrics) == ["grounding", "largest"]
    assert record.metrics["largest"].options == {"power": 2.0}
    (score,) = score_table(table.values, record.metrics["largest"].scores).itertuples()
    assert (score.score, score.count) == ("largest_mean", len(table.measured("gamma")))
    assert score.value > 0
    assert float(trainer.callback_metrics["test/saliency/largest_mean"]) == pytest.approx(score.value)


@pytest.mark.parametrize(
    ("entries", "asked_for", "message"),
    [
        (
            {"grounding": "my_metrics:SPEC"},
            "grounding",
            r"'grounding' of .*: the metric 'grounding' is taken by lightning",
        ),
        ({"wrong": "my_metrics:WRONG"}, "wrong", r"'wrong' of .*: compute .* \[0\]; got \[0, 1, 1\]"),
        ({"other": "my_metrics:SPEC"}, "other", "'other' of .*: the name of a MetricSpec has to be that of its entry"),
        ({"largest": "my_metrics:NOT_A_SPEC"}, "largest", "'largest' of .*: a metric has to be a MetricSpec"),
        ({"largest": "my_metrics:MISSING"}, "largest", "'largest' of .*: my_metrics:MISSING cannot be imported"),
    ],
)
def test_a_metric_that_breaks_the_contract_is_named_with_package_entry_and_rule(
    install: Install, entries: dict[str, str], asked_for: str, message: str
) -> None:
    install("my_metrics", METRIC, metrics=entries)
    with pytest.raises(PluginError, match=f"plug-in my_metrics 1.2, entry {message}"):
        choose_metrics([asked_for], {})


def test_two_packages_with_one_name_are_refused(install: Install) -> None:
    install("my_metrics", METRIC, metrics={"largest": "my_metrics:SPEC"})
    install("more_metrics", METRIC, metrics={"largest": "more_metrics:SPEC"})
    with pytest.raises(PluginError, match=r"'largest' is taken by m\w+_metrics 1.2; rename or uninstall"):
        list(METRICS)
