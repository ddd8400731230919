"""Fine-tune a pretrained model: tasks of GLUE, or your own labelled files.

python finetune.py yamls/finetune_glue.yaml pretrained=runs/mine/checkpoints [key=value ...]
python finetune.py yamls/finetune_own.yaml pretrained=runs/mine/checkpoints [key=value ...]
python finetune.py predict MODEL FILE [--out OUT] [--scores] [key=value ...]

A run is a task with a seed. Each run is a process: one per GPU as GPUs become free, or one after another on the CPU.
Finished runs are skipped. At the end, a table of all runs is printed and written.

predict: MODEL is the folder ``model`` of a run, or an export of it. FILE has texts, and needs no labels. Each row's
prediction is a line of OUT, or of standard output; with --scores a JSON object with the probability of each class.
"""

import argparse
import json
import os
import pickle
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from src.common.errors import ConfigError, TrainingError
from src.common.files import locked, write_text
from src.common.signals import die_with_parent
from src.finetune import gpus, table
from src.finetune.config import FinetuneConfig, load
from src.finetune.plan import check_runs, is_finished, plan_runs
from src.finetune.predict import predict
from src.finetune.progress import say
from src.finetune.run import MODEL_FOLDER, RESULT_FILE, SPEC_FILE, train_and_evaluate
from src.train.schema import to_dict
from src.train.yaml12 import dump, hidden, hiding, stored


def finetune(config: FinetuneConfig) -> int:
    """Do the unfinished runs, and write the table; returns the number of failed runs."""
    specs = plan_runs(config)
    unfinished = [spec for spec in specs if not is_finished(spec)]
    if len(unfinished) < len(specs):
        say(f"{len(specs) - len(unfinished)} of {len(specs)} runs are finished already")
    if unfinished:
        say(f"checking the files and the model of {len(unfinished)} runs")
        check_runs(unfinished)
    by_encoder = {f"{spec.folder}/{MODEL_FOLDER}": spec.name for spec in specs}
    jobs = []
    for spec in unfinished:
        folder, first = Path(spec.folder), by_encoder.get(spec.encoder or "")
        write_text(folder / SPEC_FILE, dump(spec.described()))
        command = [sys.executable, __file__, "--run", spec.folder]
        jobs.append(gpus.Job(spec.name, command, folder / "log.txt", first, pickle.dumps(spec)))
    devices, texts = gpus.visible_devices(torch.cuda.device_count()), config.interpolations
    failed = gpus.run_jobs(jobs, devices, lambda line: say(hidden(line, texts)))
    failed = {name: hidden(reason, texts) for name, reason in failed.items()}
    finished = [json.loads((Path(spec.folder) / RESULT_FILE).read_text()) for spec in specs if is_finished(spec)]
    write_table(config, finished, failed)
    return len(failed)


def write_table(config: FinetuneConfig, finished: list[dict[str, Any]], failed: dict[str, str]) -> None:
    """Print the table, and write it as text, JSON and Markdown."""
    aggregated, folder = table.aggregate(finished), Path(config.folder)
    shown = stored(to_dict(config), config.interpolations)
    lines = table.table_lines(aggregated)
    ran_on = sorted({f"{run['environment']['device']}, commit {run['environment']['commit']}" for run in finished})
    number = f"{len(finished)} of {len(finished) + len(failed)} runs"
    notes = [f"{shown['run_name']}: {number}; {'; '.join(ran_on) or 'none'}; intervals are over seeds"]
    notes += table.truncation_notes(finished)
    notes += [f"FAILED {name}: {reason}" for name, reason in failed.items()]
    text = table.as_text(lines) + "\n" + "\n".join(notes) + "\n"
    write_text(folder / "table.txt", text)
    write_text(folder / "table.md", table.as_markdown(lines) + "\n" + "\n\n".join(notes) + "\n")
    model = {"pretrained": shown["pretrained"], **shown["model"]}
    contents = {"run_name": shown["run_name"], "model": model, **aggregated, "failed": failed}
    write_text(folder / "table.json", json.dumps(contents, indent=1))
    average = "none" if aggregated["average"] is None else f"{aggregated['average']:.4f}"
    print(f"{text}finetune runs={len(finished)} failed={len(failed)} average={average} table={folder / 'table.md'}")


def predict_file(argv: list[str]) -> None:
    """Write the predictions for a file."""
    parser = argparse.ArgumentParser("finetune.py predict")
    for name in ("model", "file"):
        parser.add_argument(name)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="data.text=title, batch_size=8, ...")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--scores", action="store_true")
    args = parser.parse_intermixed_args(argv)
    lines = predict(args.model, args.file, args.overrides, args.scores)
    if args.out is None:
        sys.stdout.writelines(lines)
    else:
        write_text(args.out, lines)


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if argv else 2)
    if argv[0] == "predict":
        return predict_file(argv[1:])
    if argv[0] == "--run":  # a process that finetune() started
        die_with_parent()
        spec = pickle.load(sys.stdin.buffer)  # not run.yaml, which hides values from the environment
        transformers.utils.logging.disable_progress_bar()  # of saving, which a log of lines has no use for
        with hiding(spec.config.interpolations):
            train_and_evaluate(spec)
        return
    if "LOCAL_RANK" in os.environ:
        raise ConfigError("start it with python, without a launcher: it starts a process for each run itself")
    config = load(argv[0], argv[1:])
    with hiding(config.interpolations), locked(Path(config.folder)):
        if finetune(config):
            sys.exit(1)


def end_interrupted(number: int, frame: Any) -> None:
    """Signal handler: end this process, and with it the running runs."""
    sys.exit("finetune.py: interrupted; finished runs are kept, and the same command continues")


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()  # version 5 warns of each config.json of MosaicBERT
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end_interrupted)
    try:
        main(sys.argv[1:])
    except (TrainingError, ValueError, OSError) as error:  # ConfigError, DataError, CheckpointError are ValueErrors
        sys.exit(f"finetune.py: {error}")
