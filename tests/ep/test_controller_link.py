"""Laws of the pass clock: whatever its process does, the serving thread goes on, in `none`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sglang_moelb.config import Config, merge
from sglang_moelb.controller.controller import Controller
from sglang_moelb.ep import records
from sglang_moelb.ep.agreed import Agreed, Sizes
from sglang_moelb.ep.clock import HostMark, mark_on
from sglang_moelb.ep.controller_link import ControllerError, ControllerLink
from sglang_moelb.ep.records import PassLog
from sglang_moelb.ep.shared_counts import SharedCounts
from sglang_moelb.kernels.row_layout import C_TEXT_ROWS, H_TOKENS, NUM_COUNTS, NUM_HEADER
from sglang_moelb.trace.reader import open_trace
from sglang_moelb.types import Lever, Observation, Policy, Topology

HOST = torch.device("cpu")
TOPOLOGY = Topology(num_layers=2, num_experts=4, num_ranks=2, topk=2)
SETTINGS = merge(
    Config(),
    {
        "mode": "drop",
        "capacity": {"min_batch_tokens": 4},
        "controller": {"timeout_ms": 80.0, "quality_budget": 1.0},
    },
)
WAIT_S = 30.0
NUM_TOKENS = 40


class BusyDevice:
    """A device that has not ended any pass until `is_done`."""

    def __init__(self) -> None:
        self.is_done = False

    def mark(self, device: torch.device) -> HostMark:
        mark = HostMark()
        mark.is_reached = lambda: self.is_done  # type: ignore[method-assign]
        return mark


class World:
    """A controller process, and passes to hand over."""

    def __init__(self, config: Config = SETTINGS, trace: str = "") -> None:
        self.link = ControllerLink(TOPOLOGY, config, rank=0, device=HOST, trace=trace)
        self.num_passes = 0

    @property
    def process_id(self) -> int:
        return int(self.link.status()["controller"]["process_id"])

    def submit(self, policy: Policy | None = None, *, num_ranks: int = 2, first: int = 30) -> None:
        """A pass in which expert 0 has `first` of rank 0's rows, the others 10 each."""
        sizes = Sizes(num_tokens=NUM_TOKENS, num_prefill_tokens=NUM_TOKENS, phase="prefill")
        policy = policy or Policy(epoch=0)
        log = PassLog(
            step=self.num_passes,
            agreed=Agreed(policy=policy, sizes_R=(sizes,) * num_ranks),
            lever=policy.lever,
            gate_reason="",
            begun=mark_on(HOST),
            timed=False,
            flags_T=None,
            marks_L=[{}, {}],
        )
        width = NUM_HEADER + NUM_COUNTS * TOPOLOGY.num_experts
        counts_RLW = torch.zeros(2, 2, width, dtype=torch.int32)
        counts_RLW[..., H_TOKENS] = NUM_TOKENS
        counts_RLW[..., NUM_HEADER + C_TEXT_ROWS :: NUM_COUNTS] = 10
        counts_RLW[0, :, NUM_HEADER + C_TEXT_ROWS] = first
        stats_R8 = torch.zeros(2, 8, dtype=torch.int64) if policy.lever else None
        self.num_passes += 1
        self.link.submit(log, counts_RLW, stats_R8)

    def fault(self, fault: str) -> None:
        self.link.reconfigure(merge(SETTINGS, {"fault": {"controller": fault}}))

    def signal(self, number: int) -> None:
        os.kill(self.process_id, number)

    def num_read(self) -> int:
        return int(self.link.status()["totals"]["num_passes"])


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "did not happen in time"
        time.sleep(0.002)


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.link.stop()


def test_passes_are_read_and_shown_with_the_counts_that_were_handed_over(world: World) -> None:
    policy = world.link.policy()
    assert (policy.lever, policy.reason) == (Lever.DROP, "mode drop")
    for first in (30, 50):
        world.submit(first=first)
    until(lambda: world.num_read() == 2)
    told = world.link.status()
    controller, totals, recent = told["controller"], told["totals"], told["recent"]
    assert [row["step"] for row in recent] == [0, 1]
    assert [row["rows_before_R"] for row in recent] == [[2 * 60, 2 * 40], [2 * 80, 2 * 40]]
    assert [row["num_tokens_R"] for row in recent] == [[NUM_TOKENS] * 2] * 2
    assert totals["num_passes_by_lever"]["none"] == 2
    assert (controller["state"], controller["num_passes"]) == ("running", 2)
    assert controller["last_decision"]["lever"] == "drop"


def test_a_slot_is_used_again_only_after_its_pass_was_read(world: World) -> None:
    num_slots = SharedCounts.create(TOPOLOGY).num_slots
    for first in range(3 * num_slots):
        until(lambda first=first: first - world.num_read() < num_slots)  # type: ignore[misc]
        world.submit(first=first)
    until(lambda: world.num_read() == 3 * num_slots)
    rows = [row["rows_before_R"][0] for row in world.link.status()["recent"]]
    assert rows == [2 * (first + 30) for first in range(3 * num_slots)][-len(rows) :]


def test_a_dead_process_means_none_with_the_reason_at_the_very_next_call(world: World) -> None:
    world.fault("die")
    until(lambda: world.link.state == "dead")
    policy = world.link.policy()
    assert policy.lever is Lever.NONE
    assert policy.reason == "controller process is dead: RuntimeError: fault.controller is 'die'"
    world.submit()
    assert world.link.policy().lever is Lever.NONE


def test_a_killed_process_means_none_and_says_what_killed_it(world: World) -> None:
    world.submit()
    until(lambda: world.num_read() == 1)
    world.signal(signal.SIGKILL)
    until(lambda: world.link.policy().lever is Lever.NONE)
    why = "controller process is dead: killed by SIGKILL"
    until(lambda: world.link.policy().reason == why)
    for _ in range(100):
        world.submit()
    world.link.reconfigure(SETTINGS)
    told = world.link.status()
    controller, totals, recent = told["controller"], told["totals"], told["recent"]
    assert controller["state"] == "dead"
    assert totals["num_passes"] == len(recent) == 1, "what was counted is still shown"


def test_a_pass_that_cannot_be_read_kills_the_process_and_shows_the_error(world: World) -> None:
    world.submit(num_ranks=0)
    until(lambda: world.link.state == "dead")
    assert world.link.policy().reason == (
        "controller process is dead: ValueError: max() arg is an empty sequence"
    )


@pytest.mark.parametrize("how", ["stopped by a signal", "hanging"])
def test_a_hung_process_means_none_after_the_timeout_and_one_further_pass_until_it_answers(
    world: World, how: str
) -> None:
    if how == "hanging":
        world.fault("hang")
    else:
        world.signal(signal.SIGSTOP)
    world.submit()
    time.sleep(0.12)
    assert world.link.policy().lever is Lever.DROP, "nobody has waited for one record alone"
    world.submit()
    assert world.link.state == "hung"
    policy = world.link.policy()
    assert (policy.lever, policy.reason) == (Lever.NONE, "controller process is hung")
    if how == "hanging":
        world.fault("none")
    else:
        world.signal(signal.SIGCONT)
    until(lambda: world.link.state == "running" and world.num_read() == 2)
    assert world.link.policy().lever is Lever.DROP


@pytest.mark.parametrize("mode", ["none", "observe"])
def test_the_kill_switch_does_not_wait_for_the_process(world: World, mode: str) -> None:
    assert world.link.policy().lever is Lever.DROP
    world.signal(signal.SIGSTOP)
    world.link.reconfigure(merge(SETTINGS, {"mode": mode}))
    policy = world.link.policy()
    assert (policy.lever, policy.reason) == (Lever.NONE, f"mode {mode}")
    world.signal(signal.SIGCONT)
    time.sleep(0.3)
    assert (world.link.policy().lever, world.link.policy().epoch) == (Lever.NONE, policy.epoch)


def test_all_that_was_said_is_heard_at_once(world: World) -> None:
    world.signal(signal.SIGSTOP)
    world.submit()
    world.link.reconfigure(merge(SETTINGS, {"capacity": {"factor": 2.0}}))
    world.signal(signal.SIGCONT)
    time.sleep(2.0)  # by then both answers wait
    assert world.link.policy().capacity_factor == 2.0


@pytest.mark.parametrize(("fault", "state"), [("hang", "hung"), ("die", "dead")])
def test_a_fault_that_is_there_from_the_start_shows_with_the_first_passes(
    fault: str, state: str
) -> None:
    world = World(merge(SETTINGS, {"fault": {"controller": fault}}))
    assert world.link.policy().lever is Lever.DROP
    for _ in range(2):
        world.submit()
    until(lambda: world.link.state == state)
    world.link.stop()


def test_two_passes_within_the_timeout_are_no_hang(world: World) -> None:
    world.signal(signal.SIGSTOP)
    for _ in range(5):
        world.submit()
    assert world.link.policy().lever is Lever.DROP
    time.sleep(0.12)
    assert world.link.policy().lever is Lever.NONE


def test_a_pass_is_told_when_the_device_has_ended_it_and_its_time_is_no_hang(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = BusyDevice()
    monkeypatch.setattr(records, "mark_on", device.mark)
    for _ in range(3):
        world.submit()
    time.sleep(0.2)
    assert world.num_read() == 0
    assert world.link.policy().lever is Lever.DROP
    device.is_done = True
    world.link.pass_begun()
    until(lambda: world.num_read() == 3)


def test_the_last_pass_before_a_lull_is_read_without_another_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = BusyDevice()
    monkeypatch.setattr(records, "mark_on", device.mark)
    world.submit()
    device.is_done = True
    until(lambda: world.link._num_answered == 1)


def test_reconfiguring_publishes_a_policy_of_a_new_epoch(world: World) -> None:
    epoch = world.link.policy().epoch
    world.link.reconfigure(merge(SETTINGS, {"mode": "none"}))
    until(lambda: world.link.policy().lever is Lever.NONE)
    assert world.link.policy().epoch == epoch + 1
    world.link.reconfigure(SETTINGS)
    until(lambda: world.link.policy().lever is Lever.DROP)
    assert world.link.policy().epoch == epoch + 2


def test_moves_of_replicas_are_stopped_also_while_nobody_controls(world: World) -> None:
    assert world.link.policy().move_ms == SETTINGS.resident.move_ms > 0
    world.signal(signal.SIGSTOP)
    world.link.reconfigure(merge(SETTINGS, {"resident": {"move_ms": 0}}))
    assert world.link.policy().move_ms == 0


def test_the_serving_thread_never_waits_and_pending_passes_are_bounded(world: World) -> None:
    num_slots = SharedCounts.create(TOPOLOGY).num_slots
    world.signal(signal.SIGSTOP)
    spent_s = []
    for number in range(20 * num_slots):
        begun_s = time.perf_counter()
        world.submit()
        world.link.policy()
        if number % 4 == 0:
            world.link.reconfigure(SETTINGS)
        spent_s.append(time.perf_counter() - begun_s)
    # The slowest tenth is left out: a busy machine may take the core away from this thread.
    assert sorted(spent_s)[len(spent_s) * 9 // 10] < 0.005
    time.sleep(0.1)
    assert world.link.policy().lever is Lever.NONE
    world.signal(signal.SIGCONT)
    until(lambda: world.num_read() == num_slots)
    until(lambda: world.link.state == "running")


def test_a_change_of_state_is_told_once(world: World) -> None:
    states: list[str] = []
    world.link.on_state = states.append
    world.fault("hang")
    for _ in range(3):
        world.submit()
    time.sleep(0.12)
    for _ in range(4):
        world.link.policy()
    world.fault("none")
    until(lambda: world.num_read() == 3)
    world.link.policy()
    world.fault("die")
    until(lambda: world.link.state == "dead")
    for _ in range(2):
        world.link.policy()
    assert states == ["hung", "running", "dead"]


def test_stopping_ends_the_process_even_while_it_is_stopped() -> None:
    world = World()
    process_id = world.process_id
    world.signal(signal.SIGSTOP)
    world.link.stop()
    assert not Path(f"/proc/{process_id}").exists()


PARENT = """
import time, torch
from tests.ep.test_controller_link import World
print(World().process_id, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("is_stopped", [False, True])
def test_no_process_is_left_when_its_server_is_killed(is_stopped: bool) -> None:
    root = Path(__file__).resolve().parents[2]
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=root, stdout=subprocess.PIPE)
    assert parent.stdout
    process_id = int(parent.stdout.readline())
    if is_stopped:
        os.kill(process_id, signal.SIGSTOP)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until(lambda: not is_running(process_id))


def is_running(process_id: int) -> bool:
    try:
        text = Path(f"/proc/{process_id}/stat").read_text()
    except FileNotFoundError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"  # init may be slow to bury it


def test_the_process_imports_neither_torch_nor_sglang() -> None:
    code = (
        "import sys, sglang_moelb.ep.controller_process;"
        "print([m for m in ('torch', 'sglang', 'triton', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"


def test_a_trace_that_cannot_be_written_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "rank-000.00000.trace").write_text("another server's")
    with pytest.raises(ControllerError, match=r"--moelb-trace: .*holds a trace of rank 0 already"):
        World(trace=str(tmp_path))


def test_a_trace_replays_to_the_very_decisions(tmp_path: Path) -> None:
    config = merge(SETTINGS, {"mode": "auto", "controller": {"interval_ms": 5.0}})
    world = World(config, trace=str(tmp_path))
    policies: list[Policy] = []
    for number in range(12):
        world.submit(world.link.policy(), first=40 + 10 * (number % 5))
        until(lambda number=number: world.num_read() == number + 1)  # type: ignore[misc]
        policies.append(world.link.policy())
    assert world.link.status()["controller"]["trace"] == "running"
    until(lambda: len(list(open_trace(tmp_path).passes())) == 12)
    world.link.stop()
    controller = Controller(config, TOPOLOGY)
    for traced, policy in zip(open_trace(tmp_path).passes(), policies, strict=True):
        effects = controller.step(Observation(record=traced.record, now_s=traced.now_s))
        assert effects.decision == traced.decision
        assert effects.policy == policy


def test_the_verdict_comes_back_and_its_line_is_in_the_log(
    capfd: pytest.CaptureFixture[str],
) -> None:
    judging = {"enabled": True, "log_interval_s": 0.1}
    world = World(merge(SETTINGS, {"mode": "observe", "verdict": judging}))
    try:
        assert world.link.status()["verdict"] is None
        said = ""
        until_s = time.monotonic() + WAIT_S
        while "verdict: " not in said and time.monotonic() < until_s:
            world.submit()
            time.sleep(0.02)
            said += capfd.readouterr().err
        told = world.link.status()["verdict"]
        assert told is not None
        assert told["reason"].startswith("not enough: no time of the experts measured yet")
        assert "sglang_moelb: verdict: leave it off, because not enough: no time" in said
        world.link.reconfigure(SETTINGS)

        def is_off() -> bool:
            world.submit()
            world.link.policy()
            return world.link.status()["verdict"] is None

        until(is_off)
    finally:
        world.link.stop()
