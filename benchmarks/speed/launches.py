"""What one microbatch asks of a GPU, counted without one: launches, bytes, and the host's time for them.

    TRITON_INTERPRET=1 python -m benchmarks.speed.launches [--toy]      # base, 128 sequences, C4's lengths up to 128

A microbatch that adds to gradients: forward, loss, backward, bf16 autocast, dropout, on fake tensors, which have no
memory. Our kernels are not run. First with weights cast in each microbatch, as with FSDP; then once
per step, as in other runs (``CastWeightsOnce`` of train/callbacks.py).

aten      PyTorch operations that launch at least one kernel: all but views and memory without contents.
triton    Launches of our kernels.
bytes     Of both: each argument read once, each result written once; of an embedding's table, the rows that are read.
host_ms   Process CPU time with as many layers of tiny widths, median of 50. On a GPU, Triton adds its own per launch.

Last line: ``launches aten=… triton=… bytes=… host_ms=…``.
"""

import collections
import contextlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks import report
from benchmarks.variants import Shape, c4_like_lengths
from src import bert_encoder, triton_common
from src.attention_tiles import tile_tables
from src.bert_layers import BertForMaskedLM
from src.bert_padding import unpad_layout
from src.configuration_bert import MosaicBertConfig

TOY = Shape(layers=2, hidden=24, heads=2, width=48, vocabulary=64)
NO_LAUNCH = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view", "lift_fresh")


class Launches(TorchDispatchMode):
    """What would be launched while it is entered, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.aten: collections.Counter[str] = collections.Counter()
        self.triton: collections.Counter[str] = collections.Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # pyright: ignore
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if func.namespace == "aten" and not func.is_view and name not in NO_LAUNCH:
            self.aten[name] += 1
            self.bytes += 2 * moved(out) if name in ("embedding", "index_select") else moved(args, kwargs) + moved(out)
        return out

    def launch(self, kernel: Any, *arguments: Any) -> None:
        self.triton[kernel.__name__] += 1
        self.bytes += moved(arguments)


def moved(*arguments: Any) -> int:
    """Bytes of all different tensors; those of an expanded dimension once."""
    tensors = {id(x): x for x in tree_leaves(arguments) if isinstance(x, Tensor)}.values()
    return sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in tensors)


@contextlib.contextmanager
def step(launch: Callable[..., None], cast_once: bool) -> Iterator[None]:
    """Around microbatches; ``launch`` is called in place of kernels. Embeddings have a GPU's dropout, one operation."""
    dropout = lambda x, p, training: torch.native_dropout(x, p, training)[0]  # noqa: E731
    kernels = mock.patch.object(type(triton_common.keep_mask), "__getitem__", lambda kernel, _: partial(launch, kernel))
    casts = torch.autocast("cpu", enabled=False) if cast_once else contextlib.nullcontext()
    with kernels, mock.patch.object(bert_encoder, "dropout", dropout), casts:
        yield


def microbatch(shape: Shape, lengths: Tensor, fake: FakeTensorMode | None = None) -> Callable[[], None]:
    """A function that adds the gradients of sequences of ``lengths`` (B,), 30% of them masked."""
    sizes: Any = dict(hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads)
    sizes |= dict(intermediate_size=shape.width, vocab_size=shape.vocabulary, hidden_dropout_prob=shape.dropout)
    layout, masked_index = unpad_layout(lengths), torch.arange(0, int(lengths.sum()), 10 / 3).long()
    inputs: Any = (
        layout.indices,
        replace(layout, tables=tile_tables(layout)),
        masked_index,
        torch.ones_like(masked_index),
    )
    with fake or contextlib.nullcontext():
        model = BertForMaskedLM(MosaicBertConfig(**sizes, attention="triton", kernels="triton")).train()
        if fake is not None:  # without values, so the slopes cannot be checked
            model.bert.encoder.alibi.checked = model.bert.encoder.alibi.slopes
            inputs = tree_map_only(Tensor, fake.from_tensor, inputs)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss: Any = model.forward_unpadded(*inputs).loss
        loss.backward()

    return run


def count(shape: Shape, lengths: Tensor, cast_once: bool) -> Launches:
    """Of the second microbatch of a step."""
    counted = Launches()
    run = microbatch(shape, lengths, fake := FakeTensorMode())
    with fake, warnings.catch_warnings(), step(lambda *args, **_: counted.launch(*args), cast_once):
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # bert_padding.py compares some
        run()
        counted = Launches()
        with counted:
            run()
    return counted


def host_ms(layers: int, cast_once: bool) -> float:
    """Median process CPU time of a microbatch of tiny tensors, in milliseconds."""
    run, times = microbatch(replace(TOY, layers=layers), torch.tensor([5, 3])), []
    with step(lambda *_, **__: None, cast_once):
        for _ in range(53):
            started = time.process_time()
            run()
            times.append(1e3 * (time.process_time() - started))
    return statistics.median(times[3:])


def main(argv: list[str]) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--toy", action="store_true", help="2 layers")
    shape, B, S = (TOY, 4, 16) if parser.parse_args(argv).toy else (Shape(), 128, 128)
    torch.set_num_threads(1)
    for cast_once in (False, True):
        counted = count(shape, c4_like_lengths(B, S), cast_once)
        print("\n".join(f"{number:5d} {name}" for name, number in (counted.aten + counted.triton).most_common()))
        sums = f"aten={counted.aten.total()} triton={counted.triton.total()} bytes={counted.bytes}"
        print(f"launches {sums} host_ms={host_ms(shape.layers, cast_once):.1f}")


if __name__ == "__main__":
    main(sys.argv[1:])
