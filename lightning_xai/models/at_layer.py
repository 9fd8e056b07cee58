"""A tower at a layer: hidden states before it, embeddings from it, and the context that derivatives need.

Shape suffixes: B batch, N points of a path, T tokens (prefix tokens such as CLS and patches, or caption tokens),
D hidden width, K embedding width, C channels, H x W the patch grid, L tokens of a caption as given.

A *layer* means the input of that block. `embed_from(features_before(x))` is the tower's own output, which the encoder
checks on a probe input.

Attributions need how the embedding changes while hidden states move from a reference to the input. Sums over the
hidden width can be taken inside, by one number per token: with `x(alpha) = r + alpha_T * (x - r)`,

    d g_k / d alpha_T = sum_D (x - r)[T, D] * d g_k / d x[T, D],

so a *path* is the map alpha [B, N, T] -> embeddings [B, N, K], and its derivatives are all that is ever needed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

EmbeddingPath = Callable[[Tensor], Tensor]
"""alpha [B, N, T] -> embeddings [B, N, K], differentiable in alpha, forward and backward."""


class PathWithDerivatives(ABC):
    """A path that knows its derivatives along directions, at less than what automatic differentiation costs."""

    @abstractmethod
    def __call__(self, alpha_BNT: Tensor) -> Tensor:
        """The embeddings [B, N, K]."""

    @abstractmethod
    def with_derivatives(self, alpha_BNT: Tensor, directions_BST: Tensor) -> Tensor:
        """The embeddings, and their derivatives while alpha moves along each of S directions, [B, 1 + S, N, K].

        Both can be differentiated again.
        """


_SEQUENCES = 512


class UnsupportedTowerError(ValueError):
    """A tower without layers that can be reached, or that a method cannot explain; the message names alternatives."""


class TowerAtLayer(ABC):
    """One tower at the input of a block.

    Attributes:
        layer: the block's number, counted as open_clip counts them; one more than the last block's is the head.
        layers: the numbers of all of the tower's blocks.
        block: the block whose input the hidden states are; None for a head that is not one module.
        whole: the module whose output the embeddings are, not normalised; None where there is none. The model's own
            pass calls it in open_clip's models, and not in those of other libraries.
        last_block: the last of the tower's blocks, whose output enters the head.
        grid: rows and columns of the image tokens after the prefix; (0, 0) for text.
        prefix_tokens: number of tokens before the grid, such as CLS.
        is_feature_map: whether hidden states are [B, C, H, W], as convolutions make them, not [B, T, D].
        calls_blocks: whether a path calls blocks, and so runs their hooks; else it reads the last one's weights.
    """

    layer: int
    layers: range
    block: nn.Module | None
    whole: nn.Module | None = None
    last_block: nn.Module
    grid: tuple[int, int] = (0, 0)
    prefix_tokens: int = 0
    is_feature_map: bool = False
    calls_blocks: bool = True

    @property
    def reading_layer(self) -> int:
        """The last layer at which tokens are still apart: after it, one position or a pool of them is read.

        The last block where the head reads one position of its output, such as CLS or the end of a text; the head where
        it pools tokens, by attention or by an average.
        """
        return self.layers[-1] + self.is_feature_map

    def check_patches_read(self) -> None:
        """Refuse, of an image tower, a head that reads one position: there every map would be zero.

        Raises:
            ValueError: no patch is read at this layer; the message says which layer to take.
        """
        # To find the reading layer may take a pass; up to the last block it is not needed.
        if self.layer > self.layers[-1] and self.layer > self.reading_layer:
            raise ValueError(
                f"the image tower reads one token of what its last block passes on, so that at the head, layer "
                f"{self.layer}, no patch has a part in the similarity: take image_layer={self.reading_layer}, the last "
                "block, or an earlier one"
            )

    @abstractmethod
    def features_before(self, inputs: Tensor) -> Tensor:
        """Hidden states at the block's input: [B, T, D], or [B, C, H, W] for feature maps."""

    def listen(self, keep: Callable[[Tensor], object]) -> RemovableHandle:
        """Hand the hidden states of the model's own forward passes to `keep`, in the form of `features_before`.

        Returns:
            What removes the hook.
        """

        def entered(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            keep(self.captured(inputs[0] if inputs else named["hidden_states"]))

        def left(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            keep(self.captured(output[0] if isinstance(output, tuple) else output))

        if self.block is None:  # the head, which is entered by what the last block passes on
            return self.last_block.register_forward_hook(left)
        return self.block.register_forward_pre_hook(entered, with_kwargs=True)

    def blocks_on(self) -> list[nn.Module]:
        """The tower's blocks from this layer on; none of a tower of feature maps."""
        return []

    def captured(self, block_input: Tensor) -> Tensor:
        """The block's input, as a hook sees it, in the form `features_before` returns."""
        return block_input

    @abstractmethod
    def embed_from(self, hidden: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Embeddings [B, K], not normalised, of hidden states.

        Args:
            hidden: as `features_before` returns them.
            inputs: for text the token ids [B, L] that the hidden states belong to: they say where a caption is read,
                and what is padding. Images need none.
        """

    def embed_after(self, hidden: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Embeddings [B, K], not normalised, of what the last block passes on, in the form of `features_before`.

        Raises:
            UnsupportedTowerError: the part after the last block cannot be run alone.
        """
        raise UnsupportedTowerError("what follows this tower's last block cannot be run without its blocks")

    def embed_each(self, hidden: Tensor, inputs: Tensor | None = None, length: int | None = None) -> Tensor:
        """Embeddings [B, N, K] of single tokens [B, N, D] after the last block, as if each were read.

        The head is given a sequence that is one token throughout, so that CLS, an average and a pool's attention all
        read that token: of an attention pool this is the way of its values.

        Args:
            hidden: [B, N, D] of any N.
            inputs: as for `embed_from`, [B, L].
            length: the number of tokens that the last block passes on; images may have fewer.
        """
        batch, count, width = hidden.shape
        # One token after the prefix is enough for each way to read an image.
        length = self.prefix_tokens + 1 if inputs is None or length is None else length
        sequences = hidden.reshape(batch * count, 1, width).expand(-1, length, -1)
        row = torch.arange(batch, device=hidden.device).repeat_interleave(count)
        # A few at a time: a pool of many queries answers all of them for every token.
        parts = [
            self.embed_after(sequences[rows], None if inputs is None else inputs[row[rows]])
            for rows in (slice(start, start + _SEQUENCES) for start in range(0, batch * count, _SEQUENCES))
        ]
        return torch.cat(parts).reshape(batch, count, -1)

    def path(
        self, hidden: Tensor, reference: Tensor, inputs: Tensor | None = None, directions: int = 1
    ) -> EmbeddingPath:
        """The path from a reference (batch of 1 or B) to hidden states.

        Args:
            hidden: as `features_before` returns them.
            reference: likewise.
            inputs: as for `embed_from`.
            directions: how many derivatives will be taken along the path; changes no number, only what it costs.
        """
        delta = hidden - reference

        def embed(alpha_BNT: Tensor) -> Tensor:
            points = alpha_BNT.shape[1]
            repeated = None if inputs is None else inputs.repeat_interleave(points, dim=0)
            embedding = self.embed_from(_along(alpha_BNT, reference, delta), repeated)
            return embedding.reshape(-1, points, embedding.shape[1])

        return embed

    @staticmethod
    def count(hidden: Tensor) -> int:
        """T: the number of tokens of hidden states; the positions of feature maps."""
        return hidden[0, 0].numel() if hidden.ndim == 4 else hidden.shape[1]

    def on_grid(self, values: Tensor) -> Tensor:
        """Values of the image tokens [..., T] -> [..., H, W], without those of the prefix."""
        patches = values[..., self.prefix_tokens :]
        return patches.reshape(*patches.shape[:-1], *self.grid)


class TextTowerAtLayer(TowerAtLayer):
    """A text tower at the input of a block; tokens are the caption's, those that mark start and end included.

    Attributes:
        causal: whether embeddings are read at the token that ends a caption and no token attends to later ones, so that
            hidden states without some of a caption's rows are what attention without these tokens makes.
    """

    causal: bool = False

    @abstractmethod
    def features_before(self, inputs: Tensor, length: int | None = None) -> Tensor:
        """Token ids [B, L] -> hidden states [B, T, D]; T is `length`, or as many as the longest caption needs."""

    def needed(self, tokens: Tensor) -> int | None:
        """How many of the first hidden states suffice for a batch of captions [B, L]; None: all that a pass makes."""
        return None

    @abstractmethod
    def visible(self, tokens: Tensor) -> Tensor:
        """The tokens that an embedding can depend on, [B, L] bool: not those after the end, nor masked padding."""

    def on_caption(self, values: Tensor, length: int) -> Tensor:
        """Values of the text tokens [..., T] -> [..., L], zero for the tokens that were not run."""
        return pad(values[..., :length], (0, max(0, length - values.shape[-1])))


def _along(alpha_BNT: Tensor, reference: Tensor, delta: Tensor) -> Tensor:
    """Points of the path, flattened to one batch: [B*N, T, D], or [B*N, C, H, W] for feature maps."""
    weights = alpha_BNT.unsqueeze(3)
    if delta.ndim == 4:
        weights = alpha_BNT.reshape(*alpha_BNT.shape[:2], 1, *delta.shape[2:])
    return (reference.unsqueeze(1) + weights * delta.unsqueeze(1)).flatten(0, 1)


def first_layer(at_layer: Callable[[int], TowerAtLayer]) -> int:
    """The first of a tower's layers that can be explained: 0, but for towers whose layers begin later.

    Args:
        at_layer: the number of a layer -> the tower at it, such as `encoder.image_at_layer`.
    """
    *before, last = at_layer(-1).layers
    for layer in before:
        with suppress(UnsupportedTowerError):
            return at_layer(layer).layer
    return last


def resolve_layer(layer: int, first: int, depth: int, tower: str, *, head: bool = False) -> int:
    """A layer number, counted from the end where negative; with `head` also the one after the last block.

    Raises:
        ValueError: the tower has no such layer.
    """
    resolved = first + depth + layer if layer < 0 else layer
    last = first + depth - 1 + head
    if not first <= resolved <= last:
        more = f", and {last}, the head where it pools tokens" if head else ""
        raise ValueError(
            f"the {tower} tower has layers {first} to {first + depth - 1} (or -{depth} to -1){more}; got layer {layer}"
        )
    return resolved


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode (dropout off, batch statistics frozen), undone on leaving, also after an exception."""
    training = [child for child in module.modules() if child.training]
    for child in training:
        child.training = False
    try:
        yield
    finally:
        # One by one: a part that was frozen in evaluation mode stays so.
        for child in training:
            child.training = True


@contextmanager
def differentiable(module: nn.Module) -> Iterator[None]:
    """Everything a derivative of `module` by its inputs needs, undone on leaving, also after an exception.

    Evaluation mode (dropout off, batch statistics frozen), gradients on even inside `no_grad` or `inference_mode`, no
    autocast, no gradient checkpointing (which would run blocks again when a replaced input is no longer there),
    and the attention kernel that has forward-mode derivatives. Weights keep `requires_grad`: who asks for the
    gradient of hidden states alone computes no other, and PyTorch multiplies by frozen weights batch by batch, which in
    `nn.MultiheadAttention` is several times slower.
    """
    device = next(module.parameters()).device.type
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(evaluating(module))
        for child, flag in checkpointing_modules(module):
            stack.callback(setattr, child, flag, getattr(child, flag))
            setattr(child, flag, False)
        yield


def checkpointing_modules(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The modules that run their blocks with gradient checkpointing, and the names of their flags that say so."""
    for child in module.modules():
        # As open_clip and timm, and as Hugging Face call it.
        for flag in ("grad_checkpointing", "gradient_checkpointing"):
            # Training asks at every step, and nn.Module takes long to say that it has no such attribute.
            if vars(child).get(flag, False):
                yield child, flag


@contextmanager
def constant(module: nn.Module) -> Iterator[None]:
    """Inside, parameters of `module` are constants of what is computed; undone on leaving, also after an exception."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def positions_read(module: nn.Module, embed: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """The tokens that embeddings of `hidden` [1, T, D] depend on: bool [T].

    Args:
        module: what `embed` runs.
        embed: hidden states -> embeddings [1, K].
        hidden: any numbers.
    """
    with differentiable(module):
        leaf = as_constant(hidden).requires_grad_()
        # One number is enough; their sum may be constant after a layer norm.
        (gradient,) = torch.autograd.grad(embed(leaf)[0, 0], leaf)
    return gradient[0].ne(0).any(dim=1)


def batch_statistics(module: nn.Module) -> str | None:
    """The name of the first part of `module` that normalises by the statistics of its batch; None where there is none.

    Example:
        >>> batch_statistics(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
        '1'
    """
    return next((name for name, part in module.named_modules() if isinstance(part, _BatchNorm)), None)


def foreign_hooks(module: nn.Module) -> list[Any]:
    """Forward hooks of a module that are not this package's, which only look."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith("lightning_xai.")]


def refuse_rewriting(module: nn.Module) -> None:
    """Raise an UnsupportedTowerError where a part rewrites its weights in each forward pass, as peft's attention does.

    Forward-mode derivatives cannot follow that, and would leave the weights half written.
    """
    for name, part in module.named_modules():
        if type(part).__module__.startswith("peft.") and type(part).__name__ == "MultiheadAttention":
            raise UnsupportedTowerError(
                f"the adapter {name} rewrites the weights of nn.MultiheadAttention in each forward pass, which "
                "derivatives along a path cannot follow: call merge_and_unload() first, or adapt other layers"
            )


def module_without_gradient(module: nn.Module, embed: Callable[[Tensor], Tensor], hidden: Tensor) -> str | None:
    """The name of the innermost part that a gradient enters on the way from `hidden` and wrongly does not leave.

    Parts whose output is a constant, such as positions, rightly pass on none: another input shows which they are.

    Returns:
        None where there is no such part; "" stands for the module itself.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def look(part: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            results = [x for x in _tensors(output) if x.is_floating_point()]
            given = _tensors((arguments, tuple(keywords.values())))
            if not results or any(map(_has_gradient, results)) or not any(map(_has_gradient, given)):
                return
            with torch.no_grad():
                others = part.forward(*_moved(arguments), **{key: _moved(value) for key, value in keywords.items()})
            moved = zip(results, [x for x in _tensors(others) if x.is_floating_point()], strict=True)
            if not all(torch.equal(result, other) for result, other in moved):
                found.append(name)

        return look

    with ExitStack() as stack:
        for name, part in module.named_modules():
            stack.callback(part.register_forward_hook(watch(name), with_kwargs=True).remove)
        embedding = embed(hidden.detach().clone().requires_grad_())
    return found[0] if found else None if embedding.requires_grad else ""


def _has_gradient(tensor: Tensor) -> bool:
    # Operators without a derivative, such as those of integer layers, only warn in the backward pass.
    return tensor.requires_grad and "NotImplemented" not in (tensor.grad_fn.name() if tensor.grad_fn else "")


def _moved(value: Any) -> Any:
    """An argument whose tensors are others where they require gradients."""
    if isinstance(value, Tensor):
        return 2 * value + 1 if value.requires_grad else value
    return type(value)(map(_moved, value)) if type(value) in (tuple, list) else value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def as_constant(tensor: Tensor) -> Tensor:
    """The tensor without its graph, also usable where gradients are taken if it was made in inference mode."""
    if not tensor.is_inference():
        return tensor.detach()
    with torch.inference_mode(False):
        return tensor.clone()
