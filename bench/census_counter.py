"""Counts what operators would launch, read and write on a GPU, and what autograd saves: the rules are in bench/census.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from fake_gpu import aten, convolution_backward_formats, convolution_format
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = (
    "casts",
    "copies",
    "norms",
    "matrix products",
    "convolutions",
    "convolution biases",
    "attention",
    "pointwise",
    "gradient accumulation",
    "other",
)
MATRIX = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "_scaled_mm"}
MOVES = {
    "clone",
    "contiguous",
    "copy_",
    "copy",
    "cat",
    "slice_backward",
    "select_backward",
    "constant_pad_nd",
    "repeat",
    "index_copy",
}
ALLOCATES = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "resize_", "set_"}
ONLY_WRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_"}
LOOKS_UP = {"embedding", "index", "index_select", "gather"}  # reads of its table what it gives
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64", torch.int64: "int64"}

DENSE = {"native_layer_norm": 1, "native_layer_norm_backward": 2}  # how many of their first inputs they make contiguous


def of_group_norm_backward(args) -> int:
    """Sums, c1, c2 and c3, the gradient of the input; that of weight and bias."""
    needs = args[-1]
    return 1 + 3 * needs[0] + (needs[1] or needs[2])


LAUNCHES: dict[str, int | Callable[[Any], int]] = {  # of operators with more than one, in PyTorch's CUDA sources
    "native_group_norm": 3,  # moments, factors, output
    "native_group_norm_backward": of_group_norm_backward,
    "native_layer_norm_backward": lambda args: args[-1][0] + (args[-1][1] or args[-1][2]),
    "_scaled_dot_product_flash_attention_backward": 3,  # sums of dO and O, the gradients, dQ in the lower precision
    "_scaled_dot_product_efficient_attention_backward": 2,  # sums of dO and O, the gradients
    "slice_backward": 2,  # zeros, and a copy into them
    "select_backward": 2,
    "constant_pad_nd": 2,
}


@dataclass
class Tally:
    launches: int = 0
    bytes: int = 0

    def add(self, launches: int, size: int) -> None:
        self.launches += launches
        self.bytes += size


@dataclass
class Counted:
    """Launches and bytes by kind and operator."""

    operators: dict[tuple[str, str], Tally] = field(default_factory=dict)

    def add(self, kind: str, operator: str, launches: int, size: int) -> None:
        self.operators.setdefault((kind, operator), Tally()).add(launches, size)

    @property
    def launches(self) -> int:
        return sum(tally.launches for tally in self.operators.values())

    @property
    def bytes(self) -> int:
        return sum(tally.bytes for tally in self.operators.values())

    def by_kind(self) -> dict[str, Tally]:
        found = {kind: Tally() for kind in KINDS}
        for (kind, _), tally in self.operators.items():
            found[kind].add(tally.launches, tally.bytes)
        return {kind: tally for kind, tally in found.items() if tally.launches}


class Counter(TorchDispatchMode):
    """Within it, and within `fake_gpu`, every operator on the GPU is counted.

    Args:
        weights: of the model: casts of tensors of their shapes are named as such. gradients: their storages, so that what is
            added to them is known.
    """

    def __init__(self, weights: Iterable[torch.Tensor] = (), gradients: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.counted = Counted()
        self._shapes = {tuple(weight.shape) for weight in weights}
        self._gradients = {storage_of(gradient) for gradient in gradients}
        self._inside: str | None = None  # the custom operator whose launches are looked for

    def __enter__(self) -> Counter:
        self._triton = patch_triton(self._launched)
        self._triton.__enter__()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._triton.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func.namespace == "prim":
            return output
        if custom := custom_operator(func):
            self._count_custom(func, custom, args, kwargs, output)
        elif func is aten.convolution.default:
            self._count_convolution(args, output)
        elif func is aten.convolution_backward.default:
            self._count_convolution_backward(args, output)
        else:
            self._count(func, args, kwargs, output)
        return output

    # --- operators of PyTorch --------------------------------------------------------------------------------------------

    def _count(self, func, args, kwargs, output) -> None:
        name = func._schema.name.partition("::")[2]
        inputs, outputs = on_gpu((args, kwargs)), on_gpu(output)
        before = {storage_of(tensor) for tensor in inputs}
        made = [tensor for tensor in outputs if storage_of(tensor) not in before]
        if name in ALLOCATES or not (made or func._schema.is_mutable) or not any(tensor.numel() for tensor in outputs):
            return  # allocates, looks at memory another way, or has nothing to do
        if name in DENSE:
            self._laid_out("a layer norm", torch.contiguous_format, *args[: DENSE[name]])
        reads, writes = traffic(func, name, args, kwargs, made)
        launches = LAUNCHES.get(name, 1)
        launches = launches if isinstance(launches, int) else launches(args)
        self.counted.add(*self._label(func, name, args, outputs), launches, bytes_of(reads) + bytes_of(writes))

    def _label(self, func, name: str, args, outputs) -> tuple[str, str]:
        if name == "_to_copy" or name == "copy_":
            source, target = (args[1], args[0]) if name == "copy_" else (args[0], outputs[0])
            whose = " of weights" if tuple(target.shape) in self._shapes else ""
            if source.dtype != target.dtype:
                return "casts", f"{short(source)} to {short(target)}{whose}"
            return "copies", "to the device" if source.device != target.device else f"{name}{whose}"
        if name == "add_" and storage_of(args[0]) in self._gradients:
            return "gradient accumulation", name
        return kind_of(func, name), name

    # --- convolutions, which are several launches ---------------------------------------------------------------------------

    def _count_convolution(self, args, output) -> None:
        inputs, weight, bias = args[:3]
        layout = convolution_format(inputs, weight)
        self._laid_out("a convolution", layout, inputs, weight)
        self.counted.add("convolutions", "convolution", 1, bytes_of((inputs, weight, output)))
        if bias is not None:
            self.counted.add("convolution biases", "add_", 1, bytes_of((output, bias)) + bytes_of((output,)))

    def _count_convolution_backward(self, args, output) -> None:
        gradient, inputs, weight = args[:3]
        of_input, of_weight, of_bias = output
        if of_input is not None or of_weight is not None:
            for copied in convolution_backward_formats(gradient, inputs, weight, args[-1])[0]:
                self._copied("a convolution", copied)
        if of_input is not None:
            self.counted.add("convolutions", "gradient of the input", 1, bytes_of((gradient, weight, of_input)))
        if of_weight is not None:
            self.counted.add("convolutions", "gradient of the weight", 1, bytes_of((gradient, inputs, of_weight)))
        if of_bias is not None:
            self.counted.add("convolution biases", "sum", 1, bytes_of((gradient, of_bias)))

    def _laid_out(self, where: str, layout: torch.memory_format, *tensors: torch.Tensor) -> None:
        """Counts the copies that an operator makes by itself, of what is not as it needs it."""
        for tensor in tensors:
            if not tensor.is_contiguous(memory_format=layout):
                self._copied(where, tensor)

    def _copied(self, where: str, tensor: torch.Tensor) -> None:
        self.counted.add("copies", f"inside {where}", 1, 2 * bytes_of((tensor,)))

    # --- Triton -------------------------------------------------------------------------------------------------------------

    def _count_custom(self, func, custom, args, kwargs, output) -> None:
        """Runs what the operator runs, up to the launches; its bytes are those of its inputs and outputs, each once."""
        name = func._schema.name
        reads, writes = traffic(func, name, args, kwargs, on_gpu(output))
        inner = Counter()
        inner.counted, inner._inside, inner._shapes = self.counted, name, self._shapes
        with inner:
            custom._init_fn(*args, **kwargs)
        self.counted.add(kind_of(func, name), name, 0, bytes_of(reads) + bytes_of(writes))

    def _launched(self, kernel: str, args, kwargs) -> None:
        name = self._inside or f"triton {kernel}"
        self.counted.add(kind_of(None, name), name, 1, 0 if self._inside else bytes_of(on_gpu((args, kwargs))))


def custom_operator(func):
    """The definition of an operator made by torch.library.custom_op; ``None`` for PyTorch's own."""
    if func.namespace in ("aten", "prim", "prims", "c10d"):
        return None
    from torch._library.custom_ops import _maybe_get_opdef

    return _maybe_get_opdef(func)


@contextmanager
def patch_triton(launched: Callable[[str, Any, Any], None]) -> Iterator[None]:
    """Within it launches of Triton kernels are told to a function, and do nothing."""
    try:
        from triton.runtime.jit import KernelInterface
    except ImportError:
        yield
        return

    def launcher(kernel, grid) -> Callable[..., None]:
        return lambda *args, **kwargs: launched(getattr(kernel, "__name__", "kernel"), args, kwargs)

    with patch.object(KernelInterface, "__getitem__", launcher):
        yield


# --- of tensors and operators ---------------------------------------------------------------------------------------------


def kind_of(func, name: str) -> str:
    """Of ``KINDS``, by an operator's name and tags."""
    if "scaled_dot_product" in name or name.startswith("_softmax"):
        return "attention"
    if "norm" in name and "linalg" not in name:
        return "norms"
    if name in MATRIX:
        return "matrix products"
    if name in MOVES:
        return "copies"
    if "geglu" in name or "silu" in name or (func is not None and torch.Tag.pointwise in func.tags):
        return "pointwise"
    return "other"


def traffic(func, name: str, args, kwargs, made: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The tensors that an operator reads and those that it writes, each once."""
    changed, reads = [], []
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        tensors = on_gpu(value)
        written = argument.alias_info is not None and argument.alias_info.is_write
        changed += tensors if written else []
        if not (written and (name in ONLY_WRITES or argument.kwarg_only)):
            reads += tensors
    if name in LOOKS_UP:
        reads = [*made, *reads[1:]]
    return unique(reads), unique([*changed, *made])


def unique(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Without what is the same memory seen in the same way."""
    return list({(storage_of(t), t.storage_offset(), tuple(t.shape), t.stride()): t for t in tensors}.values())


def on_gpu(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.device.type == "cuda"]


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Of what is there in memory: an expanded dimension counts once."""
    total = 0
    for tensor in tensors:
        size = tensor.element_size()
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
            size *= length if stride or not length else 1
        total += size
    return total


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def short(tensor: torch.Tensor) -> str:
    return SHORT.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))


# --- what is saved --------------------------------------------------------------------------------------------------------


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Within it what autograd saves for the backward is added up: whole storages, each once, but for those of ``without``."""

    def __init__(self, without: Iterable[torch.Tensor] = ()) -> None:
        super().__init__(self._pack, lambda tensor: tensor)
        self._without = {storage_of(tensor) for tensor in without}
        self._sizes: dict[int, int] = {}

    def __enter__(self) -> Saved:
        super().__enter__()
        return self

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        key = storage_of(tensor)
        if tensor.device.type == "cuda" and key not in self._without:
            self._sizes[key] = tensor.untyped_storage().nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self._sizes.values())
