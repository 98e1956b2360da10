"""The cases of bench/throughput.py and its systems: what a worker process of each runs, and what starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch
from worker import Server

from fastloop import cli  # noqa: F401 - first: it quiets what the libraries log when they are imported
from fastloop.config import Config
from fastloop.errors import UserError
from fastloop.prompts import load_prompts
from fastloop.recipes import apply_overrides, dump_config, load_config, parse_config

HERE = Path(__file__).resolve().parent
SYSTEMS = {  # name: overrides of fastloop's configuration; None: another trainer
    "baseline": None,
    "reference": ["kernels=reference"],
    "fastloop": [],
    "compile": ["model.compile=true"],
    "regional": ["model.compile=regional"],
    "trl": None,
    # Other mathematics than PPO's, on as many images with as many updates: what the method's relatives cost. K = 1 leaves no
    # others to compare with, so that their baselines are PPO's; DPOK's two rollouts are trained by half.
    "dpok": ["algorithm=dpok", "timestep_fraction=0.5"],
    "dlpo": ["algorithm=dlpo", "advantage=prompt_tracker"],
    "noise_ppo": ["algorithm=noise_ppo", "advantage=batch_mean", "sampling.eta=0"],
}
RELATIVES = ("dpok", "dlpo", "noise_ppo")
COMMON = {
    "algorithm": "ppo",
    "images_per_prompt": 1,
    "updates_per_rollout": 2,
    "tracking": {"tensorboard": False},
    "safety": {"max_ratio_dev": 1.0},  # random weights in bfloat16: rounding must not end the run
    "iterations": 10**6,
}
REAL = {
    "prompts": {"source": "animals"},
    "eval": {"prompts": {"source": "animals", "limit": 1}, "images_per_prompt": 1},
    "rewards": [{"name": "jpeg_incompressibility"}],
    "clip_range": 1.0,
}
MODELS = {  # what differs; batch: images per forward, the same in sampling and training
    "shapes": {
        "model": {"path": "assets:shapes", "dtype": "fp32"},
        "prompts": {"source": "shapes_train"},
        "rewards": [{"name": "shapes"}],
        "sampling": {"steps": 8, "guidance_scale": 3.0},
        "prompts_per_step": 32,
        "batch": 16,
    },
    "shapes_flow": {
        "model": {"path": "assets:shapes_flow", "dtype": "fp32", "max_sequence_length": 1},
        "prompts": {"source": "shapes_train"},
        "rewards": [{"name": "shapes"}],
        "sampling": {"steps": 8, "noise": "sde", "eta": 0.7, "guidance_scale": 3.0},
        "prompts_per_step": 32,
        "batch": 16,
    },
    "sd15": REAL
    | {
        "model": {"random_init": "sd15", "dtype": "bf16"},
        "sampling": {"steps": 10, "guidance_scale": 5.0},
        "prompts_per_step": 32,
        "batch": 16,
    },
    "sd2": REAL
    | {
        "model": {"random_init": "sd2", "dtype": "bf16"},
        "sampling": {"steps": 10, "guidance_scale": 5.0},
        "prompts_per_step": 16,
        "batch": 8,
    },
    "sdxl": REAL
    | {
        "model": {"random_init": "sdxl", "dtype": "bf16"},
        "sampling": {"steps": 5, "guidance_scale": 5.0},
        "prompts_per_step": 8,
        "batch": 4,
        "memory": {"gradient_checkpointing": True},
    },
}
FLOWS = ("shapes_flow",)  # of these, the models without a UNet
LORA_RANK = 4  # TRL's, which cannot be set


def case_config(model: str, adapter: str, overrides=()) -> Config:
    """The configuration of a case; raises ``UserError`` where it or an override does not fit."""
    values = COMMON | {key: value for key, value in MODELS[model].items() if key != "batch"}
    batch = MODELS[model]["batch"]
    sizes = {"rollout_batch": batch, "update_batch": batch, "vae_batch": batch}
    values["memory"] = values.get("memory", {}) | sizes
    values["model"] = values["model"] | {"adapter": adapter, "lora": {"rank": LORA_RANK}}
    values["optimizer"] = {"lr": 3e-4 if adapter == "lora" else 1e-5}
    if "algorithm=noise_ppo" in overrides:  # which trains nothing of the model
        values["model"] = {key: value for key, value in values["model"].items() if key not in ("adapter", "lora")}
        values["memory"] = {key: value for key, value in values["memory"].items() if key in ("rollout_batch", "vae_batch")}
    return parse_config(apply_overrides(values, list(overrides)), f"{model}, {adapter}")


# --- what a worker runs ---------------------------------------------------------------------------------------------------


def work(system: str, path: Path) -> None:
    """Serves iterations of one system (worker.Server)."""
    server = Server()
    config = load_config(path)
    if not torch.cuda.is_available():
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    (serve_baseline if system == "baseline" else serve_fastloop)(config, server)


def serve_fastloop(config: Config, server: Server) -> None:
    from fastloop.noise_trainer import NoiseTrainer
    from fastloop.observer import Observer
    from fastloop.trainer import Trainer

    charged = {"gradients": "loss", "step": "optimizer"} | {
        name: name for name in ("encode", "rollout", "decode", "reward", "backward")
    }

    class Ordered(Observer):
        """Waits for the order of each iteration, and times its phases."""

        answers = False

        def phase(self, name: str):
            return server.phases.within(charged[name]) if name in charged else super().phase(name)

        def on_iteration(self, number: int) -> None:
            if self.answers:
                server.answer()
            if not server.wait():
                sys.exit()
            self.answers = True

    left_out = ("checkpoints", "evaluation", "export", "report")  # what is no part of an iteration
    (NoiseTrainer if config.trains_noise else Trainer)(config, observer=Ordered(), leave_out=left_out).train()


def serve_baseline(config: Config, server: Server) -> None:
    from baseline_flow import FlowPPO
    from baseline_ppo import BaselinePPO, load_pipeline, settings_of

    from fastloop.engines.torch import pick_device
    from fastloop.prompts import PromptStream
    from fastloop.rewards.scoring import Rewards

    if config.images_per_prompt > 1:
        raise UserError("images_per_prompt: the baseline draws one image for each prompt")
    pipe = load_pipeline(config.model, pick_device("auto"))
    prompts = load_prompts(config.prompts)
    known = {prompt.text: prompt for prompt in prompts}
    settings = settings_of(config)
    kind = FlowPPO if hasattr(pipe, "transformer") else BaselinePPO
    trainer = kind(pipe, lambda images, texts: rewards.score(images, [known[t] for t in texts]).total, settings)
    rewards = Rewards(config.rewards, prompts, (trainer.side, trainer.side))
    for method in ("encode", "decode", "loss", "backward"):
        server.phases.watch(trainer, method, method)
    server.phases.watch(trainer, "sample", "rollout")
    server.phases.watch(trainer, "score", "reward")
    server.phases.watch(trainer, "optimizer_step", "optimizer")
    stream, i = PromptStream(prompts, config.seed), 0
    while server.wait():
        trainer.iteration([prompt.text for prompt in stream.draw(i * settings.images, settings.images)])
        server.answer()
        i += 1
    rewards.close()


# --- what starts a worker -------------------------------------------------------------------------------------------------


def command_of(system: str, model: str, adapter: str, overrides: list[str], folder: Path, args) -> list[str]:
    """What starts a worker. Raises ``UserError`` where the system cannot do the case."""
    if system == "trl":
        if not for_peer(model):
            raise UserError("TRL's DDPOTrainer has Stable Diffusion 1.x and 2.x alone")
        case = peer_case(case_config(model, adapter, overrides), folder / "pipeline", args.threads)
        return [str(args.peer_python), str(HERE / "peer_trl.py"), json.dumps(case)]
    own = [f"output_dir={folder / system}"]
    config = case_config(model, adapter, [*overrides, *(SYSTEMS[system] or []), *own])
    (folder / f"{system}.yaml").write_text(dump_config(config))
    return [sys.executable, str(HERE / "throughput.py"), "--work", system, "--config", str(folder / f"{system}.yaml")]


def for_peer(model: str) -> bool:
    """Say whether TRL's trainer has this model."""
    return model not in ("sdxl", *FLOWS)


def peer_case(config: Config, folder: Path, threads: int) -> dict:
    """What bench/peer_trl.py needs to know."""
    return {
        "folder": str(folder),
        "adapter": config.model.adapter,
        "dtype": config.model.dtype,
        "prompts": [prompt.text for prompt in load_prompts(config.prompts)],
        "reward": config.rewards[0].name,
        "steps": config.sampling.steps,
        "guidance_scale": config.sampling.guidance_scale,
        "images": config.images_per_rollout,
        "batch": config.memory.rollout_batch,
        "updates": config.updates_per_rollout,
        "lr": config.optimizer.lr,
        "clip_range": config.clip_range,
        "gradient_checkpointing": bool(config.memory.gradient_checkpointing),
        "threads": threads,
    }


def save_for_peer(config: Config, folder: Path) -> None:
    """The model as a pipeline folder that older libraries read: an export, with the tokenizer's words in the files of CLIP."""
    from fastloop.denoisers import load_denoiser

    model = config.model.model_copy(update={"adapter": "full", "dtype": "fp32"})
    load_denoiser(model, torch.device("cpu")).export(folder)
    tokenizer = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["merges"]]
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


class Worker:
    """A process that serves iterations of a system."""

    def __init__(self, system: str, command: list[str], log: Path, threads: int) -> None:
        self.system, self.log = system, log
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with open(log, "w") as file:
            self.process = subprocess.Popen(command, env=env, stderr=file, **pipes)

    def iterate(self, order: str = "go") -> dict:
        """One iteration. Raises ``RuntimeError`` with the worker's last words where it has died."""
        try:
            print(order, file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.close()
            lines = [line.strip() for line in self.log.read_text().splitlines() if line.strip()]
            raise RuntimeError(lines[-1][:300] if lines else f"exit code {self.process.returncode}")
        return json.loads(answer)

    def close(self) -> None:
        """Lets it end, and waits for that."""
        if not self.process.stdin.closed:
            with suppress(BrokenPipeError):
                self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
