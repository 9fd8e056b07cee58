"""Prints figures of the code: how large it is, and how many places one change or one number passes through.

    python tools/figures.py                      # of this checkout
    python tools/figures.py --before ../before   # and of another one, with the same definitions
    python tools/figures.py --verbose            # with the files that each count consists of

Definitions

- Lines: of all `.py` files below lightning_xai/ or tests/, blank lines and comments included.
- Items: what pytest collects, `slow` and `distributed` included.
- Modules from shard to CSV: modules of lightning_xai of which a function is given something of the pair (bytes, pixels,
  tokens, maps, rows) while `test` measures the grounding of feature-pair attribution on one image with one caption,
  from the opening of the shard to the writing of the last table. Each counts once. `lightning_xai.models` is set aside:
  it is the model that is explained.
- Files to touch: for an existing entry, its own module and the files of the package that name it, in a string or by an
  import of its module: each would have to be edited for a new one. Docstrings do not count, nor does an import in an
  `__init__.py` that only hands the name on.
- Places that decide gamma > 0.5: statements with a comparison of gamma and 0.5, a `threshold=0.5`, or a heading that
  begins with "γ > 0.5"; sentences that mention it do not count.
- Words of the README: what white space separates, code and tables included.
- Odd words: "anew", "whoever", "nobody", "beside", "behind", "told", "tells" and "of its own" in the package's `.py`
  files, code, docstrings and comments alike.
- Largest folder: lines of each folder directly below lightning_xai/ that is a package, over those of attribution/; the
  largest of them, data/ aside.

How long the README's test command takes is not counted here: pytest prints it.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import FrameType

PACKAGE = "lightning_xai"
ODD_WORDS = ("anew", "whoever", "nobody", "beside", "behind", "told", "tells", "of its own")
# One existing entry a kind: the names that are its own, and its module.
ENTRIES = {
    "metric (localization)": (("localization", "iou"), "metrics.localization"),
    "method (kernel_shap)": (("kernel_shap",), "attribution.kernel_shap"),
    "data set (rsicd)": (("rsicd",), "data.sources.rsicd"),
    "command (sanity-check)": (("sanity-check",), "commands.sanity_check"),
}


@dataclass
class Figure:
    """One row of the table.

    Attributes:
        name: what is counted.
        value: as it is printed.
        aim: at most this.
        details: what was counted, for `--verbose`.
    """

    name: str
    value: str
    aim: str
    details: list[str] = field(default_factory=list)


def python_files(folder: Path) -> list[Path]:
    """All Python files below a folder, in the order of their names."""
    return sorted(folder.rglob("*.py"))


def lines(folder: Path) -> int:
    """Lines of all Python files below a folder."""
    return sum(len(path.read_text().splitlines()) for path in python_files(folder))


def docstrings(tree: ast.AST) -> set[int]:
    """The ids of a module's docstring nodes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                found.add(id(first.value))
    return found


def names_entry(tree: ast.AST, names: tuple[str, ...], module: str, imports: bool) -> bool:
    """Whether a module's code names an entry: in a string, or, where `imports` count, by importing its module."""
    texts = docstrings(tree)
    # A word of a string, or "module:attribute" of a registry.
    word = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, (*names, f'{PACKAGE}.{module}')))})(?![\w-])")
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            if word.search(node.value):
                return True
        elif imports and isinstance(node, ast.ImportFrom) and node.module == f"{PACKAGE}.{module}":
            return True
    return False


def files_to_touch(root: Path, names: tuple[str, ...], module: str) -> list[str]:
    """Files that name an entry, other than its own module."""
    own = root / PACKAGE / (module.replace(".", "/") + ".py")
    return [
        str(path.relative_to(root))
        for path in python_files(root / PACKAGE)
        if path != own and names_entry(ast.parse(path.read_text()), names, module, path.name != "__init__.py")
    ]


def _decides(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.match(r"(?:γ|gamma) ?> ?0\.5", node.value) is not None
    if isinstance(node, ast.keyword):
        return node.arg == "threshold" and isinstance(node.value, ast.Constant) and node.value.value == 0.5
    if isinstance(node, ast.Compare) and isinstance(node.left, (ast.Name, ast.Attribute)):
        left = node.left.id if isinstance(node.left, ast.Name) else node.left.attr
        half = [part for part in node.comparators if isinstance(part, ast.Constant) and part.value == 0.5]
        return "gamma" in left and bool(half)
    return False


def threshold_places(root: Path) -> list[str]:
    """Statements that decide, or spell out, gamma > 0.5."""
    places = set()

    def walk(node: ast.AST, statement: int, path: Path, texts: set[int]) -> None:
        statement = node.lineno if isinstance(node, ast.stmt) else statement
        if id(node) not in texts and _decides(node):
            places.add(f"{path.relative_to(root)}:{statement}")
        for child in ast.iter_child_nodes(node):
            walk(child, statement, path, texts)

    for path in python_files(root / PACKAGE):
        tree = ast.parse(path.read_text())
        walk(tree, 0, path, docstrings(tree))
    return sorted(places)


def odd_words(root: Path) -> list[str]:
    """Every odd word with its place."""
    pattern = re.compile(rf"\b(?:{'|'.join(ODD_WORDS)})\b", re.IGNORECASE)
    return [
        f"{path.relative_to(root)}:{number}: {word}"
        for path in python_files(root / PACKAGE)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for word in pattern.findall(line)
    ]


def folder_ratios(root: Path) -> list[tuple[float, str]]:
    """Lines of each folder of the package but `data`, over those of `attribution`; largest first."""
    folders = [path for path in (root / PACKAGE).iterdir() if (path / "__init__.py").exists() and path.name != "data"]
    attribution = lines(root / PACKAGE / "attribution")
    return sorted(((lines(path) / attribution, path.name) for path in folders), reverse=True)


def environment(root: Path) -> dict[str, str]:
    """The environment of a process that imports the package of `root`."""
    return os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def collected_items(root: Path) -> str:
    """The number of items that pytest collects."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", "-p", "no:cacheprovider"]
    output = subprocess.run(command, cwd=root, env=environment(root), capture_output=True, text=True).stdout
    found = re.search(r"(\d+) tests collected", output)
    return f"{int(found[1]):,}" if found else "not collected"


def traced_modules(root: Path) -> list[str]:
    """The modules that one image with one caption passes on its way from a shard to the tables."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).resolve()), "--trace", folder]
        done = subprocess.run(command, cwd=root, env=environment(root), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the traced test failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    ran = [line.removeprefix("ran ") for line in done.stdout.splitlines() if line.startswith("ran ")]
    return [module for module in ran if not module.startswith(f"{PACKAGE}.models.")]


def carries(value: object, carriers: tuple[type, ...], depth: int = 3) -> bool:
    """Whether an argument holds something of the pair: pixels, tokens, maps, or rows of a table."""
    if isinstance(value, carriers):
        return True
    if depth == 0:
        return False
    if isinstance(value, dict):
        # A row of a table: what was measured, by name.
        return "gamma" in value or any(carries(part, carriers, depth - 1) for part in value.values())
    if isinstance(value, (list, tuple)):
        return any(carries(part, carriers, depth - 1) for part in value[:3])
    if is_dataclass(value) and not isinstance(value, type):
        return any(carries(getattr(value, part.name, None), carriers, depth - 1) for part in fields(value))
    return False


class Watch:
    """Collects the modules that are given something of the pair, from the first opening of a shard on.

    Attributes:
        reached: the modules so far, when the last table was put into its place.
    """

    def __init__(self, carriers: tuple[type, ...]) -> None:
        self._carriers = carriers
        self._seen: set[str] = set()
        self.reached: set[str] = set()
        sys.addaudithook(self._on_file)

    def _on_file(self, event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith(".tar") and arguments[1] in ("r", "rb", None):
            threading.setprofile(self._on_call)
            sys.setprofile(self._on_call)
        elif event == "os.rename" and str(arguments[1]).endswith(".csv"):
            self.reached.update(self._seen)

    def _on_call(self, frame: FrameType, event: str, argument: object) -> None:
        module, code = frame.f_globals.get("__name__", ""), frame.f_code
        # Only functions have CO_OPTIMIZED, not the code of modules and classes.
        if event != "call" or module in self._seen or not code.co_flags & inspect.CO_OPTIMIZED:
            return
        if module.startswith(f"{PACKAGE}."):
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            if any(carries(frame.f_locals.get(name), self._carriers) for name in names):
                self._seen.add(module)


def trace(folder: Path) -> None:
    """Measure one image with one caption, and print a line `ran MODULE` for each module."""
    import lightning as L
    import numpy as np
    import pandas as pd
    import PIL.Image
    import torch

    from lightning_xai.data import ShardDataModule
    from lightning_xai.data.shapes import prepare_shapes

    try:
        from lightning_xai.evaluation import AttributionEvaluation
    except ImportError:
        from lightning_xai.tasks import AttributionEvaluation  # its place in version 0.1

    prepare_shapes(folder / "shapes", 1, 1)
    torch.manual_seed(0)
    module = AttributionEvaluation(
        model="configs/models/shapes_vit.json",
        pretrained=None,
        out=folder / "out",
        methods={"feature_pair": {}},
        metrics=["grounding"],
    )
    watch = Watch((torch.Tensor, np.ndarray, pd.DataFrame, PIL.Image.Image, bytes))
    data = ShardDataModule(test=folder / "shapes" / "val", num_workers=0, captions_per_image=1)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, inference_mode=False, enable_progress_bar=False, default_root_dir=folder
    )
    trainer.test(module, data)
    sys.setprofile(None)
    if not watch.reached:
        raise RuntimeError("the test wrote no table")
    for name in sorted(watch.reached):
        print("ran", name)


def figures(root: Path, collect: bool) -> Iterator[Figure]:
    """All rows."""
    yield Figure("lines of the package", f"{lines(root / PACKAGE):,}", "22,500")
    yield Figure("lines of tests", f"{lines(root / 'tests'):,}", "23,500")
    yield Figure("test items", collected_items(root) if collect else "-", "2,800")
    modules = traced_modules(root)
    yield Figure("modules from shard to CSV", str(len(modules)), "14", modules)
    for kind, (names, own) in ENTRIES.items():
        touched = files_to_touch(root, names, own)
        yield Figure(f"files to touch for a {kind}", f"{1 + len(touched)}", "2", touched)
    places = threshold_places(root)
    yield Figure('places that decide "gamma > 0.5"', str(len(places)), "1", places)
    yield Figure("words of the README", f"{len((root / 'README.md').read_text().split()):,}", "900")
    words = odd_words(root)
    yield Figure("odd words", str(len(words)), "15", words)
    (ratio, name), *_ = ratios = folder_ratios(root)
    details = [f"{name}: {ratio:.2f}" for ratio, name in ratios]
    yield Figure("largest folder over attribution/", f"{ratio:.2f} ({name})", "1.20", details)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, metavar="ROOT", help="another checkout to compare with")
    parser.add_argument("--verbose", action="store_true", help="show what was counted")
    parser.add_argument("--no-collect", action="store_true", help="do not count test items, which takes half a minute")
    parser.add_argument("--trace", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trace is not None:
        trace(options.trace)
        return
    roots = {"after" if options.before else "value": Path(__file__).parents[1]}
    if options.before:
        roots = {"before": options.before.resolve(), **roots}
    columns = {name: list(figures(root, not options.no_collect)) for name, root in roots.items()}
    print(f"| figure | {' | '.join(columns)} | at most |\n|{'---|' * (len(columns) + 2)}")
    for row in zip(*columns.values(), strict=True):
        print(f"| {row[0].name} | {' | '.join(each.value for each in row)} | {row[0].aim} |")
    for name, column in columns.items() if options.verbose else ():
        for each in column:
            if each.details:
                print(f"\n{each.name} ({name}):", *each.details, sep="\n  ")


if __name__ == "__main__":
    main()
