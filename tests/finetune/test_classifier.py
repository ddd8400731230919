"""Metrics against plain formulas, heads and losses, and where the weights of each model come from."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from src.bert_layers import BertForSequenceClassification, BertForTokenClassification
from src.common.errors import CheckpointError, ConfigError
from src.finetune.config import DEFAULT_METRICS, KNOWN_METRICS, LabelledData
from src.finetune.kinds import KINDS
from src.finetune.kinds.words import EntityF1
from src.finetune.model import Classifier, build_model
from src.masked_lm_loss import IGNORED
from src.train import weights
from src.train.schema import Component

SHAPE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}


def kind_of(name, **options):
    return KINDS[name](LabelledData(**{"train": "", "validation": "", "text": "text", "kind": name, **options}))


def measure(name, predictions, labels, classes=("a", "b"), sizes=(3, 1, 4), kind=None):
    """A metric over batches of these sizes; of the first kind that has it."""
    kinds = KINDS.values() if kind is None else [KINDS[kind]]
    (metric, *_) = (kind.metrics[name](list(classes)) for kind in kinds if name in kind.metrics)
    for part in zip(predictions.split(sizes), labels.split(sizes), strict=True):
        metric.update(*part)
    return metric.compute().item()


def test_the_config_knows_the_metrics_of_each_kind():
    assert {name: sorted(kind.metrics) for name, kind in KINDS.items()} == {
        k: sorted(v) for k, v in KNOWN_METRICS.items()
    }
    assert DEFAULT_METRICS.keys() == KINDS.keys()


def test_metrics_of_two_classes():
    predictions, labels = torch.tensor([0, 1, 0, 1, 1, 1, 1, 0]), torch.tensor([0, 1, 1, 0, 1, 1, 1, 0])
    p, y = predictions.numpy(), labels.numpy()
    right, wrong = ((p == 1) & (y == 1)).sum(), ((p == 1) & (y == 0)).sum()
    missed, negative = ((p == 0) & (y == 1)).sum(), ((p == 0) & (y == 0)).sum()
    assert min(right, wrong, missed, negative) > 0  # else two of the formulas could agree
    f1 = 2 * right / (2 * right + wrong + missed)
    other = 2 * negative / (2 * negative + wrong + missed)
    norm = np.sqrt(float((right + wrong) * (right + missed) * (negative + wrong) * (negative + missed)))
    matthews = (right * negative - wrong * missed) / norm
    want = {"accuracy": (p == y).mean(), "f1": f1, "macro_f1": (f1 + other) / 2, "matthews": matthews}
    assert {name: measure(name, predictions, labels) for name in want} == pytest.approx(want, abs=1e-6)


def test_metrics_of_three_classes():
    labels = torch.tensor([0, 1, 2, 2, 1, 0, 0, 2])
    predictions = torch.tensor([0, 2, 2, 2, 1, 0, 1, 0])
    f1 = [2 * 2 / (3 + 3), 2 * 1 / (2 + 2), 2 * 2 / (3 + 3)]
    assert measure("accuracy", predictions, labels, "abc") == pytest.approx(5 / 8)
    assert measure("macro_f1", predictions, labels, "abc") == pytest.approx(np.mean(f1))


def test_metrics_of_several_classes_per_row():
    labels = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]])
    predictions = torch.tensor([[1, 0, 1], [0, 1, 1], [0, 0, 0], [1, 0, 0]])
    want = {"micro_f1": 2 * 4 / (5 + 6), "macro_f1": (1 + 2 / 3 + 1 / 2) / 3, "subset_accuracy": 2 / 4}
    for name, value in want.items():
        assert measure(name, predictions, labels, "abc", (1, 2, 1), "multilabel") == pytest.approx(value), name


def test_correlations():
    labels = torch.tensor([0.0, 1.0, 2.5, 2.5, 4.0, 5.0, 3.0, 1.5], dtype=torch.float64)
    predictions = labels.exp() + torch.tensor([0, 5, 0, 3, 0, 0, 90, 0], dtype=torch.float64)
    p, y = predictions.numpy(), labels.numpy()
    assert measure("pearson", predictions, labels) == pytest.approx(np.corrcoef(p, y)[0, 1], abs=1e-9)

    def ranks(x):  # equal values share the mean of their ranks
        return np.array([(x < value).sum() + ((x == value).sum() + 1) / 2 for value in x])

    want = np.corrcoef(ranks(p), ranks(y))[0, 1]
    assert want < 0.99 and measure("spearman", predictions, labels) == pytest.approx(want, abs=1e-6)


def test_words_without_a_label_do_not_count():
    labels = torch.tensor([[0, IGNORED, 1], [1, IGNORED, IGNORED]])
    predictions = torch.tensor([[0, 1, 0], [1, 0, 0]])
    assert measure("accuracy", predictions, labels, sizes=(1, 1)) == pytest.approx(2 / 3)
    assert measure("macro_f1", predictions, labels, sizes=(1, 1)) == pytest.approx(2 / 3)


TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def test_entity_f1():
    def numbers(tags):
        return torch.tensor([[TAGS.index(tag) if tag != "-" else IGNORED for tag in line.split()] for line in tags])

    labels = numbers(["- B-PER - I-PER O -", "- B-LOC O B-LOC - -"])
    # Row 1: correct, across a piece without a label; one does not exist. Row 2: one ends too late, one does not exist.
    predictions = numbers(["O B-PER O I-PER B-LOC O", "O B-LOC I-LOC B-PER O O"])
    metric = EntityF1(TAGS)
    for row in range(2):
        metric.update(predictions[row : row + 1], labels[row : row + 1])
    assert metric.compute().item() == pytest.approx(2 * 1 / (4 + 3))
    nothing = EntityF1(TAGS)
    nothing.update(numbers(["O -"]), numbers(["O -"]))
    assert nothing.compute().item() == 0


def model_of(name, kind, classes, tokenizer, source=None, max_seq_len=32, **options):
    component = Component(name, {"model_config": SHAPE, **options})
    return build_model(component, tokenizer, source, kind_of(kind), classes, max_seq_len)


@pytest.mark.parametrize("name", ["mosaic_bert", "hf_bert"])
@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        ("classification", torch.tensor([2, 1])),
        ("regression", torch.tensor([0.5, -3.0])),
        ("multilabel", torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])),
        ("tokens", torch.tensor([[IGNORED, 2, 1, IGNORED], [IGNORED, 0, IGNORED, IGNORED]])),
    ],
)
def test_heads(name, kind, labels, tokenizer):
    """The class, the shape, the loss, and the names of the classes in the saved model."""
    torch.manual_seed(0)
    model = model_of(name, kind, [] if kind == "regression" else ["no", "yes", "O"], tokenizer)
    assert type(model).__name__ == f"BertFor{'Token' if kind == 'tokens' else 'Sequence'}Classification"
    assert isinstance(model, (BertForSequenceClassification, BertForTokenClassification)) == (name == "mosaic_bert")
    ids = torch.tensor([[2, 9, 10, 3], [2, 11, 3, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}
    output = Classifier(model.eval(), kind_of(kind), {})(batch)
    if kind == "regression":
        want = ((output.logits.squeeze(1) - labels) ** 2).mean()
    elif kind == "multilabel":
        want = -(labels * output.logits.sigmoid().log() + (1 - labels) * (-output.logits).sigmoid().log()).mean()
    else:
        counted = labels != IGNORED
        log_p = output.logits[counted].log_softmax(-1)
        want = -log_p[torch.arange(len(log_p)), labels[counted]].mean()
        assert model.config.id2label == {0: "no", 1: "yes", 2: "O"} and model.config.label2id["yes"] == 1
    torch.testing.assert_close(output.loss, want)


def test_predictions():
    logits = torch.tensor([[0.1, 0.9], [0.8, 0.2]])
    assert kind_of("classification").predictions({"logits": logits}).tolist() == [1, 0]
    numbers = kind_of("regression").predictions({"logits": logits[:, :1]})
    torch.testing.assert_close(numbers, torch.tensor([0.1, 0.8]).double())
    # The metric gets fp64, also from bf16 logits: Pearson's sums lose digits in lower precision.
    model, found = Classifier(torch.nn.Module(), kind_of("regression"), {}), []
    metric = SimpleNamespace(update=lambda *values: found.extend(values))
    model.update_metric({"labels": torch.tensor([1.0])}, {"logits": logits[:1, :1].bfloat16()}, metric)
    assert [x.dtype for x in found] == [torch.float64] * 2


def test_the_encoder_is_loaded_and_the_head_is_new(tokenizer, tmp_path):
    for name in ("mosaic_bert", "hf_bert"):
        torch.manual_seed(0)
        before = model_of(name, "classification", ["a", "b"], tokenizer)
        before.save_pretrained(tmp_path / name)
        source = weights.read(tmp_path / name)
        for kind, classes in (("classification", ["x", "y"]), ("regression", []), ("tokens", ["O", "B-X", "I-X"])):
            after = model_of(name, kind, classes, tokenizer, source, model_config={})
            got, want = after.bert.state_dict(), before.bert.state_dict()
            torch.testing.assert_close(dict(got), {key: want[key] for key in got}, rtol=0, atol=0)
            assert after.classifier.weight.std() > 0
            if kind == "classification":
                assert not torch.equal(after.classifier.weight, before.classifier.weight)


DROPPED = {**SHAPE, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.5}


def test_attention_dropout_acts_in_training(tokenizer):
    model = model_of("mosaic_bert", "classification", ["a", "b"], tokenizer, model_config=DROPPED, attention="torch")
    ids = torch.arange(5, 25)[None]
    torch.manual_seed(1)
    first, second = model.train()(ids).logits, model(ids).logits
    assert not torch.equal(first, second)
    torch.testing.assert_close(model.eval()(ids).logits, model(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "options", "fault"),
    [
        ("bert", {}, "model: unknown 'bert'"),
        ("mosaic_bert", {"kernel": 1}, "unexpected 'kernel' .did you mean 'kernels'"),
        (
            "mosaic_bert",
            {"model_config": {"attention": "torch"}},
            "model.model_config.attention: it is model.attention",
        ),
        ("mosaic_bert", {"model_config": {"hiden_size": 8}}, "unexpected 'hiden_size'"),
        ("mosaic_bert", {"model_config": DROPPED, "attention": "triton"}, "model.mosaic_bert: attention 'triton'"),
        (
            "hf_bert",
            {"model_config": {**SHAPE, "max_position_embeddings": 31}},
            "max_seq_len: 32 is more than the .* 31",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(name, options, fault, tokenizer):
    with pytest.raises(ConfigError, match=fault):
        model_of(name, "regression", [], tokenizer, **options)


def test_mosaic_bert_has_no_limit_of_length(tokenizer):
    assert model_of("mosaic_bert", "regression", [], tokenizer, max_seq_len=10_000)


def test_weights_of_hf_bert_are_refused(tokenizer, tmp_path):
    model_of("hf_bert", "regression", [], tokenizer).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="use model hf_bert"):
        model_of("mosaic_bert", "regression", [], tokenizer, weights.read(tmp_path), model_config={})


def test_gradient_checkpointing_gives_the_same_gradients(tokenizer):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        options = {"model_config": {**SHAPE, "hidden_dropout_prob": 0.0}, "gradient_checkpointing": checkpointing}
        model = model_of("mosaic_bert", "classification", ["a", "b"], tokenizer, **options).train()
        assert model.is_gradient_checkpointing == checkpointing
        model(torch.arange(5, 15)[None], labels=torch.tensor([1])).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients)
