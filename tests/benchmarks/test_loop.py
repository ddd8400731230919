"""The loop of benchmarks/learning computes what main.py's Trainer does, so its results are those of the product."""

import dataclasses
import json

import pytest
import torch

from benchmarks.learning import time_to_loss
from benchmarks.learning.pretraining import Course, Training
from benchmarks.variants import MosaicBert, Shape
from src import data_c4
from src.data.masking import MaskingCollator
from src.train.builders import build_trainer
from src.train.config import load
from tests.runs import shipped

STEPS, RATE = 40, 1e-2
SHAPE = Shape(layers=2, hidden=24, heads=3, width=40, dropout=0.0, length=32)


def composer_losses(overrides, recipe, microbatch, tmp_path):
    """Losses and learning rates of each step, and the final model, of the YAML that has the recipe."""
    yaml = {"ours": "mosaic_bert", "fast": "mosaic_bert_fast"}[recipe]
    settings = [
        f"optimizer.lr={RATE}",
        f"max_duration={STEPS}ba",
        f"device_train_microbatch_size={microbatch}",
        "save_folder=null",
        "autoresume=false",
        "loggers.console_line.interval=100ba",
    ]
    # In the reference, decay is decoupled from the rate; in the fast recipe AdamW's rate is half of Muon's.
    own = {"ours": f"optimizer.weight_decay={0.02 * RATE}", "fast": f"optimizer.adamw_lr={RATE / 2}"}
    trainer = build_trainer(load(f"yamls/{yaml}.yaml", [*shipped(overrides), *settings, own[recipe]]))
    weights = {name: x.clone() for name, x in trainer.state.model.model.state_dict().items()}
    trainer.fit()
    trainer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss/train/total"] for line in lines if "loss/train/total" in line]
    name = f"lr-{ {'ours': 'AdamW', 'fast': 'Muon'}[recipe] }/group0"
    rates = [line[name] for line in lines if name in line]
    return losses, rates, weights, trainer.state.model.model.state_dict()


def loop_losses(token_shards, tokenizer, recipe, weights):
    """The same of the loop, on the same shards."""
    recipe = dataclasses.replace(time_to_loss.MODELS[recipe], dropout=0.0)
    shape = dataclasses.replace(SHAPE, vocabulary=len(weights["bert.embeddings.word_embeddings.weight"]))
    training = Training(MosaicBert(shape), recipe, RATE, Course(recipe, [1.0], STEPS))
    training.variant.model.load_state_dict(weights)
    order = {"shuffle": True, "shuffle_seed": 17, "batch_size": 16, "num_canonical_nodes": 1}
    dataset = data_c4.StreamingC4(tokenizer, 32, token_shards, split="train", **order)
    masks, losses, rates = MaskingCollator(tokenizer, recipe.masking[0], seed=17), [], []
    while len(losses) < STEPS:
        for batch in data_c4.build_dataloader(dataset, masks, 16):
            if len(losses) < STEPS:
                rates.append(training.optimizer.param_groups[0]["lr"])
                losses.append(training.step(batch).item())
    return losses, rates, training.variant.model.state_dict()


@pytest.mark.parametrize("recipe", ["ours", "fast"])
def test_losses_and_weights_are_those_of_the_trainer(recipe, overrides, token_shards, tokenizer, tmp_path):
    """To the bit: order, masks, learning rate, loss, optimizer. "fast" is what mosaic_bert_fast.yaml says it is."""
    want, rates, weights, trained = composer_losses(overrides, recipe, 16, tmp_path)
    got, got_rates, model = loop_losses(token_shards, tokenizer, recipe, weights)
    assert len(want) == STEPS and min(want) < want[0] - 0.5
    highest = {"ours": RATE, "fast": RATE / 2}[recipe]
    assert got_rates == [0.0, *rates[:-1]] and max(rates) == highest  # lr_monitor logs the rate of the next step
    assert got == want
    assert all(torch.equal(x, trained[name]) for name, x in model.items())


def test_parts_weigh_by_their_masked_tokens(overrides, token_shards, tokenizer, tmp_path, monkeypatch):
    """A batch in parts, as hf_strong has them. To fp32 rounding: the Trainer scales means, the loop divides sums."""
    want, _, weights, _ = composer_losses(overrides, "ours", 5, tmp_path)
    whole = MosaicBert.parts

    def in_parts(self, batch):
        few = [{name: x[i : i + 5] for name, x in batch.items()} for i in range(0, len(batch["labels"]), 5)]
        return [part for each in few for part in whole(self, each)]

    monkeypatch.setattr(MosaicBert, "parts", in_parts)
    got, _, _ = loop_losses(token_shards, tokenizer, "ours", weights)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-5, atol=0)
