"""MosaicBERT as an ONNX graph, in fp32 and in int8, for any number of sequences of any length.

In a graph, shapes must follow from those of the inputs. Hence an exported model does not remove padding; its outputs at
tokens are equal.
"""

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from src.bert_layers import BertForMultipleChoice, BertPreTrainedModel
from src.common.errors import ExportError
from src.export import hf

PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # requirements-onnx.txt
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""(B, S) int64 each, as BERT's tokenizers return them; (B, C, S) with C choices."""
INT8_ERROR = 0.3
"""Largest accepted error of an int8 graph: root mean square, as a share of the outputs'. Measured: 0.004 to 0.06."""


class Graph(nn.Module):
    """What becomes the graph: positional inputs, and a tuple of outputs."""

    def __init__(self, model: BertPreTrainedModel):
        super().__init__()
        self.model = model.eval()

    def outputs(self, *inputs: Tensor) -> dict[str, Tensor]:
        """``last_hidden_state`` (B, S, D), then what the model itself returns, by its names."""
        found = dict(self.model(**dict(zip(INPUTS, inputs, strict=True)), output_hidden_states=True, return_dict=True))
        return {"last_hidden_state": found.pop("hidden_states")[-1], **found}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.outputs(input_ids, attention_mask, token_type_ids).values())


def export(model: BertPreTrainedModel, path: Path) -> None:
    """Write ``path``: inputs ``INPUTS``, outputs as ``Graph.outputs`` names them."""
    sizes = {"batch": 2, "choices": 3, "length": 5}
    if not isinstance(model, BertForMultipleChoice):
        del sizes["choices"]
    dims = dict(enumerate(torch.export.Dim(name, max=2**20) for name in sizes))
    # Three tensors: the same one three times would be one input.
    example = tuple(torch.ones(*sizes.values(), dtype=torch.int64) for _ in INPUTS)
    graph = Graph(model)
    with torch.no_grad():
        names = list(graph.outputs(*example))
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns about torchvision's functions
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the names of axes that the inputs share
        torch.onnx.export(
            graph,
            example,
            str(path),
            input_names=list(INPUTS),
            output_names=names,
            dynamic_shapes=dict.fromkeys(INPUTS, dims),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def quantize(path: Path, out: Path) -> None:
    """Write ``out``: the graph ``path`` with weights in int8, one scale per row, and activations quantised as it runs.

    Products of weights become int8 products, and embeddings int8 tables; attention itself stays fp32. Weights take 7 of
    the 8 bits: CPUs without VNNI add up products in 16 bits.
    """
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.preprocess import quant_pre_process

    # It folds the transpose of the decoder's weight, which the embeddings share; else that product stays fp32.
    quant_pre_process(str(path), str(out), skip_symbolic_shape=True)
    quantize_dynamic(str(out), str(out), per_channel=True, reduce_range=True)


def session(path: Path, threads: int = 0) -> Any:
    """The graph in onnxruntime, on the CPU; by default with a thread per core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(session: Any, *inputs: Tensor) -> dict[str, Tensor]:
    """A session's outputs for ``INPUTS``, by name."""
    feed = {name: array.numpy() for name, array in zip(INPUTS, inputs, strict=True)}
    names = [output.name for output in session.get_outputs()]
    return {name: torch.from_numpy(array) for name, array in zip(names, session.run(None, feed), strict=True)}


class Reference:
    """The model's outputs for random tokens, with padding: what its graphs are compared with."""

    @torch.no_grad()
    def __init__(self, model: BertPreTrainedModel):
        lengths = torch.tensor(hf.LENGTHS)
        mask = (torch.arange(max(hf.LENGTHS)) < lengths[:, None]).long()
        random = torch.Generator().manual_seed(0)
        ids, segments = (torch.randint(n, mask.shape, generator=random) * mask for n in (model.config.vocab_size, 2))
        self.inputs = ids, mask, segments % model.config.type_vocab_size
        if isinstance(model, BertForMultipleChoice):
            self.inputs = tuple(x[:, None].expand(-1, 2, -1) for x in self.inputs)
        self.exact = Graph(copy.deepcopy(model).double()).outputs(*self.inputs)
        self.rounded = Graph(model).outputs(*self.inputs)

    def difference(self, path: Path) -> float:
        """Largest difference of an output of the fp32 graph.

        Raises:
            ExportError: it is NaN, or larger than rounding explains.
        """
        got = run(session(path), *self.inputs)
        return max(
            hf.accepted(got[name], exact, float((self.rounded[name] - exact).abs().max()), f"{path.name}, {name},")
            for name, exact in self.exact.items()
        )

    def int8_error(self, path: Path) -> float:
        """Largest error of an output of the int8 graph: root mean square, as a share of the output's.

        Raises:
            ExportError: it is NaN, or larger than INT8_ERROR.
        """
        got = run(session(path), *self.inputs)
        errors = {name: float((got[name] - exact).norm() / exact.norm()) for name, exact in self.exact.items()}
        name = max(errors, key=errors.__getitem__)
        if not errors[name] <= INT8_ERROR:
            raise ExportError(
                f"{path.name} loses too much: {name} errs by {errors[name]:.0%} (root mean square), and at most "
                f"{INT8_ERROR:.0%} is accepted. Nothing was exported; export without --int8"
            )
        return errors[name]


def write(model: BertPreTrainedModel, folder: Path, int8: bool) -> None:
    """Write FOLDER/model.onnx and, with ``int8``, FOLDER/model.int8.onnx; compare them with the model."""
    path, small = folder / "model.onnx", folder / "model.int8.onnx"
    reference = Reference(model)
    export(model, path)
    print(f"onnx max_abs_diff={reference.difference(path):.3g} bytes={path.stat().st_size}")
    if int8:
        quantize(path, small)
        print(f"onnx_int8 relative_error={reference.int8_error(small):.3g} bytes={small.stat().st_size}")
