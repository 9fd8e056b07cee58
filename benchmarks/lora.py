"""Times steps with low-rank adapters against those of full fine-tuning, in turn; keeps a table.

    python benchmarks/lora.py     # ViT-B-32, float32: a few minutes on a CPU

Random weights and inputs. Read the ratios, which are medians over the rounds of what cores have worked for the process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from kept_table import keep

FULL = "full"


def tasks(model: str) -> dict[str, Any]:
    """What is compared: the same model, with other parameters that learn."""
    from lightning_xai.training import ContrastiveFineTuning, Lora

    options: dict[str, dict[str, Any]] = {FULL: {}, "freeze_text_embeddings": {"freeze_text_embeddings": True}}
    options |= {f"lora, targets: {targets}": {"lora": Lora(targets=targets)} for targets in ("attention", "mlp", "all")}
    return {name: ContrastiveFineTuning(model, None, **chosen) for name, chosen in options.items()}


def step_seconds(task: Any, optimizer: Any, batch_size: int) -> float:
    """Core seconds of one training step."""
    import torch

    from lightning_xai.loss import contrastive_loss

    encoder = task.encoder
    images = torch.randn(batch_size, *encoder.image_shape)
    tokens = encoder.trim_tokens(encoder.tokenizer.encode(["a photograph of two dogs on a beach"] * batch_size))
    begin = time.process_time()
    image, text = (torch.nn.functional.normalize(x, dim=1) for x in encoder(images, tokens))
    loss, _ = contrastive_loss(image, text, encoder.logit_scale.exp())
    torch.autograd.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - begin


def measure(model: str, batch_size: int, rounds: int) -> str:
    """The table as Markdown."""
    import torch

    compared = tasks(model)
    trained = {name: [p for p in task.parameters() if p.requires_grad] for name, task in compared.items()}
    optimizers = {name: torch.optim.AdamW(parameters) for name, parameters in trained.items()}
    spent: dict[str, list[float]] = {name: [] for name in compared}
    for number in range(rounds + 1):  # the first allocates
        for name, task in compared.items():
            seconds = step_seconds(task, optimizers[name], batch_size)
            if number:
                spent[name].append(seconds)
    lines = ["| | parameters that learn | AdamW's averages | time of a step |", "|---|---|---|---|"]
    for name, parameters in trained.items():
        averages = sum(x.nbytes for state in optimizers[name].state.values() for x in state.values())
        ratio = statistics.median(own / full for own, full in zip(spent[name], spent[FULL], strict=True))
        count = sum(parameter.numel() for parameter in parameters)
        lines.append(f"| {name} | {count:,} | {averages / 2**20:.1f} MiB | {ratio:.2f} |")
    return "\n".join([*lines, "", f"{batch_size} pairs a step, {rounds} rounds."])


def main() -> None:
    """Measure, print, and keep the table under benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip name or a model config")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    measured = measure(options.model, options.batch_size, options.rounds)
    keep("lora", "Steps with low-rank adapters", "cpu", measured, options.model)


if __name__ == "__main__":
    main()
