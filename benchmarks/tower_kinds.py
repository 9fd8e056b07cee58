"""Trains a small model of each kind of image tower, and measures attributions by rule and layer; keeps a table.

    python benchmarks/tower_kinds.py                 # about half an hour of a core, if nothing is there yet
    python benchmarks/tower_kinds.py --only siglip   # one kind

Checkpoints and rows that are in runs/tower_kinds are taken from there; remove a kind's files to train it again.

Completeness errors of random weights mean nothing: their embeddings hardly move. Each kind is therefore trained from
scratch on `shapes` with the demo's recipe, and measured on held-out phrases, each in its caption. Gamma and rho at the
inputs, and by Banzhaf interactions, which know of no layer, show which layers tell what the model does.

The towers are built by timm's and open_clip's own classes in a small size. Their strides are chosen so that the last
blocks have 8 x 8 places, as a ViT's 64-pixel images have; CLIP's ResNet, whose strides are fixed, sees images of 128
pixels and has 8 x 8 before its last stage and 4 x 4 after it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from kept_table import keep
from quadrature import Phrases, measure, read_phrases
from timm.models import register_model
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.fastvit import FastVit, RepConditionalPosEnc
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lightning_xai.attribution import BanzhafInteractions, FeaturePairAttribution
from lightning_xai.attribution.path_integral import Rule
from lightning_xai.data import ShapesDataModule
from lightning_xai.metrics import gamma, patch_mask, rho
from lightning_xai.models import DualEncoder, load_dual_encoder
from lightning_xai.models.at_layer import first_layer
from lightning_xai.training import ContrastiveFineTuning

COALITIONS = 512  # of patches, for each image
TEXT = {"context_length": 24, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2}
_VIT: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 3, "mlp_ratio": 2.0}

TIMM: dict[str, Callable[..., nn.Module]] = {
    "shapes_siglip": partial(VisionTransformer, **_VIT, class_token=False, global_pool="map"),
    # As timm's vit_pe_core_*: class token, rotary positions, a norm before the blocks, and a pool of one query.
    "shapes_pe_core": partial(
        Eva,
        **_VIT,
        global_pool="map",
        attn_type="rope",
        use_pre_transformer_norm=True,
        use_rot_pos_emb=True,
        ref_feat_shape=(8, 8),
        rope_grid_offset=1.0,
        rope_grid_indexing="xy",
        attn_pool_num_heads=3,
        attn_pool_mlp_ratio=2.0,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
    ),
    # As timm's fastvit_mci*, but that only the second stage halves its maps.
    "shapes_fastvit": partial(
        FastVit,
        layers=(1, 1, 1, 1),
        embed_dims=(32, 64, 64, 64),
        downsamples=(False, True, False, False),
        mlp_ratios=(3, 3, 3, 3),
        pos_embs=(None, None, None, partial(RepConditionalPosEnc, spatial_shape=(7, 7))),  # type: ignore[arg-type]
        token_mixers=("repmixer", "repmixer", "repmixer", "attention"),
        lkc_use_act=True,
    ),
    "shapes_convnext": partial(ConvNeXt, depths=(1, 1, 2, 1), dims=(32, 64, 64, 96), output_stride=8),
}


def _register(name: str, make: Callable[..., nn.Module]) -> None:
    def entry(pretrained: bool = False, **options: Any) -> nn.Module:
        given = {
            key: value for key, value in options.items() if key in ("num_classes", "global_pool", "drop_path_rate")
        }
        model: Any = make(**given)
        # open_clip sets the pool where the configuration has one's size.
        model.default_cfg = {} if isinstance(model, (VisionTransformer, Eva)) else {"pool_size": (8, 8)}
        built: nn.Module = model
        return built

    entry.__name__ = name
    register_model(entry)


for _name, _make in TIMM.items():
    _register(_name, _make)


def _timm(name: str, pool: str, proj: str | None) -> dict[str, Any]:
    return {"image_size": 64, "timm_model_name": name, "timm_pool": pool, "timm_proj": proj}


@dataclass(frozen=True)
class Kind:
    """A kind of tower.

    Attributes:
        heading: of its rows.
        vision: open_clip's configuration of the image tower.
        text: what its text tower has that `TEXT` has not.
        embed_dim: K.
    """

    heading: str
    vision: dict[str, Any]
    text: dict[str, Any] | None = None
    embed_dim: int = 128

    @property
    def config(self) -> dict[str, Any]:
        """Of the whole model, as open_clip takes it."""
        custom = {"custom_text": True} if self.text is not None else {}
        return {
            "embed_dim": self.embed_dim,
            "vision_cfg": self.vision,
            "text_cfg": {**TEXT, **(self.text or {})},
            **custom,
        }


KINDS = {
    "vit": Kind(
        "ViT (open_clip), CLS",
        {"image_size": 64, "layers": 3, "width": 96, "head_width": 32, "patch_size": 8, "mlp_ratio": 2},
    ),
    "siglip": Kind(
        "SigLIP2 (timm), attention pool; text without causal mask",
        _timm("shapes_siglip", "map", "none"),
        {"no_causal_mask": True, "pool_type": "last", "proj_bias": True},
        embed_dim=96,
    ),
    "pe_core": Kind("PE-Core (timm), CLS and attention pool", _timm("shapes_pe_core", "map", None), {}),
    "fastvit": Kind(
        "MobileCLIP2 (FastViT), average; text without causal mask",
        _timm("shapes_fastvit", "avg", None),
        {"no_causal_mask": True},
    ),
    "resnet": Kind(
        "CLIP's ResNet, attention pool",
        {"image_size": 128, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32, "patch_size": None},
    ),
    "convnext": Kind("ConvNeXt (timm), average", _timm("shapes_convnext", "", "linear")),
}


def train(name: str, folder: Path, shards: Path, epochs: int) -> Path:
    """Train a kind with the demo's recipe, unless its checkpoint is there."""
    path = folder / f"{name}.ckpt"
    if path.exists():
        return path
    L.seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as temporary:
        config = Path(temporary, f"shapes_{name}.json")
        config.write_text(json.dumps(KINDS[name].config))
        task = ContrastiveFineTuning(
            str(config),
            None,
            initial_lr=8e-4,
            final_lr=2e-5,
            schedule="cosine",
            warmup_steps=60,
            text_lr_factor=0.3,
            weight_decay=0.2,
            betas=(0.9, 0.98),
            fused=True,
        )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    begin = time.process_time()
    trainer.fit(task, ShapesDataModule(root=shards, num_workers=0))
    print(f"{name}: trained in {time.process_time() - begin:.0f} CPU seconds", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    trainer.save_checkpoint(path, weights_only=True)
    return path


def settings(encoder: DualEncoder) -> Iterator[tuple[str, tuple[int, int], Rule, int]]:
    """What is compared: name, layers (image, text), rule and steps."""
    last = encoder.image_at_layer().layer, encoder.text_at_layer().layer
    reading = encoder.image_at_layer().reading_layer, encoder.text_at_layer().reading_layer
    inputs = first_layer(encoder.image_at_layer), first_layer(encoder.text_at_layer)
    yield "last blocks, as the paper has it", last, "right", 10
    yield "last blocks", last, "midpoint", 4
    yield "last blocks", last, "midpoint", 5
    if reading != last:
        yield "where it reads", reading, "right", 10
        yield "where it reads", reading, "midpoint", 4
        yield "where it reads", reading, "midpoint", 5
    yield "inputs", inputs, "midpoint", 5


def measured_rows(name: str, encoder: DualEncoder, phrases: Phrases) -> Iterator[str]:
    """Lines of the table of a kind."""
    kind = KINDS[name].heading
    for where, layers, rule, steps in settings(encoder):
        begin = time.process_time()
        method = FeaturePairAttribution(encoder, *layers, steps, rule=rule, internal_batch_size=16)
        similarity, error, share, hit = measure(method, phrases)
        mean = float(error.abs().mean())
        of_similarity = f"{100 * mean / float(similarity.mean()):.1f} %"
        grid = "{} x {}".format(*method.grid)
        cells = [kind, where, f"{layers[0]}, {layers[1]}", grid, f"`{rule}` {steps}", f"{mean:.4f}", of_similarity]
        yield _line(cells, share, hit)
        print(f"{name}, {where}: {time.process_time() - begin:.0f} CPU seconds", flush=True)
    pairs = BanzhafInteractions(encoder, p=0.3, image_samples=COALITIONS)
    yield _line([kind, "Banzhaf pairs", "", "{} x {}".format(*pairs.grid), "", "", ""], *_by_banzhaf(pairs, phrases))


def _line(cells: list[str], share: Tensor, hit: Tensor) -> str:
    numbers = [f"{float(share.nanmean()):.3f}", str(int(share.isnan().sum()))]
    numbers += [f"{100 * float(found.double().mean()):.1f} %" for found in (share > 0.5, hit)]
    return "| " + " | ".join([*cells, *numbers]) + " |"


def _by_banzhaf(method: BanzhafInteractions, phrases: Phrases) -> tuple[Tensor, Tensor]:
    """Gamma and rho of phrases within their captions; each image and each caption is masked once."""
    images, image_row = torch.unique(phrases.images, dim=0, return_inverse=True)
    tokens, caption_row = torch.unique(phrases.tokens, dim=0, return_inverse=True)
    states, references = method.hidden_states(images, tokens), method.references(tokens.shape[1])
    maps = method.span_maps_of(states, image_row, caption_row, phrases.spans, references)
    masks = patch_mask(
        phrases.boxes, (maps.shape[1], maps.shape[2]), (phrases.images.shape[2], phrases.images.shape[3])
    )
    return gamma(maps, masks), rho(maps, masks)


@torch.no_grad()
def recall(encoder: DualEncoder, phrases: Phrases) -> str:
    """How well it has learned, in words: how often a caption's own image is the most similar one."""
    tokens, first = _first_of_each(phrases.tokens)
    image = torch.nn.functional.normalize(encoder.encode_image(phrases.images[first]), dim=1)
    text = torch.nn.functional.normalize(encoder.encode_text(tokens), dim=1)
    rank = (text @ image.T > (text * image).sum(dim=1, keepdim=True)).sum(dim=1)
    return f"{100 * float((rank < 1).double().mean()):.0f} % of {len(tokens)}"


def _first_of_each(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Captions that differ, and the first row of each."""
    found, row = torch.unique(tokens, dim=0, return_inverse=True)
    return found, torch.stack([(row == number).nonzero()[0, 0] for number in range(len(found))])


def kind_rows(name: str, folder: Path, shards: Path, epochs: int, count: int) -> dict[str, Any]:
    """A kind's rows, and how well it retrieves; trained and measured unless they are in the folder."""
    path = folder / f"{name}.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    checkpoint = train(name, folder, shards, epochs)
    encoder = load_dual_encoder(checkpoint).eval()
    phrases = read_phrases(encoder, shards / "val", count)
    trained = torch.load(checkpoint, weights_only=True, mmap=True)["epoch"]  # it may have been there
    found = {"rows": list(measured_rows(name, encoder, phrases)), "recall": recall(encoder, phrases)}
    found |= {"epochs": trained, "phrases": count}
    path.write_text(json.dumps(found))
    return found


def main() -> None:
    """Train, measure, print, and keep the table under benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--epochs", type=int, default=4, help="of 12,800 images")
    parser.add_argument("--phrases", type=int, default=96)
    parser.add_argument("--folder", type=Path, default=Path("runs/tower_kinds"))
    parser.add_argument("--shards", type=Path, default=Path("data/shapes"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    found = {
        name: kind_rows(name, options.folder, options.shards, options.epochs, options.phrases) for name in options.only
    }
    heads = ["tower", "where", "layers (image, text)", "grid", "rule and steps", "completeness error, mean"]
    heads += ["of the similarity", "gamma, mean", "without gamma", "gamma > 0.5", "rho"]
    counts = sorted({kind["phrases"] for kind in found.values()})
    lines = [
        f"{', '.join(map(str, counts))} held-out phrases in their captions; Banzhaf pairs with p = 0.3 from "
        f"{COALITIONS} coalitions of patches.",
        "",
        "| " + " | ".join(heads) + " |",
        "|---" * len(heads) + "|",
        *(line for kind in found.values() for line in kind["rows"]),
        "",
        "How well they have learned: a caption's own image is the most similar one for "
        + "; ".join(
            f"{kind['recall']} captions after {kind['epochs']} epochs of 12,800 images ({KINDS[name].heading})"
            for name, kind in found.items()
        )
        + ".",
    ]
    keep("tower-kinds", "Rules and layers by kind of tower", "cpu", "\n".join(lines), "small models")


if __name__ == "__main__":
    main()
