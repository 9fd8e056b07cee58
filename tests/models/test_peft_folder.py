"""Adapters that are exported for peft: with its own LoRA, the exported weights compute what was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs import random_pairs
from torch import Tensor

from lightning_xai import cli
from lightning_xai.commands.export import export
from lightning_xai.models import DualEncoder, load_dual_encoder
from lightning_xai.training import ContrastiveFineTuning, Lora

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning:torch")

ArchitectureFile = Callable[[str], Path]


def trained_checkpoint(model: str, path: Path, lora: Lora | None) -> DualEncoder:
    """Write a checkpoint as after training (B is not zero, other parameters have moved), and load it merged."""
    torch.manual_seed(0)
    task = ContrastiveFineTuning(model, None, lora=lora)
    with torch.no_grad():
        for name, value in task.encoder.named_parameters():
            if name.endswith("lora_B") or value.ndim == 1:
                value.add_(torch.randn_like(value), alpha=0.2)
    checkpoint: dict[str, Any] = {"state_dict": task.state_dict()}
    task.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return load_dual_encoder(path).eval()


@torch.no_grad()
def embeddings(encoder: DualEncoder) -> list[Tensor]:
    """Of images and captions, by `encoder.model`, whatever wraps it."""
    images, tokens = random_pairs(encoder)
    return [encoder.encode_image(images), encoder.encode_text(tokens)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "lora",
    [
        Lora(rank=2, alpha=6, targets="all"),
        Lora(rank=2, targets="attention", norms=True),
        Lora(rank=3, targets=["out_proj", "c_fc"], towers="text"),
    ],
    ids=["all", "attention", "text"],
)
def test_peft_adds_exported_adapters_to_an_open_clip_model_and_gets_the_embeddings_that_were_trained(
    lora: Lora, architecture_file: ArchitectureFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = trained_checkpoint(str(architecture_file("vit")), tmp_path / "run.ckpt", lora)
    out, folder = tmp_path / "base.safetensors", tmp_path / "adapter"
    cli.main(["export", str(tmp_path / "run.ckpt"), str(out), "--adapter", str(folder)])
    assert "model = PeftModel.from_pretrained(model, " in capsys.readouterr().out
    encoder = load_dual_encoder(architecture_file("vit"), out).eval()
    expected, below = embeddings(trained), embeddings(encoder)
    assert (below[1] - expected[1]).abs().max() > 1e-2, "the adapters are not part of the weights"
    encoder.model = peft.PeftModel.from_pretrained(encoder.model, folder).eval()
    assert_same(embeddings(encoder), expected)
    encoder.model.save_pretrained(tmp_path / "by_peft")
    for start in (folder, tmp_path / "by_peft"):
        begun = replace(lora, init=str(start))
        task = ContrastiveFineTuning(str(architecture_file("vit")), str(out), lora=begun).eval()
        for one, other in zip(embeddings(task.encoder), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    encoder.model = encoder.model.merge_and_unload()
    assert_same(embeddings(encoder), expected)
    adapted = set(json.loads((folder / "adapter_config.json").read_text())["target_modules"].split("|"))
    assert any(name.startswith("visual") for name in adapted) == (lora.towers == "both")


def test_peft_adds_exported_adapters_to_a_model_of_transformers(tmp_path: Path) -> None:
    small = pytest.importorskip("small_hugging_face")
    source = small.save_small("CLIPModel", tmp_path / "model")
    trained = trained_checkpoint(f"hf:{source}", tmp_path / "run.ckpt", Lora(rank=2, alpha=3, targets="all"))
    out, folder = tmp_path / "base", tmp_path / "adapter"
    cli.main(["export", str(tmp_path / "run.ckpt"), str(out), "--adapter", str(folder)])
    encoder = load_dual_encoder(f"hf:{out}").eval()
    below, expected = embeddings(encoder), embeddings(trained)
    assert min((one - other).abs().max() for one, other in zip(below, expected, strict=True)) > 1e-3
    # `model` of these encoders is read by its parts; peft puts its layers into the model itself.
    peft.PeftModel.from_pretrained(encoder.model, folder).eval()
    assert_same(embeddings(encoder), expected)


@pytest.mark.parametrize(
    ("name", "lora", "message"),
    [
        ("vit", None, "made of a checkpoint that was trained with lora; this one has no low-rank adapters"),
        ("vit_custom_block", Lora(), r"peft has no adapter of in_proj_weight of a Attention \(visual.*attn\): export "),
    ],
)
def test_what_peft_cannot_hold_is_refused_before_anything_is_written(
    name: str, lora: Lora | None, message: str, architecture_file: ArchitectureFile, tmp_path: Path
) -> None:
    trained_checkpoint(str(architecture_file(name)), tmp_path / "run.ckpt", lora)
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "run.ckpt", tmp_path / "base.pt", adapter=tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["run.ckpt"]
    with pytest.raises(ValueError, match=r"--adapter .* is there already: give a new folder"):
        export(tmp_path / "run.ckpt", tmp_path / "base.pt", adapter=tmp_path)


@pytest.mark.parametrize(
    ("lora", "config", "message"),
    [
        ({"rank": 3}, {}, r"adapter has rank 2 and alpha 6(\.0)?: give lora the same; got 3 and 6"),
        (
            {"targets": "all"},
            {},
            "nothing for .*mlp.c_fc.weight: give lora the targets and towers of its target_modules",
        ),
        (
            {"towers": "text"},
            {},
            "matrices that lora leaves out, such as visual.*: give lora targets and towers that na",
        ),
        ({}, {"use_dora": True}, "has an adapter with use_dora: only plain LoRA can be a start here"),
        ({}, {"peft_type": "IA3"}, "has an adapter with peft_type IA3"),
        ({}, {"peft_version": "0.1"}, r"the adapter is of peft 0\.1, and .* is installed"),
    ],
)
def test_an_adapter_that_does_not_fit_is_no_start(
    lora: dict[str, Any], config: dict[str, Any], message: str, architecture_file: ArchitectureFile, tmp_path: Path
) -> None:
    model, own = str(architecture_file("vit")), Lora(rank=2, alpha=6)
    trained_checkpoint(model, tmp_path / "run.ckpt", own)
    export(tmp_path / "run.ckpt", tmp_path / "base.pt", adapter=tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(ValueError, match=message) as raised:
        ContrastiveFineTuning(model, None, lora=replace(own, init=str(tmp_path / "adapter"), **lora))
    assert "\n" not in str(raised.value)


def test_a_pickled_or_broken_adapter_is_not_read(architecture_file: ArchitectureFile, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 16}')
    torch.save({}, tmp_path / "adapter_model.bin")
    for content in (None, b"no tensors"):
        if content is not None:
            (tmp_path / "adapter_model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="is no folder of a peft adapter with adapter_config"):
            ContrastiveFineTuning(str(architecture_file("vit")), None, lora=Lora(init=str(tmp_path)))
