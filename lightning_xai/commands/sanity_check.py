"""`sanity-check`: see whether heat maps change while the model's weights are randomised, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from lightning_xai.atomic_file import write_json
from lightning_xai.commands.explain_pair import PreparedEntry, prepare_entry
from lightning_xai.commands.inputs import Entry, InputError, load_model, read_entries
from lightning_xai.commands.model_choice import ModelChoice
from lightning_xai.commands.outputs import describe, numpy_of, progress_bar, write_csv
from lightning_xai.report.plots import Example, save_figure
from lightning_xai.report.sanity import COLUMNS, sanity_curves, sanity_sheet, sanity_table
from lightning_xai.results.record import shown_label

# No `if TYPE_CHECKING` in a module whose class holds options: the parser would import what stands there, and so torch.


@dataclass
class SanityCheck:
    """Randomise a model's weights from the last layer to the first, and see whether its heat maps change.

    A method whose maps stay the same does not explain the model (Adebayo et al., 2018). Writes sanity.csv (rank
    correlation and structural similarity with the original maps, for each stage and method), sanity.png (their
    curves), sanity_maps.png (the maps of the first image) and sanity.json (every setting). The model's files are not
    touched.

    A few pairs from a list:
      python -m lightning_xai sanity-check --image list.csv --model.name ViT-B-32 --model.pretrained openai --out sanity
    Every method, which takes long: --method all.

    Attributes:
        model: the model whose weights are randomised.
        out: folder to write to; what an earlier call wrote there is replaced.
        image: a JPEG, PNG or WebP file; a folder of them; or a CSV list (columns image,caption), with paths relative
            to itself.
        caption: the text; for a folder, that of all its images.
        captions: for a folder, a CSV list of image (relative to the folder) and caption.
        method: attribution methods, joined by commas, or "all"; gaussian is the baseline that cannot change.
        options: of the method, as --options.steps 50; with several methods --options.rise.seed 1 for one of them.
        towers: which towers are randomised: both (in step), image or text.
        seed: of the random weights.
        limit: at most so many pairs are taken, the first ones.
        batch_size: pairs that are explained at a time; lower it where memory is short.
    """

    model: ModelChoice
    out: Path
    image: Path
    caption: str | None = None
    captions: Path | None = None
    method: str = "feature_pair,m2ib,grad_cam,attention_relevance,gaussian"
    options: dict[str, Any] = field(default_factory=dict)
    towers: Literal["both", "image", "text"] = "both"
    seed: int = 0
    limit: int = 8
    batch_size: int = 8

    def __call__(self) -> None:
        """Run the check.

        Raises:
            ValueError: settings that exclude each other, no pair that can be used, or no method that serves the model.
        """
        import torch

        from lightning_xai.attribution.method_options import check_method
        from lightning_xai.evaluation.sanity_check import sanity_check

        if self.limit < 1:
            raise ValueError(f"--limit has to be at least 1; got {self.limit}")
        names = [name.strip() for name in self.method.split(",")]
        for name in names:
            check_method(name)
        entries = read_entries(self.image, self.caption, self.captions)
        encoder = load_model(self.model).reading(entries[0].image)
        chosen, missing = _choose(encoder, names, self.options)
        pairs, skipped = _prepare(encoder, entries, self.limit)
        for name, reason in {**missing, **skipped}.items():
            print(f"Skipped {name}: {reason}")  # noqa: T201
        with progress_bar() as bar:
            task = bar.add_task("randomising")
            result = sanity_check(
                {each.name: each.method for each in chosen},
                torch.stack([pair.pixels for pair in pairs]),
                torch.stack([pair.tokens for pair in pairs]),
                towers=self.towers,
                seed=self.seed,
                batch_size=self.batch_size,
                on_progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        record = {
            **describe(asdict(self), self.model, encoder),
            "pairs": [{"image": str(each.entry.image), "caption": each.entry.caption} for each in pairs],
            "skipped": skipped,
            "methods": {each.name: each.options for each in chosen},
            "not_served": missing,
            "stages": result.stages,
        }
        write_json(self.out / "sanity.json", record)
        rows = [asdict(row) for row in result.rows]
        write_csv(self.out / "sanity.csv", rows, COLUMNS)
        # The maps of another layer are other maps, so pictures and the terminal name it.
        shown = {each.name: shown_label(each.name, each.options) for each in chosen}
        rows = [row | {"method": shown[row["method"]]} for row in rows]
        title = f"{encoder.name}: maps while the weights are randomised"
        save_figure(sanity_curves(rows, f"{title} ({len(pairs)} pairs)"), self.out / "sanity.png")
        pixels = encoder.pictures(pairs[0].pixels[None])[0]
        example = Example(numpy_of(pixels.permute(1, 2, 0)), "", pairs[0].entry.caption)
        maps = {shown[name]: [numpy_of(one.image[0]) for one in given] for name, given in result.maps.items()}
        save_figure(sanity_sheet(example, maps, result.stages, title), self.out / "sanity_maps.png")
        Console().print(sanity_table(rows))
        print(f"Saved {self.out / 'sanity.png'} and {self.out / 'sanity_maps.png'}")  # noqa: T201


def _choose(encoder: Any, names: Sequence[str], options: dict[str, Any]) -> tuple[list[Any], dict[str, str]]:
    """The methods of these names; of several, those that serve the model, and why the others do not."""
    from lightning_xai.attribution.method_options import choose_methods
    from lightning_xai.models import UnsupportedTowerError

    if len(names) == 1:
        return choose_methods(encoder, names[0], options)
    unknown = options.keys() - set(names)
    if unknown:
        raise ValueError(f"with several methods options are given as --options.NAME.x 1; got {', '.join(unknown)}")
    chosen: list[Any] = []
    missing: dict[str, str] = {}
    for name in names:
        try:
            chosen += choose_methods(encoder, name, options.get(name, {}))[0]
        except UnsupportedTowerError as error:  # noqa: PERF203 - there are a dozen methods at most
            missing[name] = str(error)
    if not chosen:
        raise ValueError(f"no method serves this model: {missing}")
    return chosen, missing


def _prepare(encoder: Any, entries: Sequence[Entry], limit: int) -> tuple[list[PreparedEntry], dict[str, str]]:
    """The first `limit` pairs that can be used, as the model sees them; names of those that cannot, and why."""
    pairs: list[PreparedEntry] = []
    skipped: dict[str, str] = {}
    for entry in entries:
        if len(pairs) == limit:
            break
        try:
            pairs.append(prepare_entry(encoder, Entry(entry.name, entry.image, entry.caption)))
        except InputError as error:
            skipped[entry.name] = str(error)
    if not pairs:
        raise ValueError(f"none of the {len(entries)} pairs can be used: {'; '.join(skipped.values())}")
    return pairs, skipped
