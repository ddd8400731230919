"""Train BERT's WordPiece tokenizer on your text.

    python train_tokenizer.py SOURCE --out ./tokenizer --vocab_size 30522

Writes a Hugging Face folder; its path goes into a YAML's tokenizer_name and convert_c4.py's --tokenizer.
"""

import argparse
import itertools
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm

from src.text import Counts, iter_documents

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
"""Ids 0 to 4, in this order."""

FILES = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"}
"""What is written, and what --overwrite may remove."""

ALPHABET = 1000
"""Characters at most, the most frequent; words with any other are [UNK]. The trainer's own default."""


def alphabet_of(texts: Iterable[str], normalizer: normalizers.Normalizer) -> list[str]:
    """The most frequent characters of the texts, sorted."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    characters = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    return sorted(characters[:ALPHABET])


def continues_words(character: str) -> bool:
    """Whether BERT's splitting can leave this character inside a word: punctuation and Chinese stand alone."""
    first, second = pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()
    return len(first.pre_tokenize_str(second.normalize_str(f"a{character}"))) == 1


def train(texts: Callable[[], Iterable[str]], vocab_size: int, lowercase: bool) -> Tokenizer:
    """WordPiece as BERT has it (Devlin et al., 2019): split at white space and punctuation, continuations with ##.

    The same texts give the same tokenizer. The library's trainer alone does not: it numbers the continuing characters
    in the order of a randomly seeded hash table, and ties between merges follow these numbers. Hence a first pass
    that collects the characters, which are then given to it in order.

    Args:
        texts: gives the texts anew at each call; they are read twice and not kept.
        vocab_size: entries at most, special tokens included.
        lowercase: lower the case and strip accents, as bert-base-uncased.

    Raises:
        ValueError: the vocabulary has no room for the characters.
    """
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    alphabet = alphabet_of(texts(), normalizer)
    first = [*SPECIAL, *alphabet, *(f"##{c}" for c in alphabet if continues_words(c))]
    if vocab_size < len(first):
        raise ValueError(f"--vocab_size {vocab_size} has no room for the text's characters; take {len(first)} or more")
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=first,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    trained.train_from_iterator(texts(), trainer)

    # To the trainer all of `first` was special; in the tokenizer only SPECIAL is.
    tokenizer = Tokenizer(models.WordPiece(trained.get_vocab(), unk_token="[UNK]"))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    cls, sep = (SPECIAL.index(token) for token in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    return tokenizer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a file or folder: .json.gz, .jsonl, .txt, .parquet, or a folder of C4's files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--vocab_size", type=int, required=True, help="entries at most, the 5 special ones included")
    parser.add_argument("--no-lowercase", action="store_false", dest="lowercase", help="keep case and accents")
    parser.add_argument("--limit", type=int, help="only the first so many documents")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that exists")
    args = parser.parse_args(argv)
    if args.out.exists() and not args.overwrite:
        raise ValueError(f"{args.out} exists; give --overwrite to replace it, or another --out")
    if args.out.exists() and (others := {path.name for path in args.out.iterdir()} - FILES):
        raise ValueError(f"{args.out} holds more than a tokenizer ({min(others)}), so it is not replaced; change --out")
    if args.vocab_size <= len(SPECIAL):
        raise ValueError(f"--vocab_size must be more than the {len(SPECIAL)} special tokens")

    if args.limit is not None and args.limit < 1:
        raise ValueError("--limit must be at least 1")

    started, documents = time.perf_counter(), 0

    def texts() -> Iterator[str]:
        nonlocal documents
        counts = Counts()
        source = itertools.islice(iter_documents(args.source, counts=counts), args.limit)
        for document in tqdm(source, desc="train_tokenizer", unit="doc", unit_scale=True, mininterval=1):
            yield document["text"]
        documents = counts.documents
        if not documents:
            raise ValueError(f"{args.source}: the source has no document")

    tokenizer = train(texts, args.vocab_size, args.lowercase)
    size = tokenizer.get_vocab_size()
    if size < args.vocab_size:
        print(f"the text has pieces for {size} entries only, not for {args.vocab_size}", file=sys.stderr)

    from transformers import BertTokenizerFast  # takes seconds to import

    partial = args.out.with_name(f"{args.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    BertTokenizerFast(tokenizer_object=tokenizer, do_lower_case=args.lowercase).save_pretrained(partial)
    shutil.rmtree(args.out, ignore_errors=True)
    partial.rename(args.out)
    print(f"tokenizer vocab_size={size} documents={documents} seconds={time.perf_counter() - started:.1f}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"train_tokenizer.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train_tokenizer.py: interrupted; no tokenizer is written")
