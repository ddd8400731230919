"""The folder that a conversion works in, so that it can be stopped at any moment and gone on with.

    SPLIT.partial/                 or SPLIT.part-003-of-016/ on one of several machines
      plan.json                    all that decides what is written
      units/000000/ ...            complete shares of work (unit.py); units/*.hashes of the first pass
      split/                       the dataset, put together from the units, before it takes its name SPLIT/

Each step is a rename, or can be done again: whatever stops it, the next call finds a state that it knows.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from src.common.files import replace_folder, sync, write_text
from src.convert.stats import Stats
from src.convert.unit import DROPPED, LENGTHS, UNIT
from src.data.shards import TOKENS_KEY

PLAN, MADE = "plan.json", "conversion.json"
"""The plan's name in the working folder, and in the finished dataset."""


def check_free(folder: Path, overwrite: bool) -> None:
    """Raise a ValueError where ``folder`` exists and may not be replaced."""
    if folder.exists() and not overwrite:
        raise ValueError(f"{folder} exists; give --overwrite to replace it, or another --out_root")
    if folder.exists() and not (folder / "index.json").exists():
        raise ValueError(f"{folder} holds no dataset (no index.json), so it is not replaced; take another name for it")


def begin(work: Path, plan: dict[str, Any], overwrite: bool) -> None:
    """Make the working folder, or go on with what is there if it was begun with the same plan.

    Args:
        work: the folder; its units' folder is ``work / "units"``.
        plan: flat, JSON.
        overwrite: whether work of another plan is thrown away.

    Raises:
        ValueError: there is work of another plan; the message holds both values of what differs.
    """
    found = [path for path in (work / PLAN, work / "split" / MADE) if path.exists()]
    if found:
        other = json.loads(found[0].read_text())
        differ = [name for name in {**other, **plan} if other.get(name) != plan.get(name)]
        if differ and not overwrite:
            values = "; ".join(f"{name}: {other.get(name)} there, {plan.get(name)} here" for name in differ)
            raise ValueError(
                f"{work} was begun otherwise ({values}). Give the same again, or --overwrite to begin anew"
            )
        if not differ:
            for path in (work / "units").glob("*.partial"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            print(f"going on with {work}: {count_complete(work)} of {plan['units']} units are there", file=sys.stderr)
            return
    if work.exists():
        print(f"removing {work}, which an earlier conversion left", file=sys.stderr)
        shutil.rmtree(work)
    (work / "units").mkdir(parents=True)
    write_text(work / PLAN, json.dumps(plan, indent=1))


def count_complete(work: Path) -> int:
    """Units that are complete."""
    return sum(path.suffix == "" for path in (work / "units").iterdir())


def assemble(work: Path, units: int, folder_of: Callable[[int], Path], tokens: dict[str, Any] | None) -> Stats:
    """Put the dataset together in ``work / "split"``: shards numbered through, index.json, stats.json and the rest.

    Shards are moved, each to a name that depends on the units alone, so a second call goes on with a first one's work.

    Args:
        units: how many there are.
        folder_of: a unit's folder by its number.
        tokens: description of shards of tokens, which goes into index.json; None for text.

    Raises:
        ValueError: no sample came of any document.
        OSError: a unit has lost its shard.
    """
    split, stats = work / "split", Stats()
    split.mkdir(exist_ok=True)
    shards: list[dict[str, Any]] = []
    with (split / LENGTHS).open("wb") as lengths, (split / DROPPED).open("wb") as dropped:
        for folder in map(folder_of, range(units)):
            record = json.loads((folder / UNIT).read_text())
            stats.add(Stats.from_json(record["stats"]))
            for shard in record["shards"]:
                _move(shard, folder, split, len(shards))
                shards.append(shard)
            for name, out in ((LENGTHS, lengths), (DROPPED, dropped)):
                if (folder / name).exists():
                    with (folder / name).open("rb") as part:
                        shutil.copyfileobj(part, out)
    if not stats.samples:
        shutil.rmtree(work)
        kind = "the tokenizer makes no token of any document" if tokens else "the filters drop every document"
        raise ValueError(f"{work.stem}: {kind}")
    for path in (split / LENGTHS, split / DROPPED):
        if not path.stat().st_size:
            path.unlink()
        else:
            sync(path)
    index: dict[str, Any] = {"version": 2, "shards": shards}
    if tokens is not None:
        index[TOKENS_KEY] = tokens
    write_text(split / "index.json", json.dumps(index, sort_keys=True))
    report = stats.report(tokens["max_seq_len"] if tokens else None)
    write_text(split / "stats.json", json.dumps(report, indent=1))
    (work / PLAN).rename(split / MADE)  # from here on only the dataset's own name is lacking
    sync(split)
    return stats


def _move(shard: dict[str, Any], folder: Path, split: Path, number: int) -> None:
    """Give a unit's shard its number in the dataset, in the index and on disk."""
    stored = "zip_data" if shard["zip_data"] else "raw_data"
    for kind in ("raw_data", "zip_data"):
        if shard[kind] is None:
            continue
        old = shard[kind]["basename"]
        new = shard[kind]["basename"] = f"shard.{number:05}.{old.split('.', 2)[2]}"
        if kind == stored and (folder / old).exists():
            os.rename(folder / old, split / new)
        elif kind == stored and not (split / new).exists():
            raise OSError(f"{folder / old} is lost; give --overwrite to convert anew")


def publish(work: Path, folder: Path, overwrite: bool) -> None:
    """Give the finished dataset its name, in place of an older one if that may be replaced, and clean up."""
    check_free(folder, overwrite)
    replace_folder(work / "split", folder)
    shutil.rmtree(work)
