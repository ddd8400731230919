"""Tables of Arrow: Parquet, and Arrow's own files and streams (``save_to_disk`` of ``datasets``)."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.ipc
import pyarrow.parquet

from src.common.streams import damage, open_stream
from src.convert.files import BATCH, BadText, Form, Rows, Span, named

TEXT_TYPES = (
    *(pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()),
    *(pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary_view()),  # Spark and Impala write strings so
)

END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
"""Last bytes of Arrow's format of streams. A writer that is killed between two batches leaves a file without them."""

DAMAGED = (pyarrow.ArrowException, OSError)
"""What reading a damaged table raises."""


def _open(path: str) -> Any:
    return open_stream(path) if "://" in path else pyarrow.OSFile(os.fsencode(path))


def _arrow(stream: Any) -> Any:
    """A reader of a file of Arrow's format of files, or else of streams."""
    is_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    return pyarrow.ipc.open_file(stream) if is_file else pyarrow.ipc.open_stream(stream)


def names_of(path: str, kind: str) -> list[str]:
    """The columns of a table; none if it is damaged."""
    with contextlib.suppress(*DAMAGED), _open(path) as stream:
        return (pyarrow.parquet.read_schema(stream) if kind == "parquet" else _arrow(stream).schema).names
    return []


def row_groups(path: str) -> int:
    """The number of row groups of a Parquet file; none if it is damaged."""
    with contextlib.suppress(*DAMAGED), _open(path) as stream:
        return pyarrow.parquet.read_metadata(stream).num_row_groups
    return 0


def rows(span: Span, form: Form, column: str) -> Rows:
    """The rows of a table, or of some row groups of a Parquet file."""
    number = 0
    try:
        with _open(span.path) as stream:
            is_stream = False
            if form.kind == "parquet":
                reader = pyarrow.parquet.ParquetFile(stream)
                groups = range(span.start, reader.num_row_groups if span.stop is None else span.stop)
                number = sum(reader.metadata.row_group(group).num_rows for group in range(span.start))
                columns = named(reader.schema_arrow.names, column)
                batches = reader.iter_batches(batch_size=BATCH, row_groups=list(groups), columns=columns)
            else:
                reader = _arrow(stream)
                columns = named(reader.schema.names, column)
                is_stream = isinstance(reader, pyarrow.ipc.RecordBatchStreamReader)
                batches = reader if is_stream else map(reader.get_batch, range(reader.num_record_batches))
            for batch in batches:
                for start in range(0, batch.num_rows, BATCH):
                    cells = [_cells(batch.slice(start, BATCH), name) for name in columns]
                    for values in zip(*cells, strict=True):
                        number += 1
                        yield f"{span.path}:{number}", dict(zip(columns, values, strict=True))
            if is_stream:
                stream.seek(-len(END_OF_STREAM), os.SEEK_END)
                if stream.read() != END_OF_STREAM:
                    raise BadText("the file ends without the mark of its end, so rows may be missing")
    except BadText as error:
        yield f"{span.path}:{number + 1}", error
    except DAMAGED as error:
        fault = f"the rest of the file cannot be read as {form.kind} ({damage(error)})"
        yield f"{span.path}:{number + 1}", BadText(fault)


def _cells(batch: pyarrow.RecordBatch, name: str) -> list[Any]:
    """Values of a column, or of a field of it such as ``a.b``. Strings as bytes, so that a bad one is bad alone."""
    if name in batch.schema.names:
        array = batch.column(name)
    else:
        first, *fields = name.split(".")
        try:
            array = pyarrow.compute.struct_field(batch.column(first), fields)  # pyright: ignore[reportAttributeAccessIssue]
        except (KeyError, pyarrow.ArrowException):
            raise BadText(f"expected a field {name!r}, but column {first!r} has none of this name") from None
    kind = array.type.value_type if pyarrow.types.is_dictionary(array.type) else array.type
    return (array.cast(pyarrow.large_binary()) if kind in TEXT_TYPES else array).to_pylist()


def splits_of(folder: Path) -> list[str]:
    """The splits, which are its subfolders, of a DatasetDict that datasets saved in a folder; none in other folders."""
    try:
        return json.loads((folder / "dataset_dict.json").read_text())["splits"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return []
