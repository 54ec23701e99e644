"""Bad input ends with a clear error, changes nothing, and leaves the server serving."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_moelb.demo.models import write_model
from sglang_moelb.ep.standin.launch import cpu_environment, cpu_server_args

from .conftest import Serve
from .talk import SHORT, call, observed, say, status

pytestmark = pytest.mark.e2e

BAD_BODIES: list[tuple[Any, str]] = [
    (b"{", "not valid JSON"),
    (b'{"mode\xff": 1}', "not valid JSON"),
    (b'{"a":' * 50_000, "not valid JSON"),
    ([1], "must be a JSON object"),
    ({"modus": "drop"}, "unknown knob 'modus'"),
    ({"mode": "replicate"}, "no memory for copies"),
    ({"capacity": {"factor": -1}}, "capacity.factor is -1"),
    ({"capacity": {"factor": 1e300}}, "capacity.factor is 1e+300"),
    ({"capacity": {"min_batch_tokens": 1 << 70}}, "capacity.min_batch_tokens is"),
    ({"mode": "drop", "capacity": {"rule": "x"}}, "use one of plain, macs"),
    ({"kill": "please"}, "kill is 'please'"),
]
RAW_UPDATES = [
    {"moelb.mode": 99},
    {"moelb.mode": 0.5},
    {"moelb.unheard": 1},
    {"moelb.capacity.factor": -1},
    {"moelb.capacity.min_batch_tokens": 2**62},
]


def test_bad_changes_are_refused_by_name_and_change_nothing(serve: Serve) -> None:
    server = observed(serve)
    before, said = status(server), say(server, SHORT)
    for body, message in BAD_BODIES:
        code, answer = call(server, "/moelb/config", body)
        assert code == 400, (body, answer)
        assert message in answer["error"]
    after = status(server)
    assert after["config"] == before["config"]
    assert after["policy"]["epoch"] == before["policy"]["epoch"]
    assert after["controller"]["state"] == "running"
    assert say(server, SHORT) == said


def test_raw_state_updates_that_mean_nothing_do_not_end_a_rank(serve: Serve) -> None:
    """SGLang's own route reaches our knobs without our checks."""
    server = observed(serve)
    before, said = status(server)["config"], say(server, SHORT)
    for update in RAW_UPDATES:
        call(server, "/set_internal_state", {"server_args": update})
        assert status(server)["config"] == before, update
    assert say(server, SHORT) == said
    assert status(server)["ranks_answering"] == 2


def test_the_kill_switch_means_none_at_once(serve: Serve) -> None:
    server = observed(serve)
    assert call(server, "/moelb/config", {"mode": "drop", "capacity": {"factor": 0.5}})[0] == 200
    code, answer = call(server, "/moelb/config", {"kill": True})
    assert (code, answer["config"]["mode"]) == (200, "none")
    assert answer["config"]["capacity"]["factor"] == 0.5
    say(server, SHORT)
    now = status(server)
    assert (now["mode"], now["policy"]["lever"], now["policy"]["reason"]) == (
        "none", "none", "mode none",
    )  # fmt: skip


def chat(content: Any) -> dict[str, Any]:
    return {"model": "x", "messages": [{"role": "user", "content": content}], "max_tokens": 2}


def image(url: str) -> list[dict[str, Any]]:
    return [{"type": "image_url", "image_url": {"url": url}}]


CHAT, COMPLETE, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
BAD_REQUESTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no image": (CHAT, chat(image("data:image/png;base64,bm90IGFuIGltYWdl")), "decode image"),
    "no base64": (CHAT, chat(image("data:image/png;base64,%%%")), "Non-base64 digit found"),
    "no file": (CHAT, chat(image("/no/such.png")), "No such file or directory: '/no/such.png'"),
    "no prompt": (COMPLETE, {"model": "x", "prompt": "", "max_tokens": 2}, "cannot be empty"),
    "no text": (GENERATE, {"text": ""}, "the prompt has no tokens"),
    "no tokens": (GENERATE, {"input_ids": []}, "input_ids cannot be empty"),
    "no refusal": (
        GENERATE,
        {"text": "a", "sampling_params": {"custom_params": {"moelb_lossy": "no"}}},
        "moelb_lossy is 'no'; use false",
    ),
    "no input": (GENERATE, {}, "Either text, input_ids or input_embeds should be provided"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_named_and_leaves_the_server_serving(serve: Serve, name: str) -> None:
    server = observed(serve)
    said = say(server, SHORT)
    path, body, message = BAD_REQUESTS[name]
    code, answer = call(server, path, body)
    assert 400 <= code < 600, answer
    assert message in str(answer)
    assert say(server, SHORT) == said
    assert status(server)["controller"]["state"] == "running"


def test_an_empty_message_is_a_prompt_of_the_chat_template_alone(serve: Serve) -> None:
    server = observed(serve)
    for content in ("", []):
        code, answer = call(server, CHAT, chat(content))
        assert code == 200, answer
        assert answer["usage"]["prompt_tokens"] > 0
    assert status(server)["controller"]["state"] == "running"


LAUNCH_SERVER, SERVE = ("python", "-m", "sglang.launch_server"), ("sglang", "serve")
LAUNCHES: dict[str, tuple[tuple[str, ...], list[str], list[str]]] = {
    "another all-to-all": (
        LAUNCH_SERVER,
        ["--moelb-mode", "drop", "--moe-a2a-backend", "none"],
        ["--moe-a2a-backend none", "use --moe-a2a-backend deepep"],
    ),
    "not a number": (
        SERVE,
        ["--moelb-capacity-factor", "nan"],
        ["--moelb-capacity-factor nan", "must be a finite number"],
    ),
    "no such file": (
        LAUNCH_SERVER,
        ["--moelb-config", "no/such.json"],
        ["--moelb-config no/such.json: cannot be read (No such file or directory)"],
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        "another all-to-all",
        "not a number",
        pytest.param("no such file", marks=pytest.mark.slow),
    ],
)
def test_wrong_flags_end_the_launch_with_one_line_before_a_weight_is_loaded(
    tmp_path: Path, name: str
) -> None:
    model = write_model("text", tmp_path / "text")
    (program, *rest), flags, parts = LAUNCHES[name]
    command = [str(Path(sys.executable).parent / program), *rest, *cpu_server_args(2)]
    done = subprocess.run(
        [*command, "--model-path", str(model), *flags],
        env={**os.environ, **cpu_environment(2)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    output = done.stdout
    assert done.returncode == 1, output[-2000:]
    lines = [x for x in output.splitlines() if x.startswith("sglang_moelb: ")]
    assert len(lines) == 1, output[-2000:]
    assert all(part in lines[0] for part in parts), lines[0]
    assert "Traceback" not in output
    assert "Load weight" not in output
