"""The command line: list, run, report."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .registry import BENCHMARKS, PEERS, PROBLEMS, Benchmark, BenchmarkError, Settings, discover, names, need, unknown
from .report import page, show, write_json
from .timing import machine

__all__ = ["main", "parser"]

discover()

RESULTS = Path(__file__).parent / "results"


def usual_times() -> str:
    """Each benchmark with its summary and usual time, for --help and `list`."""
    lines = []
    for entry in BENCHMARKS.values():
        lines.append(f"  {entry.name:16s} {entry.summary}\n{'':19s}usually {entry.usual_time}; --quick {entry.quick_time}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The argument parser; its help states each benchmark's usual time."""
    plain = argparse.RawDescriptionHelpFormatter
    about = f"benchmarks, on two cores:\n{usual_times()}"
    top = argparse.ArgumentParser("python -m benchmarks", description="Measure the solvers.", epilog=about, formatter_class=plain)
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the benchmarks, problems and peers")
    run = commands.add_parser("run", help="run one: table, JSON, picture", epilog=about, formatter_class=plain)
    run.add_argument("name", help="a benchmark, as `list` names them")
    run.add_argument("--methods", type=names, metavar="a,b", help="only these of our methods")
    run.add_argument("--peers", type=names, metavar="a,b", help="only these other solvers")
    run.add_argument("--problems", type=names, metavar="a,b", help="only these problems (stiff-diffusion, stiff-suite)")
    run.add_argument("--quick", action="store_true", help="a short version that shows that it works")
    run.add_argument("--full", action="store_true", help="the large problems, too")
    run.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    for name, about in own_options().items():
        run.add_argument(f"--{name}", metavar="V", help=about)
    run.add_argument("--json", type=Path, metavar="F", help="where the result goes (default benchmarks/results/NAME.json)")
    run.add_argument("--plot", type=Path, metavar="F", help="where the picture goes (default benchmarks/results/NAME.png)")
    report = commands.add_parser("report", help="one self-contained HTML page from a folder of results")
    report.add_argument("folder", type=Path, metavar="DIR")
    return top


def own_options() -> dict[str, str]:
    """The names of all options that only some benchmarks have, with what they are for."""
    found: dict[str, str] = {}
    for entry in BENCHMARKS.values():
        for option in entry.options:
            default = "" if option.default is None else f", default {option.default}"
            found[option.name] = f"{found.get(option.name, '')}{entry.name}: {option.about}{default}. "
    return found


def chosen_options(entry: Benchmark, arguments: argparse.Namespace) -> dict[str, Any]:
    """The values of the entry's own options; raises BenchmarkError for those of others."""
    own = {option.name: option for option in entry.options}
    given = {name: getattr(arguments, name.replace("-", "_")) for name in own_options()}
    for name, text in given.items():
        if text is not None and name not in own:
            raise BenchmarkError(f"{entry.name} has no --{name}; leave it out")
    return {name: option.value(given[name]) for name, option in own.items()}


def show_list() -> None:
    """Print what is registered."""
    print(f"benchmarks:\n{usual_times()}\n\nproblems of stiff-diffusion:")
    for name, build in PROBLEMS.items():
        print(f"  {name:16s} {build.__doc__.splitlines()[0]}")
    for entry in BENCHMARKS.values():
        if entry.problems is not None:
            print(f"\nproblems of {entry.name}:\n  {', '.join(entry.problems)}")
    print("\npeers:")
    for name, peer in PEERS.items():
        print(f"  {name:20s} {peer.absent or 'installed'}")


def check_device(device: str) -> None:
    """Raise BenchmarkError for a device that is not there."""
    import torch

    if device not in ("cpu", "cuda"):
        raise BenchmarkError(f"unknown device {device!r}: known: cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("torch sees no CUDA device here; leave --device out to run on the CPU")


def check(entry: Benchmark, settings: Settings) -> None:
    """Raise for names that do not exist and packages that are missing, before any work is done."""
    from solvers.methods import METHODS

    check_device(settings.device)
    need("rich")
    need("matplotlib")
    for name in settings.methods or ():
        if name not in METHODS:
            raise unknown("method", name, METHODS)
    PEERS.choose(settings.peers)
    (PROBLEMS if entry.problems is None else entry.problems).choose(settings.problems)
    if settings.peers is not None and not entry.takes_peers:
        raise BenchmarkError(f"{entry.name} has no choice of peers; leave --peers out")


def run(arguments: argparse.Namespace) -> None:
    """Run one benchmark; print its tables, write its JSON and picture."""
    entry = BENCHMARKS[arguments.name]
    common = (arguments.methods, arguments.peers, arguments.problems, arguments.quick, arguments.full, arguments.device)
    settings = Settings(*common, chosen_options(entry, arguments))
    check(entry, settings)
    plot = arguments.plot or RESULTS / f"{entry.name}.png"
    target = arguments.json or RESULTS / f"{entry.name}.json"
    started = time.perf_counter()
    result = entry.run(settings)
    show(result.tables)
    asked = asdict(settings)
    own = asked.pop("options")
    write_json(target, entry.name, {**asked, **own}, machine(), result, plot)
    entry.draw(result, plot)
    print(f"{entry.name}: {time.perf_counter() - started:.0f} s; wrote {target} and {plot}")


def main(arguments: list[str]) -> int:
    """Serve one command line; 2 for a request that cannot be served, with the reason on stderr."""
    chosen = parser().parse_args(arguments)
    try:
        if chosen.command == "list":
            show_list()
        elif chosen.command == "run":
            run(chosen)
        else:
            print(f"wrote {page(chosen.folder)}")
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
