"""The probe for training: a forward of our own over packed prompts.

Parameter names and shapes are transformers' `Qwen3VLMoeForConditionalGeneration`'s, so a state
dict fits both. Prompts lie one after the other in one row of tokens: no padding anywhere. Plain
torch; device; no host synchronisation with `varlen` attention and `grouped` products.

Shape letters: T tokens, H hidden, K top-k, E experts, V visual tokens, A answer tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.probe.attend import Backend, Segments, attend
from benchmarks.probe.moe import Products, balance_loss, count, run_experts
from benchmarks.probe.sizes import ROPE_THETA, Sizes, mrope_section
from benchmarks.probe.vision import EPSILON, Images, VisionTower, turn
from sglang_moelb.demo.models import VOCAB_SIZE


@dataclass(frozen=True, slots=True)
class Prompts:
    """A packed batch on the device."""

    ids_T: Tensor  # int32
    positions_3T: Tensor  # int32: time, height, width
    segments: Segments
    images: Images | None
    visual_V: Tensor  # int64, where the image tokens are
    answer_A: Tensor  # int64, the tokens whose successors are the answers


@dataclass(frozen=True, slots=True)
class Routing:
    """What the routers did in one forward, one entry a layer."""

    balance: tuple[Tensor, ...]  # scalars, the load balancing losses
    loads: tuple[Tensor, ...]  # [2, E] rows of text and of vision tokens


@dataclass(frozen=True, slots=True)
class Ways:
    """How attention and expert products are computed."""

    attention: Backend
    products: Products


FAST = Ways("varlen", "grouped")
PLAIN = Ways("padded", "loop")


class Norm(nn.Module):
    """Root mean square norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, EPSILON)


class Attention(nn.Module):
    """Causal attention with normalised queries and keys."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.head_dim = sizes.head_dim
        inner, shared = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
        self.q_proj = nn.Linear(sizes.hidden, inner, bias=False)
        self.k_proj = nn.Linear(sizes.hidden, shared, bias=False)
        self.v_proj = nn.Linear(sizes.hidden, shared, bias=False)
        self.o_proj = nn.Linear(inner, sizes.hidden, bias=False)
        self.q_norm = Norm(sizes.head_dim)
        self.k_norm = Norm(sizes.head_dim)

    def forward(
        self, x: Tensor, turns: tuple[Tensor, Tensor], segments: Segments, backend: Backend
    ) -> Tensor:
        heads = (x.shape[0], -1, self.head_dim)
        q = turn(self.q_norm(self.q_proj(x).view(heads)), *turns)
        k = turn(self.k_norm(self.k_proj(x).view(heads)), *turns)
        v = self.v_proj(x).view(heads)
        out = attend(q, k, v, segments, causal=True, backend=backend)
        return self.o_proj(out.flatten(1))  # type: ignore[no-any-return]


class Gate(nn.Module):
    """The router's matrix."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(sizes.num_experts, sizes.hidden))


class Experts(nn.Module):
    """All experts' matrices, [E, out, in]."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        shape = (sizes.num_experts, 2 * sizes.expert, sizes.hidden)
        self.gate_up_proj = nn.Parameter(torch.zeros(shape))
        self.down_proj = nn.Parameter(torch.zeros(shape[0], sizes.hidden, sizes.expert))


class SparseBlock(nn.Module):
    """Router and experts: softmax, top-k, shares that add up to one."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.topk = sizes.topk
        self.gate = Gate(sizes)
        self.experts = Experts(sizes)

    def forward(
        self, x_TH: Tensor, visual_T: Tensor, products: Products
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output, load balancing loss, and loads by modality."""
        probs_TE = functional.linear(x_TH, self.gate.weight).softmax(-1, dtype=torch.float32)
        share_TK, experts_TK = probs_TE.topk(self.topk, dim=-1)
        share_TK = (share_TK / share_TK.sum(-1, keepdim=True)).to(x_TH.dtype)
        num_experts = probs_TE.shape[1]
        keys = experts_TK + visual_T.unsqueeze(1) * num_experts
        loads_2E = count(keys.reshape(-1), 2 * num_experts).view(2, num_experts)
        weights = (self.experts.gate_up_proj, self.experts.down_proj)
        out_TH = run_experts(x_TH, experts_TK, share_TK, *weights, products=products)
        return out_TH, balance_loss(probs_TE, loads_2E.sum(0)), loads_2E


class Layer(nn.Module):
    """Attention and experts, each after a norm."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.self_attn = Attention(sizes)
        self.mlp = SparseBlock(sizes)
        self.input_layernorm = Norm(sizes.hidden)
        self.post_attention_layernorm = Norm(sizes.hidden)

    def forward(
        self,
        x: Tensor,
        turns: tuple[Tensor, Tensor],
        segments: Segments,
        visual_T: Tensor,
        ways: Ways,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), turns, segments, ways.attention)
        out, balance, loads = self.mlp(self.post_attention_layernorm(x), visual_T, ways.products)
        return x + out, balance, loads


class LanguageModel(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB_SIZE, sizes.hidden)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.num_layers))
        self.norm = Norm(sizes.hidden)


class Body(nn.Module):
    """Tower and language model, for the names of the parameters."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.visual = VisionTower(sizes)
        self.language_model = LanguageModel(sizes)


class Probe(nn.Module):
    """Packed prompts to the logits of their answers."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        sizes.check()
        self.sizes = sizes
        self.model = Body(sizes)
        self.lm_head = nn.Linear(sizes.hidden, VOCAB_SIZE, bias=False)

    def forward(self, prompts: Prompts, *, ways: Ways = PLAIN) -> tuple[Tensor, Routing]:
        """[A, vocabulary] logits at `answer_A`, and what the routers did."""
        text = self.model.language_model
        x = text.embed_tokens(prompts.ids_T)
        features: list[Tensor] = []
        if prompts.images is not None:
            tokens, features = self.model.visual(prompts.images, ways.attention)
            x = x.index_copy(0, prompts.visual_V, tokens.to(x.dtype))
        cos, sin = text_rotary(prompts.positions_3T, self.sizes)
        turns = (cos.to(x.dtype), sin.to(x.dtype))
        visual_T = torch.zeros_like(prompts.ids_T, dtype=torch.bool)
        visual_T[prompts.visual_V] = True
        balance, loads = [], []
        for number, layer in enumerate(text.layers):
            x, *routed = layer(x, turns, prompts.segments, visual_T, ways)
            balance.append(routed[0])
            loads.append(routed[1])
            if number < len(features):
                x = x.index_add(0, prompts.visual_V, features[number].to(x.dtype))
        logits = self.lm_head(text.norm(x.index_select(0, prompts.answer_A)))
        return logits, Routing(tuple(balance), tuple(loads))


def text_rotary(positions_3T: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """[T, 1, D] cosine and sine; frequencies take time, height, width in turn (Qwen3-VL)."""
    half = sizes.head_dim // 2
    frequency = torch.arange(half, device=positions_3T.device)
    _, height, width = mrope_section(sizes)
    axis = torch.where((frequency % 3 == 1) & (frequency < 3 * height), 1, 0)
    axis = torch.where((frequency % 3 == 2) & (frequency < 3 * width), 2, axis)
    angles = positions_3T[axis].T.float() / ROPE_THETA ** (frequency.float() / half)
    return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)


@torch.no_grad()
def draw(probe: Probe, generator: torch.Generator) -> None:
    """Fill every matrix in the order of its name: fan-in, residual outputs smaller, gate small."""
    depth = (2 * probe.sizes.num_layers) ** -0.5
    for name, parameter in sorted(probe.named_parameters()):
        if parameter.dim() == 1:
            continue
        fan_in = parameter[0].numel() if parameter.dim() != 3 else parameter.shape[2]
        std = fan_in**-0.5
        if name.endswith(("o_proj.weight", "down_proj", "attn.proj.weight")):
            std *= depth
        elif name.endswith(("embed_tokens.weight", "pos_embed.weight")):
            std = 0.5
        elif name.endswith("lm_head.weight"):
            std *= 0.5
        parameter.normal_(0.0, std, generator=generator)
    for module in probe.modules():
        if isinstance(module, (nn.Linear, nn.Conv3d)) and module.bias is not None:
            module.bias.zero_()
