#!/usr/bin/env bash
# ImageBind on PyPI: which package holds the model, and under which licence.
#
# One would guess that `pip install imagebind` gives ImageBind, and that a package whose metadata say "MIT" may be used as
# MIT software may. The package `imagebind` holds no model at all. `imagebind-unofficial` holds it; its classifier says MIT,
# while the licence text that it ships forbids commercial use, and its requirements leave out einops, which its model
# modules import, so that the model cannot be imported from what pip installs alone.
#
# Users care because sound with images is explained through this package (extra `imagebind`): whoever checks licences by
# metadata would ship a non-commercial model in a product.
#
# Source: the wheels themselves, from PyPI; seen in November 2026. Run it with Python 3.10 or later and pip; it downloads
# two small wheels into a temporary folder, installs nothing, and fails if what it prints changes.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python -m pip download --quiet --no-deps --dest "$work" imagebind==0.0.1.dev0 imagebind-unofficial==0.1.1
python - "$work" <<'PYTHON'
import re
import sys
import zipfile
from pathlib import Path

found = {}
for path in sorted(Path(sys.argv[1]).glob("*.whl")):
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        metadata = wheel.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
        sources = {name: wheel.read(name).decode() for name in names if name.endswith(".py")}
        licence = next((wheel.read(name).decode() for name in names if name.endswith("LICENSE")), "")
    name = re.search(r"^Name: (.*)$", metadata, re.M)[1]
    required = {re.split(r"[ ;<>=!~\[]", line)[0].lower() for line in re.findall(r"^Requires-Dist: (.*)$", metadata, re.M)}
    found[name] = {
        "model modules": sum("/models/" in source for source in sources),
        "licence by its classifier": re.findall(r"^Classifier: License :: (.*)$", metadata, re.M),
        "licence text begins": licence.strip().partition("\n")[0],
        "imports einops": any(re.search(r"^import einops", text, re.M) for text in sources.values()),
        "requires einops": "einops" in required,
    }
    print(f"{name} {re.search(r'^Version: (.*)$', metadata, re.M)[1]}")
    for what, value in found[name].items():
        print(f"  {what}: {value}")

expected = {
    "imagebind": {
        "model modules": 0,
        "licence by its classifier": [],
        "licence text begins": "",
        "imports einops": False,
        "requires einops": False,
    },
    "imagebind-unofficial": {
        "model modules": 5,
        "licence by its classifier": ["OSI Approved :: MIT License"],
        "licence text begins": "Attribution-NonCommercial-ShareAlike 4.0 International",
        "imports einops": True,
        "requires einops": False,
    },
}
if found != expected:
    sys.exit(f"this has changed; it was {expected}")
print("As described: the model is in imagebind-unofficial, non-commercial whatever its classifier says, without einops.")
PYTHON
