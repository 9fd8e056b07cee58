"""Zero-shot classification: the share of images that are most similar to the name of their own class.

Shape suffixes: B images, C classes, T templates, K embedding width, L tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from lightning_xai.data.dataset import WholeBatchLoader
from lightning_xai.data.image_folder import ClassBatches, ClassImages, ImageFolder
from lightning_xai.evaluation.method_run import gather_to_first
from lightning_xai.loss import rank_and_world
from lightning_xai.models.at_layer import evaluating
from lightning_xai.models.dual_encoder import DualEncoder

__all__ = ["TOP", "ZeroShot", "ZeroShotResult", "class_names", "prompts", "zero_shot_classifier"]

TOP = 5
"""An image also counts as found among this many of the most similar classes, where there are more classes."""
Classes = str | Path | Mapping[str, str] | None
_TEMPLATES = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}
_LINES_EVERY = 120.0  # seconds
Progress = Callable[[str], None]
Precision = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class ZeroShotResult:
    """What a model classifies; the same on every process.

    Attributes:
        images: how many were classified.
        hits: how many of them are most similar to their own class.
        hits_top: how many have their own class among the `TOP` most similar ones; None with no more classes than that.
        skipped: how many images could not be read.
        reasons: why, a sentence for each; on the first process only.
    """

    images: int
    hits: int
    hits_top: int | None
    skipped: int
    reasons: tuple[str, ...] = ()

    @property
    def accuracy(self) -> float:
        """The share of images that are most similar to their own class, in [0, 1]; higher is better."""
        return self.hits / self.images

    @property
    def accuracy_top(self) -> float | None:
        """The share of images with their own class among the `TOP` most similar ones; None as `hits_top`."""
        return None if self.hits_top is None else self.hits_top / self.images


class ZeroShot:
    """A data set for zero-shot classification (Radford et al. 2021, section 3.1).

    Args:
        folder: a subfolder of images (JPEG, PNG, WebP) for each class, as torchvision's `ImageFolder`.
        classes: the classes' names, see `class_names`.
        templates: `"openai"` (80 templates of the CLIP paper), `"simple"` (7 of them), or texts with `{}` where the
            name goes.
        batch_size: images, and about as many prompts, that pass through a tower at a time.
        num_workers: processes of each rank that read images; 0 reads in the main process.

    Attributes:
        data: the images.
        names: the name of each class of `data`.
        templates: texts with `{}`, or functions of a name.

    Raises:
        ValueError: an option outside its range, or a data set that cannot be classified.
    """

    def __init__(
        self,
        folder: Path,
        *,
        classes: Classes = None,
        templates: str | Sequence[str] = "openai",
        batch_size: int = 64,
        num_workers: int = 2,
    ) -> None:
        if batch_size < 1 or num_workers < 0:
            raise ValueError(
                f"batch_size has to be at least 1 and num_workers at least 0; got {batch_size} and {num_workers}"
            )
        self.templates = _checked_templates(templates)
        self.data = ImageFolder.of(Path(folder))
        self.names = class_names(self.data.classes, classes)
        self.batch_size = batch_size
        self.num_workers = num_workers

    def measure(
        self,
        encoder: DualEncoder,
        precision: Precision = nullcontext,
        progress: Progress | None = None,
    ) -> ZeroShotResult:
        """Classify all images; every process has to call this, and takes its part of them.

        Modes, gradients and the global random state stay as they are.

        Args:
            encoder: the model, whole on every process.
            precision: gives the context that the towers run in, such as autocast.
            progress: called with a line every two minutes, on the first process.

        Raises:
            ValueError: no image can be read, or embeddings are not finite.
        """
        with torch.no_grad(), evaluating(encoder):
            classifier_CK = zero_shot_classifier(encoder, self.names, self.templates, self.batch_size, precision)
            counts, reasons = self._count(encoder, classifier_CK, precision, progress)
        images, broken, hits, hits_top, skipped = _sum_over_ranks(counts.to(classifier_CK.device)).tolist()
        all_reasons = tuple(reason for part in gather_to_first(reasons) for reason in part)
        if broken:
            raise ValueError(f"the model's embeddings of {broken} images of {self.data.folder} are not finite")
        if not images:
            raise ValueError(f"{self.data.folder}: none of its {skipped} images can be read; replace the files")
        return ZeroShotResult(images, hits, hits_top if len(self.names) > TOP else None, skipped, all_reasons)

    def _count(
        self, encoder: DualEncoder, classifier_CK: Tensor, precision: Precision, progress: Progress | None
    ) -> tuple[Tensor, list[str]]:
        """This process's part: images, those not finite, hits, hits among the top ones, skipped; and why skipped."""
        counts, reasons = torch.zeros(5, dtype=torch.int64), []
        for batch in _with_lines(self._loader(encoder), progress):
            reasons += batch.skipped
            counts[4] += len(batch.skipped)
            if not len(batch.images):
                continue
            with precision():
                embeddings = encoder.encode_image(batch.images.to(encoder.logit_scale))
            similarity_BC = _unit(embeddings) @ classifier_CK.T
            broken_B = ~similarity_BC.isfinite().all(dim=1)
            most_similar = similarity_BC.topk(min(TOP, len(self.names)), dim=1).indices.cpu()
            found = most_similar == batch.classes[:, None]
            sums = (broken_B.sum().item(), found[:, 0].sum().item(), found.any(dim=1).sum().item())
            counts[:4] += torch.tensor([len(found), *sums])
        return counts, reasons

    def _loader(self, encoder: DualEncoder) -> WholeBatchLoader[ClassImages]:
        rank, world_size = rank_and_world()
        batches = ClassBatches(
            self.data,
            encoder.image_transform,
            encoder.image_transform.size,
            batch_size=self.batch_size,
            rank=rank,
            world_size=world_size,
        )
        # DataLoader seeds its workers from a generator; without one, it would move the global generator on.
        workers, generator = min(self.num_workers, len(batches)), torch.Generator().manual_seed(0)
        return WholeBatchLoader(batches, num_workers=workers, generator=generator)


def class_names(folders: Sequence[str], classes: Classes = None) -> list[str]:
    """The names of classes, in the order of their folders.

    Args:
        folders: names of the folders, sorted.
        classes: None: the folders' names, with blanks for underscores; `"imagenet"`: open_clip's names of the 1000
            classes of ImageNet, whose folders are their WordNet ids; folder -> name; or a text file with a line for
            each folder: its name, a tab (or a blank), and the name of the class.

    Raises:
        ValueError: a folder has no name, or there are not 1000 folders for ImageNet.

    >>> class_names(["red_ring", "star"], {"red_ring": "red circle with a hole", "star": "star"})
    ['red circle with a hole', 'star']
    """
    if classes is None:
        return [name.replace("_", " ") for name in folders]
    if classes == "imagenet":
        names = list(open_clip.IMAGENET_CLASSNAMES)
        if len(folders) != len(names):
            raise ValueError(f"classes=imagenet is for the {len(names)} folders of ImageNet; there are {len(folders)}")
        return names
    known = classes if isinstance(classes, Mapping) else _read_names(Path(classes))
    missing = [folder for folder in folders if not known.get(folder, "").strip()]
    if missing:
        raise ValueError(
            f"classes: {len(missing)} of {len(folders)} folders have no name, such as {missing[0]!r}; give each one"
        )
    return [known[folder] for folder in folders]


def _read_names(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"classes: expected imagenet, a mapping of folders to names, or a text file of them; got {path} ({error})"
        ) from error
    pairs = [line.partition("\t") if "\t" in line else line.partition(" ") for line in lines]
    return {folder: name.strip() for folder, _, name in pairs}


def prompts(name: str, templates: Sequence[Any]) -> list[str]:
    """A class's texts: each template with its name in place of `{}`.

    >>> prompts("red ring", ["a photo of a {}.", lambda name: f"art of the {name}."])
    ['a photo of a red ring.', 'art of the red ring.']
    """
    return [template(name) if callable(template) else template.replace("{}", name) for template in templates]


def _checked_templates(templates: str | Sequence[str]) -> list[Any]:
    given = [templates] if isinstance(templates, str) else list(templates)
    if len(given) == 1 and given[0] in _TEMPLATES:
        return list(_TEMPLATES[given[0]])
    wrong = [template for template in given if "{}" not in template]
    if wrong or not given:
        raise ValueError(
            f"templates: expected {', '.join(_TEMPLATES)}, or texts with {{}} where the name of the class goes, such "
            f"as 'a photo of a {{}}'; got {wrong[0] if wrong else 'none'!r}"
        )
    return given


def zero_shot_classifier(
    encoder: DualEncoder,
    names: Sequence[str],
    templates: Sequence[Any],
    batch_size: int = 64,
    precision: Precision = nullcontext,
) -> Tensor:
    """A unit vector for each class: the mean of its prompts' unit embeddings (`open_clip.build_zero_shot_classifier`).

    Every process has to call this, and embeds a part of the classes.

    Args:
        encoder: the model.
        names: C names.
        templates: T of them, as `prompts` takes them.
        batch_size: prompts that are embedded at a time, but always all of a class.
        precision: gives the context that the text tower runs in, such as autocast.

    Returns:
        [C, K], in float32 at least; the same on every process, and, bit for bit, on any number of them.

    Raises:
        ValueError: an embedding is not finite.
    """
    (rank, world_size), together = rank_and_world(), max(1, batch_size // len(templates))
    scale = encoder.logit_scale.detach()
    dtype = torch.promote_types(scale.dtype, torch.float32)
    classifier_CK = torch.zeros(len(names), encoder.embedding_width, dtype=dtype, device=scale.device)
    # Groups of classes do not depend on the number of processes: another batch gives other last digits.
    for start in range(rank * together, len(names), world_size * together):
        group = names[start : start + together]
        tokens = encoder.tokenizer.encode([text for name in group for text in prompts(name, templates)])
        with torch.no_grad(), precision():
            embeddings = encoder.encode_text(tokens.to(scale.device))
        means_CK = _unit(embeddings).reshape(len(group), len(templates), -1).mean(dim=1)
        classifier_CK[start : start + together] = normalize(means_CK, dim=1)
    classifier_CK = _sum_over_ranks(classifier_CK)
    if not classifier_CK.isfinite().all():
        raise ValueError("the model's embeddings of class names are not finite, so that it can classify nothing")
    return classifier_CK


def _unit(embeddings: Tensor) -> Tensor:
    """Unit vectors, in float32 at least."""
    return normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=1)


def _sum_over_ranks(values: Tensor) -> Tensor:
    if rank_and_world()[1] > 1:
        dist.all_reduce(values)
    return values


def _with_lines(loader: WholeBatchLoader[ClassImages], progress: Progress | None) -> Iterator[ClassImages]:
    """The batches; every two minutes a line that says how many are done."""
    start = line = time.monotonic()
    for done, batch in enumerate(loader, start=1):
        yield batch
        now = time.monotonic()
        if progress is not None and now - line > _LINES_EVERY:
            line = now
            left = (now - start) / done * (len(loader) - done)
            progress(f"zero-shot classification: batch {done:,}/{len(loader):,}, {left / 60:.0f} minutes left")
