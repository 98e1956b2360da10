"""Compares new results with the committed ones by ratios, which a busy or another machine changes less than times.

    python bench/regression.py runs/bench [--baseline bench/results] [--tolerance 0.2]

For each file of the same name in both folders:

- throughput_*.json: how many times as fast as the baseline PPO each system is (by CPU seconds on a CPU);
- kernels_*.json: how many times as fast as eager PyTorch the Triton kernels are;
- memory_*.json: how many times smaller the peak is than the plain one.

Exit code 1 where a ratio has fallen by more than the tolerance. What only one of them has is listed and passes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from fastloop import cli
from fastloop.errors import UserError


def ratios(kind: str, summary: dict) -> dict[str, float]:
    """Ratios by name, higher is better, of a result file of a kind."""
    return {"throughput": of_throughput, "kernels": of_kernels, "memory": of_memory}[kind](summary)


def of_throughput(summary: dict) -> dict[str, float]:
    key = "x_baseline_cpu" if summary["machine"]["device"] == "cpu" else "x_baseline"
    return {
        f"{case['model']}, {case['adapter']}: {row['system']} / baseline": row[key]
        for case in summary["cases"]
        for row in case["rows"]
        if row["system"] != "baseline" and key in row
    }


def of_kernels(summary: dict) -> dict[str, float]:
    ms = {(row["operator"], row["size"], row["which"], row["contender"]): row["ms"] for row in summary["rows"]}
    return {
        f"{operator}, {size}, {which}: triton / eager": ms[operator, size, which, "eager"] / value
        for (operator, size, which, contender), value in ms.items()
        if contender == "triton" and (operator, size, which, "eager") in ms
    }


def of_memory(summary: dict) -> dict[str, float]:
    return {f"{row['label']}: memory": 1 / row["share_of_plain"] for row in summary["rows"] if row["share_of_plain"]}


def compare(before: dict[str, float], now: dict[str, float], tolerance: float) -> tuple[list[str], int]:
    """A line for each ratio, and how many have fallen by more than the tolerance."""
    lines, fallen = [], 0
    for name in sorted({*before, *now}):
        if name not in now or name not in before:
            lines.append(f"  {name}: {'not measured now' if name in before else 'new'}")
            continue
        change = now[name] / before[name] - 1
        worse = change < -tolerance
        fallen += worse
        lines.append(f"{'! ' if worse else '  '}{name}: {before[name]:.2f} -> {now[name]:.2f} ({change:+.0%})")
    return lines, fallen


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(prog="bench/regression.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("new", type=Path, help="folder of new results")
    parser.add_argument("--baseline", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--tolerance", type=float, default=0.2, help="share that a ratio may fall by (default: 0.2)")
    try:
        args = parser.parse_args(argv)
        if not args.new.is_dir():
            raise UserError(f"no folder {args.new}: give one with results, such as runs/bench")
    except UserError as error:
        return cli.fail(str(error), 2)
    fallen, files = 0, 0
    for path in sorted(args.new.glob("*.json")):
        kind, committed = path.stem.split("_")[0], args.baseline / path.name
        if kind not in ("throughput", "kernels", "memory"):
            continue
        if not committed.exists():
            print(f"{path.name}: nothing committed for this machine")
            continue
        before, now = (ratios(kind, json.loads(file.read_text())) for file in (committed, path))
        lines, worse = compare(before, now, args.tolerance)
        print("\n".join([f"{path.name}, committed -> now:", *lines]))
        fallen, files = fallen + worse, files + 1
    print(f"{fallen} of the ratios fell by more than {args.tolerance:.0%}" if files else "nothing to compare")
    return 1 if fallen else 0


if __name__ == "__main__":
    sys.exit(main())
