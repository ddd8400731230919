"""Train an encoder of sentences on pairs of texts that belong together, by sentence-transformers.

python -m scripts.sentence_vectors my-bert my-encoder [--pairs FILE]

my-bert is a folder of export_hf.py. FILE is a .csv or .jsonl with two columns, such as questions and answers; else the
pairs are the first sentence of a Wikipedia lead and the rest of it. One pair in 20 is held out, and measured before and
after: how often is its second text the nearest to its first, among all the second texts held out?
"""

import argparse
import sys
import tempfile
from pathlib import Path

import pandas
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from scripts.quickstart import default_documents, is_held_out


def read_pairs(path: Path | None) -> list[tuple[str, str]]:
    """Pairs of a file, or of the leads. Raises ValueError for another number of columns, and for missing texts."""
    if path is None:
        leads = (text.partition(". ") for text in default_documents())
        return [(first, rest) for first, _, rest in leads if rest]
    table = pandas.read_csv(path) if path.suffix == ".csv" else pandas.read_json(path, lines=True)
    if table.shape[1] != 2:
        raise ValueError(f"{path}: expected two columns, got {', '.join(map(str, table.columns))}")
    if not table.map(lambda value: isinstance(value, str) and bool(value.strip())).all(axis=None):
        raise ValueError(f"{path}: expected two texts in each row, but some are missing or empty")
    return list(table.itertuples(index=False, name=None))


def retrieval(pairs: list[tuple[str, str]]) -> InformationRetrievalEvaluator:
    """For each first text of the pairs, its second text is to be found among all of them."""
    queries, corpus = ({str(i): pair[side] for i, pair in enumerate(pairs)} for side in (0, 1))
    return InformationRetrievalEvaluator(queries, corpus, {i: {i} for i in queries}, write_csv=False)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder of export_hf.py")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--pairs", type=Path, help=".csv or .jsonl with two columns (default: leads of Wikipedia)")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the pairs (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=64, help="pairs that are told apart (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-4, help="peak of the learning rate (default: %(default)s)")
    args = parser.parse_args(argv)
    if not (args.folder / "modules.json").is_file() or args.out.exists():
        raise ValueError(f"expected an exported encoder at {args.folder} (modules.json), and nothing yet at {args.out}")
    pairs = read_pairs(args.pairs)
    held_out = [is_held_out(". ".join(pair)) for pair in pairs]
    test, train = ([pair for pair, held in zip(pairs, held_out, strict=True) if held is x] for x in (True, False))
    model = SentenceTransformer(str(args.folder), trust_remote_code=True)
    evaluator = retrieval(test)
    before = evaluator(model)
    with tempfile.TemporaryDirectory() as scratch:  # no checkpoints: only the result is kept
        options = SentenceTransformerTrainingArguments(
            scratch,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.lr,
            warmup_steps=int(args.epochs * len(train) / args.batch_size / 10),
            batch_sampler="no_duplicates",  # an equal text would be a wrong negative
            save_strategy="no",
            report_to="none",
        )
        dataset = Dataset.from_dict({"first": [a for a, _ in train], "second": [b for _, b in train]})
        SentenceTransformerTrainer(model, options, dataset, loss=MultipleNegativesRankingLoss(model)).train()
    after = evaluator(model)
    model.save(str(args.out))
    print(f"pairs train={len(train)} test={len(test)} folder={args.out}")
    for name in ("accuracy@1", "accuracy@10", "ndcg@10"):
        print(f"{name} before={before[f'cosine_{name}']:.3f} after={after[f'cosine_{name}']:.3f}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"sentence_vectors.py: {error}")
