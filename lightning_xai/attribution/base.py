"""The interface of every attribution method.

Shape suffixes: B pairs, L caption tokens, H x W the patch grid.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from lightning_xai.attribution.score import Question
from lightning_xai.attribution.targets import SIMILARITY, Similarity, Target
from lightning_xai.models.at_layer import TowerAtLayer, as_constant, differentiable
from lightning_xai.models.encoder import TwoTowerEncoder
from lightning_xai.registry import PluginError

_ROUNDING, _NOTHING = 1e-6, 1e-12  # differences within a map that say nothing: relative to its largest, and absolute
_SIMILARITY, _SIMILARITY_HALF = 1e-4, 2e-2  # what rounding may change a similarity by, in float32 and half precision
_OWN_PAIRS = 32
_A = TypeVar("_A", bound="Attribution")
Explains = Literal["similarity", "linear", "any"]


class ConstantMapWarning(UserWarning):
    """An attribution map is constant."""


class UnsupportedTargetError(ValueError):
    """A method cannot explain a target; the message says which methods can."""


@dataclass(frozen=True)
class OtherCaptions:
    """The part of M other captions in a target, for each of B pairs.

    Attributes:
        tokens: [B, M, L] token ids.
        counted: [B, M] bool, False for what only fills up where pairs have different numbers of other captions.
        similarity: [B, M], the cosine similarity of the image with each.
        text: [B, M, L], what each token adds to the target, so that those that make another caption similar are
            negative; of methods without sign, how much each speaks for its caption. Zero where not counted.
        interactions: [B, M, L, H, W] what each pair of token and patch adds to the target; of methods that have them.
        prefix: [B, M, L] the same for the image's prefix tokens.
    """

    tokens: Tensor
    counted: Tensor
    similarity: Tensor
    text: Tensor
    interactions: Tensor | None = None
    prefix: Tensor | None = None


@dataclass(frozen=True)
class Attribution:
    """The contribution of the patches of B images and the tokens of B captions to the target of each pair.

    The target is the similarity unless another one was asked for.

    Attributes:
        image: [B, H, W] at patch resolution; signed where the method is signed, else non-negative. Larger is more.
        text: [B, L], likewise; zero for tokens that the embedding cannot depend on, such as padding after the end.
        similarity: [B], the cosine similarity of image and caption, in [-1, 1].
        interactions: [B, L, H, W], signed: how much token and patch together add to the similarity, in its units; None
            for methods without token-patch attributions.
        prefix: [B, L], the same for the image's prefix tokens (CLS, registers); None where `interactions` is.
        completeness_error: [B], sum of all attributions minus what they should sum to, for methods that have such a
            sum; None for others. Goes to zero with the number of integration steps.
        explained: [B], the value of the target that is explained; None where that is the similarity.
        others: the part of the target's other captions; None where it has none.
    """

    image: Tensor
    text: Tensor
    similarity: Tensor
    interactions: Tensor | None = None
    prefix: Tensor | None = None
    completeness_error: Tensor | None = None
    explained: Tensor | None = None
    others: OtherCaptions | None = None

    @classmethod
    def concatenate(cls: type[_A], parts: Sequence[_A]) -> _A:
        """One batch of several, in their order."""
        joined: _A = _joined(parts)
        return joined

    def of_coalitions(self, shown: Tensor, said: Tensor) -> Tensor:
        """What the attribution says of coalitions: the sum of the terms whose parts are all present, [B, N].

        Args:
            shown: [B, N, H, W], one for patches that are present and zero for others.
            said: [B, N, L], likewise for tokens; those that mark start and end always are.
        """
        patches = torch.einsum("bnhw,bhw->bn", shown, self.image.to(shown))
        return patches + torch.einsum("bnl,bl->bn", said, self.text.to(said))


def _joined(parts: Sequence[Any]) -> Any:
    """One result of several of a kind, whose fields are tensors, None or such results."""
    first = parts[0]
    if first is None or isinstance(first, Tensor):
        return None if first is None else torch.cat(list(parts))
    return type(first)(**{each.name: _joined([getattr(part, each.name) for part in parts]) for each in fields(first)})


@dataclass(frozen=True)
class InteractionAttribution(Attribution):
    """An attribution to token-patch interactions; `image` and `text` are sums over `interactions`.

    With other captions `image` is the sum over their interactions as well.
    """

    interactions: Tensor
    prefix: Tensor

    def of_coalitions(self, shown: Tensor, said: Tensor) -> Tensor:
        """The sum of the interactions of present tokens with present patches, and with CLS and registers, which are.

        All tokens of a target's other captions are present.
        """
        with_patches = torch.einsum(
            "bnhw,bnhw->bn", shown, torch.einsum("bnl,blhw->bnhw", said, self.interactions.to(said))
        )
        own = with_patches + torch.einsum("bnl,bl->bn", said, self.prefix.to(said))
        others = self.others
        if others is None or others.interactions is None or others.prefix is None:
            return own
        patches, prefix = others.interactions.sum(dim=(1, 2)), others.prefix.sum(dim=(1, 2))
        return own + torch.einsum("bnhw,bhw->bn", shown, patches.to(shown)) + prefix.to(own)[:, None]


@dataclass(frozen=True)
class ImageComparison:
    """The contribution of the patches of B images, and of B others, to the similarity of each pair.

    Attributes:
        first: [B, H, W] of the images, at patch resolution; as `Attribution.image`.
        second: [B, H, W] of the others, whose grid may be another one.
        similarity: [B], the cosine similarity that is explained, in [-1, 1].
    """

    first: Tensor
    second: Tensor
    similarity: Tensor


class AttributionMethod(ABC):
    """An attribution method: explains the cosine similarity of images and captions by their patches and tokens.

    Results do not depend on what else is in the batch, on its order, or on `internal_batch_size`.

    Args:
        encoder: the model to explain. It is explained in evaluation mode, and left as it was.
        internal_batch_size: how many inputs (each method says of what kind) pass through a tower at a time; bounds
            memory, changes no number. None: as many as there are.

    Attributes:
        signed: whether maps distinguish for from against; those of other methods only distinguish much from little.
        pairwise: whether attributions have token-patch `interactions`, so that a phrase has a map within its caption.
        stochastic: whether results depend on an option `seed`.
        intra_modal: whether two images, or two captions, can be compared (pairwise methods only).
        compares_images: whether two images, but no captions, can be compared: `attribute_images`.
        baseline: whether the model is ignored, as by random maps.
        has_zero: whether 0 means "no influence"; elsewhere only differences within a map mean something.
        explains: which targets: the similarity only, those that are linear in similarities, or any.
        origin: the package and entry of a method of another package; empty for built-in ones.
        grid: rows and columns of image maps; those of the last layer unless a method sets others.

    Raises:
        ValueError: `internal_batch_size` is not positive.
    """

    signed: ClassVar[bool] = False
    pairwise: ClassVar[bool] = False
    intra_modal: ClassVar[bool] = False
    compares_images: ClassVar[bool] = False
    stochastic: ClassVar[bool] = False
    baseline: ClassVar[bool] = False
    has_zero: ClassVar[bool] = True
    explains: ClassVar[Explains] = "similarity"
    origin: ClassVar[str] = ""

    def __init__(self, encoder: TwoTowerEncoder, *, internal_batch_size: int | None = None) -> None:
        if not isinstance(encoder, TwoTowerEncoder):
            raise TypeError(
                f"{type(self).__name__} explains an encoder with tokenizer and image transform, as load_dual_encoder "
                f"makes it; got a {type(encoder).__name__}. Save its state dict, and load it with "
                "load_dual_encoder(NAME, pretrained=FILE)"
            )
        if internal_batch_size is not None and internal_batch_size < 1:
            raise ValueError(f"internal_batch_size has to be at least 1, or None; got {internal_batch_size}")
        self.encoder = encoder
        self._structure = encoder.structure()
        self.internal_batch_size = internal_batch_size

    @property
    def label(self) -> str:
        """The class's name, as messages give it; for a method of another package also the package and its entry."""
        return f"{type(self).__name__} ({self.origin})" if self.origin else type(self).__name__

    @property
    def resolved_options(self) -> dict[str, Any]:
        """Options that were left to the method, with the values it took; records of results hold these."""
        return {}

    @cached_property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image maps."""
        return self.encoder.image_at_layer().grid

    @classmethod
    def serves(cls, target: Target | type[Target]) -> bool:
        """True if the method explains that target."""
        kind = target if isinstance(target, type) else type(target)
        return cls.explains == "any" or kind is Similarity or (cls.explains == "linear" and kind.linear)

    def attribute(self, images: Tensor, tokens: Tensor, target: Target = SIMILARITY) -> Attribution:
        """Explain the similarity of each image and its caption, or another target.

        Args:
            images: [B, 3, height, width], as `encoder.image_transform` makes them.
            tokens: [B, L] token ids; caption i belongs to image i.
            target: what is explained, such as `Contrast(["a cat chasing a dog"])`.

        Raises:
            TypeError: not tensors, or images that are not normalised.
            ValueError: shapes do not match; the similarity or the result is not finite (the message says which); or
                the similarity that was explained is not the model's own, which was changed meanwhile; or one of the
                target's captions cannot be used.
            UnsupportedTargetError: the method cannot explain the target.
            PluginError: `_attribute` returned no attribution, or one of another shape.
        """
        check_batch(images, tokens)
        self._check_images(images)
        self._check_target(target)
        images, tokens = as_constant(images), as_constant(tokens)
        self._check_towers()
        with differentiable(self.encoder):
            result, own = self._compared(images, Question.of(target, self.encoder, tokens))
        self._check_shapes(result, *tokens.shape)
        parts = {"similarity": result.similarity, "image map": result.image, "text map": result.text}
        if result.others is not None:
            parts["text map of the other captions"] = result.others.text
        for what, part in parts.items():
            check_finite(part, what, self.label)
        self._check_similarity(result.similarity, own)
        image = result.image.flatten(1)
        _warn_if_constant(image, torch.ones_like(image, dtype=torch.bool), "image", self.label)
        _warn_if_constant(result.text, self.encoder.tokenizer.content_mask(tokens), "text", self.label)
        return result

    def _check_target(self, target: Target) -> None:
        """Raise an UnsupportedTargetError where the method does not explain the target."""
        if not self.serves(target):
            raise unsupported_target(self.label, target)

    def _check_shapes(self, result: Attribution, batch: int, length: int) -> None:
        """Raise a PluginError that names the method and the rule where a result breaks the contract."""
        kind = InteractionAttribution if self.pairwise else Attribution
        if not isinstance(result, kind):
            raise PluginError(
                f"{self.label}: `_attribute` has to return an {kind.__name__}; got a {type(result).__name__}"
            )
        shapes = {
            "image": (batch, *self.grid),
            "text": (batch, length),
            "similarity": (batch,),
            "interactions": (batch, length, *self.grid),
            "prefix": (batch, length),
            "completeness_error": (batch,),
        }
        for name, shape in shapes.items():
            part = getattr(result, name)
            optional = name == "completeness_error" or (not self.pairwise and name in ("interactions", "prefix"))
            if part is None and optional:
                continue
            if not isinstance(part, Tensor) or part.shape != shape:
                got = [*part.shape] if isinstance(part, Tensor) else type(part).__name__
                raise PluginError(f"{self.label}: `{name}` of an attribution has to be a tensor {[*shape]}; got {got}")
        # Built-in methods are known to keep this; a check would cost them a wait for the device.
        if self.origin and self.has_zero and not self.signed and bool((result.image < 0).any()):
            raise PluginError(f"{self.label}: a map has negative values; state `signed = True` in the class")

    def _check_images(self, images: Tensor) -> None:
        """Raise a ValueError where images are of another shape than the model's, which some towers would crop."""
        if images.shape[1:] != self.encoder.image_shape:
            raise ValueError(
                f"the model takes images {[*self.encoder.image_shape]}, as encoder.image_transform makes them; got "
                f"{[*images.shape[1:]]}. For another size, load it with image_size=(height, width)"
            )

    def _check_image_pair(self, images: Tensor, others: Tensor, by: AttributionMethod) -> None:
        """Raise a ValueError where two batches of images cannot be compared, the second by another method's encoder."""
        if (
            images.ndim != 4
            or others.ndim != 4
            or not len(images)
            or len(images) != len(others)
            or (by is self and images.shape != others.shape)
        ):
            raise ValueError(
                f"expected two batches of images of one shape; got {[*images.shape]} and {[*others.shape]}"
            )
        self._check_images(images)
        by._check_images(others)
        widths = self.encoder.embedding_width, by.encoder.embedding_width
        if widths[0] != widths[1]:
            raise ValueError(
                f"{self.encoder.name} and {by.encoder.name} end in spaces of width {widths[0]} and {widths[1]}; only "
                "encoders of one model can be compared, such as both of load_imagebind"
            )
        self._check_towers()
        by._check_towers()

    def _check_towers(self) -> None:
        """Compare this method's towers with the model again, if its modules or hooks are others than before."""
        structure = self.encoder.structure()
        if structure == self._structure:
            return
        for value in vars(self).values():
            own = type(value).__module__.startswith("lightning_xai.attribution.") and hasattr(value, "__dict__")
            for part in vars(value).values() if own else (value,):
                if isinstance(part, TowerAtLayer):
                    self.encoder.check_tower(part)
        self._structure = structure

    def _compared(self, images: Tensor, question: Question) -> tuple[Attribution, Tensor]:
        """The attribution, and the similarity [B] by the model's own functions, which it has to be about."""
        tokens = question.tokens
        # Whole towers run, with the padding of captions: a few pairs at a time.
        size = min(self.internal_batch_size or _OWN_PAIRS, _OWN_PAIRS)
        starts = range(0, len(images), size)
        own = [self.encoder.own_similarity(images[i : i + size], tokens[i : i + size]) for i in starts]
        result = self._attribute(images, tokens) if question.is_similarity else self._attribute_to(images, question)
        return result, torch.cat(own)

    def _check_similarity(self, explained: Tensor, own: Tensor) -> None:
        """Raise a ValueError where the similarity that was explained is not the model's, but for rounding."""
        most = _SIMILARITY if own.dtype in (torch.float32, torch.float64) else _SIMILARITY_HALF
        wrong = ((explained - own).abs() > most).nonzero()[:, 0]
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"{self.label}: the similarity of pair {row} is {float(own[row]):.4f} by the model's encode_image and "
                f"encode_text, but {float(explained[row]):.4f} on the way that is explained: the model was changed by "
                "hooks, adapters or wrappers that this way does not go through. Remove them, or merge adapters into "
                "the weights (merge_and_unload), and make the method again"
            )

    @abstractmethod
    def _attribute(self, images: Tensor, tokens: Tensor) -> Attribution:
        """`attribute` of a batch that has been checked, with the model ready for derivatives."""

    def _attribute_to(self, images: Tensor, question: Question) -> Attribution:
        """`_attribute` for another target than the similarity; methods that explain others override it."""
        raise unsupported_target(self.label, question.target)

    def _chunks(self, count: int) -> Iterator[slice]:
        """Slices of at most `internal_batch_size` of `count` things."""
        size = self.internal_batch_size or max(count, 1)
        yield from (slice(start, start + size) for start in range(0, count, size))


def unsupported_target(method: str, target: Target | type[Target]) -> UnsupportedTargetError:
    """The error that a method does not explain a target, with advice."""
    kind = target if isinstance(target, type) else type(target)
    instead = "take a method that explains any, such as IntegratedGradients, KernelSHAP, GradCAM or M2IB"
    if not kind.linear:
        instead += ', or Contrast(others, weight="softmax"), which is linear and has the gradient of a probability'
    return UnsupportedTargetError(f"{method} does not explain the target {kind.__name__}: {instead}")


def check_batch(images: Tensor, tokens: Tensor) -> None:
    """Raise a ValueError that names the shapes where images and captions do not belong together."""
    if not isinstance(images, Tensor) or not isinstance(tokens, Tensor):
        raise TypeError(
            "expected tensors: images as encoder.image_transform makes them, stacked, and tokens as "
            f"encoder.tokenizer.encode(captions) does; got {type(images).__name__} and {type(tokens).__name__}"
        )
    if not images.is_floating_point():
        raise TypeError(
            f"images have to be normalised floating-point pixels, as encoder.image_transform makes them; got "
            f"{images.dtype}"
        )
    if images.ndim != 4 or tokens.ndim != 2 or len(images) != len(tokens):
        raise ValueError(
            "expected images [B, 3, H, W] and tokens [B, L], one caption an image; "
            f"got {list(images.shape)} and {list(tokens.shape)}"
        )
    if not len(images):
        raise ValueError("expected at least one image and caption, got none")


def check_finite(part: Tensor, name: str, method: str) -> None:
    """Raise a ValueError where a part of a result [B, ...] is not finite; `name` says which part."""
    broken = (~part.reshape(len(part), -1).isfinite().all(dim=1)).nonzero()[:, 0]
    if len(broken):
        advice = "look for NaN or infinity in the model's weights and in the images"
        if part.dtype == torch.float16:
            advice = (
                "float16 ends at 65,504, which derivatives of layer norms exceed: convert the encoder to bfloat16 or "
                "float32 (encoder.float()), and if that changes nothing, " + advice
            )
        raise ValueError(f"{method}: the {name} of pair(s) {broken.tolist()} is not finite; {advice}")


def _warn_if_constant(maps: Tensor, own: Tensor, name: str, method: str) -> None:
    """Warn where a map [B, N] is constant, but for rounding, over `own` [B, N] bool, unless that is a single place."""
    high = maps.masked_fill(~own, -torch.inf).amax(dim=1)
    low = maps.masked_fill(~own, torch.inf).amin(dim=1)
    rounding = _ROUNDING * torch.maximum(high.abs(), low.abs()) + _NOTHING
    constant = (((high - low) <= rounding) & (own.sum(dim=1) != 1)).nonzero()[:, 0]
    if len(constant):
        warnings.warn(
            f"{method}: the {name} map of pair(s) {constant.tolist()} is constant, so that all parts count alike; "
            "the model may ignore this input there, or the layer may be one that the embedding does not read",
            ConstantMapWarning,
            stacklevel=3,
        )
