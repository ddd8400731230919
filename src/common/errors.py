"""The errors that a user can cause. Each message says what is wrong, where, and what to do.

The scripts print them in one line and exit non-zero; a traceback is a fault of this code.
"""


class ConfigError(ValueError):
    """Something is wrong with the YAML, an override or an argument; the message names every fault found."""


class DataError(ValueError):
    """A dataset, a text or a tokenizer is damaged, absent, or does not fit the run."""


class CheckpointError(ValueError):
    """A checkpoint or pretrained weights are damaged, absent, unsafe to read, or do not fit the model."""


class ExportError(ValueError):
    """An exported model is not what was trained; nothing is left in its place."""


class TrainingError(RuntimeError):
    """A run that cannot go on."""


class Interrupted(Exception):
    """A signal stopped the run after a step that is saved; the message says which, and how to go on."""


def first_line(error: BaseException) -> str:
    """What an error says in its first line, or its type and arguments if it says nothing."""
    return (str(error) or repr(error)).splitlines()[0]
