"""`watch`: serve a live page of a training run: its table, curves and heat maps, while it goes on."""

from __future__ import annotations

import threading
import webbrowser
from contextlib import suppress
from pathlib import Path


def watch(run: Path, port: int = 6016, host: str = "127.0.0.1", token: str | None = None, open: bool = False) -> None:
    """Serve a live page of a training run, which follows it, until Ctrl-C.

    The page has the table by step, curves, the fixed examples as a slider over time, and what was left out. The run's
    folder is read only, and nothing outside of it is.

    Args:
        run: the run's folder (runs/demo/version_0), or a folder with one run in it.
        port: to serve at; 0: any free one.
        host: address to serve at. The default is for this machine alone; any other one demands a token, which is a part
            of the address that is printed. The connection is not encrypted.
        token: that each request has to bring; left out: none on this machine, elsewhere one that is drawn.
        open: open the page in the browser.

    Raises:
        ValueError: no run, one of another version, or an address that cannot be served at.
    """
    from lightning_xai.report.watch import WatchServer
    from lightning_xai.results.progress import find_run

    folder = find_run(run)
    with suppress(KeyboardInterrupt), WatchServer(folder, host, port, token) as server:
        server.run.progress()  # a run of another version is refused here, not on the page
        # What takes longest at the first time is ready when the page asks for it.
        server.view.explorer()
        server.view.data()
        print(f"Watching {folder} at {server.url} (Ctrl-C ends it)", flush=True)  # noqa: T201
        if open:
            # Some browsers keep their caller until they end.
            threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
        server.serve_forever()
    print(f"\nStopped watching {folder}; a run that trains goes on.")  # noqa: T201
