"""Train BERT's WordPiece tokenizer on your text.

    python train_tokenizer.py ./texts --out ./tokenizer --vocab_size 30522

Writes a Hugging Face tokenizer folder, for tokenizer_name in a YAML and --tokenizer of convert_c4.py.
"""

import argparse
import contextlib
import itertools
import shutil
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import BertTokenizerFast, PreTrainedTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

from src.common.errors import DataError
from src.common.files import PARTIAL, replace_folder, settle_folder, sync
from src.convert.sources import Inventory, add_source_options, documents, text_source
from src.convert.stats import Stats
from src.data.cutting import pieces
from src.data.tokenizer import load_tokenizer, save_tokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
"""Ids 0 to 4, in this order."""

FILES = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"}
"""Files that are written; --overwrite replaces a folder of these only."""

MAX_WORDS = 2_000_000
"""Distinct words kept; the trainer takes about 1 kB for each."""

MAX_CHARACTERS = 100
"""Longest word in characters. To WordPiece longer ones are unknown, so nothing is learnt from them."""

BLANKS = "WordPiece needs blanks between words; for Thai and the like train a SentencePiece tokenizer elsewhere"

MAX_OCCURRENCES = 200_000_000
"""Words given to the trainer, repetitions included. If there are more, counts are divided and rounded down."""

COMPARED = 5_000_000
"""Words that --compare reads, from the beginning of the text."""

ALPHABET = 1000
"""Characters in the vocabulary, by frequency, if the text has as many; words with any other are [UNK]."""

COVERAGE = 0.9995
"""Share of the text's characters for which more than ``ALPHABET`` are taken: Chinese and Japanese need thousands. The
default of SentencePiece (Kudo and Richardson, 2018)."""

SAMPLED = 1_000_000
"""Characters, from the beginning of the text, in which ``marks_lost`` looks."""


def count_words(texts: Iterable[str], normalizer: normalizers.Normalizer) -> tuple[Counter[str], int]:
    """Count the words between white space in the normalized texts, and the characters of those that are too long.

    Memory is bounded: at more than 2 * ``MAX_WORDS`` distinct words, the less frequent half is dropped (a form of lossy
    counting; Manku and Motwani, 2002). Below that, the counts are exact.
    """
    counts, too_long = Counter[str](), 0
    splitter = pre_tokenizers.BertPreTokenizer()
    for text in texts:
        for piece in pieces(text):
            words = normalizer.normalize_str(piece).split()
            if len(max(words, key=len, default="")) > MAX_CHARACTERS:  # scripts without blanks, tables, addresses
                parts = [part for word in words for part, _ in splitter.pre_tokenize_str(word)]
                words = [part for part in parts if len(part) <= MAX_CHARACTERS]
                too_long += sum(map(len, parts)) - sum(map(len, words))
            counts.update(words)
        if len(counts) > 2 * MAX_WORDS:
            counts = Counter(dict(counts.most_common()[:MAX_WORDS]))
    return Counter(dict(counts.most_common()[:MAX_WORDS])), too_long


def marks_lost(text: str) -> tuple[float, str, str]:
    """What is stripped with lower case: the share of words with accents or vowel signs, and the most frequent of these
    words before and after. Japanese がんばれ becomes かんはれ."""
    stripped = normalizers.BertNormalizer(handle_chinese_chars=False)
    kept = normalizers.BertNormalizer(strip_accents=False)
    words = Counter(kept.normalize_str(text).split())
    pairs = {word: stripped.normalize_str(word) for word in words}
    lost = {word: words[word] for word, after in pairs.items() if after != unicodedata.normalize("NFD", word)}
    first = max(lost, key=lambda word: (lost[word], word), default="")
    return sum(lost.values()) / max(words.total(), 1), first, pairs.get(first, "")


def repeated(words: Counter[str]) -> Iterator[str]:
    """Texts that contain each word as often as it was counted, scaled down to ``MAX_OCCURRENCES`` words."""
    scale = -(-words.total() // MAX_OCCURRENCES)
    for word, count in words.items():
        for start in range(0, count // scale, 1000):
            yield " ".join([word] * min(1000, count // scale - start))


def continues_words(character: str) -> bool:
    """Whether BERT's pre-tokenizer keeps this character inside a word; punctuation and Chinese become words alone."""
    first, second = pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()
    return len(first.pre_tokenize_str(second.normalize_str(f"a{character}"))) == 1


def alphabet_of(words: Counter[str], vocab_size: int) -> tuple[list[str], int, float]:
    """The most frequent characters, how many others there are, and the share of the text's characters that are taken.

    At least ``ALPHABET``, if there are as many; above that up to ``COVERAGE``, as far as ``vocab_size`` allows.
    """
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    taken, covered, entries = list[str](), 0, len(SPECIAL)
    for character in sorted(counts, key=lambda c: (-counts[c], c)):
        entries += 1 + continues_words(character)
        if len(taken) >= ALPHABET and (covered >= COVERAGE * counts.total() or entries > vocab_size):
            break
        taken.append(character)
        covered += counts[character]
    return sorted(taken), len(counts) - len(taken), covered / max(counts.total(), 1)


def train(words: Counter[str], alphabet: list[str], vocab_size: int, lowercase: bool) -> Tokenizer:
    """Train WordPiece as in BERT (Devlin et al., 2019): split at white space and punctuation, continuations with ##.

    The same words give the same tokenizer. The library's trainer alone is not deterministic: it numbers the continuing
    characters in the order of a randomly seeded hash table, and these numbers decide ties between merges. So the
    characters are given to it in order, as special tokens.

    Args:
        words: from ``count_words``, with the normalizer of ``lowercase``.
        alphabet: from ``alphabet_of``.
        vocab_size: size of the vocabulary at most, special tokens included.
        lowercase: lower the case and strip accents, as bert-base-uncased does.

    Raises:
        ValueError: ``vocab_size`` is too small for the characters.
    """
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    first = [*SPECIAL, *alphabet, *(f"##{c}" for c in alphabet if continues_words(c))]
    if vocab_size < len(first):
        raise ValueError(f"--vocab_size {vocab_size} is too small for the text's characters; use at least {len(first)}")
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

    # The trainer took all of `first` as special; in the tokenizer only SPECIAL is.
    tokenizer = Tokenizer(models.WordPiece(trained.get_vocab(), unk_token="[UNK]"))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def compare(texts: Iterable[str], ours: Tokenizer, name: str, other: PreTrainedTokenizerFast) -> None:
    """Print how two tokenizers split the first words, and which words gain most (count * pieces saved)."""
    splitter = pre_tokenizers.BertPreTokenizer()
    chinese = normalizers.BertNormalizer(clean_text=False, strip_accents=False, lowercase=False)  # each one is a word
    counts: Counter[str] = Counter()
    total = 0
    for text in texts:
        for piece in pieces(text):
            words = [word for word, _ in splitter.pre_tokenize_str(chinese.normalize_str(piece))]
            counts.update(words)
            total += len(words)
        if total >= COMPARED:
            break

    splits = []
    for label, backend, unknown in (
        ("this tokenizer", ours, "[UNK]"),
        (name, other.backend_tokenizer, other.unk_token),
    ):
        # Byte-level tokenizers need the space to see the beginning of a word; BERT's ignore it.
        encodings = backend.encode_batch([f" {word}" for word in counts], add_special_tokens=False)
        split = {word: encoding.tokens for word, encoding in zip(counts, encodings, strict=True)}
        tokens = sum(count * len(split[word]) for word, count in counts.items())
        lost = sum(count for word, count in counts.items() if unknown in split[word])
        print(f"{label}: {tokens / total:.3f} tokens per word, {lost / total:.3%} of {total:,} words unknown")
        splits.append(split)
    gains: Counter[tuple[str, str]] = Counter()  # by pieces: one entry for words that differ in case, if both ignore it
    for word, count in counts.items():
        here, there = splits[0][word], splits[1][word]
        if len(here) < len(there):
            gains[" ".join(here), " ".join(there)] += count
    best = sorted(gains, key=lambda ab: (gains[ab] * (ab[0].count(" ") - ab[1].count(" ")), ab))[:20]
    if best:
        print(f"{'times':>9}  {'this tokenizer':28}  {Path(name).name}")
    for here, there in best:
        print(f"{gains[here, there]:9,}  {here:28}  {there}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source_options(parser, "source", nargs="*")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--vocab_size", type=int, required=True, help="most entries, the 5 special tokens included")
    parser.add_argument("--no-lowercase", action="store_false", dest="lowercase", help="keep case and accents")
    parser.add_argument("--limit", type=int, help="read only the first LIMIT documents")
    parser.add_argument("--compare", metavar="TOKENIZER", help="compare with this tokenizer (folder or hub name)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer")
    args = parser.parse_args(argv)
    args.source = text_source(args)
    args.out = args.out.resolve()  # a link stays one
    settle_folder(args.out)
    if args.out.exists() and not args.overwrite:
        raise ValueError(f"{args.out} exists; give --overwrite to replace it, or another --out")
    partial = args.out.with_name(f"{args.out.name}{PARTIAL}")  # a killed run may have left it
    for folder in (args.out, partial):
        if folder.exists() and (others := {path.name for path in folder.iterdir()} - FILES):
            raise ValueError(
                f"{folder} holds more than a tokenizer ({min(others)}), so it is not replaced; change --out"
            )
    if args.vocab_size <= len(SPECIAL):
        raise ValueError(f"--vocab_size must be more than the {len(SPECIAL)} special tokens")
    if args.limit is not None and args.limit < 1:
        raise ValueError("--limit must be at least 1")

    other = None if args.compare is None else load_tokenizer(args.compare)  # may raise: before the work
    started, stats = time.perf_counter(), Stats()
    files = Inventory(args.source, skip_bad=args.skip_bad)
    files.print_skipped()

    def texts(stats: Stats) -> Generator[str]:
        source = itertools.islice(documents(files, args.skip_bad, stats), args.limit)
        for document in tqdm(source, desc="train_tokenizer", unit="doc", unit_scale=True, mininterval=1):
            yield document["text"]

    beginning = ""

    def sampled() -> Generator[str]:
        nonlocal beginning
        for text in texts(stats):
            if len(beginning) < SAMPLED:
                beginning += text[:SAMPLED] + "\n"
            yield text

    words, too_long = count_words(sampled(), normalizers.BertNormalizer(lowercase=args.lowercase))
    if stats.bad:
        print(f"{stats.bad:,} bad ones skipped: {'; '.join(stats.first_bad)}", file=sys.stderr)
    if not stats.documents:
        raise DataError(f"{args.source}: the source has no document")
    if not words:
        raise DataError(f"{args.source}: the text has no word of at most {MAX_CHARACTERS} characters; {BLANKS}")
    alphabet, rare, coverage = alphabet_of(words, args.vocab_size)
    tokenizer = train(words, alphabet, args.vocab_size, args.lowercase)
    size = tokenizer.get_vocab_size()
    if rare:
        left = f"{rare:,} rare characters, {1 - coverage:.3%} of the text, are not in the vocabulary"
        print(f"{left}: words with them are [UNK]; {len(alphabet):,} characters are", file=sys.stderr)
    if too_long:
        share = too_long / (too_long + sum(len(word) * count for word, count in words.items()))
        lost = f"{share:.3%} of the text is words of over {MAX_CHARACTERS} characters, which are [UNK]"
        print(f"{lost}; {BLANKS}", file=sys.stderr)
    share, before, after = marks_lost(beginning) if args.lowercase else (0.0, "", "")
    if share >= 0.001:
        lost = f"{share:.1%} of the words lose accents or vowel signs, as {before} becomes {after}"
        print(f"{lost}; --no-lowercase keeps them, and case", file=sys.stderr)
    if size < args.vocab_size:
        print(f"the text gives only {size} entries, fewer than --vocab_size {args.vocab_size}", file=sys.stderr)

    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_tokenizer(BertTokenizerFast(tokenizer_object=tokenizer, do_lower_case=args.lowercase), partial)
        for file in partial.iterdir():
            sync(file)
        replace_folder(partial, args.out)
    finally:  # after an error, such as a full disk
        shutil.rmtree(partial, ignore_errors=True)
    if args.compare is not None and other is not None:
        with contextlib.closing(texts(Stats())) as again:  # ends the progress bar's line
            compare(again, tokenizer, args.compare, other)
    counted = f"vocab_size={size} documents={stats.documents} seconds={time.perf_counter() - started:.1f}"
    print(f"tokenizer {counted} characters={len(alphabet)} coverage={coverage:.5f}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"train_tokenizer.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train_tokenizer.py: interrupted; the tokenizer is not written")
