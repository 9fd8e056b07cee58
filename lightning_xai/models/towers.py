"""The two towers of a dual encoder, each split at a layer into stem and tail: all that is known of open_clip's insides.

Shape suffixes: B batch, N points of a path, T tokens (prefix tokens such as CLS and patches, or caption tokens),
D hidden width, K embedding width, C channels, H x W the patch grid, h heads, e width of a head.

A *layer* means the input of that block. The stem is everything before it, the tail everything from it on:
`tail(stem(x))` is the tower's own output, which `split` checks on a probe input.

Attributions need how the embedding changes while hidden states move from a reference to the input. Sums over the
hidden width can be taken inside, by one number per token: with `x(alpha) = r + alpha_T * (x - r)`,

    d g_k / d alpha_T = sum_D (x - r)[T, D] * d g_k / d x[T, D],

so a *path* is the map alpha [B, N, T] -> embeddings [B, N, K], and its derivatives are all that is ever needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import ResidualAttentionBlock, TextTransformer, VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear

Path = Callable[[Tensor], Tensor]
"""alpha [B, N, T] -> embeddings [B, N, K], differentiable in alpha, forward and backward."""


class Split(Protocol):
    """One tower, cut at the input of a block."""

    @property
    def layer(self) -> int:
        """The block's number, counted as open_clip counts them."""

    @property
    def block(self) -> nn.Module:
        """The block whose input is the stem's output."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the image tokens behind the prefix; (0, 0) for text."""

    @property
    def prefix_tokens(self) -> int:
        """Number of tokens before the grid, such as CLS."""

    def stem(self, inputs: Tensor) -> Tensor:
        """Hidden states at the block's input: [B, T, D], or [B, C, H, W] for a ResNet."""

    def captured(self, block_input: Tensor) -> Tensor:
        """The block's input, as a hook sees it, in the form `stem` returns."""

    def tail(self, hidden: Tensor, pool_B: Tensor | None = None) -> Tensor:
        """Embeddings [B, K], not normalised, of hidden states; text is pooled at the positions `pool_B`."""

    def path(self, hidden: Tensor, reference: Tensor, pool_B: Tensor | None = None) -> Path:
        """The path from a reference (batch of 1 or B) to hidden states."""


class UnsupportedTowerError(ValueError):
    """A tower that cannot be split yet; the message says which towers can."""


@contextmanager
def differentiable(module: nn.Module) -> Iterator[None]:
    """Everything a derivative of `module` needs, undone on leaving, also after an exception.

    Evaluation mode (dropout off, batch statistics frozen), gradients on even inside `no_grad` or `inference_mode`, no
    autocast, and the attention kernel that has forward-mode derivatives.
    """
    training = [child for child in module.modules() if child.training]
    device = next(module.parameters()).device.type
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
        torch.backends.mha.set_fastpath_enabled(False)
        for child in training:
            child.training = False
            stack.callback(setattr, child, "training", True)
        yield


def as_constant(tensor: Tensor) -> Tensor:
    """The tensor without its graph, also usable where gradients are taken if it was made in inference mode."""
    if not tensor.is_inference():
        return tensor.detach()
    with torch.inference_mode(False):
        return tensor.clone()


def resolve_layer(layer: int, first: int, depth: int, tower: str) -> int:
    """A layer number, counted from the end where negative.

    Raises:
        ValueError: the tower has no such layer.
    """
    resolved = first + depth + layer if layer < 0 else layer
    if not first <= resolved < first + depth:
        raise ValueError(
            f"the {tower} tower has layers {first} to {first + depth - 1} (or -{depth} to -1); got layer {layer}"
        )
    return resolved


def _along(alpha_BNT: Tensor, reference: Tensor, delta: Tensor) -> Tensor:
    """Points of the path, flattened to one batch: [B*N, T, D], or [B*N, C, H, W] for feature maps."""
    weights = alpha_BNT.unsqueeze(3)
    if delta.ndim == 4:
        weights = alpha_BNT.reshape(*alpha_BNT.shape[:2], 1, *delta.shape[2:])
    return (reference.unsqueeze(1) + weights * delta.unsqueeze(1)).flatten(0, 1)


def _generic_path(split: Split, hidden: Tensor, reference: Tensor, pool_B: Tensor | None) -> Path:
    delta = hidden - reference

    def embed(alpha_BNT: Tensor) -> Tensor:
        points = alpha_BNT.shape[1]
        pool = None if pool_B is None else pool_B.repeat_interleave(points)
        embedding = split.tail(_along(alpha_BNT, reference, delta), pool)
        return embedding.reshape(-1, points, embedding.shape[1])

    return embed


@dataclass(frozen=True)
class _PooledBlock:
    """A last transformer block of which one position is read: queries, residual and MLP for that position only.

    Layer norm and the key and value projections are linear but for one number per token, the standard deviation, and
    hidden states on a path are `r + alpha * d`. So both are projected once, whatever the number of points: the key at
    alpha is `(Wr + alpha * Wd) / std(alpha)`. The key's bias shifts all scores of a query alike, which the softmax
    ignores.
    """

    block: ResidualAttentionBlock
    causal: bool

    @staticmethod
    def serves(block: nn.Module) -> bool:
        """Whether the block is the plain pre-norm block this shortcut is exact for."""
        return (
            type(block) is ResidualAttentionBlock
            and not hasattr(block, "ln_1_kv")
            and isinstance(block.attn, nn.MultiheadAttention)
            and block.attn.in_proj_weight is not None
            and block.attn.bias_k is None
            and not block.attn.add_zero_attn
        )

    def path(self, hidden_BTD: Tensor, reference_BTD: Tensor, pool_B: Tensor) -> Path:
        """The path: alpha [B, N, T] -> the block's output at the pooled position [B, N, D]."""
        attention, norm = self.block.attn, self.block.ln_1
        delta_BTD = hidden_BTD - reference_BTD
        start, slope = (x - x.mean(dim=2, keepdim=True) for x in (reference_BTD.expand_as(delta_BTD), delta_BTD))
        mean_squares = [(a * b).mean(dim=2).unsqueeze(1) for a, b in ((start, start), (start, slope), (slope, slope))]
        project = _Projection(attention, norm)
        rows = torch.arange(len(delta_BTD), device=delta_BTD.device)
        query_start_BD, query_slope_BD = (project.query(x[rows, pool_B]) for x in (start, slope))
        # One reference serves the whole batch: project it once.
        shared_start = start[:1] if len(reference_BTD) == 1 else start
        key_start, value_start = (x.expand(len(start), -1, -1, -1) for x in project.key_value(shared_start))
        key_slope, value_slope = project.key_value(slope)
        hidden_start_BD, hidden_slope_BD = reference_BTD.expand_as(delta_BTD)[rows, pool_B], delta_BTD[rows, pool_B]
        positions_T = torch.arange(delta_BTD.shape[1], device=delta_BTD.device)
        hidden_from_query_BT = (positions_T > pool_B[:, None]) if self.causal else None

        def output(alpha_BNT: Tensor) -> Tensor:
            square = mean_squares[0] + alpha_BNT * (2 * mean_squares[1] + alpha_BNT * mean_squares[2])
            inverse_std_BNT = torch.rsqrt(square + norm.eps)
            at_query = pool_B[:, None, None].expand(-1, alpha_BNT.shape[1], 1)
            alpha_query_BN1, inverse_std_query_BN1 = (x.gather(2, at_query) for x in (alpha_BNT, inverse_std_BNT))
            query = (query_start_BD[:, None] + alpha_query_BN1 * query_slope_BD[:, None]) * inverse_std_query_BN1
            query_BNhe = project.heads(query + project.query_constant)
            alpha_BN1T, inverse_std_BN1T = alpha_BNT.unsqueeze(2), inverse_std_BNT.unsqueeze(2)
            scores = torch.einsum("bnhe,bthe->bnht", query_BNhe, key_start)
            scores = scores + alpha_BN1T * torch.einsum("bnhe,bthe->bnht", query_BNhe, key_slope)
            scores = scores * inverse_std_BN1T * query_BNhe.shape[3] ** -0.5
            if hidden_from_query_BT is not None:
                scores = scores.masked_fill(hidden_from_query_BT[:, None, None], float("-inf"))
            weights_BNhT = scores.softmax(dim=3) * inverse_std_BN1T
            context = torch.einsum("bnht,bthe->bnhe", weights_BNhT, value_start)
            context = context + torch.einsum("bnht,bthe->bnhe", weights_BNhT * alpha_BN1T, value_slope)
            context_BND = context.flatten(2) + project.value_constant
            residual_BND = hidden_start_BD[:, None] + alpha_query_BN1 * hidden_slope_BD[:, None]
            residual_BND = residual_BND + self.block.ls_1(attention.out_proj(context_BND))
            output_BND: Tensor = residual_BND + self.block.ls_2(self.block.mlp(self.block.ln_2(residual_BND)))
            return output_BND

        return output


class _Projection:
    """Query, key and value projections of a block, with the layer norm's affine part folded in."""

    def __init__(self, attention: nn.MultiheadAttention, norm: nn.LayerNorm) -> None:
        width = attention.embed_dim
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        self._heads = attention.num_heads
        self._scale_D = norm.weight
        self._query_weight, self._key_value_weight = weight[:width], weight[width:]
        constant_3D = linear(norm.bias, weight, bias)
        self.query_constant, _, self.value_constant = constant_3D.chunk(3)

    def heads(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., h, e]."""
        return x.reshape(*x.shape[:-1], self._heads, -1)

    def query(self, centred_BD: Tensor) -> Tensor:
        """The query of centred hidden states, but for the standard deviation and the constant: [B, D]."""
        return linear(centred_BD * self._scale_D, self._query_weight)

    def key_value(self, centred_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Likewise keys and values of all tokens, each [B, T, h, e]."""
        key, value = linear(centred_BTD * self._scale_D, self._key_value_weight).chunk(2, dim=2)
        return self.heads(key), self.heads(value)


def _run(blocks: Iterable[nn.Module], hidden_BTD: Tensor, transformer: nn.Module, mask: Tensor | None = None) -> Tensor:
    """Transformer blocks in whichever axis order this tower keeps."""
    hidden = hidden_BTD if transformer.batch_first else hidden_BTD.transpose(0, 1)
    for block in blocks:
        hidden = block(hidden, attn_mask=mask)
    return hidden if transformer.batch_first else hidden.transpose(0, 1)


class VisionTransformerSplit:
    """open_clip's VisionTransformer, cut at the input of a block; tokens are CLS and the patches."""

    prefix_tokens = 1

    def __init__(self, visual: VisionTransformer, layer: int) -> None:
        self._visual = visual
        self._blocks = visual.transformer.resblocks
        self.layer = resolve_layer(layer, 0, len(self._blocks), "image")
        self.block: nn.Module = self._blocks[self.layer]
        self.grid: tuple[int, int] = tuple(visual.grid_size)
        reads_cls_only = visual.attn_pool is None and visual.pool_type == "tok"
        is_last = self.layer == len(self._blocks) - 1
        self._pooled = (
            _PooledBlock(self.block, causal=False)
            if is_last and reads_cls_only and _PooledBlock.serves(self.block)
            else None
        )

    def stem(self, inputs: Tensor) -> Tensor:
        """Images [B, 3, height, width] -> hidden states [B, T, D]."""
        return _run(self._blocks[: self.layer], self._visual._embeds(inputs), self._visual.transformer)

    def captured(self, block_input: Tensor) -> Tensor:
        """The block's input, as a hook sees it, in the form `stem` returns."""
        return block_input if self._visual.transformer.batch_first else block_input.transpose(0, 1)

    def tail(self, hidden: Tensor, pool_B: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, D] -> embeddings [B, K]."""
        hidden = _run(self._blocks[self.layer :], hidden, self._visual.transformer)
        return self._head(self._visual._pool(hidden)[0])

    def path(self, hidden: Tensor, reference: Tensor, pool_B: Tensor | None = None) -> Path:
        """The path: alpha [B, N, T] -> embeddings [B, N, K]."""
        if self._pooled is None:
            return _generic_path(self, hidden, reference, pool_B)
        output = self._pooled.path(hidden, reference, torch.zeros(len(hidden), dtype=torch.long, device=hidden.device))
        return lambda alpha_BNT: self._head(self._visual.ln_post(output(alpha_BNT)))

    def _head(self, pooled: Tensor) -> Tensor:
        return pooled if self._visual.proj is None else pooled @ self._visual.proj


class ModifiedResNetSplit:
    """CLIP's ResNet with attention pool, cut at the input of a stage, 1 to 4 (`layer1`...); tokens are positions."""

    prefix_tokens = 0

    def __init__(self, visual: ModifiedResNet, layer: int) -> None:
        self._visual = visual
        self.layer = resolve_layer(layer, 1, 4, "image")
        self._stages = [getattr(visual, f"layer{stage}") for stage in range(1, 5)]
        self.block: nn.Module = self._stages[self.layer - 1]
        # The three strided convolutions and pools before stage 1 divide by 4, stages 2 to 4 by 2 each.
        stride = 4 * 2 ** max(0, self.layer - 2)
        size = visual.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        self.grid = (height // stride, width // stride)

    def stem(self, inputs: Tensor) -> Tensor:
        """Images [B, 3, height, width] -> feature maps [B, C, H, W]."""
        hidden: Tensor = self._visual.stem(inputs)
        for stage in self._stages[: self.layer - 1]:
            hidden = stage(hidden)
        return hidden

    def captured(self, block_input: Tensor) -> Tensor:
        """The block's input, as a hook sees it, in the form `stem` returns."""
        return block_input

    def tail(self, hidden: Tensor, pool_B: Tensor | None = None) -> Tensor:
        """Feature maps [B, C, H, W] -> embeddings [B, K]."""
        for stage in self._stages[self.layer - 1 :]:
            hidden = stage(hidden)
        embedding: Tensor = self._visual.attnpool(hidden)
        return embedding

    def path(self, hidden: Tensor, reference: Tensor, pool_B: Tensor | None = None) -> Path:
        """The path: alpha [B, N, H*W] -> embeddings [B, N, K]."""
        return _generic_path(self, hidden, reference, pool_B)


class TextTower:
    """open_clip's text transformer, run on no more tokens than the batch's longest caption needs.

    Under the causal mask nothing behind the pooled end-of-text token reaches it, so cutting there is exact.
    """

    def __init__(self, model: CLIP | CustomTextCLIP) -> None:
        text = model if isinstance(model, CLIP) else getattr(model, "text", None)
        if not isinstance(text, (CLIP, TextTransformer)):
            raise UnsupportedTowerError(f"a text tower of type {type(text).__name__} cannot be split; {_SUPPORTED}")
        if getattr(text, "cls_emb", None) is not None or getattr(text, "use_pad_mask", False):
            raise UnsupportedTowerError(
                f"a text tower with a class token or padding mask cannot be split; {_SUPPORTED}"
            )
        self._text: Any = text
        self._pool_type = text.text_pool_type if isinstance(text, CLIP) else text.pool_type
        self._eos_id = text.text_eos_id if isinstance(text, CLIP) else text.eos_id
        if self._pool_type not in ("argmax", "eos", "last"):
            raise UnsupportedTowerError(f"text pooled by {self._pool_type!r} cannot be split; {_SUPPORTED}")
        self.blocks: nn.ModuleList = text.transformer.resblocks
        self.transformer: Any = text.transformer
        self.causal = text.attn_mask is not None

    def pool_positions(self, tokens_BL: Tensor) -> Tensor:
        """The position each caption's embedding is read at [B]."""
        if self._pool_type == "argmax":
            return tokens_BL.argmax(dim=1)
        if self._pool_type == "eos":
            return tokens_BL.eq(self._eos_id).int().argmax(dim=1)
        return torch.full_like(tokens_BL[:, 0], tokens_BL.shape[1] - 1)

    def embed(self, tokens_BL: Tensor, length: int | None = None) -> Tensor:
        """Token and position embeddings [B, T, D] of the first `length` tokens, or of those that are needed."""
        if length is None and self.causal:
            length = int(self.pool_positions(tokens_BL).max()) + 1
        tokens_BL = tokens_BL[:, :length]
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

    def encode(self, tokens_BL: Tensor) -> Tensor:
        """Token ids [B, L] -> embeddings [B, K], not normalised."""
        hidden = self.embed(tokens_BL)
        hidden = self.transformer(hidden, attn_mask=self.mask(hidden))
        rows = torch.arange(len(hidden), device=hidden.device)
        return self.head(hidden[rows, self.pool_positions(tokens_BL)])


class TextTransformerSplit:
    """open_clip's text transformer, cut at the input of a block; tokens are the caption's, BOS and EOT included."""

    prefix_tokens = 0
    grid = (0, 0)

    def __init__(self, tower: TextTower, layer: int) -> None:
        self._tower = tower
        self.layer = resolve_layer(layer, 0, len(tower.blocks), "text")
        self.block: nn.Module = tower.blocks[self.layer]
        is_last = self.layer == len(tower.blocks) - 1
        self._pooled = _PooledBlock(self.block, tower.causal) if is_last and _PooledBlock.serves(self.block) else None

    def pool_positions(self, tokens_BL: Tensor) -> Tensor:
        """The position each caption's embedding is read at [B]."""
        return self._tower.pool_positions(tokens_BL)

    def stem(self, inputs: Tensor, length: int | None = None) -> Tensor:
        """Token ids [B, L] -> hidden states [B, T, D]; T is `length`, or what the longest caption needs."""
        hidden = self._tower.embed(inputs, length)
        return _run(self._tower.blocks[: self.layer], hidden, self._tower.transformer, self._tower.mask(hidden))

    def captured(self, block_input: Tensor) -> Tensor:
        """The block's input, as a hook sees it, in the form `stem` returns."""
        return block_input if self._tower.transformer.batch_first else block_input.transpose(0, 1)

    def tail(self, hidden: Tensor, pool_B: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, D] and the positions to read [B] -> embeddings [B, K]."""
        if pool_B is None:
            raise ValueError("text is pooled at a caption's own position: give pool_B")
        mask = self._tower.mask(hidden)
        hidden = _run(self._tower.blocks[self.layer :], hidden, self._tower.transformer, mask)
        return self._tower.head(hidden[torch.arange(len(hidden), device=hidden.device), pool_B])

    def path(self, hidden: Tensor, reference: Tensor, pool_B: Tensor | None = None) -> Path:
        """The path: alpha [B, N, T] -> embeddings [B, N, K]."""
        if self._pooled is None or pool_B is None:
            return _generic_path(self, hidden, reference, pool_B)
        output = self._pooled.path(hidden, reference, pool_B)
        return lambda alpha_BNT: self._tower.head(output(alpha_BNT))


_SUPPORTED = "VisionTransformer and ModifiedResNet image towers and TextTransformer text towers can"


def split_image_tower(model: nn.Module, layer: int) -> VisionTransformerSplit | ModifiedResNetSplit:
    """Cut a model's image tower at the input of `layer`.

    Raises:
        UnsupportedTowerError: a tower of another kind.
        ValueError: no such layer.
    """
    visual: Any = model.visual
    if isinstance(visual, VisionTransformer):
        return VisionTransformerSplit(visual, layer)
    if isinstance(visual, ModifiedResNet):
        return ModifiedResNetSplit(visual, layer)
    raise UnsupportedTowerError(f"an image tower of type {type(visual).__name__} cannot be split; {_SUPPORTED}")


def split_text_tower(model: CLIP | CustomTextCLIP, layer: int) -> TextTransformerSplit:
    """Cut a model's text tower at the input of `layer`.

    Raises:
        UnsupportedTowerError: a tower of another kind.
        ValueError: no such layer.
    """
    return TextTransformerSplit(TextTower(model), layer)
