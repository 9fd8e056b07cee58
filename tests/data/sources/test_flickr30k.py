from __future__ import annotations

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
from lightning_xai.data.sources.flickr30k import parse_sentence
from lightning_xai.training.objectives import Grounding, HardNegativeText

BOY = "[/EN#283585/people A young white boy]"
# The data set's own kinds of marks: several types, the null chain, a scene, a chain without box, one with two boxes.
SENTENCES = f"""\
{BOY} with [/EN#283589/bodyparts short hair] smiling at [/EN#283590/people two men] .
[/EN#283585/people/other The boy] 's [/EN#283589/bodyparts hair] is out in [/EN#283592/scene the yard] .
[/EN#0/notvisual It] makes [/EN#283590/people the men] feel [/EN#283593/other joy] .
"""


def thing(chains: str, corners: str = "", flags: str = "") -> str:
    names = "".join(f"<name>{chain}</name>" for chain in chains.split())
    numbers = zip(("xmin", "ymin", "xmax", "ymax"), corners.split(), strict=False)
    box = "<bndbox>" + "".join(f"<{name}>{number}</{name}>" for name, number in numbers) + "</bndbox>"
    flagged = "".join(f"<{flag}>1</{flag}>" for flag in flags.split())
    return f"<object>{names}{box if corners else ''}{flagged}</object>"


OBJECTS = (
    thing("283585", "11 21 40 60"),
    thing("283589", "1 1 10 5"),
    thing("283590", "50 10 70 70"),
    thing("283590", "71 10 90 70"),
    thing("283592", flags="scene"),
    thing("283593", flags="nobndbox"),
)


class FlickrWorld(World):
    source = "flickr30k"
    advice = "belong together"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "flickr30k-images")
        self.entities = folder / "entities"
        for name in ("Sentences", "Annotations"):
            (self.entities / name).mkdir(parents=True)
        self.lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
        self.karpathy: list[dict[str, Any]] | None = None
        self.add("1000092795")

    def add(
        self,
        name: str,
        sentences: str | bytes = SENTENCES,
        objects: tuple[str, ...] = OBJECTS,
        size: tuple[int, int] = (100, 80),
        data: bytes | None = None,
        split: str = "val",
    ) -> None:
        self.lists[split].append(name)
        text = sentences if isinstance(sentences, bytes) else sentences.encode()
        (self.entities / "Sentences" / f"{name}.txt").write_bytes(text)
        self.annotate(name, self.xml(name, objects, size))
        (self.images / f"{name}.jpg").write_bytes(jpeg(size) if data is None else data)

    def annotate(self, name: str, xml: str) -> None:
        (self.entities / "Annotations" / f"{name}.xml").write_text(xml)

    def xml(self, name: str, objects: tuple[str, ...] = OBJECTS, size: tuple[int, int] = (100, 80)) -> str:
        measures = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
        return f"<annotation>\n<filename>{name}.jpg</filename>{measures}{''.join(objects)}</annotation>\n"

    def refer_to(self, name: str) -> None:
        self.lists["val"].append(name.removesuffix(".jpg"))

    def entries(self) -> int:
        return len(self.lists["val"])

    def options(self) -> dict[str, Any]:
        for split, names in self.lists.items():
            (self.entities / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        options: dict[str, Any] = {"images": self.images, "entities": self.entities, "split": "val"}
        if self.karpathy is not None:
            options["karpathy"] = self.json("dataset_flickr30k.json", {"dataset": "flickr30k", "images": self.karpathy})
        return options


USUAL = {"phrase_notvisual": 1, "phrase_scene": 1, "phrase_no_box": 1}  # of SENTENCES with OBJECTS


@pytest.fixture
def world(tmp_path: Path) -> FlickrWorld:
    return FlickrWorld(tmp_path)


class TestSource(SourceTests):
    pass


def words(sample: Sample, number: int) -> list[tuple[int, str]]:
    """The captions, by index, and words that name a region."""
    spans = sample.regions[number].spans
    return [(caption, sample.captions[caption][slice(*span)]) for caption in spans for span in spans[caption]]


def test_sentences_lose_their_marks_and_phrases_become_regions_of_their_chains(world: FlickrWorld) -> None:
    (sample,), excluded = world.read()
    assert (sample.key, sample.size, sample.source) == ("1000092795", (100, 80), "flickr30k/val/1000092795.jpg")
    assert sample.captions == (
        "A young white boy with short hair smiling at two men .",
        "The boy 's hair is out in the yard .",
        "It makes the men feel joy .",
    )
    found = [(region.label, region.entity, region.box) for region in sample.regions]
    assert found == [
        ("people", "283585", (10, 20, 30, 40)),
        ("bodyparts", "283589", (0, 0, 10, 5)),
        ("people", "283590", (49, 9, 21, 61)),
        ("people", "283590", (70, 9, 20, 61)),
    ]
    assert words(sample, 0) == [(0, "A young white boy"), (1, "The boy")]
    assert words(sample, 1) == [(0, "short hair"), (1, "hair")]
    assert words(sample, 2) == words(sample, 3) == [(0, "two men"), (2, "the men")]
    assert excluded == USUAL


def test_each_chain_with_one_box_is_measured_and_phrases_are_spelled_by_their_tokens(world: FlickrWorld) -> None:
    manifest, stored = world.prepare()
    assert manifest.labels == ("bodyparts", "people")
    tokenizer = CaptionTokenizer(open_clip.get_tokenizer("ViT-B-32"))
    transform = ImageTransform(size=(80, 80))  # 10 pixels at the left and right are cropped
    batch = EvaluationCollate(transform, tokenizer, manifest.labels)([(0, stored[0])])
    phrases = batch.phrases
    spelled = [
        tokenizer.decode(batch.tokens[row][mask])
        for row, mask in zip(phrases.caption_row, phrases.span_mask, strict=True)
    ]
    assert spelled == ["short hair", "hair", "a young white boy", "the boy", "two men", "the men"]
    assert phrases.text == ["short hair", "hair", "A young white boy", "The boy", "two men", "the men"]
    reasons = [Exclusion(int(reason)) for reason in phrases.reason]
    assert reasons == [Exclusion.OUTSIDE_CROP] * 2 + [Exclusion.MEASURED] * 2 + [Exclusion.SEVERAL_INSTANCES] * 2
    assert torch.allclose(phrases.boxes[2], torch.tensor([0.0, 20.0, 30.0, 60.0]))
    assert [manifest.labels[label] for label in phrases.label] == ["bodyparts"] * 2 + ["people"] * 4


def test_an_object_of_several_chains_is_a_region_of_each(world: FlickrWorld) -> None:
    world.add("2", f"{BOY} in [/EN#7/clothing red]", (thing("283585 7", "1 1 10 10"),))
    samples, _ = world.read()
    assert [(region.label, region.entity) for region in samples[1].regions] == [("people", "283585"), ("clothing", "7")]
    assert samples[1].regions[0].box == samples[1].regions[1].box == (0, 0, 10, 10)


def test_the_most_frequent_type_of_a_chain_is_its_label_and_of_equals_the_first(world: FlickrWorld) -> None:
    sentences = "[/EN#1/other/people a cook] and [/EN#2/vehicles/other a cart]\n[/EN#1/people he]"
    world.add("2", sentences, (thing("1", "1 1 10 10"), thing("2", "1 1 10 10")))
    samples, _ = world.read()
    assert [region.label for region in samples[1].regions] == ["people", "vehicles"]


@pytest.mark.parametrize(("size", "orientation"), [((80, 100), 6), ((100, 80), 1)])
def test_boxes_are_turned_with_the_image(world: FlickrWorld, size: tuple[int, int], orientation: int) -> None:
    world.add("2", data=jpeg((100, 80), orientation=orientation))
    samples, _ = world.read()
    assert samples[1].size == size
    assert samples[1].regions[0].box == ((20, 10, 40, 30) if orientation == 6 else (10, 20, 30, 40))


def test_splits_are_joined_in_the_order_asked_for(world: FlickrWorld) -> None:
    world.add("3", split="test")
    world.add("4", split="train")
    samples, _ = world.read(split="test+val")
    assert [sample.key for sample in samples] == ["3", "1000092795"]


def test_karpathys_split_takes_the_place_of_the_lists(world: FlickrWorld) -> None:
    world.add("3", split="train")
    world.karpathy = [
        {"filename": f"{name}.jpg", "imgid": 0, "sentids": [0], "split": split, "sentences": [{"raw": "not this"}]}
        for name, split in (("3", "val"), ("1000092795", "train"))
    ]
    samples, _ = world.read(split="val")
    assert [sample.key for sample in samples] == ["3"]
    assert samples[0].captions[0].startswith("A young white boy")
    with pytest.raises(ValueError, match=r"no split 'test'; it has \['train', 'val'\]"):
        world.read(split="test")


@pytest.mark.parametrize("split", ["dev", "", "val+", "../secret", "sub/list", "/val"])
def test_an_unknown_split_is_an_error_that_lists_what_exists(world: FlickrWorld, split: str) -> None:
    (world.entities / "sub").mkdir()
    for place in (world.folder / "secret.txt", world.entities / "sub" / "list.txt"):
        place.write_text("1000092795\n")
    with pytest.raises(ValueError, match=r"\['test', 'train', 'val'\]"):
        world.read(split=split)


@pytest.mark.parametrize("name", ["Sentences", "Annotations"])
def test_a_missing_folder_of_the_annotations_is_named(world: FlickrWorld, name: str) -> None:
    (world.entities / name).rename(world.folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match=rf"^entities: .*{name}"):
        world.read()


def test_bad_images_are_counted_and_the_rest_survives(world: FlickrWorld) -> None:
    world.add("2")
    (world.images / "2.jpg").unlink()
    world.add("3", data=b"<html>404</html>")
    world.add("4", data=jpeg((99, 80)))
    world.add("5")
    (world.entities / "Sentences" / "5.txt").unlink()
    world.add("6", sentences=b"caf\xe9")
    world.add("7", sentences="\n \n")
    world.lists["val"].append("1000092795")
    samples, excluded = world.read()
    assert [sample.key for sample in samples] == ["1000092795"]
    images = {reason: count for reason, count in excluded.items() if not reason.startswith("phrase")}
    assert images == {
        "image_missing": 1,
        "image_does_not_decode": 1,
        "size_mismatch": 1,
        "sentences_missing": 1,
        "sentences_unreadable": 1,
        "image_without_caption": 1,
        "image_twice": 1,
    }


@pytest.mark.parametrize(
    "sentence",
    [
        "[/EN#1/people A boy stands",
        "A boy] stands",
        "[/EN#1 A boy] stands",
        "[/EN#x/people A boy] stands",
        "[EN#1/people A boy] stands",
        "[/EN#1/people ] stands",
        "[/EN#1/people]",
        "[/EN#1/people a [/EN#2/people boy] here]",
    ],
)
def test_malformed_marks_lose_the_caption_and_not_the_image(world: FlickrWorld, sentence: str) -> None:
    world.add("2", f"first\n{sentence}\n\n{BOY}\r\n", OBJECTS[:1])
    samples, excluded = world.read()
    assert samples[1].captions == ("first", "A young white boy")
    assert samples[1].regions[0].spans == {1: ((0, 17),)}
    assert excluded == {**USUAL, "caption_markup_malformed": 1, "caption_empty": 1}


def test_marks_are_read_in_time_that_grows_with_the_sentence_alone() -> None:
    for sentence in ("[/EN#1/a" * 100_000, "[/EN#1" + "/a" * 100_000, "[/EN#1/a" + " " * 200_000):
        with pytest.raises(ValueError, match="bracket"):
            parse_sentence(sentence + " x")


BOMB = """<?xml version="1.0"?>
<!DOCTYPE lolz [<!ENTITY a "lol"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>
<annotation><size><width>100</width><height>80</height></size><filename>&b;</filename></annotation>"""
OUTSIDE = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>'


@pytest.mark.parametrize(
    ("xml", "reason"),
    [
        (BOMB, "annotation_malformed"),
        (OUTSIDE, "annotation_malformed"),
        ('<?xml version="1.0" encoding="nonsense"?><annotation/>', "annotation_malformed"),
        ("", "annotation_malformed"),
        ("<annotation>", "annotation_malformed"),
        ("<annotation></annotation>", "annotation_malformed"),
        ("<annotation><size><width>wide</width><height>80</height></size></annotation>", "annotation_malformed"),
        (None, "annotation_missing"),
    ],
)
def test_an_annotation_that_cannot_be_used_leaves_captions(world: FlickrWorld, xml: str | None, reason: str) -> None:
    world.add("2", BOY)
    if xml is None:
        (world.entities / "Annotations" / "2.xml").unlink()
    else:
        world.annotate("2", xml)
    samples, excluded = world.read()
    assert (samples[1].captions, samples[1].regions) == (("A young white boy",), ())
    assert excluded == {**USUAL, reason: 1, "phrase_not_annotated": 1}


@pytest.mark.parametrize(
    ("corners", "reason"),
    [
        ("10 10 9 20", "box_without_area"),
        ("10 10 20 5", "box_without_area"),
        ("101 10 120 20", "box_outside_image"),
        ("10 ten 20 20", "box_malformed"),
        ("10 10 20", "box_malformed"),
        ("10 nan 20 20", "box_malformed"),
        ("10 10 1e999 20", "box_malformed"),
    ],
)
def test_bad_boxes_are_counted_and_are_instances_all_the_same(world: FlickrWorld, corners: str, reason: str) -> None:
    world.add("2", BOY, (thing("283585", corners), thing("283585", "91 71 120 90")))
    samples, excluded = world.read()
    assert [region.box for region in samples[1].regions] == [None, (90, 70, 10, 10)]
    assert excluded == {**USUAL, reason: 1}


def test_boxes_of_chains_that_no_sentence_names_are_counted(world: FlickrWorld) -> None:
    world.add("2", f"{BOY} and [/EN#0/notvisual it]", (thing("9", "1 1 5 5"), thing("0", "1 1 5 5"), thing("283585")))
    samples, excluded = world.read()
    assert [(region.entity, region.box) for region in samples[1].regions] == [("283585", None)]
    assert excluded == {
        **USUAL,
        "phrase_notvisual": 2,
        "box_of_unmentioned_chain": 2,
        "phrase_not_annotated": 1,
        "box_malformed": 1,
    }


def test_a_chain_with_a_box_here_and_none_there_has_two_instances(world: FlickrWorld) -> None:
    world.add("2", BOY, (thing("283585", "11 21 40 60"), thing("283585", flags="nobndbox"), thing("", "1 1 5 5")))
    samples, excluded = world.read()
    assert [region.box for region in samples[1].regions] == [(10, 20, 30, 40), None]
    assert excluded == {**USUAL, "box_malformed": 1, "object_malformed": 1}


def test_captions_that_are_listed_as_unrelated_are_excluded_where_that_is_asked_for(world: FlickrWorld) -> None:
    listed = world.entities / "UNRELATED_CAPTIONS"
    listed.write_text("# format: <imageID> <sentence number>\n1000092795 2\n129602216 5\n")
    assert len(world.read()[0][0].captions) == 3
    (sample,), excluded = world.read(exclude_unrelated=True)
    assert sample.captions == (
        "A young white boy with short hair smiling at two men .",
        "It makes the men feel joy .",
    )
    assert excluded["caption_unrelated"] == 1
    assert words(sample, 2) == [(0, "two men"), (1, "the men")]
    listed.write_text("1000092795 two\n")
    with pytest.raises(ValueError, match="'1000092795 two' is no image id"):
        world.read(exclude_unrelated=True)
    listed.unlink()
    with pytest.raises(FileNotFoundError, match="UNRELATED_CAPTIONS"):
        world.read(exclude_unrelated=True)


def test_its_phrases_train_a_model_and_its_coarse_classes_give_no_hard_negatives(
    world: FlickrWorld, architecture_file: Callable[[str], Path], tmp_path: Path
) -> None:
    world.add("1000092796")
    world.prepare()
    data = ShardDataModule(train=world.folder / "out", batch_size=2, num_workers=0)
    task, recorder = task_of(architecture_file("vit"), objectives=[Grounding()]), Recorder()
    trainer_in(tmp_path / "run", recorder).fit(task, data)
    assert recorder.logged[0]["train/grounding_phrases"] > 0
    task = task_of(architecture_file("vit"), objectives=[HardNegativeText(swap_objects=True)])
    with pytest.raises(ValueError, match="Flickr30k's entities have too coarse classes"):
        trainer_in(tmp_path / "refused").fit(task, data)
