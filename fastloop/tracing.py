"""A profile of one iteration: a trace for the browser, where the time goes, and how often the loop waits for the device.

`fastloop train CONFIG --profile` writes RUN/profile/trace.json, for ui.perfetto.dev or chrome://tracing, and top.txt.
"""

from __future__ import annotations

import bisect
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fastloop.config import Config
from fastloop.observer import Observer

STEPS = 10  # denoising steps and micro-batches that are recorded: a whole iteration of a large model is gigabytes
# What makes the host wait: the calls of CUDA and HIP, or, where there is no GPU, the operators that would make them on one.
CALLS = [
    f"{kind}{call}" for kind in ("cuda", "hip") for call in ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize")
]
OPERATORS = ["aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal"]
LABELS = ("rollout", "update", "gradients", "encode", "predict", "decode", "backward", "step")  # phases that are recorded


@dataclass(frozen=True)
class Waits:
    """How often the host waited in the inner loops of an iteration, by what made it wait, and how many steps there were."""

    rollout: Counter[str]
    forwards: int
    update: Counter[str]
    micro_batches: int


class Profile(Observer):
    """Profiles the second iteration of a session, or its last if there are fewer, into RUN/profile.

    Recorded are the first steps of its rollout and of its update, decoding and the optimizer.

    Attributes:
        seconds: of every call, by phase.
    """

    def __init__(self, config: Config) -> None:
        self.folder, self.last = Path(config.output_dir).expanduser() / "profile", config.iterations
        self.activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
        self.profile = profile(activities=self.activities)
        self.seen = self.number = 0  # iterations of this session, the number of the one under way
        self.running, self.on, self.steps = False, True, 0
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def on_iteration(self, number: int) -> None:
        """Count the iterations of the session."""
        self.seen, self.number = self.seen + 1, number

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase, and record it while the profiled iteration runs."""
        if name == "rollout" and (self.seen == 2 or (self.seen == 1 and self.number == self.last)):
            self.profile.start()
            self.running = True
        if not self.running or name not in LABELS:
            yield
            return
        if name == "update":
            self.steps = 0
        if name == "predict":
            self.steps += 1
            self._switch(self.steps <= STEPS)
        elif name in ("update", "decode", "step"):
            self._switch(True)
        started = time.perf_counter()
        with record_function(name):
            yield
        self.seconds[name].append(time.perf_counter() - started)
        if name == "update":
            self.running = False
            self.profile.stop()
            write(self, f"iteration {self.number}")

    def _switch(self, on: bool) -> None:
        if on != self.on:
            self.profile.toggle_collection_dynamic(on, self.activities)
        self.on = on


def count_waits(events) -> Waits:
    """Count the loop thread's waits between the first and the last forward of a rollout, and while gradients add up.

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
    forwards = [e for e in spans["predict"] if rollout(e)]
    first = min((e.time_range.start for e in forwards), default=0)
    last = max((e.time_range.end for e in forwards), default=0)
    in_rollout = [e for e in waits if first <= e.time_range.start <= last and not encode(e) and not decode(e)]
    in_update = [e for e in waits if gradients(e)]
    return Waits(
        Counter(e.name for e in in_rollout), len(forwards), Counter(e.name for e in in_update), len(spans["backward"])
    )


def write(recording: Profile, title: str) -> None:
    """Write trace.json and top.txt."""
    folder, found = recording.folder, recording.profile
    folder.mkdir(exist_ok=True)
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
