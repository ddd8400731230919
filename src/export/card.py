"""The model card of an exported folder: how the model was made, from the checkpoint and the files next to it."""

import json
from pathlib import Path

import yaml

from src.configuration_bert import MosaicBertConfig
from src.export import sentences
from src.train import checkpoint
from src.train.weights import Pretrained

MOSAIC_BERT = """\
A [MosaicBERT](https://arxiv.org/abs/2312.17482): a BERT with ALiBi instead of position embeddings, gated linear units,
and no computation on padding. `trust_remote_code=True` lets transformers use the source in this folder, which needs
only torch and transformers. Sequences may have any length; `truncation=True` cuts them at {max_length} tokens, the
tokenizer's `model_max_length`. Measure the quality before you raise it beyond the lengths of training."""
HF_BERT = "Hugging Face's BERT, trained as the baseline of a MosaicBERT."
CARD = """\
---
library_name: transformers
pipeline_tag: {task}
# license: add yours; the text that the model was trained on may restrict it
---

# {name}

{kind}

```python
from transformers import {auto_class}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = {auto_class}.from_pretrained("{name}", trust_remote_code=True)
```
{sentences}
| | |
|---|---|
{table}
{run}"""
SENTENCES = """
The vector of a text is the mean of the last hidden states over its non-padding tokens. Pretraining alone gives poor
vectors; train the folder on pairs of texts with sentence-transformers.

```python
from sentence_transformers import SentenceTransformer

vectors = SentenceTransformer("{name}", trust_remote_code=True).encode(["a text", "another text"])
```
"""


def model_card(source: Pretrained, auto_class: str, task: str, max_length: int, out: Path) -> str:
    """The README.md of ``out``, in Markdown. A folder that is exported to itself keeps its card, which may be edited.

    Args:
        auto_class: transformers' class to load it with.
        task: the hub's name of its task.
        max_length: tokens at which the tokenizer truncates.
    """
    if source.path.resolve() == out.resolve() and (out / "README.md").exists():
        return (out / "README.md").read_text()
    config, run = source.config, ""
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    rows = {name: f"{getattr(config, name):,}" for name in names}
    if source.settings is not None:
        time = checkpoint.read(str(source.path))["timestamp"]["Timestamp"]
        rows["longest training sequence"] = f"{sentences.trained_length(source) or 'unknown'} tokens"
        rows["trained for"] = f"{time['batch']:,} steps, {time['sample']:,} sequences, {time['token']:,} tokens"
        run_config = source.path.with_name("config.yaml")
        rows["validation loss"] = validation_loss(run_config, time["batch"]) or "not found next to the checkpoint"
        text = run_config.read_text() if run_config.exists() else yaml.safe_dump(source.settings, sort_keys=False)
        run = f"\nThe run: its data, recipe and machine.\n\n```yaml\n{text}```\n"
    return CARD.format(
        task=task,
        name=out.name,
        kind=(MOSAIC_BERT if isinstance(config, MosaicBertConfig) else HF_BERT).format(max_length=max_length),
        sentences=SENTENCES.format(name=out.name) if auto_class in sentences.AUTO_CLASSES else "",
        auto_class=auto_class,
        table="\n".join(f"| {what} | {value} |" for what, value in rows.items()),
        run=run,
    )


def validation_loss(config: Path, step: int) -> str | None:
    """The last evaluation up to a step, from the metrics file that a run's config names; None if there is none."""
    key = "metrics/eval/LanguageCrossEntropy"
    run = yaml.safe_load(config.read_text()) if config.exists() else {}
    path = run.get("loggers", {}).get("metrics_file", {}).get("path")
    if path is None or not Path(path).exists():
        return None
    lines = [json.loads(line) for line in Path(path).read_text().splitlines() if line.endswith("}")]
    found = [line for line in lines if key in line and line["batch"] <= step]
    return f"{found[-1][key]:.4f} nats per masked token, at step {found[-1]['batch']:,}" if found else None
