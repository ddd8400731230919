"""An exported folder with the libraries of its users: Trainer, PEFT, pipelines, sentence-transformers, accelerate."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from src.bert_layers import BertForMaskedLM
from src.configuration_bert import MosaicBertConfig
from src.data.tokenizer import load_tokenizer
from src.export import hf

SHAPE = {"vocab_size": 1024, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
SHAPE |= {"intermediate_size": 64, "initializer_range": 0.2, "hidden_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def exported(tokenizer_folder, documents, tmp_path_factory):
    """A folder with an exported model, ``my-bert``, with weights as large as after training; and texts."""
    folder = tmp_path_factory.mktemp("users")
    torch.manual_seed(0)
    model = BertForMaskedLM(MosaicBertConfig(**SHAPE)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:  # biases and LayerNorms, which start at 0 and 1
                p.add_(torch.randn_like(p), alpha=0.2)
    hf.write_folder(model, load_tokenizer(tokenizer_folder), "", folder / "my-bert")
    texts = [text for text in documents if 20 < len(text.split()) < 200][:80]
    (folder / "text.txt").write_text("\n".join(texts))
    with (folder / "reviews.csv").open("w") as file:
        csv.writer(file).writerows([("text", "label"), *((text, len(text) % 2) for text in texts)])
    return folder


def run_as_user(folder, *arguments):
    """Run Python in a folder, without this repository."""
    environment = {"HF_HOME": f"{folder}/hf", "HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    environment["WANDB_MODE"] = "disabled"  # where wandb is installed, Trainer of transformers 4 uses it
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_what_users_do(exported):
    """The tests of users.py, in one process for all, because it takes seconds to import the libraries."""
    shutil.copy(Path(__file__).with_name("users.py"), exported)
    options = ("-q", "-p", "no:cacheprovider", "--show-capture=no", "--durations=5")
    run_as_user(exported, "-m", "pytest", *options, "users.py")


@pytest.mark.slow
def test_the_page_works(exported):
    """The Python of docs/export.md, from top to bottom."""
    blocks = re.findall(r"^```python\n(.*?)^```", Path("docs/export.md").read_text(), re.M | re.S)
    assert len(blocks) > 3
    (exported / "page.py").write_text("\n".join(blocks))
    run_as_user(exported, "page.py")
    for name in ("my-tuned-bert", "my-classifier"):
        assert {path.name for path in (exported / name).glob("*.py")} == {
            path.name for path in (exported / "my-bert").glob("*.py")
        }
