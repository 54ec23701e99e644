"""A client of the servers under test: requests, `/moelb` and the servers that these tests share."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from .conftest import Serve, Server
from .test_exactness import SEA, Prompt, _asked, _data_url, make_image

REQUEST_TIMEOUT_S = 120
WAIT_S = 20.0
NUM_LAYERS, NUM_EXPERTS, TOPK, NUM_RANKS = 4, 16, 4, 2
NO_CACHE = ("--disable-radix-cache",)
SETTINGS: dict[str, dict[str, Any]] = {
    "capacity": {
        "min_batch_tokens": 16,
        "factor": 1.0,
        "level": "device",
        "scope": "global",
        "rule": "plain",
        "metric": "score",
    },
    "controller": {"quality_budget": 1.0, "timeout_ms": 5000.0},
}
OBSERVE = (
    *NO_CACHE, "--enable-metrics",
    "--moelb-mode", "observe", "--moelb-config", json.dumps(SETTINGS),
)  # fmt: skip

# Room for every lever; a server that starts in mode replicate or downgrade has one of the two.
NUM_SLOTS = 3
LOW_RULE = {"factor": 1.0, "vision_share": 0.2, "form": "rank"}
ROOM = (
    *NO_CACHE, "--moelb-mode", "observe", "--moelb-config",
    json.dumps({
        **SETTINGS,
        "downgrade": {**LOW_RULE, "ready": True},
        "replicate": {"min_rows": 1, "slots": NUM_SLOTS, "ready": True},
    }),
)  # fmt: skip

# SGLang keeps the embedding of an image, rounded as in the batch that first had it; so each image
# is in one prompt, and those of prompts that are compared to the bit are never sent in a crowd.
IMAGE = _asked("Describe the picture. " * 8, "gradient")
TWO_IMAGES = _asked("Which of the two is brighter?", "blocks", "tiny")
CROWD_IMAGE = _asked("Look closely. " * 8, "noise")
TEXT = _asked(SEA * 4)
SHORT = _asked("What is 1234 + 5678?")
ALONE = (IMAGE, TWO_IMAGES, TEXT, SHORT)


@dataclass(frozen=True, slots=True)
class Said:
    """Greedy tokens and all log-probabilities of a request, exact."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    prompt_logprobs: tuple[float | None, ...]


def observed(serve: Serve) -> Server:
    """The balanced server on the multimodal model, in mode `observe` again.

    Another one if a test has ended the controller of the last.
    """
    server = serve("vl", *OBSERVE)
    if status(server)["controller"]["state"] == "dead":
        server.stop()
        server = serve("vl", *OBSERVE)
    change(server, {"mode": "observe", **SETTINGS})
    return server


_in_observe: dict[Prompt, Said] = {}


def said_in_observe(serve: Serve) -> dict[Prompt, Said]:
    """What the balanced server says to each prompt of `ALONE`; asked once, not at each start."""
    if not _in_observe:
        server = observed(serve)
        _in_observe.update({prompt: say(server, prompt) for prompt in ALONE})
    return _in_observe


def call(server: Server, path: str, body: Any = None) -> tuple[int, Any]:
    """HTTP status and decoded answer; bytes are sent as they are."""
    raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.url + path, data=raw, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as response:
            return response.status, _decoded(response.read())
    except urllib.error.HTTPError as error:
        return error.code, _decoded(error.read())


def _decoded(raw: bytes) -> Any:
    return json.loads(raw) if raw[:1] in (b"{", b"[") else raw.decode(errors="replace")


def say(
    server: Server, prompt: Prompt, *, num_tokens: int = 8, custom_params: Any = None
) -> Said:
    """One greedy request."""
    sampling = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    if custom_params is not None:
        sampling["custom_params"] = custom_params
    body: dict[str, Any] = {
        "text": prompt.text,
        "sampling_params": sampling,
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    if prompt.images:
        body["image_data"] = [_data_url(make_image(name)) for name in prompt.images]
    code, answer = call(server, "/generate", body)
    assert code == 200, (answer, server.tail())
    meta = answer["meta_info"]
    return Said(
        tokens=tuple(token for _, token, _ in meta["output_token_logprobs"]),
        logprobs=tuple(logprob for logprob, _, _ in meta["output_token_logprobs"]),
        prompt_logprobs=tuple(logprob for logprob, _, _ in meta["input_token_logprobs"]),
    )


def say_together(server: Server, prompts: Sequence[Prompt], num_tokens: int = 3) -> None:
    """All prompts at once, so that both ranks have work."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        list(pool.map(lambda prompt: say(server, prompt, num_tokens=num_tokens), prompts))


def status(server: Server) -> dict[str, Any]:
    """`GET /moelb/status`."""
    code, answer = call(server, "/moelb/status")
    assert code == 200
    assert isinstance(answer, dict)
    return answer


def change(server: Server, changes: dict[str, Any]) -> dict[str, Any]:
    """`POST /moelb/config`, which must succeed, and a pass that adopts it."""
    epoch = status(server)["policy"]["epoch"]
    code, answer = call(server, "/moelb/config", changes)
    assert code == 200, answer

    def adopted() -> bool:
        say(server, SHORT, num_tokens=1)
        return bool(status(server)["policy"]["epoch"] > epoch)

    until(adopted)
    config: dict[str, Any] = answer["config"]
    return config


def until(condition: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    """Wait for what another thread or process must bring about."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "did not happen in time"
        time.sleep(0.05)


def passes_of(server: Server, act: Callable[[], object]) -> list[dict[str, Any]]:
    """The recorded passes that `act` brought about, once all of them are recorded."""
    first = status(server)["num_passes"]
    act()

    def all_recorded() -> bool:
        now = status(server)
        return bool(now["totals"]["num_passes"] == now["controller"]["num_passes"])

    until(all_recorded)
    return [one for one in status(server)["recent"] if one["step"] >= first]


def said_under(
    server: Server, changes: dict[str, Any], prompt: Prompt, **asked: Any
) -> tuple[Said, list[dict[str, Any]]]:
    """What the server says after `changes`, and the passes that took."""
    change(server, changes)
    said: list[Said] = []
    passes = passes_of(server, lambda: said.append(say(server, prompt, **asked)))
    return said[0], passes
