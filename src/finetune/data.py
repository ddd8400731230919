"""Labelled files -> checked rows, by set; an error names the file and the row."""

from typing import Any

from src.common.errors import DataError
from src.finetune import holdout
from src.finetune.config import LabelledData
from src.finetune.files import MissingColumn, class_names, matching_files, read_records
from src.finetune.kinds import KINDS, Row
from src.finetune.tags import check_schemes

HIDDEN = "a set with hidden labels cannot be evaluated; `python finetune.py predict` writes predictions for it"


class Rows(list[Row]):
    """The rows of a set."""

    names: list[str] | None = None
    """The classes, in the order of their numbers, if the files or ``label_names`` name them."""


def read_set(pattern: str, data: LabelledData, labelled: bool = True, default_names: list[str] | None = None) -> Rows:
    """Every row of a set's files.

    Args:
        labelled: whether they have labels; if not, the rows' labels are None.
        default_names: names of class numbers, if neither ``data`` nor the file has any: those of the training set.

    Raises:
        DataError: a file is missing, empty or unreadable, lacks a column, or has a value that does not fit ``data``.
    """
    kind, rows = KINDS[data.kind](data), Rows()
    columns = kind.columns(labelled)
    for path in matching_files(pattern):
        names = (_names(path, data) or default_names) if labelled and kind.has_classes else None
        rows.names = rows.names or names or data.label_columns
        try:
            for place, record in read_records(path, columns, of_words=data.kind == "tokens"):
                row = kind.row(place, record) if labelled else kind.unlabelled(place, record)
                rows.append(row if names is None else row._replace(label=_named(place, row.label, names)))
        except MissingColumn as error:
            raise DataError(f"{error}. {HIDDEN if error.column == data.label else ''}".rstrip(" .")) from None
    if not rows:
        raise DataError(f"{pattern}: no rows")
    return rows


def _names(path: str, data: LabelledData) -> list[str] | None:
    """Names of the class numbers in a file: ``label_names``, or else those that the file has."""
    if data.labels is None and data.label_names is not None:
        return data.label_names
    names = class_names(path).get(data.label)
    return names if names is not None and set(data.labels or names) <= set(names) else None


def _named(place: str, label: Any, names: list[str]) -> Any:
    """A class, or each of a list, by its name if it is a number from 0; -1, a hidden label, stays."""
    if isinstance(label, list):
        return [_named(place, name, names) for name in label]
    if label in names or not label.isdecimal():
        return label
    if int(label) >= len(names):
        raise DataError(f"{place}: class number {label}, and there are {len(names)} names: {', '.join(names[:20])}")
    return names[int(label)]


def read_sets(data: LabelledData) -> dict[str, Rows]:
    """All sets of a task by name: ``train``, ``validation`` or the names that ``data`` gives, ``test``.

    Raises:
        DataError: as ``read_set``, and ``hold_out``.
    """
    rows, files = read_set(data.train, data), data.validation
    if isinstance(files, (int, float)):
        others, held_out = hold_out(rows, files, "validation", data)
        sets = {"train": others, "validation": held_out}
    else:
        named = files if isinstance(files, dict) else {"validation": files}
        others = {name: read_set(pattern, data, default_names=rows.names) for name, pattern in named.items()}
        sets = {"train": rows, **others}
    if data.test is not None:
        sets["test"] = read_set(data.test, data, default_names=rows.names)
    return sets


def hold_out(rows: Rows, share: float, name: str, data: LabelledData) -> tuple[Rows, Rows]:
    """The other rows, and the share of them that is held out for the set ``name`` (``holdout.split``)."""
    classes_of_row = KINDS[data.kind](data).classes
    try:
        others, held_out = map(Rows, holdout.split(rows, share, lambda row: (row.text, row.pair), classes_of_row))
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    others.names = held_out.names = rows.names
    return others, held_out


def classes_of(data: LabelledData, sets: dict[str, Rows]) -> list[str]:
    """The classes in the order of their numbers; empty for regression.

    Raises:
        DataError: a set has a class that ``labels`` (default: the names that the files or ``label_names`` give, or else
            the training set) lacks, or a metric does not fit the classes.
    """
    kind = KINDS[data.kind](data)
    if not kind.has_classes:
        return []
    found = {name: {label for row in rows for label in kind.classes(row)} for name, rows in sets.items()}
    numbers = all(name.lstrip("-").isdecimal() for name in found["train"])
    classes = data.labels or sets["train"].names or sorted(found["train"], key=int if numbers else None)
    for name, there in found.items():
        for unknown in sorted(there - set(classes)):
            of = "labels" if data.labels else "the training set"
            is_hidden = unknown == "-1" and (name != "train" or not data.labels)
            advice = f"-1: {HIDDEN}" if is_hidden else "list all classes in labels, or correct the row"
            raise DataError(f"{name}: class {unknown!r} is not in {of} ({', '.join(classes[:20])}); {advice}")
    if len(classes) < 2:
        raise DataError(f"{data.train}: all rows have the class {classes[0]!r}; expected two classes or more")
    kind.check_classes(classes)
    if "entity_f1" in (data.metrics or []):
        check_schemes({name: [row.label for row in rows] for name, rows in sets.items()})
    return classes
