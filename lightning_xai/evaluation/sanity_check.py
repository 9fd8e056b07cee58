"""Sanity check of heat maps: a model's weights are randomised, from the last layer to the first.

The cascading randomisation of Adebayo et al., "Sanity Checks for Saliency Maps" (2018), as the M2IB paper applies it
(section 4.5): a method whose maps stay the same while the model is destroyed does not explain the model.

Shape suffixes: B pairs, L caption tokens, H x W the patch grid.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_xai.attribution import Attribution, AttributionMethod, ConstantMapWarning
from lightning_xai.attribution.base import check_batch
from lightning_xai.metrics.map_similarity import spearman, ssim
from lightning_xai.models.at_layer import TowerAtLayer, evaluating
from lightning_xai.models.encoder import TwoTowerEncoder

Towers = Literal["both", "image", "text"]
Modality = Literal["image", "text"]

ORIGINAL = "original"
"""The name of the stage before anything is randomised."""


@dataclass(frozen=True)
class SanityRow:
    """Similarity of a method's maps to those of the original model, after one stage of the cascade.

    Attributes:
        method: the method's name.
        modality: of the maps, image or text.
        stage: what was randomised last; every later layer is random, too.
        spearman: mean rank correlation in [-1, 1] with the original map, over the patches of an image or a caption's
            own tokens; 1 is unchanged. NaN where no pair could be compared.
        ssim: mean structural similarity, at most 1, likewise; NaN for text, which is no picture.
        pairs: number of pairs compared.
        constant: number of pairs left out, because the map before or after has the same value everywhere.
    """

    method: str
    modality: Modality
    stage: str
    spearman: float
    ssim: float
    pairs: int
    constant: int


@dataclass(frozen=True)
class SanityResult:
    """Result of `sanity_check`.

    Attributes:
        rows: for each stage, method and modality.
        stages: their names, in the order in which they were randomised; the first is `ORIGINAL`.
        maps: method -> maps of all pairs, one attribution for each of `stages`, on the CPU.
    """

    rows: list[SanityRow]
    stages: list[str]
    maps: dict[str, list[Attribution]]


@dataclass(frozen=True)
class Stage:
    """One step of a cascading randomisation.

    Attributes:
        name: what becomes random: `"head"`, `"block 11"`, `"embedding"`; with the tower where towers differ.
        randomise: replaces the weights of this stage; to be called in order, once each.
    """

    name: str
    randomise: Callable[[], None]


def sanity_check(
    methods: Mapping[str, AttributionMethod],
    images: Tensor,
    tokens: Tensor,
    *,
    towers: Towers = "both",
    seed: int = 0,
    batch_size: int = 8,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> SanityResult:
    """Compare every method's maps of a model with those of the same model, more and more of it random.

    The model is as before when this returns or raises.

    Args:
        methods: name -> method, all of one encoder.
        images: [B, 3, height, width].
        tokens: [B, L] token ids; caption i belongs to image i.
        towers: which towers are randomised; see `cascading_randomisation`.
        seed: the same seed gives the same random weights.
        batch_size: pairs explained at a time; bounds memory, changes no number.
        on_progress: called after each method and stage with the number done and the total.

    Raises:
        ValueError: shapes do not match, no method, methods of different encoders, a batch size below 1, an unsupported
            tower, or a result on random weights that is not finite.
    """
    check_batch(images, tokens)
    encoders = {id(method.encoder): method.encoder for method in methods.values()}
    if len(encoders) != 1:
        raise ValueError(f"expected methods of one encoder; got {len(methods)} methods of {len(encoders)} encoders")
    (encoder,) = encoders.values()
    if batch_size < 1:
        raise ValueError(f"batch_size has to be at least 1; got {batch_size}")
    own = encoder.tokenizer.content_mask(tokens).cpu()
    maps: dict[str, list[Attribution]] = {name: [] for name in methods}
    rows: list[SanityRow] = []
    with cascading_randomisation(encoder, towers, seed) as cascade:
        stages = [Stage(ORIGINAL, lambda: None), *cascade]
        for stage in stages:
            stage.randomise()
            for name, method in methods.items():
                batches = zip(torch.split(images, batch_size), torch.split(tokens, batch_size), strict=True)
                maps[name].append(attributions_of(method, batches))
                if stage.name != ORIGINAL:
                    rows += _compare(name, stage.name, maps[name][0], maps[name][-1], own)
                on_progress(sum(map(len, maps.values())), len(stages) * len(methods))
    return SanityResult(rows, [stage.name for stage in stages], maps)


def attributions_of(method: AttributionMethod, batches: Iterable[tuple[Tensor, Tensor]]) -> Attribution:
    """Maps of all pairs of some batches of images and tokens, on the CPU."""
    parts = []
    with warnings.catch_warnings():
        # Captions of one word, images in which a method finds nothing, and random models give constant maps as a matter
        # of course.
        warnings.simplefilter("ignore", ConstantMapWarning)
        for images, tokens in batches:
            result = method.attribute(images, tokens)
            parts.append(Attribution(result.image.cpu(), result.text.cpu(), result.similarity.cpu()))
    return Attribution.concatenate(parts)


def _compare(method: str, stage: str, before: Attribution, after: Attribution, own_BL: Tensor) -> list[SanityRow]:
    """The rows of one method and stage; of captions only their own tokens `own_BL` are compared."""
    texts = [
        spearman(one[own][None], other[own][None])
        for one, other, own in zip(before.text, after.text, own_BL, strict=True)
    ]
    picture, text = spearman(before.image, after.image), torch.cat(texts)
    structure, none = ssim(before.image, after.image), torch.full_like(text, torch.nan)
    columns: list[tuple[Modality, Tensor, Tensor]] = [("image", picture, structure), ("text", text, none)]
    return [
        SanityRow(
            method,
            modality,
            stage,
            float(ranks.nanmean()),
            float(structure.nanmean()),
            pairs=int(ranks.isfinite().sum()),
            constant=int(ranks.isnan().sum()),
        )
        for modality, ranks, structure in columns
    ]


@contextmanager
def cascading_randomisation(encoder: TwoTowerEncoder, towers: Towers = "both", seed: int = 0) -> Iterator[list[Stage]]:
    """Inside, a model's weights can be replaced by random ones, stage by stage, from the last layer to the first.

    The stages of a tower are its head (all after the last block), its blocks from the last to the first, and its
    embedding (all before the first block). Both towers go in step, so that a shorter one is done earlier. Modules that
    know how to initialise themselves do so; other parameters are drawn from a normal distribution with their own mean
    and standard deviation. Parameters that no embedding depends on, such as the logit scale, stay as they are.

    On leaving, also after an exception, all weights and buffers are again what they were, bit for bit. Global random
    numbers, gradient flags and training modes are as before at any time.

    Args:
        encoder: the model.
        towers: which of its towers to randomise.
        seed: the same seed gives the same random weights.

    Yields:
        The stages, in order; nothing is random before their `randomise` is called.

    Raises:
        ValueError: an unknown tower, or an unsupported one.
    """
    if towers not in ("both", "image", "text"):
        raise ValueError(f"towers is 'both', 'image' or 'text'; got {towers!r}")
    chosen = ("image", "text") if towers == "both" else (towers,)
    parts = _in_step({tower: _parts(encoder, tower) for tower in chosen})
    tensors = [*encoder.parameters(), *encoder.buffers()]
    originals = [tensor.detach().clone() for tensor in tensors]
    try:
        yield [
            Stage(name, partial(_randomise, encoder, parameters, seed + number))
            for number, (name, parameters) in enumerate(parts)
        ]
    finally:
        with torch.no_grad():
            for tensor, original in zip(tensors, originals, strict=True):
                tensor.copy_(original)


_Part = tuple[str, list[nn.Parameter]]


def _in_step(towers: Mapping[str, Sequence[_Part]]) -> list[_Part]:
    """Parts of several towers, joined one by one."""
    joined = []
    for parts in zip_longest(*towers.values()):
        present = {tower: part for tower, part in zip(towers, parts, strict=True) if part is not None}
        names = {name for name, _ in present.values()}
        alike = len(names) == 1 and len(present) == len(towers)
        name = names.pop() if alike else ", ".join(f"{tower} {name}" for tower, (name, _) in present.items())
        joined.append((name, [parameter for _, parameters in present.values() for parameter in parameters]))
    return joined


def _parts(encoder: TwoTowerEncoder, tower: str) -> list[_Part]:
    """Head, blocks and embedding of a tower: found by what depends on what, whatever it calls them."""
    towers = _at_every_layer(encoder.image_at_layer if tower == "image" else encoder.text_at_layer)
    weight = next(encoder.parameters())
    with _every_weight_tracked(encoder):
        if tower == "image":
            inputs = weight.new_zeros(1, *encoder.image_shape)
            of_embedding = _dependencies(encoder.encode_image(inputs), encoder)
        else:
            inputs = encoder.tokenizer.padding_caption()[None].to(weight.device)
            of_embedding = _dependencies(encoder.encode_text(inputs), encoder)
        before_blocks = _dependencies(towers[-1].features_before(inputs), encoder)
    blocks = [(f"block {at.layer}", list(at.block.parameters())) for at in towers if at.block is not None]
    in_blocks = {parameter for _, parameters in blocks for parameter in parameters}
    head = [p for p in encoder.parameters() if p in of_embedding - before_blocks - in_blocks]
    embedding = [p for p in encoder.parameters() if p in before_blocks - in_blocks]
    return [part for part in [("head", head), *blocks, ("embedding", embedding)] if part[1]]


def _at_every_layer(at_layer: Callable[[int], TowerAtLayer]) -> list[TowerAtLayer]:
    """A tower at each of its blocks, from the last to the first."""
    towers = [at_layer(-1)]
    while towers[-1].layer > 0:
        try:
            towers.append(at_layer(towers[-1].layer - 1))
        except ValueError:  # noqa: PERF203 - the loop ends here
            # ResNets count from 1. What stands before an unsupported block counts as embedding.
            break
    return towers


@contextmanager
def _every_weight_tracked(encoder: TwoTowerEncoder) -> Iterator[None]:
    """Inside, the graph shows every parameter that a result depends on, frozen ones included."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(evaluating(encoder))
        for parameter in encoder.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(True)
        yield


def _dependencies(result: Tensor, encoder: TwoTowerEncoder) -> set[nn.Parameter]:
    parameters = list(encoder.parameters())
    gradients = torch.autograd.grad(result.sum(), parameters, allow_unused=True)
    return {p for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


@torch.no_grad()
def _randomise(encoder: TwoTowerEncoder, parameters: Sequence[nn.Parameter], seed: int) -> None:
    chosen, device = set(parameters), parameters[0].device
    # Modules that initialise themselves draw from the global generators.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        for module in encoder.modules():
            own = [parameter for parameter in module.parameters(recurse=False) if parameter in chosen]
            if own:
                _initialise(module, own)


def _initialise(module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    reset = getattr(module, "reset_parameters", None)
    # A module with parts might reset these as well, in a stage that is not theirs.
    if callable(reset) and next(module.children(), None) is None:
        reset()
        return
    for parameter in parameters:
        # Constant parameters, such as a fresh layer scale, have no spread and stay.
        parameter.normal_(float(parameter.mean()), float(parameter.std(correction=0)))
