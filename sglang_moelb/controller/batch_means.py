"""A confidence interval for a share that is summed up from correlated samples.

Shape letters: N samples in the order they came, B blocks of samples that follow each other.
"""

from __future__ import annotations

import math

import numpy as np

from sglang_moelb.types import FloatArray

NUM_BLOCKS = 10
MIN_SAMPLES = 3 * NUM_BLOCKS
STUDENT_T = 1.833  # 95th percentile of Student's t with NUM_BLOCKS - 1 degrees of freedom
MAX_CORRELATION = 0.95


def share_of(part_N: FloatArray, whole_N: FloatArray) -> tuple[float, float]:
    """`sum(part) / sum(whole)` and half the width of its 90 % interval; float64 [N] each.

    Neighbouring passes are alike, so samples may not be taken for independent ones. They are put
    into NUM_BLOCKS blocks in the order they came, of about equally many samples, and the spread of
    what the blocks are above or below the share (the residual of a ratio estimator, Cochran,
    Sampling Techniques, section 6.4) gives the interval, by Student's t. What correlation is left
    from block to block widens it by (1 + r) / (1 - r), as in Skart (Tafazzoli and Wilson, IIE
    Transactions 43, 2011); r has its bias of -1/B added back and is clipped to [0, 0.95]. That the
    two are put together so is ours. The interval is about the load that was seen, not about
    another one to come.

    `N` must be at least MIN_SAMPLES and `sum(whole)` above 0. Runs on the host.
    """
    total = float(whole_N.sum())
    share = float(part_N.sum()) / total
    starts_B = np.arange(NUM_BLOCKS) * len(part_N) // NUM_BLOCKS
    apart_B = np.add.reduceat(part_N - share * whole_N, starts_B)
    square = float(apart_B @ apart_B)
    if square <= 0.0:
        return share, 0.0
    correlation = float(apart_B[1:] @ apart_B[:-1]) / square + 1.0 / NUM_BLOCKS
    correlation = min(max(correlation, 0.0), MAX_CORRELATION)
    variance = square * NUM_BLOCKS / (NUM_BLOCKS - 1) * (1.0 + correlation) / (1.0 - correlation)
    return share, STUDENT_T * math.sqrt(variance) / total
