"""Devices are compared with a Slurm allocation before a run starts."""

from __future__ import annotations

import pytest

from lightning_xai.training.preflight import check_allocation


def in_job(monkeypatch: pytest.MonkeyPatch, **variables: object) -> None:
    """Make the environment that of one of Slurm's tasks: four on two nodes, unless `variables` say otherwise."""
    job = {"JOB_ID": 7, "JOB_NAME": "test", "PROCID": 0, "NTASKS": 4, "NNODES": 2, "NTASKS_PER_NODE": 2}
    for name, value in (job | variables).items():
        monkeypatch.setenv(name if name == "MASTER_ADDR" else f"SLURM_{name}", str(value))


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({}, "trainer.devices=1, but Slurm has started 2 task(s) on each node"),
        ({"NTASKS": 2, "NTASKS_PER_NODE": 1}, "trainer.num_nodes=1, but the job has 2 node(s)"),
        ({"NTASKS": 3}, "3 tasks on 2 nodes with 2 a node"),
        (
            {"NTASKS": 1, "NNODES": 1, "NTASKS_PER_NODE": 1, "MASTER_ADDR": "no-such-host.invalid"},
            "MASTER_ADDR=no-such-host.invalid cannot be",
        ),
        (
            {"NTASKS": 1, "NNODES": 1, "NTASKS_PER_NODE": 1, "GPUS_ON_NODE": 4},
            "4 GPU(s) and started 1 task(s) on it, and every task takes one: submit with --ntasks-per-node=4",
        ),
    ],
)
def test_devices_that_do_not_match_the_allocation_are_refused(
    job: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, **job)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - compared below, without a pattern
        check_allocation(1, 1, "gpu")
    assert message in str(error.value)


@pytest.mark.parametrize(("gpus", "accelerator"), [("", "gpu"), (2, "gpu"), (4, "cpu")])
def test_devices_that_match_the_allocation_are_accepted(
    gpus: object, accelerator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, GPUS_ON_NODE=gpus)
    for devices in (2, "2", "auto", [0, 1]):
        check_allocation(devices, 2, accelerator)
    with pytest.raises(ValueError, match=r"trainer\.devices=3, but Slurm has started 2"):  # so they were compared
        check_allocation(3, 2, accelerator)
