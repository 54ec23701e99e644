"""Our forward is transformers'; our encoding is its tokenizer's, template's and processor's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from benchmarks.probe.encode import encode, text_ids
from benchmarks.probe.model import Probe
from benchmarks.probe.moe import balance_loss, count, run_experts, sort_rows
from benchmarks.probe.sizes import PRESETS, Sizes
from sglang_moelb.demo.models import make_tokenizer
from tests.probe.train_support import (
    QUESTIONS,
    TINY,
    Question,
    batch_of,
    image,
    probe_of,
    their_inputs,
    theirs_of,
)


@pytest.mark.parametrize("questions", [QUESTIONS, QUESTIONS[:1], QUESTIONS[1:2], QUESTIONS[2:]])
def test_logits_of_packed_prompts_equal_those_of_transformers(
    questions: tuple[Question, ...],
) -> None:
    probe, batch = probe_of(), batch_of(*questions)
    with torch.no_grad():
        ours, _ = probe(batch.prompts)
        inputs = their_inputs(*questions)
        logits = theirs_of(probe)(**inputs).logits
    packed = logits[inputs["attention_mask"].bool()]
    assert (packed[batch.prompts.answer_A] - ours).abs().max() < 1e-4
    assert ours.std() > 0.05


def test_ids_are_those_of_the_tokenizer_and_template() -> None:
    inputs = their_inputs(*QUESTIONS)
    ids = inputs["input_ids"][inputs["attention_mask"].bool()]
    assert ids.tolist() == batch_of(*QUESTIONS).prompts.ids_T.tolist()


def test_every_byte_has_the_tokenizers_id() -> None:
    text = "".join(map(chr, range(1, 0x250))) + "€"
    assert text_ids(text).tolist() == make_tokenizer()(text)["input_ids"]


def test_patches_are_the_processors_pixels() -> None:
    item = encode(QUESTIONS[2])
    pixels = their_inputs(QUESTIONS[2])["pixel_values"].view(-1, 3, 2, 16, 16)
    ours = torch.from_numpy(item.patches_P.astype(np.float32)).view(-1, 16, 16, 3) / 127.5 - 1
    assert torch.equal(pixels[:, :, 0], pixels[:, :, 1])
    assert (pixels[:, :, 0] - ours.permute(0, 3, 1, 2)).abs().max() < 1e-6


def test_answer_places_predict_the_answer_and_its_end() -> None:
    batch = batch_of(*QUESTIONS)
    text = make_tokenizer().decode(batch.answer_ids_A)
    assert text == "7<|im_end|>cba<|im_end|>left<|im_end|>"
    following = batch.prompts.ids_T[batch.prompts.answer_A + 1]
    assert torch.equal(following.long(), batch.answer_ids_A)


def test_an_image_whose_side_is_no_multiple_of_32_is_refused() -> None:
    with pytest.raises(ValueError, match=r"image of 32x48: .*multiples of 32"):
        encode(Question(image(32, 48)))


def test_rows_are_sorted_by_expert_as_in_the_example() -> None:
    rows = sort_rows(torch.tensor([[1, 0], [1, 2]]), 3)
    assert rows.order_N.tolist() == [1, 0, 2, 3]
    assert rows.ends_E.tolist() == [1, 3, 4]


@pytest.mark.parametrize("products", ["loop", "grouped"])
def test_expert_products_and_gradients_equal_a_double_loop(products: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((40, 32), (6, 64, 32), (6, 32, 32), (40, 2))
    x, gate_up, down, share = (torch.randn(s, generator=generator) / 4 for s in shapes)
    experts = torch.rand(40, 5, generator=generator).topk(2).indices  # the last expert has no rows
    wanted = [t.clone().requires_grad_() for t in (x, gate_up, down, share)]
    rows = []
    for token in range(40):
        parts = []
        for place in range(2):
            e = experts[token, place]
            gate, up = (wanted[1][e] @ wanted[0][token]).chunk(2)
            parts.append(
                wanted[3][token, place] * (wanted[2][e] @ (torch.sigmoid(gate) * gate * up))
            )
        rows.append(sum(parts))
    dtype = torch.bfloat16 if products == "grouped" else torch.float32
    got = [t.clone().to(dtype).requires_grad_() for t in (x, gate_up, down, share)]
    out = run_experts(got[0], experts, got[3], got[1], got[2], products=products)
    tolerance = 0.03 if products == "grouped" else 1e-5
    weight = torch.randn(40, 32, generator=generator)
    (torch.stack(rows) * weight).sum().backward()
    (out.float() * weight).sum().backward()
    scale = torch.stack(rows).abs().max()
    assert (out.float() - torch.stack(rows)).abs().max() < tolerance * scale
    for ours, theirs in zip(got, wanted, strict=True):
        assert (ours.grad.float() - theirs.grad).abs().max() < tolerance * theirs.grad.abs().max()


def test_balance_loss_is_transformers_for_one_layer() -> None:
    theirs = transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(2))
    probs = logits.softmax(-1)
    wanted = theirs.load_balancing_loss_func((logits,), num_experts=8, top_k=4)
    assert torch.allclose(balance_loss(probs, count(probs.topk(4).indices.reshape(-1), 8)), wanted)


def test_loads_count_every_row_by_modality() -> None:
    probe, batch = probe_of(), batch_of(*QUESTIONS)
    _, routing = probe(batch.prompts)
    num_visual = len(batch.prompts.visual_V)
    for loads in routing.loads:
        assert loads.sum(1).tolist() == [
            TINY.topk * (batch.num_tokens - num_visual),
            TINY.topk * num_visual,
        ]


def test_the_probe_fits_thirty_megabytes_and_the_kernels() -> None:
    sizes = PRESETS["probe"]
    with torch.device("meta"):
        num_bytes = 2 * sum(p.numel() for p in Probe(sizes).parameters())
    assert num_bytes < 29e6
    assert sizes.hidden % 128 == 0
    assert sizes.expert % 128 == 0
    assert (sizes.num_experts, sizes.topk, sizes.num_layers) >= (32, 4, 4)


def test_square_expert_matrices_are_refused() -> None:
    for hidden in (128, 256):
        with pytest.raises(ValueError, match="read in two ways"):
            Probe(Sizes(hidden=hidden, expert=128))
