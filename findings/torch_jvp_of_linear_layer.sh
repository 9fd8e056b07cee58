#!/usr/bin/env bash
# PyTorch: a derivative along a direction multiplies by each weight matrix three times, also where weights are constants.
#
# One would guess that a Jacobian-vector product costs two forward passes: the values, and the tangents through the same
# linear layers. For `y = W x` with a constant W that is W x and W v. PyTorch also multiplies x by the tangent of W, a
# matrix of zeros that it makes for that: three products, for `nn.Linear` as for `x @ W.T`, with `torch.func.jvp` as with
# dual numbers, whether the weights require gradients or not.
#
# Users care because towers are mostly linear layers, so that attributions by forward-mode derivatives, which are chosen
# for their cost, pay half as much again. A `torch.autograd.Function` whose `jvp` leaves the weights out pays two.
#
# Source: run and seen in November 2026, floating-point operations by torch.utils.flop_counter. Run it with Python 3.10 or
# later and pip; it installs PyTorch (several gigabytes) in a temporary folder, and fails if what it prints changes.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode


def operations(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


class ConstantWeights(torch.autograd.Function):
    @staticmethod
    def forward(x, weight):
        return x @ weight.T

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def jvp(ctx, x, _):
        return x @ ctx.saved_tensors[0].T


def dual(layer, x, v):
    with forward_ad.dual_level():
        layer(forward_ad.make_dual(x, v))


print(f"PyTorch {torch.__version__}. Products with the weights that one derivative along a direction takes:")
torch.manual_seed(0)
x, v = torch.randn(2, 5, 64)
found = []
for trained in (True, False):
    layer = nn.Linear(64, 64).requires_grad_(trained)
    forms = {
        "nn.Linear, torch.func.jvp": lambda: torch.func.jvp(layer, (x,), (v,)),
        "nn.Linear, dual numbers": lambda: dual(layer, x, v),
        "x @ W.T, torch.func.jvp": lambda: torch.func.jvp(lambda y: y @ layer.weight.T, (x,), (v,)),
        "a Function for constant W": lambda: torch.func.jvp(lambda y: ConstantWeights.apply(y, layer.weight), (x,), (v,)),
    }
    for name, run in forms.items():
        products = operations(run) / operations(lambda: layer(x))
        found.append(products)
        print(f"  {name}, weights that {'require gradients' if trained else 'are frozen'}: {products:g}")
assert found == [3, 3, 3, 2] * 2, found
PYTHON
