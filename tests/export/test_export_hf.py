"""The exported folder as its users load it: in processes without this repository."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
import yaml

import export_hf
import main
from src import bert_layers
from src.bert_layers import BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification, BertModel
from src.common.errors import ConfigError, ExportError
from src.configuration_bert import AUTO_MAP
from src.export import hf, onnx
from src.train import weights
from src.train.weights import load_pretrained
from tests.model.test_bert_layers import batch_of, model_of
from tests.runs import tiny_run


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The folder, and what the script printed."""
    out = tmp_path_factory.mktemp("exported") / "mosaic"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        export_hf.main([str(trained), str(out)])
    return out, printed.getvalue()


@pytest.fixture
def loaded_here(monkeypatch):
    """Load folders in this process, because another one takes seconds."""

    def load(folder, auto_class, ids, mask):
        model = load_pretrained(folder, getattr(bert_layers, hf.AUTO_CLASSES[auto_class][0]))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        return model(ids, mask)[0].detach(), tokenizer(hf.TEXT)["input_ids"]

    monkeypatch.setattr(hf, "outputs_elsewhere", load)


def test_what_a_folder_holds(exported, trained):
    out, printed = exported
    last = printed.splitlines()[-1]
    assert last.startswith("export max_abs_logit_diff=")
    fields = dict(field.split("=") for field in last.split()[1:])
    model = load_pretrained(trained, BertForMaskedLM)
    assert int(fields["parameters"]) == model.num_parameters() and float(fields["max_abs_logit_diff"]) < 1e-5
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "mosaic_bert" and config["auto_map"]["AutoModel"] == "bert_layers.BertModel"
    names = {path.name for path in out.iterdir()}
    assert (
        {"model.safetensors", "tokenizer.json", "attention.py"}
        < names
        <= export_hf.FILES | {path.name for path in Path(bert_layers.__file__).parent.glob("*.py")}
    )
    assert not [path for path in out.parent.iterdir() if path != out]
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {(out / "config.json").stat().st_mode & 0o777}


def test_the_card_says_how_it_was_made(exported, trained):
    card = (exported[0] / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "transformers", "pipeline_tag": "fill-mask"}
    assert "# license: add yours" in front
    lines = [json.loads(line) for line in (trained.parent / "metrics.jsonl").read_text().splitlines()]
    loss = lines[-1]["metrics/eval/LanguageCrossEntropy"]
    assert f"| validation loss | {loss:.4f} nats per masked token, at step 4 |" in text
    assert f"| trained for | 4 steps, 64 sequences, {lines[-1]['token']:,} tokens |" in text
    assert (trained / "config.yaml").read_text() in text


USER = """
import builtins, os, sys
builtins.input = lambda *prompt: sys.exit(f"asked: {prompt}")  # whether to run the custom code
for absent in ("triton", "composer", "streaming", "omegaconf", "einops", "datasets", "torchmetrics"):
    sys.modules[absent] = None  # as where only torch and transformers are
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification
from transformers import AutoModelForQuestionAnswering, AutoModelForTokenClassification, AutoTokenizer, pipeline

folder, file = sys.argv[1:]
ids, mask, logits, states, texts = torch.load(file)
load = dict(trust_remote_code=True)
model = AutoModelForMaskedLM.from_pretrained(folder, **load)
assert not model.training
same = dict(rtol=1e-5, atol=1e-5)
torch.testing.assert_close(model(ids, mask).logits, logits, **same)
encoder = AutoModel.from_pretrained(folder, **load)
torch.testing.assert_close(encoder(ids, mask).last_hidden_state, states, **same)
for auto_class in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
    other = auto_class.from_pretrained(folder, num_labels=5, **load)
    assert other(ids, mask).logits.shape[-1] == 5 and type(other).__module__.startswith("transformers_modules.")
    torch.testing.assert_close(other.bert(ids, mask).last_hidden_state, states, **same)

try:  # never another model, silently
    AutoModel.from_pretrained(folder, trust_remote_code=False)
    raise SystemExit("loaded without its source")
except ValueError as error:
    assert "trust_remote_code" in str(error), error

try:  # nor inside transformers' own BERT
    AutoModelForQuestionAnswering.from_pretrained(folder, **load)
    raise SystemExit("a head that is not there")
except ValueError as error:
    assert "MosaicBertConfig" in str(error), error


def source(folder):
    return {name for name in os.listdir(folder) if name.endswith(".py")}


# What was fine-tuned from the folder and saved is a folder that loads by itself.
tuned = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, **load).eval()
tuned.save_pretrained("tuned")
assert source("tuned") == source(folder)
again = AutoModelForSequenceClassification.from_pretrained("tuned", **load)
assert torch.equal(again(ids, mask).logits, tuned(ids, mask).logits)
base = AutoModel.from_pretrained("tuned", **load)  # by each way to it, not by that of its class alone
assert torch.equal(base(ids, mask).pooler_output, tuned.bert(ids, mask).pooler_output)

tokenizer = AutoTokenizer.from_pretrained(folder, **load)
fill = pipeline("fill-mask", model=folder, device="cpu", **load)
masked = tokenizer(texts[0], return_tensors="pt")
where = (masked["input_ids"] == tokenizer.mask_token_id).nonzero()[0]
best = model(**masked).logits[tuple(where)].softmax(-1).topk(5)
found = fill(texts[0])
assert [guess["token"] for guess in found] == best.indices.tolist()
assert abs(found[0]["score"] - float(best.values[0])) < 1e-6

for absent in ("datasets", "torchmetrics"):
    del sys.modules[absent]
from sentence_transformers import SentenceTransformer
embed = SentenceTransformer(folder, device="cpu", **load)
together = embed.encode(texts, batch_size=len(texts), convert_to_tensor=True)
alone = torch.cat([embed.encode([text], convert_to_tensor=True) for text in texts])
torch.testing.assert_close(together, alone, **same)
batch = tokenizer(texts, padding=True, return_tensors="pt")
real = batch["attention_mask"][:, :, None]
mean = (encoder(**batch).last_hidden_state * real).sum(1) / real.sum(1)
torch.testing.assert_close(together, mean, **same)
embed.save("embedder")
assert source("embedder") == source(folder)
kept = SentenceTransformer("embedder", device="cpu", **load).encode(texts, batch_size=1, convert_to_tensor=True)
torch.testing.assert_close(kept, alone, **same)
assert "src" not in sys.modules and sys.modules["composer"] is None
print("all the same")
"""


def test_the_folder_where_only_torch_and_transformers_are(exported, trained, tmp_path):
    """Every auto class, the fill-mask pipeline, and sentence-transformers: vectors alone as in a padded batch."""
    model = load_pretrained(trained, BertForMaskedLM)
    batch = batch_of()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    texts = ["paris is the [MASK] of france", "water", "a longer text, of more words than the two before it"]
    states = model.bert(ids, mask).last_hidden_state
    torch.save((ids, mask, model(ids, mask).logits, states, texts), tmp_path / "want.pt")
    environment = {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", USER, exported[0], tmp_path / "want.pt"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "all the same" in done.stdout


PLACED = """
import sys
import torch
from transformers import AutoModelForMaskedLM

folder, file = sys.argv[1:]
ids, mask, logits = torch.load(file)
for device_map in ("auto", "cpu", {"": "cpu"}, {"bert.embeddings": "cpu", "bert.encoder": "cpu", "cls": "cpu"}):
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True, device_map=device_map)
    torch.testing.assert_close(model(ids, mask).logits, logits, rtol=1e-5, atol=1e-5)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
print("all the same")
"""


def test_accelerate_places_it(exported, trained, tmp_path):
    pytest.importorskip("accelerate")
    model, batch = load_pretrained(trained, BertForMaskedLM), batch_of()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    torch.save((ids, mask, model(ids, mask).logits), tmp_path / "want.pt")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PLACED, exported[0], tmp_path / "want.pt"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "all the same" in done.stdout, done.stderr


def test_a_folder_exported_before_is_exported_again_in_its_place(exported, tmp_path, capsys):
    """With the name that the config's class had, and source that computes garbage under transformers 5."""
    old = tmp_path / "old"
    shutil.copytree(exported[0], old)
    config = json.loads((old / "config.json").read_text())
    config["auto_map"]["AutoConfig"] = "configuration_bert.BertConfig"
    (old / "config.json").write_text(json.dumps(config))
    other = transformers.AutoConfig.from_pretrained(old, trust_remote_code=True)  # our source knows the name
    assert other.model_type == "mosaic_bert" and type(other).__name__ == "MosaicBertConfig"
    (old / "bert_layers.py").write_text("raise RuntimeError('old')")
    export_hf.main([str(old), str(old), "--overwrite"])
    assert "export max_abs_logit_diff=" in capsys.readouterr().out
    assert (old / "bert_layers.py").read_bytes() == Path(bert_layers.__file__).read_bytes()
    assert json.loads((old / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert (old / "README.md").read_text() == (exported[0] / "README.md").read_text()  # which tells of the training


def test_what_is_exported_can_be_exported_again_and_begun_with(exported, trained):
    """The way back: the same weights, the same tokenizer."""
    there, back = load_pretrained(trained, BertForMaskedLM), weights.read(exported[0])
    for name, weight in load_pretrained(back, BertForMaskedLM).state_dict().items():
        assert torch.equal(weight, there.state_dict()[name])
    weights.check_tokenizer(weights.read(trained), weights.load_tokenizer(back))
    assert hf.load_model(back)[0] == "AutoModelForMaskedLM"


def test_a_classifier_in_place_of_an_older_export(exported, trained, tokenizer_folder, tmp_path, capsys, loaded_here):
    names = {0: "bad", 1: "so-so", 2: "good"}
    model = load_pretrained(trained, BertForSequenceClassification, id2label=names, label2id={})
    model.save_pretrained(tmp_path / "tuned")
    out = tmp_path / "out"
    shutil.copytree(exported[0], out)
    arguments = [str(tmp_path / "tuned"), str(out), "--tokenizer", tokenizer_folder]
    with pytest.raises(ConfigError, match="out exists; replace it with --overwrite"):
        export_hf.main(arguments)
    (out / "mine.txt").write_text("kept")
    with pytest.raises(ConfigError, match=r"holds more than an exported model \(mine.txt\)"):
        export_hf.main([*arguments, "--overwrite"])
    (out / "mine.txt").unlink()
    export_hf.main([*arguments, "--overwrite"])
    assert "export max_abs_logit_diff=" in capsys.readouterr().out
    again = load_pretrained(out, BertForSequenceClassification)
    assert again.config.id2label == names and torch.equal(again.classifier.weight, model.classifier.weight)
    assert "pipeline_tag: text-classification" in (out / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("tuned", "out")] == []


@pytest.mark.parametrize(
    ("model_class", "auto_class"),
    [
        (BertForMaskedLM, "AutoModelForMaskedLM"),
        (BertForSequenceClassification, "AutoModelForSequenceClassification"),
        (BertForTokenClassification, "AutoModelForTokenClassification"),
        (BertModel, "AutoModel"),
    ],
)
def test_the_class_follows_the_weights(model_class, auto_class, tmp_path):
    """Attention dropout keeps the implementation that has it."""
    model = model_of(model_class, dtype=torch.float32, attention_probs_dropout_prob=0.1, attention="torch")
    model.config.attention = "auto"
    model.save_pretrained(tmp_path)
    found, loaded = hf.load_model(weights.read(tmp_path))
    assert found == auto_class and type(loaded) is model_class and loaded.config.attention == "torch"


# The check


@pytest.mark.parametrize("cls", [BertForMaskedLM, BertForSequenceClassification, BertModel])
def test_rounding_passes_and_more_does_not(cls):
    model = model_of(cls, dtype=torch.float32).eval()
    want = hf.reference_outputs(model)
    with torch.no_grad():
        got = model(want.ids, want.mask)[0]
        assert 0 < want.difference(got, "it") < 1e-4
        next(p for name, p in model.named_parameters() if "layer.1.mlp.wo.weight" in name).mul_(1.001)
        with pytest.raises(ExportError, match="it does not compute what the checkpoint does: outputs up to"):
            want.difference(model(want.ids, want.mask)[0], "it")
        got[0] = float("nan")
        with pytest.raises(ExportError, match="differ by nan"):
            want.difference(got, "it")


def test_a_folder_that_computes_something_else_does_not_appear(trained, tmp_path, monkeypatch, loaded_here):
    write = hf.write_folder

    def damaged(model, tokenizer, card, folder):
        write(model, tokenizer, card, folder)
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        weights["bert.encoder.layer.0.mlp.wo.bias"][0] += 0.01
        safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(hf, "write_folder", damaged)
    with pytest.raises(ExportError, match="the exported model does not compute"):
        export_hf.main([str(trained), str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


def test_refusals_before_any_work(trained, tmp_path, monkeypatch):
    shutil.copy(trained / "latest-rank0.pt", tmp_path / "alone.pt")
    with pytest.raises(ValueError, match="next to the checkpoint; name the tokenizer: --tokenizer FOLDER"):
        export_hf.main([str(tmp_path / "alone.pt"), str(tmp_path / "out")])
    monkeypatch.setattr(onnx, "PACKAGES", ("onnx", "nothing_of_that_name"))
    with pytest.raises(ConfigError, match="--onnx needs nothing_of_that_name: pip install -r requirements-onnx.txt"):
        export_hf.main([str(trained), str(tmp_path / "out"), "--onnx"])
    broken = load_pretrained(trained, BertForMaskedLM)
    torch.nn.init.constant_(broken.cls.predictions.transform.dense.bias, float("nan"))
    with pytest.raises(ExportError, match="the checkpoint computes NaN or infinity"):
        hf.reference_outputs(broken)
    assert [path.name for path in tmp_path.iterdir()] == ["alone.pt"]


# ONNX


def test_padded_computes_what_the_model_does():
    """With two segments; padding to either side, and holes in the mask."""
    for cls in (BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification, BertModel):
        model = model_of(cls, dtype=torch.float32, num_labels=3).eval()
        batch = batch_of()
        right, full = batch["input_ids"], batch["attention_mask"]
        holes = full.clone()
        holes[:, 3] = 0
        for ids, mask in ((right, full), (right.flip(1), full.flip(1)), (right, holes)):
            with torch.no_grad():
                want = model(ids, mask, ids % 2)
                states, *head = onnx.Padded(model)(ids, mask, ids % 2)
            if head:
                torch.testing.assert_close(head[0], want[0], rtol=1e-5, atol=1e-5)
            else:
                torch.testing.assert_close(states, want[0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_onnx(trained, tmp_path, capsys):
    """Other numbers of sequences and other lengths than it was exported with."""
    export_hf.main([str(trained), str(tmp_path / "out"), "--onnx"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("onnx max_abs_logit_diff=") and lines[-1].startswith("export max_abs_logit_diff=")
    model = load_pretrained(trained, BertForMaskedLM)
    batch = batch_of()
    for rows in (slice(0, 1), slice(1, 2), slice(0, 5)):
        ids, mask = batch["input_ids"][rows], batch["attention_mask"][rows]
        got = onnx.run(tmp_path / "out" / "model.onnx", ids, mask)
        with torch.no_grad():
            torch.testing.assert_close(got, model(ids, mask).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_baseline_too(token_shards, tokenizer_folder, tmp_path):
    """A checkpoint of hf_bert becomes a folder of Hugging Face's own class, without source."""
    main.main(["yamls/hf_bert.yaml", *tiny_run(token_shards, tokenizer_folder, tmp_path)])
    export_hf.main([str(tmp_path / "checkpoints"), str(tmp_path / "out")])
    assert not list((tmp_path / "out").glob("*.py"))
    ours = load_pretrained(tmp_path / "checkpoints", transformers.BertForMaskedLM)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    with pytest.raises(ConfigError, match="--onnx is for MosaicBERT"):
        export_hf.main([str(tmp_path / "checkpoints"), str(tmp_path / "other"), "--onnx"])
