"""`explain`: draw which patches of an image and which words of a caption make their similarity."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_xai.commands.explain_entries import Asked, Explainer, ListWriter
from lightning_xai.commands.inputs import Entry, is_list, load_model, read_entries
from lightning_xai.commands.intra_modal import COMPARED_ARRAYS, compare_captions, compare_images, write_pairs
from lightning_xai.commands.model_choice import ModelChoice
from lightning_xai.commands.outputs import PICTURE, describe, progress_bar, write_all


@dataclass
class Explain:
    """Draw which patches of an image and which words of a caption make their similarity.

    Red is for the similarity, blue against it. Writes a picture (explanation.png), a page to point at words and patches
    (explanation.html), every number (attribution.npz) and every setting (explanation.json, which also says what the
    arrays are).

    A phrase on the image:
      python -m lightning_xai explain --image dog.jpg --caption "A dog on a sofa" --span "dog"
      --model.name ViT-B-32 --model.pretrained openai --out explained
    What the model does with its inputs, and not in its last blocks alone: the same with --at-inputs.
    Every method side by side: the same without --span, with --method all.
    Why this caption rather than that: --against "A cat on a sofa", with any method; again for several captions.
    A box on the words: --box 120,40,200,180 instead of --span.
    Many at once: --image list.csv (columns image,caption and if need be span,box,against), or a folder with --caption.
    Two captions: --caption "A dog runs" --other-caption "A puppy is playing", also by a sentence encoder
    (--model.name st:FOLDER); every pair of their tokens is then in pairs.csv as well.
    A sound: --image bark.wav, with a CLAP or ImageBind model (--model.name imagebind:imagebind_huge.pth); with
    ImageBind also an image and a sound: --image dog.jpg --other-image bark.wav.

    Attributes:
        model: the model to explain.
        out: folder to write to; what an earlier call wrote there is replaced.
        image: a JPEG, PNG or WebP file (for models of sounds a WAV, FLAC, OGG or MP3 file); a folder of them; or a CSV
            list, with paths relative to itself.
        caption: the text; for a folder, that of all its images.
        captions: for a folder, a CSV list of image (relative to the folder), caption, span, box.
        span: a phrase of the caption: the heat map shows where the image matches it. Where it stands several times in
            the caption, all of them count.
        box: x,y,width,height in pixels of the image file: the words show what matches the box.
        other_image: a second image (or sound), compared with the first one, or with its box; no caption is needed.
        other_caption: a second caption, compared with the first one, or with its span; no image is needed.
        against: a caption to compare the first one with; may be given several times.
        target: what is explained of the captions that are compared: contrast (the similarity less the mean of the
            others, which is the default) or probability (of the caption among them).
        target_options: of the target, as --target_options.weight softmax for a contrast with the likeliest.
        method: an attribution method such as feature_pair, m2ib, grad_cam, attention_relevance, saliency or rise, or a
            baseline such as random; "all" draws all of them side by side, an unknown name lists them.
        options: of the method, as --options.steps 50 or --options '{"steps": 50}'; with --method all for each method
            that has such an option, and --options.rise.seed 1 for one of them.
        at_inputs: draw feature_pair twice: at the inputs of both towers, where it mostly says more about what the model
            does with image and caption, and at the last blocks. Each word then costs a pass back through a whole tower.
        batch_size: images of a list that are explained at a time; lower it where memory is short.
        fit: crop (the default of most models) or letterbox, which shows the model the whole photo: resized to fit, with
            the mean colour around it; short for --model.fit.
    """

    model: ModelChoice
    out: Path
    image: Path | None = None
    caption: str | None = None
    captions: Path | None = None
    span: str | None = None
    box: str | None = None
    other_image: Path | None = None
    other_caption: str | None = None
    against: list[str] = field(default_factory=list)
    target: str | None = None
    target_options: dict[str, Any] = field(default_factory=dict)
    method: str = "feature_pair"
    options: dict[str, Any] = field(default_factory=dict)
    at_inputs: bool = False
    batch_size: int = 8
    fit: str | None = None

    def __call__(self) -> None:
        """Explain what was asked.

        Raises:
            ValueError: settings that exclude each other, or input that cannot be used (in a list such entries are
                skipped, counted and named instead).
        """
        if self.fit is not None:
            self.model = replace(self.model, fit=self.fit)
        self._check()
        of_list = self.image is not None and is_list(self.image)
        asked = Asked(
            self.method, self.options, self.target, self.target_options, self.batch_size, of_list, self.at_inputs
        )
        if self._compares:
            asked.check()
            self._compare()
            return
        entries = self._entries()
        from lightning_xai.attribution.method_options import inputs_hint

        explainer = Explainer.of(self.model, asked, entries, asdict(self))
        for name, reason in explainer.missing.items():
            print(f"Skipped {name}: {reason}")  # noqa: T201
        hint = "" if self.at_inputs else inputs_hint(explainer.chosen, self.options)
        with progress_bar() as bar:
            task = bar.add_task("explaining", total=len(entries) * len(explainer.chosen))

            def advance(label: str, count: int) -> None:
                bar.update(task, advance=count, description=label or None)

            if of_list:
                writer = ListWriter(self.out)
                for found in explainer.explain_each(entries, advance):
                    writer.add(found)
                said = "\n".join(filter(None, [writer.close(), hint]))
            else:
                explained = explainer.explain_one(entries[0], advance)
                skipped = [f"Skipped {name}: {reason}" for name, reason in explained.failed.items()]
                said = "\n".join(filter(None, [*skipped, explained.write(self.out), explained.prepared.hidden, hint]))
        print(said)  # noqa: T201

    def _compare(self) -> None:
        """Compare two images or two captions, and write what `write_all` writes."""
        from lightning_xai.attribution.method_options import choose_method

        encoder = load_model(self.model)
        if self.image is not None:
            encoder = encoder.reading(self.image)
        chosen: Any = choose_method(encoder, self.method, self.options)
        if self.image is not None and self.other_image is not None:
            reads_other = encoder.reading(self.other_image)
            by = None
            if reads_other is not encoder:
                by = choose_method(reads_other, chosen.name, self.options).method
            compared = compare_images(chosen.method, self.image, self.other_image, self.box, by)
        else:
            captions = (self.caption or "", self.other_caption or "")
            compared = compare_captions(encoder, chosen.method, *captions, self.span)
        arrays, record, sheet, pairs = compared
        scores = {name: arrays[name].item() for name in ("similarity", "completeness_error") if name in arrays}
        methods: dict[str, Any] = {chosen.name: {"options": chosen.options, **scores}}
        described = {name: what for name, what in COMPARED_ARRAYS.items() if name in arrays}
        record = {**describe(asdict(self), self.model, encoder), **record, "methods": methods, "arrays": described}
        print(write_all(self.out, arrays, record, sheet))  # noqa: T201
        if pairs:
            print(write_pairs(self.out, pairs))  # noqa: T201

    @property
    def _compares(self) -> bool:
        """True if two images, or an image and a sound, or two captions are compared."""
        return self.other_image is not None or self.other_caption is not None

    def _check(self) -> None:
        """Raise a ValueError where settings exclude each other: before the model is loaded, which takes a while."""
        from lightning_xai.attribution.method_options import check_method

        spans, boxes = self.span is not None, self.box is not None
        conflicts = {
            "--other-image compares images, --other-caption captions: give one of them": (
                self.other_image is not None and self.other_caption is not None
            ),
            "--other-image and --other-caption compare with a single image or caption, not with many": (
                self._compares and self.image is not None and is_list(self.image)
            ),
            "--other-image compares with --image, or with a --box of it; a --span has no place there": (
                self.other_image is not None and (self.image is None or spans)
            ),
            "--other-caption compares with --caption, or with a --span of it; a --box has no place there": (
                self.other_caption is not None and (self.caption is None or boxes)
            ),
            "--other-image needs no --caption, and --other-caption no --image: leave it out": (
                (self.other_image is not None and self.caption is not None)
                or (self.other_caption is not None and self.image is not None)
            ),
            f"{self.model.name} is a sentence encoder, which has no image tower and compares two texts: give --caption "
            "TEXT and --other-caption TEXT": (
                self.model.compares_texts_only and (self.caption is None or self.other_caption is None)
            ),
            "--against compares captions of an image: leave out --other-image and --other-caption": (
                bool(self.against) and self._compares
            ),
            "--at-inputs is for an image and its caption; two images are compared at their inputs with "
            "--options.image_layer 0, two captions with --options.text_layer 0": self.at_inputs and self._compares,
            f"--out has to be a folder, but {self.out} is a file": self.out.is_file(),
            f"{self.out / PICTURE} is the image to explain, and would be replaced: choose another --out": any(
                path is not None and path.resolve() == (self.out / PICTURE).resolve()
                for path in (self.image, self.other_image)
            ),
        }
        for message, wrong in conflicts.items():
            if wrong:
                raise ValueError(message)
        for path in (self.image, self.captions, self.other_image):
            if path is not None and not path.exists():
                raise ValueError(f"{path} does not exist")
        for option, flag in {"other_image": "compares_images", "other_caption": "intra_modal"}.items():
            given = None if getattr(self, option) is None else f"--{option.replace('_', '-')}"
            check_method(self.method, **{flag: given})

    def _entries(self) -> list[Entry]:
        """Entries to explain, image by image."""
        if self.image is None:
            raise ValueError("give an image (--image FILE, a folder, or a CSV list)")
        return read_entries(self.image, self.caption, self.captions, self.span, self.box, self.against)
