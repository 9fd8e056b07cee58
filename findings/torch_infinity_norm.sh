#!/usr/bin/env bash
# PyTorch: on the CPU, the infinity norm of a gradient takes several times as long as its 2-norm, or as its smallest and
# largest value.
#
# One would guess that the largest absolute value is the cheapest of all norms: one pass, no products. On the CPU
# `torch.linalg.vector_norm(x, inf)` looks at one number at a time, while the 2-norm and `torch.aminmax` look at many. So
# do those that call it: `torch.nn.utils.get_total_norm`, and `clip_grad_norm_` with `norm_type=inf`.
#
# Users care because the infinity norm is the natural question "is any gradient NaN or infinite?", which a training asks at
# each step; a table of 49,408 token embeddings makes it a tenth of the step of a small model. `aminmax` answers it as well,
# NaN included.
#
# Source: run and seen in November 2026; a comment on https://github.com/pytorch/pytorch/pull/91502 says that reductions on
# the CPU are not vectorised in general, and that PR did so for the 2-norm alone. Run it with Python 3.10 or later and pip; it
# installs PyTorch (several gigabytes) in a temporary folder, and fails if what it prints changes. Times differ, so that
# only their ratios are looked at, with a wide margin.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import math
from timeit import repeat

import torch
from torch.nn.utils import get_total_norm

torch.set_num_threads(1)
torch.manual_seed(0)
gradient = torch.randn(49408, 128)
ways = {
    "linalg.vector_norm(x, inf)": lambda: torch.linalg.vector_norm(gradient, math.inf),
    "nn.utils.get_total_norm([x], inf)": lambda: get_total_norm([gradient], math.inf),
    "linalg.vector_norm(x, 2)": lambda: torch.linalg.vector_norm(gradient, 2),
    "aminmax": lambda: torch.stack(torch.aminmax(gradient)).abs().max(),
}
seconds = {name: min(repeat(way, number=5, repeat=7)) / 5 for name, way in ways.items()}
print(f"PyTorch {torch.__version__}, one thread, a gradient of 49,408 x 128. Time, in those of aminmax:")
for name, taken in seconds.items():
    print(f"  {name:34} {taken / seconds['aminmax']:5.1f}")
largest = [ways[name]().item() for name in ("linalg.vector_norm(x, inf)", "aminmax")]
print(f"  the same number: {largest[0] == largest[1]}")
gradient[3, 5] = math.nan
print(f"  NaN is found by both: {all(math.isnan(ways[name]().item()) for name in ways)}")

assert largest[0] == largest[1]
assert all(math.isnan(way().item()) for way in ways.values())
for name in ("linalg.vector_norm(x, inf)", "nn.utils.get_total_norm([x], inf)"):
    assert seconds[name] > 3 * seconds["aminmax"], (name, seconds)
    assert seconds[name] > 3 * seconds["linalg.vector_norm(x, 2)"], (name, seconds)
PYTHON
