"""Short trainings of every algorithm, adapter and option, by another commit and by this tree: the same bits, or what differs.

    python tests/same_bits.py COMMIT [NAME ...]
    python tests/same_bits.py --record

The other commit is checked out into a temporary folder, both train the RUNS below with the torch engine and the same Python,
and the SHA-256 of their trained weights, averages and optimizer states are compared. Then this tree goes on with a run that
the other commit left after half of its iterations. Exit code 0: everything is the same. It is for changes that must not
change anything. ``--record`` writes the figures of some of these runs to pinned_runs.json, to which `test_pinned_runs.py`
holds the tree; use it after a change that is meant to change them.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve()
HALFWAY = 1  # iterations of the run that is gone on with
SMALL = {
    "model": {"path": "assets:shapes", "lora": {"rank": 4}},
    "prompts": {"source": "shapes_train", "categories": ["color"]},
    "rewards": [{"name": "shapes"}],
    "eval": {"every": 100, "prompts": {"limit": 2}, "images_per_prompt": 1},
    "sampling": {"steps": 4, "guidance_scale": 1.0},
    "prompts_per_step": 3,
    "images_per_prompt": 3,
    "memory": {"rollout_batch": 5, "update_batch": 7, "vae_batch": 4},
    "optimizer": {"lr": 1e-3},
    "clip_range": 1e-3,
    "tracking": {"tensorboard": False},
    "checkpoint": {"every": 1, "keep": 9},
    "iterations": 2,
}
RUNS = {
    "loop": {},
    "rloo": {"algorithm": "rloo"},
    "ppo": {"algorithm": "ppo", "images_per_prompt": 6},
    "ppo, one image": {"algorithm": "ppo", "images_per_prompt": 1, "prompts_per_step": 7},
    "reinforce": {"algorithm": "reinforce"},
    "grpo": {"algorithm": "grpo"},
    "none": {"advantage": "none"},
    "clip_only": {"objective": "clip_only", "passes_per_rollout": 2},
    "kl_mask": {"objective": "kl_mask", "clip_range": 1e-6},
    "guided": {"sampling": {"guidance_scale": 3.0}},
    "kl and average": {"kl": {"weight": 0.1}, "ema": {"decay": 0.9}},
    "full": {"model": {"adapter": "full"}, "kl": {"weight": 0.1}, "optimizer": {"lr": 1e-5}},
    "bf16": {"model": {"dtype": "bf16"}, "clip_range": 1.0},
    "full bf16": {"model": {"adapter": "full", "dtype": "bf16"}, "optimizer": {"lr": 1e-5}, "clip_range": 1.0},
    "parts of the steps": {"timestep_fraction": 0.5, "last_steps": {"drop": 1, "weight": 0.5}, "normalize_advantages": True},
    "checkpointing": {"memory": {"gradient_checkpointing": True}, "optimizer": {"schedule": "linear"}},
    "two rewards": {
        "rewards": [
            {"name": "shapes", "normalize": "running"},
            {"name": "shapes", "label": "again", "weight": 0.5, "normalize": "batch"},  # a JPEG's size moves with rounding
        ]
    },
    "sd": {"model": {"path": "sd"}, "prompts": {"source": "animals"}, "rewards": [{"name": "jpeg_compressibility"}]},
    "sd text": {
        "model": {"path": "sd", "lora": {"text_encoders": True}},
        "prompts": {"source": "animals"},
        "rewards": [{"name": "jpeg_compressibility"}],
    },
    "sdxl": {
        "model": {"path": "sdxl"},
        "prompts": {"source": "animals"},
        "rewards": [{"name": "jpeg_compressibility"}],
        "sampling": {"guidance_scale": 2.0},
    },
    "sdxl full": {
        "model": {"path": "sdxl", "adapter": "full"},
        "prompts": {"source": "animals"},
        "rewards": [{"name": "jpeg_compressibility"}],
        "optimizer": {"lr": 1e-5},
    },
}
PINNED = ("ppo", "guided", "kl and average", "parts of the steps", "two rewards")
RECORD = HERE.with_name("pinned_runs.json")
RESUMED = ("ppo", "kl and average", "two rewards", "full")


def settings(name: str, models: Path, folder: Path) -> dict:
    """The configuration of a run: SMALL with its own keys put in."""
    values = dict(SMALL)
    for key, value in RUNS[name].items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) and key != "prompts" else value
    if values["model"].get("path") in ("sd", "sdxl"):
        values["model"] = {**values["model"], "path": str(models / values["model"]["path"])}
    return {**values, "output_dir": str(folder / name.replace(" ", "_").replace(",", ""))}


def train(name: str, models: Path, folder: Path, iterations: int = 2, resume: bool = False) -> dict:
    """Trains, and returns the digests of the newest checkpoint and the numbers of the last row that are not times."""
    import torch
    from safetensors.torch import load_file

    import fastloop.trainer
    from fastloop.config import Config
    from fastloop.trainer import Trainer

    torch.set_num_threads(1)
    config = Config.model_validate({**settings(name, models, folder), "iterations": iterations})
    reports = sys.modules.get("fastloop.training_run", fastloop.trainer)  # which earlier commits do not have
    no_report = mock.patch.object(reports, "write_report")  # half of the time of such a run
    with contextlib.redirect_stdout(sys.stderr), no_report:
        run = Trainer(config, resume).train()
    newest = sorted((run / "checkpoints").iterdir())[-1]
    digests = {path.name: digest(load_file(path)) for path in sorted(newest.glob("*.safetensors"))}
    digests["state.pt"] = digest(torch.load(newest / "state.pt", weights_only=True)["engine"])
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    numbers = {key: value for key, value in row.items() if not key.startswith("time/") and key != "seconds"}
    weights = load_file(newest / "weights.safetensors")
    numbers["weights"] = sum(float(value.double().square().sum()) for value in weights.values()) ** 0.5
    return {"digests": digests, "numbers": numbers}


def digest(value) -> str:
    """SHA-256 of nested dictionaries and lists of tensors and plain values."""
    import torch

    found = hashlib.sha256()

    def add(value) -> None:
        if isinstance(value, torch.Tensor):
            found.update(f"{value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                found.update(str(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        else:
            found.update(repr(value).encode())

    add(value)
    return found.hexdigest()


def run_all(names: list[str], models: Path, folder: Path, halfway: Path | None, leave: bool) -> dict:
    """In the tree that ``fastloop`` is imported from: every run, and half of those that the other tree goes on with."""
    results = {name: train(name, models, folder) for name in names}
    for name in filter(names.__contains__, RESUMED):
        if leave:
            train(name, models, folder / "halfway", HALFWAY)
        if halfway is not None:
            results[f"{name}, resumed"] = train(name, models, halfway, resume=True)
    return results


def in_tree(tree: Path, *arguments: str) -> dict:
    """`run_all` in another process that imports fastloop from a tree."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(HERE), "--run", *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=tree, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)} (default: all)")
    args = parser.parse_args()
    names = args.names or list(RUNS)
    with tempfile.TemporaryDirectory() as temporary:
        there, models, old, new = (Path(temporary) / part for part in ("tree", "models", "old", "new"))
        subprocess.run(["git", "worktree", "add", "--detach", "-q", str(there), args.commit], cwd=HERE.parent, check=True)
        try:
            (there / "fastloop" / "kernels").symlink_to(there / "kernels")  # as the installation maps it
            sys.path.insert(0, str(HERE.parent))
            from tiny_pipelines import make_sd, make_sdxl

            make_sd(models / "sd"), make_sdxl(models / "sdxl")
            before = in_tree(there, str(models), str(old), "leave", *names)
            after = in_tree(HERE.parent.parent, str(models), str(new), str(old / "halfway"), *names)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(there)], cwd=HERE.parent, check=True)
    different = 0
    for name, found in after.items():
        expected = before[name.removesuffix(", resumed")]
        odd = [file for file in expected["digests"] if found["digests"].get(file) != expected["digests"][file]]
        different += bool(odd)
        print(f"{name:30}{'the same bits' if not odd else 'DIFFERENT: ' + ', '.join(odd)}")
        for key in expected["numbers"] if odd else ():
            print(f"    {key:30}{expected['numbers'][key]!s:>25}{found['numbers'].get(key)!s:>25}")
    return int(different > 0)


def record() -> None:
    """Writes the figures of the pinned runs."""
    with tempfile.TemporaryDirectory() as temporary:
        numbers = {name: train(name, Path(temporary), Path(temporary))["numbers"] for name in PINNED}
    RECORD.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["--record"]:
        record()
    elif sys.argv[1:2] == ["--run"]:
        models, folder, other, *names = sys.argv[2:]
        leave = other == "leave"
        print(json.dumps(run_all(names, Path(models), Path(folder), None if leave else Path(other), leave)))
    else:
        sys.exit(main())
