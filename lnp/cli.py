"""The command line: `lnp demo`, `lnp plot`, `lnp compare`, `lnp measure`, `lnp watch`, `lnp report`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lnp import __version__
from lnp.checkpoints import command
from lnp.printable import printable

if TYPE_CHECKING:
    from lnp.tracking.history import History

LINES = "\n"
LEFT = 128 + 13
"""The status of a program that a closed pipe ends, SIGPIPE."""
RUNS = "files that trackers wrote, or folders of them"


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
    plot = commands.add_parser("plot", help="draw runs on one page")
    plot.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=RUNS)
    plot.add_argument("--out", type=Path, default=Path("lnp.png"), help="PNG, PDF or SVG (default: lnp.png)")
    plot.add_argument("--title", help="default: the run's name")
    compare = commands.add_parser("compare", help="runs next to each other: loss, reach, where each factor stalls")
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=RUNS)
    compare.add_argument("--out", type=Path, help="also draw them, to this PNG, PDF or SVG file")
    command.add_arguments(commands.add_parser("measure", help="measure the saved checkpoints of runs that are over"))
    watch = commands.add_parser("watch", help="follow runs while they go on")
    watch.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=RUNS)
    watch.add_argument("--every", type=float, default=2.0, help="seconds between two looks (default: 2)")
    watch.add_argument("--once", action="store_true", help="show them once, and end")
    report = commands.add_parser("report", help="one page for a browser, that needs no network")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=RUNS)
    report.add_argument("--out", type=Path, default=Path("lnp.html"), help="HTML file (default: lnp.html)")
    report.add_argument("--title", help="default: the run's name")
    options = parser.parse_args(arguments)
    if options.command == "demo" and (options.steps < 3 or options.seeds < 1):
        parser.error(f"received --steps {options.steps} --seeds {options.seeds}; expected at least 3 steps and 1 seed")
    run = {"demo": _demo, "plot": _plot, "compare": _compare, "watch": _watch, "report": _report}
    try:
        status = (run | {"measure": command.run})[options.command](options)
        sys.stdout.flush()  # or a reader that has left is met when Python ends
        return status
    except BrokenPipeError:  # `lnp compare runs | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return LEFT
    except (ImportError, KeyError, OSError, TypeError, ValueError) as error:
        # the text of a KeyError is its argument, in quotes
        reason = error.args[0] if isinstance(error, KeyError) else error
        print(f"lnp: {printable(str(reason), keep=LINES)}", file=sys.stderr)
        return 1


def _demo(options: argparse.Namespace) -> int:
    """Train, and show and write what was found."""
    from lnp.demo import Settings
    from lnp.demo.screen import show

    options.out.mkdir(parents=True, exist_ok=True)
    show(replace(Settings(), framework=options.framework, steps=options.steps, seeds=options.seeds), options.out)
    return 0


def _plot(options: argparse.Namespace) -> int:
    _draw(_read(options.runs), options.out, options.title)
    return 0


def _compare(options: argparse.Namespace) -> int:
    """Print the table of the runs, and draw them where a file was named."""
    from lnp.runs import ratios
    from lnp.runs.table import compare, to_text

    runs = _read(options.runs)
    print("\n\n".join(filter(None, (to_text(compare(runs)), ratios.to_text(runs)))))
    if options.out is not None:
        _draw(runs, options.out)
    return 0


def _watch(options: argparse.Namespace) -> int:
    """Follow the runs until Ctrl-C."""
    from lnp.views.watch import watch

    with contextlib.suppress(KeyboardInterrupt):
        watch(options.runs, options.every, options.once)
    return 0


def _report(options: argparse.Namespace) -> int:
    """Write the page."""
    from lnp.views.report import write_report

    write_report(_read(options.runs), options.out, options.title)
    print(f"Page: {printable(options.out)}")
    return 0


def _read(paths: Sequence[Path]) -> dict[str, History]:
    """The runs that have rows, read with a progress bar; a ValueError if there is none."""
    from lnp.progress import bar
    from lnp.runs.open_runs import named_files
    from lnp.tracking.history import History

    files = named_files(paths)
    with bar("reading", sum(path.stat().st_size for path in files.values())) as advance:
        runs = {name: History.read(path, report=advance) for name, path in files.items()}
    empty = [name for name, run in runs.items() if not len(run)]
    if empty:
        print(f"lnp: nothing has been measured yet in {', '.join(empty)}", file=sys.stderr)
    if len(empty) == len(runs):
        raise ValueError("no measurements to show. Expected files that trackers wrote.")
    return {name: run for name, run in runs.items() if len(run)}


def _draw(runs: dict[str, History], out: Path, title: str | None = None) -> None:
    """Write the page of the runs to a file."""
    from lnp import plot

    out.parent.mkdir(parents=True, exist_ok=True)
    plot.dashboard(runs, title).savefig(out, dpi=160)
    print(f"Figure: {printable(out)}")
