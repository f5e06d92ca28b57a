"""Muon (Jordan et al. 2024): momentum, then a step whose singular values are all near 1.

As torch.optim.Muon, with its coefficients and its state, but matrices of one shape go through the
iteration together, and on a CPU it computes in fp32: few CPUs multiply 16-bit matrices, and on the
others each product is many times slower.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
# of the quintic iteration that is steepest at 0, as published
NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)
ITERATIONS = 5
LEAST_NORM = 1e-7


def orthogonal(
    matrices: Tensor,  # [n, A, B] float
) -> Tensor:  # [n, A, B], in the type it was computed in: bfloat16 on a GPU, as published
    """Bring every singular value of each matrix to within about 0.3 of 1; its vectors stay."""
    x = matrices if matrices.device.type == "cpu" else matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=LEAST_NORM)
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonal steps of matrices [A, B], as large as AdamW's would be (arXiv 2502.16982).

    A step is 0.2 sqrt(max(A, B)) times the learning rate times an orthogonal matrix.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], weight_decay: float = 0.0):
        super().__init__(parameters, {"lr": 0.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter by its gradient's momentum."""
        for group in self.param_groups:
            alike = defaultdict(list)
            for p in group["params"]:
                alike[p.shape].append(p)
            for (rows, columns), parameters in alike.items():
                rate = 0.2 * max(rows, columns) ** 0.5 * group["lr"]
                steps = orthogonal(self._momentum(parameters)).to(parameters[0].dtype)
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(steps), alpha=-rate)

    def _momentum(self, parameters: list[nn.Parameter]) -> Tensor:
        """Nesterov's, of parameters of one shape: [n, A, B]."""
        gradients = [p.grad for p in parameters]
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momentum = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_lerp_(momentum, gradients, 1 - MOMENTUM)
        return torch.stack(gradients).lerp_(torch.stack(momentum), MOMENTUM)
