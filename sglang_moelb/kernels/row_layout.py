"""Layout of the integers that a rank contributes to the exchange of one MoE layer.

One int32 row of width W a rank: a header, then five counts per expert, then (only in a pass whose
policy may cut) a histogram per expert of the amounts that may be cut, by rank key. All five counts
of expert 0 come first, then those of expert 1; likewise the bins.

Shape letters: E logical experts, R ranks, W row width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

NUM_HEADER = 8
H_TOKENS, H_VISION_TOKENS, H_PROTECTED_TOKENS, H_VISION_AMOUNT, H_AMOUNT = range(5)
H_REFUSED_TOKENS = 5

NUM_COUNTS = 5
C_TEXT_ROWS, C_VISION_ROWS, C_REFUSED_ROWS, C_PROTECTED_AMOUNT, C_CUTTABLE_AMOUNT = range(5)

KEY_BITS = 16  # 1 bit of modality preference above 15 bits of metric; larger keys are kept first
NUM_BINS = 64
BIN_SHIFT = KEY_BITS - 6
MAX_KEY = (1 << KEY_BITS) - 1

FLAG_VISION = 1
FLAG_PROTECTED = 2  # not to be cut: of decode, or refused
FLAG_REFUSED = 4  # of a request that refuses lossy levers; comes with FLAG_PROTECTED

AMOUNT_ONE = 256  # the amount of a text token under MACS; plain rows weigh 1
MASS_ONE = 1 << 16  # gate mass is summed as integers of this unit


def row_width(num_experts: int, *, with_histogram: bool) -> int:
    """Number of int32 in the row of one rank."""
    return NUM_HEADER + num_experts * (NUM_COUNTS + (NUM_BINS if with_histogram else 0))


def counts_of(rows: Tensor, num_experts: int) -> Tensor:
    """The counts of rows (..., W) as a view (..., E, NUM_COUNTS). Host or device."""
    end = NUM_HEADER + num_experts * NUM_COUNTS
    return rows[..., NUM_HEADER:end].view(*rows.shape[:-1], num_experts, NUM_COUNTS)


def histogram_of(rows: Tensor, num_experts: int) -> Tensor:
    """The histograms of rows (..., W) as a view (..., E, NUM_BINS). Host or device.

    ValueError if the rows were made without histograms.
    """
    width = row_width(num_experts, with_histogram=True)
    if rows.shape[-1] != width:
        raise ValueError(
            f"a row of width {rows.shape[-1]} has no histogram of {num_experts} experts, which "
            f"takes width {width}; count with a key_rule in a pass that may cut"
        )
    start = NUM_HEADER + num_experts * NUM_COUNTS
    return rows[..., start:].view(*rows.shape[:-1], num_experts, NUM_BINS)
