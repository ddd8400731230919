import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.variants import SDPA_ON_CPU
from src.configuration_bert import MosaicBertConfig
from src.data.microbatches import split_padded, split_unpadded
from src.hf_bert import HFBert
from src.mosaic_bert import MosaicBert
from tests.model.test_bert_layers import RAGGED, SMALL, batch_of

MODELS = {
    "mosaic_bert": lambda: MosaicBert(MosaicBertConfig(**SMALL)),
    "hf_bert": lambda: HFBert(transformers.BertConfig(**SMALL)),
}
SPLITS = {"mosaic_bert": split_unpadded, "hf_bert": split_padded}


@pytest.mark.parametrize("name", MODELS)
def test_metrics_are_exact_over_microbatches(name):
    """Means over all masked tokens; the optimised loss, weighted by masked tokens, is the same number."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    batch = batch_of()
    values = []
    for size in (1, 2, 5):
        metrics, loss, count = model.get_metrics(is_train=False), 0.0, 0
        for metric in metrics.values():
            metric.reset()
        for part in SPLITS[name](batch, size):
            outputs = model.eval_forward(part)
            for metric in metrics.values():
                model.update_metric(part, outputs, metric)
            loss += model.loss(outputs, part).item() * part["num_masked"]
            count += part["num_masked"]
        values.append([metric.compute().item() for metric in metrics.values()])
        assert values[-1][0] == pytest.approx(loss / count, rel=1e-5)
    assert values[1] == pytest.approx(values[0], rel=1e-6) and values[2] == pytest.approx(values[0], rel=1e-6)
    assert set(model.get_metrics(is_train=True)) == {"LanguageCrossEntropy", "MaskedAccuracy"}


def test_metrics_are_sums_in_fp64():
    """Sums do not round, counts stay integers, and a mean over no masked token is NaN."""
    metrics = MODELS["mosaic_bert"]().get_metrics(is_train=False)
    assert list(metrics) == ["LanguageCrossEntropy", "LanguagePerplexity", "MaskedAccuracy", "MaskedTokens"]
    for metric, without in zip(metrics.values(), ("nan", "nan", "nan", "0"), strict=True):
        metric.update(torch.tensor(0.0), torch.tensor(0), torch.tensor(0))
        assert str(metric.compute().item()) == without
        metric.update(torch.tensor(2.0**24), torch.tensor(2**24), torch.tensor(2**24 + 1))
        metric.update(torch.tensor(1.0), torch.tensor(0), torch.tensor(0))
    values = [metric.compute() for metric in metrics.values()]
    count = 2**24 + 1
    assert values[0] == 1.0 and values[1] == torch.tensor(1.0, dtype=torch.float64).exp()
    assert values[2].item() == 2**24 / count and values[3].item() == count and values[3].dtype == torch.int64


def test_metrics_are_summed_over_ranks():
    """The other rank's loss sum, correct and masked tokens are 6 each. A mean would keep the ratios, not the count."""
    for name, metric in MODELS["mosaic_bert"]().get_metrics(is_train=False).items():
        metric.update(torch.tensor(4.0), torch.tensor(1), torch.tensor(2))
        metric.distributed_available_fn = lambda: True
        metric.dist_sync_fn = lambda state, group: [state, torch.full_like(state, 6)]
        cross_entropy = torch.tensor(10 / 8, dtype=torch.float64)
        want = {"LanguageCrossEntropy": 10 / 8, "MaskedAccuracy": 7 / 8, "MaskedTokens": 8}
        assert metric.compute().item() == want.get(name, cross_entropy.exp().item())


def test_hf_bert_loss_is_that_of_masked_tokens():
    torch.manual_seed(0)
    model = MODELS["hf_bert"]().eval()
    batch = batch_of()
    (part,) = split_padded(batch, 100)
    want = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
    got = model(part)
    torch.testing.assert_close(got.loss, want.loss)
    masked = batch["labels"] >= 0
    hits = (want.logits.argmax(-1) == batch["labels"])[masked].sum()
    assert got.correct == hits and got.count == masked.sum()


@pytest.mark.parametrize("name", MODELS)
def test_flops_equal_those_of_the_matrix_products(name):
    """torch counts a forward pass, a third of a step. All lengths are equal, so there is no padding."""
    model = MODELS[name]()
    batch = batch_of([16] * 4)
    (part,) = SPLITS[name](batch, 100)
    with FlopCounterMode(display=False, custom_mapping=SDPA_ON_CPU) as counter, torch.no_grad():
        model(part)
    assert model.flops_per_batch(part) == model.flops_per_batch(batch) == 3 * counter.get_total_flops()


def test_flops_follow_tokens_and_squared_lengths():
    model = MODELS["mosaic_bert"]()
    ragged, padded = batch_of(RAGGED), batch_of([max(RAGGED)] * len(RAGGED))
    padded["labels"] = ragged["labels"]
    c = model.config
    T = len(RAGGED) * max(RAGGED) - sum(RAGGED)
    pairs = len(RAGGED) * max(RAGGED) ** 2 - sum(n * n for n in RAGGED)
    per_token = 2 * (4 * c.hidden_size**2 + 3 * c.hidden_size * c.intermediate_size) + 3 * c.hidden_size**2
    extra = 6 * (per_token * T + 3 * 2 * c.hidden_size * pairs)
    assert model.flops_per_batch(padded) - model.flops_per_batch(ragged) == extra


@pytest.mark.parametrize(("kind", "config"), [(MosaicBert, MosaicBertConfig), (HFBert, transformers.BertConfig)])
def test_gradient_checkpointing_is_passed_on(kind, config):
    assert kind(config(**SMALL), gradient_checkpointing=True).model.is_gradient_checkpointing
