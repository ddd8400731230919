"""Small runs of main.py for tests, in this process or launched."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import torch
from composer.core import Callback

from src.train.builders import build_trainer
from src.train.config import load
from tests.conftest import MAX_SEQ_LEN

QUICKSTART = "yamls/quickstart.yaml"
DROPOUT = "model.model_config.hidden_dropout_prob=0.1"
UNSAVED = ["save_folder=null", "autoresume=false"]
BIN = Path(sys.executable).parent


ADAMW = [
    "optimizer={name: adamw, lr: 3e-3, betas: [0.9, 0.98], eps: 1e-6, weight_decay: 0.01}",
    "scheduler.alpha_f=0.02",
]
"""Most tests train the quickstart's model with the reference's optimizer, and let the rate end above 0."""


def shipped(overrides):
    """The overrides for a YAML whose own optimizer and schedule are meant."""
    return [override for override in overrides if override not in ADAMW]


def tiny_run(token_shards, tokenizer_folder, folder):
    """Overrides for a run of 4 steps of 16 samples on the CPU, which writes to ``folder``."""
    return [
        "model.model_config.hidden_size=24",
        "model.model_config.num_hidden_layers=2",
        "model.model_config.num_attention_heads=3",
        "model.model_config.intermediate_size=40",
        "model.model_config.hidden_dropout_prob=0.0",
        f"data_local={token_shards}",
        f"tokenizer_name={tokenizer_folder}",
        f"max_seq_len={MAX_SEQ_LEN}",
        "train_loader.num_workers=0",
        "train_loader.num_canonical_nodes=1",
        "eval_loader.num_workers=0",
        "max_duration=4ba",
        "eval_interval=100ba",
        "global_train_batch_size=16",
        "device_train_microbatch_size=16",
        "device_eval_batch_size=32",
        "precision=fp32",
        "progress_bar=false",
        f"save_folder={folder}/checkpoints",
        "save_interval=2ba",
        f"loggers.metrics_file.path={folder}/metrics.jsonl",
        f"loggers.tensorboard.log_dir={folder}/tensorboard",
    ]


# In this process


class Killed(Exception):
    """Ends a run as a kill would: nothing of the running step is saved."""


class Watch(Callback):
    """Keeps losses by step and the last gradient; calls ``act``, by default a kill, at the end of step ``kill_at``."""

    def __init__(self, kill_at=None, act=None):
        self.by_step, self.gradient, self.kill_at, self.act = {}, None, kill_at, act

    @property
    def losses(self):
        return list(self.by_step.values())

    def after_train_batch(self, state, logger):
        self.gradient = flat(p.grad for p in state.model.parameters())

    def batch_end(self, state, logger):
        step = state.timestamp.batch.value
        self.by_step[step] = state.total_loss_dict["loss/train/total"]
        if step == self.kill_at:
            if self.act is None:
                raise Killed
            self.act()


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def weights_of(trainer):
    return flat(trainer.state.model.parameters())


def trainer_of(options, yaml=QUICKSTART):
    return build_trainer(load(str(yaml), options if yaml == QUICKSTART else shipped(options)))


def fit(options, kill_at=None, act=None, yaml=QUICKSTART):
    """The trainer after the run, its Watch, and the weights at the end."""
    trainer, watch = trainer_of(options, yaml), Watch(kill_at, act)
    trainer.state.callbacks.append(watch)
    with contextlib.suppress(Killed), contextlib.closing(trainer):
        trainer.fit()
    return trainer, watch, weights_of(trainer)


def losses_of(options, kill_at=None, act=None):
    """Losses by step, and the weights at the end."""
    _, watch, weights = fit(options, kill_at, act)
    return watch.by_step, weights


def evaluation(trainer):
    return {name: metric.compute().item() for name, metric in trainer.state.eval_metrics["eval"].items()}


def logged(folder):
    """The lines of a run's metrics file."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]  # the last may be half written


def change_tokenizer(folder, copy):
    """A copy of a tokenizer with two swapped ids."""
    shutil.copytree(folder, copy)
    words = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (copy / "tokenizer.json").write_text(json.dumps(words))
    return copy


# Launched


def environment(**variables):
    """Environment variables for a launcher."""
    return {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **{k: str(v) for k, v in variables.items()}}


def run_command(command, **options):
    """The ended process, with its output as text."""
    return subprocess.run(command, capture_output=True, text=True, **options)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def options_in(overrides, folder):
    return [*overrides, f"save_folder={folder}", f"loggers.metrics_file.path={folder}/metrics.jsonl"]


def start(place, options, folder, by_environment=True):
    """Launchers, each in a new session. ``place``: a number of processes on one node, or ``nodes`` for two nodes."""
    folder.mkdir(exist_ok=True, parents=True)
    arguments = ["main.py", QUICKSTART, *options_in(options, folder)]
    commands = [(["composer", "-n", str(place), *arguments], environment())]
    if place == "nodes":  # each with its own /dev/shm and TMPDIR, as two hosts have
        port, commands = free_port(), []
        for rank in range(2):
            tmp = folder / f"tmp{rank}"
            tmp.mkdir(exist_ok=True)
            apart = ["unshare", "-Urm", "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh", "composer"]
            node = {"WORLD_SIZE": 2, "NODE_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            flags = [] if by_environment else [x for k, v in node.items() for x in (f"--{k.lower()}", str(v))]
            env = environment(TMPDIR=tmp, **(node if by_environment else {}))
            commands.append(([*apart, "--nproc", "1", *flags, *arguments], env))
    output = (folder / "output.txt").open("a")
    return [subprocess.Popen(c, stdout=output, stderr=output, env=e, start_new_session=True) for c, e in commands]


def wait(launchers, folder):
    """Wait for launchers to end without an error."""
    codes = [launcher.wait(timeout=300) for launcher in launchers]
    assert codes == [0] * len(launchers), (folder / "output.txt").read_text()


def launch(place, overrides, folder, by_environment=True):
    """Losses of the steps, the last evaluation, and tokens of a launched run."""
    wait(start(place, overrides, folder, by_environment), folder)
    return results_of(folder)


def results_of(folder):
    lines = logged(folder)
    losses = [line["loss/train/total"] for line in lines if "loss/train/total" in line]
    return losses, lines[-1]["metrics/eval/LanguageCrossEntropy"], lines[-1]["token"]
