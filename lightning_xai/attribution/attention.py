"""Attention as a tower's blocks compute it: seen, replaced, and with gradients.

Towers are not known from inside. Each block is one that calls PyTorch's `scaled_dot_product_attention` once, and is run
again on what the tower's own forward pass handed to it, while that function is another one.

Shape suffixes: B pairs, h heads, Q queries, T tokens run (keys), L caption tokens as given, e width of a head,
D = h * e, K embedding width, H x W the patch grid.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, multi_head_attention_forward, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from lightning_xai.attribution.base import Attribution
from lightning_xai.attribution.one_tower import Input, Mapped, OneTowerMethod
from lightning_xai.attribution.score import Question, Score
from lightning_xai.models.at_layer import TextTowerAtLayer, TowerAtLayer, UnsupportedTowerError, differentiable
from lightning_xai.models.encoder import TwoTowerEncoder

_OWN_PAIRS = 32


@dataclass(frozen=True)
class Attention:
    """The arguments of one call of `scaled_dot_product_attention`, by its own names.

    Attributes:
        query: [B, h, Q, e].
        key: [B, h, T, e].
        value: [B, h, T, e].
        attn_mask: added to the scores, or bool, False for what is not seen; broadcasts to [B, h, Q, T].
        dropout_p: 0, since towers are explained in evaluation mode.
        is_causal: whether no query sees later keys.
        scale: of the scores; None for 1 / sqrt(e).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None

    def probabilities(self) -> Tensor:
        """The softmax over keys, written out: [B, h, Q, T]."""
        assert self.dropout_p == 0.0, "towers are explained in evaluation mode"
        scale = self.query.shape[3] ** -0.5 if self.scale is None else self.scale
        scores_BhQT = self.query @ self.key.mT * scale
        mask = self.attn_mask
        if self.is_causal:
            mask = torch.ones_like(scores_BhQT[0, 0], dtype=torch.bool).tril()
        if mask is not None and mask.dtype == torch.bool:
            scores_BhQT = scores_BhQT.masked_fill(~mask, float("-inf"))
        elif mask is not None:
            scores_BhQT = scores_BhQT + mask
        return scores_BhQT.softmax(dim=3)


class AttentionReplaced(TorchFunctionMode):
    """Inside, `scaled_dot_product_attention` is another function, for every caller; nothing is patched.

    Args:
        attend: the other function, of the same arguments.
        projected: is given what the first linear layer after each attention makes of it, the output projection, and
            that layer's weight; None for the weight inside nn.MultiheadAttention.
    """

    def __init__(
        self, attend: Callable[..., Tensor], projected: Callable[[Tensor, Tensor | None], None] | None = None
    ) -> None:
        super().__init__()
        self._attend = attend
        self._projected = projected
        self._waiting = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is scaled_dot_product_attention:
            func = self._attended
        elif func is linear:
            func = self._linear
        elif func is multi_head_attention_forward:
            # PyTorch offers this function as a whole only, and its body runs with the mode off. Run the same code with
            # the other meaning of the names that it calls.
            meanings = {
                **func.__globals__,
                scaled_dot_product_attention.__name__: self._attended,
                linear.__name__: partial(self._linear, reads_weights=True),
            }
            func = FunctionType(func.__code__, meanings, func.__name__, func.__defaults__, func.__closure__)
            # Where weights are returned as well (the pool of Hugging Face's SigLIP), it does not call that function.
            kwargs = {**(kwargs or {}), "need_weights": False}
        return func(*args, **(kwargs or {}))

    def _attended(self, *args: Any, **kwargs: Any) -> Tensor:
        self._waiting = True
        return self._attend(*args, **kwargs)

    def _linear(self, *args: Any, reads_weights: bool = False, **kwargs: Any) -> Tensor:
        output = linear(*args, **kwargs)
        if self._waiting and self._projected is not None:
            # nn.MultiheadAttention passes over adapters, in the model as here.
            weight = None if reads_weights else args[1] if len(args) > 1 else kwargs["weight"]
            self._projected(output, weight)
        self._waiting = False
        return output


def recording(attentions: list[Tensor]) -> Callable[..., Tensor]:
    """`scaled_dot_product_attention` written out, which appends its probabilities [B, h, Q, T] to a list."""

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        call = Attention(*args, **kwargs)
        attentions.append(with_gradient(call.probabilities()))
        return attentions[-1] @ call.value

    return attend


def values(*args: Any, **kwargs: Any) -> Tensor:
    """In place of attention: each token's own value."""
    return Attention(*args, **kwargs).value


def with_gradient(tensor: Tensor) -> Tensor:
    """The tensor as a node of the graph: the first of a tower, up to which no graph leads, becomes its leaf."""
    return tensor if tensor.requires_grad else tensor.requires_grad_()


def merged(heads_BhTe: Tensor) -> Tensor:
    """Heads side by side, as the output projection takes them: [B, h, T, e] -> [B, T, D]."""
    return heads_BhTe.transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class BlockCall:
    """One block as its tower's own forward pass called it.

    Attributes:
        block: the block.
        at: its tower, which knows the form of hidden states.
        arguments: of the call, the first of them the hidden states unless a keyword gives them.
        keywords: of the call.
    """

    block: nn.Module
    at: TowerAtLayer
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        """The block's input in that pass [B, T, D]."""
        return self.at.captured(self.arguments[0] if self.arguments else self.keywords["hidden_states"]).detach()

    def again(self, hidden_BTD: Tensor | None = None) -> Tensor:
        """The block's output [B, T, D], in that pass or for another input."""
        # The two forms differ in the order of two axes at most, so that one function leads both ways.
        given = self.at.captured(self.hidden if hidden_BTD is None else hidden_BTD)
        if self.arguments:
            output = self.block(given, *self.arguments[1:], **self.keywords)
        else:
            output = self.block(**{**self.keywords, "hidden_states": given})
        return self.at.captured(output[0] if isinstance(output, tuple) else output)

    def projected(self, attend: Callable[..., Tensor]) -> Tensor:
        """What the output projection makes of another attention [B, T, D], before residual connection and MLP.

        Raises:
            UnsupportedTowerError: an adapter adds to that projection.
        """
        found: list[Tensor] = []
        adapted = {
            id(part.base_layer.weight)
            for part in self.block.modules()
            if type(part).__module__.startswith("peft.") and hasattr(part.base_layer, "weight")
        }

        def keep(output: Tensor, weight: Tensor | None) -> None:
            if id(weight) in adapted:
                raise UnsupportedTowerError(
                    "an adapter adds to an attention's output projection, which is read here: call merge_and_unload() "
                    "first"
                )
            found.append(output)

        with AttentionReplaced(attend, keep):
            self.again()
        (output,) = found
        if output.ndim == 2:  # as nn.MultiheadAttention has it, tokens first
            return output.reshape(-1, len(self.hidden), output.shape[1]).transpose(0, 1)
        return self.at.captured(output)


@dataclass(frozen=True)
class TowerPass:
    """What one forward pass of a tower passed on, without graph.

    Attributes:
        tower: the tower.
        calls: its blocks from the first one on, in order; none where only a pool attends.
        outputs: what the last block passes on, one tensor, [B, T, D] or feature maps.
        tokens: of a caption, [B, L]; None for images.
    """

    tower: AttendedTower
    tokens: Tensor | None
    calls: list[BlockCall] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    @property
    def output(self) -> Tensor:
        """What the last block passes on, [B, T, D] or feature maps."""
        return self.outputs[0]

    def embed(self, hidden: Tensor) -> Tensor:
        """Embeddings [B, K] of what the last block passes on."""
        return self.tower.at.embed_after(hidden, self.tokens)

    def embed_each(self, hidden_BND: Tensor) -> Tensor:
        """Embeddings [B, N, K] of single tokens after the last block."""
        return self.tower.at.embed_each(hidden_BND, self.tokens, self.output.shape[1])

    def visible(self, count: int) -> Tensor:
        """The tokens run that the embedding can depend on, [B, count] bool: all of an image's."""
        at = self.tower.at
        if self.tokens is None or not isinstance(at, TextTowerAtLayer):
            return torch.ones(len(self.output), count, dtype=torch.bool, device=self.output.device)
        return at.on_caption(at.visible(self.tokens), count)

    def read(self) -> Tensor:
        """The share [B, Q] of each query of the last attention, pool or block, in what is read."""
        hidden, contexts = self.output.detach().requires_grad_(), list[Tensor]()

        def attend(*args: Any, **kwargs: Any) -> Tensor:
            contexts.append(with_gradient(scaled_dot_product_attention(*args, **kwargs).detach()))
            return contexts[-1]

        with AttentionReplaced(attend):
            embedding_BK = self.embed(hidden)
        # One number of the embedding is enough; their sum may be constant after a layer norm.
        (gradient,) = torch.autograd.grad(embedding_BK[:, 0].sum(), contexts or [hidden])
        read_BQ = gradient.ne(0).any(dim=-1)
        if contexts:  # of heads, any of which reads
            read_BQ = read_BQ.any(dim=1)
        read = read_BQ.to(embedding_BK)
        return read / read.sum(dim=1, keepdim=True).clamp(min=1)

    def scored(self, count: int) -> Tensor:
        """The tokens run that are compared with each other, [B, count] bool: patches, or all that are visible."""
        if self.tokens is not None:
            return self.visible(count)
        rows, columns = self.tower.at.grid
        places = torch.arange(count, device=self.output.device) >= count - rows * columns
        return places.expand(len(self.output), -1)

    def values_of_pool(self) -> Tensor:
        """Embeddings [B, T, K] of the tokens that a pool attends to, by the way of their values."""
        if self.output.ndim == 3:
            return self.embed_each(self.output)
        found: list[Tensor] = []
        # CLIP's ResNet has a query for each place and the mean, and reads that of the mean alone.
        with AttentionReplaced(values, lambda output, _: found.append(output)):
            self.embed(self.output)
        return found[0].reshape(-1, len(self.output), found[0].shape[-1]).transpose(0, 1)

    def maps(self, values_BT: Tensor) -> Tensor:
        """Values of tokens [B, T] -> [B, H, W] of patches, or [B, L], zero but for the caption's own tokens."""
        at = self.tower.at
        if self.tokens is None or not isinstance(at, TextTowerAtLayer):
            rows, columns = at.grid
            return values_BT[:, -rows * columns :].reshape(-1, rows, columns)
        values_BL = at.on_caption(values_BT, self.tokens.shape[1])
        return values_BL * self.tower.content(self.tokens)


class AttendedTower:
    """A tower whose attention can be seen, from a block on.

    Args:
        method: the method that asks, for messages.
        encoder: the model.
        name: `"image"` or `"text"`.
        start_layer: the first block that is needed.
        check: tries the pass of a probe, so that what cannot be served is refused now, not after an hour.

    Attributes:
        at: the tower at its last block; at the head where it passes on feature maps.
        pools: whether the tower ends in an attention pool, the last attention that runs.

    Raises:
        UnsupportedTowerError: it passes on feature maps, without an attention pool, or its blocks do not call
            `scaled_dot_product_attention` once each.
        ValueError: no such layer.
    """

    def __init__(
        self,
        method: str,
        encoder: TwoTowerEncoder,
        name: str,
        start_layer: int = -1,
        check: Callable[[TowerPass], object] = lambda _: None,
    ) -> None:
        take: Callable[[int], TowerAtLayer] = encoder.image_at_layer if name == "image" else encoder.text_at_layer
        self._method, self._name = method, name
        self.content = encoder.tokenizer.content_mask
        self.at = take(-1)
        self._blocks: list[nn.Module] = []
        if self.at.is_feature_map:
            self.at = take(self.at.layer + 1)
            if self.at.block is None:
                raise self.unsupported("passes on feature maps, without self-attention over one sequence of tokens")
        else:
            first = take(start_layer)
            refuse_head(first, name)
            self._blocks = first.blocks_on()
        self.pools = False
        probe = next(encoder.parameters())
        with differentiable(encoder), torch.no_grad():
            if name == "image":
                images = torch.randn(1, *encoder.image_shape, generator=torch.Generator().manual_seed(0)).to(probe)
                with self.watched() as seen:
                    encoder.encode_image(images)
            else:
                tokens = encoder.tokenizer.encode(["a probe of two towers"]).to(probe.device)
                with self.watched(tokens) as seen:
                    encoder.encode_text(tokens)
        with differentiable(encoder):
            self._look(seen)
            check(seen)

    @contextmanager
    def watched(self, tokens: Tensor | None = None) -> Iterator[TowerPass]:
        """Inside, keep what one forward pass of the tower, of images or of `tokens`, passes on."""
        seen = TowerPass(self, tokens)
        with ExitStack() as hooks:
            for block in self._blocks:

                def keep(block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
                    seen.calls.append(BlockCall(block, self.at, arguments, keywords))

                hooks.callback(block.register_forward_pre_hook(keep, with_kwargs=True, prepend=True).remove)

            def keep_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
                raw = output[0] if isinstance(output, tuple) else output
                seen.outputs.append(self.at.captured(raw).detach())

            def keep_input(_: nn.Module, arguments: tuple[Any, ...]) -> None:
                seen.outputs.append(self.at.captured(arguments[0]).detach())

            assert self.at.block is not None, "checked before"
            if self._blocks:
                hooks.callback(self._blocks[-1].register_forward_hook(keep_output).remove)
            else:
                hooks.callback(self.at.block.register_forward_pre_hook(keep_input).remove)
            yield seen
        if len(seen.calls) != len(self._blocks) or len(seen.outputs) != 1:
            raise self.unsupported("does not call each of its blocks once, as compiled blocks do not seem to")

    def _look(self, seen: TowerPass) -> None:
        """Run the blocks and the head of a probe's pass again, and count what attends."""
        for call in seen.calls:
            attentions: list[Tensor] = []
            with AttentionReplaced(recording(attentions)):
                call.again()
            if len(attentions) != 1:
                raise self.unsupported(
                    "does not call scaled_dot_product_attention, whose arguments are needed, once in each block"
                )
            if attentions[0].shape[3] != call.hidden.shape[1]:
                raise self.unsupported("attends to learned keys that are no tokens (add_bias_kv)")
        attentions = []
        try:
            with AttentionReplaced(recording(attentions)):
                seen.embed(seen.output)
        except UnsupportedTowerError as error:
            raise self.unsupported("has a head that cannot be run without its blocks") from error
        if len(attentions) > 1 or (not seen.calls and not attentions):
            raise self.unsupported(
                "does not end in one attention over its feature maps"
                if not seen.calls
                else f"attends {len(attentions)} times after its last block"
            )
        self.pools = len(attentions) == 1

    def unsupported(self, reason: str) -> UnsupportedTowerError:
        """The error that this tower cannot be explained, with advice."""
        return UnsupportedTowerError(
            f"{self._method} cannot explain this {self._name} tower, which {reason}; use a method that needs no "
            "attention, such as FeaturePairAttribution, NIB or GradCAM"
        )


class AttentionMethod(OneTowerMethod):
    """A method that reads what the model's own pass over a batch hands from block to block, in both towers."""

    image: AttendedTower
    text: AttendedTower

    def _attend(
        self, start_layer: int | tuple[int, int], check: Callable[[TowerPass], object] = lambda _: None
    ) -> None:
        """Take both towers from a block on, one number for both or one for each; see `AttendedTower`."""
        image, text = both(start_layer)
        name = type(self).__name__
        self.image = AttendedTower(name, self.encoder, "image", image, check)
        self.text = AttendedTower(name, self.encoder, "text", text, check)
        self.grid = self.image.at.grid

    def _compared(self, images: Tensor, question: Question) -> tuple[Attribution, Tensor]:
        """The attribution from what the model's own pass has computed of the images, and the similarity it gives."""
        size = min(self.internal_batch_size or _OWN_PAIRS, _OWN_PAIRS)
        parts, own = [], []
        for start in range(0, len(images), size):
            rows = slice(start, start + size)
            with self.image.watched() as seen:
                own.append(self.encoder.own_similarity(images[rows], question.tokens[rows]))
            texts = [self._read_text(tokens) for tokens in question[rows].captions]
            parts.append(self._explain(_input(images[rows], seen), texts, question[rows]))
        return Attribution.concatenate(parts), torch.cat(own)

    def _attribute_to(self, images: Tensor, question: Question) -> Attribution:
        return self._compared(images, question)[0]

    @torch.no_grad()
    def _read_text(self, tokens: Tensor) -> Input:
        # The model's own pass runs all of the padding, which costs more than the caption's few tokens once more.
        with self.text.watched(tokens) as seen:
            self.encoder.encode_text(tokens)
        return _input(tokens, seen)

    def _image_map(self, image: Input, score: Score) -> Mapped:
        return self._map(image.seen, image.embedding, score), None

    def _text_map(self, text: Input, score: Score) -> Mapped:
        return self._map(text.seen, text.embedding, score), None

    @abstractmethod
    def _map(self, seen: TowerPass, own_BK: Tensor, score: Score) -> Tensor:
        """The map of one tower's inputs, [B, H, W] or [B, L], given their embeddings and what these are scored by."""


@torch.no_grad()
def _input(batch: Tensor, seen: TowerPass) -> Input:
    return Input(batch, seen.embed(seen.output), seen)


def refuse_head(first: TowerAtLayer, name: str) -> None:
    """Raise a ValueError where a method that starts at a block was given the number of the head."""
    if first.layer not in first.layers:
        raise ValueError(
            f"start_layer is a block: the {name} tower has layers {first.layers[0]} to {first.layers[-1]}; got "
            f"{first.layer}, its head"
        )


def both(layers: int | tuple[int, int]) -> tuple[int, int]:
    """An option for the image tower and for the text tower, or one for both."""
    return (layers, layers) if isinstance(layers, int) else (layers[0], layers[1])
