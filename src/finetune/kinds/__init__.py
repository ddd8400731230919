"""Kinds of tasks: each is one class, which knows its rows, batches, head, metrics and predictions.

base        what kinds have in common               texts     classes, or a number, for each text
words       a class for each word                   choices   the right one of several choices
questions   a part of a context for each question
"""

from src.finetune.kinds.base import Encoded, Example, Kind, Row
from src.finetune.kinds.choices import MultipleChoice
from src.finetune.kinds.questions import QuestionAnswering
from src.finetune.kinds.texts import Classification, MultiLabel, Regression
from src.finetune.kinds.words import Tokens

KINDS: dict[str, type[Kind]] = {
    "classification": Classification,
    "multilabel": MultiLabel,
    "multiple_choice": MultipleChoice,
    "question_answering": QuestionAnswering,
    "regression": Regression,
    "tokens": Tokens,
}
"""By the name in the YAML; config.py has the names of their metrics."""

__all__ = ["KINDS", "Encoded", "Example", "Kind", "Row"]
