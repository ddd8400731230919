"""How cost grows with length, GPUs and model size: measured on this machine, or calculated.

    python -m benchmarks.speed.scaling [--parts length gpus sizes] [--lengths 128 512] [--rounds 5] [--out FOLDER]
    python -m benchmarks.speed.scaling --toy      # seconds: only that all of it runs

length    A small model (4 layers of 256) trains on 8,192 tokens in sequences of 128 … 8,192 without padding: time and
          peak memory per token of MosaicBERT, of Hugging Face's BERT, and of MosaicBERT padded, while its bias takes at
          most 2 GiB. Variants, checks (up to 2,048 tokens) and memory as in benchmarks/speed/step.py.
gpus      Calculated for 8 … 512 GPUs and a global batch of 4,096 sequences of 128, in microbatches of 128. A ring sends
          2 (n - 1) / n of the gradients' bytes from each GPU (Patarasuk and Yuan, 2009). It overlaps with the backward
          pass of the last microbatch, two thirds of its time, except for the last of DDP's buckets. Assumed:
          --gpu_tokens_per_s and the bandwidths of LINKS.
sizes     The YAMLs' models: parameters; FLOPs per token; memory of weights, gradients and Adam (16 bytes per parameter,
          fp32) and of what the backward pass of a microbatch of 128 x 128 tokens needs (in bf16, measured on one and
          two sequences and extrapolated).

Last line: ``scaling time_per_token=… memory_per_token=… hf_time_per_token=… hf_memory_per_token=…
efficiency_512=… parameters_large=…``; the first four are the value at the longest length over that at the shortest.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import report, timing
from benchmarks.speed import step
from benchmarks.variants import VARIANTS, Batch, Shape, Variant, check, make_batch

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
SMALL = Shape(layers=4, hidden=256, heads=8, width=1024, vocabulary=4096, dropout=0.0, length=max(LENGTHS))
TOKENS = max(LENGTHS)
CHECKED = 2048
"""Longest sequence in a check: plain attention needs memory for its square."""
BIAS_LIMIT = 2**31

BUCKET = 25 * 2**20
"""Bytes of a bucket, the gradients that DDP sends at once."""
NODE = 8
"""GPUs of a node."""
LINKS = {
    "NVLink 450 GB/s in a node, 8 x 400 Gb/s between nodes": (450e9, 400e9),
    "NVLink 450 GB/s in a node, 1 x 100 Gb/s between nodes": (450e9, 12.5e9),
}
"""Bytes per second of the links inside a node and between nodes; a real all-reduce reaches some 80% of it."""
GPUS = (8, 16, 32, 64, 128, 256, 512)
GLOBAL_TOKENS, MICROBATCH_TOKENS = 4096 * 128, 128 * 128
YAMLS = ("quickstart", "mosaic_bert", "mosaic_bert_large")


def batch_of(S: int, tokens: int) -> Batch:
    return make_batch(torch.full((tokens // S,), S), SMALL.vocabulary, 0.3)


def variants_at(S: int, tokens: int) -> list[str]:
    """The variants that fit at a length."""
    bias = 4 * (tokens // S) * SMALL.heads * S * S
    return ["mosaic_bert", "hf_bert", *(["mosaic_bert_padded"] if bias <= BIAS_LIMIT else [])]


def length(lengths: list[int], tokens: int, rounds: int, memory: bool) -> list[dict]:
    """A row for each length and variant."""
    rows = []
    for S in lengths:
        names, batch = variants_at(S, tokens), batch_of(S, tokens)
        few = make_batch(torch.tensor([min(S, CHECKED), 7]), SMALL.vocabulary, 0.3)
        for name in names:
            check(VARIANTS[name], SMALL, "cpu", torch.float32, few)
        trained = step.build(names, SMALL, "cpu", torch.float32)
        runs = {name: partial(trained[name].step, batch) for name in names}
        times = timing.interleaved(runs, rounds, timing.wall_clock("cpu"), warmup=1)
        del trained, runs
        for name in names:
            rows.append({"length": S, "arm": name, "us_per_token": 1e6 * min(times[name]) / tokens})
            if memory:
                peak = report.own_process("benchmarks.speed.scaling", "--peak_memory", name, S, tokens)
                rows[-1]["bytes_per_token"] = peak / tokens
            print(f"length {S} {name}: {rows[-1]}", flush=True)
    return rows


def growth(rows: list[dict], variant: str, field: str) -> float:
    """A value at the longest length over that at the shortest."""
    values = {row["length"]: row[field] for row in rows if row["arm"] == variant}
    return values[max(values)] / values[min(values)]


def gpus(parameters: int, tokens_per_s: float) -> list[dict]:
    """A calculated row for each network and number of GPUs."""
    rows = []
    for link, (inside, between) in LINKS.items():
        for n in GPUS:
            bandwidth = inside if n <= NODE else min(inside, between)
            sent = 2 * (n - 1) / n * 4 * parameters
            compute, reduce = GLOBAL_TOKENS / n / tokens_per_s, sent / bandwidth
            last = reduce * min(1.0, BUCKET / (4 * parameters))
            shown = max(last, reduce - 2 / 3 * min(compute, MICROBATCH_TOKENS / tokens_per_s))
            rows.append(
                {
                    "link": link,
                    "gpus": n,
                    "bytes_per_gpu": sent,
                    "compute_ms": 1e3 * compute,
                    "reduce_ms": 1e3 * reduce,
                    "not_hidden_ms": 1e3 * shown,
                    "efficiency": compute / (compute + shown),
                }
            )
    return rows


def shape_of(name: str) -> Shape:
    """The size of a YAML's model, with base's vocabulary."""
    config = yaml.safe_load((report.ROOT / "yamls" / f"{name}.yaml").read_text())["model"]["model_config"]
    fields = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    return Shape(*(config[field] for field in fields))


def sizes(names: list[str]) -> list[dict]:
    """A row for each model."""
    from src.mosaic_bert import MosaicBert  # Composer takes seconds to import
    from src.train.validate import extrapolated, saved_bytes

    rows = []
    for name in names:
        variant = VARIANTS["mosaic_bert"](shape_of(name), "cpu", torch.bfloat16)
        with torch.device("meta"):
            composer = MosaicBert(variant.model.config)

        def kept(sequences: int, variant: Variant = variant) -> int:
            (part,) = variant.parts(make_batch(torch.full((sequences,), 128), 30528, 0.3))
            return saved_bytes(variant.model, lambda: variant.run(part))

        parameters = sum(p.numel() for p in variant.model.parameters())
        rows.append(
            {
                "model": name,
                "layers": variant.shape.layers,
                "hidden": variant.shape.hidden,
                "parameters": parameters,
                "flops_per_token": composer.flops_per_batch(make_batch(torch.tensor([128]), 30528, 0.3)) / 128,
                "state_bytes": 16 * parameters,
                "saved_bytes_128x128": extrapolated(kept, 128),
            }
        )
        print(f"size {name}: {parameters:,} parameters", flush=True)
    return rows


TABLES: dict[str, tuple[str, dict[str, Callable[[dict], str]]]] = {
    "length": (
        "Length: 8,192 tokens, 4 layers of 256, no padding; measured",
        {
            "variant": lambda r: r["arm"],
            "length": lambda r: f"{r['length']:,}",
            "µs per token": lambda r: f"{r['us_per_token']:.0f}",
            "bytes per token": lambda r: f"{r['bytes_per_token']:,.0f}" if "bytes_per_token" in r else "",
        },
    ),
    "gpus": (
        "GPUs: base, a global batch of 4,096 x 128; calculated",
        {
            "network": lambda r: r["link"],
            "GPUs": lambda r: str(r["gpus"]),
            "MB sent by each GPU": lambda r: f"{r['bytes_per_gpu'] / 1e6:.0f}",
            "compute, ms": lambda r: f"{r['compute_ms']:.1f}",
            "all-reduce, ms": lambda r: f"{r['reduce_ms']:.1f}",
            "not overlapped, ms": lambda r: f"{r['not_hidden_ms']:.1f}",
            "efficiency": lambda r: f"{r['efficiency']:.0%}",
        },
    ),
    "sizes": (
        "Model size: vocabulary 30,528, sequences of 128; calculated, activations measured",
        {
            "model": lambda r: r["model"],
            "layers x hidden": lambda r: f"{r['layers']} x {r['hidden']}",
            "M parameters": lambda r: f"{r['parameters'] / 1e6:.1f}",
            "GFLOP per token": lambda r: f"{r['flops_per_token'] / 1e9:.2f}",
            "weights, gradients, Adam, GiB": lambda r: f"{r['state_bytes'] / 2**30:.2f}",
            "activations of 128 x 128 tokens, GiB": lambda r: f"{r['saved_bytes_128x128'] / 2**30:.2f}",
        },
    ),
}


def table(part: str, rows: list[dict]) -> str:
    columns = TABLES[part][1]
    return report.table([*columns], [[column(row) for column in columns.values()] for row in rows])


def publish(folder: Path, measured: dict[str, Any]) -> None:
    """Add parts to the folder's results."""
    path = folder / "scaling-cpu.json"
    known = (json.loads(path.read_text()) if path.exists() else {}) | measured
    lines = []
    for part in (part for part in TABLES if part in known):
        about = f"{report.described(known[part]['machine'])}. `{known[part]['command']}`"
        lines += [f"## {TABLES[part][0]}", "", about, "", table(part, known[part]["rows"]), ""]
    report.write_page(path, "How cost grows", "benchmarks.speed.scaling", lines, known)


def summary(rows: dict[str, list[dict]]) -> str:
    """The last line."""
    fields = {}
    if "length" in rows:
        for prefix, variant in (("", "mosaic_bert"), ("hf_", "hf_bert")):
            fields[f"{prefix}time_per_token"] = f"{growth(rows['length'], variant, 'us_per_token'):.3f}"
            if "bytes_per_token" in rows["length"][0]:
                fields[f"{prefix}memory_per_token"] = f"{growth(rows['length'], variant, 'bytes_per_token'):.3f}"
    if "gpus" in rows:
        fields["efficiency_512"] = f"{next(r['efficiency'] for r in rows['gpus'] if r['gpus'] == 512):.3f}"
    if "sizes" in rows:
        fields["parameters_large"] = rows["sizes"][-1]["parameters"]
    return f"scaling {' '.join(f'{name}={value}' for name, value in fields.items())}"


def main(argv: list[str]) -> None:
    """Measure, calculate, print."""
    parser = report.parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=[*TABLES], default=[*TABLES])
    parser.add_argument(
        "--lengths", type=int, nargs="+", choices=LENGTHS, default=[*LENGTHS], help="of the part length"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--gpu_tokens_per_s",
        type=float,
        default=400_000,
        help="default: an H100's goal",
    )
    parser.add_argument("--out", type=Path, help="folder for scaling-cpu.json and .md; other parts there are kept")
    parser.add_argument("--toy", action="store_true", help="tiny; its figures mean nothing")
    parser.add_argument("--peak_memory", nargs=3, help=argparse.SUPPRESS)  # the process that measures it
    args = parser.parse_args(argv)
    if args.peak_memory:
        name, S, tokens = args.peak_memory
        batch = batch_of(int(S), int(tokens))
        print(step.peak_bytes_here(lambda: step.build([name], SMALL, "cpu", torch.float32)[name], batch))
        return
    lengths, tokens, models = args.lengths, TOKENS, [*YAMLS]
    if args.toy:
        lengths, tokens, models, args.rounds = [128, 256], 256, ["quickstart"], 1
    run: dict[str, Callable[[], list[dict]]] = {
        "length": lambda: length(lengths, tokens, args.rounds, memory=not args.toy),
        "gpus": lambda: gpus(137_000_000, args.gpu_tokens_per_s),
        "sizes": lambda: sizes(models),
    }
    print(f"# {report.described(report.machine('cpu'))}", flush=True)
    rows = {}
    for part in (part for part in TABLES if part in args.parts):
        rows[part] = run[part]()
        print(f"\n{TABLES[part][0]}\n\n{table(part, rows[part])}\n", flush=True)
        if args.out is not None:
            command = f"python -m benchmarks.speed.scaling {' '.join(argv)}"
            about = {"machine": report.machine("cpu"), "command": command}
            publish(args.out, {part: {**about, "rows": rows[part]}})
    print(summary(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
