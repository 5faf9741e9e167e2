"""The command line: `lnp demo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lnp import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    parser = argparse.ArgumentParser(
        prog="lnp", description="Where in the spectrum of the neural tangent kernel a network learns."
    )
    parser.add_argument("--version", action="version", version=f"lnp {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train a ladder of networks on digits and watch where they learn")
    demo.add_argument("--framework", choices=["jax", "torch"], help="default: the first that is installed")
    demo.add_argument(
        "--out", type=Path, default=Path("lnp-demo"), help="folder for figure and history (default: lnp-demo)"
    )
    demo.add_argument("--steps", type=int, default=300, help="training steps of each network (default: 300)")
    demo.add_argument("--seeds", type=int, default=3, help="repetitions, for the error bars (default: 3)")
    options = parser.parse_args(arguments)
    if options.steps < 3 or options.seeds < 1:
        parser.error(f"received --steps {options.steps} --seeds {options.seeds}; expected at least 3 steps and 1 seed")
    try:
        return _demo(options)
    except (ImportError, OSError) as error:
        print(f"lnp: {error}", file=sys.stderr)
        return 1


def _demo(options: argparse.Namespace) -> int:
    from lnp.demo import Settings
    from lnp.demo.screen import show

    options.out.mkdir(parents=True, exist_ok=True)
    show(replace(Settings(), framework=options.framework, steps=options.steps, seeds=options.seeds), options.out)
    return 0
