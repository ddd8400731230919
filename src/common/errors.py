"""The errors that a user can cause. Each message says what is wrong, where, and what to do.

The scripts print them in one line and exit non-zero; a traceback is a fault of this code.
"""


class ConfigError(ValueError):
    """The YAML, an override or an argument is wrong; the message names every fault found."""


class DataError(ValueError):
    """A dataset, a text or a tokenizer is damaged, missing, or does not fit the run."""


class CheckpointError(ValueError):
    """A checkpoint or pretrained weights are damaged, missing, unsafe to read, or do not fit the model."""


class ExportError(ValueError):
    """An exported model differs from the trained one; the export is removed."""


class TrainingError(RuntimeError):
    """A run cannot continue."""


class Interrupted(Exception):
    """A signal or the time limit stopped the run; the message says after which step, and whether it is saved.

    Args:
        code: exit code of the process.
    """

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class Finished(Exception):
    """No error: a run that is started again has ended before; the message says how."""


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its type and arguments if the message is empty."""
    return (str(error) or repr(error)).splitlines()[0]
