"""Loggers by name, and the packages of their services."""

import contextlib
import importlib
from collections.abc import Callable, Iterator

import composer.loggers
from composer.core import State
from composer.loggers import Logger, LoggerDestination

from src.common.errors import ConfigError, first_line
from src.train.monitors import ConsoleLine, MetricsFile
from src.train.schema import Named, build


class WandBLogger(composer.loggers.WandBLogger):
    """Composer's, for wandb 0.31 too, which has ``Run.url`` but no longer the ``Run.get_url`` that Composer calls."""

    def init(self, state: State, logger: Logger) -> None:
        import wandb

        if not hasattr(wandb.Run, "get_url"):
            wandb.Run.get_url = lambda run: run.url  # pyright: ignore[reportAttributeAccessIssue]
        super().init(state, logger)


LOGGERS: dict[str, Callable[..., LoggerDestination]] = {
    "cometml": composer.loggers.CometMLLogger,
    "console_line": ConsoleLine,
    "file_logger": composer.loggers.FileLogger,
    "metrics_file": MetricsFile,
    "mlflow": composer.loggers.MLFlowLogger,
    "neptune": composer.loggers.NeptuneLogger,
    "tensorboard": composer.loggers.TensorboardLogger,
    "wandb": WandBLogger,
}

PACKAGES = {
    "cometml": "comet_ml",
    "mlflow": "mlflow",
    "neptune": "neptune",
    "tensorboard": "torch.utils.tensorboard",
    "wandb": "wandb",
}
"""What a logger imports, besides Composer."""


def check_package(name: str) -> None:
    """Raises ConfigError if a logger's package is not installed, or does not work with the stack."""
    try:
        importlib.import_module(PACKAGES.get(name, "composer"))
    except Exception as error:  # protobuf raises its own for a package of another version
        raise ConfigError(
            f"loggers.{name}: its package cannot be imported ({first_line(error)}); "
            "requirements-loggers.txt has the version to install"
        ) from None


@contextlib.contextmanager
def one_message(path: str) -> Iterator[None]:
    """A ConfigError for whatever a service raises when it is not reachable, not logged in, or not set up."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{path}: {first_line(error)}") from error


def build_loggers(components: Named, resumes: bool) -> list[LoggerDestination]:
    """The loggers of a config.

    Args:
        resumes: whether a start from a checkpoint resumes its run; see ``MetricsFile.resumes``.

    Raises:
        ConfigError: a package or an option is wrong, or a service cannot be used, now or when the Trainer is built.
    """
    built: list[LoggerDestination] = []
    for component in components.values():
        check_package(component.name)
        with one_message(path := f"loggers.{component.name}"):
            logger = build("loggers", LOGGERS, component)
        logger.init = one_message(path)(logger.init)  # the Trainer's constructor calls it
        if isinstance(logger, MetricsFile):
            logger.resumes = resumes
        built.append(logger)
    return built
