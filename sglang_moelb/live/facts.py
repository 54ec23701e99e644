"""The lines of the view that are words and numbers: mode, lever, reason, quality, time, memory.

Shape letters: R ranks.
"""

from __future__ import annotations

from rich.text import Text

from sglang_moelb.live.lines import (
    BAD,
    GOOD,
    LABEL,
    LABEL_WIDTH,
    WARN,
    bar,
    clean,
    field,
    line,
    spark,
)
from sglang_moelb.live.view import View
from sglang_moelb.live.wire import History, Live, Pass, Stretch

STALE_S = 3.0
NEAR_BUDGET = 0.8
MUCH_OWN_TIME = 0.05  # of a pass
BYTES = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))


def head(view: View, width: int) -> Text:
    """The server and whether it answers."""
    state, style = liveness(view)
    left = line(("moelb top", "bold"), (" (q ends)  ", LABEL), clean(view.url))
    room = width - len(state) - 2
    if left.cell_len > room:
        left.truncate(max(room, 0), overflow="ellipsis")
    left.append(" " * max(width - left.cell_len - len(state), 1))
    return left.append(state, style)


def liveness(view: View) -> tuple[str, str]:
    """How fresh the numbers are, and the style of that."""
    age = _age(view.age_s)
    if view.problem:
        return f"○ STALE {age}, next try in {view.retry_s:.0f} s", BAD
    if view.age_s > STALE_S:
        return f"○ the schedulers are silent: {age} old", BAD
    if view.quiet_s > STALE_S:
        return f"● live, {age} old; no pass for {_age(view.quiet_s)}", GOOD
    return f"● live, {age} old", GOOD


def _age(seconds: float) -> str:
    if seconds < 10.0:
        return f"{seconds:.1f} s"
    if seconds < 120.0:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200.0 else f"{seconds / 3600:.0f} h"


def problem(view: View, width: int, max_lines: int) -> list[Text]:
    """Why there are no fresh numbers, if so."""
    return field("problem", view.problem, width, max_lines, "red") if view.problem else []


def mode(live: Live, width: int) -> list[Text]:
    """What is allowed, what holds, whether somebody controls, and over how much; what fits."""
    parts = [
        ("lever", live.lever, _lever_style(live.lever)),
        ("controller", *_controller(live)),
        ("ranks", f"{live.num_ranks}", ""),
        ("layers", f"{live.num_layers}", ""),
        ("capacity", live.capacity if live.lever != "none" else "", ""),
        ("pass", f"{live.num_passes:,}", ""),
        ("experts", f"{live.num_experts}", ""),
        ("form", live.form, ""),
    ]
    text = line(("mode".ljust(LABEL_WIDTH), LABEL), (live.mode, "bold"))
    for label, value, style in parts:
        if value and text.cell_len + len(label) + len(value) + 3 <= width:
            text.append(f"  {label} ", LABEL).append(value, style)
    return [text]


def _controller(live: Live) -> tuple[str, str]:
    if live.controller in ("dead", "hung"):
        return f"{live.controller.upper()}, serving in none", BAD
    return live.controller, GOOD if live.controller == "running" else WARN


def _lever_style(lever: str) -> str:
    return "bold" if lever == "none" else "bold yellow"


def why(live: Live, width: int, max_lines: int) -> list[Text]:
    """The reason of the policy in force."""
    return field("why", live.policy_reason, width, max_lines)


def quality(live: Live, width: int) -> list[Text]:
    """Gate mass lost, against what may be."""
    label = line(("quality".ljust(LABEL_WIDTH), LABEL))
    budget = live.quality_budget
    if live.spent_share is None:
        return [label.append(f"nothing lost yet; budget {budget:.1%} of gate mass")]
    used = live.spent_share / budget if budget else float(live.spent_share > 0)
    style = BAD if used > 1 else WARN if used >= NEAR_BUDGET else GOOD
    gauge = 10 if width < 100 else 20
    label.append("│", LABEL).append(bar(used, gauge), style).append("│ ", LABEL)
    label.append(f"{live.spent_share:.2%} of gate mass lost, budget {budget:.2%}", style)
    note = f" (last {live.quality_window_passes} prefills)"
    return [label.append(note if label.cell_len + len(note) <= width else "", LABEL)]


def own_time(live: Live, width: int) -> list[Text]:
    """What the balancer itself takes of a pass."""
    label = line(("own time".ljust(LABEL_WIDTH), LABEL))
    if not live.last:
        return [label.append("not measured yet", LABEL)]
    own_ms, step_ms = live.last.balance_ms, live.last.step_ms
    share = own_ms / step_ms if step_ms else 0.0
    text = f"{own_ms:.2f} of {step_ms:.1f} ms a pass ({share:.1%})"
    label.append(text, WARN if share > MUCH_OWN_TIME else "")
    if live.history and live.history.balance_ms:
        label.append(f", worst {max(live.history.balance_ms):.2f} ms")
    return [label]


def levers(live: Live, width: int) -> list[Text]:
    """Passes by the lever that acted, since the start."""
    used = ", ".join(
        f"{name} {count:,}" for name, count in live.num_passes_by_lever.items() if count
    )
    text = f"{used or 'none yet'} ({live.num_prefill_passes:,} prefills since the start)"
    if live.trace != "off":
        text += f"; trace {live.trace}"
    return field("passes", text, width, 1 if live.trace in ("off", "running") else 3)


def memory(live: Live, width: int, max_lines: int) -> list[Text]:
    """The ledger of memory that the balancer holds, where the server keeps one."""
    if not live.memory:
        return []
    parts = [_entry(name, value) for name, value in live.memory.items() if value]
    return field("memory", ", ".join(parts) or "nothing held", width, max_lines)


def _entry(name: str, value: float) -> str:
    if not name.endswith("_bytes"):
        return f"{name.replace('_', ' ')} {value:,.0f}"
    return f"{name.removesuffix('_bytes').replace('_', ' ')} {in_bytes(value)}"


def in_bytes(value: float) -> str:
    """A size with three digits and its unit."""
    for unit, size in BYTES:
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return "0 B"


def verdict(live: Live, width: int, max_lines: int) -> list[Text]:
    """Whether to turn a lever on, where the server keeps score."""
    return field("verdict", live.verdict, width, max_lines, "bold") if live.verdict else []


def shown_pass(shown: Pass) -> str:
    """Which pass the map is of."""
    num_tokens = sum(shown.num_tokens_R)
    vision = shown.num_vision_tokens / num_tokens if num_tokens else 0.0
    text = f"pass {shown.step:,}: {num_tokens:,} tokens, {vision:.0%} vision"
    if shown.num_protected_tokens:
        text += f", {shown.num_protected_tokens:,} protected"
    return text + (f", {shown.lever}" if shown.lever != "none" else ", no lever acted")


def decisions(stretches: list[Stretch], width: int, max_lines: int, each: int = 1) -> list[Text]:
    """The last changes of the lever, newest first, each in at most `each` lines."""
    lines: list[Text] = []
    for one in reversed(stretches):
        steps = f"{one.first_step:,}-{one.last_step:,}"
        gated = f" ({one.num_gated} too small)" if one.num_gated else ""
        text = f"{one.lever:<6} x{one.num_passes}{gated}: {one.reason}"
        room = max(len(steps), LABEL_WIDTH - 1) + 1
        for number, row in enumerate(field(steps, text, width - room + LABEL_WIDTH, each)):
            plain = row.plain[LABEL_WIDTH:]
            first = f"{steps if number == 0 else '':<{room}}"
            lines.append(line((first, LABEL), plain))
    return lines[:max_lines]


def imbalance(history: History, width: int) -> list[Text]:
    """max/mean over the last passes, before the lever and after it, on one scale."""
    room = max(width - LABEL_WIDTH - 14, 1)
    before, after = history.balance_before[-room:], history.balance_after[-room:]
    high = max([*before, *after, 1.5])
    rows = [("imbalance", before, "")]
    if before != after:
        rows.append(("  after", after, "green"))
    return [
        line(
            (f"{name:<{LABEL_WIDTH}}", LABEL),
            (spark(values, 1.0, high), style),
            f" {values[-1]:.2f}",
            (f" of {high:.2f}", LABEL),
        )
        for name, values, style in rows
        if values
    ]


def passes(history: History, max_lines: int) -> list[Text]:
    """A table of the last passes, newest first."""
    heading = f"{'pass':>10}{'tokens':>9}  {'lever':<7}{'max/mean':>12}{'pass ms':>10}{'own ms':>8}"
    lines = [line((heading, LABEL))]
    for at in reversed(range(len(history.step))):
        before, after = history.balance_before[at], history.balance_after[at]
        both = f"{before:.2f}" if before == after else f"{before:.2f}→{after:.2f}"
        lines.append(
            line(
                f"{history.step[at]:>10,}{history.num_tokens[at]:>9,}  ",
                (f"{history.lever[at]:<7}", _lever_style(history.lever[at])),
                f"{both:>12}{history.step_ms[at]:>10.1f}{history.balance_ms[at]:>8.2f}",
            )
        )
    return lines[:max_lines]
