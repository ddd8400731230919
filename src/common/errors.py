"""The errors that a user can cause; each message says what, where, and what to do."""


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says what, where and what to do."""


class Interrupted(Exception):
    """A signal stopped the run after a step that is saved; the message says which, and how to go on."""


class ConfigError(ValueError):
    """Something is wrong with the YAML or an override; the message names every fault found."""


class DataError(ValueError):
    """A dataset is damaged or does not fit the run; the message says what, where and what to do."""


def first_line(error: BaseException) -> str:
    return (str(error) or repr(error)).splitlines()[0]
