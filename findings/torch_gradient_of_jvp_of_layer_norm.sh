#!/usr/bin/env bash
# PyTorch: the gradient of a directional derivative through layer_norm is wrong, without an error.
#
# One would guess that derivatives compose: that reverse mode (`torch.autograd.grad`) over forward mode (`torch.func.jvp`)
# gives the same second derivative as reverse mode over reverse mode, or as differences. Through `layer_norm` it does not: its
# forward-mode formula uses mean and deviation that the forward pass saved, and these count as constants afterwards. Written
# out in elementary operations it is right, and so are rms_norm, group_norm, softmax, GELU and attention's math kernel.
#
# Users care because training on attributions (a loss on Jacobian-vector products of a transformer) differentiates exactly
# this: every transformer has layer norms, the loss goes down all the same, and only a check against differences shows that
# its gradient belongs to another function.
#
# Source: run and seen in November 2026; github.com/pytorch/pytorch/issues/196700 reports forward mode over forward mode of
# layer_norm, and 196699 batch_norm in training. Run it with Python 3.10 or later and pip; it installs PyTorch (several
# gigabytes) in a temporary folder, and fails if what it prints changes.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch.nn import functional as F

torch.manual_seed(0)


def written_out(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5)


functions = {
    "layer_norm": lambda x: F.layer_norm(x, (6,)),
    "layer_norm written out": written_out,
    "rms_norm": lambda x: F.rms_norm(x, (6,)),
    "group_norm": lambda x: F.group_norm(x[:, :, None], 2)[:, :, 0],
    "softmax": lambda x: x.softmax(-1),
    "gelu": F.gelu,
}
print(f"torch {torch.__version__}, float64, CPU")
print("second derivative along two directions: reverse over forward, reverse over reverse, differences")
wrong = []
for name, function in functions.items():
    x = torch.randn(2, 6, dtype=torch.double, requires_grad=True)
    along, weights, second = (torch.randn(2, 6, dtype=torch.double) for _ in range(3))

    def first_forward(x):
        return (torch.func.jvp(function, (x,), (along,))[1] * weights).sum()

    def first_reverse(x):
        (gradient,) = torch.autograd.grad((function(x) * weights).sum(), x, create_graph=True)
        return (gradient * along).sum()

    over_forward, over_reverse = (
        float((torch.autograd.grad(first(x), x)[0] * second).sum()) for first in (first_forward, first_reverse)
    )
    with torch.no_grad():
        ends = [first_forward(x + step * second) for step in (1e-6, -1e-6)]
    differences = float((ends[0] - ends[1]) / 2e-6)
    assert abs(over_reverse - differences) < 1e-6, name
    if abs(over_forward - differences) > 1e-6:
        wrong.append(name)
    print(f"  {name}: {over_forward:.6f}, {over_reverse:.6f}, {differences:.6f}")
print("wrong, without an error:", ", ".join(wrong) or "none")
if wrong != ["layer_norm"]:
    raise SystemExit("This has changed: read the header again.")
PYTHON
