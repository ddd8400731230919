"""MosaicBERT as an ONNX graph, for any number of sequences of any length.

The model removes padding, so its shapes depend on the attention mask. In a graph, shapes must follow from those of the
inputs. So ``Padded`` computes every position, with the model's layers and attention written out; its outputs at
non-padding tokens are equal.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from src.bert_layers import BertForMaskedLM, BertForSequenceClassification, BertModel, BertPreTrainedModel

PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # requirements-onnx.txt
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""(B, S) int64 each, as BERT's tokenizers return them."""


class Padded(nn.Module):
    """A MosaicBERT on padded batches, by tensor operations whose shapes depend only on B and S.

    Letters: B sequences, S padded length, D hidden size, N heads, H head size.
    """

    def __init__(self, model: BertPreTrainedModel):
        super().__init__()
        self.model = model.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, ...]:
        """Last hidden states (B, S, D) and, of a model with a head, its logits; inputs are (B, S) each."""
        model = self.model
        bert: BertModel = model if isinstance(model, BertModel) else model.bert  # pyright: ignore
        (B, S), N = input_ids.shape, bert.config.num_attention_heads
        real = attention_mask.bool()
        # Distances count non-padding tokens, so padding may be anywhere.
        position = attention_mask.cumsum(1).float()
        distance = (position[:, None, :, None] - position[:, None, None, :]).abs()  # (B, 1, S, S)
        bias = -bert.encoder.alibi(distance.device)[:, None, None] * distance
        bias = bias.masked_fill(~real[:, None, None, :], torch.finfo(torch.float32).min)  # (B, N, S, S)

        x = bert.embeddings(input_ids, token_type_ids, None)  # (B, S, D)
        for layer in bert.encoder.layer:
            attention: Any = layer.attention
            q, k, v = attention.self.Wqkv(x).view(B, S, 3, N, -1).permute(2, 0, 3, 1, 4).unbind(0)  # (B, N, S, H)
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
            out = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, S, -1)
            x = layer.mlp(attention.output(out, x))  # pyright: ignore[reportCallIssue]
        x = x * real[:, :, None]
        if isinstance(model, BertForMaskedLM):
            return x, model.cls(x)
        if isinstance(model, BertForSequenceClassification):
            first = attention_mask.argmax(dim=1)[:, None, None].expand(-1, 1, x.shape[-1])
            return x, model.classifier(bert.pooler(x.gather(1, first).squeeze(1)))  # pyright: ignore[reportOptionalCall]
        return (x,) if isinstance(model, BertModel) else (x, model.classifier(x))  # pyright: ignore


def export(model: BertPreTrainedModel, path: Path) -> None:
    """Write ``path``: inputs ``INPUTS``, outputs ``last_hidden_state`` and, with a head, ``logits``."""
    B, S = (torch.export.Dim(name, max=2**20) for name in ("batch", "length"))
    shapes = {name: {0: B, 1: S} for name in INPUTS}
    # Three tensors: the same one three times would be one input.
    example = tuple(torch.ones(2, 5, dtype=torch.int64) for _ in INPUTS)
    names = ["last_hidden_state"] if isinstance(model, BertModel) else ["last_hidden_state", "logits"]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns about torchvision's functions
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the names of axes that the inputs share
        torch.onnx.export(
            Padded(model),
            example,
            str(path),
            input_names=list(INPUTS),
            output_names=names,
            dynamic_shapes=shapes,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def run(path: Path, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The graph's last output for a batch (B, S), by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    arrays = (input_ids, attention_mask, torch.zeros_like(input_ids))
    feed = {name: array.numpy() for name, array in zip(INPUTS, arrays, strict=True)}
    return torch.from_numpy(session.run(None, feed)[-1])
