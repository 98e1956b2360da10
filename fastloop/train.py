"""Entry of ``deepspeed fastloop/train.py --config CONFIG [key=value ...]``, as launchers want it: `fastloop train`."""

from __future__ import annotations

import argparse
import atexit
import os
import sys

from fastloop import cli
from fastloop.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Parse, train, and return the exit code."""
    parser = cli.Parser(prog="fastloop/train.py", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file, such as configs/shapes_loop.yaml")
    parser.add_argument("--resume", action="store_true", help="go on with the run in output_dir, or start it")
    parser.add_argument("--profile", action="store_true", help="profile the second iteration into the run's folder")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # of deepspeed's launcher, which also sets LOCAL_RANK
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as sampling.steps=20")
    try:
        args = parser.parse_intermixed_args(argv)
    except UserError as error:
        return cli.fail(str(error), 2)
    options = [*["--resume"] * args.resume, *["--profile"] * args.profile]
    return cli.main(["train", args.config, *args.overrides, *options])


def leave(code: int) -> None:
    """End this process with an exit code, without taking the interpreter apart.

    While that is done, after a run that was whole, a rank aborts now and then ("terminate called without an active
    exception"), and its launcher reports a failure: one of 18 in a trial of ranks that only met, with no Python left to run.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
