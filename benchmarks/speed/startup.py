"""Start-up of a run: seconds from main.py's first line to the end of its first step, by part.

    python -m benchmarks.speed.startup [--runs 5] [--out FILE] [YAML key=value ...]

The default YAML is the quickstart's, whose data `make quickstart` makes. Each run is a new process, which stops
after its first step and saves nothing. The launcher's own start is not counted. Last line, of the fastest run:
``startup seconds=… imports=… build=… first_step=…``.
"""

import contextlib
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import report

PARTS = ("imports", "build", "first_step")
QUIET = ("save_folder=null", "loggers={}", "progress_bar=false", "autoresume=false")


def start(argv: list[str]) -> dict[str, float]:
    """Run main.py until its first step is done, in a new process; returns the seconds of PARTS."""
    times = [time.perf_counter()]
    import main
    from src.train import builders, run

    times.append(time.perf_counter())

    class Clock(builders.Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            times.append(time.perf_counter())

    class OneStep(builders.Trainer):
        def fit(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            self.state.callbacks.append(Clock())
            times.append(time.perf_counter())
            super().fit(duration="1ba")  # then it evaluates, which does not count

    builders.Trainer = OneStep
    run.print_evaluation = lambda trainer: None
    with contextlib.redirect_stdout(sys.stderr):
        main.run([*argv, *QUIET, "eval_interval=1000000ba"])
    return dict(zip(PARTS, (b - a for a, b in itertools.pairwise(times)), strict=True))


def main(argv: list[str]) -> None:
    """Print the parts of each run, and the fastest."""
    parser = report.parser(__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, help="file for what is printed")
    parser.add_argument("run", nargs="*", default=["yamls/quickstart.yaml"], metavar="YAML key=value")
    args = parser.parse_args(argv)

    output = report.Printed()
    output(f"# {report.described(report.machine('cpu'))}; {' '.join(args.run)}")
    runs = []
    for number in range(args.runs):
        runs.append(report.in_new_process(start, args.run))
        parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in runs[-1].items())
        output(f"run {number + 1}: {sum(runs[-1].values()):.2f} s: {parts}")
    output(f"median {statistics.median(sum(run.values()) for run in runs):.2f} s")
    best = min(runs, key=lambda run: sum(run.values()))
    fields = " ".join(f"{name}={seconds:.2f}" for name, seconds in best.items())
    output(f"startup seconds={sum(best.values()):.2f} {fields}")
    output.write(args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
