"""Run in a process of its own: what SGLang's functions do in the wheel's and the patched form.

`python probe.py PRISTINE_SITE PATCHED_SITE` loads each mended file from both sites, under names of
their own in one process, and prints one JSON object a form.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.layer_boundary.adapters import attention


def load(site: Path, path: str) -> ModuleType:
    name = f"probed_{site.name}_{Path(path).stem}"
    spec = spec_from_file_location(name, site / "sglang/srt" / path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def outcome(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        return type(error).__name__


def deepstack(site: Path, num_hidden_rows: int) -> Any:
    """Rank 1 of 2 adds six deepstack rows, 0 to 5, to its zero rows of hidden states."""
    batch = load(site, "layers/layer_boundary/residual/batch.py")
    batch.stream_of = lambda forward_batch: SimpleNamespace(complete=lambda hidden: hidden)
    attention.get_parallel = lambda: SimpleNamespace(attn_tp_size=2, attn_tp_rank=1)
    hidden = torch.zeros(num_hidden_rows, 1)
    extra = torch.arange(6.0).unsqueeze(1)
    return outcome(lambda: batch.add_to_output(hidden, None, extra).flatten().tolist())


def gatherer(site: Path, deepep_mode: str) -> Any:
    """Counts of three experts in layer 1 after two tokens with top-2, one of them padding."""
    module = load(site, "eplb/expert_distribution.py")
    moe = SimpleNamespace(
        expert_distribution_recorder_mode="stat",
        moe_a2a_backend="deepep",
        deepep_mode=deepep_mode,
        elastic_ep_backend=None,
    )
    module.get_exec = lambda: SimpleNamespace(moe=moe)
    module.get_device = lambda: "cpu"
    metadata = SimpleNamespace(num_layers=2, num_physical_experts=3, num_local_physical_experts=3)

    def count() -> Any:
        made = module._SinglePassGatherer.init_new(metadata, 0)
        made.on_select_experts(1, torch.tensor([[0, 2], [-1, -1]]))
        return made.collect()["global_physical_count"].tolist()

    return outcome(count)


def kimi_vl(site: Path) -> Any:
    model_class = load(site, "models/kimi_vl.py").KimiVLForConditionalGeneration
    text = SimpleNamespace(num_hidden_layers=27, n_routed_experts=64, n_group=1)

    def describe() -> Any:
        config = SimpleNamespace(text_config=text)
        found = model_class.get_model_config_for_expert_location(config)
        inner = SimpleNamespace(routed_experts_weights_of_layer={"1": "weights"})
        weights = model_class.routed_experts_weights_of_layer.fget(
            SimpleNamespace(language_model=inner)
        )
        return [found.num_layers, found.num_logical_experts, found.num_groups, weights]

    return outcome(describe)


def qwen3_vl_layers(site: Path, use_hf_deepstack_order: bool) -> list[int | None]:
    """The layer that the recorder is told of while each of three layers runs, then afterwards."""
    module = load(site, "models/qwen3_vl_moe.py")
    current: list[int | None] = [None]

    @contextmanager
    def with_current_layer(layer_idx: int) -> Iterator[None]:
        current[0] = layer_idx
        yield
        current[0] = None

    recorder = SimpleNamespace(with_current_layer=with_current_layer)
    module.get_global_expert_distribution_recorder = lambda: recorder
    module.residual_batch = SimpleNamespace(
        start=lambda forward_batch: None,
        add_to_output=lambda hidden, forward_batch, extra: hidden + extra,
        final_norm=lambda hidden, *args, **kwargs: hidden,
    )
    seen: list[int | None] = []

    def layer(positions: Any, hidden: Any, forward_batch: Any, **kwargs: Any) -> Any:
        seen.append(current[0])
        return hidden

    model = SimpleNamespace(
        pp_group=SimpleNamespace(is_first_rank=True, is_last_rank=True),
        layers=[layer] * 5,
        start_layer=1,
        end_layer=4,
        layers_to_capture=[],
        hidden_size=1,
        use_hf_deepstack_order=use_hf_deepstack_order,
        deepstack_embed_to_decoder_layer=range(3),
        get_deepstack_embeds=lambda layer_idx, embeds: None,
        norm=None,
    )
    module.Qwen3MoeLLMModel.forward(
        model, None, None, None, torch.zeros(2, 1), None, torch.zeros(2, 3)
    )
    return [*seen, current[0]]


for root in map(Path, sys.argv[1:]):
    result = {
        "deepstack, scattered": deepstack(root, 3),
        "deepstack, whole": deepstack(root, 6),
        "recorder, auto": gatherer(root, "auto"),
        "recorder, normal": gatherer(root, "normal"),
        "kimi-vl": kimi_vl(root),
        "qwen3-vl layers": qwen3_vl_layers(root, use_hf_deepstack_order=False),
        "qwen3-vl layers, hf order": qwen3_vl_layers(root, use_hf_deepstack_order=True),
    }
    print(json.dumps(result))
