"""Compute, traffic and memory of contrastive training by formula, as this package does it; pure functions.

W ranks (one GPU each), B pairs a rank, G = W * B pairs a step, K embedding width, P parameters, L caption length in
tokens. Everything is in FLOP (a multiplication and an addition are two), bytes and seconds, for one rank and one step
of bf16-mixed training with AdamW in float32, unless it says otherwise. What is an assumption, and not a count, is a
field of `Cluster`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BF16, FLOAT32 = 2, 4
BACKWARD = 2  # times the forward pass: gradients of inputs and of weights
LOSS_MATRICES = 5.5
"""Matrices [B, B] of float32 that `contrastive_loss` holds at its peak on one rank: product, logits, one with invalid
columns hidden, both log-softmaxes, and two of bool. `tests/benchmarks/test_scaling_formulas.py` counts these."""
OWN_ROWS_MATRICES = 4.25
"""Matrices [B, G] of float32 that `global_contrastive_loss` holds at its peak on each of several ranks: both
log-softmaxes, two on their way back, and one of bool."""
FEATURE_MATRICES = 3
"""Matrices [G, 2 K + 1] of float32 that it holds besides: the features of all, and two of their gradients."""


@dataclass(frozen=True)
class Gpu:
    """A device as its maker's data sheet has it.

    Attributes:
        name: what the data sheet calls it.
        cuda_name: words that are all in the name CUDA gives it.
        flops: dense bf16 FLOP/s.
        float32_flops: FLOP/s in float32 without TF32, which torch leaves off by default.
        memory: bytes.
        link: bytes/s to the other GPUs of its node, one way.
    """

    name: str
    cuda_name: tuple[str, ...]
    flops: float
    float32_flops: float
    memory: float
    link: float


GPUS = {
    "A100": Gpu("NVIDIA A100 SXM 80 GB", ("A100", "80GB", "SXM"), 312e12, 19.5e12, 80e9, 300e9),
    "H100": Gpu("NVIDIA H100 SXM", ("H100", "HBM3"), 989e12, 67e12, 80e9, 450e9),
    "H200": Gpu("NVIDIA H200 SXM", ("H200",), 989e12, 67e12, 141e9, 450e9),
}


@dataclass(frozen=True)
class Cluster:
    """The machines; defaults are those of a DGX H100, and assumptions to be replaced by what is measured.

    Attributes:
        gpu: the device.
        utilisation: share of the bf16 peak that the towers reach (`benchmarks/training.py --device cuda` measures it).
        float32_utilisation: share of the float32 peak that the loss reaches.
        gpus_per_node: GPUs that are linked directly.
        network: bytes/s between nodes for each GPU, one way (400 Gbit/s).
        network_utilisation: share of a link that a collective reaches.
        cores_per_gpu: CPU cores that can read and decode for one GPU.
        storage: bytes/s of the storage the shards lie on, all readers together.
        checkpoint_rate: bytes/s at which one rank writes.
    """

    gpu: Gpu = GPUS["H100"]
    utilisation: float = 0.35
    float32_utilisation: float = 0.7
    gpus_per_node: int = 8
    network: float = 50e9
    network_utilisation: float = 0.8
    cores_per_gpu: int = 14
    storage: float = 20e9
    checkpoint_rate: float = 1e9

    def link(self, world: int) -> float:
        """Bytes/s at which a rank's collectives run: those of the slowest link on the ring."""
        slowest = self.gpu.link if world <= self.gpus_per_node else min(self.network, self.gpu.link)
        return slowest * self.network_utilisation


@dataclass(frozen=True)
class DataMeasures:
    """What `--measure` finds of a folder of shards and of this machine.

    Attributes:
        bytes_per_sample: of a shard, image and annotation and tar headers.
        reader_rate: samples/s that one worker on one core reads, decodes, transforms and collates.
        manifest_bytes: of a manifest file, for each shard.
        manifest_seconds: to parse the manifest and check that the shards are there, for each shard.
        manifest_memory: bytes of a process that holds a manifest, for each shard.
    """

    bytes_per_sample: float = 164_500
    reader_rate: float = 156
    manifest_bytes: float = 179
    manifest_seconds: float = 8.7e-6
    manifest_memory: float = 346


@dataclass(frozen=True)
class Plan:
    """The run's settings, by the names they have in a config.

    Attributes:
        batch_size: pairs a rank.
        caption_tokens: tokens of a batch's longest caption, at which the text tower stops.
        gradient_checkpointing: keep one hidden state a block, and run each block again in the backward pass.
        chunk_size: pairs whose activations are held at a time; None: all.
        fsdp: parameters, gradients and optimizer state spread over the ranks.
        samples_per_shard: of the data set.
    """

    batch_size: int = 256
    caption_tokens: int = 32
    gradient_checkpointing: bool = False
    chunk_size: int | None = None
    fsdp: bool = False
    samples_per_shard: int = 1000


@dataclass(frozen=True)
class Tower:
    """A transformer of open_clip."""

    layers: int
    width: int
    heads: int
    mlp_width: int

    @property
    def block_parameters(self) -> int:
        """Of one block: attention, MLP, two LayerNorms, with biases."""
        attention = 4 * self.width * self.width + 4 * self.width
        mlp = 2 * self.width * self.mlp_width + self.width + self.mlp_width
        return attention + mlp + 4 * self.width

    def flops(self, tokens: int) -> float:
        """Forward, one sequence: matrix products of every block and of its attention."""
        products = 2 * tokens * (4 * self.width**2 + 2 * self.width * self.mlp_width)
        return float(self.layers * (products + 4 * tokens**2 * self.width))

    def block_bytes(self, tokens: int, number: int = BF16) -> float:
        """Kept by one block for the backward pass of one sequence; `number` bytes for an entry of a matrix product.

        The normalised inputs of attention and MLP, queries, keys, values, the attention's result and the MLP's hidden
        layer before and after its activation; and, in float32 also under autocast, both LayerNorms' inputs, their
        means and deviations, and the attention's log-sum-exp.
        """
        entries = 6 * self.width + 2 * self.mlp_width
        float32 = 2 * self.width + 4 + self.heads
        return float(tokens * (entries * number + float32 * FLOAT32))


@dataclass(frozen=True)
class Shape:
    """A CLIP model of two transformers.

    Attributes:
        name: open_clip's.
        image: the image tower.
        text: the text tower.
        image_size: pixels of a side.
        patch_size: pixels of a side.
        vocabulary: tokens.
        context: positions of the text tower.
        embedding: K.
    """

    name: str
    image: Tower
    text: Tower
    image_size: int
    patch_size: int
    vocabulary: int
    context: int
    embedding: int

    @classmethod
    def of(cls, name: str) -> Shape:
        """The shape of an open_clip model.

        Raises:
            ValueError: no such model, or one that is not of two plain transformers.
        """
        import open_clip

        config: Mapping[str, Any] = open_clip.get_model_config(name) or {}
        vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
        if not isinstance(vision.get("layers"), int) or "hf_model_name" in text or "timm_model_name" in vision:
            raise ValueError(f"{name!r}: expected an open_clip model of two transformers, such as ViT-B-16")

        def tower(part: Mapping[str, Any], heads: int) -> Tower:
            width = part["width"]
            return Tower(part["layers"], width, heads, int(width * part.get("mlp_ratio", 4.0)))

        return cls(
            name,
            image=tower(vision, vision["width"] // vision.get("head_width", 64)),
            text=tower(text, text["heads"]),
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            vocabulary=text["vocab_size"],
            context=text["context_length"],
            embedding=config["embed_dim"],
        )

    @property
    def image_tokens(self) -> int:
        """Patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def parameters(self) -> int:
        """P, as open_clip builds it."""
        image, text = self.image, self.text
        stem = image.width * (3 * self.patch_size**2 + 1 + self.image_tokens)
        vision = stem + image.layers * image.block_parameters + 4 * image.width + image.width * self.embedding
        words = text.width * (self.vocabulary + self.context)
        return vision + words + text.layers * text.block_parameters + 2 * text.width + text.width * self.embedding + 1

    def forward_flops(self, caption_tokens: int) -> float:
        """Of one image and one caption."""
        patches = 2 * (self.image_tokens - 1) * 3 * self.patch_size**2 * self.image.width
        heads = 2 * (self.image.width + self.text.width) * self.embedding
        return patches + heads + self.image.flops(self.image_tokens) + self.text.flops(caption_tokens)


def passes(plan: Plan) -> int:
    """Passes through the towers in a step, counted in forward passes."""
    return 1 + BACKWARD + plan.gradient_checkpointing + (chunks(plan) > 1)


def chunks(plan: Plan) -> int:
    """Parts in which a rank embeds its batch."""
    return -(-plan.batch_size // plan.chunk_size) if plan.chunk_size else 1


def towers_seconds(shape: Shape, plan: Plan, cluster: Cluster) -> float:
    """Forward and backward pass of a rank's batch; each means of saving memory costs one more forward pass."""
    flops = passes(plan) * plan.batch_size * shape.forward_flops(plan.caption_tokens)
    return flops / (cluster.gpu.flops * cluster.utilisation)


def loss_seconds(shape: Shape, plan: Plan, cluster: Cluster, world: int) -> float:
    """The loss, in float32: products of [B, K] and [K, G].

    One rank has a matrix of logits for both directions: one product, and two for the gradients. Each of several ranks
    compares its images with all captions, and its captions with all images: twice as many.
    """
    products = (1 + BACKWARD) * (1 if world == 1 else 2)
    flops = products * 2 * plan.batch_size * world * plan.batch_size * shape.embedding
    return flops / (cluster.gpu.float32_flops * cluster.float32_utilisation)


def exchange_bytes(shape: Shape, plan: Plan, world: int) -> tuple[float, float]:
    """What a rank sends (and receives) in a step on a ring: for the features, and for the gradients.

    Features: `gather_features` gathers rows of 2 K + 1 float32 (both towers, valid or not), which sends W - 1 times the
    rank's own rows; its backward pass sums the gradient of all W * B rows, which sends 2 (W - 1) / W times those.
    Gradients: DDP sums P float32. FSDP2 gathers P float32 for the forward and for the backward pass and scatters the
    sum of their gradients; of several chunks it does so for each, and gathers once more where one is embedded again.
    """
    rows = plan.batch_size * (2 * shape.embedding + 1) * FLOAT32
    ring = (world - 1) / world
    features = (world - 1) * rows + 2 * ring * world * rows
    times = (3 if chunks(plan) == 1 else 4 * chunks(plan)) if plan.fsdp else 2
    gradients = times * ring * shape.parameters * FLOAT32
    return features, gradients


def step_seconds(shape: Shape, plan: Plan, cluster: Cluster, world: int) -> float:
    """A step whose data are there: towers, loss, and what is sent without computing at the same time."""
    towers, loss = towers_seconds(shape, plan, cluster), loss_seconds(shape, plan, cluster, world)
    return towers + loss + waiting_seconds(shape, plan, cluster, world)


def waiting_seconds(shape: Shape, plan: Plan, cluster: Cluster, world: int) -> float:
    """What a rank waits for others: for their features, and for what computing does not hide of gradients.

    DDP sends a gradient once it is whole: while the last chunk's backward pass goes on, which is two of the three (or
    more) passes. FSDP2 gathers and scatters all the time.
    """
    features, gradients = exchange_bytes(shape, plan, world)
    link, towers = cluster.link(world), towers_seconds(shape, plan, cluster)
    hidden = towers if plan.fsdp else towers * BACKWARD / passes(plan) / chunks(plan)
    return features / link + max(0.0, gradients / link - hidden)


def memory(shape: Shape, plan: Plan, world: int) -> dict[str, float]:
    """Bytes of a rank at the peak of a step, by what they hold.

    Weights, their gradients and AdamW's two averages in float32, weights in bf16 for autocast, and DDP's buckets of
    gradients. With FSDP2 all that is spread, and two blocks are whole at a time.
    """
    weights = shape.parameters * FLOAT32
    if plan.fsdp and world > 1:
        block = max(shape.image.block_parameters, shape.text.block_parameters)
        states = 4 * weights / world + 2 * block * (FLOAT32 + BF16)
    else:
        states = 4 * weights + shape.parameters * BF16 + (weights if world > 1 else 0)
    pairs = min(plan.chunk_size or plan.batch_size, plan.batch_size)
    activations = pairs * sum(
        _tower_bytes(tower, tokens, plan.gradient_checkpointing)
        for tower, tokens in ((shape.image, shape.image_tokens), (shape.text, plan.caption_tokens))
    )
    images = plan.batch_size * 3 * shape.image_size**2 * FLOAT32
    everyone = world * plan.batch_size
    loss = plan.batch_size * everyone * (LOSS_MATRICES if world == 1 else OWN_ROWS_MATRICES) * FLOAT32
    if world > 1:
        loss += FEATURE_MATRICES * everyone * (2 * shape.embedding + 1) * FLOAT32
    return {"weights and states": states, "activations": activations, "images": float(images), "loss": loss}


def _tower_bytes(tower: Tower, tokens: int, checkpointing: bool) -> float:
    block = tower.block_bytes(tokens)
    return tower.layers * tokens * tower.width * FLOAT32 + block if checkpointing else tower.layers * block


def read_rate(cluster: Cluster, data: DataMeasures, world: int) -> float:
    """Samples/s of all ranks that readers on all cores and the storage allow."""
    return min(world * cluster.cores_per_gpu * data.reader_rate, cluster.storage / data.bytes_per_sample)


RESOURCES = {
    "readers": "more `num_workers` and cores; images stored at the size they are trained at",
    "storage": "shards copied to the nodes' own disks; images stored at the size they are trained at",
    "GPU memory": "activations: `gradient_checkpointing`, `chunk_size`; weights: FSDP2; loss: a smaller `batch_size`",
    "loss": "a smaller `batch_size`: the time of the loss grows with it and with the global batch",
    "network": "gradients: a larger `batch_size`, if need be with `chunk_size`; features: a smaller one",
    "pairs": "a smaller `batch_size`: an epoch needs one batch for each rank",
}
"""What can run out, and the setting that moves it."""


def demands(
    shape: Shape, plan: Plan, cluster: Cluster, data: DataMeasures, world: int, samples: int
) -> dict[str, float]:
    """What a run wants of each of `RESOURCES`, over what is there; from 1 on it is saturated.

    Readers and storage: against the rate of the GPUs, if nothing held them up. Loss and network: their seconds against
    those of the towers; from 1 on, GPUs do other things longer than they train. Pairs: the global batch against the
    data set.
    """
    rate = world * plan.batch_size / step_seconds(shape, plan, cluster, world)
    towers = towers_seconds(shape, plan, cluster)
    loss = loss_seconds(shape, plan, cluster, world)
    return {
        "readers": rate / (world * cluster.cores_per_gpu * data.reader_rate),
        "storage": rate * data.bytes_per_sample / cluster.storage,
        "GPU memory": sum(memory(shape, plan, world).values()) / cluster.gpu.memory,
        "loss": loss / towers,
        "network": waiting_seconds(shape, plan, cluster, world) / towers,
        "pairs": world * plan.batch_size / samples,
    }


def saturates_at(
    resource: str,
    shape: Shape,
    plan: Plan,
    cluster: Cluster,
    data: DataMeasures,
    samples: int,
    largest: int,
) -> int | None:
    """The least power of two GPUs at which a resource is saturated; None if it is not up to `largest`."""
    worlds = (1 << power for power in range(largest.bit_length()))
    return next((world for world in worlds if demands(shape, plan, cluster, data, world, samples)[resource] >= 1), None)


def checkpoint_bytes(shape: Shape) -> float:
    """Of a Lightning checkpoint: weights and AdamW's two averages, float32."""
    return 3.0 * shape.parameters * FLOAT32


def evaluation_seconds(
    shape: Shape, plan: Plan, cluster: Cluster, world: int, images: int, captions: int
) -> tuple[float, float]:
    """Embedding a split spread over the ranks, and both directions of recall, in float32, on every rank alike."""
    image = shape.forward_flops(0)
    caption = shape.forward_flops(plan.caption_tokens) - image
    embedding = -(-images // world) * (image + captions / images * caption)
    recall = 2 * 2 * images * captions * shape.embedding
    return (
        embedding / (cluster.gpu.flops * cluster.utilisation),
        recall / (cluster.gpu.float32_flops * cluster.float32_utilisation),
    )
