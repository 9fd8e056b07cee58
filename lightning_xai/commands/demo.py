"""`demo`: train a small model on shapes and explain what it sees, with one command from any folder."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

# No `if TYPE_CHECKING` in a module whose class holds options: the parser would import what stands there, and so torch.

_CONFIG = Path("configs/demo.yaml")
_MODEL = Path("configs/models/shapes_vit.json")
_MOST_VALIDATION = 512
_DONE = "demo.json"  # written last: the settings of a demo that is whole
_COLUMNS = ("image", "caption", "span")


@dataclass
class Demo:
    """Train a small CLIP on coloured shapes, explain photos that it has never seen, and name the page to open.

    Nothing is downloaded. Three minutes on two CPU cores; where it was stopped, the same command goes on.

    The whole demo, into the folder lightning_xai_demo:
      python -m lightning_xai demo
    A first look in a minute, at a model that has learned little:
      python -m lightning_xai demo --epochs 1 --out first_look
    Afterwards, with your own words for one of its photos:
      python -m lightning_xai explain --image lightning_xai_demo/photos/shapes_val_000000.jpg --caption "a red diamond"
      --model.name lightning_xai_demo/run/checkpoints/best-grounding.ckpt --at-inputs --out mine

    Attributes:
        out: folder for everything: data, run (the training, as `fit --run` writes it), photos and explained.
        epochs: passes over the training images; left out: as configs/demo.yaml says.
        images: training images; left out: as configs/demo.yaml says. Fewer are faster and teach less.
        photos: explained photos on the page.
    """

    out: Path = Path("lightning_xai_demo")
    epochs: int | None = None
    images: int | None = None
    photos: int = 12

    def __call__(self) -> None:
        """Run the demo, or what is left of it.

        Raises:
            ValueError: an option outside its range, or `out` is a file.
        """
        from lightning_xai.atomic_file import write_json
        from lightning_xai.commands.outputs import PAGE_OF_MANY

        started = time.monotonic()
        for name in ("epochs", "images", "photos"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} has to be at least 1; got {value}")
        if self.out.is_file():
            raise ValueError(f"--out has to be a folder, but {self.out} is a file")
        page, done = (self.out / "explained" / PAGE_OF_MANY).resolve(), self.out / _DONE
        settings = {"epochs": self.epochs, "images": self.images, "photos": self.photos}
        if page.is_file() and done.is_file() and json.loads(done.read_text(encoding="utf-8")) == settings:
            print(f"The demo is there already; --out ANOTHER_FOLDER makes a new one.\nOpen {page}")  # noqa: T201
            return
        self._train()
        self._explain(self._draw())
        write_json(done, settings)
        seconds = time.monotonic() - started
        print(f"First picture after {seconds:.0f} s, with one command.\nOpen {page}")  # noqa: T201

    def _train(self) -> None:
        """Run `fit` in a separate process, which makes the data and resumes where it was stopped.

        Raises:
            SystemExit: it failed, with its status; it has said why.
        """
        from lightning_xai.shipped import shipped

        options: dict[str, Path | int] = {
            "config": shipped(_CONFIG),
            "run": self.out.resolve() / "run",
            "model.init_args.model": shipped(_MODEL).resolve(),
            "data.init_args.root": self.out.resolve() / "data",
        }
        if self.epochs is not None:
            options["trainer.max_epochs"] = self.epochs
        if self.images is not None:
            options["data.init_args.train_samples"] = self.images
            options["data.init_args.val_samples"] = min(self.images, _MOST_VALIDATION)
        if self.epochs is not None or self.images is not None:
            options["model.init_args.warmup_steps"] = self._warmup(shipped(_CONFIG))
        command = [sys.executable, "-m", "lightning_xai", "fit"]
        fit = subprocess.Popen([*command, *(f"--{name}={value}" for name, value in options.items())])  # noqa: S603 - our own command
        try:
            status = fit.wait()
        except KeyboardInterrupt:  # which it gets as well, and saves its state before it ends
            status = fit.wait()
        if status:
            sys.exit(status)

    def _warmup(self, config: Path) -> int:
        """Steps of warm-up: of a shorter training the same share, as all of the config's may be more than it has."""
        from lightning_xai.data.shapes import TRAIN_SAMPLES

        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
        epochs: int = settings["trainer"]["max_epochs"]
        warmup: int = settings["model"]["init_args"]["warmup_steps"]
        share = (self.epochs or epochs) * (self.images or TRAIN_SAMPLES) / (epochs * TRAIN_SAMPLES)
        return round(warmup * min(share, 1))

    def _draw(self) -> Path:
        """Write photos of the validation's world, none of whose pairs of objects was trained on, and a list of them."""
        from lightning_xai.data.shapes import read_shapes

        folder = self.out / "photos"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "list.csv").open("w", newline="", encoding="utf-8") as file:
            lines = csv.writer(file, lineterminator="\n")
            lines.writerow(_COLUMNS)
            for sample in read_shapes("val", self.photos):
                (folder / f"{sample.key}.jpg").write_bytes(sample.image)
                caption = sample.captions[0]
                spans = (caption[slice(*span)] for region in sample.regions for span in region.spans.get(0, ()))
                lines.writerow((f"{sample.key}.jpg", caption, next(spans, "")))
        return folder / "list.csv"

    def _explain(self, photos: Path) -> None:
        """Explain the photos by the model that matches words with places best."""
        from lightning_xai.commands.explain import Explain
        from lightning_xai.commands.model_choice import ModelChoice
        from lightning_xai.training.run_folder import RunFolder

        best = RunFolder(self.out / "run").model("best")
        print(f"Explaining by {best}")  # noqa: T201
        Explain(model=ModelChoice(name=best.path), out=self.out / "explained", image=photos, at_inputs=True)()
