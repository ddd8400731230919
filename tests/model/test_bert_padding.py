import pytest
import torch

from src.bert_padding import index_first_axis, pad_input, unpad_input, unpad_layout

MASKS = {
    "right": [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]],
    "left": [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]],
    "empty": [[0, 0, 0, 0], [1, 1, 0, 0]],
    "one": [[1]],
}


@pytest.mark.parametrize("name", MASKS)
def test_there_and_back(name):
    mask = torch.tensor(MASKS[name])
    x = torch.randn(*mask.shape, 5)
    indices, cu_seqlens, max_seqlen = unpad_layout(mask)
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert max_seqlen == mask.sum(1).max()
    flat = unpad_input(x, indices)
    assert torch.equal(flat, x[mask.bool()])
    assert torch.equal(pad_input(flat, indices, *mask.shape), x * mask[..., None])


def test_gradients_go_where_the_rows_came_from():
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([4, 0, 3])
    assert torch.autograd.gradcheck(lambda x: index_first_axis(x, index), x)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    indices, *_ = unpad_layout(mask)
    flat = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pad_input(x, indices, 2, 3), flat)


def test_no_rows():
    x = torch.randn(3, 2, requires_grad=True)
    index_first_axis(x, torch.empty(0, dtype=torch.int64)).sum().backward()
    assert x.grad is not None and not x.grad.any()
