#!/usr/bin/env bash
# peft: LoRA on nn.MultiheadAttention adds the output projection's adapter twice, and moves the frozen weights.
#
# One would guess that LoRA computes W + (alpha / r) B A from frozen W. On `nn.MultiheadAttention` (open_clip's attention) peft
# computes W + 2 (alpha / r) B A for the output projection, in each forward pass and in what `merge_and_unload` returns: it adds
# the product to the weight itself, and then asks the projection's own layer to merge. The input projection is right. As the
# sum is subtracted again after each pass, the frozen W is another one afterwards, by rounding errors that add up as adapters
# learn.
#
# Users care because adapters that were trained elsewhere, copied into peft, give other embeddings without an error (and the
# other way around), and because a base model that was frozen is no longer the base model, bit for bit.
#
# Source: run and seen in November 2026; github.com/huggingface/peft/pull/3774 mends the doubling, and was open then. Run it
# with Python 3.10 or later and pip; it installs PyTorch (several gigabytes) in a temporary folder, and fails if what it prints
# changes.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1 peft==0.21.2 transformers==5.24.0
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import copy

import peft
import torch
from torch import nn

torch.manual_seed(0)
plain = nn.ModuleDict({"attn": nn.MultiheadAttention(32, 4, batch_first=True)}).eval()
config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["attn"])
adapted = peft.inject_adapter_in_model(config, copy.deepcopy(plain)).eval()
for name, value in adapted.named_parameters():
    if "lora_B" in name:
        nn.init.normal_(value, std=0.1)
state = {name: value.clone() for name, value in peft.get_peft_model_state_dict(adapted).items()}
delta = {
    place: 6 / 2 * state[f"{inside}.lora_B.weight"] @ state[f"{inside}.lora_A.weight"]
    for place, inside in (("in_proj", "attn"), ("out_proj", "attn.base_layer.out_proj"))
}
inputs = torch.randn(8, 10, 32)


@torch.no_grad()
def outputs(model):
    return model["attn"](inputs, inputs, inputs, need_weights=False)[0]


def by_hand(out_times):
    model = copy.deepcopy(plain)
    model["attn"].in_proj_weight.data += delta["in_proj"]
    model["attn"].out_proj.weight.data += out_times * delta["out_proj"]
    return outputs(model)


print(f"peft {peft.__version__}, torch {torch.__version__}, CPU")
found = outputs(adapted)
times = [times for times in (0, 1, 2) if torch.allclose(found, by_hand(times), rtol=1e-4, atol=1e-5)]
for each in (0, 1, 2):
    print(f"  largest difference from W + {each} (alpha / r) B A of the output projection: {(found - by_hand(each)).abs().max():.1e}")
moved = []
for passes in (1, 1000):
    for _ in range(passes):
        outputs(adapted)
        adapted["attn"].lora_B["default"].weight.data.add_(torch.randn(96, 2), alpha=1e-3)  # as a step of training
    moved.append(float((adapted["attn"].in_proj_weight - plain["attn"].in_proj_weight).abs().max()))
    print(f"  the frozen in_proj_weight has moved by {moved[-1]:.1e} after {passes} passes with changing adapters")
if times != [2] or not 0 < moved[0] < moved[-1] < 1e-2:
    raise SystemExit("This has changed: read the header again.")
print("As described: added twice, and the frozen weight moves.")
PYTHON
