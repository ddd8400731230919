"""Local files and URLs as streams of bytes, decompressed piece by piece."""

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

import fsspec
import zstandard

from src.common.errors import first_line


class _Frames(io.RawIOBase):
    """A file of compressed frames, one after another.

    The readers of bz2 and lzma end silently at a damaged later frame, and zstandard's at a truncated one.
    """

    def __init__(self, file: IO[bytes], decompressor: Callable[[], Any]):
        self.file, self.decompressor = file, decompressor
        self.frame, self.rest, self.ready = None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            piece, self.rest = self.rest or self.file.read(1024), b""  # of zeros it makes 32 MB; of text some KB
            if not piece:
                if self.frame is None or not self.frame.eof:
                    raise EOFError("the file ends within a frame")
                return 0
            if self.frame is None or self.frame.eof:
                if not (piece := piece.lstrip(b"\0")):  # zeros between frames are padding
                    continue
                self.frame = self.decompressor()
            self.ready = memoryview(self.frame.decompress(piece))
            self.rest = self.frame.unused_data
        count = min(len(buffer), len(self.ready))
        buffer[:count] = self.ready[:count]
        self.ready = self.ready[count:]
        return count


def _opener(decompressor: Callable[[], Any]) -> Callable[[Any], Any]:
    return lambda file: io.BufferedReader(_Frames(file, decompressor), 1 << 17)


OPENERS: dict[str, Callable[[Any], Any]] = {
    "": contextlib.nullcontext,
    "gz": gzip.open,
    "bz2": _opener(bz2.BZ2Decompressor),
    "xz": _opener(lzma.LZMADecompressor),
    "zst": _opener(lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()),  # zstd --long=31
}
"""By the suffix of a compression: a stream of its bytes -> a buffered stream of the decompressed ones."""


@contextlib.contextmanager
def open_stream(path: str, compression: str = "") -> Iterator[Any]:
    """A local file or a URL as a buffered stream of bytes, decompressed; reading it may raise UNREADABLE."""
    if "://" in path:
        file = io.BufferedReader(fsspec.open(path, "rb").open(), 1 << 17)  # pyright: ignore
    else:
        file = open(path, "rb")
    with file:
        if compression and not file.peek(1):  # gzip would take an interrupted download for a text without lines
            raise EOFError("the file has no bytes")
        with OPENERS[compression](file) as stream:
            yield stream


UNREADABLE = (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
"""What reading a damaged stream raises. For an OSError, ``damage`` tells."""


def damage(error: Exception) -> str:
    """What is wrong with the content of a file; raises the error again if it is one of the disk or the network."""
    plain = type(error) is OSError and error.errno is None  # bz2 and pyarrow raise these
    if isinstance(error, OSError) and not plain and not isinstance(error, gzip.BadGzipFile):
        raise error
    return first_line(error)
