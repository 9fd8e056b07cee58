"""An encoder whose parameters, gradients and optimizer states are spread over processes: FSDP2."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lightning_xai.models.at_layer import evaluating
from lightning_xai.models.dual_encoder import DualEncoder

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule

__all__ = [
    "gather_blocks",
    "gather_parameters",
    "is_sharded",
    "mend_optimizer_state",
    "release_parameters",
    "shard_encoder",
]


def shard_encoder(encoder: DualEncoder, mesh: DeviceMesh) -> None:
    """Spread an encoder over the processes of a mesh, block by block, with the weights of the first process.

    From then on each process holds its share of every parameter. `forward` puts a block's parameters together when it
    gets there, and lets go of them after it; the backward pass does the same, and averages gradients over processes as
    DistributedDataParallel does. All other methods need `gather_parameters` first. The logit scale and bias, scalars,
    stay whole on every process. Names and shapes in the state dict are as before.

    Args:
        encoder: changed in place, and moved to the mesh's device, one block at a time.
        mesh: of one dimension.

    Raises:
        RuntimeError: torch is too old.
        ValueError: a model without a `logit_scale` (ALIGN).
    """
    if not hasattr(encoder.model, "logit_scale"):
        raise ValueError(f"{encoder.name} has a temperature, which cannot be sharded: take strategy ddp")
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import Replicate, distribute_tensor

    known = inspect.signature(fully_shard).parameters
    if not hasattr(FSDPModule, "set_reshard_after_forward") or "ignored_params" not in known:
        raise RuntimeError(
            f"torch {torch.__version__} cannot shard an encoder: its fully_shard lacks ignored_params, or its modules "
            "set_reshard_after_forward; install a newer torch, or take strategy ddp"
        )
    whole = set()
    for name in _scalars(encoder):
        scalar = getattr(encoder.model, name)
        # It has no dimension that could be cut, so FSDP leaves it alone; `DualEncoder` averages its gradient.
        copied = nn.Parameter(
            distribute_tensor(scalar.detach().to(mesh.device_type), mesh, [Replicate()]),
            requires_grad=scalar.requires_grad,
        )
        setattr(encoder.model, name, copied)
        whole.add(copied)
    for module in (*encoder.blocks(), encoder):
        module.to(mesh.device_type)
        for tensor in (*module.parameters(), *module.buffers()):
            if not hasattr(tensor, "to_local"):  # neither whole nor a share already
                dist.broadcast(tensor.detach(), src=0)
        fully_shard(module, mesh=mesh, ignored_params=whole)


def is_sharded(encoder: DualEncoder) -> bool:
    """Return whether `shard_encoder` has sharded the encoder."""
    return hasattr(encoder, "unshard")


def gather_parameters(encoder: DualEncoder) -> None:
    """Give every process all parameters until `release_parameters`, as evaluation and attribution need them.

    All processes have to call it. It takes the memory of the whole model, without gradients and optimizer states. An
    encoder that is not sharded stays as it is.
    """
    if not is_sharded(encoder):
        return
    _keep_whole(encoder, True)
    weight = encoder.logit_scale
    with torch.no_grad(), evaluating(encoder):
        # A pass through everything: what it gathers on its way stays.
        encoder(
            torch.zeros(1, *encoder.image_shape, device=weight.device),
            encoder.tokenizer.encode(["a probe"]).to(weight.device),
        )


def gather_blocks(blocks: Iterable[nn.Module]) -> None:
    """Give every process the parameters of some blocks until the backward pass is through with them.

    For a training step that reads weights after `forward`. Blocks that are not sharded stay as they are.
    """
    for block in blocks:
        unshard: Any = getattr(block, "unshard", None)
        if unshard is not None:
            unshard()


def release_parameters(encoder: DualEncoder) -> None:
    """Undo `gather_parameters`."""
    if not is_sharded(encoder):
        return
    for module in _shards(encoder):
        module.reshard()
    _keep_whole(encoder, False)


def mend_optimizer_state(encoder: DualEncoder, optimizer: Optimizer) -> None:
    """Make what a restored AdamW averages of the logit scale and bias fit their gradients.

    torch (2.14) restores the averages of a scalar as plain tensors, which do not go with a DTensor's gradient. An
    optimizer that was not restored, and an encoder that is not sharded, stay as they are.
    """
    if not is_sharded(encoder):
        return
    from torch.distributed.tensor import distribute_tensor

    for scalar in (getattr(encoder.model, name) for name in _scalars(encoder)):
        averages = optimizer.state.get(scalar, {})
        for name in averages.keys() & {"exp_avg", "exp_avg_sq"}:
            if not hasattr(averages[name], "to_local"):
                average = averages[name].to(scalar.device)
                averages[name] = distribute_tensor(average, scalar.device_mesh, scalar.placements)


def _scalars(encoder: DualEncoder) -> list[str]:
    """The model's parameters that every process holds, since they have no dimension to cut."""
    return [name for name in ("logit_scale", "logit_bias") if getattr(encoder.model, name, None) is not None]


def _keep_whole(encoder: DualEncoder, keep: bool) -> None:
    shards = _shards(encoder)
    for module in shards:
        # In training the root's, too, stay after forward: the backward pass begins with them.
        module.set_reshard_after_forward(not keep and module is not shards[0], recurse=False)
        # Attribution takes derivatives, too, though not by parameters.
        module.set_reshard_after_backward(not keep, recurse=False)
        module.set_requires_gradient_sync(not keep, recurse=False)


def _shards(encoder: DualEncoder) -> list[FSDPModule]:
    """The parts that are gathered one by one, the root first."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in encoder.modules() if isinstance(module, FSDPModule)]
