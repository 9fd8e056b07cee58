"""The function that a file of weights becomes: pixels, activation, positions, and the layouts of training code."""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from conftest import ARCHITECTURES, TEXT, randomised
from inputs import CAPTIONS
from open_clip.transform import PreprocessCfg
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from lightning_xai.commands.export import loading_code
from lightning_xai.model_options import PIXEL_OPTIONS, ModelOptions
from lightning_xai.models import DualEncoder, load_dual_encoder, save_open_clip
from lightning_xai.models.architecture import built_in_architecture, settled

VIT = ARCHITECTURES["vit"]
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bilinear", "resize_mode": "squash"}
TIMM: dict[str, Any] = {
    "embed_dim": 192,
    "vision_cfg": {
        "image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False,
        "timm_pool": "token", "timm_proj": "none",
    },
    "text_cfg": TEXT,
}  # fmt: skip


def write(folder: Path, name: str, config: object) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))
    return path


def at(config: dict[str, Any], image_size: object = None, context_length: int | None = None) -> dict[str, Any]:
    """A config for images and captions of another size."""
    vision, text = dict(config["vision_cfg"]), dict(config["text_cfg"])
    vision["image_size"] = image_size or vision["image_size"]
    text["context_length"] = context_length or text["context_length"]
    return config | {"vision_cfg": vision, "text_cfg": text}


def trained(folder: Path, config: dict[str, Any], file: str = "weights.pt") -> DualEncoder:
    """An encoder whose state dict lies in a file of its own, which says nothing else."""
    torch.manual_seed(0)
    encoder = randomised(load_dual_encoder(write(folder, "trained.json", config))).eval()
    torch.save(encoder.model.state_dict(), folder / file)
    return encoder


@torch.no_grad()
def embeddings(encoder: DualEncoder) -> tuple[Tensor, Tensor]:
    images = torch.randn(2, *encoder.image_shape, generator=torch.Generator().manual_seed(1))
    return encoder.encode_image(images), encoder.encode_text(encoder.tokenizer.encode(list(CAPTIONS)))


def photo() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((360, 200))


# ---- pixels and activation


def test_every_architecture_gets_the_pixels_and_activation_of_its_tags_or_a_question() -> None:
    asked = {}
    for name in open_clip.list_models():
        tags = open_clip.list_pretrained_tags_by_model(name)
        ways = []
        for tag in tags:
            published = {"quick_gelu": False} | vars(PreprocessCfg()) | open_clip.get_pretrained_cfg(name, tag)
            ways.append({key: published[key] for key in (*PIXEL_OPTIONS, "quick_gelu")})
        architecture = built_in_architecture(name)
        known = architecture["model_cfg"].get("quick_gelu", False)
        differ = [key for key in (ways or [{}])[0] if any(way[key] != ways[0][key] for way in ways)]
        differ = [key for key in differ if key != "quick_gelu" or not known]
        if not tags:
            continue
        if differ:
            with pytest.raises(ValueError, match="does not say how it was trained") as caught:
                settled(architecture, ModelOptions(), Path("weights.pt"), activation_known=known)
            asked[name] = str(caught.value)
            options = {PIXEL_OPTIONS.get(key, key) for key in differ}
            assert options == set(re.findall(r"--model\.(\w+)", asked[name])), name
            continue
        found = settled(architecture, ModelOptions(), Path("weights.pt"), activation_known=known)
        for key in PIXEL_OPTIONS:
            assert json.dumps(found["preprocess_cfg"][key]) == json.dumps(ways[0][key]), (name, key)
        if not known:
            assert found["model_cfg"].get("quick_gelu", False) is ways[0]["quick_gelu"], name
    assert {"ViT-B-32", "ViT-L-14", "ViT-H-14-quickgelu"} <= asked.keys()
    assert "image_mean: [0.48145466, 0.4578275, 0.40821073] (openai and" in asked["ViT-L-14"]
    assert "or [0.5, 0.5, 0.5] (laion2b_s32b_b82k)" in asked["ViT-L-14"]


def test_weights_from_a_file_see_the_pixels_of_their_architectures_tags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "MobileCLIP2-S0"
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, VIT)
    torch.save(randomised(load_dual_encoder(name)).model.state_dict(), tmp_path / "weights.pt")
    encoder = load_dual_encoder(name, tmp_path / "weights.pt")
    published = open_clip.get_pretrained_cfg(name, "dfndr2b")
    expected = open_clip.transform.image_transform_v2(
        PreprocessCfg(size=32, **{key: published[key] for key in PIXEL_OPTIONS}), is_train=False
    )
    assert (encoder.image_transform.mean, encoder.image_transform.interpolation) == ((0, 0, 0), "bilinear")
    assert torch.equal(encoder.image_transform(photo()), expected(photo()))


def test_an_ambiguous_file_asks_and_the_options_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-L-14", VIT)
    weights = tmp_path / "weights.pt"
    torch.save(load_dual_encoder("ViT-L-14").model.state_dict(), weights)
    with pytest.raises(ValueError, match=r"weights\.pt does not say how it was trained.*--model\.quick_gelu"):
        load_dual_encoder("ViT-L-14", weights, image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))
    encoder = load_dual_encoder(
        "ViT-L-14", weights, image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5), quick_gelu=True
    )
    assert encoder.image_transform.mean == (0.5, 0.5, 0.5)
    assert encoder.architecture["model_cfg"]["quick_gelu"] is True
    # What the file's own folder says needs no question.
    write(tmp_path, "open_clip_config.json", {"model_cfg": VIT, "preprocess_cfg": HALF})
    told = load_dual_encoder("ViT-L-14", weights)
    assert told.preprocessing.items() >= HALF.items()
    assert not told.architecture["model_cfg"].get("quick_gelu", False)


def test_options_go_before_what_a_file_says_and_are_kept_in_what_is_saved(tmp_path: Path) -> None:
    config = write(tmp_path, "config.json", {"model_cfg": VIT, "preprocess_cfg": HALF})
    encoder = load_dual_encoder(config, image_std=(0.1, 0.2, 0.3), resize_mode="longest")
    assert encoder.preprocessing.items() >= (HALF | {"std": [0.1, 0.2, 0.3], "resize_mode": "longest"}).items()
    for suffix in (".pt", ".safetensors"):
        save_open_clip(encoder, tmp_path / f"saved{suffix}")
        assert load_dual_encoder(config, tmp_path / f"saved{suffix}").preprocessing == encoder.preprocessing


def test_a_letterbox_is_kept_in_what_is_saved_and_open_clip_pads_with_the_nearest_colour(tmp_path: Path) -> None:
    config = write(tmp_path, "config.json", {"model_cfg": VIT, "preprocess_cfg": HALF})
    encoder = load_dual_encoder(config, fit="letterbox").eval()
    assert load_dual_encoder(config, fit="crop").image_transform.resize_mode == "shortest"
    image = Image.new("RGB", (90, 40), "red")
    images = encoder.image_transform(image)[None]
    for name in ("saved.pt", "saved.safetensors"):
        save_open_clip(encoder, tmp_path / name)
        again = load_dual_encoder(config, tmp_path / name).eval()
        assert again.image_transform == encoder.image_transform
        assert torch.equal(again.encode_image(images), encoder.encode_image(images))
    save_open_clip(encoder, tmp_path / "folder")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'folder'}")
    assert torch.allclose(preprocess(image), images[0], atol=1 / 255 / 0.5)
    assert torch.allclose(model.eval().encode_image(images), encoder.encode_image(images), atol=1e-5)
    with pytest.raises(ValueError, match="fit=letterbox means resize_mode=letterbox; got squash: give one of them"):
        load_dual_encoder(config, fit="letterbox", resize_mode="squash")


@pytest.mark.parametrize("options", [{"image_mean": (0.5, 0.5)}, {"image_size": 0}, {"resize_mode": "fit"}])
def test_an_option_outside_its_range_is_named(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        load_dual_encoder(write(tmp_path, "config.json", VIT), **options)


@pytest.mark.usefixtures("names_are_forgotten")
@pytest.mark.parametrize(("config", "size"), [(VIT, None), (TIMM, 96)], ids=["own", "timm"])
def test_the_printed_code_rebuilds_the_very_same_function(
    config: dict[str, Any], size: int | None, tmp_path: Path
) -> None:
    path = write(tmp_path, "config.json", {"model_cfg": config | {"quick_gelu": True}, "preprocess_cfg": HALF})
    encoder = randomised(load_dual_encoder(path, image_size=size)).eval()
    for suffix in (".pt", ".safetensors", *[""] * (size is None)):
        save_open_clip(encoder, tmp_path / f"weights{suffix}")
        names: dict[str, Any] = {}
        exec(loading_code(encoder, tmp_path / f"weights{suffix}"), names)
        model = names["model"].eval()
        with torch.no_grad():
            image = model.encode_image(names["preprocess"](photo())[None])
            text = model.encode_text(names["tokenizer"](list(CAPTIONS)))
            torch.testing.assert_close(
                image, encoder.encode_image(encoder.image_transform(photo())[None]), rtol=1e-6, atol=1e-6
            )
            own = encoder.encode_text(encoder.tokenizer.encode(list(CAPTIONS)))
            torch.testing.assert_close(text, own, rtol=1e-5, atol=5e-6)  # which does not run the padding
    if size is None:
        with pytest.raises(ValueError, match="weights is there already: give a new folder"):
            save_open_clip(encoder, tmp_path / "weights")
        loaded = load_dual_encoder(tmp_path / "weights").eval()
        assert loaded.preprocessing == encoder.preprocessing
        assert all(map(torch.equal, embeddings(loaded), embeddings(encoder)))
    else:
        with pytest.raises(ValueError, match=r"for images of \(224, 224\) before it loads"):
            save_open_clip(encoder, tmp_path / "weights")


# ---- positions


def test_positions_are_interpolated_from_their_own_grid_also_where_the_number_agrees(tmp_path: Path) -> None:
    encoder = randomised(load_dual_encoder(write(tmp_path, "square.json", at(VIT, [32, 32])))).eval()
    save_open_clip(encoder, tmp_path / "weights.safetensors")
    oblong = write(tmp_path, "oblong.json", at(VIT, [16, 64]))
    with pytest.warns(UserWarning, match=r"image positions from 4 x 4 to 2 x 8 patches"):
        loaded = load_dual_encoder(oblong, tmp_path / "weights.safetensors")
    before, after = (each.model.visual.positional_embedding for each in (encoder, loaded))
    planes = before[1:].T.reshape(1, -1, 4, 4)
    expected = torch.nn.functional.interpolate(planes, size=(2, 8), mode="bicubic", antialias=True)
    torch.testing.assert_close(after[1:].T.reshape(-1, 2, 8), expected[0])
    assert torch.equal(after[0], before[0])
    assert loaded.image_shape == (3, 16, 64)
    assert loaded.architecture["model_cfg"]["vision_cfg"]["image_size"] == [16, 64]
    # The option says the same, and so does the way back from an oblong grid.
    with pytest.warns(UserWarning, match=r"from 4 x 4 to 2 x 8"):
        same = load_dual_encoder(tmp_path / "square.json", tmp_path / "weights.safetensors", image_size=(16, 64))
    assert torch.equal(same.model.visual.positional_embedding, after)
    save_open_clip(loaded, tmp_path / "oblong.safetensors")
    with pytest.warns(UserWarning, match=r"from 2 x 8 to 4 x 4"):
        load_dual_encoder(oblong, tmp_path / "oblong.safetensors", image_size=32)


def test_a_grid_that_cannot_be_known_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, at(VIT, [16, 64]))  # 16 patches, as a square of 4 x 4 has
    with pytest.raises(ValueError, match=r"either of 2 x 8, .*or of 4 x 4"):
        load_dual_encoder(write(tmp_path, "oblong.json", at(VIT, [16, 64])), tmp_path / "weights.pt")
    trained(tmp_path, at(VIT, [16, 24]))  # 6 patches
    with pytest.raises(ValueError, match=r"6 patches, which make no square"):
        load_dual_encoder(write(tmp_path, "square.json", VIT), tmp_path / "weights.pt")
    # With the config of its training there is no question.
    config = write(tmp_path, "known.json", at(VIT, [16, 24]))
    with pytest.warns(UserWarning, match="from 2 x 3 to 4 x 4 patches"):
        load_dual_encoder(config, tmp_path / "weights.pt", image_size=32)


def test_text_positions_are_interpolated_with_a_warning(tmp_path: Path) -> None:
    encoder = trained(tmp_path, VIT)
    longer = write(tmp_path, "longer.json", at(VIT, context_length=20))
    with pytest.warns(UserWarning, match="text positions from 16 to 20 tokens"):
        loaded = load_dual_encoder(longer, tmp_path / "weights.pt")
    before, after = encoder.model.positional_embedding, loaded.model.positional_embedding
    expected = torch.nn.functional.interpolate(before.T[None], size=20, mode="linear")[0].T
    torch.testing.assert_close(after, expected)
    assert loaded.tokenizer.context_length == 20


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "convnext_atto"])
@pytest.mark.filterwarnings("ignore:neither")
def test_towers_of_timm_take_another_size(name: str, tmp_path: Path) -> None:
    vision: dict[str, Any] = {**TIMM["vision_cfg"], "timm_model_name": name}
    if name == "convnext_atto":
        vision |= {"timm_pool": "", "timm_proj": "linear"}
    config = TIMM | {"vision_cfg": vision}
    encoder = trained(tmp_path, config)
    rows = 112 // (14 if "eva" in name else 16)
    larger = write(tmp_path, "larger.json", at(config, [112, 224]))
    for model, size in ((tmp_path / "trained.json", (112, 224)), (larger, None)):
        loaded = load_dual_encoder(model, tmp_path / "weights.pt", image_size=size)
        assert loaded.image_at_layer().grid == (rows, 2 * rows)
        assert embeddings(loaded)[0].shape == (2, 192)
        assert torch.equal(embeddings(loaded)[1], embeddings(encoder)[1])
    save_open_clip(loaded, tmp_path / "larger.safetensors")
    again = load_dual_encoder(tmp_path / "larger.json", tmp_path / "larger.safetensors")
    assert all(map(torch.equal, embeddings(again), embeddings(loaded)))


# ---- layouts


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DualEncoder]:
    """A config, and an encoder with weights."""
    folder = tmp_path_factory.mktemp("source")
    return folder / "trained.json", trained(folder, {"model_cfg": VIT, "preprocess_cfg": HALF})


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value.contiguous() for key, value in state.items()}


LAYOUTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "module": lambda state: prefixed(state, "module."),
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "parallel of compiled": lambda state: prefixed(state, "module._orig_mod."),
    "compiled of parallel": lambda state: prefixed(state, "_orig_mod.module."),
    "compiled tower": lambda state: {
        key.replace("visual.", "visual._orig_mod.", 1): value for key, value in state.items()
    },
    "lightning": lambda state: {"state_dict": prefixed(state, "model."), "pytorch-lightning_version": "2.6"},
    "lightning of compiled": lambda state: {"state_dict": prefixed(state, "model._orig_mod.")},
    "epoch of open_clip": lambda state: {"epoch": 3, "state_dict": prefixed(state, "module."), "optimizer": {}},
    "model": lambda state: {"model": state, "epoch": 1},
    "model_state_dict": lambda state: {"model_state_dict": state},
    "scale of one dimension": lambda state: state | {"logit_scale": state["logit_scale"][None]},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_usual_layout_of_weights_loads(layout: str, source: tuple[Path, DualEncoder], tmp_path: Path) -> None:
    config, encoder = source
    torch.save(LAYOUTS[layout](encoder.model.state_dict()), tmp_path / "weights.pt")
    loaded = load_dual_encoder(config, tmp_path / "weights.pt").eval()
    assert all(map(torch.equal, embeddings(loaded), embeddings(encoder)))


@pytest.mark.parametrize("prefix", ["net.", "net.module.clip.", "_orig_mod.student."])
def test_a_prefix_of_all_names_is_left_out_with_a_word(
    prefix: str, source: tuple[Path, DualEncoder], tmp_path: Path
) -> None:
    config, encoder = source
    torch.save(prefixed(encoder.model.state_dict(), prefix), tmp_path / "weights.pt")
    left_out = prefix.removeprefix("_orig_mod.")
    with pytest.warns(UserWarning, match=f"weights.pt: all names begin with '{left_out}', which was left out"):
        loaded = load_dual_encoder(config, tmp_path / "weights.pt").eval()
    assert all(map(torch.equal, embeddings(loaded), embeddings(encoder)))


def test_a_resnet_of_clip_asks_for_square_images(architecture_file: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"takes square images only: set image_size to one number, such as 96; got"):
        load_dual_encoder(architecture_file("resnet"), image_size=(64, 96))


def test_the_content_of_a_file_decides_not_its_name(source: tuple[Path, DualEncoder], tmp_path: Path) -> None:
    config, encoder = source
    save_file(prefixed(encoder.model.state_dict(), "module."), tmp_path / "weights.bin")
    loaded = load_dual_encoder(config, tmp_path / "weights.bin").eval()
    assert all(map(torch.equal, embeddings(loaded), embeddings(encoder)))


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_archive_is_read_without_running_its_code(
    source: tuple[Path, DualEncoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, encoder = source
    traced = torch.jit.trace_module(  # type: ignore[no-untyped-call]
        encoder.model,
        {"forward": (torch.randn(1, *encoder.image_shape), encoder.tokenizer.encode(["a red ring"]))},
        check_trace=False,
        strict=False,
    )
    torch.jit.save(traced, str(tmp_path / "archive.pt"))
    monkeypatch.setattr(torch.jit, "load", None)
    loaded = load_dual_encoder(config, tmp_path / "archive.pt").eval()
    assert all(map(torch.equal, embeddings(loaded), embeddings(encoder)))
    content = (tmp_path / "archive.pt").read_bytes()
    # Any other name in the archive's pickle than those of tensors and modules is refused before it stands for anything.
    (tmp_path / "hostile.pt").write_bytes(content.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v9"))
    with pytest.raises(ValueError, match=r"TorchScript archive whose tensors cannot be read"):
        load_dual_encoder(config, tmp_path / "hostile.pt")


def test_files_that_hold_no_weights_say_what_they_are(source: tuple[Path, DualEncoder], tmp_path: Path) -> None:
    config, encoder = source
    state = encoder.model.state_dict()
    (tmp_path / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 5\n")
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=1)}, tmp_path / "namespace.pt")
    torch.save(encoder.model, tmp_path / "module.pt")
    torch.save(state | prefixed(state, "module."), tmp_path / "twice.pt")
    cases = {
        "pointer.pt": "is a Git LFS pointer.*git lfs pull",
        "namespace.pt": r"cannot be read as plain tensors \(it holds argparse.Namespace\)",
        "module.pt": r"cannot be read as plain tensors \(it holds \S+\.\S+,",
        "twice.pt": "holds weights twice",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            load_dual_encoder(config, tmp_path / name)
        assert "weights_only" not in str(caught.value)


# ---- open_clip's folders and the hub


def save_folder(encoder: DualEncoder, folder: Path) -> Path:
    config = {"model_cfg": encoder.architecture["model_cfg"], "preprocess_cfg": encoder.preprocessing}
    write(folder, "open_clip_config.json", config)
    torch.save(encoder.model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def test_an_open_clip_folder_is_a_model(source: tuple[Path, DualEncoder], tmp_path: Path) -> None:
    encoder = source[1]
    folder = save_folder(encoder, tmp_path / "published")
    for name in (str(folder), f"local-dir:{folder}"):
        loaded = load_dual_encoder(name).eval()
        assert all(map(torch.equal, embeddings(loaded), embeddings(encoder)))
        assert loaded.preprocessing == encoder.preprocessing
        assert loaded.name == "published"
    with pytest.raises(ValueError, match="brings its own weights"):
        load_dual_encoder(folder, "openai")
    (folder / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"published holds no weights"):
        load_dual_encoder(folder)
    with pytest.raises(ValueError, match="there is no such folder"):
        load_dual_encoder("local-dir:nowhere")
    with pytest.raises(ValueError, match=r"is no open_clip folder: it lacks open_clip_config\.json"):
        load_dual_encoder(tmp_path)


def test_a_name_on_the_hub_is_read_from_the_cache(
    source: tuple[Path, DualEncoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = source[1]
    repository = tmp_path / "models--somebody--clip"
    save_folder(encoder, repository / "snapshots" / "0123abc")
    write(repository / "refs", "main", None).write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    loaded = load_dual_encoder("hf-hub:somebody/clip").eval()
    assert all(map(torch.equal, embeddings(loaded), embeddings(encoder)))
    assert loaded.preprocessing == encoder.preprocessing
    with pytest.raises(ValueError, match=r"hf-hub:somebody/else: open_clip_config\.json could not be fetched"):
        load_dual_encoder("hf-hub:somebody/else")


def archive_of(content: bytes, path: Path) -> Path:
    """A TorchScript archive with this pickle, and four bytes of data."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/constants.pkl", b"\x80\x02).")
        archive.writestr("a/data/0", b"\0\0\0\0")
    return path


def test_an_archives_pickle_can_neither_change_what_it_names_nor_make_a_tensor_larger_than_its_data(
    source: tuple[Path, DualEncoder], tmp_path: Path
) -> None:
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    cases = {
        "state of a function": rebuild + b"}b.",
        "state of a storage": storage + b"(K\x00K\x00tb.",
        "state of a tensor": rebuild + b"(" + storage + b"K\x00K\x01\x85K\x01\x85\x89NtR(K\x00K\x00tb.",
        "stride of zero": rebuild + b"(" + storage + b"K\x00M\xe8\x03\x85K\x00\x85\x89NtR.",
        "another name": b"cposix\nsystem\n(X\x04\x00\x00\x00truetR.",
    }
    for name, content in cases.items():
        path = archive_of(b"\x80\x02" + content, tmp_path / f"{name.replace(' ', '_')}.pt")
        with pytest.raises(ValueError, match="TorchScript archive whose tensors cannot be read") as caught:
            load_dual_encoder(source[0], path)
        assert re.search("changes what is no module|leaves its storage|holds a posix.system", str(caught.value)), name


def test_sizes_activations_and_names_that_contradict_are_refused(
    source: tuple[Path, DualEncoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"no whole number of patches of 8 pixels.*give \[48, 32\]"):
        load_dual_encoder(source[0], image_size=(50, 30))
    with pytest.raises(ValueError, match="image_std has to be positive"):
        load_dual_encoder(source[0], image_std=(0.0, 0.1, 0.1))
    with pytest.raises(ValueError, match="were trained with quick_gelu=True: leave the option out"):
        load_dual_encoder("ViT-B-16-quickgelu", "openai", quick_gelu=False)
    plain = settled(built_in_architecture("ViT-B-32-quickgelu"), ModelOptions(quick_gelu=False))
    assert (plain["name"], plain["model_cfg"]) == ("ViT-B-32", built_in_architecture("ViT-B-32")["model_cfg"])
    # A folder that happens to have a model's name does not stand for it.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32", VIT)
    (tmp_path / "ViT-B-32").mkdir()
    assert load_dual_encoder("ViT-B-32").name == "ViT-B-32"
    inner = source[1].model.state_dict() | {"head.weight": torch.zeros(1)}
    torch.save(prefixed(inner, "clip."), tmp_path / "inner.pt")
    with pytest.raises(ValueError, match="All names begin with 'clip': save the state_dict of that part alone"):
        load_dual_encoder(source[0], tmp_path / "inner.pt")
