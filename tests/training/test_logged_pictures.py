"""Pictures and tables in the loggers of a run: real TensorBoard, W&B offline, MLflow with a database, Comet offline."""

from __future__ import annotations

import csv
import io
import json
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from folderless_loggers import WithoutFolder
from lightning.pytorch.loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from quiet_trainer import quiet_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped] # has none
from training_runs import task_of

from lightning_xai.data import ShardDataModule
from lightning_xai.evaluation import AttributionEvaluation
from lightning_xai.evaluation.logged_pictures import HEAT_MAP, Picture, log_pictures, logged_pairs
from lightning_xai.results.table import ResultTable
from lightning_xai.training import GroundingCallback

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:torch")

PICTURES = ("val/grounding_curves", "val/grounding")
TABLES = ("val/grounding_pairs", "val/grounding_classes")
COLUMNS = ["method", "seed", "key", "caption", "phrase", "label", "gamma", "rho", "heat_map"]


class Run(NamedTuple):
    folder: Path
    loggers: dict[str, Any]
    warned: list[str]


class Failing(WithoutFolder):
    """Its service cannot be reached when a picture comes."""

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        raise ConnectionError("no network\nand a second line")


class Client:
    """A client like that of many services: pictures as arrays, tables as files below a name."""

    def __init__(self) -> None:
        self.images: list[tuple[str, int, Any]] = []
        self.files: dict[str, str] = {}

    def log_image(self, image_data: Any, name: str, step: int, quality: int = 9) -> None:
        self.images.append((name, step, image_data.shape))

    def log_artifact(self, run_id: str, local_path: str) -> None:
        raise AssertionError("nothing here knows a run's id")

    def __getitem__(self, name: str) -> Any:
        client = self

        class Place:
            def upload(self, path: str) -> None:
                client.files[name] = path

        return Place()


class Foreign(WithoutFolder):
    def __init__(self) -> None:
        super().__init__()
        self._prefix = "mine"
        self.experiment = Client()


def data_of(shapes: Path) -> ShardDataModule:
    options: dict[str, Any] = {"batch_size": 32, "eval_batch_size": 20, "num_workers": 0}
    return ShardDataModule(train=shapes / "train", val=shapes / "val", test=shapes / "val", **options)


def fit(folder: Path, shapes: Path, architecture: Path, loggers: list[Any]) -> None:
    """One epoch of three steps, and grounding before and after it."""
    options: dict[str, Any] = {"inference_mode": False, "log_every_n_steps": 1, "logger": loggers}
    trainer = quiet_trainer(folder, GroundingCallback(examples=2), **options)
    trainer.fit(task_of(architecture), data_of(shapes))


def mlflow_in(folder: Path) -> MLFlowLogger:
    place = f"sqlite:///{folder / 'mlflow.db'}"
    return MLFlowLogger(tracking_uri=place, artifact_location=(folder / "artifacts").as_uri())


@pytest.fixture(scope="module")
def run(shapes: Path, architecture_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with the loggers that need no further package."""
    folder = tmp_path_factory.mktemp("run")
    loggers: dict[str, Any] = {
        "csv": CSVLogger(folder, name="", version=""),
        "tensorboard": TensorBoardLogger(folder, name="tensorboard", version=""),
        "foreign": Foreign(),
        "failing": Failing(),
        "without": WithoutFolder(),
    }
    with pytest.warns(UserWarning, match="did not take") as warned:
        fit(folder, shapes, architecture_file("vit"), list(loggers.values()))
    loggers["tensorboard"].experiment.flush()
    return Run(folder, loggers, [str(each.message) for each in warned if "did not take" in str(each.message)])


@pytest.fixture(scope="module")
def services(shapes: Path, architecture_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with W&B offline and MLflow's database."""
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    folder = tmp_path_factory.mktemp("services")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_DATA_DIR", str(folder))
        wandb = WandbLogger(project="p", offline=True, save_dir=folder, prefix="mine")
        mlflow = mlflow_in(folder)
        fit(folder, shapes, architecture_file("vit"), [wandb, mlflow])
        wandb.experiment.finish()
    return Run(folder, {"wandb": wandb, "mlflow": mlflow}, [])


def drawn(content: bytes) -> int:
    """The number of different levels of grey of a picture."""
    with Image.open(io.BytesIO(content)) as picture:
        return len(picture.convert("L").getcolors() or [])


def test_tensorboard_has_pictures_at_the_steps_of_its_numbers_and_tables_as_text(run: Run) -> None:
    events = EventAccumulator(str(run.folder / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    steps = [event.step for event in events.Scalars("val/rho")]
    assert steps == [0, 2]
    for name in PICTURES:
        pictures = events.Images(name)
        assert [picture.step for picture in pictures] == steps
        assert all(drawn(picture.encoded_image_string) > 20 for picture in pictures)
    for name in TABLES:
        texts = events.Tensors(f"{name}/text_summary")
        assert [text.step for text in texts] == steps
        [table] = texts[-1].tensor_proto.string_val
        assert table.decode().count("\n| ") > 5
    [table] = events.Tensors(f"{TABLES[0]}/text_summary")[0].tensor_proto.string_val
    assert table.decode().startswith("**val/grounding\\_pairs**\n\n| method | seed | key | caption | phrase |")


def wandb_records(folder: Path) -> Iterator[Any]:
    """The records of an offline run, as `wandb sync` reads them: a log of LevelDB's form, 7 bytes of head before it."""
    from wandb.proto import wandb_internal_pb2

    kinds: Any = wandb_internal_pb2
    [path] = folder.glob("wandb/offline-run-*/*.wandb")
    content, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (left := 2**15 - place % 2**15) < 7:  # a head never spans two blocks
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield kinds.Record.FromString(record)
            record = b""


@pytest.mark.slow
def test_wandb_has_pictures_and_the_table_of_pairs_with_heat_maps(services: Run) -> None:
    records = list(wandb_records(services.folder))
    rows = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    files = next(services.folder.glob("wandb/offline-run-*/files"))
    for name in PICTURES:
        logged = [row for row in rows if f"mine-{name}/path" in row]
        assert [row["trainer/global_step"] for row in logged] == [0, 2]
        assert all(drawn((files / row[f"mine-{name}/path"]).read_bytes()) > 20 for row in logged)
    tables = [row for row in rows if f"mine-{TABLES[0]}/nrows" in row]
    assert [row["trainer/global_step"] for row in tables] == [0, 2]
    # A table with pictures is an artifact.
    artifacts = [record.artifact for record in records if record.WhichOneof("record_type") == "artifact"]
    last = [artifact for artifact in artifacts if "grounding_pairs" in artifact.name][-1]
    parts = {part.path: Path(part.local_path) for part in last.manifest.contents}
    table = json.loads(parts[f"mine-{TABLES[0]}.table.json"].read_text())
    assert table["columns"] == COLUMNS
    assert len(table["data"]) == tables[-1][f"mine-{TABLES[0]}/nrows"] > 20
    shown = [line for line in table["data"] if line[-1] is not None]
    assert len(shown) == 4  # two examples at two places
    assert all(drawn(parts[line[-1]["path"]].read_bytes()) > 20 for line in shown)
    assert all(0 <= line[6] <= 1 and line[7] in (0, 1) and line[4] in line[3] for line in shown)


@pytest.mark.slow
def test_mlflow_has_artifacts_by_step(services: Run) -> None:
    logger = services.loggers["mlflow"]
    for name in PICTURES:
        found = [artifact.path for artifact in logger.experiment.list_artifacts(logger.run_id, name)]
        assert found == [f"{name}/step=00000000.png", f"{name}/step=00000002.png"]
        assert drawn(Path(logger.experiment.download_artifacts(logger.run_id, found[-1])).read_bytes()) > 20
    path = logger.experiment.download_artifacts(logger.run_id, f"{TABLES[0]}/step=00000002.csv")
    with Path(path).open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == COLUMNS
    shown = [line["heat_map"] for line in lines if line["heat_map"]]
    assert len(shown) == 4 < len(lines)
    assert all(drawn(Path(logger.experiment.download_artifacts(logger.run_id, one)).read_bytes()) > 20 for one in shown)


def test_csvlogger_has_the_paths_of_the_files(run: Run) -> None:
    with (run.folder / "pictures.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [(line["step"], line["name"]) for line in lines] == [
        (step, name) for step in "02" for name in (*PICTURES, *TABLES)
    ]
    assert all((run.folder / line["file"]).is_file() for line in lines)
    assert {Path(line["file"]).name for line in lines} == {"progress.png", "curves.png", "values.csv", "classes.csv"}


def test_a_logger_of_another_project_takes_what_its_methods_take_by_name(run: Run) -> None:
    client = run.loggers["foreign"].experiment
    assert [(name, step) for name, step, _ in client.images] == [
        (f"mine-{name}", step) for step in (0, 2) for name in PICTURES
    ]
    assert all(shape[2] == 3 for _, _, shape in client.images)
    assert sorted(client.files) == [f"mine-{name}/step={step:08d}" for name in sorted(TABLES) for step in (0, 2)]
    assert all(Path(path).is_file() for path in client.files.values())


def test_a_client_that_takes_files_into_folders_keeps_those_of_all_steps(tmp_path: Path) -> None:
    stored = []

    class Store:
        def log_artifact(self, local_path: str, artifact_path: str | None = None) -> None:
            stored.append(f"{artifact_path}/{Path(local_path).name}")

    loop = SimpleNamespace(_batches_that_stepped=0)
    fitting = SimpleNamespace(epoch_loop=loop)
    trainer: Any = SimpleNamespace(is_global_zero=True, loggers=[Store()], fit_loop=fitting)
    Image.new("RGB", (4, 4)).save(tmp_path / "progress.png")
    for step in (0, 2):
        loop._batches_that_stepped = step
        log_pictures(trainer, [Picture(PICTURES[1], tmp_path / "progress.png")])
    assert stored == [f"val/grounding/step={step:08d}/progress.png" for step in (0, 2)]


def test_a_picture_that_cannot_be_drawn_is_warned_of_once_and_the_run_goes_on(
    shapes: Path, architecture_file: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def undrawable(*_: Any) -> None:
        raise OSError("no font\nand a second line")

    monkeypatch.setattr("lightning_xai.training.grounding_report.graded_picture", undrawable)
    with pytest.warns(UserWarning, match="could not be made") as warned:
        fit(tmp_path, shapes, architecture_file("vit"), [CSVLogger(tmp_path, name="", version="")])
    messages = [str(each.message) for each in warned if "could not be made" in str(each.message)]
    assert len(messages) == 1
    assert "could not be made (OSError: no font); the run goes on" in messages[0]
    with (tmp_path / "pictures.csv").open(newline="", encoding="utf-8") as file:
        assert [line["name"] for line in csv.DictReader(file)] == [*PICTURES, *PICTURES]  # those that came before it
    assert (tmp_path / "grounding" / "epoch=001" / "values.csv").is_file()


def test_a_logger_that_fails_or_takes_nothing_is_warned_of_once_and_the_run_goes_on(run: Run) -> None:
    assert len(run.warned) == 2
    failing, without = run.warned
    assert failing.startswith(
        "Failing did not take val/grounding_curves (ConnectionError: no network); the run goes on"
    )
    assert without.startswith("WithoutFolder did not take val/grounding_curves (NotImplementedError: it has none of")
    assert (run.folder / "grounding" / "epoch=001" / "values.csv").is_file()


@pytest.mark.slow
def test_comet_has_pictures_and_tables(
    shapes: Path, architecture_file: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comet_ml = pytest.importorskip("comet_ml")
    monkeypatch.chdir(tmp_path)  # it has a folder of its own there
    logger: Any = CometLogger(online=False)
    # The experiment that Lightning makes offline is disabled.
    logger._experiment = comet_ml.OfflineExperiment(offline_directory=str(tmp_path), log_code=False)
    trainer = quiet_trainer(tmp_path, GroundingCallback(examples=2), inference_mode=False, logger=logger)
    trainer.validate(task_of(architecture_file("vit")), data_of(shapes), verbose=False)
    logger.experiment.end()
    [path] = tmp_path.glob("*.zip")
    with zipfile.ZipFile(path) as archive:
        messages = [json.loads(line) for line in archive.read("messages.json").decode().splitlines()]
        uploads = [each["payload"] for each in messages if each["type"] == "file_upload"]
        about = [(each["additional_params"], each["file_path"]) for each in uploads]
        named = {told.get("figName") or told.get("fileName"): path for told, path in about}
        named = {name: path for name, path in named.items() if name and name.startswith("val/")}
        pictures = ["val/grounding", *(f"val/grounding_pairs/{row}" for row in range(4))]
        assert list(named) == [*pictures, *(f"{name}/step=00000000.csv" for name in TABLES)]
        assert all(drawn(archive.read(named[name])) > 20 for name in pictures)
        table = archive.read(named[f"{TABLES[0]}/step=00000000.csv"]).decode()
    lines = list(csv.DictReader(table.splitlines()))
    assert list(lines[0]) == COLUMNS
    assert [line["heat_map"] for line in lines if line["heat_map"]] == pictures[1:]


@pytest.mark.slow
def test_a_step_that_is_logged_again_replaces_what_was_there(
    tmp_path: Path, shapes: Path, architecture_file: Callable[[str], Path]
) -> None:
    pytest.importorskip("mlflow")
    mlflow = mlflow_in(tmp_path)
    loggers = [CSVLogger(tmp_path, name="", version=""), mlflow]
    trainer = quiet_trainer(tmp_path, GroundingCallback(examples=1), inference_mode=False, logger=loggers)
    task = task_of(architecture_file("vit"))
    for _ in range(2):
        trainer.validate(task, data_of(shapes), verbose=False)
    names = [line.split(",")[1] for line in (tmp_path / "pictures.csv").read_text().splitlines()[1:]]
    assert names == ["val/grounding", *TABLES]
    assert len(mlflow.experiment.list_artifacts(str(mlflow.run_id), "val/grounding")) == 1


def test_an_evaluation_hands_over_heat_maps_scores_and_phrases(
    shapes: Path, architecture_file: Callable[[str], Path], tmp_path: Path
) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    methods: dict[str, Any] = {"feature_pair": None, "other": {"method": "saliency"}}
    options: dict[str, Any] = {"methods": methods, "metrics": ["grounding"], "examples": 2, "failures": 2}
    task = AttributionEvaluation(str(architecture_file("vit")), None, out=tmp_path / "out", **options)
    trainer = quiet_trainer(tmp_path, inference_mode=False, logger=[logger, CSVLogger(tmp_path, name="", version="")])
    trainer.test(task, data_of(shapes), verbose=False)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    names = [f"test/heat_maps/{name}" for name in ("fixed", "failures-feature_pair", "failures-other")]
    assert sorted(events.Tags()["images"]) == sorted(names)
    assert all(drawn(events.Images(name)[0].encoded_image_string) > 20 for name in names)
    assert {f"test/{name}/text_summary" for name in ("scores", "grounding_pairs")} <= set(events.Tags()["tensors"])
    with (tmp_path / "pictures.csv").open(newline="", encoding="utf-8") as file:
        found = {line["file"] for line in csv.DictReader(file)}
    files = ("heat_maps/fixed.png", "heat_maps/failures-feature_pair.png", "heat_maps/failures-other.png", "values.csv")
    assert found == {f"out/{name}" for name in files}


def test_phrases_with_pictures_come_first_and_only_the_first_seed_has_them() -> None:
    targets = [
        {"target": f"t{n}", "kind": "phrase", "index": n, "ordinal": 0, "key": f"k{n}", "caption_index": 0,
         "caption": "a <b>cat</b> | x", "label": "cat", "phrase": "cat"} for n in range(3)
    ]  # fmt: skip
    values = [("m", seed, f"t{n}", metric, 0.5, "") for seed in (0, 1) for n in range(3) for metric in ("gamma", "rho")]
    table = ResultTable.of([*values, ("n", 0, "t0", "gamma", float("nan"), "no_positive")], targets)
    picture = np.zeros((2, 3, 3), np.uint8)
    pairs = logged_pairs("val/p", Path("values.csv"), table, {("m", "k1", "a <b>cat</b> | x", "cat"): picture})
    assert list(pairs.pictures) == [0]
    assert pairs.frame[["seed", "key"]].to_numpy().tolist() == [
        [0, "k1"], [0, "k0"], [0, "k2"], [1, "k0"], [1, "k1"], [1, "k2"]
    ]  # fmt: skip
    assert pairs.cells(lambda row, _: row)[HEAT_MAP].tolist() == [0, *[None] * 5]
    assert "a &lt;b&gt;cat&lt;/b&gt; \\| x" in pairs.markdown()
