"""Contrastive fine-tuning of a dual encoder, with the recipe of the feature-pair paper as defaults."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import Any, get_args

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import Self

from lightning_xai.data.batch import Batch
from lightning_xai.data.datamodule import ShardDataModule
from lightning_xai.data.needs import BatchNeeds
from lightning_xai.metrics.retrieval import RetrievalMetric
from lightning_xai.models.at_layer import batch_statistics
from lightning_xai.models.dual_encoder import CHECKPOINT_KEY, DualEncoder
from lightning_xai.models.loading import load_dual_encoder
from lightning_xai.models.low_rank import adapter_shapes
from lightning_xai.models.sharding import (
    gather_parameters,
    is_sharded,
    mend_optimizer_state,
    release_parameters,
    shard_encoder,
)
from lightning_xai.training.learning_rate import Schedule, learning_rate_factor
from lightning_xai.training.lora import Lora, add_adapters
from lightning_xai.training.objectives import Objective, Softmax, Step
from lightning_xai.training.parameter_groups import (
    Frozen,
    Place,
    freeze,
    freeze_embeddings,
    parameter_groups,
    parameter_places,
    trained_towers,
)
from lightning_xai.training.run_loggers import log_measured
from lightning_xai.training.schedule import planned_steps

__all__ = ["ContrastiveFineTuning", "ContrastiveModule"]

_PHRASELESS = 10  # batches without a phrase before an objective that needs some is warned of
_EPOCH_BATCHES = "lightning_xai_epoch_batches"  # key of checkpoints


class ContrastiveModule(L.LightningModule):
    """Train a dual encoder by objectives over the global batch, by default the symmetric contrastive loss.

    The one signature of training options: subclasses decide which model is trained, and pass the options on.

    Logs `train/loss`, every objective's term as `train/NAME` where it is not the loss itself, what else it has, such as
    `train/accuracy`, `train/learning_rate` and `train/logit_scale` as the step was taken with them,
    and `train/samples_per_second`, all ranks together, from the start of the previous step to that of this one,
    loading included; the first step of an epoch and the one after a validation have none. In validation: `val/loss`,
    `val/accuracy` and recall at k in both directions. Validation counts all captions of an image as its positives; its
    loss is over fixed groups of images, so that it does not depend on the number of processes.

    Args:
        encoder: the model to train.
        objectives: terms of the loss, each of which counts `weight` times; see `lightning_xai.training.objectives`.
            Null: `Softmax` alone.
        initial_lr: learning rate of the first step, or of the first one after warm-up.
        final_lr: learning rate of the last step; null: as initial_lr.
        schedule: way from initial_lr to final_lr: exponential (by the same factor at every step), cosine, or constant,
            which stays at initial_lr.
        warmup_steps: first steps, in which the rate rises linearly to initial_lr.
        image_lr_factor: factor on the learning rates of the image tower.
        text_lr_factor: likewise of the text tower.
        layer_decay: factor on the learning rate from each block to the one before it, in (0, 1]: parameters after a
            tower's blocks learn with the full rate, those before n blocks with layer_decay to the power of n + 1.
        freeze_image: number of the image tower's first blocks that are not trained, with all that is before them, or
            `all` for the whole tower. Frozen batch statistics stay as they are.
        freeze_text: likewise of the text tower.
        freeze_text_embeddings: whether the text tower's token embeddings are not trained, nor all else before its first
            block, such as positions: no gradient, and no averages of the optimizer, for a large vocabulary.
        lora: low-rank adapters that are trained in place of the towers' weights; see `Lora`. The first blocks that
            freeze_image and freeze_text leave out get none. Checkpoints hold weights and adapters; a model that is
            loaded from one has them merged, as `export` does.
        weight_decay: AdamW's weight decay, on all parameters as in the paper.
        decay_norms_and_biases: false: no weight decay of parameters of a single dimension (norms, biases, class tokens,
            the logit scale).
        betas: AdamW's running averages.
        fused: run AdamW's update in one kernel, the same up to rounding; on the CPU several times as fast. Mixed
            precision cannot clip gradients with it.
        max_logit_scale: the learned factor on similarities is kept between 1 and this.
        recall_at: k of the validation's recall.
        val_group_size: images that are each other's negatives in the validation loss.
        gradient_checkpointing: keep only the inputs of the towers' blocks for the backward pass, and run each block
            again there: less memory for a third more computing, the same numbers.
        chunk_size: pairs that are embedded at a time in training, where a batch's activations do not fit in memory
            (GradCache). All pairs of the batch, over all ranks, stay each other's negatives; the gradient is the same,
            for a third more computing. Null embeds the whole batch at once. Where both are given, memory is that of a
            chunk with gradient checkpointing, and computing two thirds more.
        compile: run the towers of the training step through torch.compile; validation and attribution run them as
            they are. Checkpoints are the same with and without.

    Raises:
        ValueError: learning rates that are not positive, a bound or a chunk size below 1, options that contradict each
            other, or a model that an option does not suit: one with batch statistics cannot be run in chunks or again,
            a tower that is no list of blocks has no rates by depth.
    """

    def __init__(  # noqa: PLR0913 - the signature is the configuration
        self,
        encoder: DualEncoder,
        *,
        objectives: Sequence[Objective] | None = None,
        initial_lr: float = 1e-7,
        final_lr: float | None = 1e-5,
        schedule: Schedule = "exponential",
        warmup_steps: int = 0,
        image_lr_factor: float = 1.0,
        text_lr_factor: float = 1.0,
        layer_decay: float = 1.0,
        freeze_image: Frozen = 0,
        freeze_text: Frozen = 0,
        freeze_text_embeddings: bool = False,
        lora: Lora | None = None,
        weight_decay: float = 1e-4,
        decay_norms_and_biases: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        fused: bool = False,
        max_logit_scale: float = 100.0,
        recall_at: Sequence[int] = (1, 5, 10),
        val_group_size: int = 64,
        gradient_checkpointing: bool = False,
        chunk_size: int | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        # Lightning warns of every module that has this hook, although data modules rarely have their own.
        warnings.filterwarnings("ignore", message="You have overridden `transfer_batch_to_device` in `LightningModule`")
        final_lr = initial_lr if final_lr is None else final_lr
        _check_rates(initial_lr, final_lr, schedule, warmup_steps)
        _check_factors(image_lr_factor, text_lr_factor, layer_decay)
        _check_bounds(max_logit_scale, chunk_size)
        if gradient_checkpointing or chunk_size is not None:
            _refuse_batch_statistics(encoder)
        frozen = {"image": freeze_image, "text": freeze_text}
        self.objectives = _prepared(objectives, encoder, compiled=compile)
        self.encoder = encoder
        self.initial_lr = initial_lr
        self.final_lr = final_lr
        self.schedule: Schedule = schedule
        self.warmup_steps = warmup_steps
        self.tower_factors = {"image": image_lr_factor, "text": text_lr_factor}
        self.layer_decay = layer_decay
        self.weight_decay = weight_decay
        self.decay_norms_and_biases = decay_norms_and_biases
        self.betas, self.fused = betas, fused
        self.max_logit_scale = max_logit_scale
        self.retrieval = RetrievalMetric(ks=recall_at, group_size=val_group_size)
        self._batch_started = 0.0
        self._last_step: float | None = None
        self._steps = 0.0  # of the whole run
        self._epoch_batches = self._restored_batches = 0.0  # of an epoch, when the run was started
        self._phraseless = 0  # batches so far, none of which had a phrase
        self.chunk_size, self._compiled = chunk_size, compile
        self._places = _choose_parameters(
            encoder,
            frozen=frozen,
            text_embeddings_frozen=freeze_text_embeddings,
            lora=lora,
            rates_differ=(image_lr_factor, text_lr_factor, layer_decay) != (1, 1, 1),
        )
        self._check_towers()
        self._keep_frozen_statistics()
        if gradient_checkpointing:
            encoder.checkpoint_blocks()
        if compile:
            encoder.compile_towers()

    @property
    def batch_needs(self) -> BatchNeeds:
        """What training batches have to hold in addition to images and captions; data modules ask."""
        return reduce(or_, (objective.needs for objective in self.objectives))

    def setup(self, stage: str) -> None:
        """Refuse to train on data that lack what an objective needs, and log no number that was not measured.

        Raises:
            ValueError: none of the data's first samples has it, or an objective has no tower to train.
        """
        log_measured(self.trainer.loggers)
        if stage == "fit":
            self._check_towers()  # once more: parameters may have been frozen by hand
        data = getattr(self.trainer, "datamodule", None)
        if stage != "fit" or not isinstance(data, ShardDataModule):
            return
        for objective in self.objectives:
            missing = data.find_missing(objective.needs)
            if missing:
                raise ValueError(f"the objective {objective.name} needs {missing}")

    def _check_towers(self) -> None:
        # A single number, such as a bias that the loss does not depend on, is no tower.
        frozen = any(not each.requires_grad for each in self.encoder.parameters() if each.numel() > 1)
        if frozen and not is_sharded(self.encoder):
            trained = trained_towers(self.encoder)
            for objective in self.objectives:
                objective.check_towers(trained)

    def configure_model(self) -> None:
        """Under `ModelParallelStrategy`, spread the encoder over all processes.

        Raises:
            ValueError: a strategy that also splits single layers, or that the options do not go with.
        """
        mesh = self.device_mesh
        if mesh is None or is_sharded(self.encoder):
            return
        if mesh["tensor_parallel"].size() > 1:
            raise ValueError(
                "this model is sharded over whole processes, not within a layer: give ModelParallelStrategy "
                f"tensor_parallel_size: 1 and data_parallel_size: {mesh.size()}; got tensor_parallel_size "
                f"{mesh['tensor_parallel'].size()}"
            )
        for objective in self.objectives:
            objective.check_sharding()
        if adapter_shapes(self.encoder.state_dict()):
            raise ValueError("lora does not go with ModelParallelStrategy: set lora to null, or take ddp")
        if self._compiled:
            raise ValueError("compile does not go with ModelParallelStrategy: set compile to false, or take ddp")
        loops = (self.trainer.validate_loop, self.trainer.test_loop, self.trainer.fit_loop.epoch_loop.val_loop)
        if any(loop.inference_mode for loop in loops):
            raise ValueError(
                "parameters that are gathered in inference mode cannot be trained: set inference_mode=False"
            )
        shard_encoder(self.encoder, mesh["data_parallel"])

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Cut a training batch's texts after the longest one.

        Done on the host: finding the longest text on the device would make the host wait for it.
        """
        if isinstance(batch, Batch) and self.trainer.training:
            parts = {"negatives": batch.negatives, "phrases": batch.phrases}
            more: dict[str, Any] = {
                name: part for name, part in parts.items() if part is not None and part.tokens is not None
            }
            texts = torch.cat([batch.tokens, *(part.tokens for part in more.values())])
            length = self.encoder.trim_tokens(texts).shape[1]
            cut: dict[str, Any] = {
                name: replace(part, tokens=part.tokens[:, :length].contiguous()) for name, part in more.items()
            }
            batch = replace(batch, tokens=batch.tokens[:, :length].contiguous(), **cut)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Unit-length embeddings of a batch's images [B, K] and captions [C, K]."""
        return (
            normalize(self.encoder.encode_image(batch.images), dim=1),
            normalize(self.encoder.encode_text(batch.tokens), dim=1),
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, and a learning rate that goes by the schedule from the first step to the last.

        Raises:
            ValueError: the number of steps is not known, or is not above that of warm-up.
        """
        groups = parameter_groups(
            self.encoder,
            self._places,
            rate=self.initial_lr,
            weight_decay=self.weight_decay,
            tower_factors=self.tower_factors,
            layer_decay=self.layer_decay,
            decay_norms_and_biases=self.decay_norms_and_biases,
        )
        optimizer = torch.optim.AdamW(groups, lr=self.initial_lr, betas=self.betas, fused=self.fused or None)
        steps = planned_steps(self.trainer)
        if not math.isfinite(steps) and self.schedule != "constant":
            raise ValueError(
                "the learning rate changes over the whole run, so give the trainer max_epochs or max_steps"
            )
        # A checkpoint is read before, or after.
        self._steps, self._epoch_batches = steps, self._restored_batches or float(self.trainer.num_training_batches)
        self._restored_batches = 0.0
        if self.trainer.ckpt_path is None:  # else known once the checkpoint has been read
            self._check_warmup()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _rate_factor(self, step: int) -> float:
        return learning_rate_factor(
            step, self._steps, self.schedule, self._warmup_now(), self.final_lr / self.initial_lr
        )

    def _warmup_now(self) -> int:
        """The steps of warm-up, of the size that steps have on the processes there are now."""
        batches = float(self.trainer.num_training_batches)
        if self.trainer.max_steps != -1 or batches == self._epoch_batches or not math.isfinite(batches):
            return self.warmup_steps
        return round(self.warmup_steps * batches / self._epoch_batches)

    def _check_warmup(self) -> None:
        if self._steps <= self._warmup_now():
            raise ValueError(f"warmup_steps has to be below the run's {self._steps} steps; got {self.warmup_steps}")

    def train(self, mode: bool = True) -> Self:
        """As of every module, but frozen batch statistics stay as they are."""
        super().train(mode)
        self._keep_frozen_statistics()
        return self

    def _keep_frozen_statistics(self) -> None:
        for module in self.encoder.modules():
            weights = list(module.parameters(recurse=False))
            if isinstance(module, _BatchNorm) and weights and not any(each.requires_grad for each in weights):
                module.eval()

    def on_train_start(self) -> None:
        """Make the optimizer fit to go on, where it comes from a checkpoint.

        Raises:
            ValueError: warm-up is as long as the run.
        """
        if self._steps:  # it has the built-in schedule
            self._check_warmup()
        mend_optimizer_state(self.encoder, self.trainer.optimizers[0])

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Measure the time since the previous step began, loading this batch included."""
        now = time.perf_counter()
        self._last_step = now - self._batch_started if self._batch_started else None
        self._batch_started = now

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The contrastive loss of the global batch, the same on every rank.

        Raises:
            ValueError: the global batch is one pair, which has no negatives.
        """
        if len(batch.images) * self.trainer.world_size == 1:
            raise ValueError(
                "a batch of one pair has no negatives, so that loss and gradient are zero: raise --data.batch_size "
                "(with chunk_size, pairs that do not fit into memory at once still are one batch)"
            )
        self._note_phrases(batch)
        step = self._embed(batch)
        # For the message about a loss that is not finite.
        finite = step.image.detach().isfinite() & step.text.detach().isfinite()
        self.suspects = batch.valid & ~finite.all(dim=1)
        terms = {objective.name: objective(step) for objective in self.objectives}
        weighted = [objective.weight * terms[objective.name].loss for objective in self.objectives]
        loss = torch.stack(weighted).sum()
        self.log("train/loss", loss, prog_bar=True)
        # Of a number that several have, such as the accuracy, the first one's.
        numbers = {name: value for term in reversed(terms.values()) for name, value in term.logged.items()}
        if len(terms) > 1 or self.objectives[0].weight != 1:  # else it is the loss itself
            numbers |= {name: term.loss.detach() for name, term in terms.items()}
        for name, value in numbers.items():
            self.log(f"train/{name}", value, prog_bar=name == "accuracy")
        self.log("train/logit_scale", step.scale.detach())
        # Logged here, not in on_train_batch_end: callbacks write checkpoints, with all that is logged by then, before
        # the module's turn comes, and the scheduler has already moved on to the next step's rate.
        self.log("train/learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        if self._last_step is not None:
            self.log("train/samples_per_second", len(batch.images) * self.trainer.world_size / self._last_step)
        return loss

    def _note_phrases(self, batch: Batch | None) -> None:
        """Warn once where an objective needs phrases and a loader of the user's own gives none; None: an epoch ends."""
        asking = [objective.name for objective in self.objectives if objective.needs.phrases]
        if not asking or self._phraseless < 0:
            return
        if batch is not None and len(batch.phrases):
            self._phraseless = -1
            return
        self._phraseless += batch is not None
        if self._phraseless == _PHRASELESS or (batch is None and self._phraseless):
            rank_zero_warn(
                f"none of the first {self._phraseless} training batches has a phrase, so that the objective "
                f"{' and '.join(asking)} trains nothing: take ShardDataModule, or make batches by "
                "TrainingCollate(..., needs=task.batch_needs) of data with phrases and boxes"
            )
            self._phraseless = -1

    def _embed(self, batch: Batch) -> Step:
        """One pass of both towers through all that the objectives need."""
        extra = {each.name: tokens for each in self.objectives if (tokens := each.extra_tokens(batch)) is not None}
        texts = torch.cat([batch.tokens, *extra.values()]) if extra else batch.tokens
        with ExitStack() as passes:
            for objective in self.objectives:
                passes.enter_context(objective.listening())
            embeddings = self.encoder(batch.images, texts, self.chunk_size)
        # In float32, as the loss: half precision has no number as small as the bound that keeps zeros from being NaN.
        image, texts = (normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1) for x in embeddings)
        text, *others = torch.split(texts, [len(batch.tokens), *map(len, extra.values())])
        named = dict(zip(extra, others, strict=True))
        return Step(self.encoder, batch, image, text, self.encoder.logit_scale.exp(), named)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step and clamp the logit scale, so that the model is never seen with a scale out of bounds."""
        super().optimizer_step(*args, **kwargs)
        self.encoder.clamp_logit_scale(self.max_logit_scale)

    def on_train_epoch_end(self) -> None:
        """Stop the clock: validation does not count as training time."""
        self._batch_started = 0.0
        self._note_phrases(None)

    def on_validation_start(self) -> None:
        """Stop the clock where validation interrupts an epoch, and evaluate the same model on all ranks."""
        self._batch_started = 0.0
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # In training each rank collects batch statistics of its own batches; here all take the first one's.
            for buffer in self.encoder.buffers():
                dist.broadcast(buffer, src=0)
        gather_parameters(self.encoder)

    on_test_start = on_validation_start

    def on_predict_start(self) -> None:
        """Gather parameters that are spread over ranks."""
        gather_parameters(self.encoder)

    def on_validation_end(self) -> None:
        """Release the gathered parameters."""
        release_parameters(self.encoder)

    on_test_end = on_predict_end = on_validation_end

    def validation_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        """Embed images and all their captions; the numbers are computed at the end of the epoch.

        Returns:
            The unit-length embeddings `image` [B, K] and `text` [C, K], for callbacks.
        """
        image, text = self(batch)
        self.retrieval.update(
            image, text, batch.index, batch.caption_image, batch.caption_index, self.encoder.logit_scale.exp()
        )
        return {"image": image, "text": text}

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log `val/...`, or `test/...`."""
        split = "test" if self.trainer.testing else "val"
        results = self.retrieval.compute()
        self.retrieval.reset()
        results[f"{split}/loss"] = results.pop("contrastive_loss")
        results[f"{split}/accuracy"] = results.pop("accuracy")
        for name, value in results.items():
            # Reduced over the ranks by the metric: every rank holds the same number.
            self.log(name if "/" in name else f"{split}/{name}", value, prog_bar=name == f"{split}/loss")

    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Unit-length embeddings: `image` [B, K] by `keys`, and `text` [C, K] by `captions` and `caption_image`.

        A batch of padding alone, as where `predict` goes on after a stop, is not computed (K = 0).
        """
        padding = not bool(batch.valid.any())
        image, text = (batch.images.new_zeros(len(batch.images), 0),) * 2 if padding else self(batch)
        return {
            "keys": batch.keys,
            "valid": batch.valid,
            "image": image,
            "captions": batch.captions,
            "caption_image": batch.caption_image,
            "text": text,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep architecture and activation with the weights, so that they can never be loaded into another function."""
        checkpoint[CHECKPOINT_KEY] = self.encoder.architecture
        if self._epoch_batches:
            # Options count steps as the run was started; on other processes they are of another size.
            checkpoint[_EPOCH_BATCHES] = self._epoch_batches

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another architecture or adapters; count steps as in the run that is resumed."""
        self._restored_batches = float(checkpoint.get(_EPOCH_BATCHES, 0.0))
        self._epoch_batches = self._restored_batches or self._epoch_batches
        found = checkpoint.get(CHECKPOINT_KEY)
        own = self.encoder.architecture
        differs = next((part for part in ("model_cfg", "preprocess_cfg") if found and found[part] != own[part]), None)
        if found is None or differs is not None:
            name = "no model of this project" if found is None else f"a {found['name']} of another configuration"
            raise ValueError(
                f"the checkpoint holds {name}, this run trains a {self.encoder.architecture['name']}: "
                f"{_difference(found, own, differs)}set model to what the checkpoint was made with"
            )
        # ModelParallelStrategy, which adapters do not go with, has loaded the weights itself and passes none on.
        weights = checkpoint.get("state_dict")
        if weights is not None and adapter_shapes(weights) != adapter_shapes(self.state_dict()):
            raise ValueError(
                "the checkpoint's low-rank adapters are not those of this run: give lora as the checkpoint was made "
                "with, or begin with its merged weights as the model (model: FILE.ckpt, pretrained: null)"
            )


def _difference(found: Mapping[str, Any] | None, own: Mapping[str, Any], part: str | None) -> str:
    """The pixels that a checkpoint's model sees, where this one's sees others, and how to give them."""
    if found is None or part != "preprocess_cfg":
        return ""
    old, new = found[part], own[part]
    differing = [
        f"{key} was {old.get(key)} and is {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)
    ]
    return (
        f"it sees other pixels ({', '.join(differing)}); give the former ones as image_mean, image_std, interpolation, "
        "resize_mode (or fit) or image_size of the model, or "
    )


def _prepared(objectives: Sequence[Objective] | None, encoder: DualEncoder, *, compiled: bool) -> tuple[Objective, ...]:
    """The objectives, and the encoder made ready for them."""
    chosen = (Softmax(),) if objectives is None else tuple(objectives)
    for objective in chosen:
        if not isinstance(objective, Objective):
            raise ValueError(
                f"objectives are objects, such as [Softmax(), Grounding()] of lightning_xai.training.objectives; got "
                f"{objective!r}"
            )
    names = [objective.name for objective in chosen]
    if not chosen or len(set(names)) < len(names):
        raise ValueError(
            f"objectives has to name at least one objective, and each once; got {', '.join(names) or '[]'} (a second "
            "Grounding takes another name, such as Grounding(name='grounding_inputs', image_layer=0, text_layer=0))"
        )
    if compiled and any(objective.listens for objective in chosen):
        raise ValueError(f"compile passes over the hooks of {', '.join(names)}: set compile to false")
    for objective in chosen:
        objective.prepare(encoder)
    if not any(objective.trains_logit_bias for objective in chosen):
        for name, parameter in encoder.named_parameters():
            # SigLIP's bias cancels out in the softmax: without gradient, DDP would wait for it at the second step.
            if name.rpartition(".")[2] == "logit_bias":
                parameter.requires_grad_(False)
    return chosen


def _choose_parameters(
    encoder: DualEncoder,
    *,
    frozen: Mapping[str, Frozen],
    text_embeddings_frozen: bool,
    lora: Lora | None,
    rates_differ: bool,
) -> dict[str, Place]:
    """Let the parameters that are not trained need no gradient, and find the places of all where options need them."""
    if not (rates_differ or any(frozen.values()) or text_embeddings_frozen or lora):
        return {}
    # Found now, since the parts of a sharded encoder cannot run on their own.
    places = parameter_places(encoder)
    freeze(encoder, places, frozen)
    if text_embeddings_frozen:
        freeze_embeddings(encoder, places)
    return places if lora is None else add_adapters(encoder, lora, places)


def _check_rates(initial_lr: float, final_lr: float, schedule: Schedule, warmup_steps: int) -> None:
    if not (initial_lr > 0 and (final_lr > 0 or (final_lr == 0 and schedule == "cosine"))):
        raise ValueError(
            f"initial_lr and final_lr have to be positive; got {initial_lr} and {final_lr} (a cosine may end at 0)"
        )
    if schedule not in get_args(Schedule):
        raise ValueError(f"schedule is one of {', '.join(get_args(Schedule))}; got {schedule}")
    if schedule == "constant" and final_lr != initial_lr:
        raise ValueError(
            f"a constant schedule stays at initial_lr ({initial_lr}), so that final_lr ({final_lr}) would do nothing: "
            "set final_lr to null"
        )
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps has to be at least 0; got {warmup_steps}")


def _check_factors(image: float, text: float, layer_decay: float) -> None:
    if not (image > 0 and text > 0):
        raise ValueError(
            f"image_lr_factor and text_lr_factor have to be positive; got {image} and {text} (freeze_image: all, or "
            "freeze_text: all, freezes a tower)"
        )
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay has to be in (0, 1]; got {layer_decay}")


def _check_bounds(max_logit_scale: float, chunk_size: int | None) -> None:
    if max_logit_scale < 1:
        raise ValueError(f"max_logit_scale has to be at least 1; got {max_logit_scale}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size has to be at least 1, or null for no chunks; got {chunk_size}")


def _refuse_batch_statistics(encoder: DualEncoder) -> None:
    found = batch_statistics(encoder.model)
    if found is not None:
        raise ValueError(
            f"{encoder.name} has batch statistics ({found}), which differ between a chunk and the whole batch, and "
            "would be counted twice where layers are run again: set chunk_size to null and gradient_checkpointing to "
            "false, or take a model without BatchNorm, such as a ViT"
        )


class ContrastiveFineTuning(ContrastiveModule):
    """Load a dual encoder and fine-tune it, with the recipe of the feature-pair paper as defaults.

    Args:
        model: an open_clip name, the path of a JSON model config, a checkpoint of this project (`.ckpt`), an open_clip
            folder, `hf-hub:OWNER/NAME`, or `hf:FOLDER`, a folder of Hugging Face's transformers.
        pretrained: an open_clip tag, a checkpoint file, or null for random weights.
        image_size: (height, width) of images in pixels, or one number for both; null: that of the model.
        image_mean: mean of each channel, of pixel values in [0, 1]; null: that of the weights.
        image_std: standard deviation of each channel, likewise.
        interpolation: of resizing images, likewise: bicubic, bilinear or random.
        resize_mode: likewise: shortest (crop what sticks out), longest (pad), letterbox (pad with the mean colour) or
            squash (give the aspect ratio up).
        fit: likewise, in plain words: crop (shortest) or letterbox.
        quick_gelu: whether the transformers compute with OpenAI's QuickGELU; null: as the weights were trained.
        options: see `ContrastiveModule`, which also lists what is logged.

    Raises:
        ValueError: unknown model or weights, or as `ContrastiveModule`.
    """

    # The parser of configs follows `options` to the signature that they are passed on to.
    def __init__(  # noqa: PLR0913 - the signature is the configuration
        self,
        model: str = "ViT-B-16",
        pretrained: str | None = "openai",
        *,
        image_size: int | tuple[int, int] | None = None,
        image_mean: tuple[float, float, float] | None = None,
        image_std: tuple[float, float, float] | None = None,
        interpolation: str | None = None,
        resize_mode: str | None = None,
        fit: str | None = None,
        quick_gelu: bool | None = None,
        **options: Any,
    ) -> None:
        encoder = load_dual_encoder(
            model,
            pretrained,
            image_size=image_size,
            image_mean=image_mean,
            image_std=image_std,
            interpolation=interpolation,
            resize_mode=resize_mode,
            fit=fit,
            quick_gelu=quick_gelu,
        )
        super().__init__(encoder, **options)
