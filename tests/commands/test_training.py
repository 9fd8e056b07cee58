"""`fit`, stopped and started again: the same weights, numbers and tables as if nothing had happened."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from stopped_runs import config_of, differences, finish, left_by, stop_at_random

ALL = (signal.SIGUSR1, signal.SIGTERM, signal.SIGKILL)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, architecture_file: Callable[[str], Path], shapes: Path) -> Path:
    return config_of(tmp_path_factory.mktemp("training"), architecture_file("vit"), shapes)


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert finish(["fit", f"--config={config}", f"--run={folder / 'run'}"], folder / "log") == 0
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_runs_stopped_at_20_random_moments_end_as_one_that_never_was(
    workers: int, config: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    options = [f"--config={config}", f"--data.init_args.num_workers={workers}"]
    whole = request.getfixturevalue("whole") if workers == 0 else tmp_path / "whole"
    if workers:
        assert finish(["fit", *options, f"--run={whole}"], tmp_path / "whole.log") == 0
    expected, rng, stops, runs = left_by(whole), random.Random(workers), 0, 0
    while stops < 20:
        run, log = tmp_path / f"run{runs}", tmp_path / f"log{runs}"
        runs += 1
        arguments = ["fit", *options, f"--run={run}", "--save_every_minutes=0.001"]
        while stops < 20 and (stopped := stop_at_random(arguments, log, run, rng, ALL, seconds=1.2)):
            stops += 1
            # A signal that comes before training has begun to listen ends the process in the usual way.
            assert stopped.code in (-stopped.signum, 128 + stopped.signum), (stopped, log.read_text()[-3000:])
        assert finish(arguments, log) == 0, log.read_text()[-3000:]
        assert differences(left_by(run), expected) == []
    assert runs < 15  # else they ended before they could be stopped
