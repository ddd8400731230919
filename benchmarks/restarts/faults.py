"""Kill a small run, start it again, and compare it batch by batch with an undisturbed one.

    python -m benchmarks.restarts.faults [--kills 40] [--seed 0] [--processes 2]
        [--out benchmarks/results/faults-cpu.txt]

The run is killed once at each named point of crash.py, then ``--kills`` times at random: after a random step and delay,
one process, the launcher, or all at once, by SIGKILL, SIGTERM or SIGINT. Each time the same command is started again,
until the run is finished. Wikipedia leads, 2 layers of 24, dropout, accumulation, a loader worker, evaluation between
steps; on the CPU. A launch takes 10 to 20 s, nearly all of it imports.

Prints a line per kill; then the kills, those after which the run continued, steps that the metrics file lacks or has
twice, losses that differ in any bit, and runs with other final weights. If there are any, the exit status is 1.
"""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch

import convert_c4
from benchmarks import report
from benchmarks.restarts.crash import POINTS
from benchmarks.texts import make_tokenizer, write_json_lines
from scripts import quickstart
from src.train import checkpoint

STEPS, SAVE = 100, 4
KILLS_A_RUN = 8


def make_data(folder: Path) -> list[str]:
    """Tokenizer and shards of 300 training and 90 validation documents; returns the run's options."""
    documents = list(itertools.islice(quickstart.default_documents(), 390))
    tokenizer = make_tokenizer(folder, documents[:300], 1000)
    write_json_lines(folder / "val.jsonl", documents[300:])
    for split in ("train", "val"):
        tokens = ["--tokenizer", tokenizer, "--max_seq_len", "32", "--pack", "truncate", "--num_workers", "1"]
        source = ["--splits", split, "--source", str(folder / f"{split}.jsonl")]
        convert_c4.main(["--out_root", str(folder / "mds"), *source, *tokens])
    options = f"""
        max_seq_len=32 train_loader.num_workers=1 max_duration={STEPS}ba eval_interval=10ba progress_bar=false
        model.model_config.hidden_size=24 model.model_config.num_hidden_layers=2
        model.model_config.num_attention_heads=3 model.model_config.intermediate_size=40
        model.model_config.hidden_dropout_prob=0.1 global_train_batch_size=16 device_train_microbatch_size=4
        save_interval={SAVE}ba save_num_checkpoints_to_keep=2 save_overwrite=false autoresume=true
    """
    return [f"data_local={folder}/mds", f"tokenizer_name={tokenizer}", *options.split()]


class Run:
    """A run in its own folder, launched until it ends."""

    def __init__(self, folder: Path, options: list[str], world_size: int):
        self.folder = folder
        self.folder.mkdir()
        outputs = [f"save_folder={folder}", f"loggers.metrics_file.path={folder}/metrics.jsonl"]
        outputs.append(f"loggers.tensorboard.log_dir={folder}/tensorboard")
        launcher = [sys.executable, "-m", "composer.cli.launcher", "-n", str(world_size)]
        self.command = [*launcher, "-m", "benchmarks.restarts.crash", "yamls/quickstart.yaml", *options, *outputs]

    def launch(self, point: str | None = None) -> subprocess.Popen:
        env = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"CRASH": point} if point else {})
        with (self.folder / "output.txt").open("a") as output:
            return subprocess.Popen(self.command, stdout=output, stderr=output, env=env, start_new_session=True)

    def losses(self) -> list[tuple[int, float]]:
        """Step and loss of each metrics line that has a loss."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        read = [json.loads(line) for line in lines if line.endswith("}")]
        return [(line["batch"], line["loss/train/total"]) for line in read if "loss/train/total" in line]

    def reached(self) -> int:
        return max((step for step, _ in self.losses()), default=0)

    def saved(self) -> int:
        """Step of the checkpoint that the next launch resumes."""
        latest = self.folder / checkpoint.LATEST.format(rank=0)
        match = checkpoint.PATTERN.fullmatch(Path(os.readlink(latest)).name) if latest.is_symlink() else None
        return int(match["step"]) if match else 0

    def weights(self) -> torch.Tensor:
        model = torch.load(self.folder / checkpoint.LATEST.format(rank=0), mmap=True)["state"]["model"]
        return torch.cat([value.flatten() for value in model.values()])


def kill_at_random(launcher: subprocess.Popen, draw: random.Random) -> str:
    """Send a random signal; returns what was sent to whom."""
    number = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    target = draw.choice(["a process", "the launcher", "all"])
    ranks = sorted(child.pid for child in psutil.Process(launcher.pid).children())
    if target == "all":
        os.killpg(launcher.pid, number)
    else:
        os.kill(draw.choice(ranks) if target == "a process" and ranks else launcher.pid, number)
    return f"{number.name} to {target}"


def disturb(run: Run, part: str | int, draw: random.Random) -> tuple[subprocess.Popen, str]:
    """Launch, and kill at a named point, or at random some steps after the last checkpoint; returns what was done."""
    if isinstance(part, str):
        return run.launch(part), part
    started, until = time.time(), run.saved() + part
    launcher, metrics = run.launch(), run.folder / "metrics.jsonl"
    while launcher.poll() is None:
        if metrics.exists() and metrics.stat().st_mtime > started and run.reached() >= until:  # not the last launch's
            break
        time.sleep(0.005)
    time.sleep(draw.random() * 0.1)
    return launcher, kill_at_random(launcher, draw) if launcher.poll() is None else "nothing"


def main(argv: list[str]) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--kills", type=int, default=40, help="random kills, in addition to one at each named point")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, help="file for what is printed")
    args, say = parser.parse_args(argv), report.Printed()
    say(f"# {report.described(report.machine('cpu'))}; --kills {args.kills} --seed {args.seed}")
    checkpoint.load_as_data()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = make_data(folder)
        whole = Run(folder / "whole", options, args.processes)
        if whole.launch().wait():
            sys.exit((whole.folder / "output.txt").read_text())
        want, weights = dict(whole.losses()), whole.weights()

        steps = [draw.randint(1, STEPS // KILLS_A_RUN) for _ in range(args.kills)]
        at_random = [steps[start : start + KILLS_A_RUN] for start in range(0, args.kills, KILLS_A_RUN)]
        plans: list[list[Any]] = [[*POINTS], *at_random]
        kills = survived = lost = repeated = differing = other_weights = 0
        for i, plan in enumerate(plans):
            run, done = Run(folder / f"run{i}", options, args.processes), 0
            for part in plan:
                before = run.saved()
                launcher, what = disturb(run, part, draw)
                code = launcher.wait(timeout=300)
                say(f"{what}: exit {code}, step {run.reached()} reached, step {run.saved()} saved")
                done += code != 0  # else the run ended before the kill
                if run.saved() < before:
                    sys.exit(f"a checkpoint was lost\n{(run.folder / 'output.txt').read_text()}")
            code = run.launch().wait()
            if code:
                print((run.folder / "output.txt").read_text(), file=sys.stderr)
            kills, survived = kills + done, survived + (done if code == 0 else 0)
            counts, got = Counter(step for step, _ in run.losses()), dict(run.losses())
            lost += sum(step not in counts for step in want)
            repeated += sum(count - 1 for count in counts.values())
            differing += sum(step in got and got[step] != loss for step, loss in want.items())
            other_weights += code != 0 or not torch.equal(run.weights(), weights)
        say(f"runs={len(plans)} of {STEPS} steps, {args.processes} processes; final weights differing: {other_weights}")
        say(f"faults {kills=} {survived=} batches_lost={lost} batches_repeated={repeated} losses_differing={differing}")
        say.write(args.out)
        sys.exit(0 if survived == kills and not lost + repeated + differing + other_weights else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
