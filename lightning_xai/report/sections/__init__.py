"""The sections of a report: each turns frames into blocks of the page."""

__all__: list[str] = []
