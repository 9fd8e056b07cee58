"""A metric is a pure function from the tensors of some targets to numbers, and a description of these numbers.

A metric knows neither data sets nor models. The evaluation groups what it attributed into targets of a kind, hands
their tensors over, and writes what comes back into the long table of results.

Shape suffixes: M targets, H x W the patch grid, h x w pixels, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_xai.exclusion import Exclusion
from lightning_xai.registry import BUILTIN, PluginError
from lightning_xai.results.record import MetricRecord, Score

__all__ = [
    "CaptionTargets",
    "ChosenMetric",
    "CoalitionValues",
    "CollageTargets",
    "HiddenImage",
    "Kind",
    "MetricSpec",
    "NegativeTargets",
    "PhrasePairTargets",
    "PhraseTargets",
    "ScoreMetric",
    "check_spec",
    "no_targets",
]

Kind = Literal["phrase", "phrase_pair", "negative", "caption", "collage"]
HiddenImage = Literal["zeros", "black"]
_PRIME = 1_000_003  # keeps the draws of one seed apart from those of the next


def _no_pixels(rows: slice) -> Tensor:
    raise AssertionError("only metrics that need masks read them")


@dataclass(frozen=True)
class PhraseTargets:
    """Phrases of captions, each with the box of the one object that it names.

    Attributes:
        maps: [M, H, W], the phrase's map.
        masks: [M, H, W] bool, the patches of the box.
        signed: whether the maps distinguish for from against.
        box_shares: [M, H, W], how much of each patch the box covers; None unless the metric `needs_masks`.
        mask_shares: [M, H, W], how much of it the object's segmentation mask covers within the box; likewise.
        referee: [M, H', W'], the referee's maps of the same phrases, on its grid, NaN where it has none; None without a
            referee.
    """

    maps: Tensor
    masks: Tensor
    signed: bool
    box_shares: Tensor | None = None
    mask_shares: Tensor | None = None
    referee: Tensor | None = None

    def __len__(self) -> int:
        return len(self.maps)


@dataclass(frozen=True)
class PhrasePairTargets:
    """Ordered pairs of phrases of one caption that name different classes.

    Attributes:
        maps: [M, H, W], the map of the first phrase.
        masks: [M, H, W] bool, the patches of the first phrase's box.
        other_masks: [M, H, W] bool, the patches of the other phrase's box.
    """

    maps: Tensor
    masks: Tensor
    other_masks: Tensor

    def __len__(self) -> int:
        return len(self.maps)


@dataclass(frozen=True)
class NegativeTargets:
    """Hard negatives: captions in which one object's name was replaced.

    Attributes:
        true_maps: [M, H, W], of the true words in the true caption.
        replacement_maps: [M, H, W], of the words that replace them, in the wrong caption.
        masks: [M, H, W] bool, the patches of the true object's box.
    """

    true_maps: Tensor
    replacement_maps: Tensor
    masks: Tensor

    def __len__(self) -> int:
        return len(self.masks)


@dataclass(frozen=True)
class CollageTargets:
    """Captions with collages of two by two images, of which one is theirs.

    Attributes:
        maps: [M, H, W], the collage's map for the caption.
        inside: [M, H, W] in [0, 1], the share of each patch that lies in the quarter of the caption's own image.
    """

    maps: Tensor
    inside: Tensor

    def __len__(self) -> int:
        return len(self.maps)


@dataclass(frozen=True)
class CoalitionValues:
    """Coalitions of patches and tokens that were drawn at random, what they are worth, and what an attribution says.

    Attributes:
        similarity: [M, N], the cosine similarity of what is left of image and caption.
        explained: [M, N], the sum of the attribution's terms whose parts are all present.
        empty_similarity: [M], of the coalition without any patch and token.
        empty_explained: [M], likewise.
    """

    similarity: Tensor
    explained: Tensor
    empty_similarity: Tensor
    empty_explained: Tensor


@dataclass(frozen=True)
class CaptionTargets:
    """Whole captions with their images.

    Attributes:
        image_maps: [M, H, W], how much each patch adds to the similarity with the caption.
        text_maps: [M, L], how much each token adds.
        interactions: [M, L, H, W], how much token and patch together add; NaN for methods without interactions.
        prefix: [M, L], the same of each token with the image's prefix tokens (CLS, registers).
        content: [M, L] bool, the tokens that are words, not marks or padding.
        similarity: [M], the cosine similarity of image and caption.
        boxes: [N, 4] boxes of all objects that a caption names, (x0, y0, x1, y1) in pixels.
        box_owner: [N] int64, the target that a box belongs to.
        image_size: (h, w) in pixels.
        signed: whether the maps distinguish for from against.
        item: [M] int64, a number of image and caption that no batch or process changes, to seed what is drawn for them.
        pixels: some of the targets -> their images [m, 3, h, w], normalised.
        similarity_of: some of the targets, other images in place of theirs -> the similarity [m] with the captions.
        attribute: the same -> the method's maps [m, H, W] of these images.
        similarity_of_images: how much of each pixel to keep, [M, h, w] in [0, 1], for a slice of the targets, and what
            is seen elsewhere ("zeros" or "black") -> their similarity [M] with the caption.
        similarity_of_texts: which tokens to keep, [M, L] bool -> the captions' similarity [M] with the image, with
            padding in place of all other tokens.
        embed_images: patches that show, [M, N, H, W] bool -> unit embeddings [M, N, K] of each image with zeros after
            normalisation in place of the others.
        embed_texts: tokens that stay, [M, N, L] bool -> unit embeddings [M, N, K] of each caption with padding in place
            of the others; those that mark start and end stay anyway.
        coalitions: number of coalitions of patches, of tokens, probability that each is present, seed -> their values.
        image_coalitions: number of coalitions of patches, probability, seed -> the patches that show [M, N, H, W] bool,
            and the similarity [M, N] of what shows with the whole caption.
        text_coalitions: likewise the tokens that stay [M, N, L] bool, and the similarity [M, N] with the whole image.
        batch_size: targets that a metric should work on at a time where it needs pixels.
        mask_pixels: a slice of the targets -> the pixels of all objects that each caption names, [M, h, w] bool; only
            where the metric `needs_masks`.
        completeness_error: [M], the attribution's sum less what it should be; None for methods without such a sum.
    """

    image_maps: Tensor
    text_maps: Tensor
    interactions: Tensor
    prefix: Tensor
    content: Tensor
    similarity: Tensor
    boxes: Tensor
    box_owner: Tensor
    image_size: tuple[int, int]
    signed: bool
    item: Tensor
    pixels: Callable[[slice], Tensor]
    similarity_of: Callable[[slice, Tensor], Tensor]
    attribute: Callable[[slice, Tensor], Tensor]
    similarity_of_images: Callable[[slice, Tensor, HiddenImage], Tensor]
    similarity_of_texts: Callable[[Tensor], Tensor]
    embed_images: Callable[[Tensor], Tensor]
    embed_texts: Callable[[Tensor], Tensor]
    coalitions: Callable[[int, int, float, int], CoalitionValues]
    image_coalitions: Callable[[int, float, int], tuple[Tensor, Tensor]]
    text_coalitions: Callable[[int, float, int], tuple[Tensor, Tensor]]
    batch_size: int
    mask_pixels: Callable[[slice], Tensor] = _no_pixels
    completeness_error: Tensor | None = None

    def __len__(self) -> int:
        return len(self.image_maps)

    def slices(self) -> Iterator[slice]:
        """Slices of at most `batch_size` targets: masks at pixel resolution are large."""
        for start in range(0, len(self), self.batch_size):
            yield slice(start, min(start + self.batch_size, len(self)))

    def noise(
        self, rows: slice, shape: Sequence[int], seed: int, number: int = 0, draw: Callable[..., Tensor] = torch.randn
    ) -> Tensor:
        """Random numbers [m, *shape] on the CPU that depend on items, seed and the number of the draw alone."""
        seeds = ((item + _PRIME * seed + number) % 2**63 for item in self.item[rows].tolist())
        drawn = [draw(*shape, generator=torch.Generator().manual_seed(each)) for each in seeds]
        return torch.stack(drawn) if drawn else torch.zeros(0, *shape)


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """A metric, as the registry holds it.

    Attributes:
        name: its key in configs and results.
        kind: what it is measured on.
        compute: the targets, of the class that belongs to `kind` -> for each of `values` a number for each target, [M]
            float or bool; NaN where a target has none. It is called with M = 0, too. Its keyword-only parameters are
            the metric's options.
        values: the names that `compute` returns: metrics of the long table.
        scores: how they are summed up.
        title: of its table in reports.
        note: what the numbers mean, in one or two sentences.
        needs_boxes: whether data sets without boxes have no such targets.
        needs_masks: whether it reads segmentation masks of objects, of phrases or captions; it is measured on those
            targets alone that have them.
        needs_sign: whether it only makes sense for methods whose maps are signed.
        needs_interactions: whether it reads token-patch interactions, which pairwise methods have.
        needs_referee: whether it compares maps with those of a referee.
        empty: value -> the reason that is recorded where a target has no number (NaN); else NO_VALUE.
        by_default: whether it is measured where settings do not name the metrics; not what costs many forward passes.
        chart: how reports draw the values; None: not at all.
    """

    name: str
    kind: Kind
    compute: Callable[..., Mapping[str, Tensor]]
    values: tuple[str, ...]
    scores: tuple[Score, ...]
    title: str
    note: str
    needs_boxes: bool = False
    needs_masks: bool = False
    needs_sign: bool = False
    needs_interactions: bool = False
    needs_referee: bool = False
    empty: Mapping[str, Exclusion] = field(default_factory=dict)
    by_default: bool = True
    chart: Literal["cumulative", "distribution", "bars"] | None = None

    def serves(self, *, signed: bool, pairwise: bool) -> bool:
        """Whether a method has what the metric reads: signed maps, token-patch interactions."""
        return (signed or not self.needs_sign) and (pairwise or not self.needs_interactions)

    def record(self, options: Mapping[str, Any]) -> MetricRecord:
        """Its description in a result file."""
        return MetricRecord(
            name=self.name,
            title=self.title,
            note=self.note,
            values=self.values,
            scores=self.scores,
            chart=self.chart,
            options=dict(options),
            # A referee's maps are no truth, though it takes boxes to know which phrases there are.
            knows_objects=(self.needs_boxes or self.needs_masks) and not self.needs_referee,
        )


@dataclass(frozen=True)
class ChosenMetric:
    """A metric with all of its options.

    Attributes:
        spec: the metric.
        options: every option and its value, those left at their defaults included.
        origin: the package that it comes from.
    """

    spec: MetricSpec
    options: dict[str, Any]
    origin: str

    def measure(self, targets: Any) -> dict[str, list[float]]:
        """Compute the metric's values, each a number for each target; NaN where it has none.

        Raises:
            PluginError: `compute` broke its contract.
        """
        try:
            found = self.spec.compute(targets, **self.options)
        except Exception as error:
            # What is wrong with options or maps is for the user; all else is the plug-in's own fault.
            if self.origin == BUILTIN or isinstance(error, ValueError):
                raise
            raise self.error(f"compute failed on {len(targets)} targets ({type(error).__name__}: {error})") from error
        names, wants = ", ".join(self.spec.values), "compute has to return"
        if not isinstance(found, Mapping):
            raise self.error(f"{wants} a mapping from each of {names} to a tensor; got {type(found)}")
        if found.keys() != set(self.spec.values):
            raise self.error(f"{wants} the values {names}; got {', '.join(map(str, found))}")
        for name, value in found.items():
            if not isinstance(value, Tensor) or value.shape != (len(targets),):
                got = list(value.shape) if isinstance(value, Tensor) else type(value)
                raise self.error(f"{wants} {name} as a tensor, a number for each target, [{len(targets)}]; got {got}")
            if value.is_complex() or value.isinf().any():
                raise self.error(f"{wants} {name} as finite numbers, or NaN without one; got {value.tolist()}")
        # Whole columns at a time: a read for each number would wait for the device as often.
        return {name: found[name].detach().cpu().to(torch.float64).tolist() for name in self.spec.values}

    def error(self, rule: str) -> PluginError:
        """Make the error that names package, entry and the rule that is broken."""
        name = self.spec.name
        return PluginError(f"plug-in {self.origin}, entry {name!r} of lightning_xai.metrics: {rule}")


def no_targets(kind: Kind) -> PhraseTargets | PhrasePairTargets | NegativeTargets | CaptionTargets | CollageTargets:
    """Return targets of a kind with M = 0, on a grid of one patch, to try a metric and its options out."""
    maps, masks = torch.zeros(0, 1, 1), torch.zeros(0, 1, 1, dtype=torch.bool)
    if kind == "phrase":
        return PhraseTargets(maps, masks, signed=True, box_shares=maps, mask_shares=maps, referee=maps)
    if kind == "phrase_pair":
        return PhrasePairTargets(maps, masks, masks)
    if kind == "negative":
        return NegativeTargets(maps, maps, masks)
    if kind == "collage":
        return CollageTargets(maps, maps)
    nothing = torch.zeros(0)
    return CaptionTargets(
        image_maps=maps,
        text_maps=torch.zeros(0, 1),
        interactions=torch.zeros(0, 1, 1, 1),
        prefix=torch.zeros(0, 1),
        content=torch.zeros(0, 1, dtype=torch.bool),
        similarity=nothing,
        boxes=torch.zeros(0, 4),
        box_owner=torch.zeros(0, dtype=torch.int64),
        image_size=(1, 1),
        signed=True,
        item=torch.zeros(0, dtype=torch.int64),
        pixels=lambda rows: torch.zeros(0, 3, 1, 1),
        similarity_of=lambda rows, images: nothing,
        attribute=lambda rows, images: maps,
        similarity_of_images=lambda rows, kept, hidden: nothing,
        similarity_of_texts=lambda kept: nothing,
        embed_images=lambda shown: torch.zeros(*shown.shape[:2], 1),
        embed_texts=lambda said: torch.zeros(*said.shape[:2], 1),
        coalitions=lambda patches, tokens, p, seed: CoalitionValues(maps[:, 0], maps[:, 0], nothing, nothing),
        image_coalitions=lambda count, p, seed: (masks.unsqueeze(1).repeat(1, count, 1, 1), torch.zeros(0, count)),
        text_coalitions=lambda count, p, seed: (masks.repeat(1, count, 1), torch.zeros(0, count)),
        batch_size=1,
    )


def check_spec(name: str, entry: Any) -> None:
    """Raise a ValueError that states the rule which an entry of the registry of metrics breaks."""
    if not isinstance(entry, MetricSpec):
        raise ValueError(f"a metric has to be a MetricSpec; got {type(entry).__name__}")
    if entry.name != name:
        raise ValueError(f"the name of a MetricSpec has to be that of its entry; got {entry.name!r}")
    if entry.kind not in get_args(Kind):
        raise ValueError(f"kind has to be one of {', '.join(get_args(Kind))}; got {entry.kind!r}")
    if entry.needs_masks and entry.kind not in ("phrase", "caption"):
        raise ValueError(f"needs_masks is for metrics of phrases or captions; got one of kind {entry.kind!r}")
    if not entry.values or not entry.scores:
        raise ValueError("a MetricSpec needs at least one of `values` and one of `scores`")
    unknown = {score.value for score in entry.scores} | set(entry.empty)
    if unknown := unknown - set(entry.values):
        raise ValueError(f"scores and empty have to name values ({', '.join(entry.values)}); got {sorted(unknown)}")


class ScoreMetric(Metric):
    """The scores of a metric over any batches, in any module.

    The result is the same to the last bit for any order, batches and number of processes, and that of the long table.

    Args:
        spec: an entry of `METRICS`.
        columns: what is collected of each target; None: the values that the scores sum up.

    Example:
        >>> from lightning_xai.metrics import METRICS
        >>> metric = ScoreMetric(METRICS["hard_negatives"])
        >>> metric.update(delta=torch.tensor([-0.5, 0.25]))
        >>> metric.compute()
        {'delta_negative': 0.5, 'delta_mean': -0.125}
    """

    full_state_update = False
    is_differentiable = False
    collected: list[Tensor]

    def __init__(self, spec: MetricSpec, columns: Sequence[str] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.spec = spec
        self.values = tuple(columns or dict.fromkeys(score.value for score in spec.scores))
        self.add_state("collected", [], dist_reduce_fx="cat")
        self.reset()

    def set_dtype(self, dst_type: str | torch.dtype) -> ScoreMetric:
        """Do nothing: values are kept as they came at any precision."""
        return self

    def reset(self) -> None:
        """Forget all values."""
        super().reset()
        # torchmetrics cannot gather from a rank that holds nothing.
        self.collected.append(torch.zeros(0, len(self.values), dtype=torch.int64, device=self.device))

    def update(self, **values: Tensor) -> None:
        """Add targets, as `update(**spec.compute(targets))`.

        Args:
            values: of each value that a score sums up, a number for each target, [M]; NaN where the target has none.
                Other values of the metric are not needed.

        Raises:
            ValueError: other names, other shapes, or an infinite number.
        """
        shapes = {name: list(value.shape) for name, value in values.items()}
        named = set(self.values) <= values.keys() <= {*self.spec.values, *self.values}
        if not named or len({tuple(shape) for shape in shapes.values()}) != 1:
            raise ValueError(f"expected {', '.join(self.values)}, each [M]; got {shapes}")
        # On the CPU, since Apple's GPUs have no float64; as bits, since some devices and casts would round float64.
        rows = torch.stack([values[name].detach().cpu().double() for name in self.values], dim=-1)
        if rows.ndim != 2 or rows.isinf().any():
            raise ValueError(f"expected finite numbers or NaN, [M] for each of {', '.join(self.values)}; got {shapes}")
        self.collected.append(rows.view(torch.int64).to(self.device))

    def rows(self) -> Tensor:
        """All that was collected, [M, columns] float64 on the CPU."""
        collected: Tensor = dim_zero_cat(self.collected)
        return collected.cpu().view(torch.float64)

    def compute(self) -> Any:
        """Every score by its name, over all targets of all ranks; NaN where there is none."""
        columns = dict(zip(self.values, self.rows().unbind(dim=1), strict=True))
        return {
            score.name: score.of(columns[score.value][~columns[score.value].isnan()].tolist())
            for score in self.spec.scores
        }
