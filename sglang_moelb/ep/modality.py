"""Which tokens are vision and which must not be touched, row by row as a MoE layer sees them.

SGLang replaces multimodal tokens by ids of 1,000,000 and more and clamps them inside the model's
forward, so the mask is taken before. Decode rows and the rows of requests that refuse lossy levers
are protected: nothing of them is cut. Only the latter keep experts at the model's own precision.

Shape letters: T rows of this rank's batch (padded), t rows that a MoE layer sees on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import and_

import torch

from sglang_moelb.ep.refusal import refuses
from sglang_moelb.kernels.row_layout import FLAG_PROTECTED, FLAG_REFUSED, FLAG_VISION

PLAIN, DECODES, REFUSES = 0, FLAG_PROTECTED, FLAG_PROTECTED | FLAG_REFUSED  # flags of a request
FIRST_MULTIMODAL_ID = 1_000_000
assert FLAG_VISION == 1, "a comparison is taken as a flag as it is"


@dataclass(frozen=True, kw_only=True, slots=True)
class Requests:
    """Runs of tokens in batch order: how many, and whether they are PLAIN, DECODES or REFUSES."""

    runs: tuple[tuple[int, int], ...]
    phase: str

    @property
    def num_tokens(self) -> int:
        """Real tokens of the batch."""
        return sum(n for n, _ in self.runs)

    @property
    def kinds(self) -> set[int]:
        """What its tokens are; REFUSES where none is known."""
        return {kind for num_tokens, kind in self.runs if num_tokens} or {REFUSES}


def token_flags(input_ids_T: torch.Tensor, requests: Requests) -> torch.Tensor:
    """uint8 `[T]`, FLAG_VISION and what requests are; on the device of `input_ids_T`, no sync."""
    flags_T = (input_ids_T >= FIRST_MULTIMODAL_ID).view(torch.uint8)
    kinds = requests.kinds
    shared = reduce(and_, kinds)
    if len(kinds) == 1:
        return flags_T | shared if shared else flags_T
    # Padding has what all tokens have, as where they are alike.
    host_T = torch.full(input_ids_T.shape, shared, dtype=torch.uint8)
    start = 0
    for num_tokens, kind in requests.runs:
        host_T[start : start + num_tokens] = kind
        start += num_tokens
    if input_ids_T.is_cuda:
        host_T = host_T.pin_memory()
    flags_T |= host_T.to(input_ids_T.device, non_blocking=True)
    return flags_T


class EvenFlags:
    """Flags of batches whose rows all have the same, without a launch; not to be written."""

    def __init__(self) -> None:
        self._held: dict[int, torch.Tensor] = {}

    def of(self, input_ids_T: torch.Tensor, flag: int) -> torch.Tensor:
        """uint8 `[T]`, each `flag`, on the device of `input_ids_T`."""
        num_rows = input_ids_T.shape[0]
        held = self._held.get(flag)
        if held is None or held.shape[0] < num_rows:
            held = self._held[flag] = input_ids_T.new_full((num_rows,), flag, dtype=torch.uint8)
        return held if held.shape[0] == num_rows else held[:num_rows]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowWindow:
    """Which rows of the batch a MoE layer sees on this rank: all, or one attention-TP share."""

    attn_tp_size: int
    attn_tp_rank: int

    def of(self, flags_T: torch.Tensor, num_rows: int) -> torch.Tensor:
        """The flags of the `num_rows` rows of a MoE layer.

        Raises `RuntimeError` when the rows are neither the whole batch nor this rank's share of it.
        """
        num_tokens = flags_T.shape[0]
        if num_rows == num_tokens:
            return flags_T
        start, stop = self.bounds(num_tokens)
        if num_rows != stop - start:
            raise RuntimeError(
                f"sglang_moelb: a MoE layer has {num_rows} rows on this rank; expected all "
                f"{num_tokens} of the batch, or share {self.attn_tp_rank} of {self.attn_tp_size} "
                f"({stop - start}). This layout of rows is not supported."
            )
        return flags_T[start:stop]

    def bounds(self, num_tokens: int) -> tuple[int, int]:
        """First and one-past-last row of this rank's share, as `torch.tensor_split` deals them."""
        base, extra = divmod(num_tokens, self.attn_tp_size)
        start = self.attn_tp_rank * base + min(self.attn_tp_rank, extra)
        return start, start + base + (1 if self.attn_tp_rank < extra else 0)


def requests_of(batch: object, num_tokens_of_request: list[int]) -> Requests:
    """The runs of an SGLang `ScheduleBatch`."""
    mode = batch.forward_mode  # type: ignore[attr-defined]
    if mode.is_idle():
        return Requests(runs=(), phase="idle")
    requests = batch.reqs  # type: ignore[attr-defined]
    # Every step of decode comes here, where hardly any request has parameters of its own.
    given = [(one, one.sampling_params.custom_params) for one in requests]
    refused = {id(one) for one, custom_params in given if custom_params and refuses(custom_params)}
    phase = "decode" if mode.is_decode() else "prefill"
    if phase == "decode" and not refused:
        return Requests(runs=((sum(num_tokens_of_request), DECODES),), phase=phase)
    decoding = {id(request) for request in (batch.decoding_reqs or ())}  # type: ignore[attr-defined]
    runs = tuple(
        (
            num,
            REFUSES
            if id(one) in refused
            else DECODES
            if phase == "decode" or id(one) in decoding
            else PLAIN,
        )
        for one, num in zip(requests, num_tokens_of_request, strict=True)
    )
    return Requests(runs=runs, phase=phase)
