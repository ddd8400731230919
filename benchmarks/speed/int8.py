"""What int8 costs and gains: a pretrained model's validation loss and accuracy, its size, its latency.

python -m benchmarks.speed.int8 [--run runs/quickstart] [--sequences N] [--rounds N] [--out FILE]

The run is one of main.py with its validation set; its evaluation's masking. Forms of the model:

    torch_fp32, onnx_fp32    the checkpoint, and its graph
    torch_int8               torch.ao.quantization.quantize_dynamic of its linear layers
    onnx_int8                the graph of ``export_hf.py --onnx --int8``

Latency is the minimum over interleaved rounds, on 1 thread, for a batch of one and of 32 sequences.
"""

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import report, timing
from src import data_c4
from src.data.masking import EVALUATION_SEED, MaskingCollator
from src.export import hf, onnx
from src.train import config, weights

BATCHES = (1, 32)

Batch = dict[str, Tensor]


def validation(folder: Path, tokenizer: Any, sequences: int | None) -> list[Batch]:
    """The validation set of a run, masked as its evaluation masks it, in batches of 32."""
    run = config.load(str(folder / "checkpoints" / "config.yaml"))
    loader = run.eval_loader
    data = data_c4.StreamingC4(tokenizer, run.max_seq_len, local=loader.local, split=loader.split)
    collator = MaskingCollator(tokenizer, loader.mlm_probability, EVALUATION_SEED, loader.mlm_whole_words)
    exact = data_c4.ExactEvalDataset(data, BATCHES[-1], rank=0, world_size=1)
    batches = list(data_c4.build_dataloader(exact, collator, BATCHES[-1]))
    return batches if sequences is None else batches[: max(1, sequences // BATCHES[-1])]


def forms_of(model: Any, folder: Path) -> dict[str, tuple[Callable[[Batch], Tensor], int]]:
    """Functions from a batch to logits (B, S, V), and the bytes of each form's file."""
    onnx.export(model, folder / "model.onnx")
    onnx.quantize(folder / "model.onnx", folder / "model.int8.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated, in favour of torchao
        int8 = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, torch.qint8)
    found = {}
    for name, module in {"torch_fp32": model, "torch_int8": int8}.items():
        torch.save(module.state_dict(), folder / name)
        found[name] = partial(by_torch, module), (folder / name).stat().st_size
    for name, file in {"onnx_fp32": "model.onnx", "onnx_int8": "model.int8.onnx"}.items():
        found[name] = partial(by_onnx, onnx.session(folder / file, threads=1)), (folder / file).stat().st_size
    return found


@torch.no_grad()
def by_torch(model: Any, batch: Batch) -> Tensor:
    return model(batch["input_ids"], batch["attention_mask"]).logits


def by_onnx(session: Any, batch: Batch) -> Tensor:
    ids = batch["input_ids"]
    return onnx.run(session, ids, batch["attention_mask"], torch.zeros_like(ids))["logits"]


def quality(logits_of: Callable[[Batch], Tensor], batches: list[Batch]) -> tuple[float, float, int]:
    """Nats per masked token, accuracy, and the number of masked tokens."""
    loss, correct, count = 0.0, 0, 0
    for batch in batches:
        masked = batch["labels"] >= 0
        logits, labels = logits_of(batch)[masked], batch["labels"][masked]
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        correct += int((logits.argmax(-1) == labels).sum())
        count += len(labels)
    return loss / count, correct / count, count


def main(argv: list[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="folder of a run of main.py")
    parser.add_argument("--sequences", type=int, help="of the validation set; by default all")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="file for what is printed")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    source = weights.read(str(args.run / "checkpoints"))
    model: Any = hf.load_model(source)[1].eval()
    batches = validation(args.run, weights.load_tokenizer(source), args.sequences)
    say = report.Printed()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        forms = forms_of(model, Path(folder))
    B, S = batches[0]["input_ids"].shape
    runs = {
        (name, rows): partial(forms[name][0], {key: x[:rows] for key, x in batches[0].items()})
        for name, rows in product(forms, BATCHES)
    }
    times = timing.interleaved(runs, args.rounds, timing.wall_clock("cpu"), warmup=2)
    figures = {name: quality(logits_of, batches) for name, (logits_of, _) in forms.items()}
    masked = figures["torch_fp32"][2]
    say(
        f"# {report.described(report.machine('cpu'))}, onnxruntime {version('onnxruntime')}; {args.run.name}, "
        f"{model.num_parameters():,} parameters, sequences of {S}, {masked:,} masked tokens, {args.rounds} rounds"
    )
    for name, (loss, accuracy, _) in figures.items():
        speed = (f"ms_{rows}={min(times[name, rows]) * 1e3:.2f}" for rows in BATCHES)
        say(f"int8 form={name} loss={loss:.4f} accuracy={accuracy:.4f} mb={forms[name][1] / 1e6:.2f} {' '.join(speed)}")
    say.write(args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
