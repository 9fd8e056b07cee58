"""Any tower that is a list of blocks, at a layer, without knowing the code around the blocks.

`features_before` is the tower's own forward pass, stopped at the block; `embed_from` is the same pass without the
blocks before it, with the block's input replaced. This serves the towers of timm and Hugging Face. As for every tower,
the encoder checks that both together give the tower's own output.

Shape suffixes as in `at_layer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_xai.models.at_layer import (
    EmbeddingPath,
    TextTowerAtLayer,
    TowerAtLayer,
    UnsupportedTowerError,
    evaluating,
    positions_read,
    resolve_layer,
)
from lightning_xai.models.token_pool import TokenPool


class _ReachedError(Exception):
    """Carries the hidden states out of a forward pass that need not go on."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Given(nn.Module):
    """Stands where the blocks stood, and returns what the last of them would."""

    def __init__(self, hidden: Tensor, block: nn.Module) -> None:
        super().__init__()
        self._hidden = hidden
        self._block = [block]  # in a list, so that it is no part of this

    def __getattr__(self, name: str) -> Any:
        # Towers ask a block for more than its output, such as the type of its weights.
        return getattr(self.__dict__["_block"][0], name) if "_block" in self.__dict__ else super().__getattr__(name)

    def forward(self, *ignored: Any, **ignored_too: Any) -> Tensor:
        return self._hidden


@dataclass(frozen=True)
class BlockList:
    """The list in which a tower keeps its blocks, and how these pass on their hidden states.

    Attributes:
        parent: the module that holds the list.
        name: the list's attribute: an `nn.Sequential` or `nn.ModuleList`.
        channels_last: whether feature maps are [B, H, W, C].
        batch_first: whether token sequences are [B, T, D].
        prefix: number of tokens before an image's grid.
        chained: whether the first block makes something that all blocks use (T5's position bias). Then none is taken
            out, and those before the layer run for that alone.
    """

    parent: nn.Module
    name: str
    channels_last: bool = False
    batch_first: bool = True
    prefix: int = 0
    chained: bool = False

    @property
    def blocks(self) -> Any:
        """The list itself."""
        return getattr(self.parent, self.name)

    def outward(self, hidden: Tensor) -> Tensor:
        """A block's input in the form of `features_before`: [B, T, D] or [B, C, H, W]."""
        if hidden.ndim == 4:
            return hidden.permute(0, 3, 1, 2) if self.channels_last else hidden
        return hidden if self.batch_first else hidden.transpose(0, 1)

    def inward(self, hidden: Tensor) -> Tensor:
        """The reverse of `outward`."""
        if hidden.ndim == 4:
            return hidden.permute(0, 2, 3, 1) if self.channels_last else hidden
        return hidden if self.batch_first else hidden.transpose(0, 1)

    def reach(self, layer: int, run: Callable[[], object]) -> Tensor:
        """The input of a block, or the output of the last one, in the tower's forward pass `run`, which ends there."""

        def stop(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            raise _ReachedError(arguments[0] if arguments else keywords["hidden_states"])

        def stop_after(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            raise _ReachedError(output[0] if isinstance(output, tuple) else output)

        blocks = self.blocks
        if layer == len(blocks):
            handle = blocks[-1].register_forward_hook(stop_after)
        else:
            handle = blocks[layer].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            run()
        except _ReachedError as reached:
            return self.outward(reached.hidden)
        finally:
            handle.remove()
        raise RuntimeError(f"block {layer} of {type(self.parent).__name__}.{self.name} is not part of its forward pass")

    @contextmanager
    def entered(self, layer: int, hidden: Tensor) -> Iterator[None]:
        """Inside, the tower's forward pass begins at a block, with `hidden` as its input."""
        blocks, hidden = self.blocks, self.inward(hidden)
        if layer == len(blocks):
            setattr(self.parent, self.name, nn.Sequential(_Given(hidden, blocks[-1])))
            handle = None
        else:

            def enter(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
                if arguments:
                    return (hidden, *arguments[1:]), keywords
                return arguments, {**keywords, "hidden_states": hidden}

            setattr(self.parent, self.name, blocks if self.chained else blocks[layer:])
            handle = blocks[layer].register_forward_pre_hook(enter, with_kwargs=True)
        try:
            yield
        finally:
            setattr(self.parent, self.name, blocks)
            if handle is not None:
                handle.remove()


class ImageBlocksAtLayer(TowerAtLayer):
    """An image tower that is a list of blocks (timm's ViT, SigLIP, ConvNeXt, Swin...), at the input of one or the head.

    Args:
        tower: the tower; images go in, embeddings come out.
        blocks: where its blocks are.
        shape: (channels, height, width) of its images in pixels.
        layer: the block's number, from 0; one more than the last block's is the head.
        grid: rows and columns of its tokens after the prefix; None for feature maps, which show theirs.
        pool: what the tower ends in, where that is known.
    """

    def __init__(
        self,
        tower: nn.Module,
        blocks: BlockList,
        shape: tuple[int, int, int],
        layer: int,
        grid: tuple[int, int] | None,
        pool: TokenPool | None = None,
    ) -> None:
        self._tower = self.whole = tower
        self._list = blocks
        self._shape = shape
        self.layer = resolve_layer(layer, 0, len(blocks.blocks), "image", head=True)
        self.layers = range(len(blocks.blocks))
        self.block = blocks.blocks[self.layer] if self.layer in self.layers else None
        self.last_block = blocks.blocks[-1]
        self._ends_in_pool = pool is not None
        self._pool = pool if self.block is None else None
        self.calls_blocks = self._pool is None
        self.is_feature_map = grid is None
        if grid is None:
            with torch.no_grad(), evaluating(tower):
                hidden = self.features_before(self._blank(next(tower.parameters())))
            if hidden.ndim != 4:
                raise UnsupportedTowerError(
                    f"{type(blocks.parent).__name__} hands hidden states of shape {[*hidden.shape]} to its "
                    f"{blocks.name}; feature maps [B, C, H, W] have places to attribute to, or tokens with a grid of "
                    "patches"
                )
            grid = (hidden.shape[2], hidden.shape[3])
        self.grid = grid
        self.prefix_tokens = blocks.prefix

    @cached_property
    def reading_layer(self) -> int:
        """The last block where at most one patch is read of its output, such as CLS alone; else the head."""
        last, head = self.layers[-1], self.layers[-1] + 1
        if self.is_feature_map or self._ends_in_pool:
            return head
        with torch.no_grad(), evaluating(self._tower):
            # Blocks of tokens pass on as many as they take, so that the first one's input shows the shape.
            hidden = self._list.reach(0, lambda: self._tower(self._blank(next(self._tower.parameters()))))
        noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
        read = positions_read(self._tower, self.embed_after, noise)
        return head if read[self.prefix_tokens :].sum() > 1 else last

    def _blank(self, like: Tensor) -> Tensor:
        # One image is enough to get to the block, whatever the number of hidden states that go on from there.
        return like.new_zeros(1, *self._shape)

    def features_before(self, inputs: Tensor) -> Tensor:
        """Images [B, 3, height, width] -> hidden states [B, T, D] or [B, C, H, W]."""
        return self._list.reach(self.layer, lambda: self._tower(inputs))

    def blocks_on(self) -> list[nn.Module]:
        """The tower's blocks from this layer on; none of feature maps."""
        return [] if self.is_feature_map else list(self._list.blocks[self.layer :])

    def captured(self, block_input: Tensor) -> Tensor:
        """The block's input, as a hook sees it, in the form `features_before` returns."""
        return self._list.outward(block_input)

    def embed_from(self, hidden: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Hidden states -> embeddings [B, K]."""
        return self._embed(hidden, self.layer)

    def embed_after(self, hidden: Tensor, inputs: Tensor | None = None) -> Tensor:
        """What the last block passes on -> embeddings [B, K]."""
        return self._embed(hidden, len(self._list.blocks))

    def path(
        self, hidden: Tensor, reference: Tensor, inputs: Tensor | None = None, directions: int = 1
    ) -> EmbeddingPath:
        """The path: alpha [B, N, T] -> embeddings [B, N, K]."""
        return super().path(hidden, reference) if self._pool is None else self._pool.path(hidden, reference)

    def _embed(self, hidden: Tensor, layer: int) -> Tensor:
        with self._list.entered(layer, hidden):
            embedding: Tensor = self._tower(self._blank(hidden))
        return embedding


class TextBlocksAtLayer(TextTowerAtLayer):
    """A text tower that is a list of blocks (Hugging Face's, open_clip's with a class token), at the input of one.

    Args:
        encode: token ids [B, L] -> embeddings [B, K].
        blocks: where the tower's blocks are.
        layer: the block's number, from 0.
        visible: tokens [B, L] -> which of them the embedding can depend on, bool [B, L].
        trims: whether the tower takes captions of any length, so that padding of the whole batch can be cut off.
        causal: as of `TextTowerAtLayer`.
        pools: whether the head pools tokens, instead of reading one position.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        blocks: BlockList,
        layer: int,
        visible: Callable[[Tensor], Tensor],
        *,
        trims: bool = True,
        causal: bool = False,
        pools: bool = False,
    ) -> None:
        self._encode = encode
        self.causal = causal
        self._list = blocks
        self._visible = visible
        self._trims = trims
        # Blocks that pass on more than hidden states cannot be left out.
        self._pools = pools and not blocks.chained
        self.layer = resolve_layer(layer, 0, len(blocks.blocks), "text", head=self._pools)
        self.layers = range(len(blocks.blocks))
        self.block = blocks.blocks[self.layer] if self.layer in self.layers else None
        self.last_block = blocks.blocks[-1]

    @property
    def reading_layer(self) -> int:
        """The head where it pools tokens and can be run alone, else the last block."""
        return self.layers[-1] + self._pools

    def visible(self, tokens: Tensor) -> Tensor:
        """The tokens that an embedding can depend on."""
        return self._visible(tokens)

    def needed(self, tokens: Tensor) -> int | None:
        """As many as the longest caption has, where padding can be cut off."""
        return int(self._visible(tokens).any(dim=0).nonzero().max()) + 1 if self._trims else None

    def features_before(self, inputs: Tensor, length: int | None = None) -> Tensor:
        """Token ids [B, L] -> hidden states [B, T, D]; T is `length`, or what the longest caption needs."""
        length = self.needed(inputs) if length is None else length
        return self._list.reach(self.layer, lambda: self._encode(inputs[:, :length]))

    def blocks_on(self) -> list[nn.Module]:
        """The tower's blocks from this layer on."""
        return list(self._list.blocks[self.layer :])

    def captured(self, block_input: Tensor) -> Tensor:
        """The block's input, as a hook sees it, in the form `features_before` returns."""
        return self._list.outward(block_input)

    def embed_from(self, hidden: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, D] of the captions `inputs` -> embeddings [B, K]."""
        return self._embed(hidden, inputs, self.layer)

    def embed_after(self, hidden: Tensor, inputs: Tensor | None = None) -> Tensor:
        """What the last block passes on of the captions `inputs`, [B, T, D] -> embeddings [B, K].

        Raises:
            UnsupportedTowerError: blocks pass on more than hidden states, so that none can be left out.
        """
        if self._list.chained:
            return super().embed_after(hidden, inputs)
        return self._embed(hidden, inputs, len(self._list.blocks))

    def _embed(self, hidden: Tensor, inputs: Tensor | None, layer: int) -> Tensor:
        if inputs is None:
            raise ValueError("padding is recognised by a caption's token ids: give them as inputs")
        with self._list.entered(layer, hidden):
            return self._encode(inputs[:, : hidden.shape[1]])
