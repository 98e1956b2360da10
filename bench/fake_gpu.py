"""A GPU without one, for bench/census.py: fake tensors on `cuda`, with the rules that PyTorch follows there.

Tensors of PyTorch's FakeTensorMode have a device, shape, strides and dtype, but no values. Four things they lack, or get from
the machine rather than from their device, are added here, so that the census is the same on every machine:

- **Autograd.** Its engine asks the driver for streams. To C++ the tensors therefore pass for ones on `meta`, which has none,
  while Python, and so all code of fastloop, diffusers and peft, sees `cuda`.
- **Autocast.** PyTorch's own kernels look at the device as C++ sees it. In their place stand the same rules by operator, read
  from ATen/autocast_mode.h of the installed PyTorch: which operators run in the lower precision, which in float32, which in
  the widest of their inputs, and that casts of leaves that require gradients are kept until autocast ends.
- **Attention.** Flash attention for half precision without a mask, heads padded to a multiple of 8, else memory-efficient.
- **Convolution.** As with cuDNN: channels_last where the input or the weight is, and the output so as well.

Nothing is computed, and nothing of it outlives `fake_gpu`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
CAPABILITY = (9, 0)
META = torch.device("meta")
HEADER = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
ONE_ON_A_GPU = ("silu_backward", "mish_backward")  # made of others where PyTorch is built without CUDA
aten = torch.ops.aten


@contextmanager
def fake_gpu() -> Iterator[FakeTensorMode]:
    """Within it tensors are fake, `cuda` is a device, and autocast on it follows CUDA's rules."""
    casts = Casts()
    patches = [
        patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        patch("torch.cuda.is_bf16_supported", lambda *_, **__: True),
        patch("torch.cuda.get_device_capability", lambda *_: CAPABILITY),
        patch("torch.cuda.device_of", lambda _: nullcontext()),
        patch("torch.clear_autocast_cache", casts.clear),
        patch("torch.Tensor.pin_memory", lambda tensor, *_: tensor),
        patch("torch.nn.Module._apply", apply_to_module),
        patch("torch.nn.functional.scaled_dot_product_attention", attention),
        patch.object(FakeTensor, "__torch_dispatch__", classmethod(tensor_dispatch)),
    ]
    fake = FakeMode(allow_non_fake_inputs=True)
    with ExitStack() as stack:
        for patched in patches:
            stack.enter_context(patched)
        library = stack.enter_context(torch.library._scoped_library("aten", "IMPL"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that PyTorch's own kernels are overridden
            for name, rule in autocast_rules().items():
                library.impl(name.removeprefix("aten::"), casts.kernel(name, rule), "AutocastCUDA")
            for name in ONE_ON_A_GPU:
                if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CUDA"):
                    library.impl(name, _never, "CUDA")
        stack.enter_context(fake)
        yield fake


class FakeMode(FakeTensorMode):
    """PyTorch's, where tensors on `cuda` pass for ones on `meta`, and what C++ makes like them is on `cuda` again."""

    def dispatch(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return device_for_cpp(args[0])
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "meta":
            kwargs = {**kwargs, "device": DEVICE}
        output = super().dispatch(func, types, args, kwargs)
        if func is aten.convolution.default:
            return in_format(output, convolution_format(*args[:2]))
        if func is aten.convolution_backward.default:
            of_input, of_weight, of_bias = output
            _, *layouts = convolution_backward_formats(*args[:3], args[-1])
            return in_format(of_input, layouts[0]), in_format(of_weight, layouts[1]), of_bias
        return output


def _never(*args, **kwargs):
    raise AssertionError("a kernel was called with fake tensors")


def device_for_cpp(tensor: torch.Tensor) -> torch.device:
    return META if tensor.device.type == "cuda" else tensor.device


_fake_dispatch = FakeTensor.__torch_dispatch__


def tensor_dispatch(cls, func, types, args=(), kwargs=None):
    """As `FakeMode`, where the mode is not on, which is within its own decompositions."""
    if func is torch.ops.prim.device.default:
        return device_for_cpp(args[0])
    return _fake_dispatch(func, types, args, kwargs or {})


def apply_to_module(module: torch.nn.Module, change: Callable, recurse: bool = True) -> torch.nn.Module:
    """What `Module.to` and its kin call: PyTorch would swap the fake tensors' contents, and refuses that for parameters."""
    for child in module.children() if recurse else ():
        apply_to_module(child, change)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                changed = change(parameter)
            if changed is not parameter:
                module._parameters[name] = torch.nn.Parameter(changed, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = change(buffer)
    return module


# --- convolutions ---------------------------------------------------------------------------------------------------------


def convolution_format(*tensors: torch.Tensor) -> torch.memory_format:
    """The memory layout that cuDNN works in: channels_last where one of the tensors is."""
    return torch.channels_last if torch.channels_last in map(suggest_memory_format, tensors) else torch.contiguous_format


def convolution_backward_formats(gradient, inputs, weight, mask) -> tuple[list, torch.memory_format, torch.memory_format]:
    """What a convolution's backward copies into another layout, and the layouts of the gradients of input and weight.

    The gradient is laid out as the input first, then as each of the two wants it (aten/src/ATen/native/cudnn/ConvShared.cpp).
    """
    copied, layout, of_inputs = [], convolution_format(inputs, weight), suggest_memory_format(inputs)
    if mask[1] and of_inputs != layout:
        copied.append(inputs)
        of_inputs = layout
    moved = suggest_memory_format(gradient) != of_inputs
    copied += [gradient] * moved
    last = torch.channels_last in (of_inputs, suggest_memory_format(weight))
    of_input = torch.channels_last if last else torch.contiguous_format
    if mask[0]:
        ready = of_inputs == of_input if moved else gradient.is_contiguous(memory_format=of_input)
        copied += [gradient] * (not ready) + [weight] * (not weight.is_contiguous(memory_format=of_input))
    return copied, of_input, of_inputs


def in_format(tensor: torch.Tensor | None, layout: torch.memory_format) -> torch.Tensor | None:
    if tensor is None or tensor.is_contiguous(memory_format=layout):
        return tensor
    return torch.empty_like(tensor, memory_format=layout)


# --- attention ------------------------------------------------------------------------------------------------------------


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """In place of scaled_dot_product_attention, which would choose by what this machine has."""
    if dropout_p or enable_gqa:
        raise NotImplementedError("attention with dropout or grouped queries")
    half = torch.is_autocast_enabled("cuda") or query.dtype in (torch.bfloat16, torch.float16)
    if not half or attn_mask is not None:
        needs = any(tensor.requires_grad for tensor in (query, key, value))
        call = aten._scaled_dot_product_efficient_attention
        return call(query, key, value, attn_mask, needs, 0.0, is_causal, scale=scale)[0]
    size = query.shape[-1]
    if missing := -size % 8:
        query, key, value = (torch.nn.functional.pad(tensor, (0, missing)) for tensor in (query, key, value))
        scale = size**-0.5 if scale is None else scale
    output = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[0]
    return output[..., :size] if missing else output


# --- autocast -------------------------------------------------------------------------------------------------------------


@cache
def autocast_rules() -> dict[str, str]:
    """The rule of every operator that autocast looks at: ``lower``, ``float32``, ``dtype`` or ``widest``."""
    lists = {
        "AT_FORALL_LOWER_PRECISION_FP": "lower",
        "AT_FORALL_FP32": "float32",
        "AT_FORALL_FP32_SET_OPT_DTYPE": "dtype",
        "AT_FORALL_PROMOTE": "widest",
    }
    text, found = HEADER.read_text(), {}
    for macro, rule in lists.items():
        body = re.search(rf"#define {macro}\(_\)((?:.*\\\n)+.*)", text)[1]
        for name, overload in re.findall(r"_\((\w+)(?:, *(\w+))?\)", body):
            found[f"aten::{name}.{overload}" if overload else f"aten::{name}"] = rule
    return {name: rule for name, rule in found.items() if torch._C._dispatch_has_kernel_for_dispatch_key(name, "AutocastCUDA")}


class Casts:
    """Autocast's kernels, and the casts of leaves that they keep."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by id: a leaf and its cast
        self._clear = torch.clear_autocast_cache
        self._autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)

    def clear(self) -> None:
        self._kept.clear()
        self._clear()

    def kernel(self, name: str, rule: str) -> Callable[..., Any]:
        packet, _, overload = name.removeprefix("aten::").partition(".")
        op = getattr(getattr(aten, packet), overload or "default")

        def call(*args, **kwargs):
            with torch._C._ExcludeDispatchKeyGuard(self._autocast):
                if rule != "dtype":
                    args, kwargs = tree_map(self._to(self._wanted(rule, args, kwargs)), (args, kwargs))
                elif _eligible(args[0]) and kwargs.get("dtype") is None:
                    kwargs = {**kwargs, "dtype": torch.float32}
                return op(*args, **kwargs)

        return call

    @staticmethod
    def _wanted(rule: str, args, kwargs) -> torch.dtype:
        lower = torch.get_autocast_dtype("cuda")
        wide = rule == "widest" and any(_eligible(x) and x.dtype == torch.float32 for x in tree_leaves((args, kwargs)))
        return torch.float32 if wide or rule == "float32" else lower

    def _to(self, dtype: torch.dtype) -> Callable[[Any], Any]:
        def cast(value: Any) -> Any:
            if not _eligible(value) or value.dtype == dtype:
                return value
            keep = dtype == torch.get_autocast_dtype("cuda") and torch.is_autocast_cache_enabled()
            if not (keep and value.dtype == torch.float32 and value.requires_grad and value.is_leaf and not value._is_view()):
                return value.to(dtype)
            if id(value) not in self._kept:
                self._kept[id(value)] = value, value.to(dtype)
            return self._kept[id(value)][1]

        return cast


def _eligible(value: Any) -> bool:
    """Whether autocast casts it: a floating tensor on the GPU that is not float64."""
    if not isinstance(value, torch.Tensor) or value.device.type != "cuda":
        return False
    return value.is_floating_point() and value.dtype != torch.float64
