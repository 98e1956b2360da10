"""The fused modules in a diffusers UNet and VAE: put in by `fuse_network`, taken out by `unfuse`.

Modules change their class, nothing else: parameters, names, hooks and saved weights stay those of stock diffusers.
"""

from __future__ import annotations

from diffusers import Transformer2DModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from .fused import geglu, group_norm, group_norm_silu


class FusedGroupNorm(nn.GroupNorm):
    """A group normalisation in one kernel, in any memory layout."""

    def forward(self, x: Tensor) -> Tensor:
        """Return group_norm(x) of (N, C, ...)."""
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


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


_STOCK = {FusedGroupNorm: nn.GroupNorm, GroupNormSiLU: nn.GroupNorm, SiLUDone: nn.SiLU, FusedGEGLU: GEGLU}


def fuse_network(network: nn.Module) -> int:
    """Fuse what can be in a UNet or an AutoencoderKL: gated linear units and norms, those before a SiLU together with it.

    A block with another activation, or whose second norm is scaled and shifted before the activation, stays as it is.

    Returns:
        The number of norms and gates that are fused now.
    """
    fused = 0
    for block in network.modules():
        if isinstance(block, ResnetBlock2D) and block.time_embedding_norm != "scale_shift":  # a VAE's says `group`
            fused += _fuse_activation(block.nonlinearity, block.norm1, block.norm2)
        elif isinstance(block, Transformer2DModel):
            fused += _fuse_norm(getattr(block, "norm", None))
        elif isinstance(block, Attention):
            fused += _fuse_norm(block.group_norm)
        elif type(block) is GEGLU:
            block.__class__ = FusedGEGLU
            fused += 1
        elif hasattr(block, "conv_norm_out"):  # of the UNet, and of a VAE's encoder and decoder
            fused += _fuse_activation(block.conv_act, block.conv_norm_out)
    return fused


def unfuse(network: nn.Module) -> None:
    """Put the stock modules back."""
    for module in network.modules():
        module.__class__ = _STOCK.get(type(module), type(module))


def _is_stock(norm: nn.Module | None) -> bool:
    return type(norm) is nn.GroupNorm and norm.affine


def _fuse_norm(norm: nn.Module | None) -> int:
    if not _is_stock(norm):
        return 0
    norm.__class__ = FusedGroupNorm
    return 1


def _fuse_activation(activation: nn.Module, *norms: nn.Module) -> int:
    if type(activation) is not nn.SiLU or not all(map(_is_stock, norms)):
        return 0
    activation.__class__ = SiLUDone
    for norm in norms:
        norm.__class__ = GroupNormSiLU
    return len(norms)
