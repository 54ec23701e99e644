"""An exported probe is what transformers loads; damage to it is told, not loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from benchmarks.probe.export import export, load, write_tokenizer
from tests.probe.train_support import QUESTIONS, TINY, batch_of, probe_of, their_inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(probe_of(), tmp_path_factory.mktemp("export") / "model", {"seed": 3})


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_transformers_gives_the_logits_of_the_training_forward(folder: Path) -> None:
    probe, batch = load(folder), batch_of(*QUESTIONS)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    inputs = their_inputs(*QUESTIONS)
    with torch.no_grad():
        ours, _ = probe(batch.prompts)
        packed = theirs(**inputs).logits[inputs["attention_mask"].bool()]
    assert (packed[batch.prompts.answer_A] - ours).abs().max() < 1e-4


def test_fused_experts_lie_in_the_file_as_in_released_checkpoints(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    prefix = "model.language_model.layers.0.mlp.experts."
    shape = (TINY.num_experts, TINY.hidden, 2 * TINY.expert)
    assert tensors[prefix + "gate_up_proj"].shape == shape
    assert tensors[prefix + "down_proj"].shape == (TINY.num_experts, TINY.expert, TINY.hidden)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_loading_gives_the_exported_weights_back_in_bf16(folder: Path) -> None:
    for (name, tensor), wanted in zip(
        load(folder).state_dict().items(), probe_of().state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, wanted.bfloat16().float()), name


def test_the_folder_says_what_was_trained(folder: Path) -> None:
    assert json.loads((folder / "probe.json").read_text())["seed"] == 3
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.architectures == ["Qwen3VLMoeForConditionalGeneration"]
    assert config.text_config.num_experts_per_tok == TINY.topk


def test_images_of_2000_tokens_keep_their_size(folder: Path) -> None:
    processor = transformers.AutoProcessor.from_pretrained(folder)
    image = torch.zeros(3, 32 * 40, 32 * 50, dtype=torch.uint8)
    pixels = processor.image_processor(image, return_tensors="pt")
    assert pixels["image_grid_thw"].tolist() == [[1, 80, 100]]


def test_truncated_weights_are_an_error_that_names_the_file(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.safetensors: not readable .*copy it again"):
        load(copy)


def test_a_missing_tensor_is_an_error_that_names_it(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors are missing.*lm_head\.weight"):
        load(copy)


def test_a_wrong_tokenizer_is_an_error(copy: Path) -> None:
    write_tokenizer(copy)
    load(copy)
    text = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(text.replace('"a":', '"ab":', 1))
    with pytest.raises(ValueError, match="a wrong tokenizer"):
        load(copy)


def test_a_folder_that_is_no_probe_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"probe\.json: missing"):
        load(tmp_path)


def test_an_export_replaces_the_folder_and_leaves_nothing_beside(tmp_path: Path) -> None:
    for seed in (0, 1):
        export(probe_of(), tmp_path / "model", {"seed": seed})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert json.loads((tmp_path / "model" / "probe.json").read_text())["seed"] == 1
