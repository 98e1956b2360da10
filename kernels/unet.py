"""The fused modules in a diffusers UNet: put in by `fuse_unet`, taken out by `unfuse_unet`.

Modules change their class, nothing else: parameters, names, hooks and saved weights stay those of stock diffusers.
"""

from __future__ import annotations

from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from .fused import geglu, group_norm_silu


class GroupNormSiLU(nn.GroupNorm):
    """A group normalisation that does the SiLU after it as well."""

    def forward(self, x: Tensor) -> Tensor:
        """Return silu(group_norm(x)) of (N, C, ...)."""
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps)


class SiLUDone(nn.SiLU):
    """The SiLU of a block whose norms have done it: feature maps (4 dimensions) pass, the time embedding (2) does not."""

    def forward(self, x: Tensor) -> Tensor:
        """Return feature maps as they are, and silu(x) of anything else."""
        return x if x.dim() == 4 else super().forward(x)


class FusedGEGLU(GEGLU):
    """The gate and its product in one kernel after the projection."""

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        """Project (..., C) to (..., 2 I) and return hidden * gelu(gate), (..., I)."""
        return geglu(self.proj(hidden_states))


_STOCK = {GroupNormSiLU: nn.GroupNorm, SiLUDone: nn.SiLU, FusedGEGLU: GEGLU}
_FUSED = {stock: fused for fused, stock in _STOCK.items()}


def fuse_unet(unet: nn.Module) -> int:
    """Fuse what can be: norms with SiLU of residual blocks and of the output, gated linear units.

    A block with another activation, or whose second norm is scaled and shifted before the activation, stays as it is.

    Returns:
        The number of norms and gates that are fused now.
    """
    fused = 0
    for block in unet.modules():
        if isinstance(block, ResnetBlock2D) and block.time_embedding_norm == "default":
            fused += _fuse(block.nonlinearity, block.norm1, block.norm2)
        elif type(block) is GEGLU:
            block.__class__ = FusedGEGLU
            fused += 1
    if getattr(unet, "conv_norm_out", None) is not None:
        fused += _fuse(unet.conv_act, unet.conv_norm_out)
    return fused


def unfuse_unet(unet: nn.Module) -> None:
    """Take back what `fuse_unet` has done."""
    for module in unet.modules():
        module.__class__ = _STOCK.get(type(module), type(module))


def _fuse(activation: nn.Module, *norms: nn.Module) -> int:
    modules = (activation, *norms)
    if type(activation) is not nn.SiLU or not all(type(norm) is nn.GroupNorm and norm.affine for norm in norms):
        return 0
    for module in modules:
        module.__class__ = _FUSED[type(module)]
    return len(norms)
