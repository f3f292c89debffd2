"""A frame as a data URI: for pages, and for models behind an endpoint."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image


def jpeg_uri(frame: np.ndarray, max_side: int | None = None) -> str:
    """uint8 (H, W, 3) as `data:image/jpeg;base64,…`, its longer side at most `max_side` pixels."""
    image = Image.fromarray(frame)
    image.thumbnail((max_side or image.width, max_side or image.height))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
