"""What the report says in words and tables, as plain values: the page's template alone writes HTML."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastloop.report.formats import data_uri, moment
from fastloop.report.run import Estimate, Run, number, read_json

PHASES = {  # metric: (label, colour)
    "time/rollout": ("Rollout", "#3b6ea8"),
    "time/reward_wait": ("Waiting for rewards", "#d99a3d"),
    "time/update": ("Update", "#4f9277"),
    "time/eval": ("Evaluation", "#9a6fa8"),
}
OTHER = ("Other", "#b4bac0")
MAX_FRAMES = 8  # sample grids in the filmstrip


@dataclass(frozen=True)
class Headline:
    """How the run stands. What the run did not record is "" or NaN."""

    status: str
    started: str
    finished: str
    message: str
    algorithm: str
    iterations: float
    planned: float
    images: float
    seconds: float


@dataclass(frozen=True)
class EstimateColumn:
    """One evaluation of an estimate table: what it is to the run, like "Last and best"."""

    title: str
    iteration: float


@dataclass(frozen=True)
class EstimateRow:
    """One category or reward, or without a name the whole score: an estimate per column."""

    name: str | None
    estimates: list[Estimate]


@dataclass(frozen=True)
class EstimateTable:
    """The whole score and its parts at the first, best and last evaluation."""

    columns: list[EstimateColumn]
    rows: list[EstimateRow]


@dataclass(frozen=True)
class Picture:
    """A PNG file of the run. Without ``source``, its data URI, the file cannot be read as a picture."""

    name: str
    source: str = ""
    width: int = 0
    height: int = 0


@dataclass(frozen=True)
class Sample:
    """What is known of one picture of a grid."""

    prompt: str
    reward: float
    note: str


@dataclass(frozen=True)
class Frame:
    """One grid of sample pictures. ``mean_reward`` is NaN where no reward was recorded."""

    iteration: int
    picture: Picture
    mean_reward: float
    samples: list[Sample]


@dataclass(frozen=True)
class Filmstrip:
    """The shown grids of sample pictures, of ``total`` in the folder."""

    frames: list[Frame]
    total: int


@dataclass(frozen=True)
class Alarm:
    """An alarm and the iterations in which it fired."""

    name: str
    iterations: list[int]


@dataclass(frozen=True)
class Phase:
    """A part of the iterations' time: ``seconds`` is float64 (iterations,), without NaNs."""

    label: str
    color: str
    seconds: np.ndarray

    @property
    def total(self) -> float:
        """The seconds of all iterations."""
        return float(self.seconds.sum())


@dataclass(frozen=True)
class Provenance:
    """How to repeat the run; empty where run.json lacks it."""

    command: str
    machine: list[tuple[str, str]]
    versions: list[tuple[str, str]]


def headline(run: Run) -> Headline:
    """Sum up how the run stands. Its seconds are those of its latest row."""
    iterations, images = (_last(run.column(name)) for name in ("iteration", "images"))
    seconds = np.concatenate([run.column("seconds"), run.eval_column("seconds")])
    return Headline(
        status=str(run.info.get("status", "status unknown")),
        started=moment(run.info.get("started")),
        finished=moment(run.info.get("finished")),
        message=str(run.info.get("message") or ""),
        algorithm=str(run.config.get("algorithm", "unknown")),
        iterations=iterations if math.isfinite(iterations) else 0,
        planned=number(run.config.get("iterations")),
        images=images,
        seconds=float(np.fmax.reduce(seconds, initial=math.nan)),
    )


def estimate_table(run: Run, group: str) -> EstimateTable | None:
    """Tabulate the score and the parts of ``group`` ("categories" or "rewards"); ``None`` without an evaluation."""
    if not run.evals:
        return None
    scores = [score.estimate for score in run.scores]
    means = [score.mean for score in scores]
    last = len(scores) - 1
    best = int(np.nanargmax(means)) if np.isfinite(means).any() else last
    marks = {"first": 0, "last": last, "best": best}
    shown = sorted(set(marks.values()))
    columns = []
    for index in shown:
        title = " and ".join(name for name, marked in marks.items() if marked == index).capitalize()
        columns.append(EstimateColumn(title, run.scores[index].iteration))
    parts = {None: scores} | {name: run.estimates(group, name) for name in run.names(group)}
    return EstimateTable(columns, [EstimateRow(name, [of[index] for index in shown]) for name, of in parts.items()])


def picture(path: Path) -> Picture:
    """Read a PNG file of the run, cut short or not. Raises ``FileNotFoundError`` if it is absent."""
    data = path.read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.verify()
            return Picture(path.name, data_uri("image/png", data), *image.size)
    except Exception:  # Pillow raises many kinds for a picture cut short
        return Picture(path.name)


def before_after(run: Run) -> Picture | None:
    """Read the grid of the same prompts before and after training; ``None`` while it is not drawn."""
    path = run.folder / "samples" / "before_after.png"
    return picture(path) if path.is_file() else None


def filmstrip(run: Run) -> Filmstrip:
    """Pick the grids of sample pictures that the page shows, evenly over the run."""
    folder = run.folder / "samples"
    grids = sorted(path for path in folder.glob("*.png") if path.stem.isdecimal()) if folder.is_dir() else []
    picked = sorted({round(i) for i in np.linspace(0, len(grids) - 1, MAX_FRAMES)}) if grids else []
    return Filmstrip([_frame(grids[i]) for i in picked], len(grids))


def alarms(run: Run) -> list[Alarm]:
    """List the alarms of the run's metrics by name, also those that never fired."""
    iterations = run.column("iteration")
    found = []
    for key in sorted({key for row in run.metrics for key in row if key.startswith("alarm/")}):
        fired = iterations[(run.column(key) > 0) & np.isfinite(iterations)]
        found.append(Alarm(key.removeprefix("alarm/"), [int(iteration) for iteration in fired]))
    return found


def phases(run: Run) -> list[Phase]:
    """Split the time of the iterations into phases, the rest last; [] where no time was recorded."""
    seconds = {metric: np.nan_to_num(run.column(metric)) for metric in PHASES}
    named = sum(seconds.values())
    if not run.metrics or not np.any(named):
        return []
    other = np.maximum(np.nan_to_num(run.column("time/iteration")) - named, 0)
    # an evaluation has a row of its own and is no part of time/iteration: it counts with the iteration that it follows
    places = np.searchsorted(run.column("iteration"), run.eval_column("iteration"))
    spent = np.nan_to_num(run.eval_column("time/eval"))
    np.add.at(seconds["time/eval"], places.clip(max=len(run.metrics) - 1), spent)
    return [*(Phase(*PHASES[metric], of) for metric, of in seconds.items()), Phase(*OTHER, other)]


def provenance(run: Run) -> Provenance:
    """Collect what repeating the run takes beside its configuration."""
    return Provenance(
        command=str(run.info.get("command") or ""),
        machine=_pairs(run.info.get("machine")),
        versions=_pairs(run.info.get("versions")),
    )


def _frame(path: Path) -> Frame:
    entries = read_json(path.with_suffix(".json"))
    entries = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    samples = [
        Sample(str(entry.get("prompt", "")), number(entry.get("reward")), str(entry.get("note") or "")) for entry in entries
    ]
    rewards = [sample.reward for sample in samples if math.isfinite(sample.reward)]
    return Frame(
        iteration=int(path.stem),
        picture=picture(path),
        mean_reward=sum(rewards) / len(rewards) if rewards else math.nan,
        samples=samples,
    )


def _pairs(values: object) -> list[tuple[str, str]]:
    return [(str(name), str(value)) for name, value in values.items()] if isinstance(values, dict) else []


def _last(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if finite.size else math.nan
