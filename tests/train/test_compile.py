"""``compile_config``: the Trainer's whole model as one graph, compiled for few batches."""

import pytest
import torch
from torch._dynamo.utils import counters

from tests.runs import UNSAVED, fit

SMALL = [
    "model.model_config.num_hidden_layers=1",
    "model.model_config.num_attention_heads=1",
    "device_train_microbatch_size=8",
    "max_duration=2ba",
]
TRITON = ["model.attention=triton", "model.kernels=triton"]


@pytest.mark.slow
def test_a_compiled_run_is_one_graph_and_seldom_compiled(overrides):
    """The first batch's sizes are constants of the graph, the next ones' variables. Sizes of 0 and 1 compile again."""
    options = [*overrides, *UNSAVED, *TRITON, *SMALL]
    _, want, _ = fit(options)
    torch._dynamo.reset()
    counters.clear()
    _, got, _ = fit([*options, "compile_config={backend: aot_eager}"])
    assert got.losses == pytest.approx(want.losses, rel=1e-6)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] <= 3
