"""A checkpoint as a Hugging Face folder."""

import copy
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
from src.common.errors import ConfigError
from src.configuration_bert import MosaicBertConfig
from src.data.tokenizer import save_tokenizer
from src.train import weights
from src.train.weights import Pretrained

CLASSES = {
    "AutoModelForMaskedLM": ("BertForMaskedLM", "fill-mask"),
    "AutoModelForSequenceClassification": ("BertForSequenceClassification", "text-classification"),
    "AutoModelForTokenClassification": ("BertForTokenClassification", "token-classification"),
    "AutoModel": ("BertModel", "feature-extraction"),
}
"""transformers' way to each class, the class, and what the hub calls its task."""

LENGTHS = (1, 7, 33, 127, 2)
"""Of the sequences of random tokens that the exported model is compared on."""

TEXT = "Paris is the capital of France; naloxone is a drug. 東京 éà 123"
"""That the exported tokenizer is compared on."""

FILES = {
    *("config.json", "model.safetensors", "model.onnx", "README.md"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt"),
}
"""What an exported folder holds, beside the source."""

LOAD = """
import sys
import torch
import transformers
folder, auto_class, file = sys.argv[1:]
ids, mask, text = torch.load(file)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    torch.save((model(ids, mask)[0], tokenizer(text)["input_ids"]), file)
"""
"""What a user of the folder does, in a process that knows nothing of this repo."""


def auto_class_of(source: Pretrained) -> str:
    """The class that has a place for the head that the weights have."""
    heads = [name for name in ("cls.", "classifier.") if any(key.startswith(name) for key in source.state)]
    if "classifier." in heads:
        pooled = any(key.startswith("bert.pooler.") for key in source.state)
        return "AutoModelForSequenceClassification" if pooled else "AutoModelForTokenClassification"
    return "AutoModelForMaskedLM" if heads else "AutoModel"


def load(source: Pretrained) -> tuple[str, PreTrainedModel]:
    """The model of the weights, on the CPU, and the name of transformers' class to load it with."""
    auto_class = auto_class_of(source)
    ours = isinstance(source.config, MosaicBertConfig)
    model_class = getattr(bert_layers if ours else transformers, CLASSES[auto_class][0])
    # Trained with attention dropout, it stays with an implementation that has it, on any device.
    keep: dict[str, Any] = {"attention": "torch"} if ours and source.config.attention_probs_dropout_prob else {}
    return auto_class, weights.load_pretrained(source, model_class, **keep)


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, card: str, folder: Path) -> None:
    """Write a model's folder: config, weights, tokenizer, card and, of a MosaicBERT, its source. ``folder`` is made."""
    folder.mkdir(parents=True)
    model.config.pad_token_id = tokenizer.pad_token_id  # pyright: ignore[reportAttributeAccessIssue]
    model.save_pretrained(folder)
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # else nobody but the owner may read it
    save_tokenizer(tokenizer, folder)
    (folder / "README.md").write_text(card)


@dataclass(frozen=True)
class Outputs:
    """What the checkpoint computes on a ragged batch: what everything else is compared with."""

    ids: Tensor
    """(B, S)."""
    mask: Tensor
    """(B, S), of what is no padding."""
    exact: list[Tensor]
    """Logits, or states of a model without a head, of each sequence by itself, in fp64: (length, n) or (n,)."""
    rounding: float
    """Largest difference from ``exact`` in fp32; large weights magnify it."""

    def difference(self, got: Tensor, what: str) -> float:
        """Largest difference of outputs (B, S, n), or (B, n) if a sequence has one, from ``exact``.

        Raises:
            ConfigError: it is more than rounding, which is measured on this model, or outputs are no numbers.
        """
        if got.dim() == 3:
            got = got[self.mask.bool()]
        worst = float((torch.cat([x.reshape(-1, x.shape[-1]) for x in self.exact]) - got).abs().max())
        largest = max(float(x.abs().max()) for x in self.exact)
        if not worst <= max(8 * self.rounding, 1e-5 * largest):
            raise ConfigError(
                f"{what} computes something else than the checkpoint: outputs up to {largest:.3g} differ by "
                f"{worst:.3g}, and rounding explains {self.rounding:.3g}. Nothing was exported; please report it"
            )
        return worst


@torch.no_grad()
def outputs_of(model: PreTrainedModel) -> Outputs:
    """The model on random tokens, in sequences of LENGTHS.

    Raises:
        ConfigError: it computes no numbers, as after a diverged training.
    """
    config = model.config
    longest = getattr(config, "max_position_embeddings", max(LENGTHS))
    lengths = torch.tensor([min(length, longest) for length in LENGTHS])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.randint(config.vocab_size, mask.shape, generator=torch.Generator().manual_seed(0)) * mask

    def alone(model: Any) -> list[Tensor]:
        return [model(row[real.bool()][None])[0][0] for row, real in zip(ids, mask, strict=True)]

    exact = alone(copy.deepcopy(model).double())
    if not all(x.isfinite().all() for x in exact):
        raise ConfigError(
            "the checkpoint computes NaN or infinity, so nothing was exported; take one of an earlier step"
        )
    rounding = max(float((a - b).abs().max()) for a, b in zip(exact, alone(model), strict=True))
    return Outputs(ids, mask, exact, rounding)


def load_elsewhere(folder: Path, auto_class: str, ids: Tensor, mask: Tensor) -> tuple[Tensor, list[int]]:
    """A ragged batch's outputs and the ids of TEXT, by another process that loads ``folder`` as its users will.

    Raises:
        ConfigError: it does not load.
    """
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "batch.pt"
        torch.save((ids, mask, TEXT), file)
        command = [sys.executable, "-c", LOAD, str(folder.resolve()), auto_class, str(file)]
        env = {**os.environ, "HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=scratch, env=env, capture_output=True, text=True)
        if done.returncode:
            raise ConfigError(f"the exported folder does not load; nothing was exported:\n{done.stderr[-2000:]}")
        return torch.load(file)


# ----------------------------------------------------------------------------------------------------------------------


def check_free(out: Path, overwrite: bool) -> None:
    """Refuse to replace what may not be replaced.

    Raises:
        ConfigError: ``out`` exists, and ``overwrite`` is not given or it holds more than an exported model.
    """
    if not out.exists():
        return
    if not overwrite:
        raise ConfigError(f"{out} exists; give --overwrite to replace it, or another OUT")
    others = [path.name for path in out.iterdir() if path.suffix != ".py" and path.name not in FILES]
    if others:
        raise ConfigError(f"{out} holds more than an exported model ({min(others)}), so it is not replaced; change OUT")
