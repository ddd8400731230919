"""Loss at lengths above the training length, where learned positions end and ALiBi does not.

    python -m benchmarks.learning.extrapolation [--minutes 6] [--out FOLDER]
    python -m benchmarks.learning.extrapolation --toy

The models are those of benchmarks/learning/quality.py, pretrained at 128 tokens; those missing in ``--folder`` are made
first. Text: IMDb's reviews of the test part, which no model has seen, with at least 8 x 126 tokens. The first 8 x 126
tokens of each are cut into consecutive samples of 126, 252, 504 and 1008, with [CLS] and [SEP] around each. The same
tokens are masked (15%) in the same way at every length; only the visible context differs. Hugging Face's BERT has no
positions above the training length.

Reported: the loss of the masked tokens, averaged over pretraining seeds (their range), and its difference to the loss
at the training length with a 95% interval (bootstrap over reviews). Last line:

    extrapolation reviews=… loss_1x=… loss_2x=… loss_4x=… loss_8x=… hf_1x=…
"""

import statistics
import sys
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from benchmarks import report
from benchmarks.learning import quality
from benchmarks.learning.pretraining import RECIPES, Deadline, Text, bootstrap, make_variant, options, publish
from benchmarks.texts import film_reviews, part_of
from benchmarks.variants import Batch, Variant
from src.data.cutting import encode_prefix
from src.data.masking import MaskingCollator
from src.masked_lm_loss import IGNORED

TIMES = (1, 2, 4, 8)
"""Lengths, as multiples of the training length."""


def long_reviews(text: Text, content: int) -> list[list[int]]:
    """The first ``content`` ids of each review of the test part that is long enough."""
    reviews = [review.text for review in film_reviews("imdb") if part_of(review.text) == "test"]
    encoded = (encode_prefix(text.tokenizer, review, content) for review in reviews[: text.setup.documents])
    return [ids for ids in encoded if len(ids) == content]


def masked_review(text: Text, number: int, ids: list[int]) -> Batch:
    """The review as one sequence, (1, content), masked by its number."""
    masks = MaskingCollator(text.tokenizer, 0.15, seed=0)
    batch = masks([{"input_ids": np.array(ids, np.uint16), "sample_id": number, "epoch": 0}])
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}


def cut(batch: Batch, text: Text, room: int) -> Batch:
    """Consecutive samples of ``room`` tokens with unmasked [CLS] and [SEP] around each: (n, room + 2)."""

    def framed(x: torch.Tensor, first: Any, last: Any) -> torch.Tensor:
        return F.pad(F.pad(x.view(-1, room), (1, 0), value=first), (0, 1), value=last)

    first, last, ignored = text.tokenizer.cls_token_id, text.tokenizer.sep_token_id, IGNORED
    return {
        "input_ids": framed(batch["input_ids"], first, last),
        "attention_mask": framed(batch["attention_mask"], 1, 1),
        "labels": framed(batch["labels"], ignored, ignored),
    }


def losses(variant: Variant, text: Text, reviews: list[Batch], room: int) -> NDArray[np.float64]:
    """(reviews,) losses, each summed over the review's masked tokens."""
    with torch.no_grad():
        batches = (cut(review, text, room) for review in reviews)
        return np.array([sum(variant.run(part).item() for part in variant.parts(batch)) for batch in batches])


def change(difference: NDArray[np.float64], masked: NDArray[np.int64]) -> dict[str, float]:
    """Mean and 95% interval of a difference per masked token; ``difference`` and ``masked`` are sums, (reviews,)."""

    def draw(rng: np.random.Generator) -> float:
        picked = rng.integers(len(masked), size=len(masked))
        return difference[picked].sum() / masked[picked].sum()

    return {"mean": float(difference.sum() / masked.sum()), **bootstrap(draw)}


def main(argv: list[str]) -> None:
    """Pretrain what is missing, evaluate, report."""
    args = options(__doc__, quality.SETTINGS.minutes, "runs/quality").parse_args(argv)
    settings = quality.settings_of(args)
    print(f"# {report.described(report.machine(args.device))}", flush=True)
    text = quality.read_text(args.folder, settings)
    quality.pretrain(args.folder, text, settings, 2 if args.toy else args.rounds, Deadline(args.hours))

    trained = settings.shape.length
    lengths = [times * (trained - 2) + 2 for times in TIMES]
    content = lengths[-1] - 2
    reviews = [masked_review(text, i, ids) for i, ids in enumerate(long_reviews(text, content))]
    if not reviews:
        sys.exit(f"no review of the test part has {content} tokens")
    masked = np.array([int((review["labels"] >= 0).sum()) for review in reviews])
    sums: dict[str, dict[int, NDArray[np.float64]]] = {}  # (seeds, reviews) by model and length
    for name, some in (("ours", lengths), ("hf_bert", [trained])):
        variant, by_seed = make_variant(text, RECIPES[name]), []
        for seed in range(1, settings.seeds + 1):
            folder = quality.model_folder(args.folder, name, seed)
            variant.model.load_state_dict(type(variant.model).from_pretrained(folder).state_dict())
            variant.model.eval()
            by_seed.append([losses(variant, text, reviews, length - 2) for length in some])
        sums[name] = dict(zip(some, np.array(by_seed).transpose(1, 0, 2), strict=True))

    means = {
        name: {n: (each.sum(axis=1) / masked.sum()).tolist() for n, each in by.items()} for name, by in sums.items()
    }
    rows, differences = [], {}
    for times, length in zip(TIMES, lengths, strict=True):
        each = means["ours"][length]
        row = {"times": times, "tokens": length, "mean": statistics.mean(each), "low": min(each), "high": max(each)}
        if times > 1:
            difference = sums["ours"][length].mean(axis=0) - sums["ours"][trained].mean(axis=0)
            row["change"] = differences[f"{times}x"] = change(difference, masked)
        hf = f"{statistics.mean(means['hf_bert'][trained]):.4f}"
        rows.append(row | {"hf": hf if length == trained else f"its positions end at {trained}"})
    table = report.table(
        "times | tokens | ours, mean (range of seeds) | difference to 1x (95% interval) | hf_bert",
        "{times}x | {tokens} | {mean:.4f} ({low:.4f} to {high:.4f}) "
        "| {change[mean]:+.4f} ({change[low]:+.4f} to {change[high]:+.4f}) | {hf}",
        rows,
    )
    lines = [
        f"Pretrained at {trained} tokens, {settings.minutes:g} minutes of training, {settings.seeds} seeds; "
        f"{len(reviews)} reviews with at least {content:,} tokens, {masked.sum():,} masked tokens at each length.",
        table,
        f"![loss over length](extrapolation-{args.device}.png)",
    ]
    with report.picture(args.out / f"extrapolation-{args.device}.png", 1) as (axes,):
        for name, by_length in means.items():
            report.draw_seeds(axes, name, [*by_length], np.array([*by_length.values()]).T)
        axes.axvline(trained, color="gray", linestyle="--", label="training length")
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set(xlabel="tokens of a sample", ylabel="loss of the same masked tokens (nats)")
    record = {"losses": means, "differences": differences, "reviews": len(reviews), "masked": int(masked.sum())}
    publish(args, argv, "extrapolation", "Above the training length", lines, record)
    fields = " ".join(f"loss_{row['times']}x={row['mean']:.4f}" for row in rows)
    print(f"extrapolation reviews={len(reviews)} {fields} hf_1x={rows[0]['hf']}")


if __name__ == "__main__":
    main(sys.argv[1:])
