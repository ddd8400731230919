"""Unpadding, padding and layouts."""

from dataclasses import replace

import pytest
import torch

from src.bert_padding import Layout, index_first_axis, pad_input, unpad_input, unpad_layout

MASKS = {
    "right": [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]],
    "left": [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]],
    "empty": [[0, 0, 0, 0], [1, 1, 0, 0]],
    "one": [[1]],
}


@pytest.mark.parametrize("longest_first", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_pad_inverts_unpad(name, longest_first):
    mask = torch.tensor(MASKS[name])
    x = torch.randn(*mask.shape, 5)
    layout = unpad_layout(mask, longest_first)
    order = sorted(range(len(mask)), key=lambda i: -mask[i].sum()) if longest_first else range(len(mask))
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.cu_seqlens.tolist() == [0, *mask.sum(1)[list(order)].cumsum(0).tolist()]
    assert type(layout.max_seqlen) is int and layout.max_seqlen == mask.sum(1).max()
    flat = unpad_input(x, layout.indices)
    assert torch.equal(flat, torch.cat([x[i][mask[i].bool()] for i in order]))
    assert torch.equal(pad_input(flat, layout.indices, *mask.shape), x * mask[..., None])


@pytest.mark.parametrize("longest_first", [False, True])
def test_lengths_mean_padding_on_the_right(longest_first):
    from_mask = unpad_layout(torch.tensor(MASKS["right"]), longest_first)
    from_lengths = unpad_layout(torch.tensor([3, 1, 4]), longest_first)
    for a, b in zip(vars(from_mask).values(), vars(from_lengths).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_layout_from_a_microbatch_and_to_a_device():
    layout = Layout(torch.tensor([0, 3]), 3, {16: torch.tensor([[0, 3, 0]])}, torch.arange(3))
    assert Layout.from_batch({"input_ids": None, **vars(layout)}) == replace(layout, indices=None)
    moved = layout.to("meta")
    assert moved.max_seqlen == 3 and moved.tables.keys() == {16}
    assert all(x.is_meta for x in (moved.indices, moved.cu_seqlens, *moved.tables.values()))


def test_gradients_of_indexing_and_padding():
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([4, 0, 3])
    assert torch.autograd.gradcheck(lambda x: index_first_axis(x, index), x)
    indices = unpad_layout(torch.tensor([[1, 1, 0], [1, 0, 0]])).indices
    flat = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pad_input(x, indices, 2, 3), flat)


def test_no_rows():
    x = torch.randn(3, 2, requires_grad=True)
    index_first_axis(x, torch.empty(0, dtype=torch.int64)).sum().backward()
    assert x.grad is not None and not x.grad.any()
