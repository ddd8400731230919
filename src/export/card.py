"""The card of an exported model: what the checkpoint, and what lies beside it, say of how it was made."""

import json
from pathlib import Path

import yaml

from src.configuration_bert import MosaicBertConfig
from src.train import checkpoint
from src.train.weights import Pretrained

EVAL_LOSS = "metrics/eval/LanguageCrossEntropy"
"""As main.py logs it."""
MOSAIC_BERT = """\
A [MosaicBERT](https://arxiv.org/abs/2312.17482): a BERT with ALiBi in place of positions, gated linear units, and no
computation on padding. `trust_remote_code=True` lets transformers use the source in this folder, which needs nothing
but torch and transformers. It takes sequences of any length; try first how good it is beyond that of its training. For
embeddings of texts, take the mean of `last_hidden_state` over the tokens that are not padding."""
HF_BERT = "Hugging Face's BERT, trained as a MosaicBERT's baseline."
CARD = """\
---
library_name: transformers
pipeline_tag: {task}
# license: yours to name; the text that the model was trained on may bind you
---

# {name}

{kind}

```python
from transformers import {auto_class}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = {auto_class}.from_pretrained("{name}", trust_remote_code=True)
```

| | |
|---|---|
{table}
{run}"""


def describe(source: Pretrained, auto_class: str, task: str, name: str) -> str:
    """A README.md in Markdown.

    Args:
        source: what was exported.
        auto_class: transformers' class to load it with.
        task: the hub's name for what it does.
        name: of the model.
    """
    config, run = source.config, ""
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    rows = {field: f"{getattr(config, field):,}" for field in names}
    if source.settings is not None:
        time = checkpoint.read(str(source.path))["timestamp"]["Timestamp"]
        rows["trained for"] = f"{time['batch']:,} steps, {time['sample']:,} sequences, {time['token']:,} tokens"
        beside = source.path.with_name("config.yaml")
        rows["held-out loss"] = held_out_loss(beside, time["batch"]) or "not found beside the checkpoint"
        text = beside.read_text() if beside.exists() else yaml.safe_dump(source.settings, sort_keys=False)
        run = f"\nThe run: its data, recipe and machine.\n\n```yaml\n{text}```\n"
    return CARD.format(
        task=task,
        name=name,
        kind=MOSAIC_BERT if isinstance(config, MosaicBertConfig) else HF_BERT,
        auto_class=auto_class,
        table="\n".join(f"| {what} | {value} |" for what, value in rows.items()),
        run=run,
    )


def held_out_loss(config: Path, step: int) -> str | None:
    """The last evaluation up to a step, from the metrics file that a run's config names; None if there is none."""
    run = yaml.safe_load(config.read_text()) if config.exists() else {}
    path = run.get("loggers", {}).get("metrics_file", {}).get("path")
    if path is None or not Path(path).exists():
        return None
    lines = [json.loads(line) for line in Path(path).read_text().splitlines() if line.endswith("}")]
    found = [line for line in lines if EVAL_LOSS in line and line["batch"] <= step]
    return f"{found[-1][EVAL_LOSS]:.4f} nats a masked token, at step {found[-1]['batch']:,}" if found else None
