"""Tables and pictures from results; needs no torch."""

__all__: list[str] = []
