"""Lists in one cell of a CSV, as programs write them. Imports no torch."""

import ast
import json
import re
from typing import Any

TEXT = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
ITEM = rf"{TEXT}|[-+]?\d+"
LIST = re.compile(rf"\[\s*(?:(?:{ITEM})(?:\s*,\s*|\s+|(?=\])))*\]", re.DOTALL)
TUPLE = re.compile(rf"\((?:(?:{TEXT}),\s*)+(?:{TEXT})?\)", re.DOTALL)
ARRAY = re.compile(r"array\((\[.*\])(?:,\s*dtype=\S+)?\)", re.DOTALL)


def read_list(cell: str, separator: str | None = None) -> list[Any]:
    """The items of a list as JSON, Python or numpy writes it, or the parts of a text.

    Args:
        separator: what separates the parts of a text; None for white space.

    Raises:
        ValueError: the text begins and ends with square brackets, and is no such list.
    """
    cell = cell.strip()
    if array := ARRAY.fullmatch(cell):
        cell = array[1]
    if cell[:1] == "[" and cell[-1:] == "]":
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            if not LIST.fullmatch(cell):
                raise ValueError("it is in brackets and no list of texts; write it as JSON") from None
    elif not TUPLE.fullmatch(cell):
        return cell.split() if separator is None else [part.strip() for part in cell.split(separator) if part.strip()]
    # Item by item: numpy writes no commas, and Python reads 'a' 'b' as one text.
    return [ast.literal_eval(item) for item in re.findall(ITEM, cell[1:-1], re.DOTALL)]
