"""A checkpoint as a Hugging Face folder, and the comparison of that folder with the checkpoint."""

import copy
import inspect
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from src import bert_layers
from src.common.errors import ExportError
from src.configuration_bert import MosaicBertConfig
from src.data.tokenizer import save_tokenizer
from src.train import weights
from src.train.weights import Pretrained

AUTO_CLASSES = {
    "AutoModelForMaskedLM": ("BertForMaskedLM", "fill-mask"),
    "AutoModelForSequenceClassification": ("BertForSequenceClassification", "text-classification"),
    "AutoModelForTokenClassification": ("BertForTokenClassification", "token-classification"),
    "AutoModelForQuestionAnswering": ("BertForQuestionAnswering", "question-answering"),
    "AutoModelForMultipleChoice": ("BertForMultipleChoice", "multiple-choice"),
    "AutoModel": ("BertModel", "feature-extraction"),
}
"""The class of the model and the hub's name of its task, by transformers' auto class."""

LENGTHS = (1, 7, 33, 127, 2)
"""Lengths of the random sequences that outputs are compared on."""
TEXT = "Paris is the capital of France; naloxone is a drug. 東京 éà 123"
"""Text that the tokenizers are compared on."""


def scores(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """What is compared: outputs (B, S, n) for each token, or (B, n)."""
    if type(model).__name__ == "BertForMultipleChoice":
        ids, mask = ids[:, None], mask[:, None]
    outputs = model(ids, mask)
    if "start_logits" in outputs:
        return torch.stack((outputs["start_logits"], outputs["end_logits"]), dim=-1)
    return outputs[0]


USER_SCRIPT = f"""
import sys
import torch
import transformers
from typing import Any
from torch import Tensor
{inspect.getsource(scores)}
folder, auto_class, file = sys.argv[1:]
ids, mask, text = torch.load(file)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    torch.save((scores(model, ids, mask), tokenizer(text)["input_ids"]), file)
"""
"""What a user of the folder does, in a process without this repository."""


def load_model(source: Pretrained) -> tuple[str, PreTrainedModel]:
    """transformers' auto class for the head that the weights have, and the model, on the CPU."""
    heads = {name.split(".")[0] for name in source.state}
    auto_class = "AutoModelForMaskedLM" if "cls" in heads else "AutoModel"
    if "classifier" in heads:
        has_pooler = any(name.startswith("bert.pooler.") for name in source.state)
        auto_class = f"AutoModelFor{'Sequence' if has_pooler else 'Token'}Classification"
        if source.config.architectures == ["BertForMultipleChoice"]:  # its weights do not say so
            auto_class = "AutoModelForMultipleChoice"
    if "qa_outputs" in heads:
        auto_class = "AutoModelForQuestionAnswering"
    is_mosaic = isinstance(source.config, MosaicBertConfig)
    model_class = getattr(bert_layers if is_mosaic else transformers, AUTO_CLASSES[auto_class][0])
    # Trained with attention dropout, the model keeps the attention that supports it on every device.
    options: dict[str, Any] = {"attention": "torch"} if is_mosaic and source.config.attention_probs_dropout_prob else {}
    return auto_class, weights.load_pretrained(source, model_class, **options)


def write_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, card: str, folder: Path) -> None:
    """Make ``folder``: config, weights, tokenizer, model card and, for a MosaicBERT, its source."""
    folder.mkdir(parents=True)
    model.config.pad_token_id = tokenizer.pad_token_id  # pyright: ignore[reportAttributeAccessIssue]
    model.save_pretrained(folder)
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # else only the owner can read it
    save_tokenizer(tokenizer, folder)
    (folder / "README.md").write_text(card)


def accepted(got: Tensor, exact: Tensor, rounding: float, what: str) -> float:
    """Largest difference of ``got`` from ``exact``; ``rounding`` is that of the model itself.

    Raises:
        ExportError: it is NaN, or larger than this model's rounding explains.
    """
    worst, largest = float((exact - got).abs().max()), float(exact.abs().max())
    if not worst <= max(8 * rounding, 1e-5 * largest):
        raise ExportError(
            f"{what} does not compute what the checkpoint does: outputs up to {largest:.3g} differ by {worst:.3g}, "
            f"rounding by {rounding:.3g}. Nothing was exported; please report it"
        )
    return worst


@dataclass(frozen=True)
class Outputs:
    """The checkpoint's outputs for a batch of several lengths: the reference for what was exported."""

    ids: Tensor
    """(B, S) int64."""
    mask: Tensor
    """(B, S) int64, 0 at padding."""
    exact: Tensor
    """fp64 logits, or last hidden states of a model without a head: (T, n) for each token, or (B, n)."""
    rounding: float
    """Largest difference from ``exact`` in fp32; it grows with the weights."""

    def difference(self, got: Tensor, what: str) -> float:
        """Largest difference of ``got``, (B, S, n) or (B, n), from ``exact``.

        Raises:
            ExportError: as ``accepted``.
        """
        return accepted(got[self.mask.bool()] if got.dim() == 3 else got, self.exact, self.rounding, what)


@torch.no_grad()
def reference_outputs(model: PreTrainedModel) -> Outputs:
    """The model's outputs for random tokens, in sequences of LENGTHS, each computed alone.

    Raises:
        ExportError: they are NaN or infinite, as after a training that diverged.
    """
    lengths = torch.tensor(LENGTHS).clamp(max=getattr(model.config, "max_position_embeddings", max(LENGTHS)))
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.randint(model.config.vocab_size, mask.shape, generator=torch.Generator().manual_seed(0)) * mask

    def one_by_one(model: Any) -> Tensor:
        alone = [row[kept.bool()][None] for row, kept in zip(ids, mask, strict=True)]
        outputs = [scores(model, row, torch.ones_like(row))[0] for row in alone]
        return torch.cat([x.reshape(-1, x.shape[-1]) for x in outputs])

    exact = one_by_one(copy.deepcopy(model).double())
    if not exact.isfinite().all():
        raise ExportError("the checkpoint computes NaN or infinity; nothing was exported; export an earlier checkpoint")
    return Outputs(ids, mask, exact, float((exact - one_by_one(model)).abs().max()))


def outputs_elsewhere(folder: Path, auto_class: str, ids: Tensor, mask: Tensor) -> tuple[Tensor, list[int]]:
    """Outputs for a batch, and the token ids of TEXT, from a process that loads ``folder`` as its users will.

    Raises:
        ExportError: it does not load.
    """
    with tempfile.TemporaryDirectory() as scratch:
        file = f"{scratch}/batch.pt"
        torch.save((ids, mask, TEXT), file)
        command = [sys.executable, "-c", USER_SCRIPT, str(folder.resolve()), auto_class, file]
        environment = {**os.environ, "HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise ExportError(f"the exported folder does not load; nothing was exported:\n{done.stderr[-2000:]}")
        return torch.load(file)
