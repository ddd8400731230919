"""Counts of a conversion: for each unit of work, then added up for the split."""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

PERCENTILES = (1, 5, 25, 50, 75, 95, 99, 100)

QUOTED = 5
"""Number of unreadable lines that are quoted."""

BEYOND_LIMIT = "beyond the limit of documents"

NAMED = 3
"""Number of skipped files that are named for each reason."""


def printable(text: str) -> str:
    """A text with the bytes of a file's name that are not UTF-8 written as \\xe9."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


@dataclass
class FilesReport:
    """How many files of a source are read, and how many are skipped for each reason."""

    read: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)
    """The first ``NAMED`` for each reason."""

    def add(self, path: str, reason: str | None) -> None:
        """Count a file that is skipped for this reason, or is read."""
        if reason is None:
            self.read += 1
            return
        self.skipped[reason] += 1
        first = self.first.setdefault(reason, [])
        if len(first) < NAMED:
            first.append(printable(path))

    @classmethod
    def of_list(cls, path: Path, limit: int | None) -> "FilesReport":
        """From a list that ``Inventory.save`` has written, of which the first ``limit`` files were opened."""
        report = cls()
        with path.open(encoding="utf-8") as lines:
            for record in map(json.loads, lines):
                beyond = BEYOND_LIMIT if report.read == limit else None
                report.add(record["path"], record.get("skipped", beyond))
        return report

    def lines(self) -> list[str]:
        """One line for each reason, for people."""
        return [
            f"skipped {number:,} ({reason}): {', '.join(self.first[reason])}{', ...' if number > NAMED else ''}"
            for reason, number in self.skipped.items()
        ]

    def as_json(self) -> dict[str, Any]:
        """The entry ``files`` of stats.json."""
        return {"read": self.read, "skipped": dict(self.skipped), "first_skipped": self.first}


def rounded(length: int) -> int:
    """``length`` with only its 4 leading bits kept: at most 12.5% less, and few distinct values."""
    shift = max(0, length.bit_length() - 4)
    return length >> shift << shift


@dataclass
class Stats:
    """Counts that can be added up and stored as JSON."""

    spans: int = 0
    """Parts of files that were opened."""
    documents: int = 0
    """Documents read, without empty and unreadable ones."""
    empty: int = 0
    """Documents of white space only, skipped."""
    bad: int = 0
    """Lines, or rests of files, that cannot be read, skipped."""
    first_bad: list[str] = field(default_factory=list)
    """The first ``QUOTED`` of them: file, line and reason."""
    duplicate: int = 0
    """Documents dropped because an earlier one has the same text, or nearly the same."""
    contaminated: int = 0
    """Documents dropped because they share words with an evaluation set."""
    not_kept: Counter[str] = field(default_factory=Counter)
    """Documents that have a column which the shards lack, by column."""
    characters: int = 0
    """Characters of the documents kept."""
    cut_characters: int = 0
    """Characters of them after the last token of a truncated document."""
    special_in_text: int = 0
    """Words in them such as [MASK], written as the tokenizer's special tokens."""
    unknown_characters: int = 0
    """Characters of them that became the tokenizer's unknown token, as [UNK]; of a truncated document's beginning."""
    samples: int = 0
    tokens: int = 0
    """Tokens, [CLS] and [SEP] included; 0 for shards of text."""
    bytes: int = 0
    """Size of the shards on disk."""
    document_characters: Counter[int] = field(default_factory=Counter)
    """Number of documents by ``rounded`` number of characters."""
    sample_tokens: Counter[int] = field(default_factory=Counter)
    """Number of samples by number of tokens, [CLS] and [SEP] included."""

    def add(self, other: "Stats") -> None:
        """Add the counts of ``other`` to these; keeps only the first ``QUOTED`` unreadable lines."""
        for f in dataclasses.fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))
        del self.first_bad[QUOTED:]

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Stats":
        """From ``vars(stats)``, written to JSON and read again: keys that were int are strings."""
        counters = ("document_characters", "sample_tokens")
        ints = {name: Counter({int(k): v for k, v in record[name].items()}) for name in counters}
        return cls(**{**record, **ints, "not_kept": Counter(record.get("not_kept", {}))})

    def report(self, max_seq_len: int | None) -> dict[str, Any]:
        """The content of stats.json, independent of time and machine. ``max_seq_len`` is None for shards of text."""
        report: dict[str, Any] = {
            "documents": self.documents,
            "empty": self.empty,
            "bad": self.bad,
            "first_bad": [printable(bad) for bad in self.first_bad],
            "columns_not_kept": dict(self.not_kept),
            "dropped": {"duplicate": self.duplicate, "contaminated": self.contaminated},
            "samples": self.samples,
            "bytes": self.bytes,
            "characters": self.characters,
            "document_characters": distribution(self.document_characters),
        }
        if max_seq_len is not None:
            report |= {
                "tokens": self.tokens,
                "special_in_text": self.special_in_text,
                "unknown_share": self.unknown_characters / max(self.characters - self.cut_characters, 1),
                "cut_share": self.cut_characters / max(self.characters, 1),
                "fill": self.tokens / (self.samples * max_seq_len),
                "bytes_per_token": self.bytes / self.tokens,
                "characters_per_token": (self.characters - self.cut_characters) / self.tokens,
                "sample_tokens": distribution(self.sample_tokens),
            }
        return report


def distribution(counts: Mapping[int, int]) -> dict[str, Any]:
    """Mean, percentiles and histogram of values, given as the number of times that each occurs."""
    if not counts:
        return {"mean": 0.0, "percentiles": {}, "histogram": {}}
    values, numbers = np.array(sorted(counts.items()), dtype=np.int64).T
    ranks = np.ceil(np.array(PERCENTILES) / 100 * numbers.sum())
    at = values[np.searchsorted(np.cumsum(numbers), ranks)].tolist()
    return {
        "mean": float((values * numbers).sum() / numbers.sum()),
        "percentiles": dict(zip(map(str, PERCENTILES), at, strict=True)),
        "histogram": {str(v): n for v, n in zip(values.tolist(), numbers.tolist(), strict=True)},
    }
