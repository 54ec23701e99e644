"""Laws of rows that refuse lossy levers beside rows that decode, on real ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from sglang_moelb.ep.balance import LayerInput
from sglang_moelb.kernels import row_layout as layout
from sglang_moelb.kernels.row_layout import FLAG_PROTECTED, FLAG_REFUSED
from sglang_moelb.types import Lever, Policy, Rule

from .layers import NUM_EXPERTS, balance, reflagged, routing
from .ranks import Ranks

pytestmark = pytest.mark.dist

POLICY = Policy(epoch=1, capacity_factor=0.8)


def marked(inputs: Sequence[LayerInput], *, refused: bool) -> list[LayerInput]:
    """The inputs with all protected rows refused, or all of decode."""
    return [
        reflagged(one, (one.flags_T & ~FLAG_REFUSED) | extra_T * refused)
        for one in inputs
        for extra_T in [((one.flags_T & FLAG_PROTECTED) != 0).to(torch.uint8) * FLAG_REFUSED]
    ]


@pytest.mark.parametrize("name", ["random", "skewed", "padded", "idle-rank", "all-protected"])
@pytest.mark.parametrize("rule", list(Rule))
@pytest.mark.parametrize("lever", [Lever.DROP, Lever.EXPAND])
def test_cuts_are_to_the_bit_the_same_whether_protected_rows_decode_or_are_refused(
    ranks: Ranks, lever: Lever, rule: Rule, name: str
) -> None:
    policy = replace(POLICY, lever=lever, rule=rule)
    inputs = routing(name, 4, seed=5)
    outcomes = [
        balance(ranks, marked(inputs, refused=refused), policy, lever) for refused in (False, True)
    ]
    num_refused = []
    for decoding, refusing in zip(*outcomes, strict=True):
        assert torch.equal(decoding.ids_TC, refusing.ids_TC)
        assert torch.equal(decoding.weights_TC, refusing.weights_TC)
        assert decoding.stats_8 == refusing.stats_8
        for counts_RW in (decoding.counts_RW, refusing.counts_RW):
            counts_RE5 = layout.counts_of(counts_RW, NUM_EXPERTS)
            num_refused.append(int(counts_RE5[..., layout.C_REFUSED_ROWS].sum()))
            counts_RE5[..., layout.C_REFUSED_ROWS] = 0
            counts_RW[:, layout.H_REFUSED_TOKENS] = 0
        assert torch.equal(decoding.counts_RW, refusing.counts_RW)
    assert not any(num_refused[::2])
    assert all(num_refused[1::2])
