"""Modules of diffusers and peft that launch less for the same result: put in by `lighten`.

Modules change their class, nothing else: parameters, names, files, merging and switching adapters off stay as they are.
"""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional as F

from fastloop.config import EngineConfig
from fastloop.denoisers.lora import LoraLinear, can_be_ours, project


class LeanAttention(Attention):
    """Attention by PyTorch's own backends; one thin product for all adapters of an input, and no division by 1."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states=None, attention_mask=None, **kwargs) -> Tensor:
        """Attend from (N, L, C) to itself or to (N, M, C'); what another processor or a mask is for, diffusers does."""
        if type(self.processor) is not AttnProcessor2_0 or attention_mask is not None or kwargs or hidden_states.dim() != 3:
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        if encoder_hidden_states is None:
            heads = project(hidden_states, self.to_q, self.to_k, self.to_v)
        else:
            heads = [*project(hidden_states, self.to_q), *project(encoder_hidden_states, self.to_k, self.to_v)]
        query, key, value = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in heads)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.to_out[0](attended.transpose(1, 2).flatten(2))


class LeanResnet(ResnetBlock2D):
    """A residual block without a division by 1."""

    def forward(self, input_tensor: Tensor, temb: Tensor, *args, **kwargs) -> Tensor:
        """Return the block's output for (N, C, H, W) and an embedding of the timestep, (N, E)."""
        hidden = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
        hidden = hidden + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        hidden = self.conv2(self.nonlinearity(self.norm2(hidden)))
        return hidden + (input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor))


class LeanTransformer(Transformer2DModel):
    """A transformer whose pixels keep their layout, channels last, which its tokens have too."""

    def _get_output_for_continuous_inputs(self, hidden_states, residual, batch_size, height, width, inner_dim) -> Tensor:
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        hidden_states = hidden_states.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
        return (hidden_states if self.use_linear_projection else self.proj_out(hidden_states)) + residual


class FrozenConv(nn.Conv2d):
    """A convolution whose weights are not trained: it keeps no input for their gradient, as PyTorch's own does."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of (N, C, H, W)."""
        if x.dtype != self.weight.dtype or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return _Convolve.apply(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class _Convolve(torch.autograd.Function):
    """The same operator with gradients and without, so that the policy that is trained is the one that sampled."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, *how) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.strides, ctx.how = x.shape, x.stride(), how
        return F.conv2d(x, weight, bias, *how)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        for_x = None
        if ctx.needs_input_grad[0]:
            x = gradient.new_empty_strided(ctx.shape, ctx.strides)  # only its layout is looked at
            stride, padding, dilation, groups = ctx.how
            how = stride, padding, dilation, False, [0, 0], groups, [True, False, False]
            for_x = torch.ops.aten.convolution_backward(gradient, x, weight, None, *how)[0]
        return for_x, *[None] * 6


def lighten_parts(denoiser, engine: EngineConfig) -> None:
    """Lighten what is trained, but with ZeRO 3: it gathers weights where layers are called, and here some are not."""
    if engine.zero_stage != 3:
        for part in denoiser.trained_parts.values():
            lighten(part)


def lighten(model: nn.Module) -> int:
    """Put in what can be. A module that does something else besides keeps its own forward.

    Returns:
        The number of modules that changed.
    """
    chosen = [module for module in model.modules() if type(module) in _LEAN and _LEAN[type(module)][1](module)]
    for module in chosen:
        module.__class__ = _LEAN[type(module)][0]
    return len(chosen)


def _attention(module: Attention) -> bool:
    others = ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k", "added_kv_proj_dim")
    unlike = module.residual_connection or module.rescale_output_factor != 1 or _drops(module.to_out[1])
    return not unlike and all(getattr(module, name) is None for name in others)


def _resnet(module: ResnetBlock2D) -> bool:
    resizes = module.upsample is not None or module.downsample is not None
    timed = module.time_embedding_norm == "default" and module.time_emb_proj is not None and not module.skip_time_act
    return timed and not resizes and module.output_scale_factor == 1 and not _drops(module.dropout)


def _frozen(module: nn.Conv2d) -> bool:
    plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return plain and not any(p.requires_grad for p in module.parameters())


def _drops(dropout: nn.Dropout) -> bool:
    """Whether it does something in training mode."""
    return dropout.p > 0


_LEAN = {  # by the stock class: ours, and whether a module can be it
    lora.Linear: (LoraLinear, can_be_ours),
    Attention: (LeanAttention, _attention),
    ResnetBlock2D: (LeanResnet, _resnet),
    nn.Conv2d: (FrozenConv, _frozen),
    Transformer2DModel: (LeanTransformer, lambda module: module.is_input_continuous),
}
