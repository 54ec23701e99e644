"""Float32 master weights of a bf16 model, stepped by Muon and AdamW.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for the matrices, with the
update scaled to AdamW's size as in Moonlight (2502.16982), so both share one learning rate; AdamW
for embeddings, routers, patches, norms and biases. Matrices of one shape, and all experts, are
orthogonalised together in one batched product. Device; no host synchronisation.

Shape letters: none.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

ADAM_ONLY = ("embed_tokens", "pos_embed", "patch_embed", "lm_head", "mlp.gate")
MUON_SCALE = 0.2
MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalise(stack: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly, of a stack [n, rows, columns], in bf16 on CUDA."""
    tall = stack.shape[1] > stack.shape[2]
    x: Tensor = stack.mT if tall else stack
    x = x.to(torch.bfloat16 if stack.is_cuda else torch.float32)
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).to(x.dtype)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.mT if tall else x
    return result


class Masters:
    """The optimiser: takes the gradients of the model's parameters and writes them back."""

    def __init__(
        self, model: nn.Module, masters: list[Tensor], *, weight_decay: float, muon: bool
    ) -> None:
        self.weight_decay = weight_decay
        self.parameters: list[Tensor] = list(model.parameters())
        self.masters = masters
        names = [name for name, _ in model.named_parameters()]
        by_muon = [
            muon and p.dim() > 1 and not any(part in name for part in ADAM_ONLY)
            for name, p in zip(names, self.parameters, strict=True)
        ]
        self._groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for place, chosen in enumerate(by_muon):
            if chosen:
                self._groups[_shape(names[place], self.masters[place])].append(place)
        self.momenta = {p: torch.zeros_like(self.masters[p]) for p, m in enumerate(by_muon) if m}
        decayed = [m for m, c in zip(self.masters, by_muon, strict=True) if not c and m.dim() > 1]
        plain = [m for m, c in zip(self.masters, by_muon, strict=True) if not c and m.dim() <= 1]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        fused = self.masters[0].is_cuda
        self.adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=fused)

    @torch.no_grad()
    def step(self, rate: float, clip: float) -> Tensor:
        """One update at learning rate `rate`; returns the norm of the gradient before clipping."""
        # A batch without images gives the vision tower none; its momentum goes on with zeros.
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        grads = [torch.empty_like(m) for m in self.masters]
        torch._foreach_copy_(grads, found)
        norm = torch.nn.utils.get_total_norm(grads)
        torch._foreach_mul_(grads, torch.clamp(clip / (norm + 1e-6), max=1.0))
        for place, (master, grad) in enumerate(zip(self.masters, grads, strict=True)):
            master.grad = None if place in self.momenta else grad
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        if self.momenta:
            self._muon(grads, rate)
        torch._foreach_copy_(self.parameters, self.masters)
        for parameter in self.parameters:
            parameter.grad = None
        return norm

    def _muon(self, grads: list[Tensor], rate: float) -> None:
        places = list(self.momenta)
        momenta = list(self.momenta.values())
        chosen = [grads[p] for p in places]
        torch._foreach_lerp_(momenta, chosen, 1 - MOMENTUM)
        torch._foreach_lerp_(chosen, momenta, MOMENTUM)  # Nesterov
        torch._foreach_mul_([self.masters[p] for p in places], 1 - rate * self.weight_decay)
        for (rows, columns), group in self._groups.items():
            stacks = [grads[p].reshape(-1, rows, columns) for p in group]
            updates = orthogonalise(torch.cat(stacks)).split([len(s) for s in stacks])
            scale = -rate * MUON_SCALE * max(rows, columns) ** 0.5
            for place, update in zip(group, updates, strict=True):
                master = self.masters[place]
                master.add_(update.reshape(master.shape).to(master.dtype), alpha=scale)

    def state_dict(self) -> dict[str, Any]:
        """Masters, momenta and AdamW's state."""
        return {"masters": self.masters, "momenta": self.momenta, "adam": self.adam.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of the same model; the model's parameters follow."""
        torch._foreach_copy_(self.masters, [x.to(self.masters[0]) for x in state["masters"]])
        for place, momentum in self.momenta.items():
            momentum.copy_(state["momenta"][place])
        self.adam.load_state_dict(state["adam"])
        torch._foreach_copy_(self.parameters, self.masters)


def _shape(name: str, master: Tensor) -> tuple[int, int]:
    """Rows and columns of each matrix in a parameter: gate and up are two."""
    rows, columns = master.shape[-2:]
    return (rows // 2, columns) if name.endswith("gate_up_proj") else (rows, columns)
