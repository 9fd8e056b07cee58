"""The live page of a run: what it shows, and the server that hands it out. Nothing here needs torch."""

from lightning_xai.report.watch.server import WatchServer

__all__ = ["WatchServer"]
