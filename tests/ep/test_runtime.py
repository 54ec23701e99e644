"""Laws of what one process does between the seams, with ranks that all hold what this one holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from sglang_moelb.config import Config, merge, policy_of
from sglang_moelb.ep import points
from sglang_moelb.ep.agreed import Agreed, Sizes
from sglang_moelb.ep.build_record import build
from sglang_moelb.ep.modality import DECODES, PLAIN, REFUSES, Requests, RowWindow
from sglang_moelb.ep.open_pass import TIMED_EVERY, TIMED_FIRST, gate_reason
from sglang_moelb.ep.records import PassLog, close, raw_of, slots_of
from sglang_moelb.ep.runtime import Runtime
from sglang_moelb.ep.seams import SEAMS
from sglang_moelb.ep.seat import Seat
from sglang_moelb.ep.shared_counts import SharedCounts
from sglang_moelb.hot_config import KNOB_PREFIX, to_numbers, without_slots
from sglang_moelb.types import Lever, Policy

from .layers import NUM_EXPERTS, TOPK, layer_input, topology

NUM_RANKS = 2
START = merge(Config(), {"mode": "drop", "capacity": {"min_batch_tokens": 4, "factor": 0.5}})


class TopK(NamedTuple):
    """SGLang's top-k output."""

    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: torch.Tensor


class Dispatcher:
    """SGLang's DeepEP dispatcher, as far as we ask it."""

    def __init__(self, mode: str = "NORMAL") -> None:
        self._mode = mode

    def _get_impl(self) -> Any:
        return SimpleNamespace(dispatch_mode=SimpleNamespace(name=self._mode))


class Agreeing:
    """Every rank brings the same; `is_waited` once the answer has been asked for."""

    def start(self, policy: Policy, sizes: Sizes) -> None:
        self.agreed = Agreed(policy=policy, sizes_R=(sizes,) * NUM_RANKS)
        self.is_waited = False

    def finish(self) -> Agreed:
        assert not self.is_waited, "finish without start"
        self.is_waited = True
        return self.agreed


class Mirroring:
    def __init__(self) -> None:
        self.num_gathers = 0

    def place(self, width: int) -> None:
        return None

    def gather(self, row_W: torch.Tensor) -> torch.Tensor:
        self.num_gathers += 1
        return row_W.expand(NUM_RANKS, -1).contiguous()


class Clock:
    """A controller that takes what it is given."""

    def __init__(self) -> None:
        self.configs: list[Config] = []
        self.records: list[Any] = []
        self.lever = Lever.DROP

    def pass_begun(self) -> None:
        """Nothing to do."""

    def policy(self) -> Policy:
        return policy_of(START, self.lever, epoch=1, reason="test")

    def reconfigure(self, config: Config) -> None:
        self.configs.append(config)

    def submit(self, log: PassLog, counts_RLW: torch.Tensor, stats_R8: Any) -> None:
        sizes = replace(topology(NUM_RANKS), num_layers=counts_RLW.shape[1])
        shared = SharedCounts.create(sizes)
        told = raw_of(close(log, counts_RLW, stats_R8, slots_of(shared)[0]), now_s=0.0)
        self.records.append(
            build(
                told,
                shared.counts_SRLW[0],
                shared.stats_SR8[0],
                shared.low_SLE[0],
                shared.copied_SLR2[0],
                sizes,
                0,
                mass_per_token=1.0,
            )
        )

    def status(self) -> Any:
        return {"controller": {"state": "running"}, "totals": {}, "recent": [], "verdict": None}


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def dispatcher() -> Dispatcher:
    return Dispatcher()


@pytest.fixture
def agreeing() -> Agreeing:
    return Agreeing()


@pytest.fixture
def mirroring() -> Mirroring:
    return Mirroring()


@pytest.fixture
def runtime(
    clock: Clock, dispatcher: Dispatcher, agreeing: Agreeing, mirroring: Mirroring
) -> Iterator[Runtime]:
    seat = Seat(
        topology=replace(topology(NUM_RANKS), num_layers=1),
        rank=0,
        device=torch.device("cpu"),
        window=RowWindow(attn_tp_size=1, attn_tp_rank=0),
        layer_of_dispatcher={id(dispatcher): 0},
        scoring=("softmax",),
        form="hook",
    )
    for seam in SEAMS:
        points.num_passed[seam.name] += 1
    yield Runtime(seat, START, agreeing, mirroring, clock)  # type: ignore[arg-type]
    points.detach()


def forward_batch(num_tokens: int, requests: Requests | None) -> SimpleNamespace:
    batch = SimpleNamespace(input_ids=torch.zeros(num_tokens, dtype=torch.int64))
    if requests is not None:
        batch.moelb_requests = requests
    return batch


def serve(
    runtime: Runtime, dispatcher: Any, requests: Requests | None, num_tokens: int = 40
) -> tuple[TopK, TopK]:
    """One pass of one layer: the top-k output before and after."""
    routed = layer_input(num_tokens, seed=3)
    before = TopK(routed.weights_TK, routed.ids_TK.int(), routed.logits_TE)
    runtime.begin_pass(forward_batch(num_tokens, requests))
    after = runtime.before_dispatch(dispatcher, routed.hidden_TD, before)
    assert runtime.run_experts(None, None) is None
    runtime.after_experts()
    runtime.after_combine()
    runtime.end_pass()
    return before, after


PREFILL = Requests(runs=((40, PLAIN),), phase="prefill")


def test_a_lever_rewrites_ids_and_weights_and_nothing_else(
    runtime: Runtime, dispatcher: Dispatcher, clock: Clock
) -> None:
    before, after = serve(runtime, dispatcher, PREFILL)
    assert (after.topk_ids != before.topk_ids).any()
    assert after.topk_ids.dtype == before.topk_ids.dtype
    assert after.router_logits is before.router_logits
    (record,) = clock.records
    assert record.num_dropped_rows == NUM_RANKS * int((after.topk_ids < 0).sum())
    assert record.lost_mass > 0


@pytest.mark.parametrize(
    "requests",
    [
        Requests(runs=((1, PLAIN),), phase="prefill"),  # below min_batch_tokens over both ranks
        None,
    ],
    ids=["small", "unknown"],
)
def test_where_the_lever_must_not_act_the_same_object_is_dispatched(
    runtime: Runtime, dispatcher: Dispatcher, clock: Clock, requests: Requests | None
) -> None:
    before, after = serve(runtime, dispatcher, requests)
    assert after is before
    (record,) = clock.records
    assert record.lost_mass == 0
    assert record.used_lever is Lever.NONE
    assert record.gate_reason


@pytest.mark.parametrize("phase", ["decode", "idle"])
def test_without_a_prefill_nothing_is_exchanged_or_recorded(
    runtime: Runtime, dispatcher: Dispatcher, clock: Clock, phase: str
) -> None:
    runs = ((40, DECODES),) if phase == "decode" else ()
    before, after = serve(runtime, dispatcher, Requests(runs=runs, phase=phase))
    assert after is before
    assert clock.records == []
    serve(runtime, dispatcher, PREFILL)
    assert len(clock.records) == 1


def test_without_a_lever_the_same_object_is_dispatched_and_still_recorded(
    runtime: Runtime, dispatcher: Dispatcher, clock: Clock
) -> None:
    clock.lever = Lever.NONE
    before, after = serve(runtime, dispatcher, PREFILL)
    assert after is before
    (record,) = clock.records
    assert record.rows_LEM.sum() == 40 * TOPK * NUM_RANKS
    assert record.gate_reason == ""
    assert record.routed_mass > 0


def test_a_pass_is_exchanged_at_its_end_and_with_a_lever_in_each_layer_too(
    runtime: Runtime, dispatcher: Dispatcher, clock: Clock, mirroring: Mirroring
) -> None:
    routed = layer_input(40, seed=3)
    output = TopK(routed.weights_TK, routed.ids_TK.int(), routed.logits_TE)
    for lever, expected in ((Lever.NONE, 1), (Lever.DROP, 3 + 1)):
        clock.lever, mirroring.num_gathers = lever, 0
        runtime.begin_pass(forward_batch(40, PREFILL))
        for _ in range(3):
            runtime.before_dispatch(dispatcher, routed.hidden_TD, output)
        runtime.end_pass()
        assert mirroring.num_gathers == expected
        assert clock.records[-1].rows_LEM.shape[0] == 3
        assert (clock.records[-1].rows_LEM == clock.records[-1].rows_LEM[:1]).all()


def test_the_ranks_are_waited_for_at_the_first_moe_layer_and_not_before(
    runtime: Runtime, dispatcher: Dispatcher, agreeing: Agreeing
) -> None:
    routed = layer_input(40, seed=3)
    runtime.begin_pass(forward_batch(40, PREFILL))
    assert not agreeing.is_waited
    output = TopK(routed.weights_TK, routed.ids_TK.int(), routed.logits_TE)
    runtime.before_dispatch(dispatcher, routed.hidden_TD, output)
    assert agreeing.is_waited
    runtime.end_pass()


def test_a_pass_without_a_moe_layer_still_takes_its_turn_in_the_agreement(
    runtime: Runtime, agreeing: Agreeing
) -> None:
    runtime.begin_pass(forward_batch(40, PREFILL))
    runtime.end_pass()
    assert agreeing.is_waited


def test_vision_tokens_are_flagged_before_sglang_clamps_their_ids(
    runtime: Runtime, dispatcher: Dispatcher, clock: Clock
) -> None:
    clock.lever = Lever.NONE
    routed = layer_input(40, seed=3)
    batch = forward_batch(40, PREFILL)
    batch.input_ids[:7] = 1_000_000
    runtime.begin_pass(batch)
    batch.input_ids.clamp_(max=10)
    output = TopK(routed.weights_TK, routed.ids_TK.int(), routed.logits_TE)
    runtime.before_dispatch(dispatcher, routed.hidden_TD, output)
    runtime.end_pass()
    assert clock.records[0].num_vision_tokens_R.tolist() == [7, 7]


@pytest.mark.parametrize("images", [None, [], [None, None], [None, object()]])
@pytest.mark.parametrize("protected", [0, 7, 40])
@pytest.mark.parametrize("kind", [DECODES, REFUSES])
def test_flags_are_right_whether_or_not_sglang_says_that_there_are_images(
    runtime: Runtime, dispatcher: Dispatcher, clock: Clock, images: Any, protected: int, kind: int
) -> None:
    clock.lever = Lever.NONE
    batch = forward_batch(
        40, Requests(runs=((protected, kind), (40 - protected, PLAIN)), phase="prefill")
    )
    batch.mm_inputs = images
    num_vision = 5 if images and any(images) else 0
    batch.input_ids[:num_vision] = 1_000_000
    routed = layer_input(40, seed=3)
    for _ in range(2):
        runtime.begin_pass(batch)
        output = TopK(routed.weights_TK, routed.ids_TK.int(), routed.logits_TE)
        runtime.before_dispatch(dispatcher, routed.hidden_TD, output)
        runtime.end_pass()
        assert clock.records[-1].num_vision_tokens_R.tolist() == [num_vision] * 2
        assert clock.records[-1].num_protected_tokens_R.tolist() == [protected] * 2
        num_refused = protected * (kind == REFUSES)
        assert clock.records[-1].num_refused_tokens_R.tolist() == [num_refused] * 2


def test_the_first_passes_and_then_some_are_timed_and_all_with_a_lever(
    runtime: Runtime, dispatcher: Dispatcher, clock: Clock
) -> None:
    clock.lever = Lever.NONE
    numbers = range(1, TIMED_FIRST + 2 * TIMED_EVERY)
    for _ in numbers:
        serve(runtime, dispatcher, PREFILL)
        serve(runtime, dispatcher, Requests(runs=((1, PLAIN),), phase="prefill"))  # too small
    timed = [bool((record.experts_ms_L > 0).all()) for record in clock.records[::2]]
    assert timed == [n <= TIMED_FIRST or n % TIMED_EVERY == 0 for n in numbers]
    assert timed.count(False) > TIMED_EVERY
    assert all(record.balance_ms > 0 for record in clock.records)
    clock.lever = Lever.DROP
    serve(runtime, dispatcher, PREFILL)
    assert (clock.records[-1].experts_ms_L > 0).all()
    assert clock.records[-1].balance_ms > 0


@pytest.mark.parametrize("stranger", [Dispatcher(), Dispatcher("LOW_LATENCY")])
def test_a_layer_that_is_not_ours_passes_through(runtime: Runtime, stranger: Dispatcher) -> None:
    before, after = serve(runtime, stranger, PREFILL)
    assert after is before


def test_our_layer_in_low_latency_mode_passes_through(
    runtime: Runtime, dispatcher: Dispatcher
) -> None:
    dispatcher._mode = "LOW_LATENCY"
    before, after = serve(runtime, dispatcher, PREFILL)
    assert after is before


def test_the_first_prefill_checks_that_every_seam_was_passed(
    runtime: Runtime, dispatcher: Dispatcher
) -> None:
    points.num_passed["combined"] = 0
    serve(runtime, dispatcher, Requests(runs=((40, DECODES),), phase="decode"))
    with pytest.raises(SystemExit, match="combined: sglang"):
        serve(runtime, dispatcher, PREFILL)


def test_lengths_of_a_batch_become_runs_and_decode_counts_one_a_request(runtime: Runtime) -> None:
    mode = SimpleNamespace(is_idle=lambda: False, is_decode=lambda: False)
    request = SimpleNamespace(sampling_params=SimpleNamespace(custom_params=None))
    batch = SimpleNamespace(forward_mode=mode, reqs=[request, request], decoding_reqs=None)
    forward = SimpleNamespace(extend_seq_lens_cpu=[5, 2], batch_size=2)
    runtime.note_requests(forward, batch)
    assert forward.moelb_requests.runs == ((5, PLAIN), (2, PLAIN))
    batch.forward_mode = SimpleNamespace(is_idle=lambda: False, is_decode=lambda: True)
    forward = SimpleNamespace(extend_seq_lens_cpu=None, batch_size=2)
    runtime.note_requests(forward, batch)
    assert forward.moelb_requests == Requests(runs=((2, DECODES),), phase="decode")


def agreed(lever: Lever, phase: str, num_prefill: int, min_tokens: int) -> Agreed:
    sizes = Sizes(num_tokens=num_prefill, num_prefill_tokens=num_prefill, phase=phase)
    policy = Policy(epoch=1, lever=lever, min_batch_tokens=min_tokens)
    return Agreed(policy=policy, sizes_R=(sizes, sizes))


def test_the_gate_opens_for_prefill_of_enough_tokens_over_all_ranks_only() -> None:
    for lever in (Lever.DROP, Lever.EXPAND):
        assert gate_reason(agreed(lever, "prefill", 50, 100)) == ""
        assert gate_reason(agreed(lever, "prefill", 49, 100)) == (
            "98 prefill tokens, below min_batch_tokens 100"
        )
        for phase in ("decode", "idle"):
            assert gate_reason(agreed(lever, phase, 500, 0)).startswith(f"{phase} pass: nothing is")
    assert gate_reason(agreed(Lever.NONE, "decode", 0, 100)) == ""


def prefixed(numbers: dict[str, Any]) -> dict[str, Any]:
    return {KNOB_PREFIX + k: v for k, v in numbers.items()}


def test_a_state_update_changes_our_knobs_and_leaves_the_others_to_sglang(
    runtime: Runtime, clock: Clock
) -> None:
    wanted = merge(START, {"mode": "expand", "capacity": {"factor": 2.0}})
    left = runtime.take_update({**prefixed(to_numbers(wanted)), "pp_max_micro_batch_size": 8})
    assert left == {"pp_max_micro_batch_size": 8}
    assert clock.configs == [wanted]
    assert runtime.status()["mode"] == "expand"


def test_a_partial_state_update_keeps_the_other_knobs(runtime: Runtime, clock: Clock) -> None:
    assert runtime.take_update(prefixed({"capacity.factor": 3.0})) == {}
    assert clock.configs == [merge(START, {"capacity": {"factor": 3.0}})]


@pytest.mark.parametrize(
    "numbers",
    [{"mode": 99}, {"mode": -1}, {"unheard": 1}, {"capacity.factor": 0.0}, {"replicate.slots": 1}],
)
def test_a_wrong_state_update_is_handed_back_whole_so_that_sglang_refuses_it(
    runtime: Runtime, clock: Clock, numbers: dict[str, Any]
) -> None:
    update = {**prefixed(numbers), "pp_max_micro_batch_size": 8}
    assert runtime.take_update(update) == update
    assert clock.configs == []
    assert runtime.status()["mode"] == START.mode


def test_the_status_names_the_policy_in_words(runtime: Runtime, dispatcher: Dispatcher) -> None:
    serve(runtime, dispatcher, PREFILL)
    status = runtime.status()
    assert status["policy"]["lever"] == "drop"
    assert status["policy"]["level"] == "device"
    assert status["num_passes"] == 1
    assert status["topology"]["num_experts"] == NUM_EXPERTS
    assert status["seams"]["dispatch"] == 1


class Lowering:
    """The lever downgrade, which only says what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, list[int]]] = []
        self.num_forgotten = 0

    def prepare(self, layer: int, low_E: torch.Tensor) -> None:
        self.asked.append((layer, low_E.tolist()))

    def run(self, layer: Any, dispatch_output: Any) -> Any:
        return ("low", layer, dispatch_output) if self.asked else None

    def forget(self) -> None:
        self.num_forgotten += 1

    def told(self) -> dict[str, int]:
        return {"num_low_layers": len(self.asked)}


def test_downgrade_plans_before_the_dispatch_runs_the_experts_and_leaves_routing(
    runtime: Runtime, dispatcher: Dispatcher, clock: Clock, mirroring: Mirroring
) -> None:
    lowering = Lowering()
    runtime._downgrade = lowering  # type: ignore[assignment]
    clock.lever = Lever.DOWNGRADE
    routed = layer_input(40, seed=3)
    before = TopK(routed.weights_TK, routed.ids_TK.int(), routed.logits_TE)
    batch = forward_batch(40, PREFILL)
    batch.input_ids[:] = 1_000_000
    runtime.begin_pass(batch)
    after = runtime.before_dispatch(dispatcher, routed.hidden_TD, before)
    assert after is before
    ((layer, low_E),) = lowering.asked
    assert layer == 0
    assert sum(low_E) == NUM_EXPERTS // NUM_RANKS, "one of the two ranks is above the mean"
    assert runtime.run_experts("layer", "rows") == ("low", "layer", "rows")
    runtime.after_experts()
    runtime.after_combine()
    runtime.end_pass()
    (record,) = clock.records
    assert record.used_lever is Lever.DOWNGRADE
    assert record.low_rows_LR is not None
    assert np.count_nonzero(record.low_rows_LR) == 1
    assert (record.lost_mass, record.num_dropped_rows) == (0, 0)
    assert (lowering.num_forgotten, mirroring.num_gathers) == (1, 1)
    assert runtime.status()["downgrade"] == {"num_low_layers": 1}


class Copying:
    """The lever replicate, which only says what it was asked."""

    num_slots = 2

    def __init__(self) -> None:
        self.asked: list[tuple[int, Any, torch.Tensor]] = []
        self.num_forgotten = 0

    def prepare(self, layer: int, dispatcher: Any, plan: Any, ids_TK: torch.Tensor) -> torch.Tensor:
        self.asked.append((layer, dispatcher, plan.slots_RS))
        return ids_TK + 1

    def run(self, layer: Any, dispatch_output: Any) -> Any:
        return ("wide", layer, dispatch_output) if self.asked else None

    def forget(self) -> None:
        self.num_forgotten += 1

    def told(self) -> dict[str, int]:
        return {"num_slots": self.num_slots}


def test_replicate_plans_before_the_dispatch_and_changes_ids_only(
    runtime: Runtime, dispatcher: Dispatcher, clock: Clock, mirroring: Mirroring
) -> None:
    copying = Copying()
    runtime._replicate = copying  # type: ignore[assignment]
    clock.lever = Lever.REPLICATE
    routed = layer_input(40, seed=3, popularity_E=4.0 * (torch.arange(NUM_EXPERTS) < 4))
    before = TopK(routed.weights_TK, routed.ids_TK.int(), routed.logits_TE)
    runtime.begin_pass(forward_batch(40, PREFILL))
    after = runtime.before_dispatch(dispatcher, routed.hidden_TD, before)
    assert torch.equal(after.topk_ids, before.topk_ids + 1)
    assert after.topk_weights is before.topk_weights
    ((layer, of, slots_RS),) = copying.asked
    assert (layer, of) == (0, dispatcher)
    assert slots_RS.shape == (NUM_RANKS, 2)
    assert runtime.run_experts("layer", "rows") == ("wide", "layer", "rows")
    runtime.after_experts()
    runtime.after_combine()
    runtime.end_pass()
    (record,) = clock.records
    assert record.used_lever is Lever.REPLICATE
    assert record.num_copies_LR.tolist() == (slots_RS >= 0).sum(dim=1).view(1, -1).tolist()
    assert record.num_copies_LR.sum() == 0, "a copy of fewer than 256 rows does not pay"
    assert record.rows_after_LR.sum() == record.rows_LEM.sum()
    assert (record.lost_mass, record.num_dropped_rows) == (0, 0)
    assert (copying.num_forgotten, mirroring.num_gathers) == (1, 1)
    assert runtime.status()["replicate"] == {"num_slots": 2}


def test_without_a_lever_the_very_same_tensors_go_on_beside_room_for_copies(
    runtime: Runtime, dispatcher: Dispatcher, clock: Clock
) -> None:
    copying = Copying()
    runtime._replicate = copying  # type: ignore[assignment]
    for lever in (Lever.NONE, Lever.REPLICATE):
        clock.lever = lever
        # the second pass is below min_batch_tokens, 4 over all ranks
        small = Requests(runs=((1, PLAIN),), phase="prefill")
        requests = PREFILL if lever is Lever.NONE else small
        before, after = serve(runtime, dispatcher, requests, requests.num_tokens)
        assert after is before
    assert copying.asked == []


def test_a_server_without_slots_hands_an_update_to_downgrade_back(
    runtime: Runtime, clock: Clock
) -> None:
    runtime._config = without_slots(START)
    update = prefixed(to_numbers(merge(START, {"mode": "downgrade"})))
    assert runtime.take_update(update) == update
    assert clock.configs == []
    runtime._config = START
    assert runtime.take_update(update) == {}
    assert clock.configs[-1].mode == "downgrade"
