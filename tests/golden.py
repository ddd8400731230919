"""Golden numbers of the recipe. A change that should change no number compares those from before and after it.

python -m tests.golden OUT                  run everything in this checkout; numbers go to OUT/golden.txt
python -m tests.golden OUT --checkout DIR   run the scripts of another checkout, such as an older commit
python -m tests.golden OUT --from BEFORE    use the shards, checkpoints and export of BEFORE, an earlier OUT

Numbers are equal to the bit only on one machine with one installation: compare two files made there. The committed
tests/golden.txt names its installation. Floats are in hex, files as SHA-256.
"""

import argparse
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from scripts.quickstart import default_documents

ROOT = Path(__file__).resolve().parent.parent


def shape(*sizes: int) -> list[str]:
    """Overrides for hidden size, layers, heads and GLU width."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return [f"model.model_config.{name}={size}" for name, size in zip(names, sizes, strict=True)]


SMALL = [
    "train_loader.num_workers=0",
    "train_loader.num_canonical_nodes=1",
    "eval_loader.num_workers=0",
    "max_duration=24ba",
    "eval_interval=12ba",
    "global_train_batch_size=64",
    "device_train_microbatch_size=32",
    "precision=fp32",
    "max_seq_len=64",
]


class Golden:
    """Runs the scripts of one checkout and collects the numbers of each run."""

    def __init__(self, checkout: Path, out: Path, before: Path):
        self.checkout, self.out, self.before = checkout, out, before
        self.lines: list[str] = []

    def run(self, *command: object) -> str:
        """Run a script; returns its standard output."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
        words = [sys.executable, *map(str, command)]
        done = subprocess.run(words, cwd=self.checkout, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return done.stdout

    def note(self, name: str, values: dict[str, object]) -> None:
        for key, value in values.items():
            text = value.hex() if isinstance(value, float) else value
            self.lines.append(f"{name} {key} {text}")
            print(self.lines[-1], flush=True)

    def train(self, name: str, yaml: str, *overrides: str, data: str | None = None) -> None:
        """Run main.py; note losses, evaluations, and a hash of everything logged (rates, norms, tokens)."""
        folder = self.out / name
        given = [
            f"tokenizer_name={self.before}/tokenizer",
            f"data_local={data or self.before / 'mds'}",
            f"run_name={name}",
            f"save_folder={folder}/checkpoints",
            f"loggers.metrics_file.path={folder}/metrics.jsonl",
            f"loggers.tensorboard.log_dir={folder}/tensorboard",
            "progress_bar=false",
        ]
        self.run("main.py", f"yamls/{yaml}.yaml", *given, *overrides)
        everything = hashlib.sha256()
        for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
            timed = ("time", "seconds", "_per_s", "wait", "memory")
            kept = {k: v for k, v in sorted(line.items()) if not any(part in k for part in timed)}
            everything.update(json.dumps(kept).encode())
            shown = {k: v for k, v in kept.items() if k.startswith(("loss/train/total", "metrics/eval"))}
            self.note(name, {f"{line['batch']} {k.split('/')[-1]}": v for k, v in shown.items()})
        self.note(name, {"everything": everything.hexdigest()})

    def files(self, name: str, folder: Path) -> None:
        """SHA-256 of each file that a reader of the data depends on."""
        for path in sorted(folder.rglob("*")):
            reports = ("stats.json", "conversion.json", "files.jsonl")
            if path.is_dir() or path.name.startswith(".") or path.name in reports:
                continue
            content = path.read_bytes()
            if path.name == "index.json":  # holds the tokenizer's path
                content = content.replace(str(self.out).encode(), b"OUT")
            self.note(name, {str(path.relative_to(folder)): hashlib.sha256(content).hexdigest()})


def write_sources(folder: Path) -> None:
    """Text in two splits, and labelled rows, of 2,500 Wikipedia leads."""
    folder.mkdir()
    documents = list(islice(default_documents(), 2500))
    for split in ("train", "validation"):
        part = [text for i, text in enumerate(documents) if (i % 20 == 0) == (split == "validation")]
        lines = (json.dumps({"text": text}) + "\n" for text in part)
        with gzip.open(folder / f"c4-{split}.00000-of-00001.json.gz", "wt") as file:
            file.writelines(lines)
    rows = ({"text": text, "label": "long" if len(text) > 500 else "short"} for text in documents[:500])
    (folder.parent / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_data(golden: Golden) -> None:
    out = golden.out
    write_sources(out / "text")
    train = out / "text" / "c4-train.00000-of-00001.json.gz"
    golden.run("train_tokenizer.py", train, "--out", out / "tokenizer", "--vocab_size", 2000)
    convert = ["convert_c4.py", "--splits", "train", "val", "--source", out / "text", "--num_workers", "2"]
    tokens = ["--tokenizer", out / "tokenizer", "--max_seq_len", 64]
    golden.run(*convert, "--out_root", out / "mds", *tokens, "--pack", "chunk", "--size_limit", "256kb")
    golden.run(*convert, "--out_root", out / "short", *tokens, "--pack", "truncate", "--dedup")
    golden.run(*convert, "--out_root", out / "raw", "--compression", "zstd")
    for name in ("tokenizer", "mds", "short", "raw"):
        golden.files(name, out / name)


def make_runs(golden: Golden) -> None:
    out, before = golden.out, golden.before
    steps60 = ["max_duration=60ba", "eval_interval=30ba", "save_interval=20ba", "save_num_checkpoints_to_keep=-1"]
    golden.train("quickstart", "quickstart", *steps60)
    small = [*shape(48, 2, 4, 96), *SMALL]
    golden.train("hf_bert", "hf_bert", *small)
    golden.train("dropout", "mosaic_bert", *small)
    schedule = "mlm_probability={initial: 0.4, final: 0.2}"
    golden.train("scheduled", "mosaic_bert_fast", *small, schedule)
    golden.train("text", "mosaic_bert", *small, "train_loader.moving_crop=true", data=str(before / "raw"))
    streams = f"{{long: {{local: {before}/mds, proportion: 0.7}}, short: {{local: {before}/short, proportion: 0.3}}}}"
    mixed = [f"train_loader.streams={streams}", "train_loader.length_window=4", "max_duration=2ep"]
    golden.train("mixed", "mosaic_bert", *small, *mixed)

    saved = out / "resume" / "checkpoints"
    shutil.copytree(before / "quickstart" / "checkpoints", saved, symlinks=True)
    kept = {path.name for path in saved.glob("ep*-ba20-*")}
    for path in [*saved.glob("ep*"), *saved.glob("latest*")]:
        if path.name not in kept:
            path.unlink()
    (saved / "latest-rank0.pt").symlink_to(min(kept))
    golden.train("resume", "quickstart", *steps60, "autoresume=true", "save_overwrite=false", "run_name=quickstart")

    checkpoint = before / "quickstart" / "checkpoints"
    data = [f"data_local={before}/mds", f"tokenizer_name={before}/tokenizer"]
    latest = checkpoint / "latest-rank0.pt"
    printed = golden.run("main.py", "yamls/quickstart.yaml", "--eval", *data, f"load_path={latest}")
    golden.note("eval", {"printed": printed.strip()})
    like_quickstart = shape(128, 4, 8, 384)
    golden.train("continued", "continue_512", *SMALL, f"pretrained={checkpoint}", *like_quickstart)

    options = [f"pretrained={checkpoint}", f"folder={out}/own", f"tasks.mine.data.train={before}/labelled.jsonl"]
    options += ["tasks.mine.seeds=[17, 18]", "tasks.mine.epochs=1"]
    golden.run("finetune.py", "yamls/finetune_own.yaml", *options)
    for result in sorted((out / "own").rglob("result.json")):
        held = json.loads(result.read_text())
        for name in ("environment", "seconds", "key"):  # the key hashes the checkpoint, which holds times
            del held[name]
        golden.note("finetuned", {f"seed{held['seed']}": json.dumps(held, sort_keys=True)})

    golden.run("export_hf.py", checkpoint, out / "exported")
    logits(golden, out / "exported", "exported")


def logits(golden: Golden, folder: Path, name: str) -> None:
    """Hash of an exported folder's logits, in a process that imports nothing of the checkout."""
    code = f"""
import hashlib, torch, transformers
folder = {str(folder)!r}
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
model = transformers.AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()
inputs = tokenizer(["paris is the capital of [MASK] .", "water is a [MASK] ."], padding=True, return_tensors="pt")
with torch.no_grad():
    logits = model(inputs["input_ids"], inputs["attention_mask"]).logits
print(hashlib.sha256(logits.numpy().tobytes()).hexdigest())
"""
    golden.note(name, {"logits": golden.run("-c", code).split()[-1]})
    weights = (folder / "model.safetensors").read_bytes()
    golden.note(name, {"weights": hashlib.sha256(weights).hexdigest()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for everything that the runs write; must not exist")
    parser.add_argument("--checkout", type=Path, default=ROOT)
    parser.add_argument("--from", type=Path, dest="before", help="an earlier OUT whose files to use")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True)
    golden = Golden(args.checkout.resolve(), out, args.before.resolve() if args.before else out)
    names = ("torch", "transformers", "tokenizers", "mosaicml", "mosaicml-streaming", "numpy")
    golden.note("#", {name: version(name) for name in names})
    if args.before is None:
        make_data(golden)
    make_runs(golden)
    if args.before is not None:
        logits(golden, args.before / "exported", "exported")
    (out / "golden.txt").write_text("\n".join(golden.lines) + "\n")


if __name__ == "__main__":
    main()
