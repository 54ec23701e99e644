"""A prefill and a decode server from their scripts, on CPU, with a real transfer of the KV cache.

SGLang's fake transfer is refused for prefill, so this needs Mooncake, over TCP. Requests go to both
roles, as SGLang's router sends them.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from sglang_moelb.ab.server import pick_port, serve
from sglang_moelb.demo.models import write_model

from .commands import LAUNCH

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

RECIPE = "tiny-text_cpu"
READY_TIMEOUT_S = 240.0
REQUEST_TIMEOUT_S = 60.0
NUM_TOKENS = 8
TEXT = "Tell me about the sea, as an old sailor who has seen many storms would. " * 4
PORT_DISTANCE = 1000  # SGLang takes further ports above the one of a server with attention DP
_rooms = count(1)


@dataclass(frozen=True, slots=True)
class Pair:
    """The addresses of both roles, where they meet, and the model."""

    prefill: str
    decode: str
    bootstrap_port: int
    model: Path

    def generate(self, text: str) -> list[int]:
        """Greedy tokens that the decode role answers; both roles get the request."""
        body = {
            "text": text,
            "sampling_params": {
                "temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True
            },
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": self.bootstrap_port,
            "bootstrap_room": next(_rooms),
        }  # fmt: skip
        with ThreadPoolExecutor(2) as pool:
            urls = (f"{self.prefill}/generate", f"{self.decode}/generate")
            first, answer = pool.map(lambda url: ask(url, body), urls)
        tokens: list[int] = answer["output_ids"]
        assert tokens[:1] == first["output_ids"], "prefill hands over the first token"
        return tokens


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    """GET, or POST of a body; the JSON of the answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as response:
        return json.load(response)


def distant_ports(number: int) -> list[int]:
    """Free ports, each at least PORT_DISTANCE from the others."""
    ports: list[int] = []
    while len(ports) < number:
        port = pick_port(None)
        if port < 60000 and all(abs(port - other) > PORT_DISTANCE for other in ports):
            ports.append(port)
    return ports


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pytest.importorskip(
        "mooncake.engine",
        reason="pip install mooncake-transfer-engine-non-cuda, and libibverbs1 of the system",
        exc_type=ImportError,
    )
    folder = tmp_path_factory.mktemp("pair")
    model = write_model("text", folder / "model")
    *ports, bootstrap_port = distant_ports(3)
    urls = []
    with ExitStack() as stack:
        for script, port in zip(("prefill", "decode"), ports, strict=True):
            command = ["env", f"PYTHON={sys.executable}", f"MODEL={model}"]
            command += ["bash", str(LAUNCH / f"{script}.sh"), RECIPE]
            command += ["--host", "127.0.0.1", "--port", str(port)]
            command += ["--disaggregation-transfer-backend", "mooncake"]
            command += ["--disaggregation-bootstrap-port", str(bootstrap_port)]
            server = serve(
                command, port=port, log=folder / f"{script}.log", timeout_s=READY_TIMEOUT_S
            )
            urls.append(stack.enter_context(server).url)
        yield Pair(urls[0], urls[1], bootstrap_port, model)


def reference(model: Path) -> list[int]:
    """What transformers says to TEXT, greedily."""
    inputs = AutoTokenizer.from_pretrained(model)(TEXT, return_tensors="pt")
    made = AutoModelForCausalLM.from_pretrained(model).eval().generate(
        **inputs, do_sample=False, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS
    )
    tokens: list[int] = made[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens


def test_each_role_has_its_mode_and_the_pair_answers_what_the_model_says(pair: Pair) -> None:
    assert ask(f"{pair.prefill}/moelb/status")["mode"] == "auto"
    assert ask(f"{pair.decode}/moelb/status")["mode"] == "none"
    ask(f"{pair.prefill}/moelb/config", {"mode": "observe"})
    assert pair.generate(TEXT) == reference(pair.model)


def test_prefill_drops_while_decode_leaves_routing_alone(pair: Pair) -> None:
    capacity = {"factor": 0.5, "min_batch_tokens": 16}
    changes = {"mode": "drop", "capacity": capacity, "controller": {"quality_budget": 1.0}}
    ask(f"{pair.prefill}/moelb/config", changes)
    pair.generate("A short one, in which prefill adopts the change.")
    assert pair.generate(TEXT) != reference(pair.model)
    prefill, decode = (ask(f"{url}/moelb/status") for url in (pair.prefill, pair.decode))
    acted = [one for one in prefill["recent"] if one["lever"] == "drop"]
    assert any(sum(one["rows_after_R"]) < sum(one["rows_before_R"]) for one in acted)
    assert decode["mode"] == "none"
    assert decode["num_passes"] >= NUM_TOKENS, "it decoded"
    assert decode["totals"]["num_prefill_passes"] == 0
    assert decode["totals"]["num_dropped_rows"] == 0
