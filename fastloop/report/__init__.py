"""One self-contained HTML page per run: what it learned, how healthy it was, what it drew, how to repeat it."""

from __future__ import annotations

import math
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from fastloop import __version__
from fastloop.report import facts, figures, formats
from fastloop.report.run import read_run
from fastloop.tracking import replace_text


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run's folder, whether the run has ended or not, and return the page's path.

    The page replaces an older one whole; what the run has not left yet or what is damaged is named in it.

    Raises:
        FileNotFoundError: the folder is absent or is no run's.
        ValueError: a line of metrics.jsonl or eval.jsonl other than the last is not a JSON object.
    """
    run = read_run(Path(folder))
    phases = facts.phases(run)
    page = _template().render(
        run=run,
        headline=facts.headline(run),
        before_after=facts.before_after(run),
        learning=figures.learning(run),
        category_table=facts.estimate_table(run, "categories"),
        reward_table=facts.estimate_table(run, "rewards"),
        filmstrip=facts.filmstrip(run),
        alarms=facts.alarms(run),
        policy_health=figures.policy_health(run),
        image_statistics=figures.image_statistics(run),
        phases=phases,
        time_chart=figures.time_chart(run, phases),
        provenance=facts.provenance(run),
        version=__version__,
    )
    path = run.folder / "report.html"
    replace_text(path, page)
    return path


def _template() -> Template:
    """The page. Autoescape turns all that a run holds (prompts, configuration, messages, file names) into text."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(count=formats.count, decimal=formats.decimal, duration=formats.duration, ranges=formats.ranges)
    environment.tests["finite"] = math.isfinite
    return environment.get_template("page.html.jinja")
