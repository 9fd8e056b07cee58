"""The towers that open_clip builds, at a layer; no other module knows how open_clip is built inside.

Shape suffixes as in `at_layer`: B batch, N points, T tokens, D hidden width, K embedding width, L tokens as given.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from open_clip.hf_model import HFTextEncoder, MaxPooler, MeanPooler
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import Tensor, nn

from lightning_xai.models.at_layer import (
    EmbeddingPath,
    TextTowerAtLayer,
    TowerAtLayer,
    UnsupportedTowerError,
    resolve_layer,
)
from lightning_xai.models.block_list import BlockList, ImageBlocksAtLayer, TextBlocksAtLayer
from lightning_xai.models.heads import open_clip_pool, resnet_pool, timm_pool
from lightning_xai.models.pooled_block import PooledBlock


def _run(blocks: Iterable[nn.Module], hidden_BTD: Tensor, transformer: nn.Module, mask: Tensor | None = None) -> Tensor:
    """Transformer blocks in whichever axis order this tower keeps."""
    hidden = hidden_BTD if batch_first(transformer) else hidden_BTD.transpose(0, 1)
    for block in blocks:
        hidden = block(hidden, attn_mask=mask)
    return hidden if batch_first(transformer) else hidden.transpose(0, 1)


def batch_first(transformer: nn.Module) -> bool:
    """Whether blocks take [B, T, D]: open_clip 3 lets a transformer choose, open_clip 4 knows nothing else."""
    return bool(getattr(transformer, "batch_first", True))


class VisionTransformerAtLayer(TowerAtLayer):
    """open_clip's VisionTransformer at the input of a block, or of the head; tokens are CLS and the patches."""

    prefix_tokens = 1

    def __init__(self, visual: VisionTransformer, layer: int) -> None:
        self._visual = self.whole = visual
        self._blocks = visual.transformer.resblocks
        self.layer = resolve_layer(layer, 0, len(self._blocks), "image", head=True)
        self.layers = range(len(self._blocks))
        self._at_head = self.layer not in self.layers
        self.block = None if self._at_head else self._blocks[self.layer]
        self.last_block = self._blocks[-1]
        self.grid = tuple(visual.grid_size)
        self._reads_cls = visual.attn_pool is None and visual.pool_type == "tok"
        self._pooled = None
        if self._reads_cls and not self._at_head:
            self._pooled = PooledBlock.of(self.last_block, visual.ln_post, lambda: visual.proj, causal=False)
        self._pool = open_clip_pool(visual) if self._at_head else None
        self.calls_blocks = self._pool is None and (self._pooled is None or self.block is not self.last_block)

    @property
    def reading_layer(self) -> int:
        """The last block where CLS alone is read, else the head."""
        return self.layers[-1] + (not self._reads_cls)

    def blocks_on(self) -> list[nn.Module]:
        """The tower's blocks from this layer on."""
        return list(self._blocks[self.layer :])

    def features_before(self, inputs: Tensor) -> Tensor:
        """Images [B, 3, height, width] -> hidden states [B, T, D]."""
        return _run(self._blocks[: self.layer], self._visual._embeds(inputs), self._visual.transformer)

    def captured(self, block_input: Tensor) -> Tensor:
        """The block's input, as a hook sees it, in the form `features_before` returns."""
        return block_input if batch_first(self._visual.transformer) else block_input.transpose(0, 1)

    def embed_from(self, hidden: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, D] -> embeddings [B, K]."""
        if self._pooled is None:
            return self.embed_after(_run(self._blocks[self.layer :], hidden, self._visual.transformer))
        hidden = _run(self._blocks[self.layer : -1], hidden, self._visual.transformer)
        return self._pooled.read(hidden, _first(hidden))

    def embed_after(self, hidden: Tensor, inputs: Tensor | None = None) -> Tensor:
        """What the last block passes on [B, T, D] -> embeddings [B, K]."""
        return self._head(self._visual._pool(hidden)[0])

    def embed_each(self, hidden: Tensor, inputs: Tensor | None = None, length: int | None = None) -> Tensor:
        """Single tokens [B, N, D] -> embeddings [B, N, K]."""
        if self._visual.attn_pool is not None:
            return super().embed_each(hidden, inputs, length)
        # However tokens are pooled, before the norm or after it: of one token it is that token.
        return self._head(self._visual.ln_post(hidden))

    def path(
        self, hidden: Tensor, reference: Tensor, inputs: Tensor | None = None, directions: int = 1
    ) -> EmbeddingPath:
        """The path: alpha [B, N, T] -> embeddings [B, N, K]."""
        if self._pool is not None:
            return self._pool.path(hidden, reference)
        if self._pooled is None or self.calls_blocks:
            return super().path(hidden, reference, inputs, directions)
        return self._pooled.path(hidden, reference, _first(hidden), directions)

    def _head(self, pooled: Tensor) -> Tensor:
        return pooled if self._visual.proj is None else pooled @ self._visual.proj


def _first(hidden: Tensor) -> Tensor:
    return torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)


class ModifiedResNetAtLayer(TowerAtLayer):
    """CLIP's ResNet with attention pool, at the input of a stage, 1 to 4 (`layer1`...), or of the pool (5)."""

    layers = range(1, 5)
    is_feature_map = True

    def __init__(self, visual: ModifiedResNet, layer: int) -> None:
        self._visual = self.whole = visual
        self.layer = resolve_layer(layer, 1, 4, "image", head=True)
        self._stages = [getattr(visual, f"layer{stage}") for stage in range(1, 5)]
        self.block = [*self._stages, visual.attnpool][self.layer - 1]
        self.last_block = self._stages[-1]
        self._pool = resnet_pool(visual) if self.layer not in self.layers else None
        self.calls_blocks = self._pool is None
        # The three strided convolutions and pools before stage 1 divide by 4, stages 2 to 4 by 2 each.
        stride = 4 * 2 ** max(0, self.layer - 2)
        size = visual.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        self.grid = (height // stride, width // stride)

    def features_before(self, inputs: Tensor) -> Tensor:
        """Images [B, 3, height, width] -> feature maps [B, C, H, W]."""
        hidden: Tensor = self._visual.stem(inputs)
        for stage in self._stages[: self.layer - 1]:
            hidden = stage(hidden)
        return hidden

    def embed_from(self, hidden: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Feature maps [B, C, H, W] -> embeddings [B, K]."""
        for stage in self._stages[self.layer - 1 :]:
            hidden = stage(hidden)
        return self.embed_after(hidden)

    def embed_after(self, hidden: Tensor, inputs: Tensor | None = None) -> Tensor:
        """What the last stage passes on [B, C, H, W] -> embeddings [B, K]."""
        embedding: Tensor = self._visual.attnpool(hidden)
        return embedding

    def path(
        self, hidden: Tensor, reference: Tensor, inputs: Tensor | None = None, directions: int = 1
    ) -> EmbeddingPath:
        """The path: alpha [B, N, T] -> embeddings [B, N, K]."""
        return super().path(hidden, reference) if self._pool is None else self._pool.path(hidden, reference)


class TextTower:
    """open_clip's text transformer, run on no more tokens than the batch's longest caption needs.

    Under the causal mask no token after the pooled end-of-text token reaches it, so leaving these out is exact.
    """

    def __init__(self, model: CLIP | CustomTextCLIP) -> None:
        text = model if isinstance(model, CLIP) else getattr(model, "text", None)
        if not isinstance(text, (CLIP, TextTransformer)):
            raise UnsupportedTowerError(f"a text tower of type {type(text).__name__} is no TextTransformer")
        if getattr(text, "cls_emb", None) is not None or getattr(text, "use_pad_mask", False):
            raise UnsupportedTowerError(
                "a text tower with a class token or padding mask needs tokens after the end of text"
            )
        self._text: Any = text
        self._pool_type = text.text_pool_type if isinstance(text, CLIP) else text.pool_type
        self._eos_id = text.text_eos_id if isinstance(text, CLIP) else text.eos_id
        if self._pool_type not in ("argmax", "eos", "last", "first"):
            raise UnsupportedTowerError(f"text pooled by {self._pool_type!r} has no embedding to explain")
        self.blocks: nn.ModuleList = text.transformer.resblocks
        self.transformer: Any = text.transformer
        self.causal = text.attn_mask is not None
        self.reads_end = self._pool_type in ("argmax", "eos")

    def pool_positions(self, tokens_BL: Tensor) -> Tensor:
        """The position each caption's embedding is read at [B]."""
        if self._pool_type == "argmax":
            return tokens_BL.argmax(dim=1)
        if self._pool_type == "eos":
            return tokens_BL.eq(self._eos_id).int().argmax(dim=1)
        return torch.full_like(tokens_BL[:, 0], 0 if self._pool_type == "first" else tokens_BL.shape[1] - 1)

    def needed(self, tokens_BL: Tensor) -> int | None:
        """Under the causal mask the number of tokens up to where the last embedding of the batch is read, else None."""
        return int(self.pool_positions(tokens_BL).max()) + 1 if self.causal else None

    def trim(self, tokens_BL: Tensor) -> Tensor:
        """The tokens [B, T] of [B, L] that are needed."""
        return tokens_BL[:, : self.needed(tokens_BL)]

    def embed(self, tokens_BL: Tensor, length: int | None = None) -> Tensor:
        """Token and position embeddings [B, T, D] of the first `length` tokens, or of those that are needed."""
        tokens_BL = self.trim(tokens_BL) if length is None else tokens_BL[:, :length]
        dtype = self.transformer.get_cast_dtype()
        embedding: Tensor = self._text.token_embedding(tokens_BL).to(dtype)
        positions: Tensor = self._text.positional_embedding[: tokens_BL.shape[1]].to(dtype)
        return embedding + positions

    def mask(self, hidden_BTD: Tensor) -> Tensor | None:
        """The causal mask [T, T] for so many tokens, or none."""
        tokens = hidden_BTD.shape[1]
        mask: Tensor | None = self._text.attn_mask
        return None if mask is None else mask[:tokens, :tokens]

    def head(self, pooled: Tensor) -> Tensor:
        """Last hidden states at the pooled position [..., D] -> embeddings [..., K]."""
        normalised: Tensor = self._text.ln_final(pooled)
        projection = self._text.text_projection
        if projection is None:
            return normalised
        embedding: Tensor = projection(normalised) if isinstance(projection, nn.Linear) else normalised @ projection
        return embedding

    def pooled_block(self) -> PooledBlock | None:
        """The last block and the head, where only one position is read of them in a way that is known."""
        text = self._text
        return PooledBlock.of(self.blocks[-1], text.ln_final, lambda: text.text_projection, causal=self.causal)

    def encode(self, tokens_BL: Tensor) -> Tensor:
        """Token ids [B, L] -> embeddings [B, K], not normalised; all tokens are run, so `trim` them before."""
        hidden = self.embed(tokens_BL, tokens_BL.shape[1])
        hidden = self.transformer(hidden, attn_mask=self.mask(hidden))
        rows = torch.arange(len(hidden), device=hidden.device)
        return self.head(hidden[rows, self.pool_positions(tokens_BL)])


class TextTransformerAtLayer(TextTowerAtLayer):
    """open_clip's text transformer at the input of a block."""

    def __init__(self, tower: TextTower, layer: int) -> None:
        self._tower = tower
        self.layer = resolve_layer(layer, 0, len(tower.blocks), "text")
        self.layers = range(len(tower.blocks))
        self.block = tower.blocks[self.layer]
        self.last_block = tower.blocks[-1]
        self.causal = tower.causal and tower.reads_end
        self._pooled = tower.pooled_block()
        self.calls_blocks = self._pooled is None or self.block is not self.last_block

    def blocks_on(self) -> list[nn.Module]:
        """The tower's blocks from this layer on."""
        return list(self._tower.blocks[self.layer :])

    def visible(self, tokens: Tensor) -> Tensor:
        """Under the causal mask all tokens up to the one that is read, else all."""
        if not self._tower.causal:
            return torch.ones_like(tokens, dtype=torch.bool)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return positions <= self._tower.pool_positions(tokens)[:, None]

    def needed(self, tokens: Tensor) -> int | None:
        """Under the causal mask as many as the longest caption has."""
        return self._tower.needed(tokens)

    def features_before(self, inputs: Tensor, length: int | None = None) -> Tensor:
        """Token ids [B, L] -> hidden states [B, T, D]; T is `length`, or what the longest caption needs."""
        hidden = self._tower.embed(inputs, length)
        return _run(self._tower.blocks[: self.layer], hidden, self._tower.transformer, self._tower.mask(hidden))

    def captured(self, block_input: Tensor) -> Tensor:
        """The block's input, as a hook sees it, in the form `features_before` returns."""
        return block_input if batch_first(self._tower.transformer) else block_input.transpose(0, 1)

    def embed_from(self, hidden: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, D] of the captions `inputs` -> embeddings [B, K]."""
        pool_B = self._pool(inputs)
        mask, transformer = self._tower.mask(hidden), self._tower.transformer
        if self._pooled is None:
            return self.embed_after(_run(self._tower.blocks[self.layer :], hidden, transformer, mask), inputs)
        hidden = _run(self._tower.blocks[self.layer : -1], hidden, transformer, mask)
        return self._pooled.read(hidden, pool_B)

    def embed_after(self, hidden: Tensor, inputs: Tensor | None = None) -> Tensor:
        """What the last block passes on of the captions `inputs`, [B, T, D] -> embeddings [B, K]."""
        return self._tower.head(hidden[torch.arange(len(hidden), device=hidden.device), self._pool(inputs)])

    def embed_each(self, hidden: Tensor, inputs: Tensor | None = None, length: int | None = None) -> Tensor:
        """Single tokens [B, N, D] -> embeddings [B, N, K]."""
        return self._tower.head(hidden)

    def path(
        self, hidden: Tensor, reference: Tensor, inputs: Tensor | None = None, directions: int = 1
    ) -> EmbeddingPath:
        """The path: alpha [B, N, T] -> embeddings [B, N, K]."""
        if self._pooled is None or self.calls_blocks:
            return super().path(hidden, reference, inputs, directions)
        return self._pooled.path(hidden, reference, self._pool(inputs), directions)

    def _pool(self, inputs: Tensor | None) -> Tensor:
        if inputs is None:
            raise ValueError("text is read at a caption's own position: give its token ids as inputs")
        return self._tower.pool_positions(inputs)


def checkpoint_blocks(model: Any) -> None:
    """Let both towers keep the inputs of their blocks only, and run each block again in the backward pass.

    Raises:
        UnsupportedTowerError: a tower cannot do so.
    """
    towers = {"image": model.visual, "text": getattr(model, "text", getattr(model, "transformer", model))}
    model.set_grad_checkpointing(True)
    if isinstance(towers["text"], HFTextEncoder):
        # Before version 5 its own default is the reentrant kind, which does not go with DistributedDataParallel.
        towers["text"].transformer.gradient_checkpointing_enable({"use_reentrant": False})
        # Only the reentrant kind needs its inputs to require gradients, which forward-mode derivatives do not allow.
        for part in towers["text"].modules():
            for key, hook in list(part._forward_hooks.items()):
                if "make_inputs_require_grads" in getattr(hook, "__qualname__", ""):
                    del part._forward_hooks[key]
    for name, tower in towers.items():
        # open_clip passes over towers that cannot, without an error.
        flags = ("grad_checkpointing", "gradient_checkpointing")
        if not any(getattr(child, flag, False) for child in tower.modules() for flag in flags):
            kind = type(getattr(tower, "trunk", tower)).__name__
            raise UnsupportedTowerError(
                f"the {name} tower, a {kind}, has no gradient checkpointing: set gradient_checkpointing to false; "
                "transformers have it, and chunk_size saves more memory than it does"
            )


def unwrapped(model: Any) -> Any:
    """The model inside torch.compile, a parallel wrapper or one of peft's models, which share its layers."""
    while True:
        if callable(getattr(model, "get_base_model", None)):
            inner = model.get_base_model()
        else:
            inner = getattr(model, "_orig_mod", getattr(model, "module", None))
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def image_tower_at_layer(model: Any, layer: int) -> TowerAtLayer:
    """A model's image tower at the input of `layer`.

    Raises:
        UnsupportedTowerError: a tower of an unsupported kind.
        ValueError: no such layer.
    """
    visual: Any = unwrapped(model).visual
    if isinstance(visual, VisionTransformer):
        return VisionTransformerAtLayer(visual, layer)
    if isinstance(visual, ModifiedResNet):
        return ModifiedResNetAtLayer(visual, layer)
    if isinstance(visual, TimmModel):
        return _timm_at_layer(visual, layer)
    raise UnsupportedTowerError(
        f"an image tower of type {type(visual).__name__} is not supported; open_clip's VisionTransformer, "
        "ModifiedResNet and TimmModel are"
    )


def _timm_at_layer(visual: TimmModel, layer: int) -> ImageBlocksAtLayer:
    trunk: Any = visual.trunk
    for name in ("blocks", "stages", "layers"):
        if isinstance(getattr(trunk, name, None), (nn.Sequential, nn.ModuleList)):
            # A Swin transformer embeds patches too, but passes on feature maps.
            is_map = not hasattr(trunk, "num_prefix_tokens")
            blocks = BlockList(
                trunk,
                name,
                channels_last=getattr(trunk, "output_fmt", "NCHW") == "NHWC",
                prefix=int(getattr(trunk, "num_prefix_tokens", 0)),
            )
            grid = None if is_map else _timm_grid(trunk, visual.image_size)
            return ImageBlocksAtLayer(visual, blocks, (3, *visual.image_size), layer, grid, timm_pool(visual))
    raise UnsupportedTowerError(
        f"a timm tower of type {type(trunk).__name__} is not supported: it has no list of blocks, stages or layers, as "
        "timm's VisionTransformer, ConvNeXt and SwinTransformer have"
    )


def _timm_grid(trunk: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches of images (height, width)."""
    if hasattr(trunk, "embeds"):  # NaFlexVit, which is built for no size and takes the grid of each image
        rows, columns = trunk.embeds.dynamic_feat_size(size)
    else:
        # Not image size by patch size: a hybrid's patches are those of convolutional feature maps.
        rows, columns = trunk.patch_embed.grid_size
    return rows, columns


def text_tower_at_layer(model: Any, layer: int) -> TextTowerAtLayer:
    """A model's text tower at the input of `layer`.

    Raises:
        UnsupportedTowerError: a tower of an unsupported kind.
        ValueError: no such layer.
    """
    model = unwrapped(model)
    text: Any = getattr(model, "text", model)
    if isinstance(text, HFTextEncoder):
        return _hugging_face_at_layer(text, layer)
    if isinstance(text, TextTransformer) and (text.cls_emb is not None or text.use_pad_mask):
        blocks = BlockList(text.transformer, "resblocks", batch_first=batch_first(text.transformer))

        def encode(tokens: Tensor) -> Tensor:
            embedding: Tensor = model.encode_text(tokens, normalize=False)
            return embedding

        reads_last = text.cls_emb is None and text.pool_type == "last"

        def visible(tokens: Tensor) -> Tensor:
            seen: Tensor = tokens != text.pad_id
            if reads_last:  # what is read is read, padding or not
                return torch.cat([seen[:, :-1], torch.ones_like(seen[:, :1])], dim=1)
            if text.cls_emb is None or text.correct_cls_mask:
                return seen
            # Published CoCa weights were trained with the mask one position late, so that the first always shows.
            return torch.cat([torch.ones_like(seen[:, :1]), seen[:, :-1]], dim=1)

        return TextBlocksAtLayer(encode, blocks, layer, visible, trims=text.cls_emb is None)
    return TextTransformerAtLayer(TextTower(model), layer)


def _hugging_face_at_layer(text: HFTextEncoder, layer: int) -> TextBlocksAtLayer:
    stack = getattr(text.transformer, "encoder", text.transformer)
    name = next((name for name in ("layer", "layers", "block") if hasattr(stack, name)), None)
    if name is None:
        raise UnsupportedTowerError(
            f"a text tower of type {type(text.transformer).__name__} is not supported: it has no list of layers"
        )

    def encode(tokens: Tensor) -> Tensor:
        output = text(tokens)
        embedding: Tensor = output[0] if isinstance(output, tuple) else output
        return embedding

    # Only T5's stack calls its list so.
    blocks = BlockList(stack, name, chained=name == "block")
    return TextBlocksAtLayer(
        encode,
        blocks,
        layer,
        lambda tokens: tokens != text.config.pad_token_id,
        pools=isinstance(text.pooler, (MeanPooler, MaxPooler)),
    )
