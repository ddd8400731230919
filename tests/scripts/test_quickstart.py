import gzip
import json

import numpy as np
import pytest

import main
from scripts import quickstart
from src import data_c4
from src.data.masking import EVALUATION_SEED, MaskingCollator
from src.train.config import load


def texts_of(out):
    """Documents of the training and of the validation set."""
    paths = (out / f"text/c4-{split}.00000-of-00001.json.gz" for split in ("train", "validation"))
    return ([json.loads(line)["text"] for line in gzip.open(path, "rt", encoding="utf-8")] for path in paths)


def test_default_text_is_split_by_document(tmp_path, capsys):
    quickstart.main(["text", str(tmp_path)])
    train, held_out = texts_of(tmp_path)
    assert len(train) + len(held_out) == 10_033 and 400 < len(held_out) < 600
    assert not set(train) & set(held_out)
    assert f"validation={len(held_out)}" in capsys.readouterr().out
    before = (tmp_path / "text/c4-train.00000-of-00001.json.gz").read_bytes()
    quickstart.main(["text", str(tmp_path)])
    assert (tmp_path / "text/c4-train.00000-of-00001.json.gz").read_bytes() == before


def test_own_text_and_its_prompts(tmp_path, documents):
    """Prompts come from the validation set, with the masked word as the answer."""
    (tmp_path / "a.txt").write_text("\n".join(documents))
    quickstart.main(["text", str(tmp_path), "--text", str(tmp_path / "a.txt")])
    train, held_out = texts_of(tmp_path)
    lines = [line for text in documents for line in text.splitlines() if line]
    assert sorted(train + held_out) == sorted(lines) and 0 < len(held_out) < len(lines) / 10
    prompts = quickstart.held_out_prompts(tmp_path)
    assert len(prompts) == 3
    for (prompt, word), text in zip(prompts, held_out, strict=False):
        assert prompt.count("[MASK]") == 1
        assert " ".join(text.split()).startswith(prompt.replace("[MASK]", word))


def test_too_little_or_missing_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    with pytest.raises(ValueError, match="none of 1 documents is for (train|validation); .* Give more text"):
        quickstart.main(["text", str(tmp_path / "out"), "--text", str(tmp_path / "a.txt")])
    with pytest.raises(ValueError, match="no such file"):
        quickstart.main(["text", str(tmp_path / "out"), "--text", str(tmp_path / "none")])


def test_report(tmp_path, token_shards, tokenizer_folder, capsys):
    """After a short run of the quickstart's YAML: picture, baseline, filled-in masks, last line."""
    options = [
        f"data_local={token_shards}",
        f"tokenizer_name={tokenizer_folder}",
        "max_seq_len=32",
        "model.model_config.num_hidden_layers=1",
        "max_duration=6ba",
        "eval_interval=3ba",
        "progress_bar=false",
        f"save_folder={tmp_path}/checkpoints",
        f"loggers.metrics_file.path={tmp_path}/metrics.jsonl",
    ]
    main.main(["yamls/quickstart.yaml", *options])
    evaluated = capsys.readouterr().out.split("LanguageCrossEntropy=")[1].split()[0]
    quickstart.main(["report", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert (tmp_path / "loss-curve.png").read_bytes().startswith(b"\x89PNG")
    for prompt, expected in quickstart.PROMPTS:
        assert any(
            line.startswith(prompt) and line.count("%") == 5 and f"(expected: {expected})" in line for line in lines
        )
    assert lines[-1].startswith("quickstart ")
    fields = dict(field.split("=") for field in lines[-1].split()[1:])
    assert list(fields) == ["eval_loss", "unigram_entropy", "tokens_per_s", "train_seconds"]
    assert float(fields["eval_loss"]) == pytest.approx(float(evaluated), abs=1e-4)
    assert 4 < float(fields["unigram_entropy"]) < 7


def test_unigram_baseline_is_that_of_the_evaluations_targets(token_shards, tokenizer_folder, tokenizer):
    """From its definition, one target after another."""
    options = [f"data_local={token_shards}", f"tokenizer_name={tokenizer_folder}", "max_seq_len=32", "seed=3"]
    run = load("yamls/quickstart.yaml", options)
    datasets = {s: data_c4.StreamingC4(tokenizer, 32, local=token_shards, split=s) for s in ("train", "val")}
    special = set(tokenizer.all_special_ids)
    seen = [
        i for n in range(datasets["train"].size) for i in datasets["train"][n]["input_ids"].tolist() if i not in special
    ]
    collate = MaskingCollator(tokenizer, 0.15, EVALUATION_SEED)
    targets = []
    for n in range(datasets["val"].size):
        labels = collate([datasets["val"][n]])["labels"]
        targets += labels[labels >= 0].tolist()
    words = len(tokenizer) - len(special)
    want = -np.mean([np.log((seen.count(t) + 1) / (len(seen) + words)) for t in targets])
    assert quickstart.unigram_baseline(run, tokenizer) == pytest.approx(want, rel=1e-9)
