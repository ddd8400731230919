"""What an order by length does: to padding, to the tokens of each rank, and to the loss.

    python -m benchmarks.learning.order [--seeds 4] [--steps 400] [--out benchmarks/results/order-cpu.txt] [--quick]

1. Padding and ranks, by counting: the lengths of 1,000,000 documents like C4's (lognormal, median 250 and mean 430
   tokens) cut at 128 and 512, shuffled; global batches of 4096 for 8 canonical nodes, dealt out to 8 ranks as streaming
   does it, microbatches of 128. Fill is T / (B * S), S a microbatch's longest sample; spread is the fullest rank's
   tokens over the mean, averaged over steps: with real tokens only (as MosaicBERT computes) the others wait for it.
2. Loss: a tiny MosaicBERT (2 layers of 128) trains on Wikipedia leads and film reviews, a word piece in 4,096, 128
   tokens, batches of 64, once in the shuffled order and once grouped by length, from the same weights, with the same
   samples and masks; then both are scored on 1,000 held-out documents. Several seeds of weights, order and masks.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import convert_c4
import train_tokenizer
from benchmarks import report
from benchmarks.texts import documents, write_json_lines
from src import data_c4
from src.bert_layers import BertForMaskedLM
from src.bert_padding import Layout
from src.configuration_bert import MosaicBertConfig
from src.data.masking import MaskingCollator
from src.data.microbatches import Batch, num_tokens, split_unpadded
from src.data.order import group_lengths
from src.data.tokenizer import load_tokenizer
from src.train.models import padded_vocab_size

WINDOWS = (0, 8, 64)
NODES, RANKS, GLOBAL, MICRO = 8, 8, 4096, 128
MAX_SEQ_LEN, BATCH, HELD_OUT = 128, 64, 1000


def dealt(lengths: np.ndarray[Any, Any], window: int) -> np.ndarray[Any, Any]:
    """Lengths of each step's samples on each rank (steps, RANKS, GLOBAL / RANKS), for shuffled ``lengths``."""
    if window:
        rng = np.random.default_rng(1)
        lengths = lengths[group_lengths(lengths, NODES, GLOBAL // NODES, window, rng)]
    steps = len(lengths) // GLOBAL
    flat = lengths.reshape(NODES, -1)[:, : steps * GLOBAL // NODES].T.ravel()  # a sample of each canonical node in turn
    return flat.reshape(steps, GLOBAL // RANKS, RANKS).transpose(0, 2, 1)


def count(say: Callable[[str], None], samples: int) -> None:
    """The first table."""
    rng = np.random.default_rng(0)
    drawn = rng.lognormal(np.log(250), np.sqrt(2 * np.log(430 / 250)), samples - samples % (NODES * GLOBAL))
    say(f"{'cut at':>8}{'window':>8}{'fill':>8}{'spread':>9}{'largest spread':>16}")
    for cut in (128, 512):
        lengths = drawn.round().clip(3, cut).astype(np.uint16)
        for window in WINDOWS:
            steps = dealt(lengths, window).astype(np.int64)
            micro = steps.reshape(*steps.shape[:2], -1, MICRO)
            fill = steps.sum() / (micro.max(axis=-1).sum() * MICRO)
            tokens = steps.sum(axis=-1)
            spread = tokens.max(axis=1) / tokens.mean(axis=1)
            say(f"{cut:8}{window:8}{fill:8.3f}{spread.mean():9.4f}{spread.max():16.4f}")


def loss_of(model: BertForMaskedLM, batch: Batch) -> torch.Tensor:
    (part,) = split_unpadded(batch, len(batch["input_ids"]))
    layout = Layout.from_batch(part)
    loss = model.forward_unpadded(part["input_ids"], layout, part["masked_index"], part["labels"]).loss
    assert loss is not None
    return loss


def trained(folder: str, tokenizer: Any, seed: int, window: int, steps: int) -> float:
    """Held-out loss after a run."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MosaicBertConfig(
        **shape, intermediate_size=384, vocab_size=padded_vocab_size(tokenizer), hidden_dropout_prob=0.0
    )
    model = BertForMaskedLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 40, 1 - i / steps))
    dataset = data_c4.StreamingC4(
        tokenizer,
        MAX_SEQ_LEN,
        folder,
        split="train",
        shuffle=True,
        shuffle_seed=seed,
        batch_size=BATCH,
        num_canonical_nodes=1,
        length_window=window,
    )
    masks = MaskingCollator(tokenizer, 0.3, seed)
    for _, batch in zip(range(steps), data_c4.build_dataloader(dataset, masks, BATCH), strict=False):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    held_out = data_c4.StreamingC4(tokenizer, MAX_SEQ_LEN, folder, split="val")
    masks = MaskingCollator(tokenizer, 0.15, seed=0)
    loss = masked = 0.0
    with torch.no_grad():
        for first in range(0, held_out.size, BATCH):
            batch = masks([held_out[i] for i in range(first, min(first + BATCH, held_out.size))])
            weight = num_tokens(batch)["loss_generating"]
            loss, masked = loss + weight * loss_of(model.eval(), batch).item(), masked + weight
    return loss / masked


def compare(say: Callable[[str], None], folder: Path, seeds: int, steps: int, window: int) -> list[float]:
    """The second table; differences by seed."""
    texts = documents()
    for split, part in (("val", texts[:HELD_OUT]), ("train", texts[HELD_OUT:])):
        write_json_lines(folder / f"{split}.jsonl", part)
    name = str(folder / "tokenizer")
    train_tokenizer.main([str(folder / "train.jsonl"), "--out", name, "--vocab_size", "4096"])
    for split in ("val", "train"):
        source = ["--source", str(folder / f"{split}.jsonl"), "--num_workers", "1", "--pack", "truncate"]
        tokens = ["--tokenizer", name, "--max_seq_len", str(MAX_SEQ_LEN)]
        convert_c4.main(["--out_root", str(folder / "mds"), "--splits", split, *source, *tokens])
    tokenizer = load_tokenizer(name)
    say(
        f"{'seed':>8}{'shuffled':>10}{'grouped':>10}{'difference':>12}    held-out loss, {steps} steps, window {window}"
    )
    differences = []
    for seed in range(1, seeds + 1):
        shuffled, grouped = (trained(str(folder / "mds"), tokenizer, seed, w, steps) for w in (0, window))
        differences.append(grouped - shuffled)
        say(f"{seed:8}{shuffled:10.4f}{grouped:10.4f}{differences[-1]:+12.4f}")
    return differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400, help="a multiple of the window, so that samples are the same")
    parser.add_argument("--window", type=int, default=40, help="of the runs, in batches")
    parser.add_argument("--samples", type=int, default=1_000_000, help="to count")
    parser.add_argument("--out", type=Path, help="file to write what is printed to")
    parser.add_argument("--quick", action="store_true", help="a look at both parts; its figures mean little")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.quick:
        args.seeds, args.steps, args.window, args.samples = 2, 4, 2, 300_000
    say = report.Printed()
    say(f"# {report.described(report.machine('cpu'))}")
    count(say, args.samples)
    say()
    with tempfile.TemporaryDirectory(prefix="order-") as folder:
        differences = compare(say, Path(folder), args.seeds, args.steps, args.window)
    mean, error = statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    say(f"order loss_difference={mean:.4f} standard_error={error:.4f} seeds={args.seeds} steps={args.steps}")
    say.write(args.out)


if __name__ == "__main__":
    main()
