"""Reading each form of text on one core, and converting it to shards of text.

    python -m benchmarks.speed.forms [--rounds 5] [--gigabytes 1] [--out benchmarks/results/forms-cpu.txt] [--quick]

The text is that of the quickstart, Wikipedia leads, in one file of each form. Reading, and conversion in one worker
without the start of Python, are timed in turn, by CPU time; documents per second are those of the fastest round. Then a
new process reads ``--gigabytes`` of text from a .jsonl.zst, of recombined sentences; its peak memory is compared
with that before reading.

Each form is a line ``form name=… read_docs_per_s=… convert_docs_per_s=…``, and the last one is
``forms memory_mb=… imports_mb=… text_mb=…``.
"""

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard
from streaming import JSONWriter, MDSWriter

import convert_c4
from benchmarks import report, timing
from benchmarks.speed.loader import recombined
from scripts.quickstart import default_documents
from src.common.streams import OPENERS
from src.convert.files import Span
from src.convert.forms import read
from src.convert.sources import TextSource, iter_documents
from src.convert.stats import Stats


def text_lines(path: Path, texts: list[str]) -> None:
    """One text per line."""
    path.write_text("\n".join(text.replace("\n", " ") for text in texts))


def json_lines(path: Path, texts: Iterable[str]) -> None:
    """One object per line."""
    with path.open("w") as out:
        out.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def json_array(path: Path, texts: list[str]) -> None:
    """One array of objects."""
    path.write_text(json.dumps([{"text": text} for text in texts]))


def separated(path: Path, texts: list[str], delimiter: str) -> None:
    """A header and rows, with quotes where they are needed."""
    with path.open("w", newline="") as out:
        csv.writer(out, delimiter=delimiter).writerows([["text"], *([text] for text in texts)])


def parquet(path: Path, texts: list[str]) -> None:
    """A table of one column."""
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)


def arrow(path: Path, texts: list[str]) -> None:
    """The format of streams."""
    table = pyarrow.table({"text": texts})
    with pyarrow.ipc.new_stream(str(path), table.schema) as out:
        out.write_table(table, max_chunksize=1000)


def shards(path: Path, texts: list[str], writer: type[MDSWriter] | type[JSONWriter]) -> None:
    """A folder of streaming's shards."""
    with writer(out=str(path), columns={"text": "str"}) as out:
        for text in texts:
            out.write({"text": text})


WRITERS: dict[str, Callable[[Path, list[str]], None]] = {
    "txt": text_lines,
    "jsonl": json_lines,
    "json": json_array,
    "csv": partial(separated, delimiter=","),
    "tsv": partial(separated, delimiter="\t"),
    "parquet": parquet,
    "arrow": arrow,
    "mds": partial(shards, writer=MDSWriter),
    "streaming-json": partial(shards, writer=JSONWriter),
}
COMPRESSED = [f"jsonl.{compression}" for compression in OPENERS if compression] + ["csv.zst"]


def write_zst(path: Path, texts: Iterable[str]) -> int:
    """Write a .jsonl.zst piece by piece; returns the bytes of text."""
    size = 0
    with path.open("wb") as out, zstandard.ZstdCompressor().stream_writer(out) as stream:
        for text in texts:
            size += stream.write(json.dumps({"text": text}).encode() + b"\n")
    return size


def compress(path: Path, data: bytes) -> None:
    """Write the data under the compression that the path names."""
    how = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
    path.write_bytes(how[path.suffix](data))


def read_all(place: str) -> int:
    """The number of documents."""
    return sum(1 for _ in iter_documents(TextSource((place,))))


def convert(place: str, out: str) -> None:
    """Write shards of text, in this process."""
    options = ["--splits", "train", "--num_workers", "1", "--overwrite"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        convert_c4.main(["--out_root", out, "--source", place, *options])


def peak_of(path: str) -> tuple[float, float]:
    """Memory of this process in MB, before it reads a file and at the peak while it reads. Linux only."""

    def value(name: str) -> float:
        fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields[name].split()[0]) / 1e3

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = value("VmRSS")
    for _ in read(Span(path), "text", False, Stats()):
        pass
    return before, value("VmHWM")


def cpu_clock(run: Callable[[], object]) -> float:
    """CPU seconds of all threads of this process."""
    started = time.process_time()
    run()
    return time.process_time() - started


def main(argv: list[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="text to read for the peak memory")
    parser.add_argument("--out", type=Path, help="file for what is printed")
    parser.add_argument("--quick", action="store_true", help="every part in seconds; its figures mean little")
    args = parser.parse_args(argv)
    texts = [text for text in default_documents() if text.strip()]
    if args.quick:
        args.rounds, args.gigabytes, texts = 1, 0.001, texts[:200]
    say = report.Printed()
    packages = ", ".join(f"{name} {version(name)}" for name in ("pyarrow", "zstandard", "mosaicml-streaming"))
    say(f"# {report.described(report.machine('cpu'))}, {packages}; {len(texts):,} documents, {args.rounds} rounds")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
        folder = Path(temporary)
        for name, write in WRITERS.items():
            write(folder / f"a.{name}", texts)
        for name in COMPRESSED:
            kind = name.split(".")[0]
            compress(folder / f"a.{name}", (folder / f"a.{kind}").read_bytes())
        names = [*WRITERS, *COMPRESSED]
        runs: dict[tuple[str, str], Callable[[], object]] = {}
        for name in names:
            place = str(folder / f"a.{name}")
            assert read_all(place) == len(texts), name
            runs[name, "read"] = partial(read_all, place)
            runs[name, "convert"] = partial(convert, place, str(folder / "out"))
        times = timing.interleaved(runs, args.rounds, cpu_clock, warmup=1)
        speed = {run: round(len(texts) / min(seconds)) for run, seconds in times.items()}
        for name in names:
            figures = (f"{part}_docs_per_s={speed[name, part]}" for part in ("read", "convert"))
            say(f"form name={name} {' '.join(figures)}")
        size = write_zst(folder / "large.jsonl.zst", recombined(texts, round(args.gigabytes * 1e9)))
        before, after = report.in_new_process(peak_of, str(folder / "large.jsonl.zst"))
    say(f"forms memory_mb={after:.0f} imports_mb={before:.0f} text_mb={size / 1e6:.0f}")
    say.write(args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
