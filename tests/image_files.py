"""Image files for tests of what reads them."""

from __future__ import annotations

import io

from PIL import Image


def jpeg(size: tuple[int, int] = (40, 30), mode: str = "RGB", orientation: int = 1) -> bytes:
    """A grey image of a stored size (width, height), with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.new(mode, size, "grey").save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


HTML = b"<html>404</html>"
UNSAFE_NAMES = ("../secret.jpg", "a/../../secret.jpg", "..\\secret.jpg", "C:secret.jpg", "{absolute}", "a\0.jpg")
"""File names that would leave their folder, or that no system takes; "{absolute}" is to be replaced."""
