"""From a batch to rows of the long table: one method's maps, their targets by kind, and what metrics measure on them.

Each item is attributed once, whatever metrics use it. Pairwise methods explain a phrase within its caption: its map is
the sum of its tokens' rows. Other methods have one map for a whole caption; for them, each phrase is explained as a
separate caption.

Shape suffixes: B images, C captions, R phrases of the batch, M targets that can be measured, N hard negatives, K
embedding width, L tokens, H x W patches, h x w pixels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lightning_xai.attribution.base import Attribution, AttributionMethod, InteractionAttribution
from lightning_xai.attribution.pairwise import Captured, HiddenStates, PairwiseMethod, References
from lightning_xai.attribution.perturbation import only_tokens
from lightning_xai.attribution.reference import ImageReference, reference_image
from lightning_xai.data.batch import Batch
from lightning_xai.data.phrase_finder import find_phrases
from lightning_xai.data.phrases import Negatives
from lightning_xai.evaluation.embeddings import Embeddings
from lightning_xai.exclusion import Exclusion
from lightning_xai.metrics.base import (
    CaptionTargets,
    CoalitionValues,
    Kind,
    NegativeTargets,
    PhrasePairTargets,
    PhraseTargets,
)
from lightning_xai.metrics.grounding import measurable, patch_mask
from lightning_xai.metrics.other_objects import directed_pairs
from lightning_xai.metrics.registry import ChosenMetric

__all__ = [
    "BOX_COLUMNS",
    "BatchMaps",
    "BatchRows",
    "MethodMaps",
    "ValueRow",
    "Wanted",
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
    """

    phrases: Tensor
    true: Tensor
    replacements: Tensor
    image: Tensor
    text: Tensor
    attribution: Attribution | None = None


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
            of = batch.caption_image
            maps = self._of_spans(batch, masks, lambda rows: states.pairs(of[captions[rows]], captions[rows]))
        if negatives is not None:
            wrong_pairs = partial(self._wrong_pairs, negatives, states, wanted.negatives)
            replacements = self._of_spans(batch, negatives.mask[wanted.negatives], wrong_pairs)
        own, true = torch.split(maps, [len(wanted.phrases), len(maps) - len(wanted.phrases)])
        return BatchMaps(own, true, replacements, image, text, attribution)

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

    def _of_spans(self, batch: Batch, masks: Tensor, states_of: Callable[[slice], HiddenStates]) -> Tensor:
        """Maps of spans, given their masks and how to get the states of some of them."""
        chunks = self.chunks(len(masks))
        maps = (self.method.span_map_of(states_of(rows), masks[rows], self._references) for rows in chunks)
        return torch.cat([self._nothing(batch)[0], *maps])

    def _wrong_pairs(self, negatives: Negatives, states: HiddenStates, wanted: Tensor, rows: slice) -> HiddenStates:
        """States of images with wrong captions of theirs."""
        tokens, images = negatives.tokens[wanted[rows]], negatives.image_row[wanted[rows]]
        return HiddenStates(states.image[images], self.method.text_states(tokens), tokens)


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
    """

    targets: list[dict[str, Any]]
    values: list[ValueRow]
    phrases: list[tuple[dict[str, Any], Tensor]]

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
            digits = [[float(f"{value:.{_HEAT_DIGITS}g}") for value in line] for line in heat.tolist()]
            records[target["index"]]["heats"][target["target"]] = digits
        return records


@dataclass(frozen=True)
class _Group:
    """All targets of one kind: their rows and reasons, and the tensors of those whose reason is MEASURED."""

    rows: list[dict[str, Any]]
    reasons: list[int]
    tensors: PhraseTargets | PhrasePairTargets | NegativeTargets | CaptionTargets


def measure_batch(
    batch: Batch,
    maps: MethodMaps,
    metrics: Sequence[ChosenMetric],
    embeddings: Embeddings | None = None,
    referee: Mapping[str, Tensor] | None = None,
) -> BatchRows:
    """Attribute and measure a batch whose forward pass has just run.

    Args:
        batch: of an evaluation.
        maps: makes the method's maps.
        metrics: what to measure.
        embeddings: of the batch; needed by metrics of captions.
        referee: `phrase_maps` of the batch by the method that others are compared with.

    Raises:
        ValueError: an attribution is not finite.
    """
    kinds = dict.fromkeys(metric.spec.kind for metric in metrics)
    measuring = _Measuring(batch, maps, kinds.keys(), embeddings, referee)
    groups = {kind: measuring.group(kind) for kind in kinds}
    values = [row for metric in metrics for row in _value_rows(groups[metric.spec.kind], metric)]
    targets = [row for group in groups.values() for row in group.rows]
    return BatchRows(targets, values, measuring.measured_phrases(groups["phrase"]) if "phrase" in groups else [])


class _Measuring:
    """One batch, its maps by one method, and the targets that they make."""

    def __init__(
        self,
        batch: Batch,
        maps: MethodMaps,
        kinds: Set[Kind],
        embeddings: Embeddings | None,
        referee: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.batch = batch
        self.maker = maps
        self.size = (batch.images.shape[2], batch.images.shape[3])
        self.grid = maps.grid
        self.embeddings = embeddings
        self.referee = referee
        self.reason_R = measurable(batch.phrases.reason, batch.phrases.boxes, maps.grid, self.size)
        self.wanted = self._wanted(kinds)
        self.maps: BatchMaps = maps.maps(batch, self.wanted)

    def group(self, kind: Kind) -> _Group:
        """All targets of a kind."""
        return {
            "phrase": self._phrases,
            "phrase_pair": self._phrase_pairs,
            "negative": self._negatives,
            "caption": self._caption_targets,
        }[kind]()

    def measured_phrases(self, group: _Group) -> list[tuple[dict[str, Any], Tensor]]:
        """Target and map of each phrase that can be measured."""
        heats = self.maps.phrases.cpu()
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
        targets = PhraseTargets(self.maps.phrases, masks, self.maker.method.signed, self._referee_of(names))
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
            prefix=self._prefix(embeddings),
            content=content,
            similarity=cosine_similarity(image_CK, text_CK),
            boxes=batch.named.boxes,
            box_owner=batch.named.caption_row,
            image_size=self.size,
            signed=self.maker.method.signed,
            similarity_of_images=lambda rows, kept, hidden: self._similarity_of_images(embeddings, rows, kept, hidden),
            similarity_of_texts=lambda kept: self._similarity_of_texts(embeddings, kept | ~content),
            embed_images=lambda shown: self._embed_images(embeddings, shown),
            embed_texts=lambda said: self._embed_texts(embeddings, said | ~content.unsqueeze(1)),
            coalitions=lambda *asked: self._coalitions(embeddings, *asked),
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
        return cosine_similarity(embeddings.encoder.encode_image(shown), embeddings.text_CK[rows])

    @torch.no_grad()
    def _similarity_of_texts(self, embeddings: Embeddings, kept_CL: Tensor) -> Tensor:
        """The similarity of all images with their captions, with padding in place of tokens that are not kept."""
        encoder = embeddings.encoder
        tokens = only_tokens(self.batch.tokens, kept_CL, encoder.tokenizer.padding_id)
        parts = [encoder.encode_text(tokens[rows]) for rows in self.maker.chunks(len(tokens))]
        kept_CK = torch.cat([embeddings.text_CK[:0], *parts])
        return cosine_similarity(embeddings.image_BK[self.batch.caption_image], kept_CK)

    def _prefix(self, embeddings: Embeddings) -> Tensor:
        """What is attributed to the prefix tokens of each caption's image; NaN where the method does not say."""
        attribution = self.maps.attribution
        if attribution is None or attribution.prefix is None:
            return embeddings.text_CK.new_full((len(self.batch.tokens),), torch.nan)
        return attribution.prefix.sum(dim=1)

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
        parts = embeddings.coalitions(batch, self.grid, (patches, tokens), p, seed, self.maker.chunks)
        # The empty coalition, and each part of the image with some parts of the caption in turn.
        shown = torch.arange(patches).repeat_interleave(_PAIRS_OF_EACH)
        said = torch.arange(len(shown)) % tokens
        first, other = (torch.cat([row.new_zeros(1), row + 1]).to(batch.tokens.device) for row in (shown, said))
        similarity_CN = torch.stack(
            [
                (parts.image_BNK[image, first] * parts.text_CNK[caption, other]).sum(dim=1)
                for caption, image in enumerate(batch.caption_image.tolist())
            ]
        )
        shown_NHW = parts.shown_NHW[first].to(similarity_CN)
        explained_CN = attribution.of_coalitions(
            shown_NHW.expand(len(similarity_CN), -1, -1, -1), parts.said_CNL[:, other].to(similarity_CN)
        )
        return CoalitionValues(similarity_CN[:, 1:], explained_CN[:, 1:], similarity_CN[:, 0], explained_CN[:, 0])

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
        measured = iter(values)
        for row, reason in zip(group.rows, group.reasons, strict=True):
            value = next(measured) if reason == Exclusion.MEASURED else math.nan
            why = empty if reason == Exclusion.MEASURED and math.isnan(value) else Exclusion(reason)
            found.append((row["target"], name, value, why.key))
    return found
