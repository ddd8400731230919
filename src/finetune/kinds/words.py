"""A class for each word, predicted at its first word piece (Devlin et al., 2019, section 5.3)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torchmetrics import Metric
from transformers import PreTrainedTokenizerFast

from src.bert_layers import BertForTokenClassification
from src.common.errors import DataError
from src.data.microbatches import Batch
from src.finetune.kinds.base import Encoded, Kind, Row, check, ids_of, is_class, is_text, list_of, tokenized
from src.finetune.kinds.texts import accuracy, macro_f1
from src.finetune.tags import entities, is_tag
from src.masked_lm_loss import IGNORED


class EntityF1(Metric):
    """Micro-averaged F1 of whole entities, as conlleval counts them (Tjong Kim Sang and De Meulder, 2003).

    The tags are those of any scheme in src/finetune/tags.py. An entity is correct if its type, first word and last
    word are. torchmetrics has none.
    """

    full_state_update = False
    counts: Tensor
    """(3,) int64: correct, predicted and actual entities."""

    def __init__(self, classes: list[str]):
        super().__init__()
        self.classes = classes
        self.add_state("counts", default=torch.zeros(3, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add a batch of tag numbers, (B, S) each; positions with the label IGNORED do not count."""
        for predicted, label in zip(predictions, labels, strict=True):
            counted = label != IGNORED
            ours, theirs = (entities(self.classes[int(n)] for n in tags[counted]) for tags in (predicted, label))
            self.counts += self.counts.new_tensor([len(ours & theirs), len(ours), len(theirs)])

    def compute(self) -> Tensor:
        """() fp32; 0 if there is no entity."""
        return 2 * self.counts[0] / self.counts[1:].sum().clamp(min=1)


class Tokens(Kind):
    """A class for each word."""

    heads = {"mosaic_bert": BertForTokenClassification, "hf_bert": transformers.BertForTokenClassification}
    metrics = {"accuracy": accuracy, "macro_f1": macro_f1, "entity_f1": EntityF1}
    of_tokens = (*Kind.of_tokens, "labels")

    def texts(self, place: str, record: dict[str, Any]) -> tuple[list[str], None]:
        words = list_of(place, record, self.data.text)
        fits = isinstance(words, list) and words != [] and all(is_text(word, self.data) for word in words)
        check(fits, place, record, self.data.text, "words, none of them empty")
        return words, None

    def label_of(self, place: str, record: dict[str, Any], text: list[str]) -> list[str]:
        tags = list_of(place, record, self.data.label)
        fits = isinstance(tags, list) and len(tags) == len(text) and all(map(is_class, tags))
        check(fits, place, record, self.data.label, f"{len(text)} tags, one for each word")
        return [str(tag) for tag in tags]

    def classes(self, row: Row) -> Sequence[str]:
        return row.label

    def check_classes(self, classes: Sequence[str]) -> None:
        other = [name for name in classes if not is_tag(name)]
        if "entity_f1" in (self.data.metrics or []) and other:
            raise DataError(f"metrics: entity_f1 expects tags as B-X, I-X and O, got {other[0]!r}; accuracy takes any")

    def head(self, classes: Sequence[str]) -> dict[str, Any]:
        return {**super().head(classes), "problem_type": None}

    def encode(
        self, rows: Sequence[Row], classes: Sequence[str], tokenizer: PreTrainedTokenizerFast, max_seq_len: int
    ) -> Encoded:
        """As in ``Kind``. The label of a word is at its first word piece, IGNORED at the others.

        Raises:
            DataError: no word of a row has a word piece.
        """
        number = {name: i for i, name in enumerate(classes)}
        encoded = Encoded([])
        for row, encoding in tokenized(rows, tokenizer, max_seq_len, is_split_into_words=True):
            # From the end, so that the first piece of a word is the last one written.
            first_piece = {word: i for i, word in reversed([*enumerate(encoding.word_ids)]) if word is not None}
            if not first_piece:
                place, words = f"row {len(encoded.examples) + 1}", " ".join(row.text)
                raise DataError(f"{place}: the tokenizer makes no word piece of any of its words: {words!r}")
            labels = np.full(len(encoding.ids), IGNORED, dtype=np.int64)
            for word, i in first_piece.items():
                labels[i] = number[row.label[word]]
            encoded.examples.append({**ids_of(row, encoding), "labels": labels})
            encoded.cut += bool(encoding.overflowing)
            encoded.unread += len(row.label) - len(first_piece)
        return encoded

    def blank_label(self, row: Row, classes: Sequence[str]) -> list[str]:
        return [classes[0]] * len(row.text)

    def count(self, batch: Batch) -> int:
        """The labelled words."""
        return int((batch["labels"] != IGNORED).sum())

    def shown(self, predicted: Tensor, label: Tensor, names: Sequence[str]) -> str:
        """The tags of the words that have a word piece."""
        return " ".join(names[int(number)] for number in predicted[label != IGNORED])

    def scores(self, probabilities: Tensor, label: Tensor, names: Sequence[str]) -> list[dict[str, float]]:
        """Of each of those words, from (tokens, classes)."""
        return [super(Tokens, self).scores(word, label, names) for word in probabilities[label != IGNORED]]
