"""What a microbatch launches on a GPU (benchmarks/speed/launches.py). Kernels are called, and do not run."""

import collections
from dataclasses import replace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks.speed import launches
from src import attention_tiles, flash_attn_triton, layer_norm_triton

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counted in the interpreter")


@pytest.mark.parametrize(
    ("cast_once", "constant", "per_layer"),
    [(False, 52, 44), (True, 48, 37)],
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
    assert "launches aten=122 triton=26 bytes=" in capsys.readouterr().out.splitlines()[-1]


def calls_of(lengths):
    """Each kernel's call for a microbatch: the kernel, its arguments by position, its options."""
    calls = []
    with launches.step(lambda kernel, *args, **options: calls.append((kernel, args, options)), cast_once=False):
        launches.microbatch(launches.TOY, torch.tensor(lengths))()
    return calls


def test_each_dropout_has_its_own_key():
    """Of one draw; the backward gets the forward's."""
    keys = collections.Counter()
    for kernel, args, options in calls_of([5, 3]):
        if options.get("DROPOUT"):
            keys[args[kernel.arg_names.index("key_ptr")].item()] += 1
    assert list(keys.values()) == [2] * 2 * launches.TOY.layers


@pytest.mark.parametrize(("backward", "kernels"), [("split", 4), ("whole", 2)])
def test_no_batch_compiles_a_kernel_again(backward, kernels, monkeypatch):
    """Triton compiles apart integers that are 1 or that 16 divides, and addresses that 16 divides."""
    tile = attention_tiles.Tile(64, 16, 4, 1)
    tiles = attention_tiles.Tiles(tile, tile, tile, tile if backward == "whole" else None)
    monkeypatch.setattr(flash_attn_triton, "tiles_for", lambda *_: tiles)
    monkeypatch.setattr(layer_norm_triton, "PROGRAMS", 1)  # so that a program's tiles are as many as tokens
    monkeypatch.setattr(
        layer_norm_triton, "tile", lambda *args, tile=layer_norm_triton.tile: {**tile(*args), "ROWS": 1}
    )
    backend, found = make_backend(GPUTarget("cuda", 90, 32)), []
    for lengths in ([1], [16], [17], [9, 5, 8, 8]):
        found.append(set())
        for kernel, args, options in calls_of(lengths):
            jit = triton.JITFunction(kernel.fn, **kernel.rewriter.kwargs)
            assert all(p.do_not_specialize for p in jit.params if p.name == "key_ptr")  # where in the draw it lies
            specialise = create_function_from_signature(jit.signature, jit.params, backend)
            found[-1].add((kernel.__name__, str(specialise(*args, **options)[1])))
    assert len(found[0]) == 12 + kernels  # LayerNorm's after embeddings, attention, gated unit and in the head
    assert found[1:] == found[:1] * 3
