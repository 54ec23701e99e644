"""Laws of weight updates by request: refused where they would leave something of ours behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_moelb.config import Config, merge
from sglang_moelb.ep.low import attach
from sglang_moelb.ep.low.attach import attach_downgrade
from sglang_moelb.ep.memory import MemoryLedger
from sglang_moelb.ep.weight_updates import refuse_updates

from .moe_layers import lora, make_layer  # noqa: F401 - a fixture for all tests here
from .moe_layers import offload as no_offload  # noqa: F401 - the same

updates = pytest.importorskip("sglang.srt.model_executor.model_runner_components.weight_updater")


def test_sglang_refuses_an_update_by_any_route_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    before = model[0].weight.detach().clone()
    model.load_weights = lambda named: [model[0].weight.data.copy_(t) for _, t in named]
    updater = updates.WeightUpdater(
        tp_rank=0, device="cpu", gpu_id=0, model_config=None, custom_weight_loaders={},
        get_model=lambda: model, update_model_fields=None, recapture_cuda_graph=None,
        get_model_runner=lambda: None,
    )  # fmt: skip
    monkeypatch.setattr(
        updates.WeightUpdater, "_assert_weight_cache_inactive", lambda self, name: None
    )
    named = [("0.weight", torch.full((2, 2), 7.0))]
    refuse_updates(model[0], "resident.placement", "experts lie elsewhere")
    for success, message in (
        updater.update_weights_from_disk("nowhere", "auto"),
        updater.load_weights_from_distributed(named),
        updater.update_weights_from_tensor(named),
        updater.update_weights_from_ipc(None),
    ):
        assert not success
        assert "with resident.placement: experts lie elsewhere. Restart the server" in message
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    ("downgrade", "told"),
    [
        ({"resident_layers": "0"}, "downgrade.resident_layers '0'"),
        ({"format": "nvfp4-emulated"}, "downgrade.format nvfp4-emulated"),
        ({"format": "mxfp4-emulated"}, None),
        ({}, None),
    ],
)
def test_downgrade_refuses_updates_where_it_keeps_what_it_made_of_the_weights(
    monkeypatch: pytest.MonkeyPatch, downgrade: dict[str, Any], told: str | None
) -> None:
    layers = [make_layer() for _ in range(2)]
    monkeypatch.setattr(attach, "expert_layers", lambda model: layers)
    monkeypatch.setattr(attach, "_ledger", lambda model_runner, staging: MemoryLedger())
    config = merge(Config(), {"mode": "downgrade", "downgrade": downgrade})
    attach_downgrade(SimpleNamespace(model=None), config, 0, None)
    reasons = [getattr(layer, "_derived_weight_cache_error", None) for layer in layers]
    if told is None:
        assert reasons == [None, None]
    else:
        assert told in reasons[0]
