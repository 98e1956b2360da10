"""A profile of one iteration: a trace for the browser, where the time goes, and how often the loop waits for the device.

`fastloop train CONFIG --profile` writes RUN/profile/trace.json, for ui.perfetto.dev or chrome://tracing, and top.txt.
"""

from __future__ import annotations

import bisect
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

STEPS = 10  # denoising steps and micro-batches that are recorded: a whole iteration of a large model is gigabytes
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


class Recording:
    """What is recorded of an iteration: the first steps of the rollout and of the update, decoding, the optimizer."""

    def __init__(self, device: torch.device) -> None:
        self.activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == "cuda")]
        self.profile = profile(activities=self.activities)
        self.on, self.steps = True, 0
        self.seconds: dict[str, list[float]] = defaultdict(list)  # of every call, by label
        self.before = {
            "UNet forward": self._step,
            "update": self._restart,
            "decode": self._go_on,
            "optimizer step": self._go_on,
        }

    def _switch(self, on: bool) -> None:
        if on != self.on:
            self.profile.toggle_collection_dynamic(on, self.activities)
        self.on = on

    def _step(self) -> None:
        self.steps += 1
        self._switch(self.steps <= STEPS)

    def _restart(self) -> None:
        self.steps = 0
        self._switch(True)

    def _go_on(self) -> None:
        self._switch(True)


def profile_iteration(trainer, iteration: int = 1) -> Path:
    """Has a trainer profile one iteration of this session (0 is the first, which warms up), or its last if there are fewer.

    Returns:
        The folder that trace.json and top.txt will be in.
    """
    chosen = min(trainer.iteration + iteration, trainer.config.iterations - 1)
    folder = trainer.folder / "profile"
    rollout, stack = trainer._rollout, ExitStack()

    def begin(*args):
        if trainer.iteration != chosen:
            return rollout(*args)
        del trainer._rollout
        recording = Recording(trainer.device)
        for label, path in LABELS.items():
            stack.enter_context(labelled(trainer, path, label, recording))
        update = trainer._update

        def end(*args):
            metrics = update(*args)
            stack.close()
            write(recording, folder, f"iteration {chosen + 1}")
            return metrics

        trainer._update = end
        stack.enter_context(recording.profile)
        return trainer._rollout(*args)

    trainer._rollout = begin
    return folder


@contextmanager
def labelled(owner, path: str, label: str, recording: Recording) -> Iterator[None]:
    """Within it the calls of a method are timed and carry a label in the profile; ``path`` leads from ``owner`` to it."""
    *parts, name = path.split(".")
    for part in parts:
        owner = getattr(owner, part)
    method, before = getattr(owner, name), recording.before.get(label)

    def called(*args, **kwargs):
        if before is not None:
            before()
        started = time.perf_counter()
        with record_function(label):
            result = method(*args, **kwargs)
        recording.seconds[label].append(time.perf_counter() - started)
        return result

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

    def inside(label: str) -> Callable:
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


def write(recording: Recording, folder: Path, title: str) -> None:
    """Writes trace.json and top.txt."""
    folder.mkdir(exist_ok=True)
    found = recording.profile
    found.export_chrome_trace(str(folder / "trace.json"))
    waits, averages = count_waits(found.events()), found.key_averages()
    lines = [f"{title}, profiled (slower than others)", ""]
    for name, seen, steps, unit in (
        ("rollout", waits.rollout, waits.forwards, "UNet forwards"),
        ("updates", waits.update, waits.micro_batches, "micro-batches"),
    ):
        causes = f": {', '.join(f'{cause} {n}' for cause, n in seen.most_common())}" if seen else ""
        lines.append(f"host waits for the device, {name}: {sum(seen.values())} in the first {steps} {unit}{causes}")
    lines += ["", f"{'phase':16}{'calls':>8}{'seconds':>10}   of the host, phases inside included"]
    lines += [f"{label:16}{len(times):8}{sum(times):10.3f}" for label, times in recording.seconds.items()]
    on_gpu = ProfilerActivity.CUDA in recording.activities
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    lines += ["", f"operators of the first {STEPS} denoising steps and micro-batches, of decoding and of the optimizer"]
    lines += [averages.table(sort_by=key, row_limit=40, max_name_column_width=60)]
    (folder / "top.txt").write_text("\n".join(lines) + "\n")
