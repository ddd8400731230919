"""The working folder of a conversion. A conversion that is stopped at any moment continues from it.

    SPLIT.partial/                 or SPLIT.part-003-of-016/ on one of several machines
      plan.json                    all that decides what is written
      files.jsonl                  the files of the source, read and skipped
      units/000000/ ...            complete units (unit.py); units/*.hashes of the first pass of --dedup
      split/                       the split, assembled from the units, before it is renamed to SPLIT/

Each step is a rename, or can be repeated.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from src.common.errors import DataError
from src.common.files import check_no_link, replace_folder, sync, write_text
from src.convert.stats import FilesReport, Stats
from src.convert.unit import DROPPED, UNIT
from src.data.index import LENGTHS, TOKENS_KEY

PLAN, CONVERSION = "plan.json", "conversion.json"
"""Name of the plan in the working folder, and in the finished split."""

FILES = "files.jsonl"
"""Name of the list of the source's files, read and skipped, in the working folder and in the finished split."""


OF_A_SPLIT = ("index.json", "stats.json", CONVERSION, FILES, LENGTHS, DROPPED, "shard.", ".")
"""Beginnings of the names in a split."""


def check_free(folder: Path, overwrite: bool) -> None:
    """Raise a ValueError if ``folder`` is a link, or exists and may not be replaced."""
    check_no_link(folder)
    if folder.exists() and not overwrite:
        raise ValueError(f"{folder} exists; give --overwrite to replace it, or another --out_root")
    if folder.exists() and not (folder / "index.json").exists():
        raise ValueError(f"{folder} is not a dataset (no index.json), so it is not replaced; choose another name")
    if folder.exists() and (others := [path.name for path in folder.iterdir() if not path.name.startswith(OF_A_SPLIT)]):
        kept = "so it is not replaced; move them away, or choose another name"
        raise ValueError(f"{folder} holds more than a dataset ({', '.join(sorted(others)[:3])}), {kept}")


def begin(work: Path, plan: dict[str, Any], overwrite: bool) -> None:
    """Make the working folder ``work``, or keep it if it was begun with the same plan (a flat dict of JSON values).

    Raises:
        ValueError: a part of another plan is done, and ``overwrite`` is off; or the folder is something else.
    """
    found = [path for path in (work / PLAN, work / "split" / CONVERSION) if path.exists()]
    if found:
        other = json.loads(found[0].read_text())
        changed = differences(other, plan)
        done = [path for path in (work / "units").iterdir() if path.suffix != ".partial"]
        if changed and done and not overwrite:
            raise ValueError(
                f"{work} was begun with other settings or another source ({changed}). Give the same again or another "
                "--out_root; --overwrite discards what is done"
            )
        if not changed:
            for path in (work / "units").glob("*.partial"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            complete = sum(path.suffix == "" for path in done)
            print(f"continuing {work}: {complete} of {plan['units']} units are complete", file=sys.stderr)
            return
    if work.exists():
        remove(work)
    (work / "units").mkdir(parents=True)
    write_text(work / PLAN, json.dumps(plan, indent=1))


def remove(work: Path) -> None:
    """Remove a working folder; its units last, by which the rest of an interrupted removal is recognized.

    Raises:
        ValueError: the folder is something else.
    """
    others = sorted(path for path in work.iterdir() if path.name != "units")
    if others and not (work / "units").is_dir():
        raise ValueError(f"{work} is not the work of a conversion ({others[0].name}), so it is kept; move it away")
    for path in others:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(work)


def differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """The entries that differ between two plans, with both values; empty if there are none."""
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return "; ".join(f"{name}: {there.get(name)} there, {here.get(name)} here" for name in names)


def publish(work: Path, folder: Path, folder_of: Callable[[int], Path], overwrite: bool) -> None:
    """Assemble the split from its units (``folder_of(number)``), rename it to ``folder``, and delete ``work``.

    Raises:
        DataError: no document gave a sample.
        OSError: a shard of a unit is missing.
    """
    if (work / PLAN).exists():
        _assemble(work, folder_of)
    check_free(folder, overwrite)
    replace_folder(work / "split", folder)
    remove(work)


def _assemble(work: Path, folder_of: Callable[[int], Path]) -> None:
    """Assemble the split in ``work / "split"``: shards numbered in order, index.json, stats.json and the rest.

    Moves each shard to a name that depends only on the units, so the call can be repeated.
    """
    plan = json.loads((work / PLAN).read_text())
    tokens = plan["tokens"]
    split, stats = work / "split", Stats()
    split.mkdir(exist_ok=True)
    index: dict[str, Any] = {"version": 2, "shards": []}
    with (split / LENGTHS).open("wb") as lengths, (split / DROPPED).open("wb") as dropped:
        for folder in map(folder_of, range(plan["units"])):
            record = json.loads((folder / UNIT).read_text())
            stats.add(Stats.from_json(record["stats"]))
            for shard in record["shards"]:
                _move(shard, folder, split, len(index["shards"]))
                index["shards"].append(shard)
            for name, out in ((LENGTHS, lengths), (DROPPED, dropped)):
                if (folder / name).exists():
                    with (folder / name).open("rb") as part:
                        shutil.copyfileobj(part, out)
    if not stats.samples:
        remove(work)
        left = "the tokenizer gives no token for any" if stats.characters else "the filters dropped every"
        raise DataError(f"{work.stem}: {left} document")
    for path in (split / LENGTHS, split / DROPPED):
        sync(path) if path.stat().st_size else path.unlink()
    if tokens is not None:
        index[TOKENS_KEY] = tokens
    write_text(split / "index.json", json.dumps(index, sort_keys=True))
    report = stats.report(tokens["max_seq_len"] if tokens else None)
    if (work / FILES).exists():
        shutil.copyfile(work / FILES, split / FILES)
        sync(split / FILES)
        report["files"] = FilesReport.of_list(split / FILES, stats.spans if plan["limit"] else None).as_json()
    write_text(split / "stats.json", json.dumps(report, indent=1))
    (work / PLAN).rename(split / CONVERSION)  # now the split is complete and lacks only its name
    sync(split)


def _move(shard: dict[str, Any], folder: Path, split: Path, number: int) -> None:
    """Give a unit's shard its number in the split, in the index and on disk."""
    old = new = ""
    for entry in filter(None, (shard["raw_data"], shard["zip_data"])):  # the last one names the file on disk
        old = entry["basename"]
        new = entry["basename"] = f"shard.{number:05}.{old.split('.', 2)[2]}"
    if (folder / old).exists():
        os.rename(folder / old, split / new)
    elif not (split / new).exists():
        raise OSError(f"{folder / old} is missing, although its unit is complete; put it back")
