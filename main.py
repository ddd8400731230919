"""Pretrain a BERT: one YAML, one Composer Trainer.

composer main.py yamls/mosaic_bert.yaml [key=value ...]     one process per GPU (or `composer -n 2` on a CPU)
python main.py yamls/quickstart.yaml [key=value ...]        one process

    --validate    print size, work and memory of the run, and train nothing
    --eval        evaluate load_path or pretrained, and train nothing
"""

import os
import sys

from src.common.errors import ConfigError, Interrupted, TrainingError
from src.common.signals import die_with_parent
from src.train import run as runs
from src.train.config import load
from src.train.processes import end_workers, share_cores
from src.train.validate import validate
from src.train.yaml12 import hiding


def main(argv: list[str]) -> None:
    """Run the command line; raises the errors of common/errors.py."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if argv else 2)
    flags = [arg for arg in argv if arg.startswith("--")]
    words = [arg for arg in argv if arg not in flags]
    if not words or len(flags) > 1 or not set(flags) <= {"--validate", "--eval"}:
        raise ConfigError(f"{' '.join(flags)}: expected a YAML and at most one of --validate, --eval")
    path, *overrides = words
    config = load(path, overrides)
    with hiding(config.interpolations):
        if "--validate" in flags:
            print(validate(config))
        elif "--eval" in flags:
            runs.evaluate(config)
        else:
            runs.train(config)


def run(argv: list[str]) -> None:
    """``main``; an error that a user can cause ends in one message, without a traceback."""
    if "LOCAL_RANK" in os.environ:  # set by a launcher
        die_with_parent()
        share_cores()
    try:
        main(argv)
    except Interrupted as error:
        print(f"main.py: {error}", file=sys.stderr)
        sys.exit(error.code)
    except (TrainingError, ValueError, OSError) as error:  # the other errors of common/errors.py are ValueErrors
        sys.exit(f"main.py: {error}")
    finally:
        end_workers()


if __name__ == "__main__":
    run(sys.argv[1:])
