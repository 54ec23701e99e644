"""Processor of the tiny Kimi-VL checkpoints; written into their folders as their own code.

SGLang's Kimi-VL asks its checkpoint for a processor, as the released ones bring it, and so needs
`--trust-remote-code` for these too. Stands alone: imports nothing of this package. Host only.

Shapes: N patches of all images, P patch size, n images.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

IMAGE_TOKEN = "<|media_pad|>"


class TinyKimiImageProcessor(BaseImageProcessor):
    """Cuts pictures into patches of MoonViT, whole tokens of `merge` by `merge` patches each."""

    model_input_names = ("pixel_values", "image_grid_hws")

    def __init__(
        self, patch_size: int = 14, merge: int = 2, max_side_tokens: int = 12, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.patch_size = patch_size
        self.merge = merge
        self.max_side_tokens = max_side_tokens

    def preprocess(
        self, images: Image.Image | Sequence[Image.Image], return_tensors: Any = None, **_: Any
    ) -> BatchFeature:
        """`pixel_values` float32 [N, 3, P, P] within -1 to 1, `image_grid_hws` int64 [n, 2].

        A picture keeps its shape about, between 1 and `max_side_tokens` tokens a side.
        """
        pictures = [images] if isinstance(images, Image.Image) else list(images)
        grids, patches = [], []
        for picture in pictures:
            height, width = self._grid(picture)
            size = (width * self.patch_size, height * self.patch_size)
            pixels = np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC))
            values = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1.0)
            tiles = values.view(height, self.patch_size, width, self.patch_size, 3)
            patches.append(tiles.permute(0, 2, 4, 1, 3).flatten(end_dim=1))
            grids.append((height, width))
        return BatchFeature(
            {"pixel_values": torch.cat(patches), "image_grid_hws": torch.tensor(grids)},
            tensor_type=return_tensors,
        )

    def _grid(self, picture: Image.Image) -> tuple[int, int]:
        token = self.patch_size * self.merge
        shrink = max(1.0, max(picture.size) / (token * self.max_side_tokens))
        width, height = (max(1, round(side / shrink / token)) for side in picture.size)
        return height * self.merge, width * self.merge


class TinyKimiProcessor(ProcessorMixin):
    """Tokenizer and image processor; each image token of the text becomes as many as it needs."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: Any = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self, images: Any = None, text: Any = None, return_tensors: Any = None, **kwargs: Any
    ) -> BatchFeature:
        """`input_ids` and `attention_mask` of the texts, and what the image processor gives.

        ValueError where the texts do not have one image token for each image.
        """
        texts = [text] if isinstance(text, str) else list(text)
        features: dict[str, Any] = {}
        if images:
            features = dict(self.image_processor(images, return_tensors=return_tensors))
            counts = (features["image_grid_hws"].prod(dim=1) // self.image_processor.merge**2)
            texts = _widened(texts, counts.tolist())
        padding = bool(kwargs.get("padding", False))
        tokens = self.tokenizer(texts, return_tensors=return_tensors, padding=padding)
        return BatchFeature({**tokens, **features})


def _widened(texts: list[str], counts: list[int]) -> list[str]:
    num_marks = sum(text.count(IMAGE_TOKEN) for text in texts)
    if num_marks != len(counts):
        raise ValueError(f"{len(counts)} images for {num_marks} {IMAGE_TOKEN} in the text")
    left = iter(counts)
    return [re.sub(re.escape(IMAGE_TOKEN), lambda _: IMAGE_TOKEN * next(left), t) for t in texts]
