#!/usr/bin/env bash
# PyTorch: freezing a linear layer's weights can make it slower, as each batch element then gets its own copy of them.
#
# One would guess that weights without gradients make a pass cheaper, or leave it as it is. Given tokens [B, T, D] whose
# memory has gaps (a transposed view, as `nn.MultiheadAttention(batch_first=True)` hands to its projections), a layer
# with weights that require gradients is one matrix product. Where the weights are frozen it is a batched one, for which
# the weight matrix is repeated for each element of the first axis; the backward pass to the tokens likewise.
#
# Users care because explanations and adapters freeze weights. One thread took 1.4 times as long, there and back, for 50
# tokens of 16 images and a layer 768 -> 2304, and the copies take memory that grows with that axis. `.contiguous()` before
# the layer brings the one product back.
#
# Source: run and seen in November 2026, by the operators that PyTorch dispatches. Run it with Python 3.10 or later and pip;
# it installs PyTorch (several gigabytes) in a temporary folder, and fails if what it prints changes.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


class Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name in PRODUCTS:
            self.seen.append(f"{name} of {' and '.join(str([*a.shape]) for a in args[-2:])}")
        return function(*args, **(kwargs or {}))


print(f"PyTorch {torch.__version__}. Products of a linear layer 64 -> 32 of 7 x 3 tokens, forward, then backward to the tokens:")
found = {}
for gaps in (False, True):
    for frozen in (False, True):
        layer = nn.Linear(64, 32).requires_grad_(not frozen)
        tokens = torch.randn(3, 7, 64).transpose(0, 1) if gaps else torch.randn(7, 3, 64)
        tokens.requires_grad_()
        with Products() as products:
            output = layer(tokens)
            torch.autograd.grad(output.sum(), tokens)
        found[gaps, frozen] = products.seen
        kind = f"{'with' if gaps else 'without'} gaps, weights {'frozen' if frozen else 'that require gradients'}"
        print(f"  tokens {kind}: {'; '.join(products.seen)}")
forms = {case: [seen.split()[0] for seen in products] for case, products in found.items()}
assert forms[False, False][0] == forms[False, True][0] == "addmm", forms
assert forms[True, False][0] in ("mm", "addmm"), forms
assert forms[True, True] == ["bmm", "bmm"], forms
assert "[7, 64, 32]" in found[True, True][0], found
PYTHON
