"""The command line: ``fastloop train | plan | sample | eval | score | serve-reward | report | info``.

Exit codes: 0 done; 1 the run failed; 2 bad input; 130 and 143 stopped by SIGINT and SIGTERM with a checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

# What the libraries log would stand beside our one line; what they raise is in it.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")
os.environ.setdefault("HF_HUB_VERBOSITY", "critical")

from fastloop.errors import RunFailed, UserError, one_line
from fastloop.recipes import load_config

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on some CPUs it misses an optional package when imported


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        args, rest = _parser().parse_known_args(argv)
        # argparse leaves over what stands behind an option: CONFIG --resume KEY=VALUE
        odd = [text for text in rest if text.startswith("-") or not hasattr(args, "overrides")]
        if odd:
            raise UserError(f"unknown argument {odd[0]}: see fastloop --help")
        if rest:
            args.overrides = [*args.overrides, *rest]
        return args.run(args)
    except UserError as error:
        return fail(str(error), 2)
    except RunFailed as error:
        return fail(str(error), 1)
    except KeyboardInterrupt:
        return fail("interrupted", 130)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as everything else does."""

    def error(self, message: str) -> None:
        """Raise ``UserError`` with the message, where argparse would print the usage and leave."""
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="fastloop", description="LOOP fine-tuning of text-to-image diffusion models")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a model")
    train.add_argument("config", metavar="CONFIG", help="YAML file, such as configs/shapes_demo.yaml")
    train.add_argument("--resume", action="store_true", help="go on with the run in output_dir, or start it")
    train.add_argument("--profile", action="store_true", help="profile the second iteration into RUN/profile")
    train.set_defaults(run=_train)

    plan = commands.add_parser("plan", help="derived numbers, parameters and memory of a run; loads no weights")
    plan.add_argument("config", metavar="CONFIG")
    plan.add_argument("--ranks", type=int, default=1, help="processes of the run (default: 1)")
    plan.add_argument("--gpu", action="store_true", help="plan for a GPU, though there is none here")
    plan.add_argument("--it-per-s", type=float, help="UNet forwards a second at batch 1: also say how long it takes")
    plan.set_defaults(run=_plan)

    sample = commands.add_parser("sample", help="draw pictures with a base model or a run")
    sample.add_argument("config", metavar="CONFIG_OR_RUN", help="a YAML file for the base model, or a run folder")
    sample.add_argument("--prompt", action="append", required=True, help="may be given more than once")
    sample.add_argument("--images", type=int, default=4, help="per prompt (default: 4)")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--out", type=Path, default=Path("samples"), help="folder (default: samples)")
    sample.set_defaults(run=_sample)

    evaluate = commands.add_parser("eval", help="score on the evaluation prompts, per category, with standard errors")
    evaluate.add_argument("config", metavar="CONFIG_OR_RUN", help="a YAML file for the base model, or a run folder")
    evaluate.add_argument("--json", type=Path, help="also write the numbers to this file")
    evaluate.set_defaults(run=_eval)

    score = commands.add_parser("score", help="try a reward on pictures")
    score.add_argument("--reward", metavar="NAME", required=True, help="a built-in reward, or MODULE:FUNCTION")
    score.add_argument("images", metavar="IMAGE", nargs="+", type=Path)
    score.add_argument("--prompt", action="append", default=[], help="one for all pictures, or once for each")
    score.add_argument("--params", action="append", default=[], metavar="KEY=VALUE", help="may be given more than once")
    score.set_defaults(run=_score)

    serve = commands.add_parser("serve-reward", help="serve the rewards of a configuration over HTTP")
    serve.add_argument("config", metavar="CONFIG", help="a YAML file; its rewards are served, as a weighted sum")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    serve.add_argument("--port", type=int, default=8000, help="0: a free one (default: 8000)")
    serve.add_argument("--token-env", metavar="NAME", help="environment variable with a token that requests must carry")
    serve.add_argument("--max-mb", type=int, default=64, help="largest request (default: 64)")
    serve.add_argument(
        "--timeout", type=float, default=300.0, help="seconds for one batch, of rewards without their own (default: 300)"
    )
    serve.set_defaults(run=_serve_reward)

    report = commands.add_parser("report", help="make a run's report.html anew")
    report.add_argument("folder", metavar="RUN", type=Path)
    report.set_defaults(run=_report)

    info = commands.add_parser("info", help="what this machine can do")
    info.set_defaults(run=_info)

    for command in (train, plan, sample, evaluate, serve):
        command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as sampling.steps=20")
    return parser


def _train(args: argparse.Namespace) -> int:
    from fastloop.ranks import Ranks

    with Ranks.join() as ranks:
        return _train_on(ranks, args)


def _train_on(ranks, args: argparse.Namespace) -> int:
    from fastloop.batches import Batches
    from fastloop.noise_trainer import NoiseTrainer
    from fastloop.observer import UNOBSERVED
    from fastloop.plan import caution_lines, derived_lines, prompts_line
    from fastloop.prompts import score_name
    from fastloop.stopping import Stopped
    from fastloop.tracing import Profile
    from fastloop.tracking import read_rows
    from fastloop.trainer import Trainer

    config = load_config(args.config, args.overrides)
    profile = Profile(config) if args.profile else UNOBSERVED
    trainer = (NoiseTrainer if config.trains_noise else Trainer)(config, args.resume, ranks, profile)
    if ranks.main:
        print(prompts_line(trainer.prompts.prompts, trainer.eval_prompts))
        for line in trainer.cut:
            print(f"warning      {line}")
        batches = Batches(trainer.config, trainer.steps_trained, ranks.world)
        print(*caution_lines(trainer.denoiser), *derived_lines(batches, trainer.denoiser), sep="\n")
        if trainer.compiling:
            print(trainer.compiling)
        if trainer.iteration:
            print(f"resuming after iteration {trainer.iteration}")
        if trainer.not_carried_over:
            print(f"  not carried over: {trainer.not_carried_over}; the weights and all else are")
        if args.profile and trainer.iteration < config.iterations:
            print(f"profile      of one iteration, in {profile.folder}")
    try:
        folder = trainer.train()
    except Stopped as stop:
        if ranks.main:
            print(f"{stop}; --resume goes on from {trainer.folder}")
        return 130 if stop.signal_name == "SIGINT" else 143
    if not ranks.main:
        return 0
    scores = [row["score"] for row in read_rows(folder / "eval.jsonl")]
    first, last = scores[0], scores[-1]
    print(
        f"done: {folder}\n"
        f"  {score_name(trainer.held_out):18}{first['mean']:.3f} ± {first['stderr'] or 0:.3f} before, "
        f"{last['mean']:.3f} ± {last['stderr'] or 0:.3f} after\n"
        f"  {'report':18}{folder / 'report.html'}\n"
        f"  {'weights':18}{folder / 'export'}"
    )
    return 0


def _plan(args: argparse.Namespace) -> int:
    from fastloop.plan import plan

    if args.ranks < 1:
        raise UserError("--ranks: at least 1")
    if args.it_per_s is not None and not 0 < args.it_per_s < float("inf"):
        raise UserError("--it-per-s: a number above 0")
    print("\n".join(plan(load_config(args.config, args.overrides), args.ranks, args.gpu, args.it_per_s)))
    return 0


def _sample(args: argparse.Namespace) -> int:
    import torch
    from PIL import Image

    from fastloop.batches import evaluation_batch
    from fastloop.evaluation import EVAL_STREAM
    from fastloop.grids import image_grid
    from fastloop.rollout import rollout, sampler_table
    from fastloop.runs import open_model

    if args.images < 1 or not 0 <= args.seed < 2**32:
        raise UserError("--images: at least 1" if args.images < 1 else "--seed: 0 to 4294967295")
    config, load = open_model(args.config, args.overrides)
    table = sampler_table(config.model, config.eval_sampling)
    _probe("--out", args.out, make=True)
    prompts = [prompt for prompt in args.prompt for _ in range(args.images)]
    denoiser = load()
    for prompt in denoiser.cut(args.prompt, denoiser.tokenizers):
        print(f"warning: the text encoders do not see the end of {one_line(prompt)[:120]!r}, which has too many tokens")
    sampled = rollout(
        denoiser,
        table,
        prompts,
        torch.arange(len(prompts)),
        sampling=config.eval_sampling,
        seed=EVAL_STREAM | args.seed,
        batch=evaluation_batch(config, denoiser, config.memory.rollout_batch),
        vae_batch=config.memory.vae_batch,
        backend=config.kernels,
        keep="none",
    )
    for i, image in enumerate(sampled.images):
        Image.fromarray(image).save(args.out / f"{i // args.images:02d}_{i % args.images:02d}.png")
    grid = args.out / "grid.png"
    image_grid(list(sampled.images), prompts, columns=args.images).save(grid)
    print(f"{len(prompts)} pictures in {args.out}, all of them in {grid}")
    return 0


def _eval(args: argparse.Namespace) -> int:
    import json

    from fastloop.denoisers import build_skeleton
    from fastloop.evaluation import evaluate
    from fastloop.prompts import load_prompts
    from fastloop.rewards.scoring import Rewards
    from fastloop.rollout import sampler_table
    from fastloop.runs import open_model
    from fastloop.tracking import plain

    if args.json:
        if args.json.is_dir():
            raise UserError(f"--json: {args.json} is a folder: give a file")
        _probe("--json", args.json.parent)
    config, load = open_model(args.config, args.overrides)
    prompts = load_prompts(config.eval.prompts, "eval.prompts")
    sampler_table(config.model, config.eval_sampling)  # refuses what it must before the model loads
    size = build_skeleton(config.model).image_size(config.eval_sampling)
    own = config.eval.rewards
    rewards = Rewards(own or config.rewards, prompts, size, "eval.rewards" if own else "rewards")
    rewards.start()
    result = evaluate(load(), config, prompts, rewards)
    rewards.close()
    row = result.row()
    parts = {**row["categories"], **(row["rewards"] if len(row["rewards"]) > 1 else {}), "all": row["score"]}
    width = max(map(len, parts))
    print(f"{'':{width}}   score  stderr  prompts x {config.eval.images_per_prompt} images")
    for name, part in parts.items():
        print(f"{one_line(name):{width}}  {part['mean']:6.3f}  {part['stderr']:6.3f}  {part['n']}")
    if args.json:
        args.json.write_text(json.dumps(plain(row), indent=1, allow_nan=False))
    return 0


def _score(args: argparse.Namespace) -> int:
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    from fastloop.config import RewardConfig
    from fastloop.prompts import Prompt
    from fastloop.recipes import apply_overrides
    from fastloop.rewards.scoring import Rewards

    if len(args.prompt) not in (0, 1, len(args.images)):
        raise UserError(f"--prompt: {len(args.prompt)} prompts for {len(args.images)} pictures: give one, or one for each")
    texts = args.prompt if len(args.prompt) > 1 else (args.prompt or [""]) * len(args.images)
    config = RewardConfig(name=args.reward, params=apply_overrides({}, args.params))
    images = []
    for path in args.images:
        try:
            with Image.open(path) as image:
                images.append(np.asarray(image.convert("RGB")))
        except (OSError, ValueError, UnidentifiedImageError) as error:
            raise UserError(f"{path}: {getattr(error, 'strerror', None) or 'no picture'}") from None
    rewards = Rewards([config], [], None, "--reward")
    rewards.start()
    prompts = [Prompt(text) for text in texts]
    try:
        rewards.validate_any(images, prompts)
    except ValueError as error:
        raise UserError(f"--prompt: {error}") from None
    values = rewards.score_any(images, prompts)
    for value, path, image, text in zip(values, args.images, images, texts, strict=True):
        note = rewards.explain(image, text)
        print(f"{value:12.6g}  {one_line(path)}{f'  {one_line(note)}' if note else ''}")
    rewards.close()
    return 0


def _serve_reward(args: argparse.Namespace) -> int:
    from fastloop.rewards.remote import read_token
    from fastloop.rewards.scoring import Rewards
    from fastloop.rewards.server import serve

    config = load_config(args.config, args.overrides)
    if args.max_mb < 1 or not 0 <= args.port < 2**16:
        raise UserError("--max-mb: at least 1" if args.max_mb < 1 else "--port: 0 to 65535")
    if not 0 < args.timeout < float("inf"):
        raise UserError("--timeout: a number of seconds above 0")
    try:
        token = None if args.token_env is None else read_token(args.token_env)
    except ValueError as error:
        raise UserError(f"--token-env: {error}") from None
    # whoever asks must be answered, so here no reward may take for ever
    bounded = [r if r.timeout is not None else r.model_copy(update={"timeout": args.timeout}) for r in config.rewards]
    rewards = Rewards(bounded, [], None)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes of rewards end with this one
    try:
        serve(rewards, args.host, args.port, token, args.max_mb * 2**20)
    finally:
        rewards.close()
        signal.signal(signal.SIGTERM, before)
    return 0


def _probe(option: str, folder: Path, make: bool = False) -> None:
    """Refuses a folder that cannot be written, before the work whose result it is for."""
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        raise UserError(f"{option}: cannot write to {folder}: {getattr(error, 'strerror', None) or error}") from None


def _report(args: argparse.Namespace) -> int:
    from fastloop.report import write_report

    try:
        print(write_report(args.folder))
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from None
    return 0


def _info(args: argparse.Namespace) -> int:
    from fastloop.machine import capabilities

    rows = capabilities()
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:{width}}  {value}" for name, value in rows))
    return 0


def fail(message: str, code: int) -> int:
    """Print what went wrong as one line and return the exit code."""
    print(f"fastloop: {one_line(message)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
