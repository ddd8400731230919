"""Folders written under one version of torch and transformers, read under another: the same numbers.

Not part of `make test-slow`, but `make test-versions`: it installs the versions into .matrix/, once, 7 GB per torch.
"""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

TORCH = ("2.7.0", "2.11.0", "2.14.1")
TRANSFORMERS = ("4.57.6", "5.0.0", "5.17.0", "5.24.0")
VERSIONS = list(product(TORCH, TRANSFORMERS))
MATRIX = Path(".matrix").resolve()
BIT_EQUAL_WEIGHTS, ROUNDING = 0.0, 6e-5
"""Largest difference that is allowed: of weights, and of outputs and gradients, whose largest is about 30."""

COMMON = """
import json, sys, numpy, torch, transformers
from pathlib import Path

SHAPE = dict(vocab_size=211, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, intermediate_size=64)
SHAPE |= dict(initializer_range=0.2, hidden_dropout_prob=0.0, num_labels=3)
HEADS = ("", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
HEADS += ("ForMultipleChoice",)
random = numpy.random.RandomState(0)
lengths = torch.tensor([9, 1, 17, 4, 17])
mask = (torch.arange(17) < lengths[:, None]).long()
ids = torch.from_numpy(random.randint(1, 211, (5, 17))) * mask


def numbers(model, auto_class):
    "Outputs, loss and every gradient, by name."
    first = ids[:, 0] % 3
    labels = {
        "AutoModel": {"output_hidden_states": True, "output_attentions": True},
        "AutoModelForSequenceClassification": {"labels": first},
        "AutoModelForQuestionAnswering": {"start_positions": first, "end_positions": first + 1},
        "AutoModelForMultipleChoice": {"labels": first[:1]},
    }.get(auto_class, {"labels": (ids % 3).masked_fill(mask == 0, -100)})
    inputs = (ids[None], mask[None]) if auto_class == "AutoModelForMultipleChoice" else (ids, mask)
    output = model(*inputs, **labels)
    found = dict(output)
    loss = found.pop("loss") if "loss" in found else output.pooler_output.square().sum()
    for name in ("hidden_states", "attentions"):
        found |= {f"{name} {i}": x for i, x in enumerate(found.pop(name, ()))}
    model.zero_grad()
    loss.backward()
    gradients = {f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "loss": loss, **gradients}
"""

WRITE = """
from src import bert_layers
from src.configuration_bert import MosaicBertConfig

for head in HEADS:
    model = getattr(bert_layers, f"Bert{head or 'Model'}")(MosaicBertConfig(**SHAPE)).eval()
    random = numpy.random.RandomState(1)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            p.copy_(torch.from_numpy(random.normal(0, 0.2, p.shape)) + ("orm.weight" in name))
    model.save_pretrained(Path(sys.argv[1], f"AutoModel{head}"))
"""
"""Writes a folder of each class, with weights that do not depend on the versions."""

READ = """
reference = Path(sys.argv[1])
for folder in map(Path, sys.argv[2:]):
    worst = dict.fromkeys(("weights", "outputs", "gradients", "again"), 0.0)
    for auto_class in (f"AutoModel{head}" for head in HEADS):
        load = getattr(transformers, auto_class).from_pretrained
        model = load(folder / auto_class, trust_remote_code=True)
        assert "transformers_modules" in type(model).__module__ and not model.training
        got = {**numbers(model, auto_class), **{f"w {name}": w for name, w in model.state_dict().items()}}
        wanted = reference / f"{auto_class}.pt"
        if not wanted.exists():
            torch.save({name: x.detach() for name, x in got.items()}, wanted)
        want = torch.load(wanted)
        assert got.keys() == want.keys(), got.keys() ^ want.keys()
        for name, x in got.items():
            kind = {"w": "weights", "d": "gradients"}.get(name[:2].strip(), "outputs")
            worst[kind] = max(worst[kind], float((x - want[name]).detach().abs().max()))
        # Saved again in half precision: it loads in the dtype of its weights, or in the given dtype.
        model.half().save_pretrained(reference / "again")
        low = load(reference / "again", trust_remote_code=True, dtype="auto")
        slopes = (low if auto_class == "AutoModel" else low.bert).encoder.alibi.slopes
        assert low.dtype == torch.float16 and slopes.dtype == torch.float32
        want, again = model.float(), load(reference / "again", trust_remote_code=True, dtype=torch.float32)
        want, got = numbers(want, auto_class), numbers(again, auto_class)
        worst["again"] = max(worst["again"], *(float((got[name] - x).detach().abs().max()) for name, x in want.items()))
    print("CELL", json.dumps({"folder": str(folder), **worst}), flush=True)
"""
"""Loads the folders as a user does and prints, for each, the largest differences from the first that was read."""


def run(command, **environment):
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def install(folder, python, *packages):
    """Packages of a version in ``folder``, made once."""
    if not (folder / ".installed").exists():
        run([python, "-m", "pip", "install", "-q", *packages])
        (folder / ".installed").touch()


def environment(torch_version, transformers_version):
    """A Python with that torch, and the path that puts that transformers first."""
    python = sys.executable
    if torch.__version__.split("+")[0] != torch_version:
        base = MATRIX / f"torch-{torch_version}"
        python = str(base / "bin" / "python")
        if not base.exists():
            run([sys.executable, "-m", "venv", str(base)])
        install(base, python, f"torch=={torch_version}", "transformers==4.57.6")
    overlay = MATRIX / f"transformers-{transformers_version}"
    install(overlay, sys.executable, "--target", str(overlay), f"transformers=={transformers_version}")
    return python, str(overlay)


@pytest.mark.slow
@pytest.mark.versions
@pytest.mark.timeout(7200)
def test_what_one_version_writes_another_reads(tmp_path):
    """Weights to the bit; logits, states, losses and gradients to rounding, of every class."""
    pythons = {versions: environment(*versions) for versions in VERSIONS}
    common = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    folders = {}
    for versions, (python, overlay) in pythons.items():
        folders[versions] = tmp_path / "-".join(versions)
        run([python, "-c", COMMON + WRITE, folders[versions]], PYTHONPATH=f"{overlay}:{Path.cwd()}", **common)
    (tmp_path / "reference").mkdir()
    cells = []
    for versions, (python, overlay) in pythons.items():
        cache = {"HF_MODULES_CACHE": str(tmp_path / "modules" / "-".join(versions)), "PYTHONPATH": overlay}
        out = run([python, "-c", COMMON + READ, tmp_path / "reference", *folders.values()], **cache, **common)
        read = [json.loads(line.removeprefix("CELL ")) for line in out.splitlines() if line.startswith("CELL ")]
        assert len(read) == len(VERSIONS)
        cells += [(written, versions, cell) for written, cell in zip(VERSIONS, read, strict=True)]
    for written, versions, cell in cells:
        print("written", *written, "read", *versions, *(f"{k}={v:.1e}" for k, v in cell.items() if k != "folder"))
    worst = {kind: max(cell[kind] for *_, cell in cells) for kind in ("weights", "outputs", "gradients", "again")}
    print(f"versions cells={len(cells)}", *(f"{kind}={value:.2e}" for kind, value in worst.items()))
    assert worst["weights"] == BIT_EQUAL_WEIGHTS
    assert max(worst["outputs"], worst["gradients"], worst["again"]) < ROUNDING, worst
