"""Fine-tune a pretrained model: tasks of GLUE, or your own labelled files.

python finetune.py yamls/finetune_glue.yaml pretrained=runs/mine/checkpoints [key=value ...]
python finetune.py yamls/finetune_own.yaml pretrained=runs/mine/checkpoints [key=value ...]

A run is a task with a seed. Each is a process of its own, on a GPU of its own as they become free, or one after another
on the CPU. Finished runs are not run again. At the end: a table of all of them.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from src.common.errors import ConfigError, TrainingError
from src.common.files import locked, write_text
from src.common.signals import die_with_parent
from src.finetune import gpus, table
from src.finetune.config import FinetuneConfig, RunSpec, load
from src.finetune.plan import SPEC, check, is_finished, plan
from src.finetune.run import MODEL, RESULT, run
from src.train.schema import read, to_dict

# ----------------------------------------------------------------------------------------------------------------------
# Runs and table
# ----------------------------------------------------------------------------------------------------------------------


def finetune(config: FinetuneConfig) -> int:
    """Do the runs that are not finished, and print the table; the number of runs that failed."""
    specs = plan(config)
    todo = [spec for spec in specs if not is_finished(spec)]
    if todo:
        check(todo)
    if len(todo) < len(specs):
        gpus.say(f"{len(specs) - len(todo)} of {len(specs)} runs are finished already")
    by_encoder = {f"{spec.folder}/{MODEL}": spec.name for spec in specs}
    for spec in todo:
        Path(spec.folder).mkdir(parents=True, exist_ok=True)
        write_text(Path(spec.folder) / SPEC, yaml.safe_dump(to_dict(spec), sort_keys=False))
    queue = [
        gpus.Job(
            name=spec.name,
            command=[sys.executable, __file__, "--run", spec.folder],
            log=Path(spec.folder) / "log.txt",
            needs=by_encoder[spec.encoder] if spec.encoder else None,
        )
        for spec in todo
    ]
    failed = gpus.run(queue, gpus.devices_of(torch.cuda.device_count()), gpus.say)
    finished = [json.loads((Path(spec.folder) / RESULT).read_text()) for spec in specs if is_finished(spec)]
    write_table(config, finished, failed)
    return len(failed)


def write_table(config: FinetuneConfig, finished: list[dict[str, Any]], failed: dict[str, str]) -> None:
    """Print the table, and write it as text, JSON and Markdown."""
    aggregated = table.aggregate(finished)
    lines = table.rows(aggregated)
    ran_on = sorted({f"{run['environment']['device']}, commit {run['environment']['commit']}" for run in finished})
    number = f"{len(finished)} of {len(finished) + len(failed)} runs"
    notes = [f"{config.run_name}: {number}; {'; '.join(ran_on) or 'none'}; intervals are over seeds"]
    notes += table.losses(finished)
    notes += [f"FAILED {name}: {reason}" for name, reason in failed.items()]
    folder = Path(config.folder)
    text = table.as_text(lines) + "\n" + "\n".join(notes) + "\n"
    write_text(folder / "table.txt", text)
    write_text(folder / "table.md", table.as_markdown(lines) + "\n" + "\n\n".join(notes) + "\n")
    model = {"pretrained": config.pretrained, **to_dict(config)["model"]}
    held = {"run_name": config.run_name, "model": model, **aggregated, "failed": failed}
    write_text(folder / "table.json", json.dumps(held, indent=1))
    average = "none" if aggregated["average"] is None else f"{aggregated['average']:.4f}"
    print(f"{text}finetune runs={len(finished)} failed={len(failed)} average={average} table={folder / 'table.md'}")


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if argv else 2)
    if argv[0] == "--run":  # one of the processes that finetune() starts
        die_with_parent()
        run(read(RunSpec, f"{argv[1]}/{SPEC}", [], lambda spec, faults: None))
        return
    if "LOCAL_RANK" in os.environ:
        raise ConfigError("start it with python, without a launcher: it starts a process for each run itself")
    config = load(argv[0], argv[1:])
    with locked(Path(config.folder)):
        if finetune(config):
            sys.exit(1)


def interrupted(number: int, frame: Any) -> None:
    """A signal's handler: the runs that are going on end with this process."""
    sys.exit("finetune.py: interrupted; finished runs are kept, and the same command goes on")


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)
    try:
        main(sys.argv[1:])
    except (TrainingError, ValueError, OSError) as error:  # ConfigError and DataError are ValueErrors
        sys.exit(f"finetune.py: {error}")
