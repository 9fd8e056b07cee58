"""Low-rank adapters: what is trained, what is read back, and that everything sees the model that was trained."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import join_lightning, run_distributed
from inputs import random_pairs
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from training_runs import Recorder, batches_of, loader_of, records_of, task_of, trainer_in

from lightning_xai.attribution import METHODS
from lightning_xai.data.batch import TrainingCollate
from lightning_xai.models import DualEncoder, load_dual_encoder
from lightning_xai.models.fingerprint import weights_fingerprint
from lightning_xai.training import ContrastiveFineTuning, Lora

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:torch")

ArchitectureFile = Callable[[str], Path]
OPTIONS: dict[str, dict[str, Any]] = {
    "feature_pair": {"steps": 8, "rule": "midpoint"},
    "integrated_gradients": {"steps": 4},
    "kernel_shap": {"image_samples": 40, "text_samples": 40},
    "rise": {"image_masks": 4, "text_masks": 4},
    "banzhaf_pairs": {"image_samples": 64, "text_samples": 64},
}


def trained(task: ContrastiveFineTuning) -> list[str]:
    """Names of the parameters that learn, without the encoder's own prefix."""
    return [name for name, value in task.encoder.model.named_parameters() if value.requires_grad]


def with_random_adapters(task: ContrastiveFineTuning) -> ContrastiveFineTuning:
    """The task as after training: B is not zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in task.encoder.named_parameters():
            if name.endswith("lora_B"):
                value.normal_(std=0.2, generator=generator)
    return task


def merged(task: ContrastiveFineTuning, path: Path) -> DualEncoder:
    """The encoder as it is read from the task's checkpoint."""
    checkpoint: dict[str, Any] = {"state_dict": task.state_dict()}
    task.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return load_dual_encoder(path).eval()


@pytest.mark.parametrize("targets", ["attention", "mlp", "all"])
def test_new_adapters_leave_the_weights_as_they_are_bit_for_bit(
    targets: Any, architecture_file: ArchitectureFile
) -> None:
    plain = task_of(architecture_file("vit"))
    adapted = task_of(architecture_file("vit"), lora=Lora(targets=targets))
    images, tokens = random_pairs(plain.encoder)
    # The weights are the same bits. What is computed from them differs in its last bits on some processors, where the
    # way through a matrix depends on where it lies in memory.
    for name, weight in plain.encoder.named_parameters():
        module, _, own = name.rpartition(".")
        assert torch.equal(weight, getattr(adapted.encoder.get_submodule(module), own)), name
    assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    assert_close(plain.encoder(images, tokens), adapted.encoder(images, tokens))
    with torch.no_grad():  # torch's attention takes another way
        assert_close(plain.eval().encoder(images, tokens), adapted.eval().encoder(images, tokens))
    assert weights_fingerprint(plain.encoder.model) == weights_fingerprint(adapted.encoder.model)


@pytest.mark.parametrize("name", ["vit", "vit_layer_scale_quick_gelu", "vit_custom_block"])
@pytest.mark.parametrize("targets", ["attention", ["mlp", "out_proj"]])
def test_all_that_reads_an_adapted_model_sees_the_merged_one(
    targets: Any, name: str, architecture_file: ArchitectureFile, tmp_path: Path
) -> None:
    task = with_random_adapters(task_of(architecture_file(name), lora=Lora(rank=2, targets=targets))).eval()
    plain = merged(task, tmp_path / "model.ckpt")
    assert trained(task), "the adapters are still there"
    assert not any("lora" in key for key in plain.state_dict())
    assert weights_fingerprint(plain.model) == weights_fingerprint(task.encoder.model)
    images, tokens = random_pairs(plain)
    compared = 0
    for method in METHODS if name == "vit" else ["feature_pair", "attention_relevance"]:
        found, expected = (
            vars(METHODS[method](encoder, **OPTIONS.get(method, {})).attribute(images, tokens))
            for encoder in (task.encoder, plain)
        )
        for field, value in expected.items():
            if isinstance(value, torch.Tensor):
                # The bottleneck is learned, step by step, from weights that differ in their last bits.
                rtol, atol = (1e-2, 1e-3) if method in ("m2ib", "nib") else (1e-5, 1e-6)
                torch.testing.assert_close(found[field], value, rtol=rtol, atol=atol, msg=f"{method} {field}")
                compared += 1
    assert compared > 4


def test_adapters_compute_and_learn_as_those_of_peft(architecture_file: ArchitectureFile) -> None:
    peft = pytest.importorskip("peft")
    task = with_random_adapters(task_of(architecture_file("vit"), lora=Lora(rank=2, alpha=6, targets="all")).double())
    if not any(isinstance(part, nn.MultiheadAttention) for part in task.encoder.modules()):
        pytest.skip("peft adapts PyTorch's attention, which open_clip 4 has no more")
    plain = task_of(architecture_file("vit")).double().encoder.model
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["attn", "c_fc", "c_proj"])
    reference = peft.inject_adapter_in_model(config, plain)
    own = dict(task.encoder.model.named_parameters())
    pairs = {}
    for name, value in reference.named_parameters():
        if "lora_" in name:
            # peft wraps the attention, in which the output projection is.
            module, _, factor = name.replace("base_layer.", "").removesuffix(".default.weight").rpartition(".")
            weight = "in_proj_weight" if module.endswith("attn") else "weight"
            adapter = own[f"{module}.parametrizations.{weight}.0.{factor}"]
            if module.endswith("out_proj"):
                adapter.data.zero_()  # peft 0.21 adds this one twice inside nn.MultiheadAttention
            else:
                pairs[name] = adapter
            value.data.copy_(adapter)
    assert len(pairs) == 2 * 3 * 2 * 3, "two factors of three matrices in three blocks of two towers"
    images, tokens = random_pairs(task.encoder)
    embeddings = []
    for model in (task.encoder.model, reference):
        image, text = model.encode_image(images.double()), model.encode_text(tokens)
        torch.autograd.backward(image.sin().sum() + text.cos().sum())
        embeddings.append((image, text))
    for found, expected in zip(*embeddings, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    gradients = {name: value.grad for name, value in reference.named_parameters() if name in pairs}
    for name, expected in gradients.items():
        torch.testing.assert_close(pairs[name].grad, expected, rtol=1e-9, atol=1e-12, msg=name)


def test_a_merged_weight_is_w_plus_alpha_over_rank_times_b_a(
    architecture_file: ArchitectureFile, tmp_path: Path
) -> None:
    task = with_random_adapters(task_of(architecture_file("vit"), lora=Lora(rank=4, alpha=6)))
    weights = merged(task, tmp_path / "model.ckpt").model.state_dict()
    state = task.encoder.model.state_dict()
    for part in ("attn.{}in_proj_weight", "attn.out_proj.{}weight"):
        name, adapted = (f"transformer.resblocks.1.{part.format(x)}" for x in ("", "parametrizations."))
        base, lora_a, lora_b = (state[f"{adapted}.{x}"] for x in ("original", "0.lora_A", "0.lora_B"))
        torch.testing.assert_close(weights[name], base + 6 / 4 * lora_b @ lora_a)


@pytest.mark.parametrize(
    ("options", "starts"),
    [
        ({"lora": Lora(towers="text")}, {"transformer."}),
        ({"lora": Lora(), "freeze_image": 2}, {"visual.transformer.resblocks.2.", "transformer."}),
        ({"lora": Lora(targets=["resblocks.2.mlp"], towers="image")}, {"visual.transformer.resblocks.2.mlp."}),
    ],
)
def test_nothing_but_adapters_and_the_logit_scale_learns(
    options: dict[str, Any], starts: set[str], architecture_file: ArchitectureFile
) -> None:
    names = trained(task_of(architecture_file("vit"), **options))
    assert "logit_scale" in names
    adapters = [name for name in names if name != "logit_scale"]
    assert all(name.endswith(("lora_A", "lora_B")) and name.startswith(tuple(starts)) for name in adapters)
    assert all(any(name.startswith(start) for name in adapters) for start in starts)


def test_norms_learn_where_they_are_asked_for(architecture_file: ArchitectureFile) -> None:
    names = trained(task_of(architecture_file("vit"), lora=Lora(norms=True, towers="image"), freeze_image=1))
    others = {name for name in names if "lora" not in name} - {"logit_scale"}
    assert {name.rpartition(".")[0].rpartition("visual.")[2] for name in others} == {
        "ln_post", *(f"transformer.resblocks.{block}.ln_{norm}" for block in (1, 2) for norm in (1, 2)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"at least 1 \(lora: null trains without adapters\); got 0"),
        ({"alpha": 0.0}, "alpha of lora has to be positive"),
        ({"targets": "heads"}, "one of attention, mlp, all, or a list of names"),
        ({"targets": ["attn", "heads"]}, r"part of heads; what can be adapted: .*resblocks\.\*\.attn, .*mlp\.c_fc"),
        ({"towers": "left"}, "one of both, image, text; got 'left'"),
    ],
)
def test_adapters_that_cannot_be_are_refused(
    options: dict[str, Any], message: str, architecture_file: ArchitectureFile
) -> None:
    with pytest.raises(ValueError, match=message):
        task_of(architecture_file("vit"), lora=Lora(**options))


@pytest.mark.parametrize(
    ("name", "options"), [("resnet", {}), ("vit", {"freeze_image": "all"}), ("vit", {"freeze_image": 3})]
)
def test_a_tower_in_which_nothing_can_be_adapted_is_refused(
    name: str, options: dict[str, Any], architecture_file: ArchitectureFile
) -> None:
    with pytest.raises(ValueError, match="the image tower's blocks have no matrix for targets: attention"):
        task_of(architecture_file(name), lora=Lora(), **options)


@pytest.mark.parametrize("saving", [{"chunk_size": 3}, {"gradient_checkpointing": True}])
def test_saving_memory_changes_no_gradient_of_an_adapter(
    saving: dict[str, Any], architecture_file: ArchitectureFile, shapes: Path, tmp_path: Path
) -> None:
    found = []
    for options in ({}, saving):
        task, recorder = task_of(architecture_file("vit"), lora=Lora(targets="all"), **options), Recorder()
        trainer = trainer_in(tmp_path, recorder, precision="64-true")
        trainer.fit(with_random_adapters(task), batches_of(task, shapes / "train", 1, 8))
        found.append(recorder.gradients[0])
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-10, atol=1e-12, msg=name)


def test_a_resumed_run_ends_with_the_same_adapters_bit_for_bit_and_others_are_refused(
    architecture_file: ArchitectureFile, shapes: Path, tmp_path: Path
) -> None:
    def run(folder: Path, lora: Lora, checkpoint: Path | None = None) -> ContrastiveFineTuning:
        task = task_of(architecture_file("vit"), lora=lora, decay_norms_and_biases=False, layer_decay=0.5)
        saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = trainer_in(folder, saver, max_epochs=2, limit_val_batches=0)
        trainer.fit(task, batches_of(task, shapes / "train", 2, 8), ckpt_path=checkpoint)
        return task

    whole = run(tmp_path / "whole", Lora(rank=2))
    half = tmp_path / "whole" / "step=2.ckpt"
    resumed = run(tmp_path / "resumed", Lora(rank=2), half)
    state = resumed.state_dict()
    assert all(torch.equal(state[name], value) for name, value in whole.state_dict().items())
    base = task_of(architecture_file("vit")).encoder.model.state_dict()
    for name, value in whole.encoder.model.state_dict().items():
        if name.endswith(".original"):
            assert torch.equal(value, base[name.replace("parametrizations.", "").removesuffix(".original")])
    with pytest.raises(ValueError, match="low-rank adapters are not those of this run: give lora as"):
        run(tmp_path / "other", Lora(rank=3), half)


def test_frozen_text_embeddings_have_neither_gradient_nor_averages(
    architecture_file: ArchitectureFile, shapes: Path, tmp_path: Path
) -> None:
    task, recorder = task_of(architecture_file("vit"), freeze_text_embeddings=True), Recorder()
    before = {name: value.clone() for name, value in task.encoder.model.named_parameters()}
    trainer_in(tmp_path, recorder).fit(task, batches_of(task, shapes / "train", 2, 8))
    kept = {name for name, value in task.encoder.model.named_parameters() if torch.equal(value, before[name])}
    assert kept == {"token_embedding.weight", "positional_embedding"}
    optimized = {id(each) for group in recorder.optimizer.param_groups for each in group["params"]}
    assert not any(id(task.encoder.model.get_parameter(name)) in optimized for name in kept)


def gradients_of_share(model: str, folder: str, out: str, spread: bool) -> dict[str, Any]:
    """Gradients in float64 of adapters by a step of eight pairs, on this rank's share of them."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if spread else (0, 1)
    task = with_random_adapters(task_of(model, lora=Lora(targets="all"), freeze_text_embeddings=True))
    collate = TrainingCollate(task.encoder.image_transform, task.encoder.tokenizer)
    batch = collate(records_of(Path(folder) / "train", 8)[rank::world])
    recorder, options = Recorder(), join_lightning() if spread else {}
    trainer = trainer_in(Path(out) / str(rank), recorder, precision="64-true", **options)
    trainer.fit(task, loader_of([batch]))
    return recorder.gradients[0]


@pytest.mark.distributed
def test_two_processes_have_the_gradients_of_one(
    architecture_file: ArchitectureFile, shapes: Path, tmp_path: Path
) -> None:
    where = (str(architecture_file("vit")), str(shapes), str(tmp_path))
    expected = gradients_of_share(*where, spread=False)
    assert any("lora_A" in name for name in expected)
    for rank in run_distributed(gradients_of_share, *where, True):
        assert rank.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(rank[name], value, rtol=1e-12, atol=1e-12, msg=name)
