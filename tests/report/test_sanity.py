from __future__ import annotations

import io
import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from lightning_xai.report.plots import Example, rasterize
from lightning_xai.report.sanity import sanity_curves, sanity_sheet, sanity_table

STAGES = ["head", "block 1", "block 0", "embedding"]
METHODS = ["feature_pair", "gaussian", "odd [red]$x"]


def rows() -> list[dict[str, object]]:
    return [
        {
            "method": method,
            "modality": modality,
            "stage": stage,
            "spearman": 1.0 if method == "gaussian" else 0.8 - 0.3 * number,
            "ssim": math.nan if modality == "text" else 0.5 - 0.1 * number,
            "pairs": 4,
            "constant": number,
        }
        for number, stage in enumerate(STAGES)
        for method in METHODS
        for modality in ("image", "text")
    ]


def example() -> Example:
    return Example(np.random.default_rng(0).random((32, 48, 3)), "", "a dog on $5 mat", (), None, "key")


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_curves_start_at_one_and_show_each_method_in_each_panel() -> None:
    figure = sanity_curves(rows())
    assert len(figure.axes) == 3
    for axes, values in zip(
        figure.axes, ([0.8, 0.5, 0.2, -0.1], [0.5, 0.4, 0.3, 0.2], [0.8, 0.5, 0.2, -0.1]), strict=True
    ):
        assert [str(line.get_label()) for line in axes.lines[:3]] == METHODS
        assert np.allclose(np.asarray(axes.lines[0].get_ydata(), dtype=float), [1.0, *values])
        assert [label.get_text() for label in axes.get_xticklabels()] == ["original", *STAGES]
    gaussian = figure.axes[0].lines[1]
    assert np.array_equal(np.asarray(gaussian.get_ydata()), np.ones(5))
    assert rasterize(figure).std() > 0


def test_a_missing_or_undefined_value_leaves_a_gap() -> None:
    given = [row for row in rows() if row["modality"] == "image"]
    given[0]["spearman"] = math.nan
    figure = sanity_curves(given)
    assert np.isnan(np.asarray(figure.axes[0].lines[0].get_ydata(), dtype=float)).tolist() == [0, 1, 0, 0, 0]
    assert np.isnan(np.asarray(figure.axes[2].lines[0].get_ydata(), dtype=float)).tolist() == [0, 1, 1, 1, 1]
    assert rasterize(figure).std() > 0


def test_more_methods_than_colours_are_still_told_apart() -> None:
    given = [row | {"method": f"method {number}"} for number in range(13) for row in rows()[:2]]
    lines = sanity_curves(given).axes[0].lines[:13]
    assert len({(str(line.get_color()), line.get_linestyle()) for line in lines}) == 13


def test_the_sheet_has_a_row_for_each_method_and_keeps_the_first_and_the_last_stage() -> None:
    generator = np.random.default_rng(1)
    stages = ["original", *(f"block {i}" for i in range(11, -1, -1)), "embedding"]
    maps = {method: [generator.normal(size=(4, 6)) for _ in stages] for method in METHODS}
    sheet = sanity_sheet(example(), maps, stages, columns=5)
    assert len(sheet.axes[0].images) == len(METHODS) * (1 + 2 * 5)
    shown = texts(sheet)
    assert all(f"{method}: a dog on $5 mat" in shown for method in METHODS)
    headings = [text for text in shown if text in (*stages, "image")]
    assert [*headings[:2], headings[-1], len(headings)] == ["image", "original", "embedding", 6]


def test_signed_maps_keep_their_sign_and_others_go_from_least_to_most() -> None:
    signed, one_sided = np.array([[-2.0, 4.0]]), [np.array([[5.0, 6.0]]), np.array([[-6.0, -5.0]])]
    sheet = sanity_sheet(example(), {"a": [signed, signed], "b": one_sided}, ["original", "head"], side=64)
    strengths = [np.asarray(image.get_array()) for image in sheet.axes[0].images]
    maps = [each.tolist() for each in strengths if each.ndim == 2]
    assert maps == [[[-0.5, 1.0]]] * 2 + [[[0.0, 1.0]]] * 2


def test_a_map_that_says_nothing_is_named() -> None:
    maps = {"a": [np.eye(3), np.ones((3, 3)), np.full((3, 3), np.nan)]}
    shown = texts(sanity_sheet(example(), maps, ["original", "head", "embedding"]))
    assert shown.count("constant map") == 1
    assert shown.count("map not finite") == 1


def test_the_table_fits_a_terminal_and_prints_dashes_for_what_is_undefined() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(sanity_table(rows()))
    lines = console.export_text().splitlines()
    (image, text) = (line.split() for line in lines if "odd" in line)
    assert image[-6:] == ["image", "0.800", "0.200", "−0.100", "0.200", "6/22"]
    assert text[-6:] == ["text", "0.800", "0.200", "−0.100", "–", "6/22"]
    assert "odd [red]$x" in "\n".join(lines)
    assert "constant" in "\n".join(lines)
    assert "…" not in "\n".join(lines)
    assert "1: head; 3: block 0; 4: embedding" in " ".join("\n".join(lines).split())


def test_what_does_not_fit_together_is_an_error_in_words() -> None:
    for draw in (sanity_curves, sanity_table):
        with pytest.raises(ValueError, match="rows of a sanity check"):
            draw([])
    with pytest.raises(ValueError, match=r"expected 2 maps of each method.*got {'a': 1}"):
        sanity_sheet(example(), {"a": [np.eye(2)]}, ["original", "head"])
    with pytest.raises(ValueError, match="got none"):
        sanity_sheet(example(), {}, ["original"])
