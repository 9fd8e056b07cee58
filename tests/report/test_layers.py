"""The section on layers: heat maps with the numbers of the table, marks of the referee, sentences from the numbers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from result_folders import METRICS, rewrite, target, write_evaluation

from lightning_xai.metrics import METRICS as SPECS
from lightning_xai.report.build import build_sections
from lightning_xai.report.figures import LayerMap, layer_maps
from lightning_xai.report.page import Chart, Note
from lightning_xai.report.paper_table import PaperTable
from lightning_xai.report.sections.layers import layer_blocks
from lightning_xai.report.sections.metric_agreement import agreement_blocks
from lightning_xai.report.sections.significance import OrderTest
from lightning_xai.results.layers import gamma_agreement
from lightning_xai.results.record import MethodRecord, ResultRecord
from lightning_xai.results.runs import Run, load_runs
from lightning_xai.results.table import ResultTable, write_result

GAMMAS = {(0, 0): 0.8, (0, -1): 0.6, (-1, 0): 0.7, (-1, -1): 0.3}
JUDGE = 0.75


def sweep_run(folder: Path, *, referee: str | None = "judge", spread: float = 0.0) -> Run:
    """Of 20 phrases; gammas vary around those of `GAMMAS`, maps agree as much as gammas are large."""
    methods, rows = {}, []
    draw = np.random.default_rng(0)
    places = [f"phrase/{i}/0" for i in range(20)]
    for (image, text), gamma in GAMMAS.items():
        label = f"feature_pair,{image},{text}"
        methods[label] = MethodRecord(name="feature_pair", options={"image_layer": image, "text_layer": text})
        values = {"gamma": draw.normal(gamma, 0.02, 20), "rho": np.ones(20), "agreement": np.full(20, gamma / 2)}
        rows += [(label, 0, places[i], name, float(own[i]), "") for name, own in values.items() for i in range(20)]
    methods["judge"] = MethodRecord(name="banzhaf_pairs", options={"seed": 0}, seeds=(0, 1))
    for seed in (0, 1):
        for i, place in enumerate(places):
            rows += [("judge", seed, place, name, JUDGE + spread * i, "") for name in ("gamma", "rho")]
    rows += [("judge", 1, place, "agreement", 0.9, "") for place in places]
    record = ResultRecord(
        kind="evaluation",
        data={"name": "shapes"},
        settings={"referee": referee},
        methods=methods,
        metrics={"grounding": METRICS["grounding"], "agreement": SPECS["agreement"].record({})},
    )
    targets = [target("phrase", i, 0, "ring", phrase="a ring") for i in range(20)]
    write_result(folder, record, ResultTable.of(rows, targets))
    return load_runs([folder])[0]


def test_the_heat_map_has_the_values_of_the_layers_and_the_referee_as_its_mark(tmp_path: Path) -> None:
    run = sweep_run(tmp_path)
    (chart,) = (block for block in layer_blocks([run]) if isinstance(block, Chart))
    axes = {panel.get_title().splitlines()[0]: panel for panel in chart.figure.axes if panel.get_title()}
    drawn = np.asarray(axes["γ mean"].collections[0].get_array()).reshape(2, 2)
    estimates = run.measurements[0].estimates("grounding")
    expected = [[estimates[f"feature_pair,{i},{t}"]["gamma_mean"].mean for t in (0, -1)] for i in (0, -1)]
    assert drawn.tolist() == expected
    assert axes["γ mean"].get_title().endswith("referee: 0.75")
    assert [label.get_text() for label in axes["γ mean"].get_yticklabels()] == ["0", "last"]
    maps = np.asarray(axes["maps: rank correlation"].collections[0].get_array()).reshape(2, 2)
    assert maps.ravel().tolist() == pytest.approx([0.4, 0.3, 0.35, 0.15])
    assert axes["maps: rank correlation"].get_title().endswith("referee: 0.90")


def test_the_agreement_of_a_map_that_ignores_the_model_is_said(tmp_path: Path) -> None:
    run = sweep_run(tmp_path, spread=0.001)
    methods = run.record.methods | {"feature_pair,0,0": MethodRecord(name="random", baseline=True)}
    rewrite(tmp_path, None, methods=methods)
    (run,) = load_runs([tmp_path])
    text = " ".join(block.text for block in layer_blocks([run]) if isinstance(block, Note))
    expected = gamma_agreement(run.measurements[0], "feature_pair,0,0", "judge").correlation
    assert f"which ignores the model, agrees with judge to {expected:.2f}, since" in text


def test_the_judges_table_names_layers_as_others_do(tmp_path: Path) -> None:
    (every,) = (block for block in agreement_blocks([sweep_run(tmp_path)]) if isinstance(block, PaperTable))
    assert every.rows[0][0] == sweep_run(tmp_path).record.shown("feature_pair,0,0")


def test_sentences_name_the_layers_that_agree_and_those_that_understate(tmp_path: Path) -> None:
    text = " ".join(block.text for block in layer_blocks([sweep_run(tmp_path)]) if isinstance(block, Note))
    assert "Maps: feature_pair, inputs agrees best with judge (rank correlation 0.40)" in text
    assert "feature_pair, last blocks least (0.15)" in text
    assert "judge agrees with itself at other seeds to 0.90" in text
    assert "understates γ at layers (0, last) by 0.15" in text
    assert "(last, last) by 0.45" in text
    assert "not at (0, 0)" in text


def test_every_table_and_picture_of_the_page_names_the_layers(tmp_path: Path) -> None:
    sections, _ = build_sections([sweep_run(tmp_path)], OrderTest())
    tables = {block.name: block for section in sections for block in section.blocks if isinstance(block, PaperTable)}
    lines = [row[1] for row in tables["grounding"].rows]
    assert lines[:2] == ["feature_pair, inputs", "feature_pair, layers 0, last"]
    layers = next(table for name, table in tables.items() if name.startswith("layers"))
    assert layers.rows[-1][0] == "judge (referee)"
    assert len(layers.rows) == 5
    charts = [block for section in sections for block in section.blocks if isinstance(block, Chart)]
    assert any("feature_pair, inputs" in chart.alt for chart in charts)


def test_without_a_referee_there_are_heat_maps_without_marks(tmp_path: Path) -> None:
    blocks = layer_blocks([sweep_run(tmp_path, referee=None)])
    (chart,) = (block for block in blocks if isinstance(block, Chart))
    assert not any("referee" in axes.get_title() for axes in chart.figure.axes)
    assert any("without a referee" in block.text for block in blocks if isinstance(block, Note))


def test_a_layer_that_was_not_measured_is_an_empty_cell() -> None:
    values = np.array([[0.5, math.nan]])
    figure = layer_maps([LayerMap("γ", values)], ["0"], ["0", "last"], "one")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["0.50", "–"]
    with pytest.raises(ValueError, match="expected something to show"):
        layer_maps([], [], [], "none")


def test_one_label_at_different_layers_is_not_compared(tmp_path: Path) -> None:
    for name, layer in (("a", -1), ("b", 0)):
        options = {"image_layer": layer, "text_layer": layer}
        write_evaluation(tmp_path / name, {"feature_pair": 0.5}, examples=False, options=options)
    sections, comparisons = build_sections(load_runs([tmp_path / "a", tmp_path / "b"]), OrderTest())
    assert comparisons == []
    notes = [block.text for section in sections for block in section.blocks if isinstance(block, Note)]
    layers = "feature_pair, last blocks and feature_pair, inputs"
    assert f"a and b are not compared: {layers} are different methods, or at different layers." in notes
