"""Models that leave PyTorch, or eager PyTorch: traced, exported, compiled, as ONNX graphs, in int8."""

import contextlib
import copy
import io
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from src import bert_layers
from src.common.errors import ExportError
from src.configuration_bert import AUTO_MAP
from src.export import onnx
from tests.model.test_bert_layers import batch_of, model_of

HEADS = sorted({name.split(".")[1] for auto, name in AUTO_MAP.items() if auto != "AutoConfig"})
SAME: dict[str, Any] = dict(rtol=1e-5, atol=3e-5)


def model(head="BertForMaskedLM", **changes):
    """In fp32, for inference; with 3 labels if it has any."""
    return model_of(getattr(bert_layers, head), dtype=torch.float32, num_labels=3, **changes).eval()


def batches(head):
    """Inputs of several shapes, one token included; padded on the right, left, anywhere, or whole rows."""
    random = torch.Generator().manual_seed(0)
    for B, S in ((3, 9), (1, 1), (5, 4), (1, 17)):
        shape = (B, 2, S) if head == "BertForMultipleChoice" else (B, S)
        ids, segments = (torch.randint(n, shape, generator=random) for n in (97, 2))
        lengths = torch.randint(1, S + 1, shape[:-1], generator=random)
        right = (torch.arange(S) < lengths[..., None]).long()
        anywhere, empty = (torch.rand(shape, generator=random) < 0.6).long(), right.clone()
        empty[-1] = 0
        for mask in (torch.ones_like(ids), right, right.flip(-1), anywhere, empty):
            yield ids, mask, segments


def check(head, want, got):
    """The same outputs for each of ``batches``; both functions return tuples."""
    with torch.no_grad():
        for inputs in batches(head):
            torch.testing.assert_close(got(*inputs), want(*inputs), **SAME)


def example(head):
    return tuple(x.clone() for x in list(batches(head))[1])


# torch.jit.trace, torch.export


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*checkpointing")
def test_a_traced_model_is_right_for_any_batch(head):
    """Saved and loaded again."""
    original = model(head)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(original, example(head)), file)
    file.seek(0)
    check(head, lambda *inputs: original(*inputs).to_tuple(), torch.jit.load(file))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*checkpointing")
@pytest.mark.parametrize("inputs", [1, 2])
def test_a_model_may_be_traced_with_one_token_and_without_a_mask(inputs):
    original = model(torchscript=True, output_hidden_states=True, output_attentions=True)
    ids = torch.ones(1, 1, dtype=torch.int64)
    traced: Any = torch.jit.trace(original, (ids, torch.ones_like(ids))[:inputs])
    with torch.no_grad():
        for batch in batches("BertForMaskedLM"):
            want, got = original(*batch[:inputs]), traced(*batch[:inputs])
            assert [type(x) for x in want] == [torch.Tensor, tuple, tuple]
            torch.testing.assert_close(got, want, **SAME)


def exported_program(head):
    """torch.export of the model, for any sizes."""
    inputs = example(head)
    names = ["batch", "length"] if inputs[0].dim() == 2 else ["batch", "choices", "length"]
    sizes = dict(enumerate(torch.export.Dim(name, max=2**20) for name in names))
    return torch.export.export(
        model(head, return_dict=False), inputs, dynamic_shapes=(sizes,) * 3, strict=False
    ).module()


@pytest.mark.slow
@pytest.mark.parametrize("head", ["BertForMaskedLM", "BertForMultipleChoice"])
def test_an_exported_program_is_right_for_any_batch(head):
    """Length 1 included, which B * S rows would exclude."""
    check(head, model(head, return_dict=False), exported_program(head))


# torch.compile


@pytest.mark.slow
def test_a_compiled_model_is_compiled_for_the_first_shapes_only():
    """Losses and gradients are equal. torch compiles apart one sequence, one token, and what it first finds to vary."""
    torch._dynamo.reset()
    original, counter, compiles = model(num_hidden_layers=1).train(), CompileCounter(), []
    compiled = torch.compile(copy.deepcopy(original), backend=counter)
    first = [9, 4], [17, 3, 8], [7], [1], [64], [5, 0, 3]
    for lengths in (*first, [33, 1, 20, 5], [2, 2], [30], [8, 0, 0, 1], [12, 12]):
        batch, results = batch_of(lengths), []
        for each in (original, compiled):
            each.zero_grad()
            loss = each(**batch).loss
            loss.backward()
            results.append([loss, *(p.grad for p in each.parameters())])
        torch.testing.assert_close(*results, **SAME)
        compiles.append(counter.frame_count)
    assert compiles[0] < compiles[len(first) - 1] == compiles[-1], compiles


# int8 in PyTorch


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("head", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_linear_layers_may_be_int8(head):
    """With the loss, and an error as small as int8's."""
    original, batch = model(head, initializer_range=0.1), batch_of()
    labels = batch.pop("labels") if head == "BertForMaskedLM" else torch.tensor([0, 1, 2, 0, 1])
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(original), {torch.nn.Linear}, torch.qint8)
    wrapped = {name for name, module in quantised.named_modules() if "quantized" in type(module).__module__}
    assert {name for name, module in original.named_modules() if isinstance(module, torch.nn.Linear)} <= wrapped
    with torch.no_grad():
        want, got = (each(**{**batch, "labels": labels}) for each in (original, quantised))
    assert 0 < (got.logits - want.logits).norm() < 0.2 * want.logits.norm()
    assert abs(float(got.loss - want.loss)) < 0.1 * float(want.loss)


# ONNX

OUTPUTS = {
    "BertForMultipleChoice": ["last_hidden_state", "logits"],
    "BertForQuestionAnswering": ["last_hidden_state", "start_logits", "end_logits"],
    "BertModel": ["last_hidden_state", "pooler_output"],
}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """The model with its fp32 and its int8 graph, and what was printed."""
    folder, original, printed = tmp_path_factory.mktemp("onnx"), model(num_hidden_layers=1), io.StringIO()
    with contextlib.redirect_stdout(printed):
        onnx.write(original, folder, int8=True)
    return original, folder, printed.getvalue()


def check_graph(head, original, path):
    graph, session = onnx.Graph(original), onnx.session(path)
    assert [output.name for output in session.get_outputs()] == OUTPUTS.get(head, ["last_hidden_state", "logits"])
    check(head, graph, lambda *inputs: tuple(onnx.run(session, *inputs).values()))


def test_a_graph_is_right_for_any_batch(graphs):
    original, folder, printed = graphs
    check_graph("BertForMaskedLM", original, folder / "model.onnx")
    fields = [dict(field.split("=") for field in line.split()[1:]) for line in printed.splitlines()]
    assert float(fields[0]["max_abs_diff"]) < 1e-4 and 0.001 < float(fields[1]["relative_error"]) < 0.1
    assert int(fields[1]["bytes"]) < 0.4 * int(fields[0]["bytes"])


@pytest.mark.slow
@pytest.mark.parametrize("head", sorted(set(HEADS) - {"BertForMaskedLM"}))
def test_a_graph_of_each_class_is_right_for_any_batch(head, tmp_path):
    original = model(head, num_hidden_layers=1)
    onnx.export(original, tmp_path / "model.onnx")
    check_graph(head, original, tmp_path / "model.onnx")


def test_an_int8_graph_has_int8_products_only(graphs):
    """Of weights: attention's two products are of activations. The decoder's weight is that of the embeddings."""
    import onnx as library

    nodes = [node.op_type for node in library.load(graphs[1] / "model.int8.onnx").graph.node]
    assert nodes.count("MatMulInteger") == 4 + 2 and nodes.count("MatMul") == 2 and "Gemm" not in nodes


def test_graphs_of_another_model_are_not_accepted(graphs):
    original, folder, _ = graphs
    other = copy.deepcopy(original)
    torch.nn.init.zeros_(other.cls.predictions.decoder.bias)
    reference = onnx.Reference(other)
    with pytest.raises(ExportError, match=r"model.onnx, logits, does not compute what the checkpoint does: outputs up"):
        reference.difference(folder / "model.onnx")
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(-1)
    with pytest.raises(ExportError, match=r"model.int8.onnx loses too much: logits errs by \d+% .* without --int8"):
        onnx.Reference(other).int8_error(folder / "model.int8.onnx")
