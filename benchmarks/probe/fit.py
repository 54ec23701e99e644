"""The training loop's state and its steps: one batch, a report, a test, a checkpoint.

Device, with one host synchronisation a report. Shape letters: L layers, E experts.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.probe.device import Batch, upload
from benchmarks.probe.loader import Loader, Weights
from benchmarks.probe.measure import Tally, accuracies, answer_loss, mix
from benchmarks.probe.model import FAST, PLAIN, Probe, Ways, draw
from benchmarks.probe.optim import Masters
from benchmarks.probe.pack import Header, measure, write
from benchmarks.probe.sizes import PRESETS
from benchmarks.probe.skew import rank_skew

WARMUP_SHARE = 0.02
FINAL_RATE = 0.01
FLOOR_WEIGHT = 0.15  # of a task that is always right, beside 1.15 of one that never is
KEEP_ACCURACY = 0.7
NUM_PINNED = 3
MOST_OFF = 0.4  # routers choose other experts for a few tokens; wrong gradients are off by 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that decides a training, besides the tasks."""

    out: Path
    size: str = "probe"
    seed: int = 0
    minutes: float = 8.0
    steps: int = 0  # fixed number of steps; 0: as many as the minutes hold
    rate: float = 2e-3
    weight_decay: float = 0.05
    clip: float = 1.0
    balance: float = 0.001
    muon: bool = True
    batch_tokens: int = 32_768
    interval: int = 50
    num_tests: int = 12
    test_items: int = 64
    final_items: int = 256
    num_workers: int = 15
    reuse: int = 1
    compile: bool = False
    ways: Ways = FAST
    device: str = "cuda"
    save_every_s: float = 120.0
    pause_after_s: float = math.inf

    def identity(self) -> dict[str, Any]:
        """What must not change when a training goes on."""
        free = ("out", "num_workers", "ways", "compile", "device", "save_every_s", "pause_after_s")
        return {k: v for k, v in asdict(self).items() if k not in free}


def rate_share(progress: float) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to a hundredth."""
    if progress < WARMUP_SHARE:
        return max(progress, 1e-4) / WARMUP_SHARE
    through = min(1.0, (progress - WARMUP_SHARE) / (1 - WARMUP_SHARE))
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * through))


class Fit:
    """A training under way."""

    def __init__(self, settings: Settings, tasks: tuple[str, ...], weights: Weights) -> None:
        self.settings, self.tasks, self.weights = settings, tasks, weights
        self.device = torch.device(settings.device)
        # Plain attention and products are for CPUs, which have no fast bf16.
        dtype = torch.float32 if settings.ways == PLAIN else torch.bfloat16
        probe = Probe(PRESETS[settings.size])
        draw(probe, torch.Generator().manual_seed(settings.seed))
        self.probe = probe.to(self.device)
        full = [p.detach().clone() for p in self.probe.parameters()]
        self.probe.to(dtype)
        self.masters = Masters(
            self.probe, full, weight_decay=settings.weight_decay, muon=settings.muon
        )
        if settings.compile:
            compile_layers(self.probe)
        self.step, self.elapsed_s, self.next_test = 0, 0.0, 1
        self.running = [0.0] * len(tasks)
        self.tally = Tally(len(tasks), self.device)
        self.sums = torch.zeros(3, device=self.device)  # loss, balance loss, gradient norm
        self.num_tokens = self.num_items = 0
        self.wait_s = self.device_s = 0.0  # the host waited for data, for the device
        self._pinned: deque[tuple[Tensor, Any]] = deque()

    @property
    def progress(self) -> float:
        """Done share of the training, by steps or by time."""
        if self.settings.steps:
            return self.step / self.settings.steps
        return self.elapsed_s / (60.0 * self.settings.minutes)

    def train_step(self, loader: Loader) -> None:
        """Take a batch and update the weights once."""
        begun = time.perf_counter()
        with loader.take() as (header, block):
            self.wait_s += time.perf_counter() - begun
            batch = self._upload(header, block, loader.slot_bytes)
        settings = self.settings
        logits, routing = self.probe(batch.prompts, ways=settings.ways)
        loss = answer_loss(logits, batch)
        balance = torch.stack(routing.balance).mean()
        (loss + settings.balance * balance).backward()
        norm = self.masters.step(settings.rate * rate_share(self.progress), settings.clip)
        self.tally.add(logits, batch)
        self.sums += torch.stack([loss.detach(), balance.detach(), norm])
        self.num_tokens += batch.num_tokens
        self.num_items += batch.num_items
        self.step += 1

    def _upload(self, header: Header, block: NDArray[Any], size: int) -> Batch:
        attention = self.settings.ways.attention
        if self.device.type != "cuda":
            return upload(header, block, self.device, attention)
        if len(self._pinned) < NUM_PINNED:
            pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        else:
            pinned, copied = self._pinned.popleft()
            begun = time.perf_counter()
            copied.synchronize()
            self.device_s += time.perf_counter() - begun
        batch = upload(header, block, self.device, attention, pinned)
        copied = torch.cuda.Event()
        copied.record()
        self._pinned.append((pinned, copied))
        return batch

    def report(self, seconds: float) -> dict[str, Any]:
        """Means since the last report, `seconds` ago; moves on the weights of the tasks.

        Raises RuntimeError when the loss is no longer finite.
        """
        loss, balance, norm = (self.sums / self.settings.interval).tolist()
        right, asked = self.tally.read()
        if not math.isfinite(loss):
            raise RuntimeError(f"step {self.step}: the loss is {loss}; use a smaller --rate")
        self.running = mix(self.running, right, asked, KEEP_ACCURACY)
        self.weights.append([FLOOR_WEIGHT + 1 - a for a in self.running])
        record = {
            "kind": "train",
            "step": self.step,
            "seconds": round(self.elapsed_s, 2),
            "loss": round(loss, 5),
            "balance": round(balance, 4),
            "gradient_norm": round(norm, 4),
            "rate": self.settings.rate * rate_share(self.progress),
            "tokens_per_s": round(self.num_tokens / seconds),
            "items_per_s": round(self.num_items / seconds),
            "data_wait_share": round(self.wait_s / seconds, 3),
            "device_wait_share": round(self.device_s / seconds, 3),
            "accuracy": _rounded(accuracies(self.tasks, right, asked)),
        }
        self.sums.zero_()
        self.num_tokens = self.num_items = 0
        self.wait_s = self.device_s = 0.0
        return record

    @torch.no_grad()
    def test(self, batches: list[dict[str, NDArray[Any]]]) -> dict[str, Any]:
        """Loss, accuracy by task and routing skew on held-out items."""
        tally = Tally(len(self.tasks), self.device)
        losses, loads = [], []
        for arrays in batches:
            batch = to_device(arrays, self.device, self.settings.ways)
            logits, routing = self.probe(batch.prompts, ways=self.settings.ways)
            losses.append(answer_loss(logits, batch))
            loads.append(torch.stack(routing.loads))
            tally.add(logits, batch)
        right, asked = tally.read()
        accuracy = accuracies(self.tasks, right, asked)
        loads_L2E = torch.stack(loads).sum(0).cpu().numpy()
        return {
            "kind": "test",
            "step": self.step,
            "seconds": round(self.elapsed_s, 2),
            "loss": round(torch.stack(losses).mean().item(), 5),
            "mean_accuracy": round(sum(accuracy.values()) / len(accuracy), 5),
            "accuracy": _rounded(accuracy),
            "num_items": sum(asked),
            "skew_ep8": [round(float(x), 3) for x in rank_skew(loads_L2E.sum(1), 8)],
        }

    def check_ways(self, arrays: dict[str, NDArray[Any]]) -> str:
        """One batch forward and backward in the chosen ways and in plain ones: how far they differ.

        Raises RuntimeError when they differ by more than bf16 explains.
        """
        found = []
        for ways in (self.settings.ways, PLAIN):
            batch = to_device(arrays, self.device, ways)
            logits, _ = self.probe(batch.prompts, ways=ways)
            answer_loss(logits, batch).backward()
            grads = torch.cat([_gradient(p) for p in self.probe.parameters()])
            self.probe.zero_grad()
            found.append((logits.detach().float(), grads))
        off = [((a - b).norm() / b.norm()).item() for a, b in zip(*found, strict=True)]
        told = f"fast against plain: logits differ by {off[0]:.4f}, gradients by {off[1]:.4f}"
        if not (off[0] < MOST_OFF and off[1] < MOST_OFF):
            raise RuntimeError(f"{told}; try --attention padded or --products loop")
        return told

    def save(self, path: Path) -> None:
        """Write a checkpoint that `resume` takes; the file changes at once or not at all."""
        state = {
            "identity": self.settings.identity(),
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "next_test": self.next_test,
            "running": self.running,
            "weights": self.weights.all(),
            "masters": self.masters.state_dict(),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.rename(path)


def compile_layers(probe: Probe) -> None:
    """Compile text layers and vision blocks; what the compiler cannot take runs as it is."""
    torch._dynamo.config.suppress_errors = True
    for layer in (*probe.model.language_model.layers, *probe.model.visual.blocks):
        layer.compile(dynamic=True)


def read_checkpoint(path: Path, settings: Settings) -> dict[str, Any]:
    """A checkpoint of the same training; raises ValueError where it is not one."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path}: not readable ({error}); start without --resume") from error
    wanted = settings.identity()
    wrong = [k for k, v in wanted.items() if state["identity"].get(k) != v]
    if wrong:
        told = ", ".join(f"{k}={state['identity'].get(k)}" for k in wrong)
        raise ValueError(f"{path}: it was trained with {told}; resume with the same settings")
    return state


def take_over(fit: Fit, state: Mapping[str, Any]) -> None:
    """Go on where the checkpoint ended."""
    fit.step, fit.elapsed_s = state["step"], state["elapsed_s"]
    fit.next_test, fit.running = state["next_test"], state["running"]
    fit.masters.load_state_dict(state["masters"])


def to_device(arrays: dict[str, NDArray[Any]], device: torch.device, ways: Ways) -> Batch:
    """A packed batch on the device, without workers."""
    block = torch.empty(measure(arrays).num_bytes, dtype=torch.uint8).numpy()
    return upload(write(arrays, block), block, device, ways.attention)


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """One JSON row more."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.float().flatten()


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {k: round(v, 4) for k, v in values.items()}
