"""Training an encoder of sentences from an exported folder, and loading what it saved."""

import json

import pytest
import torch

from src.bert_layers import BertForMaskedLM
from src.data.tokenizer import load_tokenizer
from src.export import hf, sentences
from src.train import weights
from src.train.models import padded_vocab_size
from tests.conftest import MAX_SEQ_LEN
from tests.model.test_bert_layers import model_of

pytestmark = pytest.mark.slow  # sentence-transformers alone is imported for seconds


@pytest.fixture(scope="module")
def folder(tokenizer_folder, tmp_path_factory):
    """An exported folder of a tiny model."""
    out, tokenizer = tmp_path_factory.mktemp("exported") / "tiny", load_tokenizer(tokenizer_folder)
    tokenizer.model_max_length = MAX_SEQ_LEN
    model = model_of(BertForMaskedLM, dtype=torch.float32, vocab_size=padded_vocab_size(tokenizer))
    hf.write_folder(model, tokenizer, "a card", out)
    sentences.write_pooling(out, model.config.hidden_size, MAX_SEQ_LEN, out)
    return out


def test_three_steps_and_back(folder, documents, tmp_path, capsys):
    from sentence_transformers import SentenceTransformer

    from scripts import sentence_vectors

    pairs = [text.partition(". ") for text in documents]
    lines = [json.dumps({"question": a, "answer": b}) + "\n" for a, _, b in pairs if b][:48]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    out = tmp_path / "encoder"
    arguments = [str(folder), str(out), "--pairs", str(tmp_path / "pairs.jsonl"), "--batch_size", "16", "--lr", "0.01"]
    sentence_vectors.main(arguments)
    counts, *measured = capsys.readouterr().out.splitlines()[-4:]
    fields = dict(field.split("=") for field in counts.split()[1:])
    assert int(fields["train"]) + int(fields["test"]) == 48 and int(fields["test"]) > 0
    assert [line.split()[0] for line in measured] == ["accuracy@1", "accuracy@10", "ndcg@10"]
    encoders = [SentenceTransformer(str(path), trust_remote_code=True, device="cpu") for path in (folder, out)]
    before, after = (encoder.encode(["a text", "and another"], convert_to_tensor=True) for encoder in encoders)
    assert (before - after).abs().max() > 1e-3 and encoders[1].max_seq_length == MAX_SEQ_LEN
    assert {path.name for path in folder.glob("*.py")} == {path.name for path in out.glob("*.py")}
    assert hf.load_model(weights.read(out))[0] == "AutoModel"  # export_hf.py reads it again
    with pytest.raises(ValueError, match="nothing yet at"):
        sentence_vectors.main(arguments)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("three.csv", "a,b,c\nx,y,z\n", "expected two columns, got a, b, c"),
        ("empty.csv", "a,b\nx,\n", "expected two texts in each row"),
        ("numbers.jsonl", '{"a": "x", "b": 1}\n', "expected two texts in each row"),
    ],
)
def test_other_files_are_refused(name, text, message, tmp_path):
    from scripts.sentence_vectors import read_pairs

    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_pairs(tmp_path / name)
