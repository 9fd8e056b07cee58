"""benchmarks/tower_kinds.py builds each kind of tower, and knows where it is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tower_kinds
from tower_kinds import KINDS

from lightning_xai.models import load_dual_encoder

# Image tower: its first layer, that of the last block, and the one at which places are still apart.
LAYERS = {
    "vit": (0, 2, 2),
    "siglip": (0, 2, 3),
    "pe_core": (0, 2, 3),
    "fastvit": (0, 3, 4),
    "resnet": (1, 4, 5),
    "convnext": (0, 3, 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(KINDS))
def test_each_kind_is_built_and_measured_at_its_last_block_where_it_reads_and_at_its_inputs(
    name: str, tmp_path: Path
) -> None:
    path = tmp_path / "kind.json"
    path.write_text(json.dumps(KINDS[name].config))
    encoder = load_dual_encoder(path).eval()
    assert encoder.image_at_layer().grid == (8, 8)
    found = list(tower_kinds.settings(encoder))
    first, last, reading = LAYERS[name]
    assert found[0] == ("last blocks, as the paper has it", (last, 1), "right", 10)
    assert found[-1] == ("inputs", (first, 0), "midpoint", 5)
    between = [(layers, rule, steps) for _, layers, rule, steps in found[3:-1]]
    rules = [("right", 10), ("midpoint", 4), ("midpoint", 5)]
    assert between == ([] if reading == last else [((reading, 1), *rule) for rule in rules])
