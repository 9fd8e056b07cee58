"""Low-rank adapters as a folder that `peft.PeftModel.from_pretrained(model, FOLDER)` loads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_xai.models.low_rank import Adapter

__all__ = ["PeftAdapter"]

_PREFIX = "base_model.model."
"""In front of the names of modules in peft's files."""


@dataclass(frozen=True)
class PeftAdapter:
    """The two files of a peft adapter.

    Attributes:
        config: of `adapter_config.json`.
        tensors: of `adapter_model.safetensors`.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, adapters: Mapping[str, Adapter]) -> PeftAdapter:
        """The adapters of a model in peft's names.

        peft adapts both projections of an nn.MultiheadAttention or none, so that one without adapter gets zeros.

        Args:
            model: the model without adapters.
            adapters: by the names of their weights in the model.

        Raises:
            ValueError: no adapters, some of several ranks or alphas, or one of a weight that peft cannot adapt.
            ImportError: peft is not installed, by whose release the adapters of nn.MultiheadAttention go.
        """
        kinds = {(adapter.lora_A.shape[0], float(adapter.scaling)) for adapter in adapters.values()}
        if len(kinds) != 1:
            has = "no low-rank adapters" if not kinds else f"adapters of several ranks and alphas / rank: {kinds}"
            raise ValueError(f"a peft adapter is made of a checkpoint that was trained with lora; this one has {has}")
        ((rank, scaling),) = kinds
        config: dict[str, Any] = {"peft_type": "LORA", "r": rank, "lora_alpha": scaling * rank, "inference_mode": True}
        tensors: dict[str, Tensor] = {}
        targets: dict[str, None] = {}
        for name, adapter in adapters.items():
            target, inside = _place(model, name)
            lora_B = adapter.lora_B
            if isinstance(model.get_submodule(target), nn.MultiheadAttention):
                tensors = _zeros(model, target, adapter) | tensors
                if inside != target:
                    config["peft_version"], times = _out_proj_times()
                    lora_B = lora_B / times
            targets[target] = None
            tensors |= _named(inside, adapter.lora_A, lora_B)
        # An expression has to fit whole names; an entry of a list would fit the ends of others, too.
        config["target_modules"] = "|".join(map(re.escape, targets))
        return cls(config, tensors)

    def save(self, folder: Path) -> None:
        """Write both files into a new folder."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(self.tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")


def _place(model: nn.Module, weight: str) -> tuple[str, str]:
    """The module that peft wraps, and the name of the adapter's place within the wrapped model."""
    module, _, own = weight.rpartition(".")
    around = module.rpartition(".")[0]
    part, parent = model.get_submodule(module), model.get_submodule(around)
    if isinstance(parent, nn.MultiheadAttention) and parent.in_proj_weight is not None:
        return around, f"{around}.base_layer.out_proj"
    is_linear = isinstance(part, nn.Linear) and not isinstance(parent, nn.MultiheadAttention)
    if is_linear or (isinstance(part, nn.MultiheadAttention) and own == "in_proj_weight"):
        return module, module
    raise ValueError(
        f"peft has no adapter of {own} of a {type(part).__name__} ({module}): export without --adapter merges it"
    )


def _named(inside: str, lora_A: Tensor, lora_B: Tensor) -> dict[str, Tensor]:
    factors = {"lora_A": lora_A, "lora_B": lora_B}
    return {f"{_PREFIX}{inside}.{name}.weight": value.detach().cpu().contiguous() for name, value in factors.items()}


def _zeros(model: nn.Module, attention: str, like: Adapter) -> dict[str, Tensor]:
    """Adapters of both projections that add nothing."""
    rank, width = like.lora_A.shape[0], model.get_parameter(f"{attention}.out_proj.weight").shape[0]
    zeros = like.lora_A.new_zeros
    return {
        **_named(attention, zeros(rank, width), zeros(3 * width, rank)),
        **_named(f"{attention}.base_layer.out_proj", zeros(rank, width), zeros(width, rank)),
    }


def _out_proj_times() -> tuple[str, float]:
    """The version of peft, and how many times it adds B A to the output projection of an nn.MultiheadAttention.

    Up to 0.21 that is twice (github.com/huggingface/peft/pull/3774), so B has to be half of what is meant. What a
    release does is measured, on an attention of width 1.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            "adapters of nn.MultiheadAttention are exported for the release of peft that is installed: pip install peft"
        ) from error
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(1, 1)})
    config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=["attn"])
    layer: Any = peft.inject_adapter_in_model(config, model).get_submodule("attn")
    projection = layer.base_layer.out_proj
    with torch.no_grad():
        projection.base_layer.weight.zero_()
        for factor in (projection.lora_A, projection.lora_B):
            factor["default"].weight.fill_(1.0)
        layer.merge()
    return peft.__version__, float(projection.base_layer.weight)
