"""The census of launches, bytes and saved tensors: what it counts, and that fastloop's committed figures do not rise."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
BENCH = Path(__file__).resolve().parent.parent / "bench"
BF16, LAST = torch.bfloat16, torch.channels_last


@pytest.fixture(scope="module")
def load(bench_module):
    """A function of a name that gives the module of bench/, the one that its neighbours import."""
    return importlib.import_module


@pytest.fixture(scope="module")
def census(load):
    return load("census")


@pytest.fixture(scope="module")
def counter(load):
    return load("census_counter")


@pytest.fixture
def gpu(load):
    with load("fake_gpu").fake_gpu():
        yield


def new(*shape, dtype=torch.float32, grad=False) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda", requires_grad=grad)


def counted(counter, call, *weights) -> dict[str, tuple[int, int]]:
    """Launches and bytes of a call by kind of operator."""
    with counter.Counter(weights) as found:
        call()
    return {kind: (tally.launches, tally.bytes) for kind, tally in found.counted.by_kind().items()}


def saved(counter, call, *without) -> int:
    with counter.Saved(without) as found:
        kept = call()
    assert kept.requires_grad
    return found.bytes


# --- the committed figures ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(census) -> dict:
    summary = json.loads((BENCH / "results" / "census.json").read_text())
    if (here := census.counted_versions()) != summary["versions"]:
        pytest.skip(f"counted with {summary['versions']}, and here is {here}")
    return summary


def check(census, recorded: dict, row: dict) -> None:
    """That a row is as committed."""
    case = [row[key] for key in ("model", "adapter", "trainer")]
    (before,) = (old for old in recorded["rows"] if [old[key] for key in ("model", "adapter", "trainer")] == case)
    rose, fell = census.changes(before, row)
    assert not rose, f"{', '.join(case)} costs more than committed: {'; '.join(rose)}"
    assert not fell, f"{', '.join(case)} costs less: record that with `{census.RECORD}`: {'; '.join(fell)}"


@pytest.mark.parametrize("case", [("shapes", "full"), ("sd15", "lora")], ids="-".join)
def test_fastloop_launches_moves_and_saves_no_more_than_committed(census, recorded, case):
    check(census, recorded, census.census(*case, "fastloop"))


def test_one_model_is_counted_printed_and_written_and_as_committed(census, recorded, tmp_path, capsys):
    assert census.main(["--models", "shapes", "--adapters", "lora", "--by-operator", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "census.json").read_text())["rows"]
    assert [row["trainer"] for row in rows] == ["plain PPO", "fastloop"]
    for row in rows:
        assert row["rows"] == 32
        check(census, recorded, row)
    assert census.table(rows) in printed and census.table(rows) in (tmp_path / "census.md").read_text()
    assert "- native_group_norm " in printed and "- fastloop::geglu " in printed


def test_the_committed_table_is_that_of_the_committed_counts(census):
    recorded = json.loads((BENCH / "results" / "census.json").read_text())
    assert {(row["model"], row["adapter"], row["trainer"]) for row in recorded["rows"]} == {
        (model, adapter, trainer) for model in census.MODELS for adapter in census.ADAPTERS for trainer in census.TRAINERS
    }
    table = census.table(recorded["rows"])
    assert table in (BENCH / "results" / "census.md").read_text()
    for row in recorded["rows"]:
        for way in ("forward", "backward"):
            kinds = row[way]["kinds"].values()
            assert row[way]["launches"] == sum(kind["launches"] for kind in kinds)
            assert row[way]["bytes"] == sum(kind["bytes"] for kind in kinds)


def test_what_has_changed_is_said_in_words(census):
    before = {"forward": {"launches": 9, "bytes": 5000}, "backward": {"launches": 4, "bytes": 7}, "saved_bytes": 3}
    now = {"forward": {"launches": 9, "bytes": 4000}, "backward": {"launches": 5, "bytes": 7}, "saved_bytes": 3}
    assert census.changes(before, now) == (["launches of the backward: 4 -> 5"], ["bytes of the forward: 5,000 -> 4,000"])


def test_unknown_choices_are_refused_in_one_line(census, capsys):
    assert census.main(["--models", "sd16"]) == 2
    assert "--models: unknown 'sd16': any of shapes, sd15" in capsys.readouterr().err


# --- what is counted ------------------------------------------------------------------------------------------------------


def test_a_linear_layer_is_one_launch_that_reads_three_tensors_and_writes_one(counter, gpu):
    x, weight, bias = new(4, 8), new(16, 8), new(16)
    assert counted(counter, lambda: F.linear(x, weight, bias)) == {"matrix products": (1, 4 * (32 + 128 + 16 + 64))}


def test_views_and_allocations_are_nothing(counter, gpu):
    x = new(4, 8)
    assert counted(counter, lambda: (x.view(32), x.t(), x[1:], x.expand(3, 4, 8), x.detach(), torch.empty_like(x))) == {}
    assert counted(counter, lambda: torch.ones(3, 3)) == {}  # on the CPU


def test_a_cast_reads_one_dtype_and_writes_the_other(counter, gpu):
    x = new(4, 8)
    assert counted(counter, lambda: x.to(BF16)) == {"casts": (1, 32 * (4 + 2))}
    assert counted(counter, lambda: x.float()) == {}
    assert counted(counter, lambda: x.clone()) == {"copies": (1, 32 * (4 + 4))}


def test_what_is_changed_in_place_is_read_and_written(counter, gpu):
    x, y = new(4, 8), new(4, 8)
    assert counted(counter, lambda: x.add_(y)) == {"pointwise": (1, 32 * 4 * 3)}
    assert counted(counter, lambda: x.copy_(y)) == {"copies": (1, 32 * 4 * 2)}
    assert counted(counter, lambda: x * x) == {"pointwise": (1, 32 * 4 * 2)}  # read once


def test_an_expanded_tensor_counts_what_is_there(counter, gpu):
    x, row = new(4, 8), new(1, 8)
    assert counted(counter, lambda: x + row.expand(4, 8)) == {"pointwise": (1, 4 * (32 + 8 + 32))}


def test_autocast_casts_activations_each_time_and_a_trained_weight_once(counter, gpu):
    x, trained, frozen = new(4, 8), new(16, 8, grad=True), new(16, 8)

    def call(weight, times):
        with torch.autocast("cuda", BF16):
            for _ in range(times):
                F.linear(x, weight)

    cast_x, cast_w, product = 32 * 6, 128 * 6, 2 * (32 + 128 + 64)
    for _ in range(2):  # kept only until autocast ends
        found = counted(counter, lambda: call(trained, 3), trained)
        assert found == {"casts": (4, 3 * cast_x + cast_w), "matrix products": (3, 3 * product)}
    found = counted(counter, lambda: call(frozen, 3))
    assert found == {"casts": (6, 3 * (cast_x + cast_w)), "matrix products": (3, 3 * product)}


def test_gradients_are_added_to_those_that_are_there(counter, gpu):
    x, weight = new(4, 8, grad=True), new(16, 8, grad=True)
    weight.grad = new(16, 8)
    y = F.linear(x, weight)
    with counter.Counter([weight], [weight.grad]) as found:
        y.backward(new(4, 16))
    kinds = found.counted.by_kind()
    assert kinds["matrix products"].launches == 2
    assert kinds["gradient accumulation"] == counter.Tally(1, 128 * 4 * 3)
    assert set(kinds) == {"matrix products", "gradient accumulation"}


def test_a_convolution_copies_into_channels_last_where_its_weight_is(counter, gpu):
    image, weight, bias = new(2, 4, 8, 8, grad=True), new(6, 4, 3, 3), new(6)
    size, of_weight, out = 2 * 4 * 64, 6 * 4 * 9, 2 * 6 * 64
    plain = {"convolutions": (1, 4 * (size + of_weight + out)), "convolution biases": (1, 4 * (2 * out + 6))}
    assert counted(counter, lambda: F.conv2d(image, weight, bias, padding=1)) == plain
    last = weight.to(memory_format=LAST)
    assert counted(counter, lambda: F.conv2d(image, last, bias, padding=1)) == {**plain, "copies": (1, 8 * size)}
    y = F.conv2d(image.to(memory_format=LAST), last, bias, padding=1)
    assert y.is_contiguous(memory_format=LAST)
    gradient = new(2, 6, 8, 8).to(memory_format=LAST)
    assert counted(counter, lambda: y.backward(gradient)) == {  # the copy is that of image.to
        "convolutions": (1, 4 * (size + of_weight + out)),
        "copies": (1, 8 * size),
    }


def test_native_norms_have_the_launches_of_their_cuda_kernels(counter, gpu):
    image, tokens, weight, bias = new(2, 8, 4, 4, grad=True), new(2, 5, 8, grad=True), new(8), new(8)
    assert counted(counter, lambda: F.group_norm(image, 2, weight, bias))["norms"][0] == 3
    y = F.group_norm(image, 2, weight, bias)
    assert counted(counter, lambda: y.backward(image.detach()))["norms"][0] == 4
    assert counted(counter, lambda: F.layer_norm(tokens, (8,), weight, bias))["norms"][0] == 1
    turned = new(2, 8, 5).transpose(1, 2)
    assert counted(counter, lambda: F.layer_norm(turned, (8,), weight, bias))["copies"] == (1, 2 * 80 * 4)


def test_attention_is_flash_in_half_precision(counter, gpu):
    q = new(2, 4, 6, 8, dtype=BF16, grad=True)
    (found,) = counted(counter, lambda: F.scaled_dot_product_attention(q, q, q)).values()
    lse = 2 * 4 * 6 * 4
    assert found[0] == 1 and found[1] >= 2 * 2 * 384 + lse  # q, k and v are one tensor here
    mask = new(2, 1, 6, 6, dtype=BF16)
    assert F.scaled_dot_product_attention(q, q, q, mask).shape == q.shape
    assert F.scaled_dot_product_attention(*[new(2, 4, 6, 5, dtype=BF16)] * 3).shape == (2, 4, 6, 5)


def test_fastloops_operators_count_what_they_launch(counter, gpu):
    from fastloop.kernels import fused

    x, weight, bias = new(2, 8, 4, 4, dtype=BF16, grad=True), new(8), new(8)
    found = counted(counter, lambda: fused.group_norm_silu(x, 2, weight, bias, 1e-5))
    assert found == {"norms": (1, 256 * 2 * 2 + 2 * 8 * 4 + 2 * 4 * 4)}
    y = fused.group_norm_silu(x, 2, weight, bias, 1e-5)
    assert counted(counter, lambda: y.backward(x.detach()))["norms"][0] == 1
    turned = new(2, 8, 4, 4, dtype=BF16).transpose(2, 3)
    assert counted(counter, lambda: fused.group_norm_silu(turned, 2, weight, bias, 1e-5))["copies"] == (1, 256 * 2 * 2)
    both = new(3, 16, dtype=BF16, grad=True)
    assert counted(counter, lambda: fused.geglu(both)) == {"pointwise": (1, 2 * (48 + 24))}


def test_saved_is_each_storage_once_and_no_parameter(counter, gpu):
    x, y, weight = new(4, 8, grad=True), new(8, 5, grad=True), new(8, 5, grad=True)
    assert saved(counter, lambda: x.exp()) == 4 * 32  # its output
    assert saved(counter, lambda: x @ y) == 4 * (32 + 40)
    assert saved(counter, lambda: x @ weight, weight) == 4 * 32
    assert saved(counter, lambda: (x * x) * x[:]) == 4 * (32 + 32)
    assert saved(counter, lambda: x + y.sum()) == 0


# --- what a GPU does ------------------------------------------------------------------------------------------------------


class Trace(TorchDispatchMode):
    """The operators with the dtypes of what they take and give."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **kwargs or {})
        if func.namespace != "prim":
            taken = [value.dtype for value in args if isinstance(value, torch.Tensor)]
            self.seen.append((str(func), taken, getattr(output, "dtype", None)))
        return output


def under_autocast() -> list:
    """What is dispatched by operators of every rule of autocast, without gradients."""

    def made(*shape, dtype=BF16, memory_format=torch.contiguous_format):  # PyTorch's own would need a driver for indexing
        return torch.empty(shape, device="cuda", dtype=dtype, memory_format=memory_format)

    full, double = torch.float32, torch.float64
    half, single, wide, vector = made(2, 4, 8), made(2, 4, 8, dtype=full), made(2, 4, 8, dtype=double), made(8, dtype=full)
    image, kernel, weight = made(2, 4, 8, 8, dtype=full), made(4, 4, 3, 3), made(8, 8, dtype=full)
    last, last_kernel = (made(*x.shape, memory_format=LAST) for x in (image, kernel))
    three, three_single = made(2, 3), made(2, 3, dtype=full)
    with torch.no_grad(), Trace() as trace, torch.autocast("cuda", BF16):
        F.linear(half, weight, vector)
        F.conv2d(image, kernel)
        F.conv2d(last, last_kernel)
        half @ weight
        torch.baddbmm(made(2, 4, 4), half, made(2, 8, 4, dtype=full))
        torch.einsum("abc,dc->abd", half, weight)
        F.layer_norm(half, (8,), vector)
        F.group_norm(last, 2)
        half.softmax(-1)
        half.sum(), half.sum(1), half.sum(1, dtype=double), half.cumsum(0), half.prod(), torch.linalg.vector_norm(half)
        half.exp(), half.pow(2), half.rsqrt(), half.log(), wide.exp(), wide.softmax(-1)
        F.mse_loss(half, single)
        F.silu(half), F.gelu(half), half + vector, torch.cat([half, single]), F.interpolate(image, scale_factor=2.0)
        torch.addcmul(half, half, single), torch.addcmul(half, half, half)
        torch.cross(three, three_single, dim=-1)
    return trace.seen


def test_autocast_casts_as_pytorchs_own_does_on_a_gpu(load, monkeypatch):
    with load("fake_gpu").fake_gpu():
        emulated = under_autocast()
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    with FakeTensorMode():  # without gradients PyTorch's own autocast needs no driver
        own = under_autocast()
    assert len(own) > 60 and emulated == own


def test_every_operator_that_autocast_looks_at_has_a_rule(load):
    registered = {
        name
        for name in torch._C._dispatch_get_all_op_names()
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, "AutocastCUDA") and name.startswith("aten::")
    }
    missing = {name.split(".")[0] for name in registered - set(load("fake_gpu").autocast_rules())}
    # dispatched under others that have one, not allowed at all, or with a dtype of its own: none of them in a UNet
    assert missing <= {
        f"aten::{name}" for name in ("cudnn_convolution", "cudnn_convolution_transpose", "binary_cross_entropy", "norm")
    }


def test_nothing_of_the_fake_gpu_outlives_it(load):
    dispatch = torch._subclasses.fake_tensor.FakeTensor.__torch_dispatch__
    with load("fake_gpu").fake_gpu():
        assert new(2).is_floating_point() and torch.get_autocast_dtype("cuda") is not None
    assert torch._subclasses.fake_tensor.FakeTensor.__torch_dispatch__ == dispatch
    assert type(torch.ones(2)) is torch.Tensor
    linear = torch.nn.Linear(2, 2)
    weight = linear.weight
    assert linear.double().weight is weight
    with torch.autocast("cpu", BF16):
        assert linear.float()(torch.ones(1, 2)).dtype == BF16
