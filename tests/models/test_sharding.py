from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ARCHITECTURES, randomised
from distributed import run_distributed
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lightning_xai.models import DualEncoder, load_dual_encoder
from lightning_xai.models.sharding import gather_parameters, is_sharded, release_parameters, shard_encoder


def encoder_of(name: str, folder: str, seed: int = 0) -> DualEncoder:
    path = Path(folder) / f"{name}-{dist.get_rank() if dist.is_initialized() else 'alone'}" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(ARCHITECTURES[name]))
    torch.manual_seed(seed)
    encoder: DualEncoder = randomised(load_dual_encoder(path), seed)
    return encoder.eval()


@torch.no_grad()
def outputs(encoder: DualEncoder, through: str) -> tuple[Tensor, Tensor]:
    """Embeddings of three pairs, through `forward` or through the methods that evaluation calls."""
    images = torch.randn(3, *encoder.image_shape, generator=torch.Generator().manual_seed(1))
    tokens = encoder.tokenizer.encode(["a dog on a red mat", "two cats", "one"])
    if through == "forward":
        image, text = encoder(images, tokens)
        return image, text
    return encoder.encode_image(images), encoder.encode_text(tokens)


def share(encoder: DualEncoder) -> int:
    """How many numbers of the parameters this process holds."""
    parameters: list[Any] = list(encoder.parameters())
    return sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in parameters)


def shard_on_this_rank(name: str, folder: str) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    encoder = encoder_of(name, folder, seed=dist.get_rank())  # the ranks begin with different weights
    shard_encoder(encoder, init_device_mesh("cpu", (dist.get_world_size(),)))
    found: dict[str, Any] = {"sharded": is_sharded(encoder), "forward": outputs(encoder, "forward")}
    # What stays of the pass is the root's: the backward pass would begin with it.
    gather_parameters(encoder)
    found |= {"gathered": outputs(encoder, "methods"), "whole": share(encoder)}
    release_parameters(encoder)
    state: dict[str, Any] = encoder.state_dict()
    found["share"] = share(encoder)
    found["state"] = {key: x.full_tensor() if hasattr(x, "full_tensor") else x for key, x in state.items()}
    found["scale"] = encoder.logit_scale.detach().clone()
    torch.autograd.backward((1.0 + dist.get_rank()) * encoder.logit_scale)
    gradient: Any = encoder.model.logit_scale.grad
    found["gradient"] = gradient.to_local().item()
    return found


needs_recent_torch = pytest.mark.skipif(
    not hasattr(FSDPModule, "set_reshard_after_forward"), reason="this torch cannot shard an encoder"
)


@needs_recent_torch
@pytest.mark.parametrize("name", ["vit", "vit_custom_block", "resnet"])
def test_an_encoder_shared_by_two_processes_is_the_first_ones(name: str, tmp_path: Path) -> None:
    plain = encoder_of(name, str(tmp_path))
    expected, total = outputs(plain, "methods"), share(plain)
    ranks = run_distributed(shard_on_this_rank, name, str(tmp_path))
    for rank in ranks:
        assert rank["sharded"]
        for found in (rank["forward"], rank["gathered"]):
            for own, other in zip(found, expected, strict=True):
                torch.testing.assert_close(own, other)
        assert rank["whole"] == total
        assert rank["state"].keys() == plain.state_dict().keys()
        for key, value in plain.state_dict().items():
            assert torch.equal(rank["state"][key], value), key
        assert torch.equal(rank["scale"], plain.logit_scale)
        assert rank["scale"].shape == ()
        assert rank["gradient"] == 1.5  # the mean of 1 and 2
    assert sum(rank["share"] for rank in ranks) == total + 1, "only the scalar is held twice"
    assert min(rank["share"] for rank in ranks) > 0.4 * total


def test_an_encoder_that_is_not_sharded_stays_as_it_is(make_encoder: Callable[..., DualEncoder]) -> None:
    encoder = make_encoder("vit")
    before = {name: id(p) for name, p in encoder.named_parameters()}
    gather_parameters(encoder)
    release_parameters(encoder)
    assert not is_sharded(encoder)
    assert {name: id(p) for name, p in encoder.named_parameters()} == before


def test_a_torch_that_cannot_keep_the_scale_whole_is_refused(
    make_encoder: Callable[..., DualEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def older(module: Any, *, mesh: Any = None) -> None:
        raise AssertionError("nothing is to be sharded")

    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", older)
    mesh: Any = None
    with pytest.raises(RuntimeError, match="install a newer torch, or take strategy ddp"):
        shard_encoder(make_encoder("vit"), mesh)
