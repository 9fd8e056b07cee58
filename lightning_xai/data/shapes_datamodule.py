"""The embedded world of shapes as a data module: it makes its own shards on first use."""

from __future__ import annotations

from pathlib import Path

from lightning_xai.data.datamodule import ShardDataModule
from lightning_xai.data.shapes import TRAIN_SAMPLES, VAL_SAMPLES, prepare_shapes

__all__ = ["ShapesDataModule"]


class ShapesDataModule(ShardDataModule):
    """`ShardDataModule` on shards of the `shapes` world, which `prepare_data()` makes where they are missing.

    Training uses `root/train`; validation and test both use `root/val`.

    Args:
        root: folder of the shards; made on first use, and used again as long as numbers and seed are the same.
        train_samples: number of training images.
        val_samples: number of validation images.
        data_seed: of the images and captions; at least 0.
        batch_size: see `ShardDataModule`, as all the following.
        eval_batch_size: images per evaluation batch and rank.
        num_workers: processes per rank that read and decode.
        shuffle_buffer: undecoded samples that each worker holds to shuffle from.
        seed: of the order of samples and the choice of captions; at least 0.
        captions_per_image: only the first so many captions of an image are used.
        swap_objects: give evaluation hard negatives made from the captions.
        max_fault_fraction: share of broken records above which a run stops.
        verify: before a run, compare every shard's SHA-256 with the manifest.
        persistent_workers: keep workers from epoch to epoch.
        pin_memory: batches in page-locked memory.

    Raises:
        ValueError: an option outside its range.
    """

    def __init__(  # noqa: PLR0913 - the signature is the configuration
        self,
        *,
        root: Path = Path("data/shapes"),
        train_samples: int = TRAIN_SAMPLES,
        val_samples: int = VAL_SAMPLES,
        data_seed: int = 0,
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
        root = Path(root)
        super().__init__(
            train=root / "train",
            val=root / "val",
            test=root / "val",
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            shuffle_buffer=shuffle_buffer,
            seed=seed,
            captions_per_image=captions_per_image,
            swap_objects=swap_objects,
            max_fault_fraction=max_fault_fraction,
            verify=verify,
            persistent_workers=persistent_workers,
            pin_memory=pin_memory,
        )
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
