"""Laws of the tiny models: repeatable, loadable, lively and skewed by modality."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from sglang_moelb.demo.models import KINDS, Kind, make_tokenizer, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_arguments_give_the_same_bytes(folder: Path, kind: Kind) -> None:
    first = write_model(kind, folder / kind)
    second = write_model(kind, folder / f"{kind}-again")
    weights = [load_file(path / "model.safetensors") for path in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_finished_folder_is_left_alone_and_another_seed_replaces_it(folder: Path) -> None:
    path = write_model("text", folder / "kept")
    written_ns = (path / "model.safetensors").stat().st_mtime_ns
    assert write_model("text", path).joinpath("model.safetensors").stat().st_mtime_ns == written_ns
    write_model("text", path, seed=1)
    assert (path / "model.safetensors").stat().st_mtime_ns != written_ns
    assert not list(path.parent.glob(".kept-*")), "a scratch folder is left behind"


def test_sizes_and_dtype_are_those_asked_for(folder: Path) -> None:
    path = write_model(
        "vl", folder / "sized", num_experts=32, num_layers=3, topk=6, dtype=torch.bfloat16
    )
    text = AutoConfig.from_pretrained(path).text_config
    assert (text.num_experts, text.num_hidden_layers, text.num_experts_per_tok) == (32, 3, 6)
    assert {tensor.dtype for tensor in load_file(path / "model.safetensors").values()} == {
        torch.bfloat16
    }


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"kind": "audio"}, "kind='audio'"),
        ({"kind": "text", "num_experts": 7}, "num_experts=7"),
        ({"kind": "text", "topk": 17}, "topk=17"),
        ({"kind": "vl", "num_layers": 2}, "num_layers=2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, kwargs: dict[str, object], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        write_model(folder=tmp_path / "x", **kwargs)
    assert not (tmp_path / "x").exists()


def test_the_tokenizer_returns_what_it_was_given() -> None:
    tokenizer = make_tokenizer()
    text = "Größe, 大きさ & <|vision_start|> 12\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.fixture(scope="module")
def image_run(folder: Path) -> tuple[list[torch.Tensor], torch.Tensor, str]:
    """(expert counts of image tokens [E] per layer, mask, greedy output) of one image prompt."""
    path = write_model("vl", folder / "vl")
    processor = AutoProcessor.from_pretrained(path)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    content = [{"type": "image"}, {"type": "text", "text": "What is in this picture?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(text=[text], images=[Image.fromarray(pixels)], return_tensors="pt")
    logits: list[torch.Tensor] = []
    handles = [
        module.register_forward_hook(lambda _, __, out: logits.append(out[0]))
        for name, module in model.named_modules()
        if name.endswith("mlp.gate")
    ]
    with torch.no_grad():
        model(**inputs)
        for handle in handles:
            handle.remove()
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=32)
    output = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])
    return logits, inputs["input_ids"][0] == model.config.image_token_id, output


def _rank_ratio(logits_TE: torch.Tensor) -> tuple[float, int]:
    """Max over mean load of two ranks, and the busier one."""
    ids = logits_TE.topk(4, dim=-1).indices.reshape(-1)
    load = torch.bincount(ids, minlength=16).view(2, 8).sum(dim=1).float()
    return float(load.max() / load.mean()), int(load.argmax())


def test_image_tokens_crowd_on_a_rank_that_alternates_by_layer(
    image_run: tuple[list[torch.Tensor], torch.Tensor, str],
) -> None:
    logits, is_image, _ = image_run
    images = [_rank_ratio(layer[is_image]) for layer in logits]
    assert [rank for _, rank in images] == [0, 1, 0, 1]
    assert sum(ratio for ratio, _ in images) / len(images) > 1.35
    texts = [_rank_ratio(layer[~is_image])[0] for layer in logits]
    assert sum(texts) < sum(ratio for ratio, _ in images) - 0.4


def test_greedy_output_is_printable_and_varied(
    image_run: tuple[list[torch.Tensor], torch.Tensor, str],
) -> None:
    *_, output = image_run
    assert output.isascii()
    assert output.isprintable()
    assert len(set(output)) >= 12
