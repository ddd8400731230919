"""The one column of a sample that is read: text, or tokens that another program wrote."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from streaming.base.format.mds.encodings import mds_decode

from src.common.errors import DataError

TEXT = "text"
IDS = "bytes or an ndarray of integers", re.compile(r"bytes|ndarray(:u?int\d+(:[\d,]+)?)?")
READ = {TEXT: ("str or bytes", re.compile("str|bytes")), "tokens": IDS, "input_ids": IDS}
"""Columns that are read, and which encodings they may have, in words and as a pattern. Text comes first: it fits every
tokenizer."""

TOKENIZER = "name the tokenizer that made them (tokenizer_name, --tokenizer)"


def name_of(names: Sequence[str]) -> str | None:
    """The column that is read; None if there is none. Raises ValueError if two could be meant."""
    found = [name for name in READ if name in names]
    if found == ["tokens", "input_ids"]:
        raise ValueError("shards[0].column_names: expected 'tokens' or 'input_ids', got both")
    return found[0] if found else None


@dataclass(frozen=True)
class Column:
    """Where a column lies in the bytes of a sample: the sizes (uint32) that are not fixed, then the columns."""

    name: str
    encoding: str
    position: int
    sizes: tuple[int | None, ...]
    """Fixed size of each column in bytes; None if each sample states it."""

    @classmethod
    def of(cls, index: Mapping[str, Any], folder: Path) -> "Column":
        """The column that is read, by the split's checked index.json. Raises DataError if there is none."""
        shard = index["shards"][0]
        names = shard["column_names"]
        if (name := name_of(names)) is None:
            raise DataError(
                f"{folder}: the shards have no column 'text', 'tokens' or 'input_ids' ({', '.join(names)}); write one, "
                "or convert a column of text (convert_c4.py --text_column)"
            )
        position = names.index(name)
        return cls(name, shard["column_encodings"][position], position, tuple(shard["column_sizes"]))

    def value(self, data: bytes) -> bytes:
        """The column's bytes in a sample. Raises ValueError if the sizes do not fit the sample's."""
        stated = self.sizes.count(None)
        found = iter(np.frombuffer(data, "<u4", stated).tolist())
        sizes = [next(found) if size is None else size for size in self.sizes]
        expected = 4 * stated + sum(sizes)
        if len(data) != expected:
            raise ValueError(f"a sample has {len(data):,} bytes, expected {expected:,}")
        begin = 4 * stated + sum(sizes[: self.position])
        return data[begin : begin + sizes[self.position]]


def text_of(value: bytes) -> str:
    """A column's text. Raises DataError if it is not UTF-8."""
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"the text is not UTF-8 ({error}); write it as UTF-8") from None


def ids_of(value: bytes, encoding: str, vocab_size: int, pad_token_id: int) -> NDArray[np.int64]:
    """A column's ids (length,), without padding at the ends. Raises DataError if they do not fit the vocabulary.

    ``bytes`` have no type: programs that write them mean int64, as mosaicml/examples does.
    """
    if encoding == "bytes":
        ids = _typed(value, "<i8")
        if ids is None or not _fit(ids, vocab_size):
            advice = TOKENIZER
            for name, dtype in (("ndarray:uint16", "<u2"), ("ndarray:int32", "<i4")):  # int32 would also fit uint16
                if (ids := _typed(value, dtype)) is not None and _fit(ids, vocab_size):
                    advice = f"they fit {name}: write the column so, which names the type"
            raise DataError(f"{len(value):,} bytes are not int64 ids below {vocab_size:,}; {advice}")
    else:
        ids = np.asarray(mds_decode(encoding, value))
        if ids.dtype.kind not in "iu" or ids.size != ids.shape[-1]:
            raise DataError(f"its tokens are {ids.dtype}{list(ids.shape)}, expected integers in one dimension")
        ids = ids.reshape(-1)
        if not _fit(ids, vocab_size):
            raise DataError(
                f"its ids are {ids.min():,} to {ids.max():,}, and the tokenizer has {vocab_size:,} entries; {TOKENIZER}"
            )
    words = np.flatnonzero(ids != pad_token_id)
    return ids[words[0] : words[-1] + 1].astype(np.int64) if words.size else np.empty(0, np.int64)


def _typed(value: bytes, dtype: str) -> NDArray[Any] | None:
    return None if len(value) % np.dtype(dtype).itemsize else np.frombuffer(value, dtype)


def _fit(ids: NDArray[Any], vocab_size: int) -> bool:
    return not ids.size or bool(ids.min() >= 0 and ids.max() < vocab_size)
