"""Parts of benchmarks/gpu/run.sh that only it runs.

    TOY=1 TRITON_INTERPRET=1 python -m benchmarks.gpu.parts curve --out FOLDER      one part, here on a CPU

    environment    card, versions, measured peaks, host time of a launch
    curve          tokens per second over microbatches, lengths, accumulation, and ways to copy a batch to the card
    profile        kernels of a step by time, and the share of it that the card is busy
    trainer        main.py on .gpu/mds, with Composer from .gpu/whl if it is not installed

Only the trainer needs Composer and streaming. With TOY=1 all parts run on a CPU, and their figures mean nothing.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

from benchmarks import report, timing
from benchmarks.speed import roofline, step
from benchmarks.variants import MosaicBert, Shape, c4_like_lengths, make_batch, to_device
from src import layer_norm_triton
from src.attention_tiles import tile_tables
from src.bert_padding import Layout
from src.common.environment import ROOT
from src.data.microbatches import split_unpadded
from src.data.packing import Microbatch

TOY = os.environ.get("TOY") == "1"
DEVICE, DTYPE = ("cpu", torch.float32) if TOY else ("cuda", torch.bfloat16)
SHAPE = step.TOY if TOY else Shape()
OURS = partial(MosaicBert, attention="triton", kernels="triton")


def synchronize() -> None:
    if not TOY:
        torch.cuda.synchronize()


def write(folder: Path, name: str, data: Any) -> None:
    """Called after each row, so that a part that is stopped leaves what it has."""
    report.write_json(folder / f"{name}.json", data)


def host_us(function: Callable[[], Any], calls: int) -> float:
    """Median microseconds that the host needs to launch ``function``, without waiting for the card."""
    times = []
    for _ in range(3 + calls):
        started = time.perf_counter()
        function()
        times.append(1e6 * (time.perf_counter() - started))
    synchronize()
    return statistics.median(times[3:])


def peaks() -> tuple[float, float]:
    """This card's FLOP/s in a large bf16 product and bytes/s in a large copy, measured."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=DTYPE) for _ in range(2))
    source, target = (torch.empty(2**30, dtype=torch.int8, device="cuda") for _ in range(2))
    runs = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    seconds = timing.interleaved(runs, 10, timing.device_clock("cuda"))
    return 2 * 8192**3 / min(seconds["product"]), 2 * 2**30 / min(seconds["copy"])


def environment(out: Path) -> None:
    about: dict[str, Any] = {**report.machine(DEVICE), "cores": os.cpu_count()}
    if not TOY:
        card = torch.cuda.get_device_properties(0)
        about |= {"memory_gib": card.total_memory / 2**30, "multiprocessors": card.multi_processor_count}
        fields = "driver_version,power.limit,clocks.max.sm,clocks.max.mem"
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        about[fields] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        matmul, bandwidth = peaks()
        about |= {"matmul_tflops": matmul / 1e12, "copy_tb_per_s": bandwidth / 1e12}
    x, weight = torch.randn(4 if TOY else 128, 768, device=DEVICE), torch.ones(768, device=DEVICE)
    calls = 3 if TOY else 300
    about["host_us_of_an_addition"] = host_us(lambda: x + x, calls)
    about["host_us_of_a_kernel"] = host_us(lambda: layer_norm_triton.layer_norm(x, weight, weight, 1e-12, x), calls)
    write(out, "environment", about)
    print("\n".join(f"{name}: {value}" for name, value in about.items()))


def flops(shape: Shape, lengths_B: Tensor, masked: int) -> int:
    """Of a step, as ``MosaicBert.flops_per_batch``, which needs Composer: attention recomputes nothing."""
    counted = roofline.parts(shape, lengths_B.long(), masked, roofline.Kernels())
    attention = 12 * shape.layers * shape.hidden * int(lengths_B.long().square().sum())
    return attention + sum(part.flops for part in counted if part.group == "products")


class Training:
    """Our model and its optimizer, on microbatches as the product cuts them."""

    def __init__(self, dropout: float):
        self.variant = OURS(replace(SHAPE, dropout=dropout), DEVICE, DTYPE)
        self.optimizer = torch.optim.AdamW(self.variant.model.parameters(), lr=1e-4, fused=True)

    def microbatch(self, B: int, S: int, fill: str) -> Microbatch:
        """A microbatch of B sequences, on the host."""
        lengths = c4_like_lengths(B, S) if fill == "c4" else torch.full((B,), S)
        return split_unpadded(make_batch(lengths, SHAPE.vocabulary, 0.3), B, tile_tables)[0]

    def step(self, parts: list[Microbatch], copy: str) -> None:
        """Forward and backward of each microbatch, then the optimizer."""
        masked = sum(part["num_masked"] for part in parts)
        for part in parts:
            part = to_device(part, DEVICE, copy == "pinned") if copy != "before" else part
            inputs = {**part.values, "layout": Layout.from_batch(part)}
            (self.variant.run(inputs) / masked).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def speed(self, part: Microbatch, microbatches: int, copy: str, steps: int) -> dict[str, float]:
        """Speed and peak memory of steps that follow each other without waiting."""
        parts = [to_device(part, DEVICE) if copy == "before" else part] * microbatches
        for _ in range(1 if TOY else 3):
            self.step(parts, copy)
        synchronize()
        if not TOY:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        for _ in range(steps):
            self.step(parts, copy)
        enqueued = time.perf_counter() - started
        synchronize()
        took = time.perf_counter() - started
        tokens = part["num_tokens"] * microbatches
        counted = microbatches * flops(SHAPE, part["cu_seqlens"].diff(), part["num_masked"])
        return {
            "tokens": tokens,
            "ms": 1e3 * took / steps,
            "tokens_per_s": tokens * steps / took,
            "tflops": counted * steps / took / 1e12,
            "host_share": enqueued / took,  # near 1: the card waits for the host
            "peak_gib": 0.0 if TOY else torch.cuda.max_memory_allocated() / 2**30,
        }


GRID = [
    *((0.1, B, S, "c4", 1, "before") for B, S in ((512, 128), (128, 512), (64, 2048))),
    *((0.1, B, S, "1.0", 1, "before") for B, S in ((512, 128), (128, 512), (32, 2048))),
    *((0.1, B, 128, "c4", 1, "before") for B in (64, 128, 256, 1024)),
    *((0.1, B, 512, "c4", 1, "before") for B in (32, 256)),
    *((0.1, B, 128, "c4", n, copy) for B, n in ((128, 8), (512, 2)) for copy in ("before", "pageable", "pinned")),
    (0.0, 512, 128, "c4", 1, "before"),
]
TOY_GRID = [(0.1, 4, 32, "c4", 1, "before"), (0.1, 4, 32, "c4", 2, "pageable"), (0.0, 2, 32, "1.0", 1, "before")]
COLUMNS = ("dropout", "sequences", "length", "fill", "microbatches", "copy")
"""Of GRID; ``sequences`` per microbatch, ``microbatches`` per step, ``copy``: before the step, or from which memory."""


def curve(out: Path) -> None:
    rows, training, current = [], None, None
    for setting in TOY_GRID if TOY else GRID:
        dropout, B, S, fill, microbatches, copy = setting
        if dropout != current or training is None:
            training, current = None, dropout  # free the one before
            training = Training(dropout)
        row: dict[str, Any] = dict(zip(COLUMNS, setting, strict=True))
        try:
            row |= training.speed(training.microbatch(B, S, fill), microbatches, copy, 1 if TOY else 8)
        except torch.OutOfMemoryError as error:
            row["error"] = str(error).splitlines()[0]
            torch.cuda.empty_cache()
        rows.append(row)
        write(out, "curve", rows)
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)


def profile(out: Path) -> None:
    training, data = Training(0.1), {}
    kind = DeviceType.CPU if TOY else DeviceType.CUDA
    activities = [ProfilerActivity.CPU, *([] if TOY else [ProfilerActivity.CUDA])]
    settings = [(128, 128, "c4"), (512, 128, "c4"), (128, 512, "c4"), (32, 2048, "1.0")]
    for B, S, fill in [(4, 32, "c4")] if TOY else settings:
        parts = [to_device(training.microbatch(B, S, fill), DEVICE)]
        for _ in range(1 if TOY else 3):
            training.step(parts, "before")
        synchronize()
        with profiler(activities=activities) as recorded:
            training.step(parts, "before")
            synchronize()
        spent, calls, begin, end = Counter(), Counter(), float("inf"), 0.0
        for event in recorded.events() or ():
            if event.device_type == kind and not event.is_user_annotation and "Sync" not in event.name:
                span = event.time_range
                spent[event.name] += span.end - span.start
                calls[event.name] += 1
                begin, end = min(begin, span.start), max(end, span.end)
        busy, took, name = sum(spent.values()), end - begin, f"S={S} B={B} fill={fill}"
        data[name] = {
            "launches": sum(calls.values()),
            "ms": took / 1e3,
            "busy_share": busy / took,
            "kernels": [{"name": n[:120], "calls": calls[n], "ms": us / 1e3} for n, us in spent.most_common(30)],
        }
        write(out, "profile", data)
        print(f"{name}: {sum(calls.values())} launches in {took / 1e3:.1f} ms, busy for {busy / took:.0%} of it")


TRAINED = {128: "device_train_microbatch_size=512 global_train_batch_size=2048 max_duration=16ba"}
TRAINED[512] = "device_train_microbatch_tokens=65536 device_train_microbatch_size=null"
TRAINED[512] += " global_train_batch_size=1024 max_duration=12ba"
TOY_TRAINED = {128: "device_train_microbatch_size=16 global_train_batch_size=32 max_duration=4ba"}
"""By ``max_seq_len``; shards in .gpu/mds/128 and .gpu/mds/512."""


def trainer(out: Path) -> None:
    """Some steps of the reference recipe at two lengths; step_monitor logs the tokens per second."""
    here, environment, rows = ROOT / ".gpu", dict(os.environ), []
    if subprocess.run([sys.executable, "-c", "import composer"], capture_output=True).returncode:
        environment["PYTHONPATH"] = str(out / "site")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", out / "site"]
        subprocess.run([*pip, *here.glob("whl/*.whl")], check=True)
    for length, chosen in (TOY_TRAINED if TOY else TRAINED).items():
        settings = f"""
            {chosen} max_seq_len={length} data_local={here}/mds/{length} tokenizer_name={here}/tokenizer
            scheduler.t_warmup=1ba eval_interval=1000ba save_folder=null autoresume=false progress_bar=false
            callbacks.step_monitor.warmup=2 callbacks.step_monitor.window_size=8
            loggers.metrics_file.path={out}/{length}.jsonl loggers.tensorboard.log_dir={out}/tensorboard
        """.split()
        settings += [] if TOY else ["model.model_config.vocab_size=30528"]  # C4's; the tokenizer in .gpu is small
        yaml = "yamls/quickstart.yaml" if TOY else "yamls/mosaic_bert.yaml"
        if subprocess.run([sys.executable, "main.py", yaml, *settings], env=environment).returncode:
            sys.exit(f"length {length}: main.py failed")
        logged = [json.loads(line) for line in (out / f"{length}.jsonl").read_text().splitlines()]
        last = [line for line in logged if "step/tokens_per_s" in line][-1]
        microbatch = chosen.split()[0].removeprefix("device_train_microbatch_")
        rows.append({"length": length, "microbatch": microbatch})
        rows[-1] |= {name: x for name, x in last.items() if name.startswith("step/")}
        write(out, "trainer", rows)
        print(rows[-1], flush=True)


def main(argv: list[str]) -> None:
    """Run a part."""
    parts = {function.__name__: function for function in (environment, curve, profile, trainer)}
    parser = report.parser(__doc__)
    parser.add_argument("part", choices=parts)
    parser.add_argument("--out", type=Path, required=True, help="folder for PART.json")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    parts[args.part](args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
