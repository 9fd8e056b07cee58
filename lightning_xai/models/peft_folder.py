"""Low-rank adapters as a folder that `peft.PeftModel.from_pretrained(model, FOLDER)` loads, written and read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_xai.atomic_file import read_json
from lightning_xai.models.low_rank import Adapter

__all__ = ["PeftAdapter"]

_PREFIX = "base_model.model."
"""In front of the names of modules in peft's files."""
_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_OTHER_SUMS = (
    *("use_dora", "use_rslora", "use_bdlora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save"),
    *("lora_bias", "layer_replication", "alora_invocation_tokens", "trainable_token_indices"),
)
"""Options of peft by which an adapter is something else than W + (alpha / r) B A of each target."""


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

    @classmethod
    def load(cls, folder: Path) -> PeftAdapter:
        """Read both files; nothing is unpickled.

        Raises:
            ValueError: a file is missing or broken, or the adapter is none of plain LoRA.
        """
        try:
            config = read_json(folder / _CONFIG, dict[str, Any])
            tensors = load_file(folder / _TENSORS)
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"{folder} is no folder of a peft adapter with {_CONFIG} and {_TENSORS} ({error}): give one that "
                "`export --adapter` or peft's save_pretrained has written"
            ) from error
        kind = config.get("peft_type")
        others = [name for name in _OTHER_SUMS if config.get(name)]
        if kind != "LORA" or others or config.get("bias", "none") != "none":
            what = f"peft_type {kind}" if kind != "LORA" else ", ".join(others) or f"bias {config['bias']}"
            raise ValueError(f"{folder} has an adapter with {what}: only plain LoRA can be a start here")
        return cls(config, tensors)

    def factors(self, model: nn.Module, weights: Iterable[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """A [r, in] and B [out, r] of these weights of a model, by their names.

        Raises:
            ValueError: a weight has no adapter, or another weight has one that is not zero.
            ImportError: peft is not installed, by whose release the adapters of nn.MultiheadAttention go.
        """
        left = dict(self.tensors)
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for name in weights:
            target, inside = _place(model, name)
            keys = [f"{_PREFIX}{inside}.{factor}.weight" for factor in ("lora_A", "lora_B")]
            if not left.keys() >= set(keys):
                targets = self.config.get("target_modules")
                raise ValueError(
                    f"the adapter has nothing for {name}: give lora the targets and towers of its target_modules, "
                    f"{targets!r}"
                )
            lora_A, lora_B = (left.pop(key) for key in keys)
            found[name] = lora_A, lora_B * (1.0 if inside == target else self._times())
        more = sorted(key for key, value in left.items() if "lora_A" not in key and bool(value.any()))
        if more:
            raise ValueError(
                f"the adapter has {len(more)} matrices that lora leaves out, such as "
                f"{more[0].removeprefix(_PREFIX)}: give lora targets and towers that name them, too"
            )
        return found

    def _times(self) -> float:
        """How many times the release that the adapter is of adds that of an output projection of attention."""
        release, times = _out_proj_times()
        own = self.config.get("peft_version", release)
        if own != release:
            raise ValueError(
                f"the adapter is of peft {own}, and {release} is installed, which may add adapters of attention "
                f"otherwise: pip install peft=={own}"
            )
        return times

    def save(self, folder: Path) -> None:
        """Write both files into a new folder."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(self.tensors), folder / _TENSORS, metadata={"format": "pt"})
        (folder / _CONFIG).write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")


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
