"""The exported folder as its users load it: in processes without this repository."""

import contextlib
import dataclasses
import io
import json
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
from src.bert_layers import BertForMaskedLM, BertForSequenceClassification
from src.common.errors import ConfigError, ExportError
from src.configuration_bert import AUTO_MAP
from src.data.tokenizer import load_tokenizer
from src.export import hf, onnx, sentences
from src.train import weights
from src.train.weights import load_pretrained
from tests.conftest import MAX_SEQ_LEN
from tests.model.test_bert_layers import batch_of, model_of
from tests.runs import tiny_run


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The folder, and what the script printed."""
    out = tmp_path_factory.mktemp("exported") / "mosaic"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        export_hf.main([str(trained), str(out)])
    return out, printed.getvalue()


@pytest.fixture(scope="module")
def computed(trained):
    """Ids and mask of a batch; the checkpoint's logits and last hidden states for it."""
    model, batch = load_pretrained(trained, BertForMaskedLM), batch_of()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        return ids, mask, model(ids, mask).logits, model.bert(ids, mask).last_hidden_state


def run_as_user(script, folder, values, tmp_path):
    """Run a script in a process with nothing of this repository; it reads ``folder`` and a file with ``values``."""
    torch.save(values, tmp_path / "values.pt")
    environment = {"HF_HOME": f"{tmp_path}/hf", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, folder, tmp_path / "values.pt"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "all the same" in done.stdout, done.stderr


@pytest.fixture
def loaded_here(monkeypatch):
    """Load folders in this process, because another one takes seconds."""

    def load(folder, auto_class, ids, mask):
        model = load_pretrained(folder, getattr(bert_layers, hf.AUTO_CLASSES[auto_class][0]))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        return hf.scores(model, ids, mask).detach(), tokenizer(hf.TEXT)["input_ids"]

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
    source = {path.name for path in Path(bert_layers.__file__).parent.glob("*.py")}
    assert {"model.safetensors", "tokenizer.json", "attention.py"} < names <= export_hf.FILES | source | {"1_Pooling"}
    assert not [path for path in out.parent.iterdir() if path != out]
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {(out / "config.json").stat().st_mode & 0o777}


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
    assert f"cuts them at {MAX_SEQ_LEN} tokens" in text
    assert f"| longest training sequence | {MAX_SEQ_LEN} tokens |" in text
    assert 'SentenceTransformer("mosaic", trust_remote_code=True)' in text


def test_the_folder_has_mean_pooling_and_the_length_of_its_training(exported):
    out = exported[0]
    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    read = json.loads((out / "sentence_bert_config.json").read_text())
    assert tokenizer["model_max_length"] == read["max_seq_length"] == MAX_SEQ_LEN and read["do_lower_case"] is False
    config = json.loads((out / "config.json").read_text())
    pooling = json.loads((out / "1_Pooling" / "config.json").read_text())
    assert pooling == {"word_embedding_dimension": config["hidden_size"], "pooling_mode_mean_tokens": True}


def test_the_length_of_the_tokenizer(exported, tokenizer_folder, trained):
    """As asked for, else the run's, else the tokenizer's own, else BERT's."""
    tokenizer = load_tokenizer(tokenizer_folder)
    assert tokenizer.model_max_length > 1e20
    run, folder = weights.read(trained), weights.read(exported[0])
    assert sentences.max_length(run, tokenizer, None) == MAX_SEQ_LEN and sentences.max_length(run, tokenizer, 9) == 9
    hidden = dataclasses.replace(run, settings={**(run.settings or {}), "max_seq_len": "${oc.env:N} sha256:1"})
    for source in (folder, hidden):
        assert sentences.max_length(source, tokenizer, None) == 512
    baseline = dataclasses.replace(folder, config=transformers.BertConfig(max_position_embeddings=128))
    assert sentences.max_length(baseline, tokenizer, None) == 128
    tokenizer.model_max_length = 77
    assert [sentences.max_length(source, tokenizer, None) for source in (folder, run)] == [77, MAX_SEQ_LEN]
    for source, given, limit in ((run, 2, "any number"), (baseline, 129, "128")):
        with pytest.raises(ConfigError, match=f"--max_length: expected 3 to {limit}, got {given}"):
            sentences.max_length(source, tokenizer, given)


def test_what_sentence_transformers_saved_keeps_its_modules(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    kept = {"modules.json", "config_sentence_transformers.json", "1_Pooling/config.json", "2_Dense/config.json"}
    for name in {*kept, "0_other"}:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    out.mkdir()
    sentences.write_pooling(source, 24, 99, out)
    found = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    assert all(export_hf.is_exported(Path(name)) for name in found)
    assert json.loads(found.pop("sentence_bert_config.json").read_text())["max_seq_length"] == 99
    assert found.keys() == kept and all(found[name].read_text() == name for name in kept)
    for name in ("0_other", "2_Dense/mine.txt", "2_Dense/x/config.json", "other/config.json", "src/x.py"):
        assert not export_hf.is_exported(Path(name))


USER = """
import builtins, os, sys
builtins.input = lambda *prompt: sys.exit(f"asked: {prompt}")  # whether to run the custom code
for absent in ("triton", "composer", "streaming", "omegaconf", "einops", "datasets", "torchmetrics"):
    sys.modules[absent] = None  # as where only torch and transformers are
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification
from transformers import AutoModelForNextSentencePrediction, AutoModelForTokenClassification, AutoTokenizer, pipeline

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

# Without its source, or with a head that it lacks, no other model is loaded silently.
for auto_class, trust, said in (
    (AutoModel, False, "trust_remote_code"),
    (AutoModelForNextSentencePrediction, True, "MosaicBertConfig"),
):
    try:
        auto_class.from_pretrained(folder, trust_remote_code=trust)
        raise SystemExit(f"loaded by {auto_class}")
    except ValueError as error:
        assert said in str(error), error


def source(folder):
    return {name for name in os.listdir(folder) if name.endswith(".py")}


# A model that was fine-tuned from the folder and saved is a folder that needs nothing else.
tuned = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, **load).eval()
tuned.save_pretrained("tuned")
assert source("tuned") == source(folder)
again = AutoModelForSequenceClassification.from_pretrained("tuned", **load)
assert torch.equal(again(ids, mask).logits, tuned(ids, mask).logits)
base = AutoModel.from_pretrained("tuned", **load)  # by the other auto classes, too
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
import logging, warnings
from sentence_transformers import SentenceTransformer
said = []
handler = logging.Handler(logging.WARNING)  # such as "No sentence-transformers model found"
handler.emit = said.append
logging.getLogger("sentence_transformers").addHandler(handler)
with warnings.catch_warnings():
    warnings.simplefilter("error")
    embed = SentenceTransformer(folder, device="cpu", **load)
assert not said, said
assert embed.max_seq_length == tokenizer.model_max_length < 1000
assert len(embed.tokenize(["water " * 1000])["input_ids"][0]) == embed.max_seq_length
together = embed.encode(texts, batch_size=len(texts), convert_to_tensor=True)
alone = torch.cat([embed.encode([text], convert_to_tensor=True) for text in texts])
torch.testing.assert_close(together, alone, **same)
batch = tokenizer(texts, padding=True, return_tensors="pt")
real = batch["attention_mask"][:, :, None]
mean = (encoder(**batch).last_hidden_state * real).sum(1) / real.sum(1)
torch.testing.assert_close(together, mean, **same)
embed.save("embedder")
assert source("embedder") == source(folder)
again = SentenceTransformer("embedder", device="cpu", **load)
assert again.max_seq_length == embed.max_seq_length and [type(m).__name__ for m in again] == ["Transformer", "Pooling"]
kept = again.encode(texts, batch_size=1, convert_to_tensor=True)
torch.testing.assert_close(kept, alone, **same)
assert "src" not in sys.modules and sys.modules["composer"] is None
print("all the same")
"""


@pytest.mark.slow
def test_the_folder_needs_only_torch_and_transformers(exported, computed, tmp_path):
    """Every auto class, the fill-mask pipeline, and sentence-transformers: vectors alone as in a padded batch."""
    texts = ["paris is the [MASK] of france", "water", "a longer text, of more words than the two before it"]
    run_as_user(USER, exported[0], (*computed, texts), tmp_path)


def test_an_older_folder_is_exported_again_in_place(exported, tmp_path, capsys):
    """With the earlier name of the config's class, and source that fails."""
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


def test_an_exported_folder_is_read_with_the_same_weights_and_tokenizer(exported, trained):
    back = weights.read(exported[0])
    got, want = (dict(load_pretrained(source, BertForMaskedLM).state_dict()) for source in (back, trained))
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    weights.check_tokenizer(weights.read(trained), weights.load_tokenizer(back))
    assert hf.load_model(back)[0] == "AutoModelForMaskedLM"


def test_a_classifier_replaces_an_older_export(exported, trained, tokenizer_folder, tmp_path, capsys, loaded_here):
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
    (out / "mine.txt").rename(out / "1_Pooling" / "mine.txt")
    with pytest.raises(ConfigError, match=r"holds more than an exported model \(1_Pooling/mine.txt\)"):
        export_hf.main([*arguments, "--overwrite"])
    (out / "1_Pooling" / "mine.txt").unlink()
    export_hf.main([*arguments, "--overwrite"])
    assert "export max_abs_logit_diff=" in capsys.readouterr().out
    again = load_pretrained(out, BertForSequenceClassification)
    assert again.config.id2label == names and torch.equal(again.classifier.weight, model.classifier.weight)
    card = (out / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "SentenceTransformer" not in card
    assert not (out / "modules.json").exists() and not (out / "1_Pooling").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"tuned", "out"}


@pytest.mark.parametrize("head", [name.removeprefix("AutoModel") for name in hf.AUTO_CLASSES])
def test_the_auto_class_follows_the_weights(head, tmp_path):
    """Attention dropout keeps the implementation that has it."""
    model_class = getattr(bert_layers, f"Bert{head or 'Model'}")
    model = model_of(model_class, dtype=torch.float32, attention_probs_dropout_prob=0.1, attention="torch")
    model.config.attention = "auto"
    model.save_pretrained(tmp_path)
    found, loaded = hf.load_model(weights.read(tmp_path))
    assert found == f"AutoModel{head}" and type(loaded) is model_class and loaded.config.attention == "torch"


@pytest.mark.parametrize("cls", [getattr(bert_layers, name) for name, _ in hf.AUTO_CLASSES.values()])
def test_only_rounding_is_accepted(cls):
    model = model_of(cls, dtype=torch.float32).eval()
    want = hf.reference_outputs(model)
    with torch.no_grad():
        got = hf.scores(model, want.ids, want.mask)
        assert 0 < want.difference(got, "it") < 1e-4
        next(p for name, p in model.named_parameters() if "layer.1.mlp.wo.weight" in name).mul_(1.001)
        with pytest.raises(ExportError, match="it does not compute what the checkpoint does: outputs up to"):
            want.difference(hf.scores(model, want.ids, want.mask), "it")
        got[0] = float("nan")
        with pytest.raises(ExportError, match="differ by nan"):
            want.difference(got, "it")


def test_a_folder_with_other_outputs_is_not_exported(trained, tmp_path, monkeypatch, loaded_here):
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


def test_refusals_leave_no_folder(trained, tmp_path, monkeypatch):
    shutil.copy(trained / "latest-rank0.pt", tmp_path / "alone.pt")
    with pytest.raises(ValueError, match="next to the checkpoint; name the tokenizer: --tokenizer FOLDER"):
        export_hf.main([str(tmp_path / "alone.pt"), str(tmp_path / "out")])
    monkeypatch.setattr(onnx, "PACKAGES", ("onnx", "nothing_of_that_name"))
    with pytest.raises(ConfigError, match="--onnx needs nothing_of_that_name: pip install -r requirements-onnx.txt"):
        export_hf.main([str(trained), str(tmp_path / "out"), "--onnx"])
    with pytest.raises(ConfigError, match="--int8 quantises the graph of --onnx: give both"):
        export_hf.main([str(trained), str(tmp_path / "out"), "--int8"])
    broken = load_pretrained(trained, BertForMaskedLM)
    torch.nn.init.constant_(broken.cls.predictions.transform.dense.bias, float("nan"))
    with pytest.raises(ExportError, match="the checkpoint computes NaN or infinity"):
        hf.reference_outputs(broken)
    assert [path.name for path in tmp_path.iterdir()] == ["alone.pt"]


# ONNX


@pytest.mark.slow
def test_the_graphs_of_a_checkpoint(trained, tmp_path, capsys):
    export_hf.main([str(trained), str(tmp_path / "out"), "--onnx", "--int8"])
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names[-3:] == ["onnx", "onnx_int8", "export"]
    assert {"model.onnx", "model.int8.onnx"} < {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.slow
def test_the_baseline_is_exported_as_transformers_bert(token_shards, tokenizer_folder, tmp_path):
    main.main(["yamls/hf_bert.yaml", *tiny_run(token_shards, tokenizer_folder, tmp_path)])
    export_hf.main([str(tmp_path / "checkpoints"), str(tmp_path / "out")])
    assert not list((tmp_path / "out").glob("*.py"))
    ours = load_pretrained(tmp_path / "checkpoints", transformers.BertForMaskedLM)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    with pytest.raises(ConfigError, match="--onnx is for MosaicBERT"):
        export_hf.main([str(tmp_path / "checkpoints"), str(tmp_path / "other"), "--onnx"])
