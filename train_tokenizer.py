"""Train BERT's WordPiece tokenizer on your text.

    python train_tokenizer.py SOURCE --out ./tokenizer --vocab_size 30522

Writes a Hugging Face folder; its path goes into a YAML's tokenizer_name and convert_c4.py's --tokenizer.
"""

import argparse
import contextlib
import itertools
import shutil
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm

from src.convert.sources import Counts, iter_documents
from src.data.cutting import pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
"""Ids 0 to 4, in this order."""

FILES = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"}
"""What is written, and what --overwrite may remove."""

MOST_WORDS = 2_000_000
"""Different words kept; the trainer takes about 1 kB for each."""

LONGEST = 100
"""Characters of a word. WordPiece takes longer ones as unknown, so nothing is learnt from them."""

MOST_TEXT = 200_000_000
"""Words given to the trainer, repetitions included; beyond, counts are divided and rounded down."""

SHOWN = 20
"""Words that --compare prints."""

COMPARED = 5_000_000
"""Words that --compare looks at: the first of the text."""

ALPHABET = 1000
"""Characters at most, the most frequent; words with any other are [UNK]. The trainer's own default."""


def count_words(texts: Iterable[str], normalizer: normalizers.Normalizer) -> Counter[str]:
    """What stands between white space in the normalized texts, and how often.

    Memory is bounded: of more than twice ``MOST_WORDS`` different words only the more frequent half is kept, a form of
    lossy counting (Manku and Motwani, 2002). Up to then, the counts are exact.
    """
    counts: Counter[str] = Counter()
    splitter = pre_tokenizers.BertPreTokenizer()
    for text in texts:
        for piece, _ in pieces(text):
            words = normalizer.normalize_str(piece).split()
            if len(max(words, key=len, default="")) > LONGEST:  # scripts without blanks, tables, addresses
                parts = (part for word in words for part, _ in splitter.pre_tokenize_str(word))
                words = [part for part in parts if len(part) <= LONGEST]
            counts.update(words)
        if len(counts) > 2 * MOST_WORDS:
            counts = Counter(dict(counts.most_common()[:MOST_WORDS]))
    return Counter(dict(counts.most_common()[:MOST_WORDS]))


def alphabet_of(words: Counter[str]) -> list[str]:
    """The most frequent characters of the words, sorted."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    return sorted(sorted(counts, key=lambda c: (-counts[c], c))[:ALPHABET])


def repeated(words: Counter[str]) -> Iterator[str]:
    """Texts in which each word stands as often as it was counted; more than ``MOST_TEXT`` words are scaled down."""
    scale = -(-words.total() // MOST_TEXT)
    for word, count in words.items():
        for start in range(0, count // scale, 1000):
            yield " ".join([word] * min(1000, count // scale - start))


def continues_words(character: str) -> bool:
    """Whether BERT's splitting can leave this character inside a word: punctuation and Chinese stand alone."""
    first, second = pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()
    return len(first.pre_tokenize_str(second.normalize_str(f"a{character}"))) == 1


def train(words: Counter[str], vocab_size: int, lowercase: bool) -> Tokenizer:
    """WordPiece as BERT has it (Devlin et al., 2019): split at white space and punctuation, continuations with ##.

    The same words give the same tokenizer. The library's trainer alone does not: it numbers the continuing characters
    in the order of a randomly seeded hash table, and ties between merges follow these numbers. Hence the characters
    are collected before, and given to it in order.

    Args:
        words: from ``count_words``, with the normalizer of ``lowercase``.
        vocab_size: entries at most, special tokens included.
        lowercase: lower the case and strip accents, as bert-base-uncased.

    Raises:
        ValueError: the vocabulary has no room for the characters.
    """
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    alphabet = alphabet_of(words)
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
    trained.train_from_iterator(repeated(words), trainer)

    # To the trainer all of `first` was special; in the tokenizer only SPECIAL is.
    tokenizer = Tokenizer(models.WordPiece(trained.get_vocab(), unk_token="[UNK]"))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    cls, sep = (SPECIAL.index(token) for token in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    return tokenizer


def split_words(texts: Iterable[str]) -> Counter[str]:
    """Words, as BERT splits text, of the first texts that have ``COMPARED`` of them, and how often each is there."""
    splitter = pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    total = 0
    for text in texts:
        for piece, _ in pieces(text):
            words = [word for word, _ in splitter.pre_tokenize_str(piece)]
            counts.update(words)
            total += len(words)
        if total >= COMPARED:
            break
    return counts


def compare(counts: Counter[str], ours: Tokenizer, name: str, other: "PreTrainedTokenizerFast") -> None:
    """Print how two tokenizers cut the counted words, and the words that gain most: count * pieces saved."""
    words, total = list(counts), max(counts.total(), 1)
    cut = {}
    for column, backend, unknown in ((0, ours, "[UNK]"), (1, other.backend_tokenizer, other.unk_token)):
        # The blank before makes it the beginning of a word to tokenizers that look at it; BERT's do not.
        cut[column] = [e.tokens for e in backend.encode_batch([f" {word}" for word in words], add_special_tokens=False)]
        tokens = sum(counts[word] * len(parts) for word, parts in zip(words, cut[column], strict=True))
        lost = sum(counts[word] for word, parts in zip(words, cut[column], strict=True) if unknown in parts)
        label = ("this tokenizer", name)[column]
        print(f"{label}: {tokens / total:.3f} tokens a word, {lost / total:.3%} of {total:,} words unknown")
    times: Counter[tuple[str, str]] = Counter()  # words that differ in case alone are one where both ignore it
    for word, a, b in zip(words, cut[0], cut[1], strict=True):
        if len(a) < len(b):
            times[" ".join(a), " ".join(b)] += counts[word]
    best = sorted(times, key=lambda ab: (times[ab] * (ab[0].count(" ") - ab[1].count(" ")), ab))[:SHOWN]
    if best:
        print(f"{'times':>9}  {'this tokenizer':28}  {Path(name).name}")
    for ab in best:
        print(f"{times[ab]:9,}  {ab[0]:28}  {ab[1]}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source",
        nargs="?",
        help="whatever convert_c4.py reads: files of text, C4's files (train), a split of MDS shards of text (default: "
        "C4's train split from the hub)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--vocab_size", type=int, required=True, help="entries at most, the 5 special ones included")
    parser.add_argument("--no-lowercase", action="store_false", dest="lowercase", help="keep case and accents")
    parser.add_argument("--limit", type=int, help="only the first so many documents")
    parser.add_argument("--compare", metavar="TOKENIZER", help="print how this one (folder or hub name) cuts the text")
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

    other = None
    if args.compare is not None:
        from src.data.tokenizer import load_tokenizer  # takes seconds to import, and fails before the work is done

        other = load_tokenizer(args.compare)

    started, counts = time.perf_counter(), Counts()

    def texts(counts: Counts) -> Generator[str]:
        source = itertools.islice(iter_documents(args.source, counts=counts), args.limit)
        for document in tqdm(source, desc="train_tokenizer", unit="doc", unit_scale=True, mininterval=1):
            yield document["text"]

    words = count_words(texts(counts), normalizers.BertNormalizer(lowercase=args.lowercase))
    if not counts.documents:
        raise ValueError(f"{args.source or 'C4'}: the source has no document")
    tokenizer = train(words, args.vocab_size, args.lowercase)
    size = tokenizer.get_vocab_size()
    if size < args.vocab_size:
        print(f"the text has pieces for {size} entries only, not for {args.vocab_size}", file=sys.stderr)

    # Both take seconds to import.
    from transformers import BertTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

    from src.data.tokenizer import save_tokenizer

    partial = args.out.with_name(f"{args.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_tokenizer(BertTokenizerFast(tokenizer_object=tokenizer, do_lower_case=args.lowercase), partial)
    shutil.rmtree(args.out, ignore_errors=True)
    partial.rename(args.out)
    if other is not None:
        assert args.compare is not None
        with contextlib.closing(texts(Counts())) as again:  # ends the progress bar's line
            words = split_words(again)
        compare(words, tokenizer, args.compare, other)
    print(f"tokenizer vocab_size={size} documents={counts.documents} seconds={time.perf_counter() - started:.1f}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"train_tokenizer.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train_tokenizer.py: interrupted; no tokenizer is written")
