"""From a batch to rows of the long table: one method's maps, their targets by kind, and what metrics measure on them.

Each item is attributed once, whatever metrics use it. Pairwise methods explain a phrase within its caption: its map is
the sum of its tokens' rows. Other methods have one map for a whole caption; for them, each phrase is explained as a
separate caption.

Shape suffixes: B images, C captions, R phrases of the batch, M targets that can be measured, N hard negatives, K
embedding width, L tokens, H x W patches, h x w pixels.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from lightning_xai.attribution.base import Attribution, AttributionMethod, InteractionAttribution
from lightning_xai.attribution.pairwise import Captured, HiddenStates, PairwiseMethod, References
from lightning_xai.attribution.perturbation import only_tokens, wide_dtype
from lightning_xai.attribution.reference import ImageReference, reference_image
from lightning_xai.data.batch import Batch
from lightning_xai.data.masks import Mask, MaskError, mask_runs
from lightning_xai.data.phrase_finder import find_phrases
from lightning_xai.data.sample import stable_hash
from lightning_xai.evaluation.collages import Collages
from lightning_xai.evaluation.embeddings import Embeddings
from lightning_xai.evaluation.word_maps import word_maps
from lightning_xai.exclusion import Exclusion
from lightning_xai.metrics.base import (
    CaptionTargets,
    CoalitionValues,
    CollageTargets,
    Kind,
    NegativeTargets,
    PhrasePairTargets,
    PhraseTargets,
)
from lightning_xai.metrics.grounding import measurable, patch_mask
from lightning_xai.metrics.localization import box_union
from lightning_xai.metrics.mask_grounding import patch_shares
from lightning_xai.metrics.other_objects import directed_pairs
from lightning_xai.metrics.registry import ChosenMetric
from lightning_xai.models.dual_encoder import DualEncoder

__all__ = [
    "BOX_COLUMNS",
    "BatchMaps",
    "BatchRows",
    "MethodMaps",
    "ValueRow",
    "Wanted",
    "clock",
    "in_digits",
    "maps_of",
    "measure_batch",
    "places_of",
]

ValueRow = tuple[str, str, float, str]
"""Target, metric, value and reason of exclusion; NaN with a reason, a number with an empty one."""
BOX_COLUMNS = ("x0", "y0", "x1", "y1")
_HEAT_DIGITS = 4
_PAIRS_OF_EACH = 4  # of a coalition of patches with coalitions of tokens
_A = TypeVar("_A", bound=Attribution)


@dataclass(frozen=True)
class Wanted:
    """The maps that are needed of a batch.

    Attributes:
        phrases: [M] int64, rows of `Batch.phrases`.
        negatives: [N] int64, rows of `Batch.negatives`.
        captions: whether the maps of all captions are wanted.
    """

    phrases: Tensor
    negatives: Tensor
    captions: bool


@dataclass(frozen=True)
class BatchMaps:
    """The maps of a batch.

    Attributes:
        phrases: [M, H, W].
        true: [N, H, W], of the true words of each hard negative.
        replacements: [N, H, W], of the words in their place, in the wrong caption.
        image: [C, H, W], of each caption's image; none (C = 0) where not wanted.
        text: [C, L], of each caption's tokens; none where not wanted.
        attribution: of all captions, whose maps `image` and `text` are; None where there are none.
        states: of the batch, that the maps were made of; None of methods that make them of inputs.
    """

    phrases: Tensor
    true: Tensor
    replacements: Tensor
    image: Tensor
    text: Tensor
    attribution: Attribution | None = None
    states: HiddenStates | None = None


class MethodMaps:
    """Makes the maps of batches with a method that has one map for a whole caption.

    Args:
        method: of the model that is evaluated.
        batch_size: inputs that pass through a tower at a time; bounds memory, changes no number.
    """

    def __init__(self, method: AttributionMethod, batch_size: int) -> None:
        self.method = method
        self.grid = method.grid
        self.batch_size = batch_size

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Inside, the model runs on a batch; `maps` of the same batch, after it, reuses what the pass computed."""
        yield

    def maps(self, batch: Batch, wanted: Wanted) -> BatchMaps:
        """Attribute what is wanted of a batch, after its forward pass."""
        rows = slice(None if wanted.captions else 0)
        image, text, attribution = self._of_pairs(batch, batch.caption_image[rows], batch.tokens[rows])
        phrases, negatives = batch.phrases, batch.negatives
        asked = [(int(phrases.image_row[row]), phrases.text[row]) for row in wanted.phrases.tolist()]
        if negatives is not None:
            for words in (negatives.text, negatives.replacement):
                asked += [(int(negatives.image_row[row]), words[row]) for row in wanted.negatives.tolist()]
        sizes = [len(wanted.phrases), len(wanted.negatives), len(wanted.negatives)]
        own, true, replacements = torch.split(self._of_words(batch, asked), sizes)
        return BatchMaps(own, true, replacements, image, text, attribution)

    def word_maps(self, states: HiddenStates | None, image: int, caption: int, text: str) -> Tensor | None:
        """Map each word of a caption within it; see `word_maps`.

        Args:
            states: of a batch, as `maps` returned them.
            image: row of the image.
            caption: row of the caption.
            text: the caption.

        Returns:
            [n, H, W] float32 on the CPU; None of methods that explain no word within its caption.
        """
        return None

    def _of_words(self, batch: Batch, asked: list[tuple[int, str]]) -> Tensor:
        """A map for each image and words; the same question is answered once."""
        place = {question: row for row, question in enumerate(dict.fromkeys(asked))}
        tokens = batch.tokens[:0]
        if asked:
            tokens = self.method.encoder.tokenizer.encode([words for _, words in place]).to(batch.tokens.device)
        images = torch.tensor([image for image, _ in place], dtype=torch.int64, device=batch.tokens.device)
        maps, _, _ = self._of_pairs(batch, images, tokens)
        return maps[torch.tensor([place[question] for question in asked], dtype=torch.int64, device=maps.device)]

    def _of_pairs(self, batch: Batch, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Attribution | None]:
        """Maps of images, given by their rows, and of their captions; and the attribution that they are part of."""
        parts = [self.method.attribute(batch.images[images[rows]], tokens[rows]) for rows in self.chunks(len(tokens))]
        return self._joined(batch, parts)

    def _joined(self, batch: Batch, parts: list[_A]) -> tuple[Tensor, Tensor, _A | None]:
        """Maps of images and of captions, and the whole attribution; None of nothing."""
        if not parts:
            return *self._nothing(batch), None
        whole = parts[0].concatenate(parts)
        return whole.image, whole.text, whole

    def _nothing(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """No maps of images and of captions."""
        return batch.images.new_zeros(0, *self.grid), batch.images.new_zeros(0, batch.tokens.shape[1])

    def chunks(self, count: int) -> Iterator[slice]:
        """Slices of at most `batch_size` of `count` things."""
        yield from (slice(start, start + self.batch_size) for start in range(0, count, self.batch_size))


class _PairwiseMaps(MethodMaps):
    """Makes them with a pairwise method, from what the model's own forward pass computes.

    The weights have to stay as they are from the first call of `maps` on.
    """

    method: PairwiseMethod
    _captured = Captured()

    @cached_property
    def _references(self) -> References:
        return self.method.references()

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        with self.method.capturing() as self._captured:
            yield

    def maps(self, batch: Batch, wanted: Wanted) -> BatchMaps:
        captured, self._captured = self._captured, Captured()
        phrases, negatives = batch.phrases, batch.negatives
        captions, masks = phrases.caption_row[wanted.phrases], phrases.span_mask[wanted.phrases]
        if negatives is not None:
            captions = torch.cat([captions, negatives.caption_row[wanted.negatives]])
            masks = torch.cat([masks, negatives.true_mask[wanted.negatives]])
        image, text = self._nothing(batch)
        if not wanted.captions and not len(captions):
            return BatchMaps(image, image, image, image, text)
        states, replacements = self.method.hidden_states(batch.images, batch.tokens, captured), image
        attribution = None
        if wanted.captions:
            image, text, attribution = self._of_captions(batch, states)
            maps = image.new_zeros(0, *self.grid)
            if attribution is not None:
                interactions = attribution.interactions
                maps = torch.einsum("rl,rlhw->rhw", masks.to(interactions), interactions[captions])
        else:
            # Far cheaper for spans alone.
            maps = self._of_spans(batch, states, batch.caption_image[captions], captions, masks)
        if negatives is not None and len(wanted.negatives):
            tokens = negatives.tokens[wanted.negatives]
            wrong = HiddenStates(states.image, self.method.text_states(tokens), tokens)
            every = torch.arange(len(tokens), device=tokens.device)
            images, masks = (part[wanted.negatives] for part in (negatives.image_row, negatives.mask))
            replacements = self._of_spans(batch, wrong, images, every, masks)
        own, true = torch.split(maps, [len(wanted.phrases), len(maps) - len(wanted.phrases)])
        return BatchMaps(own, true, replacements, image, text, attribution, states)

    def word_maps(self, states: HiddenStates | None, image: int, caption: int, text: str) -> Tensor | None:
        assert states is not None, "maps of the batch were made"
        rows = torch.tensor([[image], [caption]], device=states.tokens.device)
        return word_maps(self.method, states.pairs(*rows), self._references, text)

    def _of_captions(self, batch: Batch, states: HiddenStates) -> tuple[Tensor, Tensor, InteractionAttribution | None]:
        """Maps of all captions and their images, and the attribution that they are part of."""
        every = torch.arange(len(batch.tokens), device=batch.tokens.device)
        return self._joined(
            batch,
            [
                self.method.attribute_states(states.pairs(batch.caption_image[rows], every[rows]), self._references)
                for rows in self.chunks(len(every))
            ],
        )

    def _of_spans(self, batch: Batch, states: HiddenStates, images: Tensor, captions: Tensor, masks: Tensor) -> Tensor:
        """Maps of spans, given the rows of their images and captions in the states, and their masks."""
        parts = list(self._spans_together(images))
        maps = (
            self.method.span_maps_of(states, images[rows], captions[rows], masks[rows], self._references)
            for rows in parts
        )
        in_parts = torch.cat([self._nothing(batch)[0], *maps])
        return in_parts[torch.argsort(torch.cat([images[:0], *parts]))]

    def _spans_together(self, images: Tensor) -> Iterator[Tensor]:
        """Rows of at most `batch_size` spans, where they fit all those of an image, which share its path."""
        order = torch.argsort(images, stable=True)
        _, counts = torch.unique_consecutive(images[order], return_counts=True)
        start = stop = 0
        for count in counts.tolist():
            if stop > start and stop + count > start + self.batch_size:
                yield order[start:stop]
                start = stop
            stop += count
            while stop > start + self.batch_size:
                yield order[start : start + self.batch_size]
                start += self.batch_size
        if stop > start:
            yield order[start:stop]


def maps_of(method: AttributionMethod, batch_size: int) -> MethodMaps:
    """Make the maps that fit a method; see `MethodMaps`."""
    return _PairwiseMaps(method, batch_size) if isinstance(method, PairwiseMethod) else MethodMaps(method, batch_size)


@dataclass(frozen=True)
class BatchRows:
    """The rows of a batch.

    Attributes:
        targets: rows of the table of targets, excluded ones included.
        values: what was measured on them.
        phrases: the phrases that were measured: their targets and maps [H, W] on the CPU.
        seconds: that the attribution took, the model's own forward pass and the metrics left out.
        states: as for `BatchMaps`.
    """

    targets: list[dict[str, Any]]
    values: list[ValueRow]
    phrases: list[tuple[dict[str, Any], Tensor]]
    seconds: float
    states: HiddenStates | None = None

    @property
    def phrase_maps(self) -> dict[str, Tensor]:
        """Target -> map of each phrase that was measured."""
        return {target["target"]: heat for target, heat in self.phrases}

    def by_item(self, indices: Iterable[int], *, heats: bool) -> dict[int, dict[str, Any]]:
        """The rows of each of these items, and if wanted the maps of its phrases, as plain values to keep on disk."""
        records: dict[int, dict[str, Any]] = {index: {"targets": [], "values": [], "heats": {}} for index in indices}
        index_of = {target["target"]: target["index"] for target in self.targets}
        for target in self.targets:
            records[target["index"]]["targets"].append(target)
        for name, metric, value, excluded in self.values:
            number = None if math.isnan(value) else value
            records[index_of[name]]["values"].append((name, metric, number, excluded))
        for target, heat in self.phrases if heats else ():
            records[target["index"]]["heats"][target["target"]] = in_digits(heat)
        return records


@dataclass(frozen=True)
class _Group:
    """All targets of one kind: their rows and reasons, and the tensors of those whose reason is MEASURED.

    Of each of these, `mask_reasons` says why it has no mask; there are none where no metric needs masks.
    """

    rows: list[dict[str, Any]]
    reasons: list[int]
    tensors: PhraseTargets | PhrasePairTargets | NegativeTargets | CaptionTargets | CollageTargets
    mask_reasons: list[Exclusion] = field(default_factory=list)


def measure_batch(
    batch: Batch,
    maps: MethodMaps,
    metrics: Sequence[ChosenMetric],
    embeddings: Embeddings | None = None,
    collages: Collages | None = None,
    referee: Mapping[str, Tensor] | None = None,
) -> BatchRows:
    """Attribute and measure a batch whose forward pass has just run.

    Args:
        batch: of an evaluation.
        maps: makes the method's maps.
        metrics: what to measure.
        embeddings: of the batch; needed by metrics of captions.
        collages: needed by metrics of collages.
        referee: `phrase_maps` of the batch by the method that others are compared with.

    Raises:
        ValueError: an attribution is not finite.
    """
    kinds = dict.fromkeys(metric.spec.kind for metric in metrics)
    measuring = _Measuring(batch, maps, kinds.keys(), embeddings, collages, referee)
    groups = {kind: measuring.group(kind) for kind in kinds}
    masked = {metric.spec.kind for metric in metrics if metric.spec.needs_masks}
    groups |= {kind: measuring.with_masks(groups[kind]) for kind in masked}
    values = [row for metric in metrics for row in _value_rows(groups[metric.spec.kind], metric)]
    targets = [row for group in groups.values() for row in group.rows]
    shown = measuring.measured_phrases(groups["phrase"]) if "phrase" in groups else []
    return BatchRows(targets, values, shown, measuring.seconds, measuring.maps.states)


def in_digits(heat: Tensor) -> list[list[float]]:
    """A map [H, W] as plain values to keep on disk, of four digits.

    >>> in_digits(torch.tensor([[0.123456, -2.0]]))
    [[0.1235, -2.0]]
    """
    return [[float(f"{value:.{_HEAT_DIGITS}g}") for value in line] for line in heat.tolist()]


def clock(device: torch.device) -> float:
    """Seconds from some point on, after all that the device has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _Measuring:
    """One batch, its maps by one method, and the targets that they make."""

    def __init__(
        self,
        batch: Batch,
        maps: MethodMaps,
        kinds: Set[Kind],
        embeddings: Embeddings | None,
        collages: Collages | None = None,
        referee: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.batch = batch
        self.collages = collages
        self.maker = maps
        self.size = (batch.images.shape[2], batch.images.shape[3])
        self.grid = maps.grid
        self.embeddings = embeddings
        self.referee = referee
        self.reason_R = measurable(batch.phrases.reason, batch.phrases.boxes, maps.grid, self.size)
        self.wanted = self._wanted(kinds)
        self._views: dict[Mask, Tensor | Exclusion] = {}
        begin = clock(batch.images.device)
        self.maps: BatchMaps = maps.maps(batch, self.wanted)
        self.seconds = clock(batch.images.device) - begin

    def group(self, kind: Kind) -> _Group:
        """All targets of a kind."""
        return {
            "phrase": self._phrases,
            "phrase_pair": self._phrase_pairs,
            "negative": self._negatives,
            "caption": self._caption_targets,
            "collage": self._collages,
        }[kind]()

    def with_masks(self, group: _Group) -> _Group:
        """A group of phrases or captions, with what metrics read that need masks."""
        if isinstance(group.tensors, PhraseTargets):
            return self._phrases_with_masks(group, group.tensors)
        assert isinstance(group.tensors, CaptionTargets)
        return self._captions_with_masks(group, group.tensors)

    def measured_phrases(self, group: _Group) -> list[tuple[dict[str, Any], Tensor]]:
        """Target and map of each phrase that can be measured, in float32 at least."""
        heats = self.maps.phrases.to(wide_dtype(self.maps.phrases)).cpu()
        return [(group.rows[row], heat) for row, heat in zip(self.wanted.phrases.tolist(), heats, strict=True)]

    def _wanted(self, kinds: Set[Kind]) -> Wanted:
        phrases = (self.reason_R == Exclusion.MEASURED).nonzero()[:, 0]
        negatives = phrases[:0]
        if "negative" in kinds and self.batch.negatives is not None:
            negatives = (self._negative_reasons() == Exclusion.MEASURED).nonzero()[:, 0]
        return Wanted(phrases if kinds & {"phrase", "phrase_pair"} else phrases[:0], negatives, "caption" in kinds)

    def _negative_reasons(self) -> Tensor:
        negatives = self.batch.negatives
        assert negatives is not None
        return measurable(negatives.reason, negatives.boxes, self.grid, self.size)

    def _phrases(self) -> _Group:
        phrases = self.batch.phrases
        masks = patch_mask(phrases.boxes[self.wanted.phrases], self.grid, self.size)
        more = (
            {"phrase": text} | dict(zip(BOX_COLUMNS, box, strict=True))
            for text, box in zip(phrases.text, phrases.boxes.tolist(), strict=True)
        )
        rows = self._rows("phrase", phrases.image_row, phrases.caption_row, phrases.label, more)
        names = [rows[row]["target"] for row in self.wanted.phrases.tolist()]
        targets = PhraseTargets(self.maps.phrases, masks, self.maker.method.signed, referee=self._referee_of(names))
        return _Group(rows, self.reason_R.tolist(), targets)

    def _referee_of(self, names: Sequence[str]) -> Tensor | None:
        """The referee's maps of some targets, NaN where it has none."""
        if self.referee is None:
            return None
        if not self.referee:  # it measured no phrase of the batch
            return torch.full_like(self.maps.phrases, torch.nan)
        nothing = torch.full_like(next(iter(self.referee.values())), torch.nan)
        found = [self.referee.get(name, nothing) for name in names]
        return torch.stack([nothing, *found])[1:].to(self.maps.phrases.device)

    def _phrases_with_masks(self, group: _Group, targets: PhraseTargets) -> _Group:
        phrases, boxes, shares, reasons = self.batch.phrases, self.batch.phrases.boxes.cpu(), [], []
        for row in self.wanted.phrases.tolist():
            box = box_union(boxes[row : row + 1], torch.zeros(1, dtype=torch.int64), 1, self.size)
            mask = phrases.masks[row] if phrases.masks else Exclusion.NO_MASK
            view = self._view(mask)
            inside = torch.zeros_like(box) if isinstance(view, Exclusion) else view & box
            reasons.append(view if isinstance(view, Exclusion) else Exclusion.MEASURED)
            if not reasons[-1] and not inside.any():
                reasons[-1] = Exclusion.MASK_BROKEN
            shares.append(patch_shares(torch.cat([box, inside]), self.grid))
        found = torch.stack(shares) if shares else torch.zeros(0, 2, *self.grid)
        box_shares, mask_shares = found.to(targets.maps.device).unbind(dim=1)
        tensors = replace(targets, box_shares=box_shares, mask_shares=mask_shares)
        return replace(group, tensors=tensors, mask_reasons=reasons)

    def _captions_with_masks(self, group: _Group, targets: CaptionTargets) -> _Group:
        named = self.batch.named
        assert named is not None, "evaluation batches have named boxes"
        views: dict[int, list[Tensor]] = {}
        # A caption of which one mask is missing has none: the others are not all that it names.
        reasons = [Exclusion.NO_BOX] * len(group.rows)
        masks = named.masks or [Exclusion.NO_MASK] * len(named.boxes)
        for caption, mask in zip(named.caption_row.tolist(), masks, strict=True):
            view = self._view(mask)
            if isinstance(view, Exclusion) and view is not Exclusion.OUTSIDE_CROP:
                reasons[caption] = max(view, reasons[caption])
                continue
            if reasons[caption] == Exclusion.NO_BOX:
                reasons[caption] = Exclusion.MEASURED
            if isinstance(view, Tensor):
                views.setdefault(caption, []).append(view)
        nothing = torch.zeros(1, *self.size, dtype=torch.bool)

        def pixels(rows: slice) -> Tensor:
            parts = [torch.cat([nothing, *views.get(row, [])]).any(dim=0) for row in range(rows.start, rows.stop)]
            return torch.stack(parts).to(targets.image_maps.device)

        return replace(group, tensors=replace(targets, mask_pixels=pixels), mask_reasons=reasons)

    def _view(self, mask: Mask | Exclusion) -> Tensor | Exclusion:
        """The pixels [1, h, w] of a mask as the model sees its image, on the CPU; or why there are none."""
        if isinstance(mask, Exclusion):
            return mask
        encoder = self.maker.method.encoder
        assert isinstance(encoder, DualEncoder), "pixels are masked as its transform makes them"
        if mask not in self._views:
            try:
                view = encoder.image_transform.mask(mask)[None]
                seen, whole = bool(view.any()), bool(mask_runs(mask)[1::2].any())
                unseen = Exclusion.OUTSIDE_CROP if whole else Exclusion.MASK_BROKEN
                self._views[mask] = view if seen else unseen
            except MaskError:
                self._views[mask] = Exclusion.MASK_BROKEN
        return self._views[mask]

    def _phrase_pairs(self) -> _Group:
        phrases = self.batch.phrases
        # Which pairs there are depends on the data alone, so that methods on other grids number them alike.
        known = (phrases.reason == Exclusion.MEASURED).nonzero()[:, 0]
        pairs = known[directed_pairs(phrases.caption_row[known], phrases.label[known])]
        reasons = self.reason_R[pairs].amax(dim=1)
        # The place of each phrase's map among those that were made.
        place = torch.cumsum(self.reason_R == Exclusion.MEASURED, dim=0) - 1
        selected, other = pairs[reasons == Exclusion.MEASURED].unbind(dim=1)
        masks = patch_mask(phrases.boxes, self.grid, self.size)
        first = pairs[:, 0]
        more = (
            {"phrase": phrases.text[row], "other_label": self.batch.label_names[label]}
            for row, label in zip(first.tolist(), phrases.label[pairs[:, 1]].tolist(), strict=True)
        )
        images, captions, labels = (part[first] for part in (phrases.image_row, phrases.caption_row, phrases.label))
        targets = PhrasePairTargets(self.maps.phrases[place[selected]], masks[selected], masks[other])
        return _Group(self._rows("phrase_pair", images, captions, labels, more), reasons.tolist(), targets)

    def _negatives(self) -> _Group:
        negatives, maps = self.batch.negatives, self.maps
        if negatives is None:
            return _Group([], [], NegativeTargets(maps.true, maps.replacements, maps.true.bool()))
        masks = patch_mask(negatives.boxes[self.wanted.negatives], self.grid, self.size)
        more = (
            {"negative_caption": caption, "phrase": text, "replacement": replacement}
            for caption, text, replacement in zip(
                negatives.captions, negatives.text, negatives.replacement, strict=True
            )
        )
        rows = self._rows("negative", negatives.image_row, negatives.caption_row, negatives.label, more)
        targets = NegativeTargets(maps.true, maps.replacements, masks)
        return _Group(rows, self._negative_reasons().tolist(), targets)

    def _caption_targets(self) -> _Group:
        batch, embeddings = self.batch, self.embeddings
        assert embeddings is not None, "metrics of captions need embeddings"
        assert batch.named is not None, "evaluation batches have named boxes"
        content = embeddings.encoder.tokenizer.content_mask(batch.tokens)
        image_CK, text_CK = embeddings.image_BK[batch.caption_image], embeddings.text_CK
        targets = CaptionTargets(
            image_maps=self.maps.image.to(batch.images),
            text_maps=self.maps.text,
            interactions=self._of_pairs("interactions", embeddings, self.grid),
            prefix=self._of_pairs("prefix", embeddings),
            content=content,
            similarity=cosine_similarity(image_CK, text_CK),
            boxes=batch.named.boxes,
            box_owner=batch.named.caption_row,
            image_size=self.size,
            signed=self.maker.method.signed,
            item=self._items(),
            pixels=lambda rows: batch.images[batch.caption_image[rows]],
            similarity_of=lambda rows, images: self._similarity_of(embeddings, rows, images),
            attribute=lambda rows, images: self._attribute(images, batch.tokens[rows]),
            similarity_of_images=lambda rows, kept, hidden: self._similarity_of_images(embeddings, rows, kept, hidden),
            similarity_of_texts=lambda kept: self._similarity_of_texts(embeddings, kept | ~content),
            embed_images=lambda shown: self._embed_images(embeddings, shown),
            embed_texts=lambda said: self._embed_texts(embeddings, said | ~content.unsqueeze(1)),
            coalitions=lambda *asked: self._coalitions(embeddings, *asked),
            image_coalitions=lambda *asked: self._image_coalitions(embeddings, *asked),
            text_coalitions=lambda *asked: self._text_coalitions(embeddings, *asked),
            batch_size=self.maker.batch_size,
            completeness_error=None if self.maps.attribution is None else self.maps.attribution.completeness_error,
        )
        boxes = torch.bincount(batch.named.caption_row, minlength=len(batch.tokens)).tolist()
        captions = torch.arange(len(batch.tokens))
        rows = self._rows("caption", batch.caption_image, captions, None, ({"boxes": count} for count in boxes))
        return _Group(rows, [Exclusion.MEASURED] * len(rows), targets)

    @torch.no_grad()
    def _similarity_of_images(
        self, embeddings: Embeddings, rows: slice, kept_Nhw: Tensor, hidden: ImageReference
    ) -> Tensor:
        """The similarity of some captions with the part of their images that is kept."""
        images = self.batch.images[self.batch.caption_image[rows]]
        shown = torch.lerp(reference_image(embeddings.encoder, hidden), images, kept_Nhw.to(images).unsqueeze(1))
        return self._similarity_of(embeddings, rows, shown)

    @torch.no_grad()
    def _similarity_of(self, embeddings: Embeddings, rows: slice, images: Tensor) -> Tensor:
        """The similarity of some captions with other images than theirs."""
        return cosine_similarity(embeddings.encoder.encode_image(images), embeddings.text_CK[rows])

    def _attribute(self, images: Tensor, tokens: Tensor) -> Tensor:
        """The maps of images that the batch does not hold."""
        parts = [
            self.maker.method.attribute(images[rows], tokens[rows]).image for rows in self.maker.chunks(len(images))
        ]
        return torch.cat([self._nothing(), *parts])

    def _nothing(self) -> Tensor:
        return self.batch.images.new_zeros(0, *self.grid)

    def _items(self) -> Tensor:
        """A number of each caption and its image."""
        batch = self.batch
        captions = zip(batch.caption_image.tolist(), batch.caption_index.tolist(), strict=True)
        items = [stable_hash("item", batch.keys[image], caption) for image, caption in captions]
        return torch.tensor(items, dtype=torch.int64)

    @torch.no_grad()
    def _similarity_of_texts(self, embeddings: Embeddings, kept_CL: Tensor) -> Tensor:
        """The similarity of all images with their captions, with padding in place of tokens that are not kept."""
        encoder = embeddings.encoder
        tokens = only_tokens(self.batch.tokens, kept_CL, encoder.tokenizer.padding_id)
        parts = [encoder.encode_text(tokens[rows]) for rows in self.maker.chunks(len(tokens))]
        kept_CK = torch.cat([embeddings.text_CK[:0], *parts])
        return cosine_similarity(embeddings.image_BK[self.batch.caption_image], kept_CK)

    def _of_pairs(self, part: str, embeddings: Embeddings, grid: tuple[int, ...] = ()) -> Tensor:
        """What is attributed to each token with each patch, or with all prefix tokens; NaN without interactions."""
        found = getattr(self.maps.attribution, part, None)
        if found is None:
            return embeddings.text_CK.new_full((), torch.nan).expand(*self.batch.tokens.shape, *grid)
        of: Tensor = found
        return of

    def _embed_images(self, embeddings: Embeddings, shown_CNHW: Tensor) -> Tensor:
        """Unit embeddings of what shows of each caption's image."""
        rows = zip(self.batch.caption_image.tolist(), shown_CNHW, strict=True)
        parts = [embeddings.of_parts(self.batch.images[image], shown, self.maker.chunks) for image, shown in rows]
        return torch.stack(parts) if parts else embeddings.image_BK.new_zeros(*shown_CNHW.shape[:2], 1)

    def _embed_texts(self, embeddings: Embeddings, said_CNL: Tensor) -> Tensor:
        """Unit embeddings of what stays of each caption."""
        rows = zip(self.batch.tokens, said_CNL, strict=True)
        parts = [embeddings.of_parts(tokens, said, self.maker.chunks) for tokens, said in rows]
        return torch.stack(parts) if parts else embeddings.text_CK.new_zeros(*said_CNL.shape[:2], 1)

    def _coalitions(self, embeddings: Embeddings, patches: int, tokens: int, p: float, seed: int) -> CoalitionValues:
        """What coalitions of all captions and their images are worth, and what the method says of them."""
        batch, attribution = self.batch, self.maps.attribution
        if attribution is None or not len(batch.tokens):
            nothing = embeddings.text_CK.new_zeros(0)
            return CoalitionValues(nothing[:, None], nothing[:, None], nothing, nothing)
        of_images = embeddings.image_coalitions(batch, self.grid, patches, p, seed, self.maker.chunks)
        of_texts = embeddings.text_coalitions(batch, tokens, p, seed, self.maker.chunks)
        # The empty coalition, and each part of the image with some parts of the caption in turn.
        shown = torch.arange(patches).repeat_interleave(_PAIRS_OF_EACH)
        said = torch.arange(len(shown)) % tokens
        first, other = (torch.cat([row.new_zeros(1), row + 1]).to(batch.tokens.device) for row in (shown, said))
        similarity_CN = torch.stack(
            [
                (of_images.embeddings[image, first] * of_texts.embeddings[caption, other]).sum(dim=1)
                for caption, image in enumerate(batch.caption_image.tolist())
            ]
        )
        shown_NHW = of_images.present[0, first].to(similarity_CN)
        explained_CN = attribution.of_coalitions(
            shown_NHW.expand(len(similarity_CN), -1, -1, -1), of_texts.present[:, other].to(similarity_CN)
        )
        return CoalitionValues(similarity_CN[:, 1:], explained_CN[:, 1:], similarity_CN[:, 0], explained_CN[:, 0])

    def _image_coalitions(self, embeddings: Embeddings, count: int, p: float, seed: int) -> tuple[Tensor, Tensor]:
        """Coalitions of patches, and the similarity of what shows with the whole captions."""
        rows = self.batch.caption_image
        if not len(rows):
            return rows.new_zeros(0, count, *self.grid).bool(), embeddings.text_CK.new_zeros(0, count)
        found = embeddings.image_coalitions(self.batch, self.grid, count, p, seed, self.maker.chunks)
        whole_CK = normalize(embeddings.text_CK.to(found.embeddings), dim=1)
        similarity = torch.einsum("cnk,ck->cn", found.embeddings[rows], whole_CK)
        return found.present[rows, 1:], similarity[:, 1:]

    def _text_coalitions(self, embeddings: Embeddings, count: int, p: float, seed: int) -> tuple[Tensor, Tensor]:
        """Coalitions of tokens, and the similarity of what stays with the whole images."""
        tokens = self.batch.tokens
        if not len(tokens):
            return tokens.new_zeros(0, count, tokens.shape[1]).bool(), embeddings.text_CK.new_zeros(0, count)
        found = embeddings.text_coalitions(self.batch, count, p, seed, self.maker.chunks)
        whole_CK = normalize(embeddings.image_BK.to(found.embeddings), dim=1)[self.batch.caption_image]
        return found.present[:, 1:], torch.einsum("cnk,ck->cn", found.embeddings, whole_CK)[:, 1:]

    def _collages(self) -> _Group:
        """Collages of each caption's image with three others, where so many do not show what the caption names."""
        batch = self.batch
        assert self.collages is not None, "metrics of collages need other images"
        collages = self.collages.of(batch)
        reasons = [Exclusion.NO_COLLAGE if each is None else Exclusion.MEASURED for each in collages]
        made = [each for each in collages if each is not None]
        tokens = batch.tokens[[row for row, each in enumerate(collages) if each is not None]]
        inside = [each.inside(self.grid) for each in made]
        targets = CollageTargets(
            self._attribute(torch.stack([each.image for each in made]), tokens) if made else self._nothing(),
            torch.stack(inside).to(batch.images) if made else self._nothing(),
        )
        columns = ("quarter", "others", "passed_over")
        more = ({} if each is None else {name: getattr(each, name) for name in columns} for each in collages)
        captions = torch.arange(len(batch.tokens))
        return _Group(self._rows("collage", batch.caption_image, captions, None, more), list(reasons), targets)

    def _rows(
        self, kind: Kind, images: Tensor, captions: Tensor, labels: Tensor | None, more: Iterable[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Rows of the table of targets, with `more` of each; a caption of -1 stands for none.

        `ordinal` is a number within kind and sample, the same in any batch.
        """
        batch = self.batch
        names = [""] * len(images) if labels is None else [batch.label_names[label] for label in labels.tolist()]
        indices, numbers = batch.index.tolist(), batch.caption_index.tolist()
        counts: Counter[int] = Counter()
        rows = []
        for image, caption, name, own in zip(images.tolist(), captions.tolist(), names, more, strict=True):
            index = indices[image]
            ordinal = counts[index]
            counts[index] += 1
            of_all = {
                "target": f"{kind}-{index}-{ordinal}",
                "kind": kind,
                "ordinal": ordinal,
                "index": index,
                "key": batch.keys[image],
                "caption_index": numbers[caption] if caption >= 0 else -1,
                "caption": batch.captions[caption] if caption >= 0 else "",
                "label": name,
            }
            rows.append(of_all | own)
        return rows


def places_of(caption: str, phrase: str) -> tuple[tuple[int, int], ...]:
    """Find the words of a phrase (several mentions joined by a comma) in a caption, to highlight them.

    >>> places_of("a dog and a dog", "dog, dog"), places_of("a woman and a man", "man")
    (((2, 5), (12, 15)), ((14, 17),))
    """
    places, start = [], 0
    for words in phrase.split(", "):
        whole = [first for first, _ in find_phrases(caption, [words]) if first >= start]
        # Scripts without spaces have no whole words.
        at = whole[0] if whole else caption.find(words, start)
        if at >= 0:
            places.append((at, at + len(words)))
            start = at + len(words)
    return tuple(places)


def _value_rows(group: _Group, metric: ChosenMetric) -> list[ValueRow]:
    """A row for each target and value; in place of a value that is missing, the one reason for it."""
    columns = metric.measure(group.tensors)
    found: list[ValueRow] = []
    for name, values in columns.items():
        empty = metric.spec.empty.get(name, Exclusion.NO_VALUE)
        no_mask = group.mask_reasons if metric.spec.needs_masks else [Exclusion.MEASURED] * len(values)
        measured = iter(zip(values, no_mask, strict=True))
        for row, reason in zip(group.rows, group.reasons, strict=True):
            value, why = next(measured) if reason == Exclusion.MEASURED else (math.nan, Exclusion(reason))
            if why:
                value = math.nan
            elif math.isnan(value):
                why = empty
            found.append((row["target"], name, value, why.key))
    return found
