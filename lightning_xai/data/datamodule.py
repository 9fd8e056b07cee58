"""The data module that streams shards to any number of ranks and workers, and the one that makes its own."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
import torch.distributed
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

from lightning_xai.data.batch import Batch, EvaluationCollate, Record, TrainingCollate
from lightning_xai.data.dataset import (
    Dealt,
    EvaluationDataset,
    ShardLoader,
    TrainingDataset,
    TrainingLoader,
    count_batches,
    count_passed,
)
from lightning_xai.data.excluded import ExcludedByShard, FaultCounter
from lightning_xai.data.needs import BatchNeeds, find_missing
from lightning_xai.data.phrases import Transform
from lightning_xai.data.sample import stable_hash
from lightning_xai.data.shapes import TRAIN_SAMPLES, VAL_SAMPLES, prepare_shapes
from lightning_xai.data.shard_reader import read_samples
from lightning_xai.data.shard_store import LocalStore, ShardStore, open_store
from lightning_xai.data.shards import MANIFEST_NAME, Manifest, refuse_faults
from lightning_xai.data.spans import CaptionTokenizer
from lightning_xai.data.verification import find_wrong_checksums
from lightning_xai.results.record import settings_that_differ

__all__ = ["ShapesDataModule", "ShardDataModule"]

_T = TypeVar("_T")
_STAGE_SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
_ELASTIC = {"world_size", "batch_size", "num_workers"}  # of workers there are no more than batches


class Redealt(NamedTuple):
    """A training epoch that goes on with another number of ranks.

    Attributes:
        was: number of ranks and batch size before.
        now: number of ranks and batch size from now on.
        epoch: the epoch, from 0.
        given: batches that each rank had been given.
        passed: the batches that these count as now.
        batches_before: of each rank in an epoch before.
        batches: of each rank in an epoch from now on; all `passed` where nothing more comes in this epoch.
    """

    was: tuple[int, int]
    now: tuple[int, int]
    epoch: int
    given: int
    passed: int
    batches_before: int
    batches: int


@runtime_checkable
class Encoder(Protocol):
    """The part of a model that the data module needs: `LightningModule.encoder` has these two attributes."""

    image_transform: Transform
    tokenizer: CaptionTokenizer


class ShardDataModule(LightningDataModule):
    """Streams image-caption shards for contrastive training and for evaluation with phrases and boxes.

    Image transform and tokenizer are the model's: they are taken from `trainer.lightning_module.encoder`, or from
    `bind(...)` where there is no trainer. All ranks get the same number of batches; see `TrainingDataset` and
    `EvaluationDataset` for how the samples are dealt out, and `Batch` for what a batch holds.

    A record that cannot be used becomes an invalid row of its batch, is warned about once, and is counted by shard and
    kind (`fault_counts`, `gather_faults`). As soon as the broken records that one rank has met in an epoch are more
    than `max_fault_fraction` of all the records that are to be read in it, that rank raises: then the share is known to
    be too high. Whether all ranks together have met too many is decided at the epoch's end, where the callback
    `DataFaults` asks for it. One broken record alone never stops a run, unless the fraction is 0.

    A checkpoint holds what decides which samples an epoch's batches hold. Training goes on from it only where that is
    the same, so that no sample comes twice or is lost without notice; or with another number of ranks, and batch size,
    where the callback `Resume` has them dealt out again (`deal_again`).

    Args:
        train: folder of training shards, as `python -m lightning_xai prepare` makes it; or the address of one, or a
            command that fetches a shard, `pipe:aws s3 cp s3://BUCKET/FOLDER/{} -`: see
            `lightning_xai.data.shard_store.open_store`.
        val: folder (or address, or command) of validation shards; without it, training runs without validation.
        test: folder (or address, or command) of test shards.
        retries: how often a shard from elsewhere is opened again where its stream breaks off.
        batch_size: images per training batch and rank.
        eval_batch_size: images per evaluation batch and rank; by default `batch_size`.
        num_workers: processes per rank that read and decode, for each split; 0 reads in the main process. Never more
            are started than there are batches. The order of the training samples depends on it.
        shuffle_buffer: undecoded samples that each worker holds to shuffle from; 0 or 1 leaves the order of the shards.
        seed: of the order of samples and the choice of captions, together with the epoch; at least 0.
        captions_per_image: only the first so many captions of an image are used (the usual COCO protocol takes 5);
            None: all.
        swap_objects: give evaluation hard negatives made from the captions, see `lightning_xai.data.object_swaps`, in
            addition to those that the data set has. In training, objectives ask for them.
        max_fault_fraction: share of broken records, 0 to 1, above which a run stops.
        verify: before a run, compare every shard's SHA-256 with the manifest. All bytes are read once, each shard by
            one of the ranks.
        persistent_workers: keep workers from epoch to epoch, which costs their memory between epochs, too.
        pin_memory: batches in page-locked memory; by default where the trainer's device is a CUDA device.

    Attributes:
        epoch: the epoch that `train_dataloader()` iterates where there is no trainer; set it before each iteration.
        predicted: [N] bool, which samples of the split `predict_dataloader()` passes over; None: none.
        elastic: whether a checkpoint of another number of ranks is taken, because `deal_again` will be called.

    Raises:
        ValueError: an option outside its range.
    """

    def __init__(  # noqa: PLR0913 - the signature is the configuration
        self,
        *,
        train: str | Path | None = None,
        val: str | Path | None = None,
        test: str | Path | None = None,
        retries: int = 3,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int = 2,
        shuffle_buffer: int = 1000,
        seed: int = 0,
        captions_per_image: int | None = None,
        swap_objects: bool = False,
        max_fault_fraction: float = 0.01,
        verify: bool = False,
        persistent_workers: bool = False,
        pin_memory: bool | None = None,
    ) -> None:
        super().__init__()
        _at_least(0, "retries", retries)
        self.stores = {
            split: None if place is None else open_store(place, retries)
            for split, place in (("train", train), ("val", val), ("test", test))
        }
        self.batch_size = _at_least(1, "batch_size", batch_size)
        self.eval_batch_size = _at_least(
            1, "eval_batch_size", batch_size if eval_batch_size is None else eval_batch_size
        )
        self.num_workers = _at_least(0, "num_workers", num_workers)
        self.shuffle_buffer = _at_least(0, "shuffle_buffer", shuffle_buffer)
        self.seed = _at_least(0, "seed", seed)
        if captions_per_image is not None:
            _at_least(1, "captions_per_image", captions_per_image)
        if not 0 <= max_fault_fraction <= 1:
            raise ValueError(f"max_fault_fraction has to be between 0 and 1; got {max_fault_fraction}")
        self.captions_per_image = captions_per_image
        self.swap_objects = swap_objects
        self.max_fault_fraction = max_fault_fraction
        self.verify = verify
        self.persistent_workers = persistent_workers
        self.pin_memory = pin_memory
        self.epoch = 0
        self.predicted: NDArray[np.bool_] | None = None
        self._manifests: dict[str, Manifest] = {}
        self._bound: tuple[Transform, CaptionTokenizer] | None = None
        self._faults: dict[str, FaultCounter] = {}
        self._verified: set[str] = set()
        self._train_loader: TrainingLoader | None = None
        self._restored: dict[str, Any] | None = None
        self.elastic = False

    def bind(self, image_transform: Transform, tokenizer: CaptionTokenizer) -> None:
        """Set transform and tokenizer by hand, for use without a trainer; they go before the model's."""
        self._bound = (image_transform, tokenizer)

    def setup(self, stage: str | None = None) -> None:
        """Load the manifests that a stage (`"fit"`, `"validate"`, `"test"`, `"predict"`; None: all given) needs.

        Raises:
            ValueError: a folder that the stage needs is not given, or training samples do not fill one batch for each
                rank.
            FileNotFoundError: a folder holds no manifest.
            ShardError: a manifest is broken or does not fit its shards.
        """
        # Lightning warns that a dataset's length may be wrong with several workers; here it is exact with any number.
        warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")
        given = tuple(split for split, store in self.stores.items() if store is not None)
        needed = (self.predict_split,) if stage == "predict" else _STAGE_SPLITS.get(stage or "", given)
        for split in needed:
            if stage == "fit" and split == "val" and self.stores["val"] is None:
                continue
            store, manifest = self._shards(split)
            if stage == "fit" and split == "train":
                count_batches(store, manifest, self.batch_size, self._place()[1])
            if self.verify and split not in self._verified:
                self._verify(split)
                self._verified.add(split)

    def manifest(self, split: str) -> Manifest:
        """The manifest of `"train"`, `"val"` or `"test"`.

        Raises:
            ValueError: the split is not given.
            FileNotFoundError: its folder holds no manifest.
            ShardError: the manifest is broken or does not fit its shards.
        """
        if split not in self._manifests:
            store = self._store(split)
            if isinstance(store, LocalStore) and not ((folder := store.folder) / MANIFEST_NAME).is_file():
                raise FileNotFoundError(
                    f"{split}={folder}: {'no manifest.json there' if folder.is_dir() else 'no such folder'}; make the "
                    f"shards with `python -m lightning_xai prepare DATASET ... --out {folder}` or correct the argument "
                    f"{split!r}"
                )
            self._manifests[split] = Manifest.load(store)
        return self._manifests[split]

    @property
    def label_names(self) -> tuple[str, ...]:
        """The classes that `Phrases.label` counts: those of the validation shards, else of the test shards.

        While the trainer tests, those of the test shards. Each `Batch` carries its own split's names, too.
        """
        testing = self.trainer is not None and self.trainer.testing
        split = "test" if testing or self.stores["val"] is None else "val"
        return self.manifest(split).labels

    @property
    def fault_counts(self) -> dict[str, int]:
        """Broken records that this rank has met, by split; each in the latest epoch or evaluation."""
        return {split: counter.counts.total() for split, counter in self._faults.items()}

    def gather_faults(self, split: str) -> ExcludedByShard:
        """Broken records of all ranks in the latest epoch or evaluation of a split; to be called on all ranks.

        Raises:
            TooManyBrokenRecordsError: they are more than `max_fault_fraction` of the records that were read.
        """
        counter = self._faults.get(split)
        if counter is None:
            return Counter()
        parts = self._gather((counter.counts, counter.read))
        counts: ExcludedByShard = sum((part for part, _ in parts), Counter())
        counter.check_sum(counts, sum(read for _, read in parts))
        return counts

    def train_dataloader(self) -> TrainingLoader:
        """Batches with one caption per image, in another order in each epoch.

        Raises:
            ValueError: the split is not given, no model is known or it takes larger images than photos are stored as,
                or there is less than one batch for each rank.
        """
        module = None if self.trainer is None else self.trainer.lightning_module
        collate = TrainingCollate(
            *self._encoding("train"),
            self.seed,
            self.captions_per_image,
            label_names=self.manifest("train").labels,
            needs=getattr(module, "batch_needs", BatchNeeds()),
        )
        rank, world_size = self._place()
        dataset = TrainingDataset(
            *self._shards("train"),
            collate,
            batch_size=self.batch_size,
            shuffle_buffer=self.shuffle_buffer,
            rank=rank,
            world_size=world_size,
        )
        options = self._options("train", dataset)
        self._train_loader = loader = TrainingLoader(dataset, current_epoch=self._current_epoch, **options)
        self._go_on()
        return loader

    def val_dataloader(self) -> ShardLoader | list[ShardLoader]:
        """All captions and phrases of the validation split, in order; an empty list where it is not given."""
        return [] if self.stores["val"] is None else self._evaluation_loader("val")

    def test_dataloader(self) -> ShardLoader:
        """All captions and phrases of the test split, in order."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> ShardLoader:
        """As `test_dataloader`, or the validation split where no test split is given."""
        return self._evaluation_loader(self.predict_split, self.predicted)

    def drawn(self, split: str, count: int) -> Batch:
        """Some images of a split with all they have, drawn with `seed`: the same ones on every rank; all where few.

        Raises:
            ValueError: the split is not given, or no model is known.
        """
        store, manifest = self._shards(split)
        samples = manifest.samples
        draw = random.Random(stable_hash("drawn", self.seed))
        chosen = set(draw.sample(range(samples), min(count, samples)))
        records: list[Record] = []
        begin = 0
        for number, entry in enumerate(manifest.shards):
            wanted = [place for place in range(entry.samples) if begin + place in chosen]
            if wanted:
                skipped = set(range(wanted[0], wanted[-1])) - set(wanted)
                records += read_samples(store, manifest, [number], wanted[0], wanted[-1] + 1, skipped)
            begin += entry.samples
        return EvaluationCollate(*self._encoding(split), manifest.labels, self.captions_per_image)(records)

    def find_missing(self, needs: BatchNeeds) -> str:
        """Return what training batches have to hold and the training data lack; see `lightning_xai.data.needs`."""
        return find_missing(needs, *self._shards("train"), self.captions_per_image)

    def state_dict(self) -> dict[str, Any]:
        """The position in the training epoch, the faults in it so far, and all that decides what its batches hold.

        To be called on all ranks, as Lightning does for a checkpoint.

        Lightning keeps the position of the loader, too, but does not give it back where the loader was made before a
        checkpoint is restored: as it is where the learning rate's schedule asks for the number of steps.
        """
        if self._train_loader is None:
            return {}
        position = self._train_loader.state_dict()
        dealt, passed = self._train_loader.batches.dealt(position["epoch"])
        return {
            "plan": self._plan(),
            "position": position,
            "faults": self._gather(self._faults["train"].state()),
            # Of an epoch that began with another number of ranks.
            "dealt": [list(part) for part in dealt],
            "passed": passed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with training where a checkpoint leaves off; evaluation takes any checkpoint.

        Raises:
            ValueError: the batches would hold other samples than those of the run that has written it.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        was, now = _as_now(state_dict["plan"]), self._plan()
        elastic = _ELASTIC if was["world_size"] != now["world_size"] and self.elastic else set()
        changes = _differences(*({k: v for k, v in plan.items() if k not in elastic} for plan in (was, now)))
        if changes:
            checkpoint = (self.trainer and self.trainer.ckpt_path) or "CHECKPOINT"
            raise ValueError(
                "training cannot go on from this checkpoint, since its batches would hold other samples: "
                f"{'; '.join(changes)}. Restore the former values; or, to start a new run from its weights, omit "
                f"ckpt_path and give --model.init_args.model={checkpoint} --model.init_args.pretrained=null"
            )
        self._restored = {"dealt": [], "passed": 0} | state_dict | {"plan": was}
        if not elastic:
            self._go_on()

    def deal_again(self, epoch_over: bool, accumulated: Callable[[int], int]) -> Redealt | None:
        """Deal out what a checkpoint of another number of ranks leaves of its epoch, to the ranks there are now.

        To be called after `load_state_dict`, on all ranks. No sample of the epoch comes twice; what does not fill a
        batch of all ranks, or a step of accumulated batches, sits out this epoch.

        Args:
            epoch_over: whether the checkpoint was written at an epoch's end.
            accumulated: an epoch, counted from 0 -> the number of batches that make a step in it.

        Returns:
            What has changed; None where the number of ranks is the same.
        """
        if self._restored is None or (was := self._restored["plan"])["world_size"] == self._place()[1]:
            return None
        now, position, passed = self._plan(), self._restored["position"], self._restored["passed"]
        given = position["batches"]
        before, after = (plan["samples"] // plan["world_size"] // plan["batch_size"] for plan in (was, now))
        dealt = [Dealt(*part) for part in self._restored["dealt"]]
        dealt.append(
            Dealt(
                was["world_size"],
                was["batch_size"],
                was["shuffle_buffer"],
                was["num_workers"],
                batches=before - passed,
                given=given - passed,
            )
        )
        least = count_passed(now["samples"], now["batch_size"], now["world_size"], dealt)
        limit = 1.0 if self.trainer is None else self.trainer.limit_train_batches
        accumulate = accumulated(position["epoch"])
        # As Lightning counts: a float is a share.
        whole, batches = (min(limit, n) if isinstance(limit, int) else int(n * limit) for n in (before, after))
        if batches < after:  # as far in a limited epoch as before
            least = max(least, round(given * batches / whole))
        least = batches if epoch_over else min(-(-least // accumulate) * accumulate, batches)
        faults: ExcludedByShard = Counter()
        for part in self._restored["faults"]:
            for shard, reason, count in part["counts"]:
                faults[shard, reason] += count
        pooled = {
            "read": sum(part["read"] for part in self._restored["faults"]),
            "counts": [[*key, count] for key, count in sorted(faults.items())],
        }
        self._restored = {
            "position": position | {"batches": least},
            "faults": [pooled, *[{"read": 0, "counts": []}] * (now["world_size"] - 1)],
            "dealt": [] if least == batches else dealt,
            "passed": least,
        }
        self._go_on()
        return Redealt(
            (was["world_size"], was["batch_size"]),
            (now["world_size"], now["batch_size"]),
            position["epoch"],
            given,
            least,
            whole,
            batches,
        )

    def _go_on(self) -> None:
        """Take up what a checkpoint says of the epoch: strategies restore before the loader is made, or after."""
        if self._restored is None or self._train_loader is None:
            return
        position = self._restored["position"]
        if self._restored["dealt"]:
            dealt = [Dealt(*part) for part in self._restored["dealt"]]
            self._train_loader.batches.deal_rest(position["epoch"], dealt, self._restored["passed"])
        self._train_loader.load_state_dict(position)
        self._faults["train"].load_state(self._restored["faults"][self._place()[0]])
        self._restored = None

    def _evaluation_loader(self, split: str, passed: NDArray[np.bool_] | None = None) -> ShardLoader:
        labels = self.manifest(split).labels
        collate = EvaluationCollate(*self._encoding(split), labels, self.captions_per_image, self.swap_objects)
        rank, world_size = self._place()
        dataset = EvaluationDataset(
            *self._shards(split),
            collate,
            passed,
            batch_size=self.eval_batch_size,
            rank=rank,
            world_size=world_size,
        )
        return ShardLoader(dataset, **self._options(split, dataset))

    def _verify(self, split: str) -> None:
        (store, manifest), (rank, world_size) = self._shards(split), self._place()
        parts = self._gather(find_wrong_checksums(store, manifest.shards[rank::world_size]))
        refuse_faults(store, manifest, [fault for part in parts for fault in part])

    def _plan(self) -> dict[str, Any]:
        """All that decides which samples the training batches of an epoch hold."""
        (store, manifest), world_size = self._shards("train"), self._place()[1]
        batches = count_batches(store, manifest, self.batch_size, world_size)
        return {
            "samples": manifest.samples,
            "fingerprint": manifest.fingerprint,
            "seed": self.seed,
            "world_size": world_size,
            "batch_size": self.batch_size,
            "shuffle_buffer": self.shuffle_buffer,
            # One worker and none, where the main process reads, give the same order.
            "num_workers": max(1, self._workers(batches)),
            "captions_per_image": self.captions_per_image,
        }

    def _gather(self, value: _T) -> list[_T]:
        """The values of all ranks, by rank."""
        world_size = self._place()[1]
        values: list[Any] = [value] * world_size
        if world_size > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def _workers(self, batches: int) -> int:
        return min(self.num_workers, batches)

    def _options(self, split: str, dataset: TrainingDataset | EvaluationDataset) -> dict[str, Any]:
        """Options of a split's loader, its counter of faults among them; says once what there is to read."""
        manifest, world_size, workers = dataset.manifest, dataset.world_size, self._workers(len(dataset))
        if split not in self._faults:
            # The last batches of an evaluation may have padding.
            read = min(world_size * len(dataset) * dataset.batch_size, manifest.samples)
            if isinstance(dataset, EvaluationDataset) and dataset.passed is not None:
                read -= int(dataset.passed.sum())
            shards = {entry.name: entry.samples for entry in manifest.shards}
            self._faults[split] = FaultCounter(split, str(dataset.store), shards, read, self.max_fault_fraction)
            line = (
                f"{split}: {manifest.samples:,} samples in {len(shards)} shards ({dataset.store}); {len(dataset):,} "
                f"batches of {dataset.batch_size} on each of {world_size} ranks, {workers} workers each"
            )
            if manifest.photos is not None:
                line += f"; {manifest.photos}"
            if split == "train":
                line += f"; {manifest.samples - read:,} samples sit out each epoch, others each time"
            rank_zero_info(line)
        pin_memory = self.pin_memory
        if pin_memory is None:
            pin_memory = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return {
            "faults": self._faults[split],
            "num_workers": workers,
            "persistent_workers": self.persistent_workers and workers > 0,
            "pin_memory": pin_memory,
            # DataLoader seeds its workers from here; without it, each epoch would move the global generator on.
            "generator": torch.Generator().manual_seed(self.seed),
        }

    def _encoding(self, split: str) -> tuple[Transform, CaptionTokenizer]:
        """Transform and tokenizer for a split's photos.

        Raises:
            ValueError: no model is known, or it takes larger images than the photos are stored as.
        """
        transform, tokenizer = self._model_encoding()
        photos = self.manifest(split).photos
        if photos is None:
            return transform, tokenizer
        photos.check(transform, f"{split}={self._store(split)}")
        # Pixels that differ by a grey level are not what counts where photos were resized before.
        return transform.with_resizer("torch"), tokenizer

    def _model_encoding(self) -> tuple[Transform, CaptionTokenizer]:
        if self._bound is not None:
            return self._bound
        module = None if self.trainer is None else self.trainer.lightning_module
        encoder = getattr(module, "encoder", None)
        if not isinstance(encoder, Encoder):
            owner = "there is no trainer" if module is None else f"{type(module).__name__}.encoder is {type(encoder)}"
            raise ValueError(
                "ShardDataModule needs the model's image transform and tokenizer, from an attribute `encoder` of the "
                f"LightningModule that has `image_transform` and `tokenizer`, but {owner}; add it, or call "
                "bind(image_transform, tokenizer) on the data module"
            )
        return encoder.image_transform, encoder.tokenizer

    def _place(self) -> tuple[int, int]:
        """(rank, number of ranks)."""
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def _current_epoch(self) -> int:
        if self.trainer is None:
            return self.epoch
        if getattr(self.trainer, "overfit_batches", 0) > 0:
            return 0  # the same batches again and again are what is asked for
        return self.trainer.current_epoch

    @property
    def predict_split(self) -> str:
        """The split that `predict` reads: `"test"`, or `"val"` where no test split is given."""
        return "val" if self.stores["test"] is None else "test"

    def _shards(self, split: str) -> tuple[ShardStore, Manifest]:
        return self._store(split), self.manifest(split)

    def _store(self, split: str) -> ShardStore:
        store = self.stores[split]
        if store is None:
            raise ValueError(
                f"no {split} shards are given: set {split!r} to a folder that "
                "`python -m lightning_xai prepare DATASET ... --out FOLDER` has made"
            )
        return store


class ShapesDataModule(ShardDataModule):
    """`ShardDataModule` on shards of the `shapes` world, which `prepare_data()` makes where they are missing.

    Training uses `root/train`; validation and test both use `root/val`.

    Args:
        root: folder of the shards; made on first use, and used again as long as numbers and seed are the same.
        train_samples: number of training images.
        val_samples: number of validation images.
        data_seed: of the images and captions; at least 0.
        **options: of `ShardDataModule`.

    Raises:
        ValueError: an option outside its range.
    """

    def __init__(
        self,
        *,
        root: Path = Path("data/shapes"),
        train_samples: int = TRAIN_SAMPLES,
        val_samples: int = VAL_SAMPLES,
        data_seed: int = 0,
        **options: Any,
    ) -> None:
        root = Path(root)
        super().__init__(train=root / "train", val=root / "val", test=root / "val", retries=0, **options)
        self.root = root
        self.train_samples = train_samples
        self.val_samples = val_samples
        self.data_seed = data_seed
        # One process of the whole job writes: nodes of a cluster mostly share the folder.
        self.prepare_data_per_node = False

    def prepare_data(self) -> None:
        """Make the shards in `root`, unless they are there.

        Raises:
            ShardError: `root` holds shards with other settings, corrupt ones, or something else.
        """
        prepare_shapes(self.root, self.train_samples, self.val_samples, self.data_seed)


def _as_now(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan with today's names: checkpoints of versions before 0.2 call the number of ranks `world`."""
    return {("world_size" if name == "world" else name): value for name, value in plan.items()}


def _differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The differences of a plan from a former one, in words."""
    changes = settings_that_differ(was, now)
    if was.get("fingerprint") != now["fingerprint"]:
        changes.insert(0, "the shard list or the content of a shard has changed since the checkpoint was written")
    return changes


def _at_least(least: int, name: str, value: int) -> int:
    if value < least:
        raise ValueError(f"{name} has to be at least {least}; got {value}")
    return value
