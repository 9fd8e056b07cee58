"""Zero-shot classification against open_clip's own classifier, and what cannot be classified."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from image_files import HTML, jpeg
from open_clip.transform import PreprocessCfg, image_transform_v2
from torchvision import datasets

from lightning_xai.data.image_folder import ImageFolder
from lightning_xai.data.shape_classes import prepare_shape_classes
from lightning_xai.evaluation.zero_shot import ZeroShot, class_names, zero_shot_classifier
from lightning_xai.models import DualEncoder

TEMPLATES = ["a picture of a {}", "we see a {}"]


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 32 classes of shapes, with 2 images each."""
    folder = tmp_path_factory.mktemp("classes") / "shapes"
    prepare_shape_classes(folder, 2)
    return folder


def folder_of(root: Path, **files: bytes) -> Path:
    """A folder of images by `CLASS_NAME=content`."""
    for name, content in files.items():
        path = root / name.partition("_")[0] / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


@pytest.mark.parametrize("templates", ["openai", "simple", TEMPLATES])
def test_the_classifier_is_that_of_open_clip(make_encoder: Callable[..., DualEncoder], templates: Any) -> None:
    encoder, names = make_encoder(), ["red ring", "orange star", "blue cross"]
    theirs = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}
    given = templates if isinstance(templates, list) else theirs[templates]
    tokenizer = encoder.tokenizer.tokenizer
    expected = open_clip.build_zero_shot_classifier(encoder.model, tokenizer, names, given)
    found = zero_shot_classifier(encoder, names, given, batch_size=5)
    torch.testing.assert_close(found.T, expected, rtol=0, atol=1e-6)


def test_accuracy_is_that_of_a_loop_with_open_clip_and_torchvision(
    make_encoder: Callable[..., DualEncoder], classes: Path
) -> None:
    encoder = make_encoder()
    config = PreprocessCfg(**encoder.model.visual.preprocess_cfg)
    images = datasets.ImageFolder(classes, transform=image_transform_v2(config, is_train=False))
    names = [name.replace("_", " ") for name in images.classes]
    classifier = open_clip.build_zero_shot_classifier(encoder.model, encoder.tokenizer.tokenizer, names, TEMPLATES)
    hits = hits_top = 0
    for image, label in images:
        with torch.no_grad():
            logits = 100 * encoder.model.encode_image(image[None], normalize=True)[0] @ classifier
        order = logits.argsort(descending=True).tolist()
        hits += order[0] == label
        hits_top += label in order[:5]
    assert 0 < hits < hits_top < 64
    found = ZeroShot(classes, templates=TEMPLATES, batch_size=50, num_workers=0).measure(encoder)
    assert (found.images, found.hits, found.hits_top, found.skipped) == (64, hits, hits_top, 0)


def test_images_are_those_that_torchvision_finds(tmp_path: Path) -> None:
    root = folder_of(tmp_path, b_2=jpeg(), b_1=jpeg(), a_1=jpeg())
    (root / "b" / "deeper").mkdir()
    (root / "b" / "deeper" / "0.JPG").write_bytes(jpeg())
    (root / "b" / "notes.txt").write_text("none")
    theirs = [(Path(path), number) for path, number in datasets.ImageFolder(root).imgs]
    assert sorted(ImageFolder.of(root).images) == sorted(theirs)


def test_images_that_do_not_decode_are_counted_and_named(
    make_encoder: Callable[..., DualEncoder], tmp_path: Path
) -> None:
    root = folder_of(tmp_path, a_1=jpeg(), a_2=HTML, b_1=jpeg(), b_2=jpeg()[:300])
    found = ZeroShot(root, batch_size=1, num_workers=0).measure(make_encoder())
    assert (found.images, found.skipped, found.hits_top) == (2, 2, None)
    assert [str(root / name) in reason for name, reason in zip(["a/a_2.jpg", "b/b_2.jpg"], found.reasons, strict=True)]


def test_measuring_leaves_modes_gradients_and_random_numbers_as_they_were(
    make_encoder: Callable[..., DualEncoder], classes: Path
) -> None:
    encoder = make_encoder().train()
    encoder.model.visual.eval()
    modes = [module.training for module in encoder.modules()]
    state = torch.get_rng_state()
    ZeroShot(classes, templates=TEMPLATES, num_workers=0).measure(encoder)
    assert [module.training for module in encoder.modules()] == modes
    assert all(parameter.grad is None and parameter.requires_grad for parameter in encoder.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_names_come_from_a_mapping_a_file_or_imagenet(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("n01\ttench, Tinca tinca\nn02 goldfish\n\n")
    assert class_names(["n01", "n02"], file) == ["tench, Tinca tinca", "goldfish"]
    assert class_names([f"n{i:03d}" for i in range(1000)], "imagenet")[0] == "tench"
    with pytest.raises(ValueError, match="1000 folders of ImageNet; there are 2"):
        class_names(["n01", "n02"], "imagenet")
    with pytest.raises(ValueError, match="1 of 2 folders have no name, such as 'n03'"):
        class_names(["n01", "n03"], file)
    with pytest.raises(ValueError, match="expected imagenet, a mapping"):
        class_names(["n01"], tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, {}, "at least two classes; found 0"),
        ({"a_1": jpeg()}, {}, "at least two classes; found 1"),
        ({"a_1": HTML, "b_1": HTML}, {}, "none of the classes' first images can be read"),
        ({"a_1": jpeg(), "b_1": jpeg()}, {"templates": ["a photo"]}, "texts with {} where .* got 'a photo'"),
        ({"a_1": jpeg(), "b_1": jpeg()}, {"templates": []}, "got 'none'"),
        ({"a_1": jpeg(), "b_1": jpeg()}, {"templates": "clip"}, "expected openai, simple, or texts with"),
        ({"a_1": jpeg(), "b_1": jpeg()}, {"batch_size": 0}, "batch_size has to be at least 1"),
    ],
)
def test_what_cannot_be_classified_is_refused(
    tmp_path: Path, files: dict[str, bytes], options: dict[str, Any], message: str
) -> None:
    root = folder_of(tmp_path, **files)
    with pytest.raises(ValueError, match=message):
        ZeroShot(root, **options)


def test_folders_without_images_or_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such folder"):
        ZeroShot(tmp_path / "none")
    root = folder_of(tmp_path, a_1=jpeg(), b_1=jpeg())
    (root / "c").mkdir()
    with pytest.raises(ValueError, match=r"1 of 3 classes have no image .* such as c"):
        ZeroShot(root)


@pytest.mark.parametrize("tower", ["visual.conv1.weight", "token_embedding.weight"])
def test_embeddings_that_are_not_finite_are_an_error(
    make_encoder: Callable[..., DualEncoder], classes: Path, tower: str
) -> None:
    encoder = make_encoder()
    with torch.no_grad():
        encoder.model.get_parameter(tower).fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        ZeroShot(classes, templates=TEMPLATES, num_workers=0).measure(encoder)
