"""What a microbatch launches on a GPU (benchmarks/speed/launches.py). Kernels are called, and do not run."""

from dataclasses import replace

import pytest
import torch

from benchmarks.speed import launches

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counted in the interpreter")


@pytest.mark.parametrize(
    ("cast_once", "constant", "per_layer"),
    [(False, 53, 48), (True, 49, 41)],
    ids=["weights cast in each microbatch", "weights cast once"],
)
def test_launches_are_linear_in_layers(cast_once, constant, per_layer):
    """PyTorch's and ours: a change that adds one fails here, and must be worth it."""
    for layers in (1, 3):
        counted = launches.count(replace(launches.TOY, layers=layers), torch.tensor([5, 1, 3]), cast_once)
        assert counted.aten.total() == constant + per_layer * layers, counted.aten.most_common()
        assert counted.triton.total() == 6 + 10 * layers, counted.triton


def test_the_script(capsys):
    launches.main(["--toy"])
    assert "launches aten=131 triton=26 bytes=" in capsys.readouterr().out.splitlines()[-1]
