"""How a request says that lossy levers must leave it alone: `custom_params` of its sampling.

Imports nothing: it also serves the process that tokenises.
"""

from __future__ import annotations

REFUSAL = "moelb_lossy"  # custom_params={"moelb_lossy": false} refuses lossy levers


def refuses(custom_params: object) -> bool:
    """Whether a request's `custom_params` refuse lossy levers."""
    return isinstance(custom_params, dict) and custom_params.get(REFUSAL) is False


def check_refusal(custom_params: object) -> None:
    """ValueError where a request's `custom_params` refuse, or allow, by anything but a boolean."""
    value = custom_params.get(REFUSAL, True) if isinstance(custom_params, dict) else True
    if not isinstance(value, bool):
        raise ValueError(
            f"custom_params: {REFUSAL} is {value!r}; use false to refuse lossy levers for this "
            "request, or true"
        )
