"""How cost grows with length, GPUs and model size: measured on this machine, or calculated.

    python -m benchmarks.speed.scaling [--parts length gpus sizes] [--lengths 128 512] [--rounds 5] [--out FOLDER]
    python -m benchmarks.speed.scaling --toy      # seconds: only that all of it runs

length    A small model (4 layers of 256) trains on 8,192 tokens in sequences of 128 … 8,192 without padding: time and
          peak memory per token of MosaicBERT, of Hugging Face's BERT, and of MosaicBERT padded while its bias takes at
          most 2 GiB. Checks (up to 2,048 tokens) and memory as in benchmarks/speed/step.py.
gpus      Calculated for 8 … 512 GPUs and a global batch of 4,096 sequences of 128, in microbatches of 128. A ring sends
          2 (n - 1) / n of the gradients' bytes from each GPU (Patarasuk and Yuan, 2009). It overlaps with the backward
          pass of the last microbatch, two thirds of its time, except for the last of DDP's buckets. Assumed:
          --gpu_tokens_per_s and the bandwidths of LINKS.
sizes     The YAMLs' models: parameters; FLOPs per token; memory of weights, gradients and Adam (16 bytes per parameter,
          fp32) and of what the backward pass of 128 x 128 tokens needs (bf16, extrapolated from 1 and 2 sequences).

Last line: ``scaling time_per_token=… memory_per_token=… hf_time_per_token=… hf_memory_per_token=…
efficiency_512=… parameters_large=…``; the first four are ratios of the longest length to the shortest.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import yaml

from benchmarks import report, timing
from benchmarks.speed import step
from benchmarks.variants import VARIANTS, Shape, Variant, check, make_batch, step_flops
from src.common.environment import ROOT

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


def length(lengths: list[int], tokens: int, rounds: int, memory: bool) -> list[dict]:
    """A row for each length and variant."""
    rows = []
    for S in lengths:
        fits = 4 * tokens // S * SMALL.heads * S * S <= BIAS_LIMIT
        names = ["mosaic_bert", "hf_bert", *["mosaic_bert_padded"] * fits]
        batch = make_batch(step.lengths_of(S, "1.0", tokens), SMALL.vocabulary, 0.3)
        few = make_batch(torch.tensor([min(S, CHECKED), 7]), SMALL.vocabulary, 0.3)
        for name in names:
            check(VARIANTS[name], SMALL, "cpu", torch.float32, few)
        trained = step.build(names, SMALL, "cpu", torch.float32)
        runs = {name: partial(trained[name].step, batch) for name in names}
        times = timing.interleaved(runs, rounds, timing.wall_clock("cpu"), warmup=1)
        del trained, runs
        for name in names:
            row = {"length": S, "arm": name, "us_per_token": 1e6 * min(times[name]) / tokens}
            if memory:
                peak = report.in_new_process(step.peak_bytes_cpu, name, SMALL, S, "1.0", tokens, 0.3)
                row["bytes_per_token"] = peak / tokens
            rows.append(row)
            print(f"length {S} {name}: {row}", flush=True)
    return rows


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
            row = {"link": link, "gpus": n, "bytes_per_gpu": sent, "efficiency": compute / (compute + shown)}
            row |= {"compute_ms": 1e3 * compute, "reduce_ms": 1e3 * reduce, "not_hidden_ms": 1e3 * shown}
            rows.append(row)
    return rows


def shape_of(name: str) -> Shape:
    """The size of a YAML's model, with base's vocabulary."""
    config = yaml.safe_load((ROOT / "yamls" / f"{name}.yaml").read_text())["model"]["model_config"]
    fields = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    return Shape(*(config[field] for field in fields))


def sizes(names: list[str]) -> list[dict]:
    """A row for each model."""
    from src.train.validate import first_and_further, saved_bytes  # it imports Composer, which takes seconds

    rows = []
    for name in names:
        variant = VARIANTS["mosaic_bert"](shape_of(name), "cpu", torch.bfloat16)

        def kept(sequences: int, variant: Variant = variant) -> int:
            (part,) = variant.parts(make_batch(torch.full((sequences,), 128), 30528, 0.3))
            return saved_bytes(variant.model, lambda: variant.run(part))

        parameters = sum(p.numel() for p in variant.model.parameters())
        flops = step_flops(variant, make_batch(torch.tensor([128]), 30528, 0.3))
        row = {"model": name, "layers": variant.shape.layers, "hidden": variant.shape.hidden, "parameters": parameters}
        row |= {"flops_per_token": flops / 128, "state_bytes": 16 * parameters}
        first, further = first_and_further(kept)
        rows.append(row | {"saved_bytes_128x128": first + 127 * further})
        print(f"size {name}: {parameters:,} parameters", flush=True)
    return rows


TABLES = {
    "length": (
        "variant | length | µs per token | bytes per token",
        "{arm} | {length:,} | {us_per_token:.0f} | {bytes_per_token:,.0f}",
    ),
    "gpus": (
        "network | GPUs | MB sent by each GPU | compute, ms | all-reduce, ms | not overlapped, ms | efficiency",
        "{link} | {gpus} | {bytes_per_gpu:M.0f} | {compute_ms:.1f} | {reduce_ms:.1f} | {not_hidden_ms:.1f} "
        "| {efficiency:.0%}",
    ),
    "sizes": (
        "model | layers x hidden | M parameters | GFLOP per token | weights, gradients, Adam, GiB "
        "| activations of 128 x 128 tokens, GiB",
        "{model} | {layers} x {hidden} | {parameters:M.1f} | {flops_per_token:G.2f} | {state_bytes:Gi.2f} "
        "| {saved_bytes_128x128:Gi.2f}",
    ),
}
"""Each part's table; docs/scaling.md shows it too."""


def summary(rows: dict[str, list[dict]]) -> str:
    """The last line."""
    fields = {}
    for prefix, variant in (("", "mosaic_bert"), ("hf_", "hf_bert")):
        of_variant = [row for row in rows.get("length", ()) if row["arm"] == variant]
        by_length = sorted(of_variant, key=lambda row: row["length"])
        for field, column in (("time_per_token", "us_per_token"), ("memory_per_token", "bytes_per_token")):
            if by_length and column in by_length[0]:
                fields[prefix + field] = f"{by_length[-1][column] / by_length[0][column]:.3f}"
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
        "--lengths", type=int, nargs="+", choices=LENGTHS, default=[*LENGTHS], help="in the part length"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gpu_tokens_per_s", type=float, default=400_000, help="default: an H100's goal")
    parser.add_argument("--out", type=Path, help="folder for scaling-cpu.json; other parts there are kept")
    parser.add_argument("--toy", action="store_true", help="tiny; its figures mean nothing")
    args = parser.parse_args(argv)
    lengths, tokens, models = args.lengths, TOKENS, [*YAMLS]
    if args.toy:
        lengths, tokens, models, args.rounds = [128, 256], 256, ["quickstart"], 1
    run: dict[str, Callable[[], list[dict]]] = {
        "length": lambda: length(lengths, tokens, args.rounds, memory=not args.toy),
        "gpus": lambda: gpus(137_000_000, args.gpu_tokens_per_s),
        "sizes": lambda: sizes(models),
    }
    print(f"# {report.described(report.machine('cpu'))}", flush=True)
    about = {"machine": report.machine("cpu"), "command": f"python -m benchmarks.speed.scaling {' '.join(argv)}"}
    rows = {}
    for part in (part for part in TABLES if part in args.parts):
        rows[part] = run[part]()
        print(f"\n{part}\n\n{report.table(*TABLES[part], rows[part])}\n", flush=True)
        if args.out is not None:
            path = args.out / "scaling-cpu.json"
            known = json.loads(path.read_text()) if path.exists() else {}
            report.write_json(path, known | {part: {**about, "rows": rows[part]}})
    print(summary(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
