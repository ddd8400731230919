"""Each kind of task: the loss of microbatches, batches, metrics and lines of predictions."""

import pytest
import torch

from src.common.errors import DataError
from src.finetune.kinds import Row
from src.finetune.model import Classifier
from src.masked_lm_loss import IGNORED
from tests.finetune.test_classifier import kind_of, model_of

CLASSES = ["a", "b", "c"]
ROWS = {
    "classification": [Row("the river", None, "b"), Row("a", None, "a"), Row("state of war", None, "c")] * 2,
    "multilabel": [Row("the river", None, ["c", "a"]), Row("a", None, []), Row("state of war", None, ["b"])] * 2,
    "regression": [Row("the river", None, 0.5), Row("a", None, -2.0), Row("state of war", None, 3.0)] * 2,
    "tokens": [Row(["river", "water"], None, ["b", "a"]), Row(["war"], None, ["c"]), Row(["a"] * 9, None, ["a"] * 9)],
}
"""Of different lengths, so that microbatches have other widths and weights."""


def trained(name, tokenizer, class_weights=None, model="mosaic_bert", **options):
    """A classifier without dropout, its kind, and a batch of ROWS."""
    torch.manual_seed(0)
    kind = kind_of(name, **options)
    classes = CLASSES if kind.has_classes else []
    network = model_of(model, name, classes, tokenizer)
    batch = kind.collate(kind.encode(ROWS[name], classes, tokenizer, 16).examples, tokenizer.pad_token_id)
    return Classifier(network.eval(), kind, {}, class_weights), kind, batch


def loss_of(classifier, kind, batch, size):
    """As Composer accumulates it over microbatches."""
    parts = kind.split_batch(batch, size)
    counts = [kind.count_tokens(part)["loss_generating"] for part in parts]
    assert sum(kind.count_tokens(part)["total"] for part in parts) == int(batch["attention_mask"].sum())
    losses = [classifier.loss(classifier(part), part) for part in parts]
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)


@pytest.mark.parametrize("name", ROWS)
def test_the_loss_does_not_depend_on_the_microbatch(name, tokenizer):
    classifier, kind, batch = trained(name, tokenizer)
    want = loss_of(classifier, kind, batch, 99)
    assert want > 0.1
    for size in (1, 2):
        torch.testing.assert_close(loss_of(classifier, kind, batch, size), want)


@pytest.mark.parametrize("name", ["classification", "tokens"])
def test_class_weights(name, tokenizer):
    """Each label's loss times the weight of its class, over the number of labels."""
    weights = torch.tensor([0.5, 3.0, 0.0])
    classifier, kind, batch = trained(name, tokenizer, weights)
    labels = batch["labels"][batch["labels"] != IGNORED]
    log_p = classifier(batch).logits[batch["labels"] != IGNORED].log_softmax(-1)
    want = -(log_p[torch.arange(len(labels)), labels] * weights[labels]).mean()
    assert {0, 1, 2} == set(labels.tolist())
    for size in (1, 2, 99):
        torch.testing.assert_close(loss_of(classifier, kind, batch, size), want)
    assert not classifier.state_dict().keys() - {f"model.{name}" for name in classifier.model.state_dict()}


def test_a_list_of_classes(tokenizer):
    """As a list, or as a text that is split at commas; it may be empty. The line of predictions is such a text."""
    kind = kind_of("multilabel", label="tags")
    for value, want in ((["b", 3], ["b", "3"]), ("war, sea level,", ["war", "sea level"]), ([], []), ("", [])):
        assert kind.row("x:1", {"text": "t", "tags": value}) == Row("t", None, want)
    for value in (None, 3, [None], [""], [0.5]):
        with pytest.raises(DataError, match="x:1: column 'tags': expected a list of classes, got"):
            kind.row("x:1", {"text": "t", "tags": value})
    batch = kind.collate(kind.encode(ROWS["multilabel"][:3], CLASSES, tokenizer, 16).examples, 0)
    assert batch["labels"].tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    logits = torch.tensor([[0.1, -1, 2], [-1, -1, -0.1], [1, 1, 1]])
    assert kind.lines([{"logits": logits}], [batch], CLASSES) == ["a,c\n", "\n", "a,b,c\n"]
