"""A plugin for benchmarks: replaces the router's experts so that one rank is hot.

Every token gets `topk * skew / num_ranks` experts of the hot rank and the rest from the others, all
distinct, so the rank rows are exactly `skew` times the mean. The load is read from the file named
by MOELB_BENCH_SKEW at each pass, so that one server can be measured at several:

    SKEW [turning|moving|still|opposite] [experts=N] [vision=SHARE] [| LABEL]

such as `2`, `2 moving`, `1.5 still experts=8 vision=0.9 | auto`. The hot rank is the layer's number
modulo the ranks (turning, the default), the same plus the number of the pass (moving), rank 0 in
all layers (still) or the last (opposite). `experts=N`: only N of its experts are hot, in `moving`
others whenever all ranks have had their turn. `vision=SHARE`: so many of the tokens are taken for
vision by a balanced server. The label goes with the times of passes. Skew 0 leaves the router's
experts.

Experts are replaced before SGLang maps logical experts to physical ones and before it records them,
so that its EPLB learns the load and can spread it: a rank's experts are those it holds without
EPLB. Where `MOELB_BENCH_VISION` is set, a balanced server takes all tokens for vision. SGLang's
dummy weights, with which all log-probabilities are those of chance, are scaled until experts count
in them.

Shape letters: T tokens, K top-k, R ranks, L MoE layers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

VARIABLE, VISION_VARIABLE = "MOELB_BENCH_SKEW", "MOELB_BENCH_VISION"
FORMS = ("turning", "moving", "still", "opposite")
MAX_TOKENS = 65536
MIN_TOKENS = 64  # of a batch whose experts are replaced
FULL_TOKENS = 1024  # of a pass whose rows are counted
WEIGHT_SCALE = 30.0  # from 0.001 to 0.03 at most, the usual size at initialisation


@dataclass(frozen=True, slots=True)
class Load:
    """What the file says; `words` is all of it but the label."""

    skew: float = 0.0
    form: str = FORMS[0]
    num_hot: int = 0  # hot experts of the hot rank; 0: all
    vision: float = 0.0
    label: str = ""
    words: str = "0"

    @classmethod
    def parse(cls, text: str) -> Load:
        """Read `SKEW [FORM] [experts=N] [vision=SHARE] [| LABEL]`; ValueError names the word."""
        said, _, label = text.partition("|")
        skew, *words = said.split()
        form, amounts = FORMS[0], {"experts": "0", "vision": "0"}
        for word in words:
            name, _, amount = word.partition("=")
            if word in FORMS:
                form = word
            elif name in amounts and amount:
                amounts[name] = amount
            else:
                raise ValueError(f"{word}: one of {', '.join(FORMS)}, experts=N, vision=SHARE")
        return cls(
            skew=float(skew), form=form, num_hot=int(amounts["experts"]),
            vision=float(amounts["vision"]), label=label.strip(), words=" ".join([skew, *words]),
        )  # fmt: skip

    def hot(self, layer: int, step: int, num_ranks: int, num_experts: int) -> tuple[int, int, int]:
        """The hot rank of a layer in pass `step`, its first hot expert and how many are hot."""
        per_rank = num_experts // num_ranks
        rank = {"turning": layer, "moving": layer + step, "still": 0, "opposite": -1}[self.form]
        num_hot = self.num_hot or per_rank
        turn = step // num_ranks % (per_rank // num_hot) if self.form == "moving" else 0
        return rank % num_ranks, rank % num_ranks * per_rank + turn * num_hot, num_hot


@dataclass(slots=True)
class Imposed:
    """The load of the present pass; `step` counts large passes, the same on all ranks."""

    load: Load = field(default_factory=Load)
    stamp: int = 0
    step: int = 0
    counts: bool = False  # whether this pass, the first full one of a load, counts its rows
    rows_LR: list[torch.Tensor] = field(default_factory=list)  # of this rank's tokens
    told_LR: torch.Tensor | None = None  # of all ranks' tokens, until it is taken


_now = Imposed()


def register() -> None:
    """Entry point of SGLang's plugin loader; does nothing unless the variable is set."""
    if VARIABLE not in os.environ:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    srt = "sglang.srt"
    HookRegistry.register(
        f"{srt}.model_executor.model_runner.ModelRunner.forward", _begin, HookType.BEFORE
    )
    HookRegistry.register(
        f"{srt}.model_executor.model_runner.ModelRunner.forward", _end, HookType.AFTER
    )
    HookRegistry.register(f"{srt}.layers.moe.topk._post_process_topk_ids", _impose, HookType.AROUND)
    HookRegistry.register(
        f"{srt}.model_loader.loader.initialize_dummy_weights", _scaled, HookType.AFTER
    )
    _take_for_vision()


def _take_for_vision() -> None:
    from sglang_moelb.ep.open_pass import PassOpener
    from sglang_moelb.kernels.row_layout import FLAG_VISION

    flags_of = PassOpener._flags
    always = 1.0 if os.environ.get(VISION_VARIABLE) else 0.0

    def flags(*args: Any) -> torch.Tensor:
        flags_T = flags_of(*args)
        share = max(_now.load.vision, always)
        if not share:
            return flags_T
        is_vision = vision_mask(len(flags_T), share, flags_T.device)
        return flags_T | (is_vision * FLAG_VISION).to(flags_T.dtype)

    PassOpener._flags = flags  # type: ignore[method-assign,assignment]


@lru_cache(maxsize=64)
def vision_mask(num_tokens: int, share: float, device: torch.device) -> torch.Tensor:
    """bool `[T]`, true for `share` of every ten tokens."""
    return torch.arange(num_tokens, device=device) % 10 < round(10 * share)


def _scaled(result: None, model: torch.nn.Module) -> None:
    for name, weight in model.state_dict().items():
        if "norm" in name:
            weight.fill_(1.0)
        elif torch.is_floating_point(weight):
            weight.mul_(WEIGHT_SCALE)


def _begin(runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> None:
    own = [forward_batch.input_ids.shape[0]]
    begin_pass(list(forward_batch.global_num_tokens_cpu or own))


def _end(result: Any, *args: Any, **kwargs: Any) -> None:
    end_pass(torch.distributed.all_reduce)


def end_pass(add_up: Callable[[torch.Tensor], Any]) -> None:
    """Add up the rows of a pass that counts them over ranks, in place; all ranks do or none."""
    if _now.counts and _now.rows_LR:
        rows_LR = torch.stack(_now.rows_LR)
        add_up(rows_LR)
        _now.told_LR = rows_LR


def begin_pass(num_tokens_R: list[int]) -> None:
    """Read the load for a pass; all ranks run it together, so all count it or none does."""
    path = Path(os.environ[VARIABLE])
    stamp = path.stat().st_mtime_ns
    _now.counts = False
    if max(num_tokens_R) < MIN_TOKENS:
        return
    if stamp != _now.stamp:
        _now.load, _now.stamp = Load.parse(path.read_text()), stamp
        _now.rows_LR, _now.told_LR = [], None
    _now.step += 1
    _now.counts = not _now.rows_LR and min(num_tokens_R) >= FULL_TOKENS


def imposed_load() -> Load:
    """The load of the present pass."""
    return _now.load


def take_rows() -> torch.Tensor | None:
    """int64 `[L, R]` rows by rank in the first full pass of this load, once, when it has ended."""
    rows_LR, _now.told_LR = _now.told_LR, None
    return rows_LR


def _impose(process: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around SGLang's map of logical to physical experts, which takes all by keyword."""
    from sglang.srt.runtime_context import get_parallel

    num_ranks, num_experts = get_parallel().moe_ep_size, kwargs["router_logits"].shape[1]
    routed = kwargs["topk_ids"]
    kwargs["topk_ids"] = imposed_ids(routed, kwargs["layer_id"], num_ranks, num_experts)
    processed = process(*args, **kwargs)
    if _now.counts:
        info = kwargs.get("expert_location_dispatch_info")
        per_rank = (info.num_physical_experts if info else num_experts) // num_ranks
        ranks = processed[0] // per_rank
        _now.rows_LR.append(torch.stack([(ranks == rank).sum() for rank in range(num_ranks)]))
    return processed


def imposed_ids(routed: torch.Tensor, layer: int, num_ranks: int, num_experts: int) -> torch.Tensor:
    """The router's `[T, K]` as the present load wants them; rows of -1 stay as they are."""
    load = _now.load
    num_tokens, topk = routed.shape
    if not load.skew or num_tokens < MIN_TOKENS:
        return routed
    rank, first, num_hot = load.hot(layer, _now.step, num_ranks, num_experts)
    ids = skewed_ids(
        load.skew, rank, num_ranks, num_experts, topk, routed.device.index, first, num_hot
    )[:num_tokens].to(routed.dtype)
    return torch.where(routed >= 0, ids, routed)


@lru_cache(maxsize=256)
def skewed_ids(
    skew: float, hot: int, num_ranks: int, num_experts: int, topk: int, device: int | None,
    first: int | None = None, num_hot: int = 0,
) -> torch.Tensor:  # fmt: skip
    """int64 `[MAX_TOKENS, K]` distinct experts, `topk * skew / num_ranks` of them on rank `hot`.

    These are among the `num_hot` experts from `first` on, by default all of the rank.
    """
    num_here = round(topk * skew / num_ranks)
    per_rank = num_experts // num_ranks
    own = hot * per_rank
    hot_ids = drawn(num_hot or per_rank, num_here) + (own if first is None else first)
    cold_ids = drawn(num_experts - per_rank, topk - num_here)
    cold_ids = cold_ids + per_rank * (cold_ids >= own)
    ids = torch.cat([hot_ids, cold_ids], dim=1)
    return ids if device is None else ids.to(f"cuda:{device}")


@lru_cache(maxsize=64)
def drawn(num_experts: int, num_drawn: int) -> torch.Tensor:
    """int64 `[MAX_TOKENS, num_drawn]`, distinct in each row, every expert about as often."""
    if num_drawn > num_experts:
        raise ValueError(f"{num_drawn} experts of a token cannot be among {num_experts}")
    generator = torch.Generator().manual_seed(1000 * num_experts + num_drawn)
    if not num_drawn:
        return torch.empty(MAX_TOKENS, 0, dtype=torch.int64)
    order = torch.rand(MAX_TOKENS, num_experts, generator=generator)
    return order.topk(num_drawn, dim=1).indices
