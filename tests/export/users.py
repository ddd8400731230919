"""What users of Hugging Face do with an exported folder.

test_hugging_face.py copies this file next to an exported folder, ``my-bert``, and lets pytest run it there, in a
process that cannot import this repository.
"""

import copy
import gc
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate import cpu_offload, disk_offload, init_empty_weights, load_checkpoint_and_dispatch
from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForMultipleChoice,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)

FOLDER = "my-bert"
TEXTS = Path("text.txt").read_text().splitlines()
SOURCE = {path.name for path in Path(FOLDER).glob("*.py")}
LAYERS = 3
ROUNDING = {"rtol": 1e-4, "atol": 1e-4}

tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
gc.freeze()  # Trainer collects garbage in each run: 0.4 s of looking at the libraries' objects


def load(auto_class, folder=FOLDER, **options):
    return auto_class.from_pretrained(folder, trust_remote_code=True, **options)


def masked_rows(count):
    """Encoded texts of different lengths, each with another share of tokens to predict."""
    rows = []
    for i, text in enumerate(TEXTS[:count]):
        row = dict(tokenizer(text, truncation=True, max_length=12 + 9 * i % 20))
        ids = torch.tensor(row["input_ids"])
        masked = torch.arange(len(ids)) % (i % 3 + 2) == 1
        rows.append({**row, "input_ids": ids.where(~masked, tokenizer.mask_token_id).tolist()})
        rows[-1]["labels"] = ids.where(masked, -100).tolist()
    return rows


pad_labels = DataCollatorForTokenClassification(tokenizer)


def batch_of(count=5):
    return dict(pad_labels(masked_rows(count)))


def logits_of(model, batch):
    with torch.no_grad():
        return model.eval()(
            **{k: v for k, v in batch.items() if k not in ("labels", "start_positions", "end_positions")}
        ).logits


class Gradients(TrainerCallback):
    """Keeps the gradients of the last step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trainer_of(model, folder, collator, rows, **options):
    defaults = {"per_device_train_batch_size": 2, "max_steps": 1, "max_grad_norm": 0, "save_strategy": "no"}
    environment = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(str(folder), **{**defaults, **environment, **options})
    made = Trainer(
        model, arguments, collator, rows, rows, processing_class=tokenizer, callbacks=[gradients := Gradients()]
    )
    made.gradients = gradients
    return made


def whole_batch(model, batch):
    """The model's own loss and gradients of a batch, without Trainer."""
    model = copy.deepcopy(model).train()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_saved(folder, auto_class, model, batch):
    """A saved folder has the source and the tokenizer, and loads with the same outputs and names of labels."""
    assert {path.name for path in folder.glob("*.py")} == SOURCE
    again = load(auto_class, folder)
    assert again.config.id2label == model.config.id2label and again.config.problem_type == model.config.problem_type
    with torch.no_grad():
        for got, want in zip(again(**batch).values(), model.eval()(**batch).values(), strict=True):
            assert torch.equal(got, want)
    kept = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert kept(TEXTS[:3])["input_ids"] == tokenizer(TEXTS[:3])["input_ids"]


# Trainer


def test_this_repository_is_not_here():
    with pytest.raises(ImportError):
        __import__("src")


def test_pretraining_goes_on_by_the_usual_script(tmp_path):
    """Tokenize, group, mask, train, evaluate, save: as transformers' examples do for masked LM."""

    def encode(batch):
        return tokenizer(batch["text"], return_special_tokens_mask=True)

    def group(batch, length=32):
        joined = {key: sum(values, []) for key, values in batch.items()}
        total = len(joined["input_ids"]) // length * length
        return {key: [values[i : i + length] for i in range(0, total, length)] for key, values in joined.items()}

    def accuracy(predictions):
        guesses, labels = predictions
        return {"accuracy": float((guesses == labels)[labels != -100].mean())}

    def best(logits, labels):
        return logits.argmax(-1)

    text = Dataset.from_dict({"text": TEXTS[:40]})
    blocks = text.map(encode, batched=True, remove_columns=["text"]).map(group, batched=True)
    options = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-3, "num_train_epochs": 1}
    trainer = Trainer(
        model=load(AutoModelForMaskedLM, hidden_dropout_prob=0.1),
        args=TrainingArguments(str(tmp_path / "run"), **options),
        train_dataset=blocks,
        eval_dataset=blocks,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=best,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] and math.isfinite(math.exp(after["eval_loss"]))
    assert after["eval_accuracy"] > before["eval_accuracy"]
    guesses = trainer.predict(blocks).predictions
    assert guesses.shape == (len(blocks), 32)
    trainer.save_model(tmp_path / "saved")
    trainer.create_model_card()
    assert (tmp_path / "run" / "README.md").exists()
    check_saved(tmp_path / "saved", AutoModelForMaskedLM, trainer.model, batch_of())


def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def trainer(folder):
        model = load(AutoModelForMaskedLM, hidden_dropout_prob=0.1)
        return trainer_of(model, tmp_path / folder, pad_labels, masked_rows(10), **options)

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed.train(resume_from_checkpoint=True)
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


def test_metrics_of_masked_lm_get_logits(tmp_path):
    rows = masked_rows(5)

    def accuracy(predictions):
        assert predictions.predictions.shape[:2] == predictions.label_ids.shape
        real = predictions.label_ids != -100
        return {"accuracy": float((predictions.predictions.argmax(-1) == predictions.label_ids)[real].mean())}

    model = load(AutoModelForMaskedLM)
    trainer = trainer_of(model, tmp_path, pad_labels, rows, per_device_eval_batch_size=5)
    trainer.compute_metrics = accuracy
    batch = batch_of(5)
    logits, real = logits_of(model, batch), batch["labels"] != -100
    found = trainer.evaluate()
    right = (logits.argmax(-1) == batch["labels"])[real].float().mean()
    assert found["eval_accuracy"] == pytest.approx(float(right))
    assert found["eval_loss"] == pytest.approx(float(F.cross_entropy(logits[real], batch["labels"][real])), rel=1e-5)
    np.testing.assert_allclose(trainer.predict(rows).predictions, logits.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"bf16": True},
    ],
    ids=["plain", "checkpointing", "checkpointing without reentry", "bf16"],
)
def test_accumulated_steps_are_those_of_the_whole_batch(options, tmp_path, monkeypatch):
    """Two microbatches with different numbers of masked tokens."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # TrainingArguments(bf16=True) leaves it changed
    model, rows = load(AutoModelForMaskedLM), masked_rows(3)
    want_loss, want = whole_batch(model, pad_labels(rows))
    trainer = trainer_of(model, tmp_path, pad_labels, rows, gradient_accumulation_steps=2, **options)
    loss, got = trainer.train().training_loss, trainer.gradients.found
    rounding = 0.1 if "bf16" in options else 1e-5
    assert loss == pytest.approx(want_loss, rel=rounding) and got.keys() == want.keys()
    assert max(float((got[name] - x).norm() / x.norm()) for name, x in want.items()) < rounding


def test_label_smoothing_is_that_of_the_logits(tmp_path):
    model, rows = load(AutoModelForMaskedLM), masked_rows(2)
    trainer = trainer_of(model, tmp_path, pad_labels, rows, label_smoothing_factor=0.1)
    found = trainer.train().training_loss
    batch = batch_of(2)
    logits = logits_of(load(AutoModelForMaskedLM), batch).flatten(0, 1)
    assert found == pytest.approx(
        float(F.cross_entropy(logits, batch["labels"].flatten(), label_smoothing=0.1)), rel=1e-5
    )


def test_weight_decay_leaves_out_norms_and_biases(tmp_path):
    trainer = trainer_of(load(AutoModelForMaskedLM), tmp_path, pad_labels, masked_rows(2))
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    assert decayed == {name for name, p in trainer.model.named_parameters(remove_duplicate=False) if p.ndim == 2}


def classification(labels):
    return DataCollatorWithPadding(tokenizer), [
        {**tokenizer(text, truncation=True, max_length=20), "labels": label}
        for text, label in zip(TEXTS, labels, strict=False)
    ]


def tokens():
    rows = masked_rows(3)
    for row in rows:
        row["labels"] = [label if label == -100 else label % 3 for label in row["labels"]]
    return pad_labels, rows


def answers():
    rows = [dict(tokenizer("where", text, truncation="only_second", max_length=20)) for text in TEXTS[:4]]
    for i, row in enumerate(rows):
        row |= {"start_positions": i + 1, "end_positions": i + 2}
    return DataCollatorWithPadding(tokenizer), rows


def choices():
    rows = [
        dict(tokenizer([text] * 3, TEXTS[i : i + 3], truncation=True, max_length=20))
        for i, text in enumerate(TEXTS[:3])
    ]
    for i, row in enumerate(rows):
        row["label"] = i
    return DataCollatorForMultipleChoice(tokenizer), rows


NAMES = {"id2label": {0: "bad", 1: "so-so", 2: "good"}, "label2id": {"bad": 0, "so-so": 1, "good": 2}}
HEADS = {
    "one class": (AutoModelForSequenceClassification, NAMES, classification([2, 0, 1])),
    "many classes": (
        AutoModelForSequenceClassification,
        {**NAMES, "problem_type": "multi_label_classification"},
        classification([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]),
    ),
    "regression": (AutoModelForSequenceClassification, {"num_labels": 1}, classification([0.3, -2.0, 5.1])),
    "tokens": (AutoModelForTokenClassification, NAMES, tokens()),
    "answers": (AutoModelForQuestionAnswering, {}, answers()),
    "choices": (AutoModelForMultipleChoice, {}, choices()),
}


@pytest.mark.parametrize("head", HEADS)
def test_a_head_is_trained_saved_and_loaded(head, tmp_path):
    auto_class, options, (collator, rows) = HEADS[head]
    model = load(auto_class, **options)
    batch = dict(collator(copy.deepcopy(rows)))
    loss, want = whole_batch(model, batch)
    trainer = trainer_of(model, tmp_path / "run", collator, rows, gradient_accumulation_steps=2)
    assert trainer.train().training_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(trainer.gradients.found, want, **ROUNDING)
    assert len(want) == len(list(model.parameters())), "a weight without gradient"
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    predicted = trainer.predict(rows).predictions
    assert len(predicted[0] if head == "answers" else predicted) == len(rows)
    trainer.save_model(tmp_path / "saved")
    check_saved(tmp_path / "saved", auto_class, model, batch)


# PEFT


LORA = {
    "attention": {"target_modules": ["Wqkv"]},
    "all linear layers": {"target_modules": "all-linear"},
    "the last layer": {
        "target_modules": ["Wqkv", "wo"],
        "layers_to_transform": [LAYERS - 1],
        "layers_pattern": "layer",
    },
    "embeddings and decoder": {"target_modules": ["word_embeddings", "token_type_embeddings", "decoder"]},
    "saved decoder and embeddings": {
        "target_modules": ["Wqkv"],
        "modules_to_save": ["word_embeddings", "decoder"],
        "ensure_weight_tying": True,  # they share one weight
    },
    "dora": {"target_modules": ["Wqkv", "dense"], "use_dora": True},
}


def train_adapter(model, batch):
    """A step on a loss that equals that of the logits, with gradients for all that is trained."""
    for name, p in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(p, std=0.1)
    loss = model.train()(**batch).loss
    loss.backward()
    want = F.cross_entropy(logits_of(model, batch).flatten(0, 1), batch["labels"].flatten())
    assert float(loss) == pytest.approx(float(want), rel=1e-5)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and not [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
    torch.optim.SGD(trained.values(), lr=0.1).step()


@pytest.mark.parametrize("what", LORA)
def test_lora_is_trained_merged_and_saved(what, tmp_path):
    batch = batch_of()
    model = get_peft_model(load(AutoModelForMaskedLM), LoraConfig(r=4, **LORA[what]))
    train_adapter(model, batch)
    want = logits_of(model, batch)
    assert (want - logits_of(load(AutoModelForMaskedLM), batch)).abs().max() > 0.01
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(AutoModelForMaskedLM), tmp_path / "adapter")
    torch.testing.assert_close(logits_of(again, batch), want, **ROUNDING)
    if what == "embeddings and decoder":
        return  # PEFT would merge both adapters into the one weight that the two modules share
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, batch), want, **ROUNDING)
    merged.save_pretrained(tmp_path / "merged")
    assert {path.name for path in (tmp_path / "merged").glob("*.py")} == SOURCE
    torch.testing.assert_close(logits_of(load(AutoModelForMaskedLM, tmp_path / "merged"), batch), want, **ROUNDING)


def test_ia3_is_trained_and_merged():
    batch = batch_of()
    config = IA3Config(target_modules=["Wqkv", "wo"], feedforward_modules=["wo"])
    model = get_peft_model(load(AutoModelForMaskedLM), config)
    train_adapter(model, batch)
    want = logits_of(model, batch)
    torch.testing.assert_close(logits_of(model.merge_and_unload(), batch), want, **ROUNDING)


def test_trainer_trains_a_lora_classifier(tmp_path):
    auto_class, options, (collator, rows) = HEADS["one class"]
    # The pooler is new, too: a checkpoint of masked LM has none.
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=4, target_modules=["Wqkv"], modules_to_save=["pooler", "classifier"]
    )
    model = get_peft_model(load(auto_class, **options), config)
    trainer = trainer_of(model, tmp_path / "run", collator, rows, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.gradients.found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    trainer.save_model(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(auto_class, **options), tmp_path / "adapter")
    batch = collator(copy.deepcopy(rows))
    torch.testing.assert_close(logits_of(again, batch), logits_of(model, batch), **ROUNDING)


@pytest.mark.parametrize("reentrant", [True, False])
def test_adapters_are_trained_with_checkpointing(reentrant):
    batch = batch_of()
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = load(AutoModelForMaskedLM)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["Wqkv"], init_lora_weights=False))
        model.train()(**batch).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert found[0]
    torch.testing.assert_close(*found, **ROUNDING)


def test_prompts_are_tuned_and_prefixes_refused():
    auto_class, options, (collator, rows) = HEADS["one class"]
    config = PromptTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=4)
    model = get_peft_model(load(auto_class, **options), config)
    loss = model.train()(**collator(copy.deepcopy(rows))).loss
    loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    config = PrefixTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=4)
    with pytest.raises(ValueError, match="past key values"):
        get_peft_model(load(auto_class, **options), config)(**collator(copy.deepcopy(rows)))


# Pipelines and sentence vectors


def piped(task, folder=FOLDER, **options):
    return pipeline(task, model=str(folder), device="cpu", trust_remote_code=True, **options)


@pytest.fixture
def saved(tmp_path):
    """Saves a model with a new head and the tokenizer."""

    def saved(auto_class, **options):
        model = load(auto_class, **options)
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return model.eval()

    return saved


def test_fill_mask():
    texts = ["paris is the [MASK] of france", "[MASK] is a longer text, which is padded in no batch of one"]
    model, fill = load(AutoModelForMaskedLM), piped("fill-mask")
    for text, guesses in zip(texts, fill(texts, batch_size=2), strict=True):
        encoded = tokenizer(text, return_tensors="pt")
        where = encoded["input_ids"][0] == tokenizer.mask_token_id
        best = logits_of(model, encoded)[0, where][0].softmax(-1).topk(5)
        assert [guess["token"] for guess in guesses] == best.indices.tolist()
        np.testing.assert_allclose([guess["score"] for guess in guesses], best.values, rtol=1e-4)


def test_text_classification(saved, tmp_path):
    model = saved(AutoModelForSequenceClassification, **NAMES)
    found = piped("text-classification", tmp_path, top_k=None)(TEXTS[:3], batch_size=3)
    for text, scores in zip(TEXTS, found, strict=False):
        want = logits_of(model, tokenizer(text, return_tensors="pt"))[0].softmax(-1)
        got = {score["label"]: score["score"] for score in scores}
        assert got == {
            name: pytest.approx(float(p), rel=1e-4) for name, p in zip(("bad", "so-so", "good"), want, strict=True)
        }


def test_token_classification(saved, tmp_path):
    names = dict(enumerate(("O", "B-PER", "I-PER")))
    model = saved(AutoModelForTokenClassification, id2label=names, label2id={name: i for i, name in names.items()})
    text = TEXTS[0]
    encoded = tokenizer(text, return_tensors="pt")
    best = logits_of(model, encoded)[0, 1:-1].argmax(-1)  # without [CLS] and [SEP]
    found = piped("token-classification", tmp_path)(text)
    assert [entity["entity"] for entity in found] == [names[int(i)] for i in best if i]
    for group in piped("token-classification", tmp_path, aggregation_strategy="simple")(text):
        assert group["entity_group"] == "PER" and text[group["start"] : group["end"]].strip()


def test_zero_shot_classification(saved, tmp_path):
    names = dict(enumerate(("contradiction", "neutral", "entailment")))
    saved(AutoModelForSequenceClassification, id2label=names, label2id={name: i for i, name in names.items()})
    found = piped("zero-shot-classification", tmp_path)(TEXTS[0], candidate_labels=["sport", "science"])
    assert sorted(found["labels"]) == ["science", "sport"] and sum(found["scores"]) == pytest.approx(1)


def test_feature_extraction():
    states = piped("feature-extraction", batch_size=3)(TEXTS[:3])
    model = load(AutoModel)
    for text, got in zip(TEXTS, states, strict=False):
        encoded = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            want = model(**encoded).last_hidden_state
        torch.testing.assert_close(torch.tensor(got)[:, : want.shape[1]], want, **ROUNDING)


@pytest.mark.skipif(transformers.__version__ >= "5", reason="transformers 5 has no such pipeline")
def test_question_answering(saved, tmp_path):
    saved(AutoModelForQuestionAnswering)
    found = piped("question-answering", tmp_path)(question="where is it", context=TEXTS[0])
    assert found["answer"] == TEXTS[0][found["start"] : found["end"]]


def test_sentence_vectors(tmp_path):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(FOLDER, device="cpu", trust_remote_code=True)
    vectors = model.encode(TEXTS[:4], batch_size=4, convert_to_tensor=True)
    alone = torch.cat([model.encode([text], convert_to_tensor=True) for text in TEXTS[:4]])
    torch.testing.assert_close(vectors, alone, **ROUNDING)
    batch = tokenizer(TEXTS[:4], padding=True, return_tensors="pt")
    with torch.no_grad():
        states, real = load(AutoModel)(**batch).last_hidden_state, batch["attention_mask"][:, :, None]
    torch.testing.assert_close(vectors, (states * real).sum(1) / real.sum(1), **ROUNDING)
    model.save(str(tmp_path / "saved"))
    assert {path.name for path in (tmp_path / "saved").glob("*.py")} == SOURCE
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    assert torch.equal(again.encode(TEXTS[:4], batch_size=4, convert_to_tensor=True), vectors)


# accelerate


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"bert.embeddings": "cpu", "bert.encoder": "cpu", "cls": "cpu"}])
def test_accelerate_places_the_model(device_map):
    batch = batch_of()
    model = load(AutoModelForMaskedLM, device_map=device_map)
    torch.testing.assert_close(logits_of(model, batch), logits_of(load(AutoModelForMaskedLM), batch), **ROUNDING)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize("where", ["cpu", "disk", "empty", "dispatched"])
def test_offloaded_weights_are_used(where, tmp_path):
    batch = batch_of()
    model = load(AutoModelForMaskedLM)
    with torch.no_grad():
        want = model(**batch)
    device = torch.device("cpu")
    if where == "cpu":
        model = cpu_offload(model, device)
    elif where == "disk":
        model = disk_offload(model, str(tmp_path), device)
    else:
        with init_empty_weights():
            model = AutoModelForMaskedLM.from_config(
                AutoConfig.from_pretrained(FOLDER, trust_remote_code=True), trust_remote_code=True
            )
        model.tie_weights()
        places = {"": "cpu"} if where == "empty" else {"bert.embeddings": "cpu", "bert.encoder": "disk", "cls": "cpu"}
        model = load_checkpoint_and_dispatch(model, FOLDER, device_map=places, offload_folder=str(tmp_path)).eval()
    with torch.no_grad():
        got = model(**batch)
        without = model(batch["input_ids"], batch["attention_mask"])  # segment 0
    torch.testing.assert_close(got.logits, want.logits, **ROUNDING)
    torch.testing.assert_close(without.logits, want.logits, **ROUNDING)
    torch.testing.assert_close(got.loss, want.loss, **ROUNDING)


# Outputs, classes, folders


def test_attentions_and_hidden_states():
    batch = batch_of()
    real = batch["attention_mask"].bool()
    del batch["labels"]
    model = load(AutoModel)
    found = model(**batch, output_attentions=True, output_hidden_states=True)
    assert len(found.attentions) == LAYERS and len(found.hidden_states) == LAYERS + 1
    B, S = real.shape
    for weights in found.attentions:
        assert weights.shape == (B, model.config.num_attention_heads, S, S)
        over_keys = weights.sum(-1).transpose(1, 2)  # (B, S, N)
        torch.testing.assert_close(over_keys[real], torch.ones_like(over_keys[real]))
        assert not over_keys[~real].any() and not weights.transpose(1, 3)[~real].any()
    assert torch.equal(found.hidden_states[-1], found.last_hidden_state)
    torch.testing.assert_close(model(**batch).last_hidden_state, found.last_hidden_state, **ROUNDING)
    values = model(**batch, output_attentions=True, output_hidden_states=True, return_dict=False)
    assert isinstance(values, tuple) and len(values) == 4 and len(values[3]) == LAYERS


def test_outputs_follow_the_config():
    batch = batch_of()
    for auto_class in (AutoModelForMaskedLM, AutoModelForTokenClassification):
        model = load(auto_class, output_attentions=True, output_hidden_states=True)
        labels = {"labels": batch["labels"] % 2}
        found = model(batch["input_ids"], batch["attention_mask"], **labels)
        assert len(found.attentions) == LAYERS and len(found.hidden_states) == LAYERS + 1
        model = load(auto_class, return_dict=False)
        loss, logits = model(batch["input_ids"], batch["attention_mask"], **labels)
        assert loss.ndim == 0 and logits.ndim == 3


def test_auto_classes_without_a_mosaic_bert_are_refused(tmp_path):
    """Also of a folder as the published MosaicBERTs are, which call themselves bert."""
    published = tmp_path / "published"
    shutil.copytree(FOLDER, published)
    config = json.loads((published / "config.json").read_text())
    ours = {name for name in config["auto_map"] if name.startswith("AutoModel")}
    config |= {"model_type": "bert", "alibi_starting_size": 512, "architectures": ["BertForMaskedLM"]}
    code = {"AutoConfig": "configuration_bert.BertConfig", "AutoModelForMaskedLM": "bert_layers.BertForMaskedLM"}
    (published / "config.json").write_text(json.dumps({**config, "auto_map": code}))
    theirs = {name for name in dir(transformers) if name.startswith("AutoModel")}
    theirs = {name for name in theirs if "bert" in getattr(transformers, name)._model_mapping._model_mapping}
    assert ours < theirs
    for folder, known in ((FOLDER, ours), (published, code)):
        for name in theirs.difference(known):
            with pytest.raises(ValueError, match="MosaicBertConfig"):
                load(getattr(transformers, name), folder)
    for name in ours:
        assert "transformers_modules" in type(load(getattr(transformers, name))).__module__
        with pytest.raises(ValueError, match="trust_remote_code"):
            getattr(transformers, name).from_pretrained(FOLDER)
    batch = batch_of()
    want = logits_of(load(AutoModelForMaskedLM), batch)
    assert torch.equal(logits_of(load(AutoModelForMaskedLM, published), batch), want)
    assert torch.equal(logits_of(load(AutoModelForPreTraining), batch), want)


def test_words_are_added(tmp_path):
    """New word pieces, beyond the padded vocabulary: embeddings, decoder and its bias grow together."""
    own = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
    model = load(AutoModelForMaskedLM)
    own.add_tokens([f"zz{i}" for i in range(model.config.vocab_size)])
    model.resize_token_embeddings(len(own))
    batch = batch_of()
    model.save_pretrained(tmp_path)
    again = load(AutoModelForMaskedLM, tmp_path)
    got = logits_of(again, batch)
    assert got.shape[-1] == len(own) and torch.equal(got, logits_of(model, batch))
    torch.testing.assert_close(got[..., :100], logits_of(load(AutoModelForMaskedLM), batch)[..., :100], **ROUNDING)
    again.train()(**batch).loss.backward()


def test_sharded_weights(tmp_path):
    model, batch = load(AutoModelForMaskedLM), batch_of()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits_of(load(AutoModelForMaskedLM, tmp_path), batch), logits_of(model, batch))
