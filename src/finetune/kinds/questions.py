"""Questions whose answer is a part of a context (Devlin et al., 2019, sections 4.2 and 4.3).

A long context is read in overlapping windows. The answer is the span with the best sum of start and end logits over all
windows of a question. If questions may have no answer, [CLS] is the span of none.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Encoding
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.text import SQuAD
from transformers import PreTrainedTokenizerFast

from src.bert_layers import BertForQuestionAnswering
from src.common.errors import ConfigError
from src.data.microbatches import Batch
from src.finetune.kinds import base
from src.finetune.kinds.base import Encoded, Example, Kind, Row, check, ids_of

SHORTEST = 12
"""Smallest ``max_seq_len`` for which a window has room for the overlap, a question and special tokens."""


@dataclass(frozen=True)
class Question:
    """What a row of this kind has as its label."""

    id: str | None
    answers: list[tuple[str, int]]
    """Text, and its first character in the context. None if there is no answer."""


@dataclass(frozen=True)
class Window:
    """A part of a context, with its question."""

    row: int
    question: Question
    context: str
    """The whole one."""
    offsets: np.ndarray
    """(L, 2) int32: first character, and the one after the last, of each token in the context; 0 for other tokens."""


@dataclass(frozen=True)
class Found:
    """The best answer in a window."""

    row: int
    question: Question
    text: str
    score: float
    null: float
    """Score of no answer."""


def chosen(found: Iterable[Found]) -> dict[int, tuple[Question, str]]:
    """By row, the question and the best answer over its windows; "" if no answer has a score as high."""
    best: dict[int, Found] = {}
    for one in found:
        other = best.get(one.row, one)
        better = one if one.score > other.score else other
        best[one.row] = Found(one.row, one.question, better.text, better.score, min(one.null, other.null))
    return {row: (one.question, one.text if one.score > one.null else "") for row, one in best.items()}


class AnswerScore(Metric):
    """SQuAD's ``exact_match`` or ``f1`` of the words, from 0 to 1, the best over a question's answers.

    Answers are compared without case, punctuation and articles. A question without an answer counts 1 if none is
    predicted (Rajpurkar et al., 2018). torchmetrics' own takes texts; this one chooses among windows first.
    """

    full_state_update = False

    def __init__(self, score: str):
        super().__init__()
        self.score, self.found = score, []

    def update(self, found: list[Found]) -> None:
        """Add windows."""
        self.found += found

    def compute(self) -> Tensor:
        """() fp32."""
        metric = SQuAD()
        for row, (question, text) in chosen(self.found).items():
            answers = [answer for answer, _ in question.answers] or [""]
            target = {"answers": {"text": answers, "answer_start": [0] * len(answers)}, "id": str(row)}
            metric.update({"prediction_text": text, "id": str(row)}, target)
        return metric.compute()[self.score] / 100

    def reset(self) -> None:
        super().reset()
        self.found = []


def best_spans(start: Tensor, end: Tensor, allowed: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Score, first and last token of the best span of at most ``longest`` tokens, (B,) each.

    Args:
        start, end: logits, (B, S) each.
        allowed: (B, S) bool, tokens that may begin or end a span; the score is -inf if there is none.
    """
    B, S = start.shape
    start, end = (x.float().masked_fill(~allowed, -torch.inf) for x in (start, end))
    score, first = start.new_full((B,), -torch.inf), torch.zeros(B, dtype=torch.long, device=start.device)
    last = first
    for more in range(min(longest, S)):
        value, index = (start[:, : S - more] + end[:, more:]).max(dim=1)
        better = value > score
        score, first = value.where(better, score), index.where(better, first)
        last = (index + more).where(better, last)
    return score, first, last


class QuestionAnswering(Kind):
    """A part of a context for each question: ``text`` is the question, ``text_pair`` the context."""

    heads = {"mosaic_bert": BertForQuestionAnswering, "hf_bert": transformers.BertForQuestionAnswering}
    metrics = {
        "exact_match": lambda classes: AnswerScore("exact_match"),
        "f1": lambda classes: AnswerScore("f1"),
    }
    has_classes = has_scores = False
    of_tokens = (*Kind.of_tokens, "in_context")
    suffix = ".jsonl"

    def columns(self, labelled: bool = True) -> list[str]:
        return [*super().columns(labelled), *filter(None, [self.data.id])]

    def row(self, place: str, record: dict[str, Any]) -> Row:
        question, context = self.texts(place, record)
        label = self.data.label
        answers = self._answers(record[label])
        expected = "answers: {text: [...], answer_start: [...]}, or a list of {text, answer_start}"
        check(answers is not None, place, record, label, expected)
        assert answers is not None and context is not None
        for text, start in answers:
            at = f"an answer that is in column {self.data.text_pair!r} at its answer_start"
            check(text.strip() != "" and start >= 0 and context.startswith(text, start), place, record, label, at)
        hint = "an answer; unanswerable: true is for questions that may have none"
        check(answers != [] or self.data.unanswerable, place, record, label, hint)
        return Row(question, context, Question(self._id(record), answers))

    def unlabelled(self, place: str, record: dict[str, Any]) -> Row:
        return Row(*self.texts(place, record), Question(self._id(record), []))

    def blank_label(self, row: Row, classes: Sequence[str]) -> Question:
        return row.label

    def _id(self, record: dict[str, Any]) -> str | None:
        return None if self.data.id is None else str(record[self.data.id])

    @staticmethod
    def _answers(value: Any) -> list[tuple[str, int]] | None:
        """Texts and first characters; None if the value has another form."""
        try:
            value = json.loads(value) if isinstance(value, str) else value
            if isinstance(value, dict):
                pairs = list(zip(value["text"], value["answer_start"], strict=True))
            else:
                pairs = [(answer["text"], answer["answer_start"]) for answer in value]
        except (KeyError, TypeError, ValueError):
            return None
        fits = all(isinstance(text, str) and type(start) is int for text, start in pairs)
        return pairs if fits else None

    def head(self, classes: Sequence[str]) -> dict[str, Any]:
        return {"num_labels": 2, "problem_type": None}

    def encode(
        self, rows: Sequence[Row], classes: Sequence[str], tokenizer: PreTrainedTokenizerFast, max_seq_len: int
    ) -> Encoded:
        """One example per window. Windows overlap by a third of ``max_seq_len``; a longer question is cut to it.

        Raises:
            ConfigError: ``max_seq_len`` is less than SHORTEST.
        """
        if max_seq_len < SHORTEST:
            raise ConfigError(f"max_seq_len: question answering needs {SHORTEST} or more, got {max_seq_len}")
        overlap, encoded = max_seq_len // 3, Encoded([])
        for begin in range(0, len(rows), base.ROWS_AT_ONCE):
            part, texts = list(rows[begin : begin + base.ROWS_AT_ONCE]), []
            alone = tokenizer([row.text for row in part], add_special_tokens=False).encodings or []
            for row, encoding in zip(part, alone, strict=True):
                is_cut = len(encoding) > overlap
                texts.append(row.text[: encoding.offsets[overlap - 1][1]] if is_cut else row.text)
                encoded.cut += is_cut
            tokens = tokenizer(
                texts,
                [row.pair for row in part],  # pyright: ignore[reportArgumentType]
                truncation="only_second",
                max_length=max_seq_len,
                stride=overlap,
                return_overflowing_tokens=True,
            )
            numbers = tokens["overflow_to_sample_mapping"]
            for encoding, i in zip(tokens.encodings or [], map(int, numbers), strict=True):  # pyright: ignore
                encoded.examples.append(self._example(part[i], begin + i, encoding))
        return encoded

    def _example(self, row: Row, number: int, encoding: Encoding) -> Example:
        """A window, with the positions of the first answer, or of [CLS] if it is not completely in the window."""
        in_context = np.array([part == 1 for part in encoding.sequence_ids])
        offsets = np.array(encoding.offsets, dtype=np.int32) * in_context[:, None]
        first = last = 0
        if row.label.answers and in_context.any():
            text, start = row.label.answers[0]
            start += len(text) - len(text.lstrip())
            end = start + len(text.strip())
            inside = in_context & (offsets[:, 1] > start) & (offsets[:, 0] < end)
            if inside.any() and offsets[in_context][0, 0] <= start and offsets[in_context][-1, 1] >= end:
                first, last = int(inside.argmax()), len(inside) - 1 - int(inside[::-1].argmax())
        return {
            **ids_of(row, encoding),
            "in_context": in_context,
            "start_positions": first,
            "end_positions": last,
            "windows": Window(number, row.label, row.pair or "", offsets),
        }

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> Batch:
        """As in ``Kind``: ``in_context`` (B, S), ``start_positions`` and ``end_positions`` (B,) int64; ``windows``."""
        tensors = [{name: x for name, x in example.items() if name != "windows"} for example in examples]
        return {**super().collate(tensors, pad_token_id), "windows": [example["windows"] for example in examples]}

    def inputs(self, batch: Batch) -> Batch:
        return {name: batch[name] for name in Kind.of_tokens}

    def loss(self, outputs: Any, batch: Batch, class_weights: Tensor | None = None) -> Tensor:
        """Mean cross entropy of the first and the last token. Padding has no probability.

        In the loss of transformers' BERT it has, so that the loss depends on the longest window of a microbatch.
        """
        padding, losses = batch["attention_mask"] == 0, []
        for name in ("start", "end"):
            logits = outputs[f"{name}_logits"].float().masked_fill(padding, -torch.inf)
            losses.append(F.cross_entropy(logits, batch[f"{name}_positions"]))
        return (losses[0] + losses[1]) / 2

    def found(self, outputs: Any, batch: Batch) -> list[Found]:
        """The best answer in each window."""
        start, end = outputs["start_logits"].float(), outputs["end_logits"].float()
        spans = best_spans(start, end, batch["in_context"].bool(), self.data.max_answer_length)
        null = start[:, 0] + end[:, 0] if self.data.unanswerable else torch.full_like(start[:, 0], -torch.inf)
        found = []
        for window, score, first, last, none in zip(
            batch["windows"], *(x.tolist() for x in (*spans, null)), strict=True
        ):
            text = window.context[window.offsets[first, 0] : window.offsets[last, 1]].strip()
            found.append(Found(window.row, window.question, text, score, none))
        return found

    def update_metric(self, metric: Metric, batch: Batch, outputs: Any) -> None:
        metric.update(self.found(outputs, batch))

    def lines(self, outputs: Sequence[Any], batches: Iterable[Batch], names: Sequence[str]) -> list[str]:
        """An object per question: its id, by default its number from 1, and the text of the answer, "" for none."""
        found = (one for output, batch in zip(outputs, batches, strict=True) for one in self.found(output, batch))
        return [
            json.dumps({"id": question.id or str(row + 1), "text": text}, ensure_ascii=False) + "\n"
            for row, (question, text) in sorted(chosen(found).items())
        ]
