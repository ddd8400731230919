"""Each kind of task: the loss of microbatches, batches, metrics and lines of predictions."""

import json
import random

import pyarrow
import pyarrow.parquet
import pytest
import torch

from src.common.errors import ConfigError, DataError
from src.finetune.data import read_set
from src.finetune.kinds import Row
from src.finetune.kinds.questions import AnswerScore, Found, Question, best_spans, chosen
from src.finetune.model import Classifier
from src.masked_lm_loss import IGNORED
from tests.finetune.test_classifier import kind_of, model_of

CLASSES = ["a", "b", "c"]
ROWS = {
    "classification": [Row("the river", None, "b"), Row("a", None, "a"), Row("state of war", None, "c")] * 2,
    "multilabel": [Row("the river", None, ["c", "a"]), Row("a", None, []), Row("state of war", None, ["b"])] * 2,
    "regression": [Row("the river", None, 0.5), Row("a", None, -2.0), Row("state of war", None, 3.0)] * 2,
    "tokens": [Row(["river", "water"], None, ["b", "a"]), Row(["war"], None, ["c"]), Row(["a"] * 9, None, ["a"] * 9)],
    "multiple_choice": [Row("the river", None, 1), Row("a", None, 0), Row("a state of war", None, 1)],
    "question_answering": [
        Row("river", "the river of the city", Question("x", [("river", 4)])),
        Row("which city", "war and peace " * 9, Question("y", [("peace", 92)])),
        Row("a", "no", Question("z", [])),
    ],
}
ROWS["multiple_choice"] = [
    row._replace(pair=["a city", "water " * n]) for n, row in enumerate(ROWS["multiple_choice"], 1)
]
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
@pytest.mark.parametrize("model", ["mosaic_bert", "hf_bert"])
def test_the_loss_does_not_depend_on_the_microbatch(name, model, tokenizer):
    classifier, kind, batch = trained(name, tokenizer, model=model)
    assert len(batch["input_ids"]) >= len(ROWS[name])
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
    """As a list, or as a text that is split at commas; it may be empty. A line of predictions is a list as JSON."""
    kind = kind_of("multilabel", label="tags")
    for value, want in ((["b", 3], ["b", "3"]), ("war, sea level,", ["war", "sea level"]), ([], []), ("", [])):
        assert kind.row("x:1", {"text": "t", "tags": value}) == Row("t", None, want)
    for value in (None, 3, [None], [""], [0.5]):
        with pytest.raises(DataError, match="x:1: column 'tags': expected a list of classes, got"):
            kind.row("x:1", {"text": "t", "tags": value})
    batch = kind.collate(kind.encode(ROWS["multilabel"][:3], CLASSES, tokenizer, 16).examples, 0)
    assert batch["labels"].tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    logits = torch.tensor([[0.1, -1, 2], [-1, -1, -0.1], [1, 1, 1]])
    lines = kind.lines([{"logits": logits}], [batch], ["a", "b, too", "c"])
    assert lines == ['["a", "c"]\n', "[]\n", '["a", "b, too", "c"]\n']
    for line, want in zip(lines, (["a", "c"], [], ["a", "b, too", "c"]), strict=True):
        assert kind.row("x:1", {"text": "t", "tags": line}).label == want


# Multiple choice


def choices_of(**options):
    return kind_of("multiple_choice", **{"choices": "choices", **options})


def test_the_right_choice():
    """By its number from 0, its letter, or its text; choices in a list, or in columns; a question before each."""
    record = {"text": "t", "choices": ["x", "y"], "first": "x", "second": "y", "q": "why"}
    for label, want in ((0, 0), (1, 1), ("1", 1), ("A", 0), ("B", 1), ("y", 1)):
        assert choices_of().row("a:1", {**record, "label": label}) == Row("t", ["x", "y"], want)
    assert choices_of().row("a:1", {"text": "t", "choices": "['x', 'y']", "label": "y"}).pair == ["x", "y"]  # of a CSV
    record["label"] = 1
    columns = choices_of(choices=["first", "second"], text_pair="q")
    assert columns.columns() == ["text", "q", "label", "first", "second"]
    assert columns.row("a:1", record) == Row("t", ["why x", "why y"], 1)


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({"label": 2}, "a:2: column 'label': expected the number from 0, the letter or the text of one choice, got 2"),
        ({"label": None}, "a:2: column 'label'"),
        ({"label": "1", "choices": ["1", "2"]}, "a:2: column 'label'"),  # the number of one, and the text of the other
        ({"choices": "x y"}, "a:2: column 'choices': expected two or more choices"),
        ({"choices": ["x"]}, "a:2: column 'choices': expected two or more choices"),
        ({"choices": ["x", None]}, "a:2: column 'choices': expected two or more choices"),
        ({"choices": ["x", "y", "z"]}, "a:2: column 'choices': expected 2 choices, as in the rows before"),
    ],
)
def test_choices_that_are_refused(record, fault):
    kind = choices_of()
    kind.row("a:1", {"text": "t", "choices": ["x", "y"], "label": 0})
    with pytest.raises(DataError, match=fault):
        kind.row("a:2", {"text": "t", "choices": ["x", "y"], "label": 0, **record})


def test_batches_of_choices(tokenizer):
    """(B, C, S), each as the tokenizer makes a pair; cut to the longest of a microbatch; rows are counted."""
    kind, rows = choices_of(), ROWS["multiple_choice"]
    encoded = kind.encode(rows, [], tokenizer, 10)
    longest = [max(len(tokenizer(row.text, choice)["input_ids"]) for choice in row.pair) for row in rows]
    assert encoded.cut == sum(length > 10 for length in longest) and min(longest) <= 10
    batch = kind.collate(encoded.examples, tokenizer.pad_token_id)
    assert batch["input_ids"].shape == (3, 2, 10) and batch["labels"].tolist() == [1, 0, 1]
    for i, row in enumerate(rows):
        for j, choice in enumerate(row.pair):
            want = tokenizer(row.text, choice, truncation=True, max_length=10, padding="max_length")
            for name in ("input_ids", "attention_mask", "token_type_ids"):
                assert batch[name][i, j].tolist() == want[name], name
    assert kind.split_batch(batch, 1)[longest.index(min(longest))]["input_ids"].shape == (1, 2, min(longest))
    assert kind.count_tokens(batch)["loss_generating"] == 3
    assert kind.lines([{"logits": torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])}], [batch], []) == [
        "1\n",
        "0\n",
        "1\n",
    ]


# Question answering


def questions_of(**options):
    return kind_of("question_answering", **{"text": "question", "text_pair": "context", "label": "answers", **options})


SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "t",
            "paragraphs": [
                {
                    "context": "The river Elbe.",
                    "qas": [
                        {"id": "a", "question": "Which?", "answers": [{"text": "Elbe", "answer_start": 10}]},
                        {"id": "b", "question": "Who?", "answers": [], "is_impossible": True, "plausible_answers": []},
                    ],
                }
            ],
        }
    ],
}
FLAT = [
    {
        "id": "a",
        "question": "Which?",
        "context": "The river Elbe.",
        "answers": {"text": ["Elbe"], "answer_start": [10]},
    },
    {"id": "b", "question": "Who?", "context": "The river Elbe.", "answers": {"text": [], "answer_start": []}},
]


def test_files_in_squads_form_and_in_flat_rows(tmp_path):
    kind = questions_of(unanswerable=True, id="id")
    (tmp_path / "a.json").write_text(json.dumps(SQUAD))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in FLAT))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(FLAT), tmp_path / "a.parquet")
    want = [
        Row("Which?", "The river Elbe.", Question("a", [("Elbe", 10)])),
        Row("Who?", "The river Elbe.", Question("b", [])),
    ]
    for suffix in ("json", "jsonl", "parquet"):
        assert read_set(str(tmp_path / f"a.{suffix}"), kind.data) == want, suffix
    del SQUAD["data"][0]["paragraphs"][0]["qas"][0]["question"]
    (tmp_path / "a.json").write_text(json.dumps(SQUAD))
    with pytest.raises(DataError, match="not in SQuAD's form: KeyError.'question'."):
        read_set(str(tmp_path / "a.json"), kind.data)


@pytest.mark.parametrize(
    ("answers", "fault"),
    [
        (
            {"text": [], "answer_start": []},
            "expected an answer; unanswerable: true is for questions that may have none",
        ),
        (
            {"text": ["river"], "answer_start": [3]},
            "expected an answer that is in column 'context' at its answer_start",
        ),
        ({"text": ["river"], "answer_start": [-11]}, "expected an answer that is in column"),
        ({"text": [" "], "answer_start": [3]}, "expected an answer that is in column"),
        ({"text": ["river"], "answer_start": []}, "expected answers: "),
        ({"text": ["river"]}, "expected answers: "),
        ([{"text": "river"}], "expected answers: "),
        ("river", "expected answers: "),
        (None, "expected answers: "),
    ],
)
def test_answers_that_are_refused(answers, fault):
    with pytest.raises(DataError, match=f"a:1: column 'answers': {fault}"):
        questions_of().row("a:1", {"question": "q", "context": "The river Elbe.", "answers": answers})


def test_windows_cover_the_context_and_point_at_the_answer(tokenizer):
    kind, length = questions_of(unanswerable=True), 24
    words = [random.Random(0).choice("river city war music Unbelievableness of water".split()) for _ in range(90)]
    context = " ".join([*words[:50], "Paris-based", *words[50:]])
    start = context.index("Paris-based")
    rows = [Row("what is " * n, context, Question(None, [("Paris-based ", start)] if n else [])) for n in (1, 40, 0)]
    encoded = kind.encode(rows, [], tokenizer, length)
    assert encoded.cut == 1
    for number, row in enumerate(rows):
        examples = [example for example in encoded.examples if example["windows"].row == number]
        assert len(examples) > 5 and max(len(example["input_ids"]) for example in examples) == length
        pointed, last = set(), 0
        for example in examples:
            window, ids = example["windows"], example["input_ids"].tolist()
            inside = window.offsets[example["in_context"]]
            assert inside[0, 0] <= last and last < inside[-1, 1], "windows overlap"
            last = inside[-1, 1]
            question = [i for i, kind in zip(ids, example["token_type_ids"], strict=True) if kind == 0]
            assert question == tokenizer(row.text, truncation=True, max_length=length // 3 + 2)["input_ids"]
            first, end = example["start_positions"], example["end_positions"]
            complete = number < 2 and inside[0, 0] <= start and inside[-1, 1] >= start + len("Paris-based")
            assert (first > 0) == complete
            if first:
                pointed.add(context[window.offsets[first, 0] : window.offsets[end, 1]])
        assert last == len(context) and pointed == ({"Paris-based"} if number < 2 else set())
    with pytest.raises(ConfigError, match="max_seq_len: question answering needs 12 or more, got 11"):
        kind.encode(rows, [], tokenizer, 11)
    kind.encode(rows, [], tokenizer, 12)


def test_the_best_span_of_all():
    generator = torch.Generator().manual_seed(0)
    start, end = torch.randn(2, 40, 9, generator=generator).unbind()
    allowed = torch.rand(40, 9, generator=generator) < 0.7
    allowed[0] = False
    for longest in (1, 3, 30):
        got = best_spans(start, end, allowed, longest)
        for i in range(40):
            ok = [(a, b) for a in range(9) for b in range(a, min(a + longest, 9)) if allowed[i, a] and allowed[i, b]]
            scores = {(a, b): float(start[i, a] + end[i, b]) for a, b in ok}
            assert float(got[0][i]) == pytest.approx(max(scores.values(), default=-torch.inf))
            assert not ok or (int(got[1][i]), int(got[2][i])) == max(scores, key=scores.__getitem__)


def test_the_best_window_and_no_answer():
    """The best span of any window, against the lowest score of none (Devlin et al., 2019, section 4.3)."""
    one, two = Question("a", [("x", 0)]), Question("b", [])
    found = [Found(0, one, "x", 3.0, 9.0), Found(1, two, "y", 1.0, 1.0), Found(0, one, "z", 2.0, 2.5)]
    assert chosen(found) == {0: (one, "x"), 1: (two, "")}
    assert chosen([found[0], Found(0, one, "z", 4.0, 4.5)])[0] == (one, "")


def test_scores_of_answers():
    """Words as a set with counts, without case, punctuation, articles and blanks; the best of a question's answers."""
    cases = [
        (["the Elbe river", "Elbe"], "The  Elbe.", 1, 1),
        (["the Elbe river"], "Elbe", 0, 2 * (1 / 1) * (1 / 2) / (1 / 1 + 1 / 2)),
        (["to be or not to be"], "be be be!", 0, 2 * (2 / 3) * (2 / 6) / (2 / 3 + 2 / 6)),
        (["1,000"], "1000", 1, 1),
        (["Elbe"], "Oder", 0, 0),
        (["Elbe"], "", 0, 0),
        ([], "", 1, 1),
        ([], "Elbe", 0, 0),
    ]
    found = [
        Found(row, Question(None, [(answer, 0) for answer in answers]), text, 1.0, -torch.inf)
        for row, (answers, text, _, _) in enumerate(cases)
    ]
    for name, column in (("exact_match", 2), ("f1", 3)):
        metric = AnswerScore(name)
        for part in (found[:3], found[3:]):
            metric.update(part)
        assert metric.compute().item() == pytest.approx(sum(case[column] for case in cases) / len(cases))
        metric.reset()
        metric.update(found[:1])
        assert metric.compute().item() == 1


def test_predicted_answers(tokenizer):
    """Texts of the context, from logits; never of the question or of special tokens."""
    kind = questions_of(unanswerable=True, max_answer_length=2)
    rows = [ROWS["question_answering"][0], ROWS["question_answering"][2]._replace(label=Question(None, []))]
    batch = kind.collate(kind.encode(rows, [], tokenizer, 16).examples, tokenizer.pad_token_id)
    start, end = torch.zeros(2, *batch["input_ids"].shape).unbind()
    start[0, :2], end[0, :2] = 9, -9  # [CLS] and the question
    first = int(batch["start_positions"][0])
    start[0, first], end[0, first + 1], end[0, first + 2] = 5, 5, 7  # the last one is too far away
    start[1, 0] = 1
    outputs = [{"start_logits": start, "end_logits": end}]
    words = [json.loads(line) for line in kind.lines(outputs, [batch], [])]
    ends = batch["windows"][0].offsets[first + 1]
    assert words == [{"id": "x", "text": rows[0].pair[4 : ends[1]]}, {"id": "2", "text": ""}] and 4 < ends[0] < ends[1]
