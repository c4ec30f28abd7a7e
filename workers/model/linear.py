"""Linear layers that run on the CPU kernels in narrow steps, and stay what they are everywhere else."""

import torch
from torch import nn

from workers.model.attention import in_narrow_step


class StepLinear(nn.Linear):
    """``nn.Linear`` in float32 on the CPU; see product.h and amx.h."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float[..., in] → float[..., out]."""
        if not in_narrow_step():
            return super().forward(x)
        out = torch.ops.polydecode.linear(x.reshape(-1, self.in_features), self.weight, self.bias)
        return out.view(*x.shape[:-1], self.out_features)


def uninstall(model: nn.Module) -> None:
    """The reverse of :func:`install`."""
    for module in model.modules():
        if isinstance(module, StepLinear):
            module.__class__ = nn.Linear  # type: ignore[assignment]


def install(model: nn.Module) -> None:
    """Turn the model's plain linear layers into step layers; other kinds (Conv1D, experts) keep their own products."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.float32 and module.weight.device.type == "cpu":
            module.__class__ = StepLinear
