"""open_clip's transformers written out for one input, block by block and head by head: what methods are compared with.

Slow, and without any of the package's code. Shape suffixes: T tokens, D hidden width, K embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_xai.models import DualEncoder


@dataclass
class Attended:
    """One attention: queries, keys and values [T, D], probabilities [Q, T] of each head, their result [Q, D]."""

    query: Tensor
    key: Tensor
    value: Tensor
    probabilities: list[Tensor]
    context: Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None) -> Attended:
    """Softmax attention, head by head."""
    probabilities, contexts = [], []
    for q, k, v in zip(*(x.chunk(heads, dim=1) for x in (query, key, value)), strict=True):
        scores = q @ k.T / q.shape[1] ** 0.5
        probabilities.append(torch.softmax(scores if mask is None else scores + mask, dim=1))
        if not probabilities[-1].requires_grad:
            probabilities[-1].requires_grad_()
        contexts.append(probabilities[-1] @ v)
    return Attended(query, key, value, probabilities, torch.cat(contexts, dim=1))


@dataclass
class Tower:
    """A tower with one input, no padding.

    Attributes:
        tokens_TD: what enters the first block.
        blocks: the modules that hold the weights.
        read: the position of the token that is read.
        head: [D] -> [K], of one token.
        mask: the causal one, or none.
    """

    tokens_TD: Tensor
    blocks: Any
    read: int
    head: Callable[[Tensor], Tensor]
    mask: Tensor | None = None
    inputs: list[Tensor] = field(default_factory=list)
    seen: list[Attended] = field(default_factory=list)

    def projections(self, number: int, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of a block's input, each [T, D]."""
        block, attention = self.blocks[number], self.blocks[number].attn
        normed = block.ln_1(x_TD)
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        query, key, value = (normed @ w.T + b for w, b in zip(weights, biases, strict=True))
        return query, key, value

    def block(self, number: int, x_TD: Tensor, heads: int | None = None) -> Tensor:
        """A block's output, with another number of heads where one is given; keeps input and attention."""
        block = self.blocks[number]
        attended = attend(*self.projections(number, x_TD), heads or block.attn.num_heads, self.mask)
        self.inputs.append(x_TD)
        self.seen.append(attended)
        return self.rest(number, x_TD, attended.context)

    def rest(self, number: int, x_TD: Tensor, context_TD: Tensor) -> Tensor:
        """A block after its attention: output projection, residual connections, MLP."""
        block = self.blocks[number]
        x_TD = x_TD + block.ls_1(self.project(number, context_TD))
        output: Tensor = x_TD + block.ls_2(block.mlp(block.ln_2(x_TD)))
        return output

    def project(self, number: int, context_TD: Tensor) -> Tensor:
        """A block's output projection."""
        projection = self.blocks[number].attn.out_proj
        output: Tensor = context_TD @ projection.weight.T + projection.bias
        return output

    def run(self, single_from: int | None = None) -> Tensor:
        """All blocks: [T, D]; those from `single_from` on with one head."""
        x_TD = self.tokens_TD
        for number in range(len(self.blocks)):
            x_TD = self.block(number, x_TD, 1 if single_from is not None and number >= single_from else None)
        return x_TD

    def embedding(self) -> Tensor:
        """[K]."""
        return self.head(self.run()[self.read])


def image_tower(encoder: DualEncoder, image: Tensor) -> Tower:
    """open_clip's VisionTransformer, read at CLS."""
    visual: Any = encoder.model.visual
    tokens = visual._embeds(image[None])[0].detach()
    return Tower(tokens, visual.transformer.resblocks, 0, lambda x: visual.ln_post(x) @ visual.proj)


def text_tower(encoder: DualEncoder, tokens: Tensor) -> Tower:
    """open_clip's TextTransformer under the causal mask, up to the end of text, where it is read."""
    text: Any = getattr(encoder.model, "text", encoder.model)
    end = int(tokens.argmax())
    embedded = (text.token_embedding(tokens[: end + 1]) + text.positional_embedding[: end + 1]).detach()
    mask = torch.full((end + 1, end + 1), float("-inf"), dtype=embedded.dtype).triu(1)
    return Tower(embedded, text.transformer.resblocks, end, lambda x: text.ln_final(x) @ text.text_projection, mask)


def towers(encoder: DualEncoder, image: Tensor, tokens: Tensor) -> tuple[Tower, Tower]:
    """Both towers of one pair."""
    return image_tower(encoder, image), text_tower(encoder, tokens)


def resnet_pool(encoder: DualEncoder, image: Tensor) -> tuple[Attended, Callable[[Tensor], Tensor]]:
    """The attention pool of CLIP's ResNet on one image, its mean first, and its output projection."""
    visual: Any = encoder.model.visual
    pool = visual.attnpool
    with torch.no_grad():
        maps = visual.stem(image[None])
        for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            maps = stage(maps)
        places = maps[0].flatten(1).T
        x = torch.cat([places.mean(dim=0, keepdim=True), places]) + pool.positional_embedding
        query, key, value = pool.q_proj(x[:1]), pool.k_proj(x), pool.v_proj(x)
    return attend(query, key, value, pool.num_heads, None), pool.c_proj


def own_words(length: int, tower: Tower, values_T: Tensor) -> Tensor:
    """Values of a caption's own tokens, without start and end, among zeros for the rest: [length]."""
    row = torch.zeros(length, dtype=values_T.dtype)
    row[1 : tower.read] = values_T[1 : tower.read]
    return row
