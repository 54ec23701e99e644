"""Real images for the demo workload: those that ship inside scikit-image and scikit-learn."""

from __future__ import annotations

import base64
import io
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from skimage import data
from sklearn.datasets import load_digits, load_sample_images

from sglang_moelb.ab.types import AbError

# Functions of skimage.data whose files are part of the wheel: none of them downloads.
_SKIMAGE_NAMES = (
    "astronaut",
    "brick",
    "camera",
    "cell",
    "chelsea",
    "clock",
    "coffee",
    "coins",
    "colorwheel",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "logo",
    "moon",
    "page",
    "retina",
    "rocket",
    "stereo_motorcycle",
    "text",
)
_MIME = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}


@cache
def real_images() -> dict[str, Image.Image]:
    """Name to RGB image: photographs, textures, microscopy, scanned text, handwritten digits."""
    images = {name: _to_image(getattr(data, name)()) for name in _SKIMAGE_NAMES}
    china, flower = load_sample_images().images
    images |= {"china": _to_image(china), "flower": _to_image(flower)}
    images["digits"] = _digits_sheet()
    return images


def fit(image: Image.Image, longest_px: int) -> Image.Image:
    """`image` scaled so that its longer side is `longest_px`; the other keeps the proportion."""
    scale = longest_px / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def png_uri(image: Image.Image) -> str:
    """`image` as a data URI, PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return _uri("image/png", buffer.getvalue())


def file_uri(path: Path, where: str) -> tuple[str, int]:
    """The image file as a data URI and its number of pixels; raises `AbError` starting `where`."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise AbError(
            f"{where}: the image {path} cannot be read ({error.strerror}). Give a path relative "
            "to the workload file, a data: URI or an http(s) address."
        ) from error
    return check_image(content, f"{where}: {path}")


def check_image(content: bytes, where: str) -> tuple[str, int]:
    """A data URI of `content` and its number of pixels, if it is an image that Pillow decodes."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            mime = _MIME.get(image.format or "")
            size = image.size
            uri = _uri(mime, content) if mime else png_uri(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise AbError(
            f"{where} is not an image that can be decoded ({error}). Give PNG, JPEG, WebP or GIF."
        ) from error
    return uri, size[0] * size[1]


def _uri(mime: str, content: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def _to_image(loaded: NDArray[np.uint8] | tuple[NDArray[np.uint8], ...]) -> Image.Image:
    # The motorcycle is a pair of views with their disparity: take the left view.
    pixels = loaded[0] if isinstance(loaded, tuple) else loaded
    return Image.fromarray(pixels).convert("RGB")


def _digits_sheet() -> Image.Image:
    rows = 8
    digits = load_digits().images[: rows * rows]
    sheet = np.concatenate(
        [np.concatenate(list(row), axis=1) for row in digits.reshape(rows, rows, 8, 8)]
    )
    grey = (255 - sheet * (255 / 16)).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB").resize((512, 512), Image.Resampling.NEAREST)
