"""Result files and the statistics of them; needs no torch."""

__all__: list[str] = []
