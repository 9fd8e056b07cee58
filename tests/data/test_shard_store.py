from __future__ import annotations

import json
import logging
import pickle
import signal
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from captioned_shards import TRANSFORM, make_shards
from shard_files import make_samples, write

from lightning_xai.data.datamodule import ShardDataModule
from lightning_xai.data.sample import RecordError, Sample
from lightning_xai.data.shard_reader import read_samples
from lightning_xai.data.shard_store import LocalStore, RemoteStore, open_store
from lightning_xai.data.shards import MANIFEST_NAME, Manifest, ShardError
from lightning_xai.data.spans import CaptionTokenizer


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; faults are planned on the server."""

    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        if self.server.refused:
            self.server.refused -= 1
            self.send_error(503)
        elif self.server.cut:
            self.server.cut -= 1
            data = (Path(self.directory) / self.path.lstrip("/")).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: self.server.cut_at])
            self.wfile.flush()
            if self.server.silent:
                self.server.released.wait(60)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            super().do_GET()

    def log_message(self, *args: Any) -> None:
        """Nothing on stderr."""


class Server(ThreadingHTTPServer):
    """Attributes: `refused` requests are answered with 503, then `cut` ones are cut off after `cut_at` bytes.

    Where it is `silent`, no end shows that they were, until it is `released`.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.refused = self.cut = self.cut_at = 0
        self.silent = False
        self.released = threading.Event()
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def samples() -> list[Sample]:
    return make_samples(12)


@pytest.fixture
def manifest(tmp_path: Path, samples: list[Sample]) -> Manifest:
    return write(tmp_path / "out", samples)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "out") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.released.set()
        server.shutdown()


def read_all(store: RemoteStore, manifest: Manifest) -> list[Sample | RecordError]:
    return [item for _, item in read_samples(store, manifest, range(len(manifest.shards)), 0, manifest.samples)]


def test_places_are_folders_addresses_and_commands(tmp_path: Path) -> None:
    assert open_store(tmp_path) == open_store(str(tmp_path)) == LocalStore(tmp_path)
    assert open_store("coco/train") == LocalStore(Path("coco/train"))
    assert open_store("pipe:cat x/{}", retries=5) == RemoteStore("pipe:cat x/{}", 5)
    for address in ("https://host/coco/train", "https://host/coco/train/", "https://host/coco/train/{}"):
        assert open_store(address) == RemoteStore("https://host/coco/train/{}")
    store = open_store("gs://bucket/train/{}?token=1")
    assert isinstance(store, RemoteStore)
    assert store.address("a.tar") == "gs://bucket/train/a.tar?token=1"
    assert open_store(store) is store
    assert pickle.loads(pickle.dumps(store)) == store


NO_PLACES = ["pipe:cat folder", "nowhere://bucket/train", "file:///data"]


def test_other_places_are_refused_with_what_is_possible() -> None:
    for place in NO_PLACES:
        with pytest.raises(ValueError, match=r"aws s3 cp s3://BUCKET/FOLDER/\{\} -"):
            open_store(place)


def test_messages_hold_no_password_and_no_token() -> None:
    store = open_store("https://me:secret@host:80/train/{}?signature=secret")
    assert str(store) == "https://host:80/train"
    assert store.locate("a.tar") == "https://host:80/train/a.tar"


def test_samples_are_streamed_from_a_server(server: Server, manifest: Manifest, samples: list[Sample]) -> None:
    store = open_store(server.address)
    assert [item for _, item in read_samples(store, manifest, [2, 0, 1], 0, 12)] == samples[8:] + samples[:8]
    assert server.requests == [f"/shard-{shard:06d}.tar" for shard in (2, 0, 1)]
    some = read_samples(server.address, manifest, [2, 0, 1], 1, 11, {2, 5, 6})
    assert [index for index, _ in some] == [9, 11, 0, 3, 4, 5, 6]


@pytest.mark.parametrize("cut_at", [0, 512, 3000])
def test_a_stream_that_breaks_off_goes_on_where_it_was(
    server: Server, manifest: Manifest, samples: list[Sample], cut_at: int, caplog: pytest.LogCaptureFixture
) -> None:
    server.cut, server.cut_at = 3, cut_at
    with caplog.at_level(logging.WARNING):
        assert read_all(RemoteStore(f"{server.address}/{{}}", delay=0.01), manifest) == samples
    assert server.requests[:4] == ["/shard-000000.tar"] * 4
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert f"{server.address}/shard-000000.tar broke off after" in messages[0]
    assert "Retry 3 of 3 in 0.04 s" in messages[2]


def test_what_is_whole_is_given_out_where_the_retries_are_used_up(
    server: Server, manifest: Manifest, samples: list[Sample], tmp_path: Path
) -> None:
    cut_at = manifest.shards[0].bytes // 2
    server.cut, server.cut_at = 4, cut_at
    items = read_all(RemoteStore(f"{server.address}/{{}}", delay=0.01), manifest)
    shard = tmp_path / "out" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:cut_at])
    local = [item for _, item in read_samples(tmp_path / "out", manifest, [0, 1, 2], 0, 12)]
    assert [isinstance(item, Sample) for item in items] == [isinstance(item, Sample) for item in local]
    assert [item for item in items if isinstance(item, Sample)] == [item for item in local if isinstance(item, Sample)]
    assert 0 < sum(isinstance(item, RecordError) for item in items) < 4
    assert "(the command that opens it ended with status 18 (the connection was cut); attempt 4 of 4)" in str(items[3])


def test_a_server_that_is_busy_for_a_moment_is_asked_again(
    server: Server, manifest: Manifest, samples: list[Sample]
) -> None:
    server.refused = 1
    assert read_all(RemoteStore(f"{server.address}/{{}}", retries=0), manifest) == samples


def test_a_stream_that_falls_silent_is_opened_again(
    server: Server, manifest: Manifest, samples: list[Sample], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr("lightning_xai.data.shard_store._SILENCE", 1.0)
    server.cut, server.cut_at, server.silent = 1, 3000, True
    with caplog.at_level(logging.WARNING):
        assert read_all(RemoteStore(f"{server.address}/{{}}", retries=1, delay=0.01), manifest) == samples
    assert "no byte came in 1 s" in caplog.text


def test_a_command_that_does_not_end_is_run_again(
    tmp_path: Path, manifest: Manifest, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_xai.data.shard_store._SILENCE", 0.5)
    shard = manifest.shards[0].name
    # Of the first one half the bytes, and then an output that is closed, but no end.
    command = (
        f"cd {tmp_path}; if [ {{}} = {shard} ] && mkdir once 2>/dev/null; "
        "then head -c 3000 out/{}; exec >&-; sleep 60; else cat out/{}; fi"
    )
    assert read_all(RemoteStore(f"pipe:{command}", retries=1, delay=0.01), manifest) == samples


def test_a_shard_that_the_server_does_not_have_is_said_to_be_so(
    server: Server, manifest: Manifest, samples: list[Sample], tmp_path: Path
) -> None:
    (tmp_path / "out" / "shard-000001.tar").unlink()
    items = read_all(RemoteStore(f"{server.address}/{{}}", retries=1, delay=0.01), manifest)
    assert items[:4] + items[8:] == samples[:4] + samples[8:]
    assert all("the server answered with an error: 404" in str(item) for item in items[4:8])
    assert server.requests.count("/shard-000001.tar") == 2


@pytest.mark.parametrize("held", [set(), {signal.SIGTERM}], ids=["main process", "worker"])
def test_a_command_may_write_the_shards(
    tmp_path: Path, manifest: Manifest, samples: list[Sample], held: set[signal.Signals]
) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)  # as loaders' workers do; commands inherit it
    try:
        check_commands(tmp_path, manifest, samples)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def check_commands(tmp_path: Path, manifest: Manifest, samples: list[Sample]) -> None:
    assert read_all(RemoteStore(f"pipe:cat {tmp_path}/out/{{}}"), manifest) == samples
    # what comes after the bytes that the manifest states is not waited for
    begin = time.perf_counter()
    assert read_all(RemoteStore(f"pipe:cat {tmp_path}/out/{{}}; sleep 100"), manifest) == samples
    assert time.perf_counter() - begin < 50


@pytest.mark.parametrize("failure", ["head -c 2000 $FILE; exit 7", "head -c 2000 $FILE", "kill -9 $$"])
def test_a_command_that_fails_at_first_is_run_again(
    tmp_path: Path, manifest: Manifest, samples: list[Sample], failure: str
) -> None:
    script = tmp_path / "fetch"
    script.write_text(
        f"FILE={tmp_path}/out/$1\necho $1 >> {tmp_path}/runs\n"
        f'if [ "$(grep -c $1 {tmp_path}/runs)" -lt 3 ]; then {failure}; else cat $FILE; fi\n'
    )
    assert read_all(RemoteStore(f"pipe:sh {script} {{}}", retries=2, delay=0.01), manifest) == samples
    assert len((tmp_path / "runs").read_text().split()) == 9
    (tmp_path / "runs").unlink()
    items = read_all(RemoteStore(f"pipe:sh {script} {{}}", retries=1, delay=0.01), manifest)
    assert len(items) == 12
    assert isinstance(items[3], RecordError)


def test_a_reader_that_stops_early_ends_the_command(tmp_path: Path, manifest: Manifest, samples: list[Sample]) -> None:
    store = RemoteStore(f"pipe:echo $$ > {tmp_path}/pid; cat {tmp_path}/out/{{}} /dev/zero")
    reader = read_samples(store, manifest, [0], 0, 4)
    assert next(reader) == (0, samples[0])
    process = Path("/proc", (tmp_path / "pid").read_text().strip())
    assert process.is_dir()
    del reader
    assert not process.is_dir()


def test_a_program_that_is_missing_is_named(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    items = read_all(RemoteStore("https://127.0.0.1/{}"), manifest)
    assert all("with the program curl, which is not on the PATH: install it" in str(item) for item in items)


# --- manifests and whole runs ----------------------------------------------------------------------------------------


def test_a_manifest_comes_from_where_its_shards_are(server: Server, manifest: Manifest, tmp_path: Path) -> None:
    assert Manifest.load(server.address) == manifest
    assert Manifest.load(f"pipe:cat {tmp_path}/out/{{}}") == manifest
    server.cut, server.cut_at = 1, 50
    assert Manifest.load(RemoteStore(f"{server.address}/{{}}", delay=0.01)) == manifest


def test_a_manifest_that_is_not_there_says_what_was_tried(server: Server, manifest: Manifest) -> None:
    with pytest.raises(ShardError, match=r"/nowhere/manifest\.json: cannot be read \(.*404.*attempt 1 of 1"):
        Manifest.load(RemoteStore(f"{server.address}/nowhere/{{}}", retries=0))


def test_no_hostile_name_of_a_manifest_gets_into_a_command(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, commands = tmp_path / "out" / MANIFEST_NAME, tmp_path / "commands"
    record = json.loads(path.read_text())
    for name in ("x; touch owned #.tar", "$(touch owned).tar", "`touch owned`.tar", "-x.tar", "a/../b.tar"):
        record["shards"][0]["name"] = name
        path.write_text(json.dumps(record))
        commands.unlink(missing_ok=True)
        with pytest.raises(ShardError, match="is not allowed"):
            Manifest.load(f"pipe:echo run >> {commands}; cat out/{{}}")
        assert commands.read_text() == "run\n"  # for the manifest
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_training_reads_from_a_server_as_from_a_folder(
    tmp_path: Path, tokenizer: CaptionTokenizer, workers: int
) -> None:
    folder = make_shards(tmp_path / "out", 23)
    with Server(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        batches: list[list[str]] = []
        for place in (folder, server.address):
            data = ShardDataModule(train=place, val=place, batch_size=4, num_workers=workers, verify=True)
            data.bind(TRANSFORM, tokenizer)
            data.setup("fit")
            loader = data.train_dataloader()
            loader.load_state_dict({"epoch": 0, "batches": 2})
            batches.append([key for batch in loader for key in batch.keys])
            assert len(batches[-1]) == 12
        server.shutdown()
    assert batches[0] == batches[1]
