"""`demo` from any folder, and the configurations that the package brings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_xai.cli import _with_shipped_configs, main
from lightning_xai.commands.demo import Demo
from lightning_xai.shipped import shipped

ROOT = Path(__file__).resolve().parents[2]


def test_configs_are_found_from_any_folder_but_your_own_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    demo = Path("configs/demo.yaml")
    assert shipped(demo).samefile(ROOT / demo)
    for other in ("configs/none.yaml", "demo.yaml", "configs/../configs/demo.yaml", "configs/../../pyproject.toml"):
        assert shipped(Path(other)) == Path(other)
    (tmp_path / "configs").mkdir()
    demo.write_text("mine")
    assert shipped(demo) == demo


def test_fit_takes_a_config_of_the_package_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config=configs/demo.yaml", "--print_config"])
    assert "configs/models/shapes_vit.json" in capsys.readouterr().out


def test_only_names_of_configs_are_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    others = ["--config=s3://bucket/a.yaml", "--config", "{a: b//c}" + 300 * "d", "-c", "./e.yaml", "configs/demo.yaml"]
    assert _with_shipped_configs(others) == others
    found = _with_shipped_configs(["--config=configs/demo.yaml", "--config", "configs/demo.yaml"])
    assert found == [f"--config={ROOT}/configs/demo.yaml", "--config", f"{ROOT}/configs/demo.yaml"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs=0"], "--epochs has to be at least 1; got 0"),
        (["--images=-3"], "--images has to be at least 1; got -3"),
        (["--photos=0"], "--photos has to be at least 1; got 0"),
        (["--out={}/file"], "--out has to be a folder, but"),
    ],
)
def test_settings_of_no_use_are_told_before_anything_is_written(
    options: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    given = [option.format(tmp_path) for option in options]
    with pytest.raises(SystemExit, match=message):
        main(["demo", *given])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def fails_instead(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that `demo` starts, in place of each of which a process ends with status 3."""
    commands: list[list[str]] = []
    start = subprocess.Popen

    def started(command: list[str]) -> subprocess.Popen[bytes]:
        commands.append(command)
        return start([sys.executable, "-c", "raise SystemExit(3)"])

    monkeypatch.setattr("lightning_xai.commands.demo.subprocess.Popen", started)
    return commands


def test_a_training_that_fails_ends_the_demo_with_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails_instead(monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        Demo(out=tmp_path / "demo")()
    assert stopped.value.code == 3


@pytest.mark.parametrize(
    ("options", "steps"), [({}, None), ({"epochs": 1}, 12), ({"images": 640}, 3), ({"epochs": 9}, 60)]
)
def test_a_shorter_training_warms_up_for_the_same_share_of_its_steps(
    options: dict[str, int], steps: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = fails_instead(monkeypatch)
    with pytest.raises(SystemExit):
        Demo(out=tmp_path / "demo", **options)()
    given = [each.partition("warmup_steps=")[2] for each in commands[0] if "warmup_steps" in each]
    assert given == ([] if steps is None else [str(steps)])


@pytest.mark.slow
def test_the_demo_trains_explains_and_names_the_page_and_a_rerun_says_it_is_there(tmp_path: Path) -> None:
    def demo(*options: str) -> list[str]:
        command = [sys.executable, "-m", "lightning_xai", "demo", "--out", "out", *options]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        return run.stdout.splitlines()

    small = ("--epochs=1", "--images=128")
    said = demo(*small, "--photos=2")
    page = tmp_path / "out" / "explained" / "explanations.html"
    assert said[-1] == f"Open {page.resolve()}"
    assert said[-2].startswith("First picture after ")
    assert len([*page.parent.glob("*/explanation.html")]) == 2
    assert demo(*small, "--photos=2") == [
        "The demo is there already; --out ANOTHER_FOLDER makes a new one.", f"Open {page.resolve()}",
    ]  # fmt: skip
    # Other settings are no reason to train again, but to explain again.
    assert demo(*small, "--photos=3")[-1] == f"Open {page.resolve()}"
    assert len([*page.parent.glob("*/explanation.html")]) == 3
