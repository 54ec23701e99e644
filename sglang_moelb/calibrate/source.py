"""Where the trace is: a folder or file, or the folder that a running server writes to."""

from __future__ import annotations

from pathlib import Path

import httpx

from sglang_moelb.calibrate.types import CalibrateError
from sglang_moelb.trace.reader import Trace, open_trace

TIMEOUT_S = 10.0


def open_source(source: str, rank: int | None, api_key: str | None) -> Trace:
    """The trace at the path `source`, or that of the server at the URL `source`.

    A server tells the folder that it traces to; it must be readable from here. Raises
    `CalibrateError`, and `TraceError` for a trace that cannot be read.
    """
    if source.startswith(("http://", "https://")):
        return open_trace(_folder_of(source.rstrip("/"), api_key), rank)
    return open_trace(Path(source), rank)


def _folder_of(url: str, api_key: str | None) -> Path:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer = httpx.get(f"{url}/moelb/status", headers=headers, timeout=TIMEOUT_S)
        answer.raise_for_status()
        status = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise CalibrateError(
            f"{url}: {error}. Give the URL of a server that was started with a --moelb flag "
            "(and --api-key where it has one), or the folder of a trace."
        ) from error
    controller = status.get("controller", {}) if isinstance(status, dict) else {}
    folder = controller.get("trace_folder", "")
    if not folder:
        raise CalibrateError(
            f"{url}: this server writes no trace. Start it with --moelb-trace DIR and let it serve."
        )
    if not Path(folder).is_dir():
        raise CalibrateError(
            f"{url}: its trace is in {folder}, which is not on this machine. Run moelb calibrate "
            "there, or copy the folder and give it instead of the URL."
        )
    return Path(folder)
