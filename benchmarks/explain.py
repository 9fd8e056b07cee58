"""Time `explain` of one photo, end to end, against a bare script that imports open_clip and runs the model once.

    python benchmarks/explain.py --model ViT-B-32 --method grad_cam --rounds 5
    python benchmarks/explain.py --method feature_pair
    python benchmarks/explain.py --method feature_pair --at-inputs

Options that this script does not have go to `explain`. Weights are random, as no time depends on them. Runs are
interleaved, so that what else the machine does meets both alike; medians of wall-clock and of CPU seconds, and their
ratio, go to the terminal. The goal is 1.25.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

BARE = """
import open_clip, torch
model, _, transform = open_clip.create_model_and_transforms({model!r})
model.eval()
from PIL import Image
with torch.no_grad():
    model(transform(Image.open({photo!r})).unsqueeze(0), open_clip.get_tokenizer({model!r})(["a dog on a red mat"]))
"""


def timed(command: list[str]) -> tuple[float, float]:
    """Wall-clock and CPU seconds of a command."""
    # Installed packages have their bytecode, a working tree where Python may write it: in the first round.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=env | {"OMP_NUM_THREADS": "1"})
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip name")
    parser.add_argument("--method", default="grad_cam")
    parser.add_argument("--rounds", type=int, default=5)
    given, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder) / "photo.jpg"
        pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photo)
        commands = {
            "bare": [sys.executable, "-c", BARE.format(model=given.model, photo=str(photo))],
            "explain": [
                *(sys.executable, "-m", "lightning_xai", "explain", "--image", str(photo), "--method", given.method),
                *("--caption", "a dog on a red mat", "--model.name", given.model, "--model.device", "cpu"),
                *("--out", folder, *options),
            ],
        }
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(given.rounds + 1):
            for name, command in commands.items():
                seconds[name].append(timed(command))
    # The first round reads files that later ones find in memory, and writes bytecode.
    wall, cpu = ({name: median(each[i] for each in runs[1:]) for name, runs in seconds.items()} for i in (0, 1))
    for what, taken in (("wall-clock", wall), ("CPU", cpu)):
        ratio = taken["explain"] / taken["bare"]
        print(f"{what:10} bare {taken['bare']:.2f} s, explain {taken['explain']:.2f} s, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
