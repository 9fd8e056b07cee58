"""Fixtures that several folders of tests share: small models with real architectures, and small real shards."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import open_clip
import pytest
import torch
from captioned_shards import make_shards
from open_clip.tokenizer import SimpleTokenizer

from lightning_xai.data import CaptionTokenizer
from lightning_xai.data.shapes import prepare_shapes
from lightning_xai.models import DualEncoder, load_dual_encoder

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# Many short tests run best without threads that wait for each other, most of all where something else runs as well.
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Under `pytest -n`, a worker takes tests in their order, since those of a file share what takes long to make.

    One that has none left takes from another's end, so that no worker waits for the longest file.
    """
    if config.getoption("dist", "no") == "load":
        config.option.dist = "worksteal"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Workers of `pytest -n auto`: each takes up to 4 GB, and a few long tests leave more than four nothing to do."""
    return min(os.cpu_count() or 1, 4)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests go first, and their files: the last would otherwise run alone while all other workers have ended."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 3}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vit": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 8, "patch_size": 8},
        "text_cfg": TEXT,
    },
    "resnet": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64},
        "text_cfg": TEXT,
    },
    # Every variant of a block that the shortcut for the last one has to get right, or leave to the general path.
    "vit_layer_scale_quick_gelu": {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16, "ls_init_value": 0.5,
        },
        "text_cfg": TEXT | {"ls_init_value": 0.5},
    },
    "vit_average_pool": {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 16, "pool_type": "avg",
        },
        "text_cfg": TEXT | {"pool_type": "last"},
    },
    "vit_custom_block": {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 16, "qk_norm": True,
        },
        "text_cfg": TEXT | {"scale_fc": True},
    },
}  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def merges_are_read_once() -> Iterator[None]:
    """Read the 49,000 merges of open_clip's tokenizer once, and not for each model, an eighth of a second."""
    original, made = SimpleTokenizer.__init__, dict[str, dict[str, Any]]()

    def init(self: SimpleTokenizer, *arguments: Any, **options: Any) -> None:
        key = repr((type(self), arguments, options))
        if key not in made:
            original(self, *arguments, **options)
            made[key] = dict(self.__dict__)
        self.__dict__ |= made[key]  # tables are shared: nothing changes them

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimpleTokenizer, "__init__", init)
        yield


@pytest.fixture
def names_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let open_clip forget, when the test is over, the names of models that are given to it."""
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))


@pytest.fixture(scope="session")
def architecture_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The path of a JSON model config, by its name in ARCHITECTURES."""
    folder = tmp_path_factory.mktemp("architectures")

    def write(name: str) -> Path:
        path = folder / f"{name}.json"
        path.write_text(json.dumps(ARCHITECTURES[name]))
        return path

    return write


def randomised(encoder: DualEncoder, seed: int = 0) -> DualEncoder:
    """Replace what initialisation leaves at zero or one (norms, biases), where mistakes would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in encoder.model.named_parameters():
            if parameter.ndim <= 1 and name != "logit_scale":
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
        if any(isinstance(module, torch.nn.BatchNorm2d) for module in encoder.modules()):
            # Batch statistics that fit the weights; otherwise activations shrink to nothing from layer to layer.
            visual: Any = encoder.model.visual
            visual.train()
            for _ in range(20):
                encoder.encode_image(torch.randn(8, 3, *encoder.image_transform.size, generator=generator))
            visual.eval()
    return encoder


def encoder_from(config: dict[str, Any], folder: Path, dtype: torch.dtype = torch.float64) -> DualEncoder:
    """A randomised encoder in evaluation mode, by its model config."""
    path = folder / "model.json"
    path.write_text(json.dumps(config))
    torch.manual_seed(0)
    return randomised(load_dual_encoder(path)).to(dtype).eval()


@pytest.fixture
def make_encoder(architecture_file: Callable[[str], Path]) -> Callable[..., DualEncoder]:
    """Build a randomised small encoder in evaluation mode, by the name of its architecture."""

    def make(name: str = "vit", dtype: torch.dtype = torch.float32, seed: int = 0) -> DualEncoder:
        torch.manual_seed(seed)
        return randomised(load_dual_encoder(architecture_file(name)), seed).to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small world of shapes: `train` with 96 images and `val` with 40."""
    root = tmp_path_factory.mktemp("shapes") / "shapes"
    prepare_shapes(root, 96, 40)
    return root


@pytest.fixture
def one_core() -> Iterator[None]:
    """Inside, this thread may run on one core alone."""
    if not hasattr(os, "sched_setaffinity") or os.cpu_count() == 1:
        pytest.skip("there is no choice of cores")
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    yield
    os.sched_setaffinity(0, allowed)


@pytest.fixture(scope="session")
def tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer(open_clip.get_tokenizer("ViT-B-32"))


@pytest.fixture(scope="session")
def coco_mini() -> Path:
    """A folder with a few real COCO images and the official annotation files cut to them."""
    path = os.environ.get("LIGHTNING_XAI_COCO")
    if not path or not Path(path).is_dir():
        pytest.skip("LIGHTNING_XAI_COCO names no folder with COCO files (annotations/, train2017/, val2017/)")
    return Path(path)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """57 small captioned images in 6 shards."""
    return make_shards(tmp_path_factory.mktemp("shards") / "s57", 57)


@pytest.fixture(scope="session")
def one_shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 small captioned images in 1 shard."""
    return make_shards(tmp_path_factory.mktemp("shards") / "s23", 23, per_shard=100)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The installed Chromium; none is downloaded."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium is installed")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()
