"""Rank keys: 16-bit integers that say which rows are kept first; the reference in plain torch.

Bit 15 is the preferred modality, the 15 bits below are the metric; larger keys are kept first.
With `routed_first` all of it moves down a bit, and bit 15 says that the row was routed.
Integers, so that every rank cuts at the same key without comparing floats.

Shape letters: T tokens of this rank, C columns (top-k and extra candidates).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_moelb.kernels.row_layout import AMOUNT_ONE, FLAG_VISION, KEY_BITS
from sglang_moelb.types import Metric, Preference

METRIC_BITS = KEY_BITS - 1
MAX_METRIC = (1 << METRIC_BITS) - 1

# Score keys keep the exponent and 11 bits of mantissa of weights from 2**-12 to 2**4.
SCORE_ORIGIN_BITS = (127 - 12) << 23  # float32 2**-12 read as an integer
SCORE_SHIFT = 12

HASH_TOKEN, HASH_EXPERT, HASH_SEED = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
HASH_MIX_1, HASH_MIX_2 = 0x85EBCA6B, 0xC2B2AE35
_WORD = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyRule:
    """How rows are ranked: a `Metric`, a `Preference`, and the seed of Metric.RANDOM.

    `routed_first` ranks every candidate beyond the top-k below every routed row.
    """

    metric: int
    preference: int
    seed: int = 0
    routed_first: bool = False


def hash_seed(seed: int) -> int:
    """The part of the random key that depends on the seed alone, as a signed 32-bit integer."""
    word = (seed * HASH_SEED) & _WORD
    return word - (1 << 32) if word >> 31 else word


def row_keys(
    ids_TC: Tensor,
    weights_TC: Tensor,
    flags_T: Tensor,
    amounts_T: Tensor | None,
    rule: KeyRule,
    topk: int,
) -> Tensor:
    """The int32 rank key of every entry; of entries with id -1 it means nothing.

    SCORE: monotone in the float32 weight (times the token's amount, where given), 0 where it is
    not above 2**-12 or NaN. ORDER keeps the first tokens, REVERSE the last. RANDOM is the top 15
    bits of the 32-bit hash mix(t*HASH_TOKEN + e*HASH_EXPERT + seed*HASH_SEED), mix being the
    finaliser of MurmurHash3 (public domain). Metrics: Capacity-Aware Inference, section 3.

    Args: ids_TC int32 or int64; weights_TC float32; flags_T uint8; amounts_T int32 or None.
    Runs wherever its tensors are.
    """
    vision_T = (flags_T & FLAG_VISION) != 0
    if rule.preference == Preference.IMAGE_FIRST:
        preferred_T = ~vision_T
    elif rule.preference == Preference.TEXT_FIRST:
        preferred_T = vision_T
    else:
        preferred_T = torch.zeros_like(vision_T)
    metric_TC = _metric(ids_TC, weights_TC, amounts_T, rule)
    keys_TC = metric_TC.int() + (preferred_T.int() << METRIC_BITS)[:, None]
    if rule.routed_first:
        keys_TC = keys_TC >> 1
        keys_TC[:, :topk] += 1 << METRIC_BITS
    return keys_TC


def _metric(ids_TC: Tensor, weights_TC: Tensor, amounts_T: Tensor | None, rule: KeyRule) -> Tensor:
    num_tokens = ids_TC.shape[0]
    if rule.metric == Metric.SCORE:
        value_TC = weights_TC
        if amounts_T is not None:
            value_TC = value_TC * (amounts_T.float() / AMOUNT_ONE)[:, None]
        return _score_metric(value_TC)
    if rule.metric == Metric.RANDOM:
        return _random_metric(ids_TC, rule.seed)
    token_T = torch.arange(num_tokens, device=ids_TC.device)
    place_T = (token_T * MAX_METRIC) // max(num_tokens - 1, 1)
    if rule.metric == Metric.ORDER:
        place_T = MAX_METRIC - place_T
    elif rule.metric != Metric.REVERSE:
        raise ValueError(f"metric {rule.metric} is not one of {[int(m) for m in Metric]}")
    return place_T[:, None].expand(ids_TC.shape)


def _score_metric(value_TC: Tensor) -> Tensor:
    bits_TC = value_TC.contiguous().view(torch.int32)
    metric_TC = ((bits_TC - SCORE_ORIGIN_BITS) >> SCORE_SHIFT).clamp(0, MAX_METRIC)
    return metric_TC.where(value_TC > 0, 0)


def _random_metric(ids_TC: Tensor, seed: int) -> Tensor:
    token_T = torch.arange(ids_TC.shape[0], device=ids_TC.device)
    word_TC = ids_TC.long() * HASH_EXPERT + (token_T * HASH_TOKEN)[:, None] + hash_seed(seed)
    word_TC &= _WORD
    word_TC ^= word_TC >> 16
    word_TC = (word_TC * HASH_MIX_1) & _WORD
    word_TC ^= word_TC >> 13
    word_TC = (word_TC * HASH_MIX_2) & _WORD
    word_TC ^= word_TC >> 16
    return word_TC >> (32 - METRIC_BITS)
