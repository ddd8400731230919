"""Pretrain a BERT: one YAML, one Composer Trainer.

composer main.py yamls/mosaic_bert.yaml [key=value ...]     one process a GPU (or `composer -n 2` on a CPU)
python main.py yamls/quickstart.yaml [key=value ...]        one process
"""

import dataclasses
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import yaml
from composer import Trainer
from composer.utils import dist, reproducibility

from src.common.environment import environment
from src.common.errors import ConfigError, Interrupted, TrainingError
from src.common.signals import die_with_parent
from src.data import shared_memory
from src.data.shards import dataset_fingerprint
from src.data.tokenizer import earlier_fingerprint, load_tokenizer, tokenizer_fingerprint
from src.train import builders, checkpoint, models, optim, processes
from src.train.config import RunConfig, load, settings
from src.train.data import build_evaluators, build_train_data
from src.train.processes import meet, share_cores
from src.train.resume import ResumeCheck
from src.train.schema import hide_environment, to_dict
from src.train.validate import summarize


def build_trainer(config: RunConfig) -> Trainer:
    """Everything that the config names, put together. Nothing is trained yet."""
    checkpoint.load_as_data()
    builders.check_device(config)
    meet(config.dist_timeout)
    if dist.get_local_rank() == 0:
        shared_memory.remove_stale_shared_memory()
    folder, found = checkpoint.find(builders.local_save_folder(config), config.autoresume)
    try:
        return assemble(config, folder, found)
    except BaseException:
        if folder is not None:
            folder.close()
        raise


def assemble(config: RunConfig, folder: checkpoint.RunFolder | None, found: str | None) -> Trainer:
    """The Trainer, which goes on from the checkpoint ``found`` if there is one."""
    reproducibility.seed_all(config.seed)  # the same weights on every rank
    tokenizer = load_tokenizer(config.tokenizer_name)
    model = models.build_model(config, tokenizer)
    if found is None and config.load_path is None:
        models.load_pretrained(config, model, tokenizer)
    train_data = build_train_data(config, tokenizer)
    dataset: Any = train_data.dataloader.dataset  # pyright: ignore[reportAttributeAccessIssue]
    fingerprints = {
        "dataset": dataset_fingerprint(source.folder for source in dataset.sources.values()),
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    earlier = {"tokenizer": earlier_fingerprint(tokenizer)}
    check = ResumeCheck({**settings(config), **fingerprints}, config.resume.allow, earlier)
    if found is not None:
        check.compare(checkpoint.settings_of(found), found)  # before weights of another shape are tried
    return Trainer(
        run_name=config.run_name,
        seed=config.seed,
        model=model,
        optimizers=optim.build_optimizer(config, model),
        schedulers=optim.build_scheduler(config),
        train_dataloader=train_data,
        eval_dataloader=build_evaluators(config, tokenizer, train_data),
        max_duration=config.max_duration,
        eval_interval=config.eval_interval,
        precision=config.precision,
        device_train_microbatch_size=config.device_train_microbatch_size,
        # Each masked token of the global batch weighs the same, however it is cut into microbatches and ranks.
        accumulate_train_batch_on_tokens=True,
        algorithms=builders.build_algorithms(config),
        callbacks=[
            *builders.build_callbacks(config, tokenizer),
            check,
            *builders.build_savers(config, folder, found is not None),
        ],
        loggers=builders.build_loggers(config),
        progress_bar=config.progress_bar,
        save_folder=config.save_folder,
        save_interval=config.save_interval,
        save_num_checkpoints_to_keep=config.save_num_checkpoints_to_keep,
        save_overwrite=config.save_overwrite,
        load_path=found or config.load_path,
        load_weights_only=config.load_weights_only and found is None,
        autoresume=config.autoresume and builders.local_save_folder(config) is None,
        compile_config=config.compile_config,
        parallelism_config=builders.build_parallelism(config),
        dist_timeout=config.dist_timeout,
    )


def trainer_or_reason(config: RunConfig) -> Trainer:
    """``build_trainer``; what can be wrong with a checkpoint in one message."""
    try:
        return build_trainer(config)
    except (RuntimeError, pickle.UnpicklingError) as error:
        text = str(error)
        if "state_dict" in text:
            reason = "is of another model; its shape must be that of model.model_config"
        elif "weights_only" in text.lower() or "unsupported" in text.lower():
            reason = "holds more than data, and running what it holds is refused"
        else:
            raise
        raise ConfigError(f"{config.load_path or config.save_folder}: the checkpoint {reason}: {text[:300]}") from None


def describe(config: RunConfig) -> str:
    """The resolved config as a YAML that can be run again, under comments that say what it ran on."""
    runs_on = {**environment(), "world_size": dist.get_world_size()}
    comments = "".join(f"# {name}: {value}\n" for name, value in runs_on.items())
    return comments + yaml.safe_dump(to_dict(config), sort_keys=False)


def evaluate(config: RunConfig) -> None:
    """Evaluate ``load_path``, or else ``pretrained``, on all held-out data."""
    if config.load_path is None and config.pretrained is None:
        raise ConfigError("--eval needs a load_path, or pretrained")
    # Weights are all it takes; nothing of the run whose checkpoint this is may be overwritten.
    config = dataclasses.replace(config, load_weights_only=True, autoresume=False, save_folder=None, loggers={})
    trainer = trainer_or_reason(config)
    trainer.eval()
    print_evaluation(trainer)
    trainer.close()


def print_evaluation(trainer: Trainer) -> None:
    """One line for each evaluation set. All processes take part in computing a value."""
    for label, metrics in trainer.state.eval_metrics.items():
        values = {name: metric.compute().item() for name, metric in metrics.items() if metric.update_called}
        if values and dist.get_global_rank() == 0:
            print(label, " ".join(f"{name}={value:.6g}" for name, value in values.items()))


def validate(config: RunConfig) -> None:
    """Build what training would build, and print what it would do and need."""
    tokenizer = load_tokenizer(config.tokenizer_name)
    model = models.build_model(config, tokenizer)
    models.load_pretrained(config, model, tokenizer)
    optim.build_optimizer(config, model)
    builders.build_algorithms(config)
    builders.build_callbacks(config, tokenizer)
    builders.build_parallelism(config)
    train_data = build_train_data(config, tokenizer)
    build_evaluators(config, tokenizer, train_data)
    dataset: Any = train_data.dataloader.dataset  # pyright: ignore[reportAttributeAccessIssue]
    print(summarize(config, model, dataset, optim.build_scheduler(config)))


def train(config: RunConfig, argv: list[str]) -> None:
    """Train, and evaluate at the end."""
    trainer = trainer_or_reason(config)
    done, end = trainer.state.timestamp, trainer.state.max_duration
    assert end is not None
    if done >= end:
        if dist.get_global_rank() == 0:
            print(f"{config.run_name} is finished: {done.batch.value} steps, max_duration={config.max_duration}")
        trainer.close()
        return
    text = hide_environment(describe(config), argv[0], argv[1:])
    if dist.get_global_rank() == 0:
        print(text, file=sys.stderr)
        folder = builders.local_save_folder(config)
        if folder is not None:
            (Path(folder) / "config.yaml").write_text(text)
    try:
        trainer.fit()
    except Interrupted:
        trainer.close()
        raise
    print_evaluation(trainer)
    trainer.close()


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if argv else 2)
    flags = [arg for arg in argv if arg.startswith("--")]
    argv = [arg for arg in argv if arg not in flags]
    if not argv or len(flags) > 1 or not set(flags) <= {"--validate", "--eval"}:
        raise ConfigError(f"{' '.join(flags)}: give a YAML and at most one of --validate, --eval")
    config = load(argv[0], argv[1:])
    if "--validate" in flags:
        validate(config)
    elif "--eval" in flags:
        evaluate(config)
    else:
        train(config, argv)


def run(argv: list[str]) -> None:
    """``main``; what a user can cause ends in one message, without a traceback."""
    if "LOCAL_RANK" in os.environ:  # a launcher's
        die_with_parent()
        share_cores()
    try:
        main(argv)
    except Interrupted as error:
        print(f"main.py: {error}", file=sys.stderr)
        sys.exit(processes.EXIT_INTERRUPTED)
    except (TrainingError, ValueError, OSError) as error:  # ConfigError and DataError are ValueErrors
        sys.exit(f"main.py: {error}")
    finally:
        processes.end_workers()


if __name__ == "__main__":
    run(sys.argv[1:])
