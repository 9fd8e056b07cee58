"""`watch`: a real server on a free port, asked as browsers and attackers ask."""

from __future__ import annotations

import http.client
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from result_folders import write_evaluation, write_state
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter

from lightning_xai.cli import main
from lightning_xai.report.watch import WatchServer
from lightning_xai.results.examples import ExampleRecord, words_of, write_examples, write_words
from lightning_xai.results.table import write_csv

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium")
HOSTILE = "</script><img src=x onerror=alert(1)><b>"


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


def measure(run: Path, skills: list[float], caption: str = "a ring and a heart") -> None:
    """Write what a training leaves after each of its epochs, the measurement before it included."""
    for epoch, skill in enumerate(skills):
        folder = run / "grounding" / f"epoch={epoch:03d}"
        if not folder.exists():
            write_state(run, epoch, skill, images=4)
            heat = np.random.default_rng(epoch).normal(size=(4, 4))
            example = ExampleRecord(
                why=("fixed",),
                image="examples/one.jpg",
                key="one",
                caption=caption,
                phrase="a ring",
                spans=((0, 6),),
                label="ring",
                box=(4.0, 4.0, 24.0, 24.0),
                gamma=skill,
                hit=True,
                heat=tuple(map(tuple, heat.tolist())),
            )
            write_examples(folder / "feature_pair", [example])
            shape = (len(words_of(caption)), 4, 4)
            write_words(folder / "feature_pair", {0: np.random.default_rng(epoch).normal(size=shape).astype("f4")})
    (run / "grounding" / "examples").mkdir(exist_ok=True)
    for name in ("examples/one.jpg", "curves.png", "progress.png"):
        Image.new("RGB", (32, 32), (90, 160, 90)).save(run / "grounding" / name)
    lines = [
        {"epoch": epoch, "step": 10 * epoch, "targets": 8, "gamma_mean": skill, "rho": skill, "layers": "11,11"}
        | {"loss": 3 - skill, "zero_shot_accuracy": skill, "excluded_not_mentioned": 2, "excluded_no_box": 0}
        | {"caption_choice": skill, "caption_choice_targets": 8.0}
        for epoch, skill in enumerate(skills)
    ]
    write_csv(run / "grounding" / "summary.csv", pd.DataFrame(lines))
    record = {"id": "1", "settings": {}, "finished": False, "version": 1}
    (run / "run.json").write_text(json.dumps(record))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "demo"
    measure(folder, [0.2, 0.4, 0.7])
    (tmp_path / "runs" / "secret.csv").write_text("a secret")
    return folder


@contextmanager
def served(run: Path, **options: Any) -> Iterator[WatchServer]:
    with WatchServer(run, **options) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server: WatchServer, path: str = "/run.json", method: str = "GET", **headers: str) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    try:
        connection.putrequest(method, path, skip_host="Host" in headers)  # the path goes as it is
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        response = connection.getresponse()
        return Answer(response.status, dict(response.getheaders()), response.read())
    finally:
        connection.close()


def data_of(server: WatchServer) -> dict[str, Any]:
    return json.loads(ask(server).body)  # type: ignore[no-any-return]


def message_of(*args: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["watch", *args])
    assert isinstance(stopped.value.code, str), "a traceback or a usage text, not a message"
    return stopped.value.code


def test_the_table_the_curves_and_what_was_left_out_are_those_of_the_summary(run: Path) -> None:
    with served(run) as server:
        data = data_of(server)
    headings = [column["heading"] for column in data["table"]["columns"]]
    rows = [dict(zip(headings, row, strict=True)) for row in data["table"]["rows"]]
    assert [(row["after"], row["step"]) for row in rows] == [("before", "0"), ("epoch 1", "10"), ("epoch 2", "20")]
    assert [row["ρ [%] ↑"] for row in rows] == ["20.0", "40.0", "70.0"]
    assert {"loss ↓", "zero-shot [%] ↑", "targets", "not mentioned", "no box"} <= set(headings)
    assert [row["caption choice targets"] for row in rows] == ["8", "8", "8"]
    lines = {line["name"]: line["values"] for panel in data["panels"] for line in panel["lines"]}
    assert lines["γ mean"] == [20, 40, 70]
    assert lines["loss"] == [2.8, 2.6, 2.3]
    assert [panel["steps"] for panel in data["panels"]] == [[0, 10, 20]] * 3, "counts have no curve"
    assert data["excluded"] == [{"where": "last blocks (11,11)", "measured": 8, "reasons": [["not mentioned", 2]]}]
    assert "3 measurements, the last: epoch 2, step 20" in data["status"]


def test_a_run_is_followed_and_unchanged_data_are_not_sent_again(run: Path) -> None:
    with served(run) as server:
        first = ask(server)
        tag = first.headers["ETag"]
        again = ask(server, If_None_Match=f'"other", {tag}')
        assert (again.status, again.body, again.headers["ETag"]) == (304, b"", tag)
        measure(run, [0.2, 0.4, 0.7, 0.8])
        later = ask(server, If_None_Match=tag)
        assert (later.status, later.headers["ETag"] == tag) == (200, False)
        assert [row[0] for row in json.loads(later.body)["table"]["rows"]][-1] == "epoch 3"
        assert b"epoch 3" in ask(server, "/explorer").body
        # A run that a kill has thrown back, and that measures a step again, has one line.
        measure(run, [0.2, 0.5])
        assert [row[:2] for row in data_of(server)["table"]["rows"]] == [["before", "0"], ["epoch 1", "10"]]


def test_the_training_loss_of_a_csvlogger_is_drawn_with_that_of_earlier_starts(run: Path) -> None:
    (run / "metrics-1.csv").write_text("epoch,step,train/loss\n0,0,9.0\n0,1,8.0\n")
    (run / "metrics.csv").write_text("epoch,step,val/loss,train/loss\n0,1,,7.0\n0,1,3.0,\n0,2,,6.0\n1,3")
    with served(run) as server:
        (panel,) = (each for each in data_of(server)["panels"] if each["title"] == "training loss")
        assert (panel["steps"], panel["lines"][0]["values"]) == ([1, 2, 3], [9.0, 7.0, 6.0])
        lines = [f"{step},{1000 - step}" for step in range(1000)]  # more than are drawn
        (run / "metrics.csv").write_text("\n".join(["step,train/loss", *lines]))
        (panel,) = (each for each in data_of(server)["panels"] if each["title"] == "training loss")
        assert panel["lines"][0]["name"] == "train/loss, means of 3 values"
        assert (panel["steps"][:2], panel["lines"][0]["values"][:2]) == ([3, 6], [999.0, 996.0])
        assert (panel["steps"][-1], panel["lines"][0]["values"][-1], len(panel["steps"])) == (1000, 1.0, 334)
        (run / "metrics.csv").write_bytes(b"\xff\x00step,train/loss\n1,")
        data = data_of(server)
        assert data["fault"] is None
        assert len(data["table"]["rows"]) == 3


def losses_of(server: WatchServer) -> dict[int, float]:
    panels = [each for each in data_of(server)["panels"] if each["title"] == "training loss"]
    return {
        step: value for each in panels for step, value in zip(each["steps"], each["lines"][0]["values"], strict=True)
    }


def log_events(run: Path, losses: dict[int, float], start: int = 1, *, pictures: bool = False) -> Path:
    """Write the event file of a start, as TensorBoardLogger does."""
    with SummaryWriter(run / f"start-{start}") as writer:
        for step, loss in losses.items():
            writer.add_scalar("train/learning_rate", 0.1, step)
            writer.add_scalar("train/loss", loss, step)
            if pictures:
                writer.add_image("val/grounding", np.random.default_rng(0).random((3, 64, 64)), step)
    (made,) = (run / f"start-{start}").iterdir()
    return made.rename(run / f"events.out.tfevents.{1000 + start}.node.7.0")


def test_the_training_loss_of_tensorboard_is_drawn_without_what_a_later_start_took_back(run: Path) -> None:
    log_events(run, {0: 9.0, 1: 8.0, 2: math.nan, 3: 7.0, 4: 6.5}, pictures=True)
    with served(run) as server:
        assert losses_of(server) == {1: 9, 2: 8, 4: 7, 5: 6.5}
        log_events(run, {3: 7.5}, start=2)
        assert losses_of(server) == {1: 9, 2: 8, 4: 7.5}
        (run / "metrics.csv").write_text("step,train/loss\n3,7.25\n4,6.25\n")
        assert losses_of(server) == {1: 9, 2: 8, 4: 7.25, 5: 6.25}, "a step has one value, by both loggers"


def test_an_event_file_is_read_as_far_as_it_is_whole_and_nothing_is_read_again(run: Path) -> None:
    whole = log_events(run, {0: 9.0, 1: 8.0, 2: 7.0}).read_bytes()
    path = log_events(run, {})
    with served(run) as server:
        path.write_bytes(whole[:-20])  # the last record is being written
        assert losses_of(server) == {1: 9, 2: 8}
        path.write_bytes(bytes(len(whole)))  # zeros stand for what a network has not delivered yet
        assert losses_of(server) == {1: 9, 2: 8}, "what was read is known"
        path.write_bytes(whole)
        assert losses_of(server) == {1: 9, 2: 8, 3: 7}
        path.write_bytes(whole + b"\xff" * 50)
        log_events(run, {3: 6.0}, start=2)
        assert losses_of(server) == {1: 9, 2: 8, 3: 7, 4: 6}
        path.write_bytes(whole[:80])  # begun again
        assert losses_of(server) == {4: 6}
        path.unlink()
        assert data_of(server)["fault"] is None


def test_event_files_outside_of_the_folder_are_not_read(run: Path, tmp_path: Path) -> None:
    secret = log_events(tmp_path, {0: 3.0})
    (run / secret.name).symlink_to(secret)
    with served(run) as server:
        assert losses_of(server) == {}


def test_a_run_without_measurements_is_followed_from_its_start_on(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"id": "1", "settings": {}, "finished": false, "version": 1}')
    with served(tmp_path) as server:
        before = data_of(server)
        assert (before["status"], before["table"]["rows"], before["fault"]) == ("Nothing measured yet.", [], None)
        assert b"No examples were kept yet." in ask(server, "/explorer").body
        assert ask(server, "/").status == 200
        measure(tmp_path, [0.3])
        assert len(data_of(server)["table"]["rows"]) == 1


def test_a_file_that_breaks_meanwhile_is_named_and_the_server_goes_on(run: Path) -> None:
    with served(run) as server:
        (run / "grounding" / "summary.csv").write_text("targets,step\n3,half a numb")
        assert "summary.csv: no table of measurements" in data_of(server)["fault"]
        assert ask(server, "/").status == 200
        measure(run, [0.2])
        assert data_of(server)["fault"] is None


@pytest.mark.parametrize("epoch", ["1.5", "last"])
def test_an_epoch_that_is_no_number_is_named(run: Path, epoch: str) -> None:
    summary = run / "grounding" / "summary.csv"
    summary.write_text(summary.read_text().replace("\n2,", f"\n{epoch},"))
    with served(run) as server:
        assert "summary.csv: no table of measurements" in data_of(server)["fault"]
        assert ask(server, "/").status == 200


def test_maps_of_a_type_that_numpy_lacks_are_named(run: Path) -> None:
    words = run / "grounding" / "epoch=002" / "feature_pair" / "words.safetensors"
    save_file({"0": torch.zeros(5, 4, 4, dtype=torch.bfloat16)}, words)
    with served(run) as server:
        assert b"words.safetensors cannot be read" in ask(server, "/explorer").body
        assert data_of(server)["fault"] is None


def test_what_fails_unforeseen_is_answered_and_the_server_goes_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(run) as server:
        with monkeypatch.context() as patch:
            patch.setattr(server.view, "data", lambda: 1 / 0)
            answer = ask(server)
        assert (answer.status, b"ZeroDivisionError" in answer.body) == (500, True)
        assert ask(server).status == 200


def test_pictures_that_come_after_the_summary_are_shown(run: Path) -> None:
    picture = run / "grounding" / "curves.png"
    later = picture.rename(run / "later.png")
    with served(run) as server:
        assert b"curves.png" not in ask(server, "/").body
        later.rename(picture)
        assert b"curves.png" in ask(server, "/").body


@pytest.mark.parametrize(
    "path",
    [
        "/files/grounding/../../secret.csv",
        "/files/grounding/..%2f..%2fsecret.csv",
        "/files/grounding/%2e%2e/%2e%2e/secret.csv",
        "/files/grounding/%252e%252e/secret.csv",
        "/files/grounding/..\\..\\secret.csv",
        "/files/../secret.csv",
        "/files//etc/passwd",
        "//etc/passwd",
        "/files/grounding//SECRET",
        "/files/grounding/link.csv",
        "/files/grounding/linked/secret.csv",
        "/files/grounding/inner.csv/",
        "/files/grounding/",
        "/files/grounding",
        "/files/run.json",
        "/files/grounding/epoch=000/result.json",
        "/files/grounding/a%00.csv",
        "/files/grounding/.part.csv",
        "/files/grounding/%ff.csv",
        "/files/grounding/" + "a" * 5000 + ".csv",
        "/view.py",
        "/..%2fserver.py",
        "/[",
    ],
)
def test_nothing_outside_of_the_folder_and_of_known_kinds_is_read(run: Path, path: str) -> None:
    secret = run.parent / "secret.csv"
    (run / "grounding" / "link.csv").symlink_to(secret)
    (run / "grounding" / "linked").symlink_to(run.parent)
    (run / "grounding" / ".part.csv").write_text("half")
    with served(run) as server:
        answer = ask(server, path.replace("SECRET", str(secret)))
    assert answer.status in (400, 404)
    assert b"secret" not in answer.body


def test_known_files_are_read_also_where_the_folder_itself_is_a_link(run: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(run)
    with served(tmp_path / "alias") as server:
        answer = ask(server, "/files/grounding/summary.csv")
        assert answer.body == (run / "grounding" / "summary.csv").read_bytes()
        assert answer.headers["Content-Type"] == "text/csv; charset=utf-8"
        assert ask(server, "/files/grounding/curves.png").headers["Content-Type"] == "image/png"


def test_a_measurement_whose_folder_leads_outside_is_not_read(run: Path, tmp_path: Path) -> None:
    measure(tmp_path / "other", [0.1, 0.1, 0.9], caption="a secret ring")
    shutil.rmtree(run / "grounding" / "epoch=002")
    (run / "grounding" / "epoch=002").symlink_to(tmp_path / "other" / "grounding" / "epoch=002")
    with served(run) as server:
        assert b"secret" not in ask(server, "/explorer").body


def test_a_link_within_the_folder_to_one_that_leads_outside_is_not_followed(run: Path) -> None:
    examples = run / "grounding" / "epoch=002" / "feature_pair" / "examples.json"
    secret = run.parent / "secret.json"
    secret.write_text(examples.read_text().replace("ring", "SECRET"))
    (run / "near").mkdir()
    (run / "near" / "examples.json").symlink_to(secret)
    (run / "near" / "other.json").write_text("{}")
    examples.unlink()
    examples.symlink_to(run / "near" / "other.json")
    with served(run) as server:
        assert b"SECRET" not in ask(server, "/explorer").body


def test_a_photo_of_a_kind_that_starts_programs_is_not_opened(run: Path) -> None:
    photo = run / "grounding" / "examples" / "one.jpg"
    Image.new("RGB", (32, 32)).save(photo, "EPS")
    with served(run) as server:
        assert b"one.jpg is no picture (cannot identify" in ask(server, "/explorer").body


def test_a_file_that_is_too_large_is_not_read_into_memory(run: Path) -> None:
    with (run / "grounding" / "huge.csv").open("wb") as file:
        file.truncate(2**40)
    with served(run) as server:
        assert ask(server, "/files/grounding/huge.csv").status == 404


def test_a_request_below_no_length_is_answered_at_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_xai.report.watch.server._Handler.timeout", 60)  # the client waits for half of that
    with served(run) as server:
        assert ask(server, "/", "POST", Content_Length="-1").status == 405


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "ODD"])
def test_methods_that_could_change_something_are_refused(run: Path, method: str) -> None:
    with served(run) as server:
        answer = ask(server, "/", method)
        assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")
        head, whole = ask(server, "/", "HEAD"), ask(server, "/")
        assert (head.status, head.body) == (200, b"")
        assert head.headers["Content-Length"] == str(len(whole.body))


def test_answers_bring_headers_that_keep_them_where_they_belong(run: Path) -> None:
    with served(run) as server:
        for path in ("/", "/run.json", "/explorer", "/watch.js", "/nowhere"):
            headers = ask(server, path).headers
            assert headers["Cache-Control"] == "no-store"
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers["Content-Security-Policy"].startswith("default-src 'none'; ")
            assert (
                "'unsafe-inline'" not in headers["Content-Security-Policy"].partition("script-src")[2].partition(";")[0]
            )
            assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:9000", 200),  # the near end of a tunnel
        ("127.0.0.1", 200),
        ("[::1]:80", 200),
        ("attacker.example", 403),
        ("127.0.0.1.attacker.example:80", 403),
        ("localhost@attacker.example", 403),
        ("", 403),
    ],
)
def test_a_site_that_names_this_machine_as_its_own_is_refused(run: Path, host: str, status: int) -> None:
    with served(run) as server:
        for path in ("/", "/run.json", "/files/grounding/summary.csv"):
            assert ask(server, path, Host=host).status == status


def test_bound_elsewhere_each_request_needs_the_drawn_token(run: Path) -> None:
    with served(run, host="0.0.0.0") as server:
        token = server.token
        assert token is not None
        assert len(token) > 30
        assert server.url.endswith(f"/?token={token}")
        for wrong in ("", "?token=", f"?token={token[:-1]}", f"?token={token}x", "?token=%FF"):
            assert ask(server, f"/run.json{wrong}").status == 403
        assert ask(server, "/run.json", Cookie="a=b; lightning_xai_watch_1=x").status == 403
        page = ask(server, f"/?token={token}", Host="node7.example")
        assert page.status == 200
        assert "HttpOnly; SameSite=Strict" in page.headers["Set-Cookie"]
        assert ask(server, "/run.json", Cookie=page.headers["Set-Cookie"].partition(";")[0]).status == 200
        assert ask(server, "/run.json", Authorization=f"Bearer {token}").status == 200
    with served(run, host="0.0.0.0") as server:
        assert server.token != token


def test_a_token_of_ones_own_is_asked_for_on_this_machine_too(run: Path) -> None:
    with served(run, token="sesame & ü") as server:
        assert ask(server).status == 403
        page = ask(server, "/" + urlsplit(server.url)._replace(scheme="", netloc="").geturl().lstrip("/"))
        assert page.status == 200
        assert ask(server, Cookie=page.headers["Set-Cookie"].partition(";")[0]).status == 200


def test_a_silent_client_does_not_keep_others_waiting(run: Path) -> None:
    with served(run) as server, socket.create_connection(("127.0.0.1", server.server_port)):
        assert ask(server).status == 200


def other_version(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"version": 2}))


def newer_results(run: Path) -> None:
    path = run / "grounding" / "epoch=002" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 3}))


def first_version(run: Path) -> None:
    (run / "grounding" / "summary.csv").write_text("epoch,step,pairs,gamma_mean\n0,0,8,0.5\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_version, "version 2 of a run's record, this release reads 1"),
        (newer_results, "version 3 of the result format, this release reads 2"),
        (first_version, "version 1 of the result format"),
        (lambda run: (run / "run.json").write_text("{"), "run.json cannot be read"),
    ],
)
def test_a_run_of_another_version_is_refused_in_a_sentence(
    run: Path, change: Callable[[Path], object], message: str
) -> None:
    change(run)
    assert message in message_of(str(run), "--port=0")


def test_a_mistake_is_named_without_a_traceback(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_evaluation(tmp_path / "evaluation", {"feature_pair": 0.3}, images=4, examples=False)
    assert "gone is not a folder" in message_of("gone")
    assert "holds no training run" in message_of(str(tmp_path / "empty"))
    assert "holds a finished evaluation" in message_of(str(tmp_path / "evaluation"))
    measure(run.parent / "other", [0.2])
    assert "holds 2 runs, of which one can be watched" in message_of(str(run.parent))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 cannot be used" in message_of(str(run), f"--port={port}")
    assert "--port=70000 is no port" in message_of(str(run), "--port=70000")
    assert "--host=no.such.host.invalid is no address" in message_of(str(run), "--host=no.such.host.invalid")
    assert "--token is empty" in message_of(str(run), "--token=")


def test_the_command_takes_a_parent_loads_no_torch_and_ends_in_order(run: Path) -> None:
    log_events(run, {0: 9.0})
    code = (
        # A shell's background jobs, as a test run may be one, ignore Ctrl-C.
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from lightning_xai.cli import main; main(sys.argv[1:]);"
        "print('heavy:', *({'torch', 'lightning', 'open_clip', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    before = sorted(run.rglob("*"))
    with subprocess.Popen(
        [sys.executable, "-c", code, "watch", str(run.parent), "--port", "0"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(f"Watching {run} at http://127.0.0.1:")
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, err) == (0, "")
    assert out.split("\n")[-2] == "heavy:"
    assert "Stopped watching" in out
    assert sorted(run.rglob("*")) == before


def points(page: Page) -> int:
    return page.locator("#curves figure").first.locator("circle.line-0").count()


def test_the_page_shows_table_and_curves_moves_the_slider_and_follows_the_run(browser: Browser, tmp_path: Path) -> None:
    run = tmp_path / HOSTILE.replace("/", "")
    measure(run, [0.2, 0.4, 0.7], caption=f"a ring and {HOSTILE}")
    with served(run, token="sesame") as server:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(server.url)
        page.wait_for_selector("#table tbody tr")
        assert "token" not in page.url
        assert page.locator("h1").inner_text().endswith(run.name)
        assert page.locator("#table tbody tr td:first-child").all_inner_texts() == ["before", "epoch 1", "epoch 2"]
        assert points(page) == 3
        frame = page.frame_locator("#explorer")
        slider, label = frame.locator(".time input"), frame.locator(".time output")
        slider.wait_for()
        assert label.inner_text() == "epoch 2"
        slider.press("Home")
        assert label.inner_text() == "before"
        shown = frame.locator(".words [role=option]")
        assert shown.all_inner_texts()[:3] == ["a", "ring", "and"]
        assert "".join(shown.all_inner_texts()[3:]) == HOSTILE.replace(" ", "")
        measure(run, [0.2, 0.4, 0.7, 0.8], caption=f"a ring and {HOSTILE}")
        page.wait_for_selector("#table tbody tr:nth-child(4)")
        assert points(page) == 4
        # The slider stays where the reader has put it.
        page.wait_for_function(
            "document.getElementById('explorer').contentDocument.querySelector('.time input')?.max === '3'"
        )
        page.wait_for_function(
            "document.getElementById('explorer').contentDocument.querySelector('.time output').textContent === 'before'"
        )
        assert complaints == []
        page.close()


def test_without_a_script_the_page_shows_pictures_and_the_table(browser: Browser, run: Path) -> None:
    with served(run) as server:
        context = browser.new_context(java_script_enabled=False)
        page = context.new_page()
        page.goto(server.url)
        assert page.locator("noscript img, img").count() == 2
        assert "epoch 2" in page.locator("body").inner_text()
        context.close()
