"""Laws of the row flags: what counts as vision, what is protected, and which rows a layer sees."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_moelb.ep.modality import (
    DECODES,
    PLAIN,
    REFUSES,
    EvenFlags,
    Requests,
    RowWindow,
    requests_of,
    token_flags,
)
from sglang_moelb.ep.refusal import refuses
from sglang_moelb.kernels.row_layout import FLAG_PROTECTED, FLAG_REFUSED, FLAG_VISION


class Mode:
    """A stand-in for SGLang's ForwardMode."""

    def __init__(self, name: str) -> None:
        self._name = name

    def is_idle(self) -> bool:
        return self._name == "idle"

    def is_decode(self) -> bool:
        return self._name == "decode"


def request(custom_params: Any = None) -> SimpleNamespace:
    return SimpleNamespace(sampling_params=SimpleNamespace(custom_params=custom_params))


def batch(mode: str, reqs: list[Any], decoding: list[Any] | None = None) -> SimpleNamespace:
    return SimpleNamespace(forward_mode=Mode(mode), reqs=reqs, decoding_reqs=decoding)


def test_sglangs_own_modes_answer_as_the_stand_in_does() -> None:
    forward = pytest.importorskip("sglang.srt.model_executor.forward_batch_info").ForwardMode
    assert forward.IDLE.is_idle()
    assert forward.DECODE.is_decode()
    for mode in (forward.EXTEND, forward.MIXED):
        assert not mode.is_idle()
        assert not mode.is_decode()


def test_ids_of_a_million_and_more_are_vision_up_to_62_bits() -> None:
    ids = [0, 151_655, 999_999, 1_000_000, 1_000_001, (1 << 31) + 5, (1 << 62) - 1, -1]
    flags_T = token_flags(torch.tensor(ids), Requests(runs=((len(ids), PLAIN),), phase="prefill"))
    assert flags_T.dtype == torch.uint8
    assert flags_T.tolist() == [0, 0, 0, *[FLAG_VISION] * 4, 0]


def test_vision_is_taken_before_sglang_clamps_the_ids() -> None:
    ids_T = torch.tensor([5, 2_000_000])
    flags_T = token_flags(ids_T, Requests(runs=((2, PLAIN),), phase="prefill"))
    ids_T.clamp_(max=100)
    assert flags_T.tolist() == [0, FLAG_VISION]


def test_a_decode_batch_is_protected_as_a_whole_and_so_is_an_idle_one() -> None:
    decode = requests_of(batch("decode", [request(), request()]), [1, 1])
    assert decode == Requests(runs=((2, DECODES),), phase="decode")
    assert token_flags(torch.tensor([1, 2_000_000, 0, 0]), decode).tolist() == [
        FLAG_PROTECTED,
        FLAG_PROTECTED | FLAG_VISION,
        FLAG_PROTECTED,
        FLAG_PROTECTED,
    ]
    idle = requests_of(batch("idle", []), [])
    assert idle == Requests(runs=(), phase="idle")
    flags_T = token_flags(torch.tensor([1, 1]), idle)
    assert (flags_T & FLAG_PROTECTED).tolist() == [FLAG_PROTECTED] * 2


def test_a_request_refuses_while_it_decodes_too_and_no_other_with_it() -> None:
    refusing, other = request({"moelb_lossy": False}), request()
    decode = requests_of(batch("decode", [other, refusing]), [1, 1])
    assert decode == Requests(runs=((1, DECODES), (1, REFUSES)), phase="decode")
    ids_T = torch.zeros(4, dtype=torch.int64)
    assert token_flags(ids_T, decode).tolist() == [DECODES, REFUSES, DECODES, DECODES]
    mixed = requests_of(batch("mixed", [other, refusing, other], [refusing]), [3, 1, 2])
    assert mixed.runs == ((3, PLAIN), (1, REFUSES), (2, PLAIN))
    assert REFUSES & FLAG_PROTECTED
    assert REFUSES & FLAG_REFUSED
    assert DECODES == FLAG_PROTECTED


def test_only_the_rows_of_a_request_that_refuses_are_protected() -> None:
    reqs = [request(), request({"moelb_lossy": False}), request({"moelb_lossy": True})]
    requests = requests_of(batch("extend", reqs), [2, 3, 1])
    assert requests == Requests(runs=((2, PLAIN), (3, REFUSES), (1, PLAIN)), phase="prefill")
    assert requests.num_tokens == 6
    ids_T = torch.tensor([7, 2_000_000, 7, 2_000_000, 7, 7])
    assert token_flags(ids_T, requests).tolist() == [
        0,
        FLAG_VISION,
        REFUSES,
        FLAG_VISION | REFUSES,
        REFUSES,
        0,
    ]


def test_the_decoding_requests_of_a_mixed_batch_are_protected() -> None:
    prefilling, decoding = [request(), request()], [request(), request()]
    mixed = batch("mixed", prefilling + decoding, decoding)
    requests = requests_of(mixed, [4, 2, 1, 1])
    assert requests.runs == ((4, PLAIN), (2, PLAIN), (1, DECODES), (1, DECODES))
    assert requests.phase == "prefill"
    assert token_flags(torch.zeros(8).long(), requests).tolist() == [0] * 6 + [DECODES] * 2


@pytest.mark.parametrize("runs", [((3, PLAIN), (2, DECODES)), ((5, PLAIN),)])
def test_padded_rows_beyond_the_requests_are_neither_vision_nor_protected(
    runs: tuple[tuple[int, int], ...],
) -> None:
    requests = Requests(runs=runs, phase="prefill")
    flags_T = token_flags(torch.zeros(8, dtype=torch.int64), requests)
    assert flags_T.shape == (8,)
    assert flags_T[5:].tolist() == [0, 0, 0]
    assert int((flags_T != 0).sum()) == sum(n for n, kind in runs if kind)


def test_a_batch_whose_requests_are_not_known_is_left_alone_by_all_lossy_levers() -> None:
    from sglang_moelb.ep.open_pass import UNKNOWN_REQUESTS

    assert token_flags(torch.zeros(4).long(), UNKNOWN_REQUESTS).tolist() == [REFUSES] * 4


def test_requests_and_lengths_that_do_not_match_are_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        requests_of(batch("extend", [request(), request()]), [3])


@pytest.mark.parametrize(
    ("custom_params", "expected"),
    [
        ({"moelb_lossy": False}, True),
        ({"moelb_lossy": False, "other": 1}, True),
        ({"moelb_lossy": True}, False),
        ({"moelb_lossy": 0}, False),
        ({"moelb_lossy": "false"}, False),
        ({}, False),
        (None, False),
        ("moelb_lossy", False),
        ([False], False),
    ],
)
def test_only_false_itself_refuses(custom_params: Any, expected: bool) -> None:
    assert refuses(custom_params) is expected


@pytest.mark.parametrize("attn_tp_size", [1, 2, 3, 4, 8])
def test_the_window_is_what_tensor_split_deals(attn_tp_size: int) -> None:
    for num_tokens in range(40):
        flags_T = torch.arange(num_tokens).to(torch.uint8)
        shares = torch.tensor_split(flags_T, attn_tp_size)
        for rank, share in enumerate(shares):
            window = RowWindow(attn_tp_size=attn_tp_size, attn_tp_rank=rank)
            assert torch.equal(window.of(flags_T, num_tokens), flags_T)
            if share.numel() != num_tokens:
                assert torch.equal(window.of(flags_T, share.numel()), share)
            start, stop = window.bounds(num_tokens)
            assert torch.equal(flags_T[start:stop], share)


def test_a_wrong_number_of_rows_is_an_error_with_the_numbers() -> None:
    window = RowWindow(attn_tp_size=4, attn_tp_rank=1)
    with pytest.raises(RuntimeError, match=r"has 7 rows.*all 10 .*share 1 of 4 \(3\)"):
        window.of(torch.zeros(10, dtype=torch.uint8), 7)


def test_even_flags_are_the_same_memory_until_a_larger_batch_comes() -> None:
    flags = EvenFlags()
    ids_T = torch.zeros(7, dtype=torch.int64)
    first = flags.of(ids_T, FLAG_PROTECTED)
    assert first.tolist() == [FLAG_PROTECTED] * 7
    assert first.dtype == torch.uint8
    assert flags.of(ids_T[:3], FLAG_PROTECTED).data_ptr() == first.data_ptr()
    assert flags.of(ids_T[:0], 0).shape == (0,)
    assert flags.of(torch.zeros(9, dtype=torch.int64), 0).tolist() == [0] * 9
