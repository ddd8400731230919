"""Questions in the form of SQuAD's files (Rajpurkar et al., 2016, 2018). Imports no torch."""

from collections.abc import Iterator
from typing import Any


def is_squad(value: Any) -> bool:
    """Whether the value of a JSON file has articles with paragraphs and questions: ``{"data": [{"paragraphs": ...``."""
    articles = value.get("data") if isinstance(value, dict) else None
    return isinstance(articles, list) and all(isinstance(x, dict) and "paragraphs" in x for x in articles)


def questions(value: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A record with id, question, context and answers for each question.

    Raises:
        ValueError: a part is missing.
    """
    try:
        for article in value["data"]:
            for paragraph in article["paragraphs"]:
                for entry in paragraph["qas"]:
                    answers = [] if entry.get("is_impossible") else entry["answers"]
                    texts = {"question": entry["question"], "context": paragraph["context"]}
                    yield {"id": entry["id"], **texts, "answers": answers}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not in SQuAD's form: {error!r}") from None
