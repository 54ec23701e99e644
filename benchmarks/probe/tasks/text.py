"""Text alone: copying, sorting, small sums, and lookup in a given list."""

from __future__ import annotations

from benchmarks.probe.item import Split
from benchmarks.probe.tasks.base import Rng, Scene, Task, between, pick, pick_distinct

_LOWER = "abcdefghijklmnopqrstuvwxyz"
_KEYS = _LOWER + _LOWER.upper()
_LONG_SHARE = 0.05


def _scene(key: str, question: str, answer: str) -> Scene:
    return Scene(key, answer, lambda rng: (question,))


def _sample_copy(rng: Rng, split: Split) -> Scene:
    text = "".join(pick(rng, _LOWER) for _ in range(between(rng, 3, 10)))
    return _scene(text, f"copy {text}:", text)


def _sample_sort(rng: Rng, split: Split) -> Scene:
    """Four or five different digits or letters; its key is what is sorted, in any order."""
    chars = pick_distinct(rng, pick(rng, ("0123456789", _LOWER)), between(rng, 4, 5))
    answer = "".join(sorted(chars))
    return _scene(answer, f"sort {''.join(chars)}:", answer)


def _sample_sum(rng: Rng, split: Split) -> Scene:
    """Sums and differences of numbers to 99. A pair belongs to one split, whatever is asked."""
    low, high = sorted((between(rng, 0, 99), between(rng, 0, 99)))
    if rng.integers(2):
        return _scene(f"{low},{high}", f"{high}-{low}=", str(high - low))
    one, two = (low, high) if rng.integers(2) else (high, low)
    return _scene(f"{low},{high}", f"{one}+{two}=", str(low + high))


def _sample_lookup(rng: Rng, split: Split) -> Scene:
    """The value of a key among four to six pairs, now and then among up to forty."""
    is_long = rng.random() < _LONG_SHARE
    num_pairs = between(rng, 7, 40) if is_long else between(rng, 4, 6)
    keys = pick_distinct(rng, _KEYS, num_pairs)
    values = [between(rng, 10, 99) for _ in keys]
    listed = ",".join(f"{key}{value}" for key, value in zip(keys, values, strict=True))
    asked = between(rng, 0, num_pairs - 1)
    question = f"{listed};{keys[asked]}?"
    return _scene(question, question, str(values[asked]))


TASKS = (
    Task(name="copy", modality="text", sample=_sample_copy),
    Task(name="sort", modality="text", sample=_sample_sort),
    Task(name="sum", modality="text", sample=_sample_sum),
    Task(name="lookup", modality="text", sample=_sample_lookup),
)
