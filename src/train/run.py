"""What main.py does with a run's config: train it, or evaluate a checkpoint."""

import dataclasses
import sys
from pathlib import Path

from composer import Trainer
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from src.common.environment import environment
from src.common.errors import ConfigError, Finished, Interrupted
from src.common.files import write_text
from src.train.builders import build_trainer, local_save_folder
from src.train.config import RunConfig
from src.train.ending import RunEnd
from src.train.schema import to_dict
from src.train.yaml12 import dump, unresolved


class ConfigFile(Callback):
    """Write the resolved config next to the checkpoints. The last callback, so that nothing refuses the start later."""

    def __init__(self, path: Path, text: str):
        self.path, self.text = path, text

    def fit_start(self, state: State, logger: Logger) -> None:
        write_text(self.path, self.text)


def train(config: RunConfig) -> None:
    """Train, evaluate and print the result, once.

    Raises:
        Interrupted: a signal or the time limit stopped the run.
    """
    try:
        trainer = build_trainer(config)
    except Finished as finished:
        if dist.get_global_rank() == 0:
            print(finished)
        return
    text = describe(config)
    if dist.get_global_rank() == 0:
        print(text, file=sys.stderr)
        folder = local_save_folder(config)
        if folder is not None:
            trainer.state.callbacks.append(ConfigFile(Path(folder) / "config.yaml", text))
    try:
        trainer.fit()
    except Interrupted:
        trainer.close()
        raise
    (end,) = (callback for callback in trainer.state.callbacks if isinstance(callback, RunEnd))
    if not end.is_paused(trainer.state):
        print_evaluation(trainer)
    trainer.close()
    line = end.conclude(trainer.state)
    if line is not None and dist.get_global_rank() == 0:
        print(line)


def evaluate(config: RunConfig) -> None:
    """Evaluate ``load_path`` or ``pretrained`` on all validation sets, and print the result."""
    if config.load_path is None and config.pretrained is None:
        raise ConfigError("--eval needs load_path or pretrained")
    # Only weights are loaded, and no file of the checkpoint's run may be overwritten.
    config = dataclasses.replace(config, load_weights_only=True, autoresume=False, save_folder=None, loggers={})
    trainer = build_trainer(config)
    trainer.eval()
    print_evaluation(trainer)
    trainer.close()


def print_evaluation(trainer: Trainer) -> None:
    """Print a line per validation set, on rank 0. All processes must call it: they compute values together."""
    for label, metrics in trainer.state.eval_metrics.items():
        values = {name: metric.compute().item() for name, metric in metrics.items() if metric.update_called}
        if values and dist.get_global_rank() == 0:
            print(label, " ".join(f"{name}={value:.6g}" for name, value in values.items()))


def describe(config: RunConfig) -> str:
    """The config as a YAML that can be run again: resolved, except values that depend on the environment.

    Comments describe code and machine.
    """
    runs_on = {**environment(), "world_size": dist.get_world_size()}
    comments = "".join(f"# {name}: {value}\n" for name, value in runs_on.items())
    return comments + dump(unresolved(to_dict(config), config.interpolations))
