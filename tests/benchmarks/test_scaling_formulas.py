"""The formulas against counts: of open_clip's models, of autograd's saved tensors, of the loss's memory, of traffic."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from scaling_formulas import (
    BF16,
    FEATURE_MATRICES,
    FLOAT32,
    LOSS_MATRICES,
    OWN_ROWS_MATRICES,
    Cluster,
    DataMeasures,
    Plan,
    Shape,
    Tower,
    demands,
    evaluation_seconds,
    exchange_bytes,
    loss_seconds,
    memory,
    passes,
    read_rate,
    saturates_at,
    step_seconds,
    towers_seconds,
    waiting_seconds,
)
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lightning_xai.loss import gather_features, global_contrastive_loss
from lightning_xai.models import load_dual_encoder

PLAN, CLUSTER, DATA = Plan(), Cluster(), DataMeasures()


@pytest.fixture(scope="module")
def shape() -> Shape:
    return Shape.of("ViT-B-16")


@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-H-14"])
def test_parameters_are_those_of_open_clips_model(name: str) -> None:
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        model = open_clip.CLIP(**config)
    assert Shape.of(name).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_forward_flops_are_what_torch_counts() -> None:
    name = "ViT-B-32"
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config(name))
        images, tokens = torch.zeros(2, 3, 224, 224), torch.zeros(2, 77, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model.encode_image(images)
        model.encode_text(tokens)
    assert counter.get_total_flops() == 2 * Shape.of(name).forward_flops(77)


def test_a_model_that_is_not_of_two_transformers_is_refused() -> None:
    for name in ("RN50", "convnext_base", "xlm-roberta-base-ViT-B-32", "no-such-model"):
        with pytest.raises(ValueError, match="two transformers"):
            Shape.of(name)


@contextmanager
def saved_bytes(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Storage -> bytes of what autograd keeps, parameters and their copies of another type left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {p.T.shape for p in model.parameters() if p.ndim == 2} | {p.shape for p in model.parameters()}
    kept: list[Tensor] = []
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own and tensor.shape not in shapes:
            kept.append(tensor)  # alive, so that no other gets its address
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_a_block_keeps_as_many_bytes_as_autograd_does(tmp_path: Path, autocast: bool) -> None:
    batch, width, tokens = 4, 128, 17
    kept = {}
    for layers in (1, 2):
        config = {
            "embed_dim": 24,
            "vision_cfg": {"image_size": 64, "layers": layers, "width": width, "patch_size": 16},
            "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
        }
        path = tmp_path / f"{layers}.json"
        path.write_text(json.dumps(config))
        encoder = load_dual_encoder(path)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), saved_bytes(encoder) as found:
            embeddings = encoder.encode_image(torch.randn(batch, 3, 64, 64))
        assert embeddings.requires_grad
        kept[layers] = sum(found.values())
    block = Tower(1, width, width // 64, 4 * width)
    # A CPU's autocast keeps LayerNorm in bfloat16; CUDA's runs it, and so keeps its two inputs, in float32.
    difference = 2 * width * tokens * (FLOAT32 - BF16) if autocast else 0
    expected = block.block_bytes(tokens, BF16 if autocast else FLOAT32) - difference
    assert kept[2] - kept[1] == batch * expected


class LargestLive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all tensors that operations have made and that are alive: now, and at most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.largest = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._seen:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._seen.add(key)
        self.live += size
        self.largest = max(self.largest, self.live)

        def forget() -> None:
            self._seen.discard(key)
            self.live -= size

        weakref.finalize(storage, forget)


def _loss_of(rows: int, width: int) -> Tensor:
    """Of normalised features that nothing else holds; on several ranks, of all of theirs."""
    image, text = (normalize(torch.randn(rows, width), dim=1).requires_grad_() for _ in range(2))
    scale = torch.tensor(10.0, requires_grad=True)
    return global_contrastive_loss(image, text, scale, torch.ones(rows, dtype=torch.bool))[0]


def _loss_peak(rows: int, width: int) -> int:
    """Bytes."""
    with LargestLive() as counted:
        _loss_of(rows, width).backward()  # type: ignore[no-untyped-call]
    return int(counted.largest)


def _loss_flops(rows: int, width: int) -> int:
    with FlopCounterMode(display=False) as counter:
        _loss_of(rows, width).backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())


def test_the_loss_holds_as_many_matrices_as_the_formula_says() -> None:
    assert _loss_peak(1024, 4) / (FLOAT32 * 1024**2) == pytest.approx(LOSS_MATRICES, rel=0.02)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_loss_of_several_ranks_holds_as_many_matrices_as_the_formula_says() -> None:
    world, rows = 2, 512
    for peak in run_distributed(_loss_peak, rows, 4, world_size=world):
        assert peak / (FLOAT32 * world * rows**2) == pytest.approx(OWN_ROWS_MATRICES, rel=0.02)
    rows, width = 8, 2048
    matrix = FLOAT32 * world * rows * (2 * width + 1)
    for peak in run_distributed(_loss_peak, rows, width, world_size=world):
        # And up to two of this rank's own rows, which on many ranks are nothing.
        assert 0 < peak / matrix - FEATURE_MATRICES < 2.1 / world


@pytest.mark.distributed
def test_the_loss_computes_what_the_formula_says(shape: Shape) -> None:
    plan = replace(PLAN, batch_size=32)
    for world in (1, 2):
        counts = (
            [_loss_flops(32, shape.embedding)]
            if world == 1
            else run_distributed(_loss_flops, 32, shape.embedding, world_size=world)
        )
        seconds = loss_seconds(shape, plan, CLUSTER, world)
        assert counts == pytest.approx([seconds * 67e12 * 0.7] * world)


def _count_exchange() -> list[int]:
    """Bytes that this rank gives to the collectives of one step: to gather, and to sum."""
    with (
        mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as gather,
        mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce,
    ):
        features = torch.randn(3, 5, requires_grad=True)
        image, text, _ = gather_features(features, features, torch.ones(3, dtype=torch.bool))
        (image.sum() + text.sum()).backward()  # type: ignore[no-untyped-call]
    (gathered,), (summed,) = gather.call_args_list, reduce.call_args_list
    return [gathered.args[1].nbytes, summed.args[0].nbytes]


@pytest.mark.distributed
def test_features_are_exchanged_as_the_formula_says(shape: Shape) -> None:
    world, batch, width = 2, 3, 5
    gathered, summed = run_distributed(_count_exchange, world_size=world)[0]
    assert (gathered, summed) == (batch * (2 * width + 1) * FLOAT32, world * batch * (2 * width + 1) * FLOAT32)
    # On a ring, gathering passes on the rows of all others, and summing passes everything on twice but for one part.
    expected = (world - 1) * gathered + 2 * (world - 1) / world * summed
    features, _ = exchange_bytes(replace(shape, embedding=width), replace(PLAN, batch_size=batch), world)
    assert features == expected


def test_one_gpu_exchanges_nothing_and_waits_for_nobody(shape: Shape) -> None:
    assert exchange_bytes(shape, PLAN, 1) == (0, 0)
    assert waiting_seconds(shape, PLAN, CLUSTER, 1) == 0


def test_gradients_of_ddp_are_sent_twice_and_fsdp_sends_half_as_much_again(shape: Shape) -> None:
    _, ddp = exchange_bytes(shape, PLAN, 4)
    _, fsdp = exchange_bytes(shape, replace(PLAN, fsdp=True), 4)
    assert ddp == 2 * 3 / 4 * 4 * shape.parameters
    assert fsdp == 1.5 * ddp
    # Two chunks: each is gathered to be embedded, embedded again and differentiated, and its gradients are scattered.
    _, chunked = exchange_bytes(shape, replace(PLAN, fsdp=True, chunk_size=128), 4)
    assert chunked == 8 / 2 * ddp
    assert exchange_bytes(shape, replace(PLAN, chunk_size=128), 4)[1] == ddp


def test_a_step_is_its_parts_and_gradients_hide_behind_the_backward_pass(shape: Shape) -> None:
    idle = replace(CLUSTER, network=1e20, gpu=replace(CLUSTER.gpu, link=1e20))
    towers, loss = towers_seconds(shape, PLAN, idle), loss_seconds(shape, PLAN, idle, 64)
    assert step_seconds(shape, PLAN, idle, 64) == pytest.approx(towers + loss)
    features, gradients = exchange_bytes(shape, PLAN, 64)
    # So slow that gradients take just as long as the backward pass: only the features are waited for.
    rate = gradients / (towers * 2 / 3)
    slow = replace(CLUSTER, network=rate, network_utilisation=1.0)
    assert waiting_seconds(shape, PLAN, slow, 64) == pytest.approx(features / rate)
    slower = replace(slow, network=rate / 2)
    assert waiting_seconds(shape, PLAN, slower, 64) == pytest.approx(2 * features / rate + towers * 2 / 3)
    # In chunks, gradients are whole in the backward pass of the last one only.
    chunked = replace(PLAN, chunk_size=64)
    assert waiting_seconds(shape, chunked, slow, 64) == pytest.approx(features / rate + towers * 2 / 3 * 3 / 4)


def test_collectives_run_at_the_speed_of_the_slowest_link() -> None:
    cluster = replace(CLUSTER, network=50e9, network_utilisation=0.5)
    assert (cluster.link(8), cluster.link(9)) == (cluster.gpu.link / 2, 25e9)


@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 3), ({"gradient_checkpointing": True}, 4), ({"chunk_size": 8}, 4), ({"chunk_size": 256}, 3)],
)
def test_saving_memory_costs_a_forward_pass(options: dict[str, Any], count: int, shape: Shape) -> None:
    plan = replace(PLAN, **options)
    assert passes(plan) == count
    assert towers_seconds(shape, plan, CLUSTER) == pytest.approx(
        count * 256 * shape.forward_flops(32) / (989e12 * 0.35)
    )


def test_chunks_and_checkpointing_and_sharding_save_the_memory_they_are_for(shape: Shape) -> None:
    plain = memory(shape, PLAN, 8)
    chunked = memory(shape, replace(PLAN, chunk_size=32), 8)
    checkpointed = memory(shape, replace(PLAN, gradient_checkpointing=True), 8)
    sharded = memory(shape, replace(PLAN, fsdp=True), 8)
    assert chunked["activations"] == plain["activations"] / 8
    assert checkpointed["activations"] < plain["activations"] / 4
    assert sharded["weights and states"] < plain["weights and states"] / 4
    for saving, part in ((chunked, "activations"), (checkpointed, "activations"), (sharded, "weights and states")):
        assert saving | {part: 0} == plain | {part: 0}


def test_the_memory_of_the_loss_grows_with_the_global_batch(shape: Shape) -> None:
    small, large = (memory(shape, PLAN, world)["loss"] for world in (8, 64))
    assert large == 8 * small
    assert small == FLOAT32 * (OWN_ROWS_MATRICES * 256 * 2048 + FEATURE_MATRICES * 2048 * (2 * shape.embedding + 1))
    assert memory(shape, PLAN, 1)["loss"] == FLOAT32 * LOSS_MATRICES * 256**2


def test_reading_is_as_fast_as_cores_or_storage_allow() -> None:
    assert read_rate(CLUSTER, replace(DATA, reader_rate=100), 2) == 2 * 14 * 100
    assert read_rate(CLUSTER, replace(DATA, bytes_per_sample=1e6), 1024) == 20e9 / 1e6


def test_demands_are_one_where_a_resource_is_just_enough(shape: Shape) -> None:
    rate = 8 * 256 / step_seconds(shape, PLAN, CLUSTER, 8)
    data = replace(DATA, reader_rate=rate / (8 * CLUSTER.cores_per_gpu))
    cluster = replace(CLUSTER, storage=rate * data.bytes_per_sample)
    cluster = replace(cluster, gpu=replace(cluster.gpu, memory=sum(memory(shape, PLAN, 8).values())))
    found = demands(shape, PLAN, cluster, data, 8, 8 * 256)
    assert [found[name] for name in ("readers", "storage", "GPU memory", "pairs")] == pytest.approx([1] * 4)
    towers = towers_seconds(shape, PLAN, cluster)
    assert found["loss"] == loss_seconds(shape, PLAN, cluster, 8) / towers
    assert found["network"] == waiting_seconds(shape, PLAN, cluster, 8) / towers


def test_saturation_is_found_where_the_demand_first_reaches_one(shape: Shape) -> None:
    def at(samples: int) -> int | None:
        return saturates_at("pairs", shape, PLAN, CLUSTER, DATA, samples, 1024)

    assert [at(256), at(257), at(4 * 256), at(1024 * 256), at(1024 * 256 + 1)] == [1, 2, 4, 1024, None]


def test_an_evaluation_is_spread_but_for_its_recall(shape: Shape) -> None:
    one = evaluation_seconds(shape, PLAN, CLUSTER, 1, 1000, 5000)
    four = evaluation_seconds(shape, PLAN, CLUSTER, 4, 1000, 5000)
    assert four == pytest.approx((one[0] / 4, one[1]))
    caption = shape.forward_flops(32) - shape.forward_flops(0)
    expected = 1000 * (shape.forward_flops(0) + 5 * caption) / (989e12 * 0.35)
    assert one[0] == pytest.approx(expected)


def _recall_flops() -> int:
    from lightning_xai.metrics.retrieval import recall_at_k

    images, texts = normalize(torch.randn(20, 8), dim=1), normalize(torch.randn(100, 8), dim=1)
    with FlopCounterMode(display=False) as counter:
        recall_at_k(images, texts, torch.arange(100) // 5)
    return int(counter.get_total_flops())


def test_recall_computes_what_the_formula_says(shape: Shape) -> None:
    small = replace(shape, embedding=8)
    _, seconds = evaluation_seconds(small, PLAN, CLUSTER, 2, 20, 100)
    assert _recall_flops() == pytest.approx(seconds * 67e12 * 0.7)
