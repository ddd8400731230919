"""The effect of grouping samples by length: on padding, on the tokens of each rank, and on the loss.

    python -m benchmarks.learning.order [--seeds 4] [--steps 400] [--out benchmarks/results/order-cpu.txt] [--quick]

1. Padding and ranks, by counting: 1,000,000 documents with lengths like C4's (lognormal, median 250, mean 430 tokens),
   cut at 128 and 512 and shuffled; global batches of 4096 for 8 canonical nodes, dealt to 8 ranks as streaming does it;
   microbatches of 128. Fill is T / (B * S), S a microbatch's longest sample. Spread is the fullest rank's tokens over
   the mean, averaged over steps: the other ranks wait for it, because MosaicBERT computes no padding.
2. Loss: a tiny MosaicBERT (2 layers of 128) trains on Wikipedia leads and film reviews (4,096 word pieces, 128 tokens,
   batches of 64) in shuffled order and grouped by length, from the same weights, with the same samples and masks. Its
   loss on 1,000 validation documents is compared, for several seeds of weights, order and masks.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import report
from benchmarks.learning.pretraining import Recipe, Training
from benchmarks.texts import documents, make_shards
from benchmarks.variants import MosaicBert, Shape
from src import data_c4
from src.data.masking import MaskingCollator
from src.data.order import group_lengths
from src.data.tokenizer import load_tokenizer
from src.train.models import padded_vocab_size

WINDOWS = (0, 8, 64)
NODES, RANKS, GLOBAL, MICRO = 8, 8, 4096, 128
MAX_SEQ_LEN, BATCH, VALIDATION = 128, 64, 1000


def dealt(lengths: np.ndarray[Any, Any], window: int) -> np.ndarray[Any, Any]:
    """(steps, RANKS, GLOBAL / RANKS) lengths of each step's samples on each rank, for shuffled ``lengths``."""
    if window:
        rng = np.random.default_rng(1)
        lengths = lengths[group_lengths(lengths, NODES, GLOBAL // NODES, window, rng)]
    steps = len(lengths) // GLOBAL
    flat = lengths.reshape(NODES, -1)[:, : steps * GLOBAL // NODES].T.ravel()  # one of each canonical node in turn
    return flat.reshape(steps, GLOBAL // RANKS, RANKS).transpose(0, 2, 1)


def count(say: Callable[[str], None], samples: int) -> None:
    """Print the table of padding and ranks."""
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


def trained(folder: str, tokenizer: Any, seed: int, window: int, steps: int) -> float:
    """Validation loss after a run."""
    torch.manual_seed(seed)
    shape = Shape(2, 128, 4, 384, padded_vocab_size(tokenizer), dropout=0.0, length=MAX_SEQ_LEN)
    training = Training(MosaicBert(shape), Recipe(), 1e-3, steps)
    options: dict[str, Any] = {"shuffle": True, "shuffle_seed": seed, "num_canonical_nodes": 1, "length_window": window}
    dataset = data_c4.StreamingC4(tokenizer, MAX_SEQ_LEN, folder, split="train", batch_size=BATCH, **options)
    loader = data_c4.build_dataloader(dataset, MaskingCollator(tokenizer, 0.3, seed), BATCH)
    for _, batch in zip(range(steps), loader, strict=False):
        training.step(batch)
    validation = data_c4.StreamingC4(tokenizer, MAX_SEQ_LEN, folder, split="val")
    samples, masks = [validation[i] for i in range(validation.size)], MaskingCollator(tokenizer, 0.15, seed=0)
    return training.validation_loss(masks(samples[i : i + BATCH]) for i in range(0, len(samples), BATCH))


def main(argv: list[str]) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400, help="a multiple of the window, so both see the same samples")
    parser.add_argument("--window", type=int, default=40, help="batches to group within")
    parser.add_argument("--samples", type=int, default=1_000_000, help="documents to count")
    parser.add_argument("--out", type=Path, help="file for what is printed")
    parser.add_argument("--quick", action="store_true", help="both parts in seconds; its figures mean little")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.quick:
        args.seeds, args.steps, args.window, args.samples = 2, 4, 2, 300_000
    say = report.Printed()
    say(f"# {report.described(report.machine('cpu'))}")
    count(say, args.samples)
    say()
    title = f"validation loss, {args.steps} steps, window {args.window}"
    say(f"{'seed':>8}{'shuffled':>10}{'grouped':>10}{'difference':>12}    {title}")
    texts, differences = documents(), []
    with tempfile.TemporaryDirectory(prefix="order-") as name:
        tokenizer = load_tokenizer(make_shards(Path(name), texts[VALIDATION:], texts[:VALIDATION], 4096, MAX_SEQ_LEN))
        for seed in range(1, args.seeds + 1):
            shuffled, grouped = (trained(f"{name}/mds", tokenizer, seed, w, args.steps) for w in (0, args.window))
            differences.append(grouped - shuffled)
            say(f"{seed:8}{shuffled:10.4f}{grouped:10.4f}{differences[-1]:+12.4f}")
    mean, error = statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    say(f"order loss_difference={mean:.4f} standard_error={error:.4f} seeds={args.seeds} steps={args.steps}")
    say.write(args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
