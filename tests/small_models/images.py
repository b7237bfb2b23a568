"""Images as the bytes of a file, and as base64."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def as_text(image: Image.Image | np.ndarray) -> str:
    """base64 of a PNG."""
    return base64.b64encode(encoded(image)).decode()
