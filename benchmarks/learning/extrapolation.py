"""Loss at lengths that training never saw: ALiBi beside learned positions, which end.

    python -m benchmarks.learning.extrapolation [--minutes 6] [--out FOLDER]
    python -m benchmarks.learning.extrapolation --toy

The models are those of benchmarks/quality.py, pretrained at 128 tokens; those that are not in ``--folder`` yet are
made first. The text: of IMDb's reviews in its test part, which no model has seen, those with 8 x 126 tokens and more.
The first 8 x 126 of each are cut into consecutive samples of 126, 252, 504 and 1008, with [CLS] and [SEP] around each.
At every length the same tokens are masked (15%) in the same way; what differs is how much text a token can see. Hugging
Face's BERT has positions up to the length of training, and refuses more.

Printed: the loss of the masked tokens, averaged over pretraining seeds (their range), and its difference to that at the
length of training with a 95% interval (bootstrap over reviews). Last line:

    extrapolation reviews=… loss_1x=… loss_2x=… loss_4x=… loss_8x=… hf_1x=…
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from benchmarks import report
from benchmarks.learning import quality
from benchmarks.learning.pretraining import RECIPES, Text, make_arm
from benchmarks.texts import film_reviews, part_of
from benchmarks.variants import Arm, Batch
from src.data.cutting import encode_prefix
from src.data.masking import MaskingCollator
from src.masked_lm_loss import IGNORED

TIMES = (1, 2, 4, 8)
"""Lengths, as multiples of the length of training."""


def long_reviews(text: Text, content: int) -> list[list[int]]:
    """The first ``content`` ids of each review of the test part that has so many."""
    reviews = [review.text for review in film_reviews("imdb") if part_of(review.text) == "test"]
    encoded = (encode_prefix(text.tokenizer, review, content) for review in reviews[: text.setup.documents])
    return [ids for ids in encoded if len(ids) == content]


def masked_review(text: Text, number: int, ids: list[int]) -> Batch:
    """The review as one sequence, masked by its number; (1, content) each."""
    masks = MaskingCollator(text.tokenizer, 0.15, seed=0)
    batch = masks([{"input_ids": np.array(ids, np.uint16), "sample_id": number, "epoch": 0}])
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}


def cut(batch: Batch, text: Text, room: int) -> Batch:
    """Consecutive samples of ``room`` tokens, [CLS] and [SEP] around each, which are not masked: (n, room + 2)."""

    def framed(x: torch.Tensor, first: Any, last: Any) -> torch.Tensor:
        return F.pad(F.pad(x.view(-1, room), (1, 0), value=first), (0, 1), value=last)

    first, last, ignored = text.tokenizer.cls_token_id, text.tokenizer.sep_token_id, IGNORED
    return {
        "input_ids": framed(batch["input_ids"], first, last),
        "attention_mask": framed(batch["attention_mask"], 1, 1),
        "labels": framed(batch["labels"], ignored, ignored),
    }


def losses(arm: Arm, text: Text, reviews: list[Batch], room: int) -> NDArray[np.float64]:
    """(reviews,) summed over the masked tokens of each."""
    found = []
    with torch.no_grad():
        for review in reviews:
            batch = cut(review, text, room)
            found.append(sum(arm.run(part).item() for part in arm.parts(batch)))
    return np.array(found)


def load(text: Text, name: str, folder: Path) -> Arm:
    """A pretrained model in its arm, for evaluation."""
    arm = make_arm(text, RECIPES[name])
    model = type(arm.model).from_pretrained(folder)
    arm.model.load_state_dict(model.state_dict())
    arm.model.eval()
    return arm


def interval(difference: NDArray[np.float64], masked: NDArray[np.int64], draws: int = 2000) -> tuple[float, float]:
    """95% of a difference of losses, (reviews,) sums, a masked token: reviews are drawn with replacement."""
    picked = np.random.default_rng(0).integers(len(masked), size=(draws, len(masked)))
    low, high = np.quantile(difference[picked].sum(axis=1) / masked[picked].sum(axis=1), (0.025, 0.975))
    return float(low), float(high)


def draw(path: Path, lengths: list[int], found: dict[str, dict[int, list[float]]], trained: int) -> None:
    """Loss over length; points are means over seeds, bands their range."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, by_length in found.items():
        x = [length for length in lengths if length in by_length]
        values = np.array([by_length[length] for length in x])  # (lengths, seeds)
        (line,) = axes.plot(x, values.mean(axis=1), marker="o", label=name)
        axes.fill_between(x, values.min(axis=1), values.max(axis=1), color=line.get_color(), alpha=0.25)
    axes.axvline(trained, color="gray", linestyle="--", label="length of training")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set(xlabel="tokens in a sample", ylabel="loss of the same masked tokens (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str]) -> None:
    """Pretrain what is missing, evaluate, report."""
    args = quality.parser_of(__doc__).parse_args(argv)
    settings, clock = quality.settings_of(args), quality.Clock(args.hours)
    print(f"# {report.described(report.machine(args.device))}", flush=True)
    text = quality.read_text(args.folder, settings)
    quality.pretrain(args.folder, text, settings, 2 if args.toy else args.rounds, clock)

    trained = settings.shape.length
    content = TIMES[-1] * (trained - 2)
    reviews = [masked_review(text, i, ids) for i, ids in enumerate(long_reviews(text, content))]
    if not reviews:
        sys.exit(f"no review of the test part has {content} tokens")
    masked = np.array([int((review["labels"] >= 0).sum()) for review in reviews])
    rooms = [times * (trained - 2) for times in TIMES]
    sums: dict[str, dict[int, list[NDArray[np.float64]]]] = {"ours": {}, "hf_bert": {}}
    for name, by_length in sums.items():
        for seed in range(1, settings.seeds + 1):
            arm = load(text, name, quality.model_folder(args.folder, name, seed))
            for room in rooms if name == "ours" else rooms[:1]:
                by_length.setdefault(room + 2, []).append(losses(arm, text, reviews, room))

    means = {
        name: {length: [float(s.sum() / masked.sum()) for s in each] for length, each in by_length.items()}
        for name, by_length in sums.items()
    }
    rows: list[list[str]] = []
    base = np.mean(sums["ours"][trained], axis=0)
    record: dict[str, Any] = {"losses": means, "differences": {}}
    for times, room in zip(TIMES, rooms, strict=True):
        each, hf = means["ours"][room + 2], means["hf_bert"].get(room + 2)
        cell = f"its positions end at {trained}" if hf is None else f"{np.mean(hf):.4f}"
        change = ""
        if times > 1:
            difference = np.mean(sums["ours"][room + 2], axis=0) - base
            low, high = interval(difference, masked)
            mean = float(difference.sum() / masked.sum())
            record["differences"][f"{times}x"] = {"mean": mean, "low": low, "high": high}
            change = f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"
        rows.append(
            [f"{times}x", str(room + 2), f"{np.mean(each):.4f} ({min(each):.4f} to {max(each):.4f})", change, cell]
        )
    about = report.machine(args.device)
    command = f"python -m benchmarks.learning.extrapolation {' '.join(argv)}"
    lines = [
        "# Beyond the length of training",
        "",
        "By `python -m benchmarks.learning.extrapolation`, whose first lines say what is measured and how.",
        "",
        f"{report.described(about)}. `{command}`",
        "",
        f"Pretrained at {trained} tokens, {settings.minutes:g} minutes of training, {settings.seeds} seeds; "
        f"{len(reviews)} reviews with {content:,} tokens and more, {masked.sum():,} masked tokens at each length.",
        "",
        report.table(
            ["times", "tokens", "ours, mean (range of seeds)", "to 1x (95% interval over reviews)", "hf_bert"], rows
        ),
        "",
        f"![loss over length](extrapolation-{args.device}.png)",
        "",
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    draw(args.out / f"extrapolation-{args.device}.png", [room + 2 for room in rooms], means, trained)
    record |= {"reviews": len(reviews), "masked": int(masked.sum()), "machine": about, "command": command}
    report.write_json(args.out / f"extrapolation-{args.device}.json", record)
    (args.out / f"extrapolation-{args.device}.md").write_text("\n".join(lines))
    print("\n".join(lines[6:]))
    fields = [f"loss_{t}x={np.mean(means['ours'][room + 2]):.4f}" for t, room in zip(TIMES, rooms, strict=True)]
    print(f"extrapolation reviews={len(reviews)} {' '.join(fields)} hf_1x={np.mean(means['hf_bert'][trained]):.4f}")


if __name__ == "__main__":
    main(sys.argv[1:])
