"""What the Triton kernels share: the per-step Gaussian as device functions, and how tensors reach them.

**Why the sums are exact.** The importance ratio must be exactly 1 while the policy is the one that sampled, so the rollout's
kernel and the loss's kernel must give the same bits for the same residuals. A float32 sum depends on its order, and Triton's
reductions take theirs from the register layout, which differs between kernels and dtypes. So each squared, scaled residual
z^2 is rounded to a multiple of 2^-30 and summed in float64, where such sums are exact below 2^23 = 8.4 million (D elements of
a policy near its samples come to about D): any order, block size or split gives the same bits. The kernels are compiled
without contraction into fused multiply-adds (``enable_fp_fusion=False``), so element-wise arithmetic agrees as well, with
each other and with the twins in ``reference``.

**Parameters of the kernels** in ``transition`` and ``policy``: B rows, one transition each, of latents with D elements, which
S blocks of BLOCK elements cover. Tensors are contiguous unless a stride is given; strides are in elements.

    cond_ptr, uncond_ptr            (B, D), float32, bfloat16 or float16: the model's outputs, ``uncond`` only where GUIDED;
                                    rows stand cond_stride and uncond_stride apart, each row-major, or channels_last where
                                    CHANNELS > 0
    x_t_ptr, x_prev_ptr             float32 (B, D): the latents before and after the step, row-major
    a_ptr, b_ptr, sigma_ptr         float32 (B,): the step's coefficients
    log_prob_ptr, log_prob_old_ptr, advantage_ptr, loss_ptr, ratio_ptr, slope_ptr
                                    float32 (B,); slope: d loss / d log p
    trajectory_ptr, step_ptr        int64 (B,): what keys the noise, beside the 64 bits of ``seed``
    partial_ptr                     float64 (B, S): sums of squares of the blocks; (2 B, S) with the KL mask
    statistics_ptr                  float32 (5,): ``reference.STATISTICS``
    grad_loss_ptr                   float32 (B,), grad_loss_stride apart, which is 0 for one gradient for all rows
    grad_cond_ptr, grad_uncond_ptr  (B, D), of the outputs' dtype and memory layout, without gaps between rows
    guidance, low, high, clip_range float32: the weight w; the ratio's window 1 -+ eps, and eps
    rows, size, splits, pixels      B, D, S; D / CHANNELS in channels_last, else 1
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensor

BLOCK = 2048  # elements of one program: a multiple of 4, the size of a noise counter
ROWS, SPLITS = 64, 16  # the tile of partial sums that the second stage holds at a time
WARPS = 8
EXACT = {"num_warps": WARPS, "enable_fp_fusion": False}
FUSION = {"enable_fp_fusion": True}  # where bits need not agree; what Triton does when neither is said changes with 3.10

INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def elements_of(split, size, pixels, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Return which elements of a row-major latent a program has, int32 (BLOCK,), and which of them are real.

    They are neighbours, or where CHANNELS > 0 all channels of neighbouring pixels: what stands together in channels_last.
    """
    element = tl.arange(0, BLOCK)
    if CHANNELS:
        RUN: tl.constexpr = BLOCK // CHANNELS
        pixel = split * RUN + element % RUN
        return element // RUN * pixels + pixel, pixel < pixels
    offset = split * BLOCK + element
    return offset, offset < size


@triton.jit
def load_output(ptr, split, size, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Load a program's elements of a model output, in the order of `elements_of`: read as they stand, turned on the chip."""
    at = split * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(ptr + at, at < size, 0.0)
    if CHANNELS:
        value = tl.reshape(tl.trans(tl.reshape(value, (BLOCK // CHANNELS, CHANNELS))), (BLOCK,))
    return value


@triton.jit
def store_output(ptr, value, split, size, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Store what is in the order of `elements_of`, float32 (BLOCK,), in the dtype and memory layout of a model output."""
    at = split * BLOCK + tl.arange(0, BLOCK)
    value = value.to(ptr.dtype.element_ty)
    if CHANNELS:
        value = tl.reshape(tl.trans(tl.reshape(value, (CHANNELS, BLOCK // CHANNELS))), (BLOCK,))
    tl.store(ptr + at, value, at < size)


@triton.jit
def guided_mean(cond, uncond, x_t, a, b, guidance, GUIDED: tl.constexpr):
    """Return a x_t + b (u + w (c - u)), float32, from model outputs of any floating dtype."""
    m = cond.to(tl.float32)
    if GUIDED:
        u = uncond.to(tl.float32)
        m = u + guidance * (m - u)
    return a * x_t + b * m


@triton.jit
def inverse(sigma):
    """Return 1 / sigma, correctly rounded; 0 where sigma is 0, so that such a row contributes nothing."""
    return tl.where(sigma > 0, tl.div_rn(1.0, tl.where(sigma > 0, sigma, 1.0)), 0.0)


@triton.jit
def exact_sum(residual, inverse_sigma, mask):
    """Return the sum of (residual / sigma)^2 over a block, float64, the same for every order of the sum (see the module)."""
    z = residual * inverse_sigma
    square = (z * z).to(tl.float64)
    # adding and taking away 1.5 * 2^22 rounds to a multiple of 2^-30 (float64 has 52 bits after the first)
    return tl.sum(tl.where(mask, (square + 6291456.0) - 6291456.0, 0.0), 0)


@triton.jit
def row_sums(partial_ptr, row, valid, splits, ROWS: tl.constexpr, SPLITS: tl.constexpr):
    """Add up the partial sums of rows, int32 (ROWS,), where ``valid``; the second stage. Returns float64 (ROWS,)."""
    total = tl.zeros((ROWS,), tl.float64)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        at = row.to(tl.int64)[:, None] * splits + split[None, :]
        total += tl.sum(tl.load(partial_ptr + at, valid[:, None] & (split < splits)[None, :], 0.0), 1)
    return total


@triton.jit
def log_prob_of(total, sigma, size):
    """Return log p from the sum of squares, as a mean over the elements; 0 where sigma is 0. In float64 until the end."""
    scale = tl.where(sigma > 0, sigma, 1.0).to(tl.float64)
    value = -(total / (2.0 * size) + tl.log(scale) + 0.9189385332046727)  # log(2 pi) / 2
    return tl.where(sigma > 0, value, 0.0).to(tl.float32)


@triton.jit
def standard_normal(seed, trajectory, step, split, size, pixels, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Draw the noise of a program's elements of a trajectory at a step: of those numbers of ``reference.normal``."""
    counter, _ = elements_of(split, size, pixels // 4, CHANNELS, BLOCK // 4)  # one for four elements
    zero = (counter * 0).to(tl.uint32)
    step = zero + step.to(tl.uint32)
    low, high = zero + trajectory.to(tl.uint32), zero + (trajectory >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, counter.to(tl.uint32), step, low, high)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (BLOCK,))


@triton.jit
def box_muller(word_a, word_b):
    """Turn two words of 32 bits into two standard normal numbers, float32."""
    u, v = uniform(word_a), uniform(word_b)
    radius = tl.sqrt_rn(-2.0 * tl.log(u))
    cosine, sine = cos_sin(6.283185307179586 * v)
    return radius * cosine, radius * sine


@triton.jit
def cos_sin(angle):
    """Return cos and sin of angles in [0, 2 pi], to 1e-7.

    Cephes: the nearest multiple of pi / 2 is taken off in three parts, so that no digits are lost, and the rest goes into
    polynomials. The libraries' functions hold a path for huge angles that costs registers and is never taken here.
    """
    quarter = tl.floor(angle * 0.6366197723675814 + 0.5)
    x = ((angle - quarter * 1.5703125) - quarter * 4.837512969970703125e-4) - quarter * 7.54978995489188216e-8
    z = x * x
    sine = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * x + x
    cosine = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    turn = quarter.to(tl.int32) & 3
    swapped = (turn & 1) == 1
    first, second = tl.where(swapped, sine, cosine), tl.where(swapped, cosine, sine)
    return tl.where((turn == 1) | (turn == 2), -first, first), tl.where(turn >= 2, -second, second)


@triton.jit
def uniform(word):
    """Turn 23 bits of a word into a float32 in (0, 1), exactly."""
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23


def operator(name: str) -> Callable:
    """Decorate a function of tensors that launches kernels: make it the custom operator of this name.

    Its body runs with the device of its first tensor as the current one, as Triton launches there whatever the tensors are on.
    """

    def decorate(function: Callable):
        @wraps(function)
        def on_device(*args):
            with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, torch.Tensor))):
                return function(*args)

        schema = torch.library.infer_schema(function, mutates_args=())
        return torch.library.custom_op(name, on_device, mutates_args=(), schema=schema)

    return decorate


def splits_of(size: int) -> int:
    """Return the number of programs for the elements of one row."""
    return triton.cdiv(size, BLOCK)


def rows_contiguous(tensor: torch.Tensor) -> bool:
    """Say whether each row tensor[i] is row-major in memory."""
    return tensor[0].is_contiguous()


def channels_last(tensor: torch.Tensor) -> bool:
    """Say whether each row of (B, C, H, W) is channels_last in memory, and not row-major as well."""
    return tensor.dim() == 4 and not rows_contiguous(tensor) and tensor[0].movedim(0, -1).is_contiguous()


def model_layout(cond: torch.Tensor, uncond: torch.Tensor | None):
    """Bring the model outputs into a memory layout that the kernels read: both row-major, or both channels_last.

    In channels_last they read whole pixels, of 1, 2, 4, 8 or 16 channels, four pixels to a noise counter; latents of other
    sizes, which no model has, are copied.

    Returns:
        cond, uncond, and the number of channels where they are channels_last, else 0.
    """
    outputs = [cond] if uncond is None else [cond, uncond]
    if all(channels_last(output) for output in outputs):
        channels, pixels = cond.shape[1], cond[0, 0].numel()
        if channels in (1, 2, 4, 8, 16) and pixels % 4 == 0:
            return cond, uncond, channels
    if not all(rows_contiguous(output) for output in outputs):
        cond, uncond = cond.contiguous(), None if uncond is None else uncond.contiguous()
    return cond, uncond, 0


def check_arguments(
    latents: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor | None], rows: dict[str, torch.Tensor | None]
) -> None:
    """Refuse what the kernels would read wrongly.

    Args:
        latents: float32 (B, ...), all of one shape. outputs: model outputs, of that shape, any one floating dtype, or None.
        rows: (B,), float32, but ``trajectory`` and ``step`` int64; or None.

    Raises:
        ValueError: naming the argument, what it is and what it should be.
    """
    first = next(iter(latents.values()))
    if first.dim() < 2 or first.numel() == 0:
        raise ValueError(f"x_t: shape {tuple(first.shape)}: expected (B, ...) with at least one row and one element")
    model_dtype = outputs["cond"].dtype
    for group, dtype in ((latents, torch.float32), (outputs, model_dtype), (rows, torch.float32)):
        for name, tensor in group.items():
            if tensor is None:
                continue
            wanted = torch.int64 if name in ("trajectory", "step") else dtype
            shape = first.shape[:1] if group is rows else first.shape
            if tensor.shape != shape:
                raise ValueError(f"{name}: shape {tuple(tensor.shape)}: expected {tuple(shape)}")
            if tensor.dtype != wanted:
                raise ValueError(f"{name}: dtype {tensor.dtype}: expected {wanted}")
            if tensor.device != first.device:
                raise ValueError(f"{name}: on {tensor.device}: expected {first.device}")
    check_model_dtype("cond", outputs["cond"])


def check_model_dtype(name: str, tensor: torch.Tensor) -> None:
    """Raise ``ValueError`` for a dtype that no kernel reads, and for a device that runs none."""
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name}: dtype {tensor.dtype}: expected float32, bfloat16 or float16")
    runs = tensor.device.type == "cuda" or INTERPRETED or isinstance(tensor, FakeTensor)  # of fake ones nothing is computed
    if not runs:
        raise ValueError(f"{name}: on {tensor.device}: the Triton kernels run on a GPU, or anywhere with TRITON_INTERPRET=1")


def signed(seed: int) -> int:
    """Return a 64-bit seed as the integer type of operator schemas."""
    return seed - 2**64 if seed >= 2**63 else seed
