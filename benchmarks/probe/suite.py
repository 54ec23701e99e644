"""The items of an evaluation, and how each is asked over HTTP."""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image as Pil

from benchmarks.probe.item import Image, Item, Part
from benchmarks.probe.tasks import TASKS, make_item
from sglang_moelb.ab.types import Request


class ProbeError(ValueError):
    """The user asked for something that cannot be done; the message names it and the fix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """`num_items` test items of `seed`, the tasks taking turns; an item is made when asked for."""

    num_items: int
    seed: int
    tasks: tuple[str, ...]

    def __len__(self) -> int:
        return self.num_items

    def __getitem__(self, i: int) -> Item:
        if not 0 <= i < self.num_items:
            raise IndexError(i)
        turn, task = divmod(i, len(self.tasks))
        return make_item(self.tasks[task], "test", turn, seed=self.seed)


class Requests(Sequence[Request]):
    """Items of a suite as chat requests, made one by one; `request_id` is the item's place."""

    def __init__(self, suite: Suite, places: Sequence[int]) -> None:
        self.suite = suite
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: Any) -> Any:
        place = self.places[i]
        return to_request(self.suite[place].parts, place)


def parse_tasks(text: str) -> tuple[str, ...]:
    """Names separated by commas, or all for "". Raises `ProbeError` for an unknown one."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise ProbeError(
            f"--tasks {text}: there is no task {unknown[0]!r}. Use some of {','.join(TASKS)}"
        )
    return names or tuple(TASKS)


def to_request(parts: tuple[Part, ...], request_id: int) -> Request:
    """One user message of `parts`, images as PNG data URLs."""
    content: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            content.append({"type": "image_url", "image_url": {"url": png_url(part)}})
    texts = [part for part in parts if isinstance(part, str)]
    images = [part for part in parts if not isinstance(part, str)]
    return Request(
        request_id=request_id,
        messages=({"role": "user", "content": content},),
        num_images=len(images),
        num_chars=sum(map(len, texts)),
        num_pixels=sum(image.shape[0] * image.shape[1] for image in images),
    )


def digest(item: Item) -> int:
    """A hash of what is asked and of the answer, not of pixels: font libraries differ a little."""
    asked = [part if isinstance(part, str) else str(part.shape) for part in item.parts]
    return zlib.crc32("|".join([item.task, *asked, item.answer]).encode())


def png_url(image: Image) -> str:
    """An image as a data URL."""
    buffer = io.BytesIO()
    Pil.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
