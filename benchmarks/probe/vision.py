"""The vision tower for training: Qwen3-VL's, over packed uint8 patches of many images.

Parameter names are those of transformers below `model.visual`. Plain torch; device.

Shape letters: P patches, C tower width, M images, D head size, V merged tokens, H text hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.probe.attend import Backend, Segments, attend
from benchmarks.probe.sizes import MERGE, PATCH, ROPE_THETA, Sizes

EPSILON = 1e-6
HALF_WHITE = 127.5  # the processor's mean and deviation of 0.5, in bytes


@dataclass(frozen=True, slots=True)
class Images:
    """Patches of all images of a batch, in merge order: each four make one token.

    A patch is its 16 rows of 16 pixels of 3 bytes, flat.
    """

    patches_P: Tensor  # [P, 768] uint8
    grids_M2: Tensor  # int32, rows and columns of patches
    segments: Segments


def place_patches(images: Images) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[P] each: row, column, and the image's number of rows and columns."""
    num = images.patches_P.shape[0]
    ends = images.segments.ends_S
    lengths = (ends[1:] - ends[:-1]).long()
    image_P = torch.repeat_interleave(lengths, output_size=num)
    rows_P, columns_P = images.grids_M2[image_P].unbind(1)
    within = torch.arange(num, device=ends.device) - ends[image_P]
    block, inner = within // MERGE**2, within % MERGE**2
    across = columns_P // MERGE
    row = block // across * MERGE + inner // MERGE
    column = block % across * MERGE + inner % MERGE
    return row, column, rows_P, columns_P


def resample(table: Tensor, places: tuple[Tensor, Tensor, Tensor, Tensor], side: int) -> Tensor:
    """[P, C]: bilinear reading of the square table of positions, corners aligned."""
    row, column, rows, columns = places
    low_y, high_y, y = _taps(row, rows, side)
    low_x, high_x, x = _taps(column, columns, side)
    corners = (
        (low_y, low_x, (1 - y) * (1 - x)),
        (low_y, high_x, (1 - y) * x),
        (high_y, low_x, y * (1 - x)),
        (high_y, high_x, y * x),
    )
    indices_P4 = torch.stack([i * side + j for i, j, _ in corners], dim=1)
    weights_P4 = torch.stack([w for _, _, w in corners], dim=1)
    # A dense product: the gradient of a gather from so few rows would queue up on them.
    shares = weights_P4.new_zeros(row.shape[0], side * side).scatter_add_(1, indices_P4, weights_P4)
    return (shares @ table.float()).to(table.dtype)


def _taps(index: Tensor, size: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    source = index.float() * (side - 1) / (size - 1).clamp(min=1)
    low = source.floor()
    return low.long(), (low.long() + 1).clamp(max=side - 1), source - low


def rotary(places: tuple[Tensor, Tensor, Tensor, Tensor], head_dim: int) -> tuple[Tensor, Tensor]:
    """[P, 1, D/2] cosine and sine: half of the head's pairs turn with rows, half with columns."""
    row, column, _, _ = places
    steps = torch.arange(0, head_dim // 2, 2, device=row.device).float() / (head_dim // 2)
    angles = torch.stack([row, column], 1).float().unsqueeze(-1) / ROPE_THETA**steps
    return angles.flatten(1).cos().unsqueeze(1), angles.flatten(1).sin().unsqueeze(1)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + D/2) of the last dimension; computed in the type of `cos`."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)


class VisionAttention(nn.Module):
    """Full attention within an image."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.num_heads = sizes.vision_heads
        self.qkv = nn.Linear(sizes.vision_hidden, 3 * sizes.vision_hidden)
        self.proj = nn.Linear(sizes.vision_hidden, sizes.vision_hidden)

    def forward(
        self, x: Tensor, turns: tuple[Tensor, Tensor], segments: Segments, backend: Backend
    ) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], 3, self.num_heads, -1).unbind(1)
        q, k = turn(q, *turns), turn(k, *turns)
        out = attend(q, k, v, segments, causal=False, backend=backend)
        return self.proj(out.flatten(1))  # type: ignore[no-any-return]


class VisionMlp(nn.Module):
    """Two layers with the approximate GELU."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(sizes.vision_hidden, sizes.vision_inner)
        self.linear_fc2 = nn.Linear(sizes.vision_inner, sizes.vision_hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(functional.gelu(self.linear_fc1(x), approximate="tanh"))  # type: ignore[no-any-return]


class VisionBlock(nn.Module):
    """Attention and MLP, each after a norm."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.vision_hidden, eps=EPSILON)
        self.norm2 = nn.LayerNorm(sizes.vision_hidden, eps=EPSILON)
        self.attn = VisionAttention(sizes)
        self.mlp = VisionMlp(sizes)

    def forward(
        self, x: Tensor, turns: tuple[Tensor, Tensor], segments: Segments, backend: Backend
    ) -> Tensor:
        x = x + self.attn(self.norm1(x), turns, segments, backend)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Merger(nn.Module):
    """Four patches to one token of the text model; deepstack mergers norm after the shuffle."""

    def __init__(self, sizes: Sizes, *, after_shuffle: bool) -> None:
        super().__init__()
        self.width = sizes.vision_hidden * MERGE**2
        self.after_shuffle = after_shuffle
        self.norm = nn.LayerNorm(self.width if after_shuffle else sizes.vision_hidden, eps=EPSILON)
        self.linear_fc1 = nn.Linear(self.width, self.width)
        self.linear_fc2 = nn.Linear(self.width, sizes.hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.view(-1, self.width) if self.after_shuffle else x).view(-1, self.width)
        return self.linear_fc2(functional.gelu(self.linear_fc1(x)))  # type: ignore[no-any-return]


class PatchEmbed(nn.Module):
    """Pixels to the width of the tower.

    An image is shown as two equal frames, so the two frames' weights add up, and one product over
    768 bytes does the work of the convolution over 1,536 numbers.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        kernel = (2, PATCH, PATCH)
        self.proj = nn.Conv3d(3, sizes.vision_hidden, kernel_size=kernel, stride=kernel)

    def forward(self, patches_P: Tensor) -> Tensor:
        weight = self.proj.weight.sum(2).permute(0, 2, 3, 1).flatten(1)
        pixels = (patches_P.float() / HALF_WHITE - 1).to(weight.dtype)
        return functional.linear(pixels, weight, self.proj.bias)


class VisionTower(nn.Module):
    """Images to tokens: the merged output and the three deepstack features."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.patch_embed = PatchEmbed(sizes)
        self.pos_embed = nn.Embedding(sizes.vision_grid**2, sizes.vision_hidden)
        self.blocks = nn.ModuleList(VisionBlock(sizes) for _ in range(sizes.vision_depth))
        self.merger = Merger(sizes, after_shuffle=False)
        self.deepstack_merger_list = nn.ModuleList(
            Merger(sizes, after_shuffle=True) for _ in range(3)
        )

    def forward(self, images: Images, backend: Backend) -> tuple[Tensor, list[Tensor]]:
        """[V, H] tokens, and [V, H] for each of the first three layers of the text model."""
        places = place_patches(images)
        x = self.patch_embed(images.patches_P)
        x = x + resample(self.pos_embed.weight, places, self.sizes.vision_grid)
        turns = rotary(places, self.sizes.vision_hidden // self.sizes.vision_heads)
        features = []
        for number, block in enumerate(self.blocks):
            x = block(x, turns, images.segments, backend)
            if number < len(self.deepstack_merger_list):
                features.append(self.deepstack_merger_list[number](x))
        return self.merger(x), features
