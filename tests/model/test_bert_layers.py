"""The unpadded model against a plain, padded one written from the equations, and Hugging Face's interface."""

import pytest
import torch
import torch.nn.functional as F

from src import bert_encoder, masked_lm_loss, torch_ops
from src.attention import alibi_slopes, attention_weights
from src.bert_layers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from src.bert_padding import Layout, unpad_layout
from src.configuration_bert import MosaicBertConfig
from src.data.microbatches import split_unpadded

SMALL = dict(vocab_size=97, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40)
RAGGED = [9, 1, 17, 4, 17]


def model_of(cls=BertForMaskedLM, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    model = cls(MosaicBertConfig(**{**SMALL, "hidden_dropout_prob": 0.0, "initializer_range": 0.3, **changes})).to(
        dtype
    )
    for name, p in model.named_parameters():  # biases and norms away from their initial values, so that each one counts
        if p.ndim < 2:
            torch.nn.init.normal_(p, mean=1.0 if "norm" in name.lower() and "weight" in name else 0.0, std=0.3)
    return model


def batch_of(lengths=RAGGED, rate=0.4, V=97):
    g = torch.Generator().manual_seed(1)
    S = max(lengths)
    mask = (torch.arange(S) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, V, mask.shape, generator=g) * mask
    masked = (torch.rand(mask.shape, generator=g) < rate) & mask.bool()
    labels = torch.where(masked, torch.randint(0, V, mask.shape, generator=g), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def padded_forward(state, config, ids, mask, dropout):
    """Logits (B, S, V) from the equations, padded. ``dropout(place, x)`` is called where dropout acts."""
    D, N = config.hidden_size, config.num_attention_heads
    H = D // N
    B, S = ids.shape

    def norm(x, name):
        return F.layer_norm(x, (D,), state[name + ".weight"], state[name + ".bias"], config.layer_norm_eps)

    def linear(x, name):
        return F.linear(x, state[name + ".weight"], state.get(name + ".bias"))

    e = "bert.embeddings."
    x = F.embedding(ids, state[e + "word_embeddings.weight"]) + state[e + "token_type_embeddings.weight"][0]
    x = dropout("embeddings", norm(x, e + "LayerNorm"))
    i = torch.arange(S)
    bias = -alibi_slopes(N).to(x.dtype)[:, None, None] * (i[:, None] - i).abs()
    for layer in range(config.num_hidden_layers):
        p = f"bert.encoder.layer.{layer}."
        q, k, v = linear(x, p + "attention.self.Wqkv").view(B, S, 3, N, H).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / H**0.5 + bias
        scores = scores.masked_fill(~mask.bool()[:, None, None, :], float("-inf"))
        a = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, S, D)
        a = dropout(f"attention {layer}", linear(a, p + "attention.output.dense"))
        x = norm(x + a, p + "attention.output.LayerNorm")
        gate, up = linear(x, p + "mlp.gated_layers").chunk(2, dim=-1)
        h = dropout(f"mlp {layer}", 0.5 * gate * (1 + torch.erf(gate / 2**0.5)) * up)
        x = norm(x + linear(h, p + "mlp.wo"), p + "mlp.layernorm")
    t = "cls.predictions.transform."
    h = norm(F.gelu(linear(x, t + "dense")), t + "LayerNorm")
    return F.linear(h, state[e + "word_embeddings.weight"], state["cls.predictions.decoder.bias"])


def padded_loss(model, batch, dropout=lambda place, x: x):
    state = dict(model.named_parameters())
    logits = padded_forward(state, model.config, batch["input_ids"], batch["attention_mask"], dropout)
    return F.cross_entropy(logits[batch["labels"] >= 0], batch["labels"][batch["labels"] >= 0]), logits


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(got, want, **tolerance):
    """Gradients, or other tensors, by name."""
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def unpadded(model, batch, microbatch_size=10**6):
    """Loss of the batch: the mean over microbatches weighted by their masked tokens, as the trainer computes it."""
    parts = split_unpadded(batch, microbatch_size)
    total = sum(part["num_masked"] for part in parts) or 1
    losses = (
        model.forward_unpadded(p["input_ids"], Layout.from_batch(p), p["masked_index"], p["labels"]).loss for p in parts
    )
    return sum(loss * (p["num_masked"] / total) for loss, p in zip(losses, parts, strict=True))


TOLERANCES = {torch.float64: dict(rtol=1e-10, atol=1e-11), torch.float32: dict(rtol=2e-4, atol=2e-5)}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("lengths", [RAGGED, [17], [1], [1, 1, 2]], ids=str)
@pytest.mark.parametrize("attention", ["torch", "reference"])
def test_equals_the_padded_model(lengths, dtype, attention):
    """Logits, loss and every gradient."""
    model = model_of(dtype=dtype, attention=attention)
    batch = batch_of(lengths, rate=0.99)
    want_loss, want_logits = padded_loss(model, batch)
    want = gradients(model, want_loss)

    logits = model(batch["input_ids"], batch["attention_mask"]).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[real], want_logits[real], **TOLERANCES[dtype])
    loss = unpadded(model, batch)
    torch.testing.assert_close(loss, want_loss, **TOLERANCES[dtype])
    got = gradients(model, loss)
    assert max(lengths) == 1 or all(g.any() for g in want.values())
    assert_same(got, want, **TOLERANCES[dtype])


@pytest.mark.parametrize("microbatch_size", [1, 2, 5])
def test_loss_and_gradients_do_not_depend_on_the_microbatch(microbatch_size):
    model = model_of()
    batch = batch_of([9, 1, 17, 4, 17], rate=0.2)
    batch["labels"][3] = -100  # a sequence, hence a microbatch of 1, without a masked token
    want_loss, _ = padded_loss(model, batch)
    want = gradients(model, want_loss)
    loss = unpadded(model, batch, microbatch_size)
    torch.testing.assert_close(loss, want_loss, rtol=1e-10, atol=0)
    assert_same(gradients(model, loss), want, rtol=1e-9, atol=1e-11)


def test_dropout_acts_in_three_places_and_nowhere_else(monkeypatch):
    """With the masks that the unpadded model drew, the padded one gives the same loss and gradients."""
    model = model_of(hidden_dropout_prob=0.3).train()
    batch = batch_of(rate=0.5)
    (part,) = split_unpadded(batch, 100)
    recorded, keep_mask = [], torch_ops.keep_mask

    def recording(x, threshold):
        keep = keep_mask(x, threshold)
        recorded.append(keep.to(x.dtype) / (1 - threshold / 2**16))
        return keep

    monkeypatch.setattr(torch_ops, "keep_mask", recording)
    monkeypatch.setattr(F, "dropout", None)  # not used
    got_loss = unpadded(model, batch)
    got = gradients(model, got_loss)
    L = model.config.num_hidden_layers
    assert len(recorded) == 1 + 2 * L  # embeddings; attention output and GLU of each layer

    B, S = batch["input_ids"].shape
    indices = unpad_layout(batch["attention_mask"], longest_first=True).indices
    rows_of_last = indices[part["masked_index"]]
    names = ["embeddings", *(f"{place} {i}" for i in range(L) for place in ("attention", "mlp"))]
    masks = {}
    for name, keep in zip(names, recorded, strict=True):
        rows = rows_of_last if name.endswith(f" {L - 1}") else indices
        assert len(keep) == len(rows)
        masks[name] = keep.new_ones(B * S, keep.shape[1]).index_copy(0, rows, keep).view(B, S, -1)
    want_loss, _ = padded_loss(model, batch, lambda name, x: x * masks[name])
    torch.testing.assert_close(got_loss, want_loss, rtol=1e-10, atol=0)
    assert_same(got, gradients(model, want_loss), rtol=1e-9, atol=1e-11)


def test_evaluation_has_no_dropout():
    model = model_of(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5, attention="torch").eval()
    batch = batch_of()
    assert torch.equal(unpadded(model, batch), unpadded(model, batch))
    model.train()
    assert not torch.equal(unpadded(model, batch), unpadded(model, batch))


def test_labels_give_the_same_loss_with_and_without_logits():
    """Logits unless training, as transformers' Trainer expects. And token 0 can be a label."""
    model = model_of().train()
    batch = batch_of()
    batch["labels"][0, 0] = 0
    fast, full = model(**batch), model(**batch, return_logits=True)
    assert list(fast) == ["loss"] and list(full) == ["loss", "logits"]
    assert full.logits.shape == (*batch["input_ids"].shape, 97)
    torch.testing.assert_close(fast.loss, full.loss, rtol=1e-10, atol=0)
    assert_same(gradients(model, fast.loss), gradients(model, full.loss), rtol=1e-9, atol=1e-11)
    model.eval()
    assert list(model(**batch)) == ["loss", "logits"] and list(model(**batch, return_logits=False)) == ["loss"]
    loss, logits = model(**batch, return_dict=False)
    assert torch.equal(logits, full.logits) and torch.equal(loss, full.loss)
    batch["labels"][:] = 1  # padding has no loss
    torch.testing.assert_close(model.train()(**batch).loss, model.eval()(**batch).loss, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("cls", "labels"),
    [
        (BertForMaskedLM, batch_of()["labels"]),
        (BertForTokenClassification, batch_of()["labels"] % 3),
        (BertForSequenceClassification, torch.tensor([0, 2, 1, 1, 0])),
        (BertForSequenceClassification, torch.rand(5, 3)),
    ],
    ids=["masked", "tokens", "classes", "multilabel"],
)
@pytest.mark.parametrize("training", [True, False])
def test_microbatches_add_up_to_the_batch_by_the_number_of_items(cls, labels, training):
    """transformers' Trainer counts labels that are not -100 over the microbatches, and adds their losses."""
    model, batch = model_of(cls, num_labels=3).train(training), batch_of()
    if cls is BertForTokenClassification:
        labels = labels.where(batch["labels"] >= 0, -100)
    parts = [
        {"labels": labels[rows], **{k: batch[k][rows] for k in ("input_ids", "attention_mask")}}
        for rows in (slice(0, 1), slice(1, 5))
    ]
    items = (labels != -100).sum()
    whole = model(batch["input_ids"], batch["attention_mask"], labels=labels).loss
    got = sum(model(**part, num_items_in_batch=items).loss for part in parts)
    torch.testing.assert_close(got, whole, rtol=1e-10, atol=0)
    assert model.accepts_loss_kwargs


class Adapted(torch.nn.Module):
    """As an adapter or a quantiser wraps a module: without its weight, and with another result."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **options):
        return 1.5 * self.module(*args, **options)


@pytest.mark.parametrize("segments", [False, True])
def test_every_weight_goes_through_its_module(segments):
    """In training, in inference and in the loss alike, for every module with a weight, the last layer's too."""
    model, batch = model_of(), batch_of()
    if segments:
        batch["token_type_ids"] = batch["input_ids"] % 2
    owners = [name for name, module in model.named_modules() if hasattr(module, "weight")]
    assert len(owners) == 3 + 6 * 3 + 3
    for name in owners:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Adapted(model.get_submodule(name)))
    labels = batch.pop("labels")
    for training in (True, False):
        want = F.cross_entropy(model.eval()(**batch).logits.flatten(0, 1), labels.flatten())
        got = model.train(training)(**batch, labels=labels).loss
        torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
        assert_same(gradients(model, got), gradients(model, want), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("cls", [BertForMaskedLM, BertForTokenClassification])
def test_no_item_in_all_microbatches_of_a_step_is_a_loss_of_zero(cls):
    """Short texts may have no masked token. transformers' Trainer then gives 0 items, and one NaN spoils a mean."""
    model, batch = model_of(cls), batch_of(rate=0.0)
    for training in (True, False):
        for items in (0, torch.tensor(0)):
            assert model.train(training)(**batch, num_items_in_batch=items).loss == 0


@pytest.mark.parametrize(
    "keep",
    [lambda output: None, lambda output: output.tanh(), lambda output: output[:, :1].expand_as(output)],
    ids=["kept", "saved by the backward", "expanded"],
)
@pytest.mark.parametrize("name", ["cls", "cls.predictions", "cls.predictions.decoder"])
def test_hooks_may_keep_and_change_the_logits(name, keep):
    """The loss does not overwrite logits that it does not own."""
    model, batch, seen = model_of().train(), batch_of(), []

    def hook(module, inputs, output):
        seen.append((output.detach(), output.detach().clone()))
        return keep(output)

    model.get_submodule(name).register_forward_hook(hook)
    labels = batch["labels"]
    loss = model(**batch).loss
    got = gradients(model, loss)
    assert torch.equal(*seen[0])
    model.get_submodule(name)._forward_hooks.clear()
    logits = model(**batch, return_logits=True).logits[labels >= 0]
    want = F.cross_entropy(logits if keep(logits) is None else keep(logits), labels[labels >= 0])
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=0)
    assert_same(got, gradients(model, want), rtol=1e-9, atol=1e-11)


def test_a_module_in_the_place_of_the_decoder_may_keep_the_logits(caplog):
    """Said once, because it needs more memory."""
    caplog.set_level("INFO", logger="src.masked_lm_loss")
    masked_lm_loss._log_once.cache_clear()
    model, batch = model_of().train(), batch_of()
    assert model(**batch).loss > 0 and not caplog.records
    decoder = model.cls.predictions.decoder
    model.cls.predictions.decoder = torch.nn.Sequential(decoder, torch.nn.Tanh())  # its backward reads them
    want = F.cross_entropy(model(**batch, return_logits=True).logits.flatten(0, 1), batch["labels"].flatten())
    got = model(**batch).loss
    assert_same(gradients(model, got), gradients(model, want), rtol=1e-9, atol=1e-11)
    assert model(**batch).loss > 0 and [r.message[:13] for r in caplog.records] == ["the head has "]


def test_a_batch_without_masked_tokens_has_loss_and_gradients_of_zero():
    model = model_of()
    batch = batch_of(rate=0.0)
    loss = unpadded(model, batch)
    assert loss == 0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_padding_side_and_amount_do_not_matter():
    model = model_of().eval()
    ids = torch.tensor([[5, 6, 7]])
    right = model(F.pad(ids, (0, 4)), F.pad(torch.ones_like(ids), (0, 4))).logits[:, :3]
    left = model(F.pad(ids, (2, 0)), F.pad(torch.ones_like(ids), (2, 0))).logits[:, 2:]
    alone = model(ids).logits
    torch.testing.assert_close(right, alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(left, alone, rtol=1e-12, atol=1e-12)


def test_base_size_has_the_published_state_dict():
    """Names and shapes of the published MosaicBERT-Base, 137 M parameters."""
    with torch.device("meta"):
        model = BertForMaskedLM(MosaicBertConfig())
    D, I, V = 768, 3072, 30528  # noqa: E741

    def weight_and_bias(name, *shape):
        return {name + ".weight": shape, name + ".bias": shape[:1]}

    want = {
        "bert.embeddings.word_embeddings.weight": (V, D),
        "bert.embeddings.token_type_embeddings.weight": (2, D),
        **weight_and_bias("bert.embeddings.LayerNorm", D),
        **weight_and_bias("cls.predictions.transform.dense", D, D),
        **weight_and_bias("cls.predictions.transform.LayerNorm", D),
        **weight_and_bias("cls.predictions.decoder", V, D),
    }
    for i in range(12):
        layer = f"bert.encoder.layer.{i}."
        want |= {
            **weight_and_bias(layer + "attention.self.Wqkv", 3 * D, D),
            **weight_and_bias(layer + "attention.output.dense", D, D),
            **weight_and_bias(layer + "attention.output.LayerNorm", D),
            layer + "mlp.gated_layers.weight": (2 * I, D),
            **weight_and_bias(layer + "mlp.wo", D, I),
            **weight_and_bias(layer + "mlp.layernorm", D),
        }
    assert {name: tuple(x.shape) for name, x in model.state_dict().items()} == want
    assert sum(p.numel() for p in model.parameters()) == 137_400_384


def test_decoder_is_tied_and_weights_are_normal():
    torch.manual_seed(0)
    model = BertForMaskedLM(MosaicBertConfig(**{**SMALL, "hidden_size": 96, "intermediate_size": 200}))
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    for name, p in model.named_parameters():
        if p.ndim == 2 and p.numel() > 1000:
            assert abs(p.std() - 0.02) < 0.001 and abs(p.mean()) < 0.002, name
        elif "norm" in name.lower() and name.endswith("weight"):
            assert (p == 1).all()
        elif p.ndim == 1:
            assert (p == 0).all()


@pytest.mark.parametrize("convert", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double().half()])
def test_slopes_stay_fp32_and_out_of_the_state_dict(convert):
    model = convert(model_of(num_attention_heads=6))
    slopes = model.bert.encoder.alibi.slopes
    assert slopes.dtype == torch.float32 and torch.equal(slopes, alibi_slopes(6))
    assert not any("slopes" in name for name in model.state_dict())


def test_slopes_survive_the_meta_device():
    """No state dict holds them."""
    model, batch = model_of(dtype=torch.float32).eval(), batch_of()
    with torch.device("meta"):
        emptied, assigned = (BertForMaskedLM(model.config).eval() for _ in range(2))
    assert torch.equal(emptied.to_empty(device="cpu").bert.encoder.alibi.slopes, alibi_slopes(3))
    assigned.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(assigned(**batch).loss, model(**batch).loss)


def test_uninitialised_slopes_are_refused():
    """As after a library built the model on the meta device and filled in only what was saved."""
    model, batch = model_of(dtype=torch.float32), batch_of()
    for left in (float("nan"), 0.0):
        model.bert.encoder.alibi.slopes = torch.full((3,), left)
        with pytest.raises(ValueError, match=r"the ALiBi slopes are \[.*\], expected \[0.0625, .*from_pretrained"):
            model(**batch)
    model._init_weights(model.bert.encoder.alibi)  # as transformers 5 does, after loading
    assert model(**batch).loss.isfinite()


def test_last_layer_computes_only_masked_rows(monkeypatch):
    rows, forward = [], bert_encoder.BertGatedLinearUnitMLP.forward
    watched = lambda self, x, key: rows.append(len(x)) or forward(self, x, key)  # noqa: E731
    monkeypatch.setattr(bert_encoder.BertGatedLinearUnitMLP, "forward", watched)
    batch = batch_of()
    unpadded(model_of(), batch)
    T, M = int(batch["attention_mask"].sum()), int((batch["labels"] >= 0).sum())
    assert rows == [T, T, M]


def test_base_model_and_its_arguments():
    model = model_of(BertModel, dtype=torch.float32).eval()
    batch = batch_of()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    out = model(ids, mask, output_hidden_states=True)
    assert out.last_hidden_state.shape == (5, 17, 24) and out.pooler_output.shape == (5, 24)
    assert not out.last_hidden_state[~mask.bool()].any() and torch.equal(out.hidden_states[-1], out.last_hidden_state)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(attention_mask=mask, inputs_embeds=embeds).last_hidden_state, out.last_hidden_state)
    segment_one = model(ids, mask, torch.ones_like(ids)).last_hidden_state
    assert not torch.allclose(segment_one[mask.bool()], out.last_hidden_state[mask.bool()])
    left = model(ids.flip(1), mask.flip(1)).pooler_output
    assert left.shape == out.pooler_output.shape


def test_attention_weights_are_those_of_the_definition():
    """(B, N, S, S) of each layer; with them the layer's attention gives what the model computes."""
    model, batch = model_of(BertModel).eval(), batch_of()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for inputs in ((ids, mask), (ids.flip(1), mask.flip(1))):
        out = model(*inputs, output_attentions=True, output_hidden_states=True)
        real = inputs[1].bool()
        states = out.hidden_states
        for layer, x, y, weights in zip(model.encoder.layer, states[:-1], states[1:], out.attentions, strict=True):
            assert weights.shape == (5, 3, 17, 17)
            torch.testing.assert_close(weights.sum(-1), real[:, None].expand(5, 3, 17).double())
            assert not weights.transpose(2, 3)[~real[:, None].expand(5, 3, 17)].any()
            v = layer.attention.self.Wqkv(x).view(5, 17, 3, 3, 8)[:, :, 2]
            attended = torch.einsum("bnij,bjnh->binh", weights, v).flatten(2)
            torch.testing.assert_close(layer.mlp(layer.attention.output(attended, x))[real], y[real])
    attention = model.float().encoder.layer[0].attention.self
    x, slopes = torch.randn(5, 17, 24), model.encoder.alibi(mask.device)
    with torch.autocast("cpu", torch.bfloat16):
        got, (q, k, _) = attention.weights(x, real, slopes), attention.qkv(x.flatten(0, 1))
    want = attention_weights(q.view(5, 17, 3, 8), k.view(5, 17, 3, 8), real, slopes)
    assert torch.equal(got, want * real[:, None, :, None])  # scores in fp32, of rounded queries and keys
    model.config.output_attentions = True
    assert len(model(ids, mask).attentions) == 3 and len(model(ids, mask, return_dict=False)) == 3


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float16, torch.float32])
def test_masks_of_any_dtype(dtype):
    model, batch = model_of().eval(), batch_of()
    want = model(batch["input_ids"], batch["attention_mask"]).logits
    assert torch.equal(model(batch["input_ids"], batch["attention_mask"].to(dtype)).logits, want)


@pytest.mark.parametrize("cls", [BertModel, BertForMaskedLM])
def test_inputs_that_do_not_fit_are_refused_with_their_shapes(cls):
    model, batch = model_of(cls), batch_of()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    wrong = {
        r"attention_mask: expected .* \(5, 17\), got \(5, 1, 1, 17\)": {"attention_mask": mask[:, None, None]},
        r"attention_mask: .* got \(5, 17, 17\)": {"attention_mask": mask[:, None].expand(5, 17, 17)},
        r"attention_mask: .* got \(5, 16\)": {"attention_mask": mask[:, 1:]},
        "expected 1 at tokens and 0 at padding": {"attention_mask": (mask - 1) * 10000.0},
        "got other values": {"attention_mask": mask * 2},
        r"token_type_ids: .* got \(1, 17\)": {"token_type_ids": ids[:1]},
        r"input_ids: expected shape \(B, S\) .* got \(17,\)": {"input_ids": ids[0]},
        r"input_ids: .* got \(5, 0\)": {"input_ids": ids[:, :0]},
        "takes no position_ids": {"position_ids": ids},
        "takes no head_mask": {"head_mask": torch.ones(3, 3)},
        "either input_ids or inputs_embeds": {"inputs_embeds": torch.ones(5, 17, 24)},
        r"inputs_embeds: .* got \(5, 17\)": {"input_ids": None, "inputs_embeds": torch.ones(5, 17)},
        "expected either": {"input_ids": None},
    }
    for message, given in wrong.items():
        with pytest.raises(ValueError, match=message):
            model(**{"input_ids": ids, **given})
    if cls is BertForMaskedLM:
        with pytest.raises(ValueError, match=r"labels: expected .* \(5, 17\), got \(5, 16\)"):
            model(ids, mask, labels=batch["labels"][:, 1:])


def test_rows_of_padding_alone():
    """They are zero, and change nothing else; nor does a batch of nothing else fail."""
    model, batch = model_of(num_labels=3).eval(), batch_of()
    ids, mask, labels = (F.pad(batch[name], (0, 0, 1, 1)) for name in ("input_ids", "attention_mask", "labels"))
    out, want = model(ids, mask, labels=labels), model(**batch)
    torch.testing.assert_close(out.loss, want.loss)
    torch.testing.assert_close(out.logits[1:-1], want.logits)
    assert not model.bert(ids, mask).last_hidden_state[0].any()
    for training in (True, False):
        alone = model.train(training)(ids[:1], mask[:1], labels=labels[:1])
        assert alone.loss == 0


def test_embeddings_in_place_of_ids_give_the_same_loss():
    model, batch = model_of().train(), batch_of()
    embeds = model.get_input_embeddings()(batch["input_ids"])
    want = model(**batch).loss
    got = model(inputs_embeds=embeds, **{k: batch[k] for k in ("attention_mask", "labels")}).loss
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("num_labels", "labels", "loss"),
    [
        (3, torch.tensor([0, 2, 1, 1, 0]), F.cross_entropy),
        (1, torch.tensor([0.5, 2, 1, 1, 0]), lambda x, y: F.mse_loss(x[:, 0], y)),
        (2, torch.ones(5, 2), F.binary_cross_entropy_with_logits),
    ],
)
def test_sequence_classification(num_labels, labels, loss):
    model = model_of(BertForSequenceClassification, dtype=torch.float32, num_labels=num_labels).eval()
    batch = batch_of()
    out = model(batch["input_ids"], batch["attention_mask"], labels=labels)
    assert out.logits.shape == (5, num_labels)
    torch.testing.assert_close(out.loss, loss(out.logits, labels))
    pooled = model.bert(batch["input_ids"], batch["attention_mask"]).pooler_output
    torch.testing.assert_close(out.logits, model.classifier(pooled))


def test_token_classification():
    """Logits from the last states; the loss is the mean over labels that are not -100."""
    model = model_of(BertForTokenClassification, dtype=torch.float32, num_labels=3).eval()
    batch = batch_of()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    labels = torch.where((ids % 2 == 0) & mask.bool(), ids % 3, -100)
    out = model(ids, mask, labels=labels)
    assert out.logits.shape == (*ids.shape, 3)
    torch.testing.assert_close(out.logits, model.classifier(model.bert(ids, mask).last_hidden_state))
    counted = labels >= 0
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[counted], labels[counted]))
    assert len(model(ids, mask, return_dict=False)) == 1 and model.bert.pooler is None


def test_question_answering():
    """Start and end of the answer; a position outside of the sequence has no loss."""
    model, batch = model_of(BertForQuestionAnswering).eval(), batch_of()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    starts, ends = torch.tensor([0, 0, 16, 17, -1]), torch.tensor([8, 0, 16, 20, 3])
    out = model(ids, mask, start_positions=starts, end_positions=ends)
    states = model.bert(ids, mask).last_hidden_state
    for i, logits in enumerate((out.start_logits, out.end_logits)):
        torch.testing.assert_close(logits, states @ model.qa_outputs.weight[i] + model.qa_outputs.bias[i])
    losses = []
    for logits, positions, rows in ((out.start_logits, starts, (0, 1, 2)), (out.end_logits, ends, (0, 1, 2, 4))):
        alone = [F.cross_entropy(logits[i, : RAGGED[i]], positions[i]) for i in rows]  # padding takes no part
        losses.append(torch.stack(alone).mean())
    torch.testing.assert_close(out.loss, sum(losses) / 2)
    assert len(model(ids, mask, return_dict=False)) == 2


@pytest.mark.parametrize("training", [True, False])
def test_labels_may_be_int32(training):
    """As ids may."""
    batch = batch_of()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    positions = torch.tensor([3, 0, 2, 1, 0])
    for cls, labels in (
        (BertForMaskedLM, {"labels": batch["labels"]}),
        (BertForTokenClassification, {"labels": batch["labels"].clamp(max=1)}),
        (BertForSequenceClassification, {"labels": positions.clamp(max=1)}),
        (BertForQuestionAnswering, {"start_positions": positions, "end_positions": positions}),
    ):
        model = model_of(cls).train(training)
        want = model(**inputs, **labels).loss
        got = model(**{k: v.int() for k, v in inputs.items()}, **{k: v.int() for k, v in labels.items()}).loss
        assert torch.equal(got, want)


def test_labels_that_do_not_fit_are_refused_with_their_shapes():
    """Also where their number fits by chance, or torch would broadcast them."""
    batch = batch_of()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for cls, labels, options in (
        (BertForTokenClassification, torch.zeros(17, 5).long(), {}),
        (BertForSequenceClassification, torch.zeros(3), dict(problem_type="regression", num_labels=1)),
        (BertForSequenceClassification, torch.zeros(5), dict(problem_type="regression")),
        (BertForSequenceClassification, torch.zeros(3, 5), dict(problem_type="multi_label_classification")),
        (BertForSequenceClassification, torch.zeros(4).long(), {}),
    ):
        model = model_of(cls, **{"num_labels": 3, **options})
        with pytest.raises(ValueError, match=rf"labels: expected .* got \({', ?'.join(map(str, labels.shape))}"):
            model(**inputs, labels=labels)


def test_multiple_choice():
    """Each choice is a sequence; the score is that of its pooled state."""
    model, batch = model_of(BertForMultipleChoice, num_labels=7).eval(), batch_of([9, 1, 17, 4, 17, 3])
    ids, mask = (batch[name].view(2, 3, 17) for name in ("input_ids", "attention_mask"))
    labels = torch.tensor([2, 0])
    out = model(ids, mask, labels=labels, output_hidden_states=True)
    pooled = model.bert(batch["input_ids"], batch["attention_mask"]).pooler_output
    torch.testing.assert_close(out.logits, model.classifier(pooled).view(2, 3))
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, labels))
    assert out.hidden_states[0].shape == (6, 17, 24) and len(model(ids, mask, return_dict=False)) == 1
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds, attention_mask=mask).logits, out.logits)
    with pytest.raises(ValueError, match=r"expected C choices, \(B, C, S\), got \(6, 17\)"):
        model(batch["input_ids"])
    with pytest.raises(ValueError, match=r"one shape, \(B, C, S\), got \(2, 3, 17\), \(2, 17\)"):
        model(ids, mask[:, 0])


@pytest.mark.filterwarnings("ignore:`torch.jit.:FutureWarning")
def test_a_traced_model_is_right_for_other_masks_and_shapes():
    """An exported graph keeps the padding: what unpadding computes depends on the mask's values."""
    model = model_of(dtype=torch.float32, return_dict=False).eval()
    ids = batch_of([6, 3])["input_ids"]
    with torch.no_grad():
        traced = torch.jit.trace(model, (ids, torch.ones_like(ids)), check_trace=False)
        for lengths in ([3, 6], RAGGED, [1], [4, 0, 9]):
            right = [batch_of(lengths)[name] for name in ("input_ids", "attention_mask")]
            scattered = right[0], right[1] * (torch.arange(max(lengths)) % 3 != 1)
            for inputs in (right, [x.flip(1) for x in right], scattered):  # padding on the right, on the left, between
                (got,), (want,) = traced(*inputs), model(*inputs)
                torch.testing.assert_close(got, want, **TOLERANCES[torch.float32])


def test_impossible_configs_are_refused():
    with pytest.raises(ValueError, match="unknown attention 'flash'; expected one of auto, reference, torch"):
        model_of(attention="flash")
    with pytest.raises(ValueError, match="not a multiple"):
        MosaicBertConfig(hidden_size=10, num_attention_heads=3)
