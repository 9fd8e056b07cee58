from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from image_files import jpeg
from source_files import SourceTests, World
from training_runs import Recorder, task_of, trainer_in

from lightning_xai.data import CaptionTokenizer, Exclusion, ImageTransform, Sample, ShardDataModule
from lightning_xai.data.batch import EvaluationCollate
from lightning_xai.data.sample import HardNegative
from lightning_xai.training.objectives import Grounding, HardNegativeText

MAN = ("1001", "man", (10, 20, 30, 40))
CAR = ("1002", "car", (50, 10, 40, 30))
TREE = ("1003", "tree", (0, 0, 10, 60))
TYPES = "relation_subj+relation_obj"


def boxes(*objects: tuple[str, str, tuple[int, ...]]) -> dict[str, Any]:
    """The objects of a caption as HNC has them."""
    return {key: {"bbox": dict(zip("xywh", box, strict=True)), "name": name} for key, name, box in objects}


def caption(text: Any, bboxes: Any, kind: str = "relation_obj", **changes: Any) -> dict[str, Any]:
    """A true caption, or with `label=0` a hard negative, with all fields of HNC's own code."""
    fields = {"caption": text, "label": 1, "type": kind, "textual_label": None, "bboxes": bboxes, "ambiguity": {}}
    return {**fields, "noisy": None, "replaced": None, "cpt_p_id": None, **changes}


def swap(original: str, replacement: str, positive: int) -> dict[str, Any]:
    """What makes a caption a hard negative of the caption `positive`."""
    return {"label": 0, "replaced": [original, replacement], "cpt_p_id": positive}


class HncWorld(World):
    source = "hnc"
    advice = "Check that it is HNC's file"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.records: dict[str, Any] = {}
        self.graphs: dict[str, Any] | None = None

    def add(self, image_id: str, *captions: Any, data: bytes | None = None) -> None:
        self.records[image_id] = {"captions": {str(number): record for number, record in enumerate(captions)}}
        (self.images / f"{image_id}.jpg").write_bytes(jpeg((100, 80)) if data is None else data)

    def refer_to(self, name: str) -> None:
        self.records[name.removesuffix(".jpg")] = {"captions": {"0": TRUE}}

    def entries(self) -> int:
        return len(self.records)

    def options(self) -> dict[str, Any]:
        captions = self.json("hnc_clean_strict_val.json", self.records)
        options = {"images": self.images, "captions": captions, "split": "val", "types": TYPES}
        if self.graphs is not None:
            options["scene_graphs"] = self.json("val_sceneGraphs.json", self.graphs)
        return options


TRUE = caption("The man is near the car.", boxes(MAN, CAR), textual_label="car")
WRONG = {**caption("The man is near the tree.", boxes(MAN, TREE, CAR)), **swap("car", "tree", 0)}


@pytest.fixture
def world(tmp_path: Path) -> HncWorld:
    world = HncWorld(tmp_path)
    subject = caption("The tree is behind the man.", boxes(TREE, MAN), "relation_subj")
    world.add("2370799", TRUE, WRONG, subject)
    return world


class TestSource(SourceTests):
    pass


def words(sample: Sample, label: str) -> list[tuple[int, str]]:
    """The captions, by index, and words that name a class."""
    (spans,) = {json.dumps(region.spans) for region in sample.regions if region.label == label}
    return [
        (int(index), sample.captions[int(index)][slice(*span)])
        for index, found in json.loads(spans).items()
        for span in found
    ]


def replaced(sample: Sample) -> list[tuple[str, str, str, str]]:
    """The class, the true words, the new ones, and the true caption of each hard negative."""
    return [
        (
            sample.regions[negative.region].label,
            sample.captions[negative.caption][slice(*negative.true_span)],
            negative.text[slice(*negative.span)],
            sample.captions[negative.caption],
        )
        for negative in sample.negatives
    ]


def test_true_captions_objects_and_hard_negatives_of_an_image(world: HncWorld) -> None:
    (sample,), excluded = world.read()
    assert excluded == {}
    assert (sample.key, sample.size, sample.source) == ("2370799", (100, 80), "hnc/val/2370799.jpg")
    assert sample.captions == ("The man is near the car.", "The tree is behind the man.")
    assert [(region.label, region.box, region.entity) for region in sample.regions] == [
        ("man", (10, 20, 30, 40), ""),
        ("car", (50, 10, 40, 30), ""),
        ("tree", (0, 0, 10, 60), ""),
    ]
    assert words(sample, "man") == [(0, "man"), (1, "man")]
    assert words(sample, "car") == [(0, "car")]
    assert words(sample, "tree") == [(1, "tree")]
    assert sample.negatives == (HardNegative("The man is near the tree.", (20, 24), 0, (20, 23), region=1),)


def test_shards_give_phrases_and_negatives_that_their_tokens_spell(world: HncWorld) -> None:
    manifest, stored = world.prepare()
    assert manifest.labels == ("car", "man", "tree")
    tokenizer = CaptionTokenizer(open_clip.get_tokenizer("ViT-B-32"))
    batch = EvaluationCollate(ImageTransform(size=(40, 40)), tokenizer, manifest.labels)([(0, stored[0])])
    phrases, negatives = batch.phrases, batch.negatives
    spelled = [
        tokenizer.decode(batch.tokens[row][mask])
        for row, mask in zip(phrases.caption_row, phrases.span_mask, strict=True)
    ]
    assert spelled == ["car", "man", "man", "tree"]
    reasons = [Exclusion(int(reason)) for reason in phrases.reason]
    assert reasons == [Exclusion.MEASURED] * 3 + [Exclusion.OUTSIDE_CROP]  # 10 pixels at the left are cropped
    assert torch.allclose(phrases.boxes[0], torch.tensor([20.0, 5.0, 40.0, 20.0]))
    assert negatives is not None
    assert tokenizer.decode(negatives.tokens[0][negatives.mask[0]]) == "tree"
    assert tokenizer.decode(batch.tokens[negatives.caption_row[0]][negatives.true_mask[0]]) == "car"
    assert torch.equal(negatives.boxes[0], phrases.boxes[0])


def test_names_are_found_as_whole_words_and_the_longest_counts(world: HncWorld) -> None:
    door = ("7", "car door", (1, 1, 5, 5))
    text = "The woman, the manager and the man are near the car door of the car, Man."
    world.add("2", caption(text, boxes(door, CAR, MAN)))
    signs = "t-shirt (red)"
    world.add("3", caption(f"The {signs} is near the c++.", boxes(("1", signs, (1, 1, 5, 5)))))
    (_, sample, other), _ = world.read()
    assert words(other, signs) == [(0, signs)]
    assert words(sample, "man") == [(0, "man")]
    assert words(sample, "car door") == [(0, "car door")]
    assert sample.regions[1].spans == {0: ((text.index("car,"), text.index("car,") + 3),)}


def test_two_objects_of_one_name_are_two_instances_also_where_other_captions_name_them(world: HncWorld) -> None:
    other = caption("There are two men.", boxes(("9", "man", (60, 20, 5, 5))), "obj_count")
    world.add("2", TRUE, other)
    samples, excluded = world.read()
    assert [region.label for region in samples[1].regions] == ["man", "car", "man"]
    assert words(samples[1], "man") == [(0, "man")]
    assert excluded == {"caption_of_other_type": 1}


def graph(*objects: tuple[str, str, tuple[int, ...]], size: tuple[int, int] = (100, 80)) -> dict[str, Any]:
    """A scene graph as GQA has it."""
    return {
        "width": size[0],
        "height": size[1],
        "location": "street",
        "objects": {
            key: {"name": name, **dict(zip("xywh", box, strict=True)), "attributes": [], "relations": []}
            for key, name, box in objects
        },
    }


def test_scene_graphs_add_the_objects_that_no_caption_mentions(world: HncWorld) -> None:
    man = ("1001", "man", (11, 20, 30, 40))  # not as in the captions: the scene graph is what they were made from
    world.graphs = {"2370799": graph(man, CAR, ("8", "car", (0, 0, 3, 3)), ("9", "dog", (5, 5, 5, 5)))}
    world.add("2", TRUE)
    samples, excluded = world.read()
    assert [region.label for region in samples[0].regions] == ["man", "car", "car", "dog", "tree"]
    assert samples[0].regions[0].box == (11.0, 20.0, 30.0, 40.0)
    assert samples[0].negatives[0].region == 1
    assert excluded == {"scene_graph_missing": 1}


@pytest.mark.parametrize(
    ("orientation", "size", "box"), [(6, (100, 80), (20, 10, 40, 30)), (6, (80, 100), (10, 20, 30, 40))]
)
def test_scene_graphs_say_which_way_up_an_image_was_annotated(
    world: HncWorld, orientation: int, size: tuple[int, int], box: tuple[int, ...]
) -> None:
    world.add("2370799", TRUE, data=jpeg((100, 80), orientation=orientation))
    world.graphs = {"2370799": graph(MAN, CAR, size=size)}
    (sample,), _ = world.read(types="relation_obj")
    assert sample.size == (80, 100)
    assert sample.regions[0].box == box


def test_types_are_chosen(world: HncWorld) -> None:
    (sample,), excluded = world.read(types="relation_subj")
    assert sample.captions == ("The tree is behind the man.",)
    assert excluded == {"caption_of_other_type": 2}
    assert world.read(types="all") == world.read()


@pytest.mark.parametrize("types", ["relation", "relation_obj+", "", "relation_obj+relation_pred"])
def test_a_type_that_does_not_occur_is_an_error_that_lists_those_that_do(world: HncWorld, types: str) -> None:
    with pytest.raises(ValueError, match=r"has no captions of type .* it has \['relation_obj', 'relation_subj'\]"):
        world.read(types=types)


def test_the_verb_may_agree_with_what_is_replaced(world: HncWorld) -> None:
    men = ("5", "men", (1, 1, 5, 5))
    world.add(
        "2",
        caption("The man is near the car.", boxes(MAN, CAR), "relation_subj"),
        {**caption("The men are near the car.", boxes(MAN, men, CAR), "relation_subj"), **swap("man", "men", 0)},
        caption("There are men near the car.", boxes(men, CAR)),
        {**caption("There is man near the car.", boxes(MAN, men)), **swap("men", "man", 2)},
        caption("The men are near the car.", boxes(men, CAR), "relation_subj"),
        {**caption("The man is near the car.", boxes(MAN, men, CAR), "relation_subj"), **swap("men", "man", 4)},
    )
    samples, excluded = world.read()
    assert excluded == {}
    assert replaced(samples[1]) == [
        ("man", "man", "men", "The man is near the car."),
        ("men", "men", "man", "There are men near the car."),
        ("men", "men", "man", "The men are near the car."),
    ]


def test_the_place_that_was_replaced_is_found_where_the_word_comes_twice(world: HncWorld) -> None:
    world.add(
        "2",
        caption("The car is near the car park.", boxes(CAR)),
        {**caption("The tree is near the car park.", boxes(CAR)), **swap("car", "tree", 0)},
    )
    samples, _ = world.read()
    (negative,) = samples[1].negatives
    assert (negative.true_span, negative.span) == ((4, 7), (4, 8))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cpt_p_id": 7}, "negative_without_positive"),
        ({"cpt_p_id": None}, "negative_without_positive"),
        ({"cpt_p_id": 1}, "negative_without_positive"),
        ({"replaced": None}, "negative_malformed"),
        ({"replaced": "ab"}, "negative_malformed"),
        ({"replaced": ["car"]}, "negative_malformed"),
        ({"replaced": ["car", ""]}, "negative_malformed"),
        ({"replaced": ["car", 3]}, "negative_malformed"),
        ({"replaced": ["car", "car"]}, "negative_malformed"),
        ({"replaced": ["near", "behind"], "caption": "The man is behind the car."}, "negative_of_no_object"),
        ({"replaced": ["man", "tree"]}, "negative_differs_elsewhere"),
        ({"caption": "The man was near the tree."}, "negative_differs_elsewhere"),
        ({"caption": "The man is near the treetop."}, "negative_differs_elsewhere"),
    ],
)
def test_bad_negatives_are_counted_and_the_rest_survives(world: HncWorld, changes: dict[str, Any], reason: str) -> None:
    world.add("2", TRUE, {**WRONG, **changes}, WRONG)
    samples, excluded = world.read()
    assert len(samples[1].negatives) == 1
    assert excluded == {reason: 1}


def test_a_negative_needs_one_object_with_a_box(world: HncWorld) -> None:
    world.add("2", caption("The man is near the car.", boxes(MAN, CAR, ("8", "car", (0, 0, 5, 5)))), WRONG)
    world.add("3", caption("The man is near the car.", boxes(MAN, ("8", "car", (0, 0, 0, 5)))), WRONG)
    samples, excluded = world.read()
    assert [sample.negatives for sample in samples[1:]] == [(), ()]
    assert excluded == {"negative_of_several_objects": 1, "negative_without_box": 1, "box_without_area": 1}


def test_malformed_captions_are_counted_and_the_rest_survives(world: HncWorld) -> None:
    wrong = [caption(None, {}), caption("  ", {}), *(caption("A man.", {}, label=label) for label in (2, [1]))]
    records = [None, "The man is near the car.", *wrong, caption("A man.", {}, type=None)]
    world.add("2", *records, TRUE)
    samples, excluded = world.read()
    assert samples[1].captions == ("The man is near the car.",)
    assert excluded == {"caption_malformed": len(records)}


@pytest.mark.parametrize(
    ("bboxes", "reason"),
    [
        ({"1": {"name": None, "bbox": {"x": 1, "y": 1, "w": 5, "h": 5}}}, "object_malformed"),
        ({"1": {"name": " ", "bbox": [1, 1, 5, 5]}}, "object_malformed"),
        ([[1, 1, 5, 5]], "object_malformed"),
        ("man", "object_malformed"),
        ({"1": {"name": "man"}}, "box_malformed"),
        ({"1": {"name": "man", "bbox": {"x": 1, "y": 1, "w": 5}}}, "box_malformed"),
        ({"1": {"name": "man", "bbox": "1234"}}, "box_malformed"),
        ({"1": {"name": "man", "bbox": [1, 1, 5, float("nan")]}}, "box_malformed"),
        ({"1": {"name": "man", "bbox": [1, 1, 5, 0]}}, "box_without_area"),
        ({"1": {"name": "man", "bbox": [100, 1, 5, 5]}}, "box_outside_image"),
    ],
)
def test_bad_objects_are_counted_and_the_caption_survives(world: HncWorld, bboxes: Any, reason: str) -> None:
    world.add("2", caption("The man is near the car.", bboxes))
    samples, excluded = world.read()
    assert samples[1].captions == ("The man is near the car.",)
    instances = [] if reason == "object_malformed" else [("man", None)]
    assert [(region.label, region.box) for region in samples[1].regions] == instances
    assert excluded == {reason: 1}


def test_objects_of_a_malformed_caption_are_instances_all_the_same(world: HncWorld) -> None:
    other = {"9": {"name": "man", "bbox": [1, 1, 5, 5]}}
    world.add("2", TRUE, {"type": "relation_obj", "bboxes": other})
    samples, excluded = world.read()
    assert [region.label for region in samples[1].regions].count("man") == 2
    assert excluded == {"caption_malformed": 1}


@pytest.mark.parametrize(
    "bboxes",
    [
        [{"name": "man", "bbox": [-5, 20, 30, 40]}],
        [{"name": "man", "bbox": {"x": "-5", "y": 20, "width": 30, "height": 40}}],
        {"man": [-5, 20, 30, 40]},
        {"man": {"x": -5, "y": 20, "w": 30, "h": 40}},
    ],
)
def test_other_forms_of_boxes_are_read_and_clipped(world: HncWorld, bboxes: Any) -> None:
    records = caption("The man is near the car.", bboxes), caption("The man is big.", bboxes, label=True)
    world.add("2", *records)
    world.records["2"] = world.records["2"]["captions"]
    samples, excluded = world.read()
    assert [(region.label, region.box) for region in samples[1].regions] == [("man", (0, 20, 25, 40))]
    assert words(samples[1], "man") == [(0, "man"), (1, "man")]
    assert excluded == {}


def test_bad_images_are_counted_and_the_rest_survives(world: HncWorld) -> None:
    world.add("2", TRUE)
    (world.images / "2.jpg").unlink()
    world.add("3", TRUE, data=b"<html>404</html>")
    world.add("4", WRONG)
    world.add("5", TRUE, data=jpeg((99, 80)))
    world.add("6", TRUE)
    (world.images / "6.jpg").rename(world.images / "VG_100K_2.jpg")
    (world.images / "VG_100K_2").mkdir()
    (world.images / "VG_100K_2.jpg").rename(world.images / "VG_100K_2" / "6.jpg")
    world.records |= {"7": "captions", "8": {"captions": [TRUE]}}
    world.graphs = {name: graph(MAN) for name in ("2370799", "5", "6")}
    samples, excluded = world.read()
    assert [sample.source for sample in samples] == ["hnc/val/2370799.jpg", "hnc/val/VG_100K_2/6.jpg"]
    assert excluded == {
        "image_missing": 1,
        "image_does_not_decode": 1,
        "image_without_caption": 1,
        "size_mismatch": 1,
        "image_record_malformed": 2,
    }


def test_a_missing_file_of_scene_graphs_is_named(world: HncWorld) -> None:
    with pytest.raises(FileNotFoundError, match=r"^scene_graphs: .*nowhere"):
        world.read(scene_graphs=world.folder / "nowhere")


def test_another_kind_of_file_is_an_error_that_says_so(world: HncWorld) -> None:
    world.records = {"images": [], "annotations": [{"id": 1}]}
    with pytest.raises(ValueError, match="Is it HNC's file"):
        world.read()
    with pytest.raises(ValueError, match=r"image_record_malformed.*Check that it is HNC's file"):
        world.read(types="all")


def test_its_hard_negatives_train_a_model(
    world: HncWorld, architecture_file: Callable[[str], Path], tmp_path: Path
) -> None:
    for number in range(3):
        world.add(f"237080{number}", TRUE, WRONG)
    world.prepare()
    task = task_of(architecture_file("vit"), objectives=[HardNegativeText(), Grounding()])
    recorder, data = Recorder(), ShardDataModule(train=world.folder / "out", batch_size=4, num_workers=0)
    trainer_in(tmp_path / "run", recorder).fit(task, data)
    (logged,) = recorder.logged
    assert logged["train/hard_negative_text_negatives"] >= 3
    assert logged["train/grounding_phrases"] > 0
    assert logged["train/loss"] > 0
