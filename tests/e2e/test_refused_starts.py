"""What cannot be balanced ends the start of a server with one clear line from each rank."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from sglang_moelb.ab.server import ServerError, pick_port, serve
from sglang_moelb.demo.models import VOCAB_SIZE, make_tokenizer, write_model

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
}


def test_a_model_without_moe_is_refused_by_name_and_with_the_fix(tmp_path: Path) -> None:
    model, log = tmp_path / "dense", tmp_path / "server.log"
    Qwen3ForCausalLM(Qwen3Config(**SIZES)).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    port = pick_port(None)
    command = [sys.executable, "-m", "sglang_moelb.ep.standin.launch", "--tp-attention", "--"]
    command += ["--model-path", str(model), "--port", str(port), "--moelb-mode", "observe"]
    with (
        pytest.raises(ServerError),
        serve(command, port=port, log=log, timeout_s=240),
    ):
        pass
    lines = [x for x in log.read_text().splitlines() if x.startswith("sglang_moelb: ")]
    assert lines
    for line in lines:
        assert "model Qwen3ForCausalLM cannot be balanced" in line
        assert "supported are Qwen3MoeForCausalLM, " in line
        assert line.endswith("Or start without --moelb flags.")


def test_more_slots_than_deepep_sends_to_are_refused_by_name_and_with_the_most_that_fit(
    tmp_path: Path,
) -> None:
    model, log = write_model("text", tmp_path / "text"), tmp_path / "server.log"
    port = pick_port(None)
    command = [sys.executable, "-m", "sglang_moelb.ep.standin.launch", "--"]
    command += ["--model-path", str(model), "--port", str(port), "--moelb-mode", "replicate"]
    command += ["--moelb-config", '{"replicate": {"slots": 121}}']
    with (
        pytest.raises(ServerError),
        serve(command, port=port, log=log, timeout_s=400),
    ):
        pass
    lines = [x for x in log.read_text().splitlines() if x.startswith("sglang_moelb: ")]
    assert lines
    for line in lines:
        assert "replicate.slots 121 cannot be replicated" in line
        assert "use at most 120" in line
        assert line.endswith("Or start in another --moelb-mode.")
