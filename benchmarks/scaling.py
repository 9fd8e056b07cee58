"""What saturates first from 1 to 1024 GPUs and up to a billion pairs: tables from formulas and a few measured numbers.

    python benchmarks/scaling.py                              # the tables of docs/scaling.md, for its inputs
    python benchmarks/scaling.py --model ViT-L-14 --batch-size 512 --gradient-checkpointing
    python benchmarks/scaling.py --measure data/coco/train    # the measured inputs, of your shards on this machine
    python benchmarks/scaling.py --write docs/scaling.md      # replaces the page's tables

The formulas stand in `scaling_formulas.py`, with their assumptions; docs/scaling.md explains them and names the sources
of the defaults. Nothing here needs a GPU or starts a training.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TypeVar

from scaling_formulas import (
    GPUS,
    RESOURCES,
    Cluster,
    DataMeasures,
    Plan,
    Shape,
    checkpoint_bytes,
    demands,
    evaluation_seconds,
    exchange_bytes,
    loss_seconds,
    memory,
    read_rate,
    saturates_at,
    step_seconds,
    towers_seconds,
    waiting_seconds,
)

WORLDS = (1, 8, 64, 256, 1024)
DATA_SETS = {"COCO": 113_287, "CC3M": 3_318_333, "CC12M": 12_423_374, "400 million": 400_000_000, "1e9": 1_000_000_000}
"""Name -> pairs; COCO is Karpathy's train split, the others are as published, before links were lost."""
MODELS = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14", "ViT-bigG-14")
HELD_WORLDS = (64, 128, 256, 512, 1024)
LARGEST_WORLD = 1 << 17

_Inputs = TypeVar("_Inputs", Plan, Cluster, DataMeasures)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def amount(value: float, unit: str = "B") -> str:
    """A number with the prefix that keeps it short.

    >>> amount(1234567), amount(0.25, "s"), amount(999.96e9), amount(0, "s")
    ('1.23 MB', '250 ms', '1.00 TB', '0 s')
    """
    prefixes = {1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k", 1: "", 1e-3: "m", 1e-6: "µ"}
    if not value:
        return f"0 {unit}"
    if unit == "s" and value >= 1:
        days, hours = value / 86400, value / 3600
        return f"{days:.3g} days" if days >= 2 else f"{hours:.3g} h" if hours >= 2 else f"{value:.3g} s"
    size = next((size for size in prefixes if value >= 0.9995 * size), 1e-6)
    return f"{value / size:.{2 if value < 9.995 * size else 1 if value < 99.95 * size else 0}f} {prefixes[size]}{unit}"


def gpus(world: int) -> str:
    """So many GPUs, in words."""
    return "1 GPU" if world == 1 else f"{world:,} GPUs"


def step_table(shape: Shape, plan: Plan, cluster: Cluster) -> str:
    """What a step costs at each number of GPUs."""
    header = ("GPUs", "global batch", "towers", "loss", "features exchanged", "", "gradients exchanged", "", "step")
    rows = []
    for world in WORLDS:
        features, gradients = exchange_bytes(shape, plan, world)
        rate = cluster.link(world)
        rows.append(
            (
                f"{world:,}",
                f"{world * plan.batch_size:,}",
                amount(towers_seconds(shape, plan, cluster), "s"),
                amount(loss_seconds(shape, plan, cluster, world), "s"),
                amount(features),
                amount(features / rate, "s"),
                amount(gradients),
                amount(gradients / rate, "s"),
                amount(step_seconds(shape, plan, cluster, world), "s"),
            )
        )
    return table(header, rows)


def demand_table(shape: Shape, plan: Plan, cluster: Cluster, data: DataMeasures) -> str:
    """Demand over capacity of each resource for the largest data set; the most wanted one last."""
    samples = max(DATA_SETS.values())
    rows = []
    for world in WORLDS:
        shares = demands(shape, plan, cluster, data, world, samples)
        first = max(shares, key=shares.__getitem__)
        told = f"**{first}**" if shares[first] >= 1 else f"none; {first} next"
        rows.append((f"{world:,}", *(f"{share:.2g}" for share in shares.values()), told))
    return table(("GPUs", *RESOURCES, "first"), rows)


def limit_table(shape: Shape, plan: Plan, cluster: Cluster, data: DataMeasures) -> str:
    """From how many GPUs on each resource is saturated, and the setting that moves it."""
    rows = []
    for name, setting in RESOURCES.items():
        samples = DATA_SETS["COCO"] if name == "pairs" else max(DATA_SETS.values())
        world = saturates_at(name, shape, plan, cluster, data, samples, LARGEST_WORLD)
        told = f"not up to {LARGEST_WORLD:,}" if world is None else f"{world:,}"
        rows.append((f"{name} (COCO)" if name == "pairs" else name, told, setting))
    return table(("resource", "saturated from GPUs", "what moves it"), rows)


def memory_table(plan: Plan, cluster: Cluster) -> str:
    """Memory of a rank for each model and choice of options."""
    plain = replace(plan, gradient_checkpointing=False, chunk_size=None, fsdp=False)
    chunk = max(plan.batch_size // 8, 1)
    choices = {
        "plain": plain,
        "gradient_checkpointing": replace(plain, gradient_checkpointing=True),
        f"chunk_size: {chunk}": replace(plain, chunk_size=chunk),
        "both": replace(plain, gradient_checkpointing=True, chunk_size=chunk),
        "both, FSDP2": replace(plain, gradient_checkpointing=True, chunk_size=chunk, fsdp=True),
    }
    world = 8
    rows = []
    for model in MODELS:
        shape = Shape.of(model)
        totals = [sum(memory(shape, choice, world).values()) for choice in choices.values()]
        shown = [amount(total) if total <= cluster.gpu.memory else f"{amount(total)} (too much)" for total in totals]
        rows.append((model, f"{shape.parameters / 1e6:,.0f} M", *shown))
    return table(("model", "parameters", *choices), rows)


def part_table(shape: Shape, plan: Plan) -> str:
    """What the memory of a rank is made of."""
    parts = {world: memory(shape, plan, world) for world in WORLDS}
    rows = [(f"{world:,}", *map(amount, part.values()), amount(sum(part.values()))) for world, part in parts.items()]
    return table(("GPUs", *parts[WORLDS[0]], "together"), rows)


def data_table(plan: Plan, data: DataMeasures) -> str:
    """Shards and manifest of each data set."""
    header = ("data set", "pairs", "bytes", "shards", "manifest", "opened in", "kept by a process")
    rows = []
    for name, samples in DATA_SETS.items():
        shards = -(-samples // plan.samples_per_shard)
        rows.append(
            (
                name,
                f"{samples:,}",
                amount(samples * data.bytes_per_sample),
                f"{shards:,}",
                amount(shards * data.manifest_bytes),
                amount(shards * data.manifest_seconds, "s"),
                amount(shards * data.manifest_memory),
            )
        )
    return table(header, rows)


def epoch_table(shape: Shape, plan: Plan, cluster: Cluster, data: DataMeasures) -> str:
    """Steps and time of an epoch by data set and number of GPUs, as the GPUs allow and as the readers do."""
    rows = []
    for name, samples in DATA_SETS.items():
        cells = []
        for world in WORLDS:
            steps = samples // world // plan.batch_size
            if not steps:
                cells.append(f"batch_size at most {samples // world}")
                continue
            alone = step_seconds(shape, plan, cluster, world)
            fed = max(alone, world * plan.batch_size / read_rate(cluster, data, world))
            told = amount(steps * alone, "s")
            cells.append(f"{steps:,} steps, {told}" + (f" (read: {amount(steps * fed, 's')})" if fed > alone else ""))
        rows.append((name, *cells))
    return table(("data set", *map(gpus, WORLDS)), rows)


def checkpoint_table(plan: Plan, cluster: Cluster) -> str:
    """Size of a checkpoint, how long one rank writes it, and how rarely it has to in order to cost little."""
    rows = []
    for model in MODELS:
        shape = Shape.of(model)
        size = checkpoint_bytes(shape)
        seconds = size / cluster.checkpoint_rate
        steps = math.ceil(100 * seconds / step_seconds(shape, plan, cluster, HELD_WORLDS[0]))
        rows.append((model, amount(size), amount(seconds, "s"), f"{steps:,} steps"))
    header = ("model", "checkpoint", "written in", f"costs 1 % of the time on {gpus(HELD_WORLDS[0])} if written every")
    return table(header, rows)


def held_table(shape: Shape, plan: Plan, cluster: Cluster, data: DataMeasures) -> str:
    """One global batch on ever more GPUs: what the step is made of, and the first thing to run out."""
    batch = HELD_WORLDS[0] * plan.batch_size
    rows = []
    for world in HELD_WORLDS:
        held = replace(plan, batch_size=batch // world)
        shares = demands(shape, held, cluster, data, world, max(DATA_SETS.values()))
        step = step_seconds(shape, held, cluster, world)
        parts = (f(shape, held, cluster, world) for f in (loss_seconds, waiting_seconds))
        memory_share = shares["GPU memory"]
        rows.append(
            (
                f"{world:,}",
                f"{held.batch_size:,}",
                amount(towers_seconds(shape, held, cluster), "s"),
                *(amount(part, "s") for part in parts),
                f"{batch / step:,.0f}",
                f"{memory_share:.0%}",
                max(shares, key=shares.__getitem__),
            )
        )
    header = ("GPUs", "batch_size", "towers", "loss", "waiting", "pairs/s", "of the GPU's memory", "most wanted")
    return table(header, rows)


def evaluation_table(shape: Shape, plan: Plan, cluster: Cluster) -> str:
    """Seconds of a retrieval evaluation with five captions an image: embedding, and recall on every rank."""
    rows = []
    for images in (5_000, 100_000, 1_000_000):
        features = 4 * shape.embedding * 6 * images
        cells = []
        for world in WORLDS:
            embedding, recall = evaluation_seconds(shape, plan, cluster, world, images, 5 * images)
            cells.append(f"{amount(embedding, 's')} + {amount(recall, 's')}")
        rows.append((f"{images:,}", amount(features), *cells))
    return table(("images", "features on each rank", *map(gpus, WORLDS)), rows)


def input_table(cluster: Cluster, data: DataMeasures, shape: Shape) -> str:
    """What the other tables are computed from, hardware and measured numbers."""
    gpu = cluster.gpu
    manifest = f"{data.manifest_bytes:.0f} B in the file, {data.manifest_memory:.0f} B of memory, "
    manifest += f"{1e6 * data.manifest_seconds:.1f} µs to open"
    rows = [
        ("GPU", f"{gpu.name}: {gpu.flops / 1e12:.0f} TFLOP/s in bf16, {gpu.float32_flops / 1e12:.0f} in float32"),
        ("its memory", amount(gpu.memory)),
        ("share of the peak that towers reach", f"{cluster.utilisation:.0%}"),
        ("share of the float32 peak that the loss reaches", f"{cluster.float32_utilisation:.0%}"),
        ("GPUs in a node, and their links one way", f"{cluster.gpus_per_node}, {amount(gpu.link)}/s"),
        ("network of each GPU one way", f"{amount(cluster.network)}/s"),
        ("share of a link that a collective reaches", f"{cluster.network_utilisation:.0%}"),
        ("CPU cores for each GPU", f"{cluster.cores_per_gpu}"),
        ("storage, all nodes together", f"{amount(cluster.storage)}/s"),
        ("writing a checkpoint, one rank", f"{amount(cluster.checkpoint_rate)}/s"),
        ("bytes of a sample (measured)", f"{data.bytes_per_sample:,.0f}"),
        ("samples/s of a worker on one core (measured)", f"{data.reader_rate:,.0f}"),
        ("manifest, for each shard (measured)", manifest),
        ("the model's forward pass for a pair", f"{shape.forward_flops(77) / 1e9:.1f} GFLOP at 77 tokens"),
    ]  # fmt: skip
    return table(("input", "value"), rows)


def tables(options: argparse.Namespace) -> dict[str, str]:
    """Every table of the page by its name."""
    shape, plan, cluster, data = read(options)
    return {
        "inputs": input_table(cluster, data, shape),
        "demands": demand_table(shape, plan, cluster, data),
        "limits": limit_table(shape, plan, cluster, data),
        "steps": step_table(shape, plan, cluster),
        "parts": part_table(shape, plan),
        "memory": memory_table(plan, cluster),
        "data": data_table(plan, data),
        "epochs": epoch_table(shape, plan, cluster, data),
        "held": held_table(shape, plan, cluster, data),
        "checkpoints": checkpoint_table(plan, cluster),
        "evaluation": evaluation_table(shape, plan, cluster),
    }


def with_tables(page: str, found: dict[str, str]) -> str:
    """A page with the tables between its markers `<!-- table: NAME -->` and `<!-- end -->` replaced.

    Raises:
        ValueError: the page lacks a table, or has one that the calculator does not.
    """
    names = re.findall(r"<!-- table: (\w+) -->", page)
    if sorted(names) != sorted(found):
        raise ValueError(f"the page has the tables {sorted(names)}, the calculator has {sorted(found)}")
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}\n{found[match[2]]}\n\n{match[3]}",
        page,
        flags=re.DOTALL,
    )


def read(options: argparse.Namespace) -> tuple[Shape, Plan, Cluster, DataMeasures]:
    """The inputs from parsed options."""
    given = vars(options) | {"gpu": GPUS[options.gpu]}

    def made(kind: type[_Inputs]) -> _Inputs:
        return kind(**{item.name: given[item.name] for item in fields(kind)})

    return Shape.of(options.model), made(Plan), made(Cluster), made(DataMeasures)


def parser() -> argparse.ArgumentParser:
    """The command line; an option for each input, with the field's own default."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="ViT-B-16", help="an open_clip name of a model of two transformers")
    made.add_argument("--gpu", default="H100", choices=GPUS)
    for kind in (Plan, Cluster, DataMeasures):
        group = made.add_argument_group(kind.__name__)
        for item in fields(kind):
            option = f"--{item.name.replace('_', '-')}"
            if item.type == "bool":
                group.add_argument(option, action="store_true")
            elif item.name != "gpu":
                number = int if "int" in str(item.type) else float
                default = {} if item.default is None else {"default": item.default}
                group.add_argument(option, type=number, **default)  # type: ignore[arg-type]
    made.add_argument("--measure", type=Path, metavar="DIR", help="measure a folder of shards, and print the options")
    made.add_argument("--write", type=Path, metavar="PAGE", help="replace the tables of a page")
    return made


def command(data: DataMeasures) -> str:
    """The options that stand for measured numbers."""
    return " ".join(f"--{item.name.replace('_', '-')} {getattr(data, item.name):.4g}" for item in fields(data))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, write them into a page, or measure."""
    options = parser().parse_args(arguments)
    if options.measure:
        from scaling_measures import measure

        print(command(measure(options.measure, options.model)))
        return
    found = tables(options)
    if options.write:
        options.write.write_text(with_tables(options.write.read_text(encoding="utf-8"), found), encoding="utf-8")
        return
    sys.stdout.write("\n\n".join(f"{name}\n\n{text}" for name, text in found.items()) + "\n")


if __name__ == "__main__":
    main()
