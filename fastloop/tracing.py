"""A profile of one iteration: a trace for the browser, where the time goes, and how often the loop waits for the device.

`fastloop train CONFIG --profile` writes RUN/profile/trace.json, for ui.perfetto.dev or chrome://tracing, and top.txt.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

# What makes the host wait: the calls of CUDA and HIP, or, where there is no GPU, the operators that would make them on one.
CALLS = [
    f"{kind}{call}" for kind in ("cuda", "hip") for call in ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize")
]
OPERATORS = ["aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal"]
LABELS = {
    "rollout": "_rollout",
    "update": "_update",
    "gradients": "_add_gradients",
    "encode": "denoiser.encode",
    "UNet forward": "denoiser.predict",
    "decode": "denoiser.decode",
    "backward": "engine.backward",
    "optimizer step": "engine.step",
}


@dataclass(frozen=True)
class Waits:
    """How often the host waited in the inner loops of an iteration, by what made it wait, and how many steps there were."""

    rollout: Counter[str]
    forwards: int
    update: Counter[str]
    micro_batches: int


def profile_iteration(trainer, iteration: int = 1) -> Path:
    """Has a trainer profile one iteration of this session (0 is the first, which warms up), or its last if there are fewer.

    Returns:
        The folder that trace.json and top.txt will be in.
    """
    chosen = min(trainer.iteration + iteration, trainer.config.iterations - 1)
    folder = trainer.folder / "profile"
    rollout, update, stack = trainer._rollout, trainer._update, ExitStack()
    running = {}

    def begin(*args):
        if trainer.iteration != chosen:
            return rollout(*args)
        trainer._rollout, trainer._update = rollout, update
        for name, path in LABELS.items():
            stack.enter_context(labelled(trainer, path, name))
        in_update, trainer._update = trainer._update, end
        running["update"] = in_update
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (trainer.device.type == "cuda")]
        running["profile"] = stack.enter_context(profile(activities=activities))
        return trainer._rollout(*args)

    def end(*args):
        metrics = running["update"](*args)
        stack.close()
        write(running["profile"], folder, f"iteration {chosen + 1}")
        return metrics

    trainer._rollout = begin
    return folder


@contextmanager
def labelled(owner, path: str, label: str) -> Iterator[None]:
    """Within it the calls of a method carry a label in the profile; ``path`` leads from ``owner`` to it."""
    *parts, name = path.split(".")
    for part in parts:
        owner = getattr(owner, part)
    method = getattr(owner, name)

    def called(*args, **kwargs):
        with record_function(label):
            return method(*args, **kwargs)

    setattr(owner, name, called)
    try:
        yield
    finally:
        delattr(owner, name)


def count_waits(events) -> Waits:
    """Waits of the loop's own thread between the first and the last forward of a rollout, and while gradients add up.

    Those of encoding and decoding, which are once a batch, do not count.
    """
    spans = {label: [e for e in events if e.name == label] for label in LABELS}
    loop = {e.thread for e in spans["rollout"] + spans["gradients"]}
    on_gpu = any(e.name in CALLS for e in events)
    waits = [e for e in events if e.name in (CALLS if on_gpu else OPERATORS) and e.thread in loop]

    def inside(label: str) -> callable:
        starts = sorted((e.time_range.start, e.time_range.end) for e in spans[label])

        def holds(event) -> bool:
            at = event.time_range.start
            i = bisect.bisect_right(starts, (at, float("inf"))) - 1
            return i >= 0 and at <= starts[i][1]

        return holds

    rollout, encode, decode, gradients = map(inside, ("rollout", "encode", "decode", "gradients"))
    forwards = [e for e in spans["UNet forward"] if rollout(e)]
    first = min((e.time_range.start for e in forwards), default=0)
    last = max((e.time_range.end for e in forwards), default=0)
    in_rollout = [e for e in waits if first <= e.time_range.start <= last and not encode(e) and not decode(e)]
    in_update = [e for e in waits if gradients(e)]
    return Waits(
        Counter(e.name for e in in_rollout), len(forwards), Counter(e.name for e in in_update), len(spans["backward"])
    )


def write(found: profile, folder: Path, title: str) -> None:
    """Writes trace.json and top.txt."""
    folder.mkdir(exist_ok=True)
    found.export_chrome_trace(str(folder / "trace.json"))
    waits, averages = count_waits(found.events()), found.key_averages()
    lines = [f"{title}, profiled (slower than others)", ""]
    for name, seen, steps, unit in (
        ("rollout", waits.rollout, waits.forwards, "UNet forwards"),
        ("updates", waits.update, waits.micro_batches, "micro-batches"),
    ):
        causes = f": {', '.join(f'{cause} {n}' for cause, n in seen.most_common())}" if seen else ""
        lines.append(f"host waits for the device, {name}: {sum(seen.values())} in {steps} {unit}{causes}")
    lines += ["", f"{'phase':16}{'calls':>8}{'seconds':>10}   those inside included"]
    by_name = {row.key: row for row in averages}
    lines += [
        f"{name:16}{by_name[name].count:8}{by_name[name].cpu_time_total / 1e6:10.3f}" for name in LABELS if name in by_name
    ]
    on_gpu = torch.cuda.is_available() and any(row.self_device_time_total for row in averages)
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    lines += ["", averages.table(sort_by=key, row_limit=40, max_name_column_width=60)]
    (folder / "top.txt").write_text("\n".join(lines) + "\n")
