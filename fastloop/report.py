"""One self-contained HTML page per run: what it learned, how healthy it was, what it drew, how to repeat it."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from fastloop import __version__
from fastloop.prompts import score_name
from fastloop.tracking import read_rows, replace_text

PHASES = {  # metric: (label, colour)
    "time/rollout": ("Rollout", "#3b6ea8"),
    "time/reward_wait": ("Waiting for rewards", "#d99a3d"),
    "time/update": ("Update", "#4f9277"),
    "time/eval": ("Evaluation", "#9a6fa8"),
}
OTHER = ("Other", "#b4bac0")
MAX_FRAMES = 8  # sample grids in the filmstrip
MAX_BARS = 60  # of the time chart
SPACE = "\u00a0"  # between a number and its unit
LINE, FAINT, REFERENCE = "#2f5d8c", "#9db7d0", "#b3402e"

Estimate = tuple[float, float, float]  # mean, standard error, number of distinct prompts


def write_report(run: Path) -> Path:
    """Write ``report.html`` into a run folder, finished or not. Raises ``FileNotFoundError`` for any other folder."""
    record = _read_run(Path(run))
    sections = [
        _headline(record),
        _section("Before and after", _before_after(record)),
        _section("Learning", _learning(record)),
        _section("By category", _categories(record)),
        _section("Pictures during training", _filmstrip(record)),
        _section("Alarms", _alarms(record)),
        _section("Policy health", _policy_health(record)),
        _section("Image statistics", _image_statistics(record)),
        _section("Time", _time(record)),
        _section("Configuration and machine", _provenance(record)),
    ]
    name = escape(record.folder.name)
    page = _PAGE.format(title=f"{name} · fastloop run", style=_STYLE, body="\n".join(sections), version=__version__)
    path = record.folder / "report.html"
    replace_text(path, page)
    return path


# --- the run, read


@dataclass(frozen=True)
class _Run:
    folder: Path
    info: dict[str, Any]
    config: dict[str, Any]
    config_text: str
    metrics: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    distinct: float  # prompts of the evaluation
    trained_too: float  # those of them that are training prompts; NaN where the run did not record it

    def column(self, name: str) -> np.ndarray:
        """One metric over the training iterations, NaN where a row lacks it."""
        return np.array([_number(row.get(name)) for row in self.metrics], float)

    def score(self, index: int) -> Estimate:
        return _estimate(self.evals[index].get("score"))


def _read_run(folder: Path) -> _Run:
    folder = folder.resolve()
    marks = ("config.yaml", "run.json", "metrics.jsonl", "eval.jsonl")
    if not any((folder / mark).is_file() for mark in marks):
        raise FileNotFoundError(f"{folder} is not a run folder: it has none of {', '.join(marks)}")
    config_text = _text(folder / "config.yaml")
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError:  # the page still shows the text
        config = None
    info = _json(folder / "run.json")
    prompts = _json(folder / "prompts.json")
    of_eval = prompts.get("eval.prompts") if isinstance(prompts, dict) else None
    of_eval = of_eval if isinstance(of_eval, dict) else {}
    return _Run(
        folder=folder,
        info=info if isinstance(info, dict) else {},
        config=config if isinstance(config, dict) else {},
        config_text=config_text,
        metrics=read_rows(folder / "metrics.jsonl"),
        evals=read_rows(folder / "eval.jsonl"),
        distinct=_number(of_eval.get("distinct")),
        trained_too=_number(of_eval.get("trained_too")),
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json(path: Path) -> Any:
    """What a JSON file holds, ``None`` if it is absent or not JSON."""
    try:
        return json.loads(_text(path))
    except ValueError:
        return None


def _number(value: Any) -> float:
    """A logged value as a float, NaN for null and for anything that is not a number."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def _estimate(value: Any) -> Estimate:
    value = value if isinstance(value, dict) else {}
    return _number(value.get("mean")), _number(value.get("stderr")), _number(value.get("n"))


def _difference(first: Estimate, last: Estimate) -> tuple[float, float]:
    return last[0] - first[0], math.hypot(first[1], last[1])


# --- sections


def _headline(run: _Run) -> str:
    status = str(run.info.get("status", "status unknown"))
    parts = [
        f'<h1>{escape(run.folder.name)} <span class="status {_status_class(status)}">{escape(status)}</span></h1>',
        f'<p class="muted">{escape(_when(run.info))}</p>',
    ]
    if run.info.get("message"):
        parts.append(f'<p class="message">{escape(str(run.info["message"]))}</p>')
    images = _last(run.column("images"))
    done, planned = _last(run.column("iteration")), _number(run.config.get("iterations"))
    iterations = _count(done if math.isfinite(done) else 0) + (f" of {_count(planned)}" if planned > 0 else "")
    cards = [
        _score_card(run),
        _card("Algorithm", escape(str(run.config.get("algorithm", "unknown")))),
        _card("Iterations", iterations),
        _card("Training images", _count(images) if math.isfinite(images) else "none yet"),
        _card("Wall time", _duration(_wall_time(run))),
    ]
    return "<header>" + "\n".join(parts) + '<div class="cards">' + "".join(cards) + "</div></header>"


def _score_card(run: _Run) -> str:
    label = _score_title(run)
    if not run.evals:
        return _card(label, "no evaluation yet", wide=True)
    first, last = run.score(0), run.score(-1)
    if len(run.evals) == 1:
        return _card(label, _with_error(*first[:2]), f"{_at(run.evals[0])}; the only evaluation so far", wide=True)
    change = _with_error(*_difference(first, last), signed=True)
    value = f"{_with_error(*first[:2])} <span>→</span> {_with_error(*last[:2])}"
    note = f"{change} from {_at(run.evals[0])} to {_at(run.evals[-1])}; ± is one standard error"
    return _card(label, value, note, wide=True)


def _score_title(run: _Run) -> str:
    return score_name(run.trained_too == 0).capitalize()


def _card(label: str, value: str, note: str = "", wide: bool = False) -> str:
    """``value`` and ``note`` are HTML."""
    small = f'<div class="muted">{note}</div>' if note else ""
    kind = "card wide" if wide else "card"
    return f'<div class="{kind}"><div class="label">{label}</div><div class="value">{value}</div>{small}</div>'


def _status_class(status: str) -> str:
    return status if status in ("running", "finished", "stopped", "failed") else "unknown"


def _when(info: dict[str, Any]) -> str:
    started, finished = _moment(info.get("started")), _moment(info.get("finished"))
    if not started:
        return "Start time not recorded"
    return f"Started {started}, ended {finished}" if finished else f"Started {started}, no end recorded"


def _moment(value: Any) -> str:
    try:
        return f"{datetime.fromisoformat(value):%Y-%m-%d %H:%M %Z}".strip()
    except (TypeError, ValueError):
        return ""


def _wall_time(run: _Run) -> float:
    """Seconds since the run's start at its latest row, NaN without one."""
    ticks = [_number(row.get("seconds")) for row in run.metrics] + [_number(row.get("seconds")) for row in run.evals]
    return max((tick for tick in ticks if math.isfinite(tick)), default=math.nan)


def _before_after(run: _Run) -> str:
    path = run.folder / "samples" / "before_after.png"
    if not path.is_file():
        return _missing("No samples/before_after.png: it is drawn at the second evaluation.")
    return _picture(path, "The same prompts and seeds before and after training")


def _learning(run: _Run) -> str:
    return _figures(
        [
            _score_figure(run),
            _metric_figure(run, "reward/mean", "Training reward", "mean reward", "Mean over the rollout's pictures."),
            _metric_figure(
                run,
                "reward/group_std",
                "Reward spread within a prompt",
                "standard deviation",
                "The signal LOOP learns from: near zero, all pictures of a prompt score alike.",
            ),
            *_component_figures(run),
            *_watched_figures(run),
        ]
    )


def _watched_figures(run: _Run) -> list[str]:
    """Each reward that is only watched, over the training reward: apart, they show a reward that is gamed."""
    trained, watched = (_labels(rewards) for rewards in (run.config.get("rewards"), _of_eval(run).get("rewards")))
    figures = []
    for name in (name for name in watched if name not in trained):
        estimates = [_estimate((row.get("rewards") or {}).get(name)) for row in run.evals]
        means, errors = (np.array([estimate[k] for estimate in estimates]) for k in (0, 1))
        title = f"Held-out {name} and training reward"
        if not np.isfinite(means).any():
            figures.append(_figure(title, "", "", "No evaluation has a finite score."))
            continue
        figure, axes = _axes(f"mean {name}, held out")
        x = np.array([_number(row.get("iteration")) for row in run.evals])
        axes.errorbar(x, means, yerr=np.nan_to_num(errors), color=REFERENCE, marker="o", ms=4, lw=1.6, capsize=3)
        beside = axes.twinx()
        trained_on = run.column("reward/mean")
        beside.plot(run.column("iteration"), _running_mean(trained_on, len(trained_on) // 20 | 1), color=LINE, lw=1.4)
        beside.set_ylabel("training reward", fontsize=10, color=LINE)
        beside.spines[["top"]].set_visible(False)
        note = (
            "Red, left: a reward that is not trained on. Blue, right: the one that is. Blue up and red down is reward hacking."
        )
        figures.append(_figure(title, note, _data_uri(figure)))
    return figures


def _of_eval(run: _Run) -> dict[str, Any]:
    section = run.config.get("eval")
    return section if isinstance(section, dict) else {}


def _labels(rewards: Any) -> list[str]:
    """The names in metrics of a configured list of rewards."""
    found = [r for r in rewards if isinstance(r, dict) and "name" in r] if isinstance(rewards, list) else []
    return [str(reward.get("label") or reward["name"]) for reward in found]


def _score_figure(run: _Run) -> str:
    title = _score_title(run)
    means = np.array([run.score(i)[0] for i in range(len(run.evals))])
    errors = np.array([run.score(i)[1] for i in range(len(run.evals))])
    if not np.isfinite(means).any():
        return _figure(title, "", "", "No evaluation has a finite score." if run.evals else "No evaluation yet.")
    x = np.array([_number(row.get("iteration")) for row in run.evals])
    figure, axes = _axes("mean score")
    axes.errorbar(x, means, yerr=np.nan_to_num(errors), color=LINE, marker="o", ms=4, lw=1.6, capsize=3, elinewidth=1)
    note = f"{_which_prompts(run)}; bars are one standard error. {_not_shown(means)}"
    return _figure(title, note, _data_uri(figure))


def _which_prompts(run: _Run) -> str:
    """What the evaluation's prompts are to training, as far as the run recorded it."""
    if run.trained_too == 0:
        return "On prompts that training never saw"
    if not math.isfinite(run.trained_too):
        return "On the evaluation prompts"
    if run.trained_too == run.distinct:
        return "On prompts that are all trained on too"
    return f"On {_count(run.distinct)} prompts, {_count(run.trained_too)} of which are trained on too"


def _component_figures(run: _Run) -> list[str]:
    """One curve per reward, where a run mixes several."""
    names = _labels(run.config.get("rewards"))
    if len(names) < 2:
        return []
    return [
        _metric_figure(run, f"reward/{name}", f"Training reward: {name}", "mean reward", "One part of the reward.")
        for name in names
        if np.isfinite(run.column(f"reward/{name}")).any()
    ]


def _policy_health(run: _Run) -> str:
    clip_range = _number(run.config.get("clip_range"))
    dashed = f" Dashed: the clip range, {clip_range:g}." if math.isfinite(clip_range) else ""
    return _figures(
        [
            _metric_figure(run, "policy/clipfrac", "Clip fraction", "share of samples", "Ratios outside the clip range."),
            _metric_figure(
                run,
                "policy/approx_kl",
                "Approximate KL",
                "approximate KL",
                "From the rollout's policy to the updated one.",
            ),
            _metric_figure(
                run,
                "policy/ratio_max_dev",
                "Largest ratio deviation",
                "max |ratio − 1|",
                f"On a log scale.{dashed}",
                log=True,
                reference=clip_range,
            ),
            _metric_figure(run, "policy/grad_norm", "Gradient norm", "L2 norm", "Of the trained weights."),
        ]
    )


def _image_statistics(run: _Run) -> str:
    return "<p>A drift here while the reward rises is the usual sign of reward hacking.</p>" + _figures(
        [
            _metric_figure(run, "image/saturation", "Saturation", "mean saturation", "Of the rollout's pictures."),
            _metric_figure(run, "image/entropy", "Entropy", "mean entropy", "Of the rollout's pictures."),
        ]
    )


def _categories(run: _Run) -> str:
    if not run.evals:
        return _missing("No evaluation yet.")
    parts = [_estimates_table(run, "Category", "categories", "All prompts")]
    if not _names(run, "categories"):
        parts.append(_missing("The evaluation's prompts have no categories."))
    if len(_names(run, "rewards")) > 1:
        parts.append(_estimates_table(run, "Reward", "rewards", "Score"))
    note = "Means ± one standard error. That of a difference takes the two evaluations as independent."
    return "".join(parts) + f'<p class="muted">{note}</p>'


def _names(run: _Run, group: str) -> list[str]:
    """The names in a group over all evaluations, in order of appearance."""
    return list(dict.fromkeys(name for row in run.evals for name in (row.get(group) or {})))


def _estimates_table(run: _Run, title: str, group: str, overall: str) -> str:
    """The whole score and one group's parts at the first, best and last evaluation."""
    first, last = run.evals[0], run.evals[-1]
    scores = [run.score(i)[0] for i in range(len(run.evals))]
    best = run.evals[int(np.nanargmax(scores))] if np.isfinite(scores).any() else last
    shown = [first] if first is last else [first, last] if best in (first, last) else [first, best, last]
    header = [title, "Prompts"]
    for row in shown:
        marks = [name for name, other in (("first", first), ("last", last), ("best", best)) if row is other]
        header.append(f"{' and '.join(marks).capitalize()}<br><small>{_at(row)}</small>")
    if first is not last:
        header.append("Difference<br><small>last − first</small>")
    rows = []
    for name in [None, *_names(run, group)]:
        cells = [_estimate(row.get("score") if name is None else (row.get(group) or {}).get(name)) for row in shown]
        line = [escape(overall if name is None else name), _count(cells[-1][2])]
        line += [_with_error(*cell[:2]) for cell in cells]
        if first is not last:
            line.append(_with_error(*_difference(cells[0], cells[-1]), signed=True))
        rows.append(line)
    return _table(header, rows)


def _filmstrip(run: _Run) -> str:
    folder = run.folder / "samples"
    grids = sorted(path for path in folder.glob("*.png") if path.stem.isdecimal()) if folder.is_dir() else []
    if not grids:
        return _missing("No sample grids in samples/ yet.")
    picked = [grids[i] for i in sorted({round(i) for i in np.linspace(0, len(grids) - 1, MAX_FRAMES)})]
    note = "The same prompts and seeds each time."
    if len(picked) < len(grids):
        note += f" {len(picked)} of {len(grids)} grids, evenly picked; all are in samples/."
    return f'<p>{note}</p><div class="frames">' + "".join(_frame(path) for path in picked) + "</div>"


def _frame(path: Path) -> str:
    entries = _json(path.with_suffix(".json"))
    entries = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    rewards = [r for r in (_number(entry.get("reward")) for entry in entries) if math.isfinite(r)]
    caption = f"Iteration {int(path.stem)}" + (f" · mean reward {_decimal(sum(rewards) / len(rewards))}" if rewards else "")
    rows = [
        [
            escape(str(entry.get("prompt", ""))),
            _decimal(_number(entry.get("reward"))),
            escape(str(entry.get("note") or "")),
        ]
        for entry in entries
    ]
    details = ""
    if rows:
        table = _table(["Prompt", "Reward", "Note"], rows)
        details = f"<details><summary>Prompts, rewards and notes</summary>{table}</details>"
    picture = _picture(path, f"Samples at iteration {int(path.stem)}")
    return f'<figure class="frame"><figcaption>{caption}</figcaption>{picture}{details}</figure>'


def _alarms(run: _Run) -> str:
    names = sorted({key for row in run.metrics for key in row if key.startswith("alarm/")})
    if not names:
        return _missing("No alarms in metrics.jsonl yet.")
    iterations = run.column("iteration")
    rows = []
    for name in names:
        fired = iterations[(run.column(name) > 0) & np.isfinite(iterations)]
        if fired.size:
            label = escape(name.removeprefix("alarm/"))
            rows.append([label, _count(fired[0]), _count(fired.size), _ranges([int(i) for i in fired])])
    if not rows:
        return f"<p>None of the {len(names)} alarms fired in {len(run.metrics)} iterations.</p>"
    return _table(["Alarm", "First fired", "Times", "Iterations"], rows)


def _ranges(numbers: Sequence[int]) -> str:
    """[3, 4, 5, 9] as "3–5, 9"."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number <= spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in spans)


def _time(run: _Run) -> str:
    seconds = {label: np.nan_to_num(run.column(name)) for name, (label, _) in PHASES.items()}
    named = sum(seconds.values())
    if not run.metrics or not np.any(named):
        return _missing("No phase times in metrics.jsonl yet.")
    seconds[OTHER[0]] = np.maximum(np.nan_to_num(run.column("time/iteration")) - named, 0)
    # an evaluation has a row of its own and is no part of time/iteration: it counts with the iteration that it follows
    places = np.searchsorted(run.column("iteration"), [_number(row.get("iteration")) for row in run.evals])
    spent = np.nan_to_num([_number(row.get("time/eval")) for row in run.evals])
    np.add.at(seconds[PHASES["time/eval"][0]], places.clip(max=len(run.metrics) - 1), spent)
    total = sum(phase.sum() for phase in seconds.values())
    rows = [
        [label, _duration(phase.sum()), _decimal(phase.sum() / len(phase)), f"{100 * phase.sum() / total:.1f}{SPACE}%"]
        for label, phase in seconds.items()
    ]
    rows.append(["<b>Total</b>", _duration(total), _decimal(total / len(run.metrics)), f"100{SPACE}%"])
    table = _table(["Phase", "Time", "Seconds per iteration", "Share"], rows)
    return f'<div class="figures">{_time_figure(run, seconds)}<div>{table}</div></div>'


def _time_figure(run: _Run, seconds: dict[str, np.ndarray]) -> str:
    groups = np.array_split(np.arange(len(run.metrics)), min(len(run.metrics), MAX_BARS))
    iterations = run.column("iteration")
    x = [np.nanmean(iterations[group]) for group in groups]
    figure, axes = _axes("seconds per iteration")
    bottom = np.zeros(len(groups))
    for (label, phase), color in zip(seconds.items(), [c for _, c in PHASES.values()] + [OTHER[1]], strict=True):
        if phase.any():
            heights = np.array([phase[group].mean() for group in groups])
            axes.bar(x, heights, bottom=bottom, width=0.85 * len(groups[0]), color=color, label=label)
            bottom += heights
    axes.set_ylim(0, 1.32 * max(bottom.max(), 1e-9))  # room for the legend
    axes.legend(loc="upper center", ncols=3, fontsize=8.5, frameon=False, handlelength=1, columnspacing=1.2)
    note = f"Each bar is the mean of about {len(groups[0])} iterations." if len(groups[0]) > 1 else ""
    return _figure("Where the time goes", note, _data_uri(figure))


def _provenance(run: _Run) -> str:
    parts = []
    for key, title in (("machine", "Machine"), ("versions", "Versions")):
        values = run.info.get(key)
        if isinstance(values, dict) and values:
            rows = [[escape(str(name)), escape(str(value))] for name, value in values.items()]
            parts.append(f"<div><h3>{title}</h3>{_table([], rows)}</div>")
        else:
            parts.append(f"<div><h3>{title}</h3>{_missing('Not recorded in run.json.')}</div>")
    command = run.info.get("command")
    command = f"<pre>{escape(str(command))}</pre>" if command else _missing("Not recorded in run.json.")
    config = _missing("No config.yaml.")
    if run.config_text:
        config = f"<details><summary>Resolved configuration</summary><pre>{escape(run.config_text)}</pre></details>"
    return f'<h3>Command</h3>{command}{config}<div class="figures">{"".join(parts)}</div>'


# --- figures


def _metric_figure(
    run: _Run,
    metric: str,
    title: str,
    unit: str,
    note: str,
    log: bool = False,
    reference: float = math.nan,
) -> str:
    """One metric over the iterations, with its running mean once there are enough points for one."""
    x, y = run.column("iteration"), run.column(metric)
    if not np.isfinite(y).any():
        return _figure(title, note, "", f"No {metric} in metrics.jsonl yet.")
    if log := log and bool(np.any(y > 0)):
        y = np.where(y > 0, y, math.nan)
    figure, axes = _axes(unit)
    many = len(y) > 40
    axes.plot(x, y, color=FAINT if many else LINE, lw=0.9 if many else 1.6, marker=None if many else "o", ms=3)
    if many:
        axes.plot(x, _running_mean(y, len(y) // 20 | 1), color=LINE, lw=1.8)
    if log:
        axes.set_yscale("log")
    if math.isfinite(reference):
        axes.axhline(reference, color=REFERENCE, lw=1.2, ls="--")
    bold = "Bold: running mean." if many else ""
    return _figure(title, f"{note} {bold} {_not_shown(y)}", _data_uri(figure))


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over an odd window around each value, without the NaNs; of none where the run has no row yet."""
    if not len(values):
        return values
    finite = np.isfinite(values)
    ones = np.ones(window)
    sums = np.convolve(np.where(finite, values, 0.0), ones, "same")
    counts = np.convolve(finite, ones, "same")
    return np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)


def _not_shown(values: np.ndarray) -> str:
    missing = int((~np.isfinite(values)).sum())
    return f"{missing} of {len(values)} values are missing or cannot be drawn." if missing else ""


def _axes(unit: str) -> tuple[Any, Any]:
    """A bare figure, without pyplot, whose global state is the caller's."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.4, 2.9), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("iteration", fontsize=10)
    axes.set_ylabel(unit, fontsize=10)
    axes.tick_params(labelsize=9.5, color="#9aa3ab")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9aa3ab")
    axes.grid(color="#e8ebee", lw=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _data_uri(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


# --- HTML


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def _missing(text: str) -> str:
    return f'<p class="missing">{escape(text)}</p>'


def _figures(figures: Sequence[str]) -> str:
    return f'<div class="figures">{"".join(figures)}</div>'


def _figure(title: str, note: str, source: str, missing: str = "") -> str:
    """A captioned chart, or the sentence that says why there is none."""
    body = f'<img src="{source}" alt="{escape(title)} over the iterations">' if source else _missing(missing)
    return f"<figure><h3>{escape(title)}</h3>{body}<figcaption>{escape(note.strip())}</figcaption></figure>"


def _picture(path: Path, alt: str) -> str:
    data = path.read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.verify()
            width, height = image.size
    except Exception:  # Pillow raises many kinds for a picture cut short
        return _missing(f"{path.name} cannot be read as a picture.")
    source = "data:image/png;base64," + base64.b64encode(data).decode()
    return f'<div class="scroll"><img src="{source}" width="{width}" height="{height}" alt="{escape(alt)}"></div>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML."""
    head = "<thead><tr>" + "".join(f"<th>{cell}</th>" for cell in header) + "</tr></thead>" if header else ""
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _at(row: dict[str, Any]) -> str:
    return f"iteration {_count(_number(row.get('iteration')))}"


def _last(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if finite.size else math.nan


def _count(value: float) -> str:
    return f"{int(value):,}" if math.isfinite(value) else "–"


def _decimal(value: float, signed: bool = False) -> str:
    if not math.isfinite(value):
        return "–"
    plain = value == 0 or 0.001 <= abs(value) < 10_000
    return f"{value:{'+' if signed else ''}{'.3f' if plain else '.3g'}}".replace("-", "−")


def _with_error(value: float, error: float, signed: bool = False) -> str:
    text = _decimal(value, signed)
    return f"{text} <small>± {_decimal(error)}</small>" if math.isfinite(value) and math.isfinite(error) else text


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "not recorded"
    if seconds < 60:
        return f"{seconds:.1f}{SPACE}s"
    minutes, whole = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}{SPACE}min{SPACE}{whole}{SPACE}s"
    return f"{minutes // 60}{SPACE}h{SPACE}{minutes % 60}{SPACE}min"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
<footer class="muted">Written by fastloop {version}.</footer>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light; --ink: #1c1e21; --muted: #667079; --line: #d5d9dd; --soft: #f5f6f8; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--ink); background: #fff;
  max-width: 1120px; margin: 0 auto; padding: 24px 20px 48px; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .8rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p { margin: .4rem 0; }
small, .muted, figcaption { color: var(--muted); }
.muted, figcaption { font-size: .88rem; }
figure h3 { margin: 0; }
.missing { color: var(--muted); font-style: italic; background: var(--soft); padding: .7rem .9rem; border-radius: 4px; }
.message { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid #b3402e; padding: .2rem .8rem; }
.status { display: inline-block; font-size: .82rem; font-weight: 600; padding: .1rem .6rem; border-radius: 99px;
  vertical-align: middle; background: #e8ebee; color: #444c54; }
.status.finished { background: #dcefe4; color: #1f6b43; }
.status.running { background: #dde9f6; color: #23568c; }
.status.stopped { background: #faecd3; color: #80560c; }
.status.failed { background: #f8dfdb; color: #97301f; }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: 10px; margin-top: 1rem; }
.card { background: var(--soft); border-radius: 6px; padding: .7rem .9rem; }
.card.wide { grid-column: 1 / -1; }
.card .label { font-size: .8rem; color: var(--muted); }
.card .value { font-size: 1.15rem; font-weight: 600; overflow-wrap: anywhere; }
.card.wide .value { font-size: 1.6rem; }
.card .value small { font-size: .65em; font-weight: 400; }
small { white-space: nowrap; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 20px 28px; }
.figures > * { min-width: 0; }
figure { margin: 0; break-inside: avoid; }
figure > img { width: 100%; height: auto; display: block; margin-top: .3rem; }
.scroll img { width: auto; max-width: 100%; height: auto; display: block; }
.frames { display: grid; gap: 22px; margin-top: .6rem; }
.frame figcaption { color: var(--ink); font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .3rem 0 .8rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem 1.4rem .35rem 0; border-bottom: 1px solid #e8ebee; }
th { font-weight: 600; vertical-align: bottom; }
th small { font-weight: 400; }
pre { font-size: .82rem; line-height: 1.45; background: var(--soft); border-radius: 4px; padding: .8rem;
  margin: .4rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: #23568c; font-size: .9rem; }
footer { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: .8rem; }
@media screen and (max-width: 640px) {
  .cards { grid-template-columns: repeat(2, 1fr); }
  .frame .scroll img { max-width: 760px; }
  th, td { padding-right: .9rem; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 11pt; }
  .card, tr { break-inside: avoid; }
  .card, pre, .missing { border: 1px solid var(--line); }
  h2, h3 { break-after: avoid; }
  .figures { grid-template-columns: 1fr 1fr; }
  .scroll img { max-height: 16cm; }
  .scroll { overflow: visible; }
  th, td { padding-right: .7rem; }
}
"""
