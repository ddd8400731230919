"""docs/results.md, and the measured blocks of README and docs, made of what lies in benchmarks/results.

    python -m benchmarks.publish            # write them
    python -m benchmarks.publish --check    # say whether they are as it would write them; status 1 if not

No figure of these is written by hand. docs/results.md is the files' own words one after another. A block stands between
``<!-- measured: NAME -->`` and ``<!-- end -->``, NAME being one of BLOCKS; of a benchmark that ran on several devices
it has the figures of the one that FIRST names first.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.speed.scaling import TABLES, table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- measured: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
FIRST = ("cuda", "cpu")
PAGES = ("step", "time_to_loss", "quality", "extrapolation")
"""Files NAME-DEVICE.md, in the order of the page."""
LINES = {
    "data-cpu.txt": "Loader, conversion, a large dataset's start",
    "startup-cpu.txt": "From the first line to the first step",
    "order-cpu.txt": "Order by length",
    "faults-cpu.txt": "Killed and started again",
}
"""Text files, of which the page shows what they print."""
NAMES = {
    "ours": "MosaicBERT",
    "mosaic_bert": "MosaicBERT",
    "untrained": "MosaicBERT, not pretrained",
    "mosaic_bert_compiled": "MosaicBERT, compiled",
    "mosaic_bert_padded": "MosaicBERT, padded, bias in memory",
    "hf_bert": "HF BERT",
    "hf_strong": "HF BERT, masked-token head, grouped by length",
    "modernbert": "ModernBERT, equal parameters",
    "modernbert_same_shape": "ModernBERT, equal widths",
}
TAKEN_AWAY = {
    "no_alibi": "ALiBi (learned positions in its place)",
    "no_glu": "gated linear units (a plain layer of the same FLOPs)",
    "no_unpadding": "unpadding",
    "no_masked_rows": "the last layer on masked rows only",
    "no_masked_head": "the head on masked rows only, and the last layer",
    "no_kernels": "Triton kernels",
    "mask_15": "30% masking (15% in its place)",
}
CHANGED = {
    "dropout_0": "dropout 0 in place of 0.1",
    "masking_falls": "masking that falls from 30% to 15%",
    "no_decay_groups": "no weight decay on biases and norms",
    "warmup_stable_decay": "learning rate stable for 70% of the run, then falling",
    "nadamw": "AdamW with Nesterov's momentum",
    "fast": "dropout 0 and a stable learning rate: `mosaic_bert_fast.yaml`",
}


def device_of(name: str) -> str | None:
    """The first of FIRST that a benchmark has results of."""
    return next((device for device in FIRST if (RESULTS / f"{name}-{device}.json").exists()), None)


def load(name: str) -> Any:
    """A benchmark's results; None: there are none."""
    device = device_of(name)
    return None if device is None else json.loads((RESULTS / f"{name}-{device}.json").read_text())


def step() -> list[str]:
    """README's table of a training step at C4's lengths."""
    cells = [cell for cell in load("step") or [] if cell["fill"] == "c4"]
    if not cells:
        return []
    rows = []
    for cell in cells:
        for name, arm in cell["arms"].items():
            if name in NAMES:
                ratio = f"{arm['time_ratio']:.2f} ({arm['time_ratio_low']:.2f} to {arm['time_ratio_high']:.2f})"
                speed, flops = f"{arm['tokens_per_s']:,.0f}", f"{arm['flop_ratio']:.2f}"
                memory = f"{arm['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in arm else ""
                rows.append([str(cell["length"]), NAMES[name], speed, ratio, flops, memory])
    cell = cells[0]
    share = ", ".join(f"{c['overhead_share']:.0%} at {c['length']}" for c in cells)
    commits = ", ".join(dict.fromkeys(c["machine"]["commit"] for c in cells))
    sizes = ", ".join(f"{c['sequences']} sequences at {c['length']} ({c['real_share']:.0%} real tokens)" for c in cells)
    return [
        f"A whole step (forward, backward, AdamW) of {cell['layers']} layers of 768, on {cell['machine']['device']}: "
        f"{sizes}, with lengths like C4's, {cell['masked']:.0%} masked, "
        f"{cell['rounds']} rounds in turn, commit {commits}; `python -m benchmarks.speed.step` "
        f"([all of it]({link('step', 'md')})).",
        "",
        report.table(["length", "model", "real tokens/s", "time / ours, median (range)", "FLOPs / ours", "GiB"], rows),
        "",
        f"Ratios above 1 mean that ours is faster; tokens/s are of the fastest round. Of our step, {share} is not its "
        "matrix products.",
        "",
    ]


def time_to_loss() -> list[str]:
    """README's time to a given quality."""
    found = load("time_to_loss")
    if not found or not found["ratios"]:
        return []
    settings, rows = found["settings"], []
    for name, r in found["ratios"].items():
        runs = found["curves"][name]
        loss = statistics.mean(run["points"][-1]["loss"] for run in runs)
        rows.append([NAMES[name], f"{loss:.3f}", f"{r['ratio']:.2f}", f"{r['low']:.2f} to {r['high']:.2f}"])
    return [
        "Time to the same held-out loss, small models trained from scratch on Wikipedia leads, "
        f"{settings['minutes']:g} minutes each, {settings['seeds']} seeds, learning rates searched with equal effort, "
        f"on {found['machine']['device']}, {commits(found, 'ours', *found['ratios'])}; "
        f"`python -m benchmarks.learning.time_to_loss` ([how]({link('time_to_loss', 'md')})).",
        "",
        report.table(["beside", "its final loss", "ours needs of its time", "95% interval (seeds)"], rows),
        "",
        f"![loss over time]({link('time_to_loss', 'png')})",
        "",
    ]


def commits(found: dict[str, Any], *names: str) -> str:
    """Of the runs of these arms."""
    all_of_them = sorted({run["machine"]["commit"] for name in names for run in found["curves"][name]})
    return f"commit{'s' * (len(all_of_them) > 1)} {', '.join(all_of_them)}"


def changes(names: dict[str, str], title: str) -> list[str]:
    """What each part of the recipe, or each change of it, is worth in time to the same loss."""
    found = load("time_to_loss")
    measured = [name for name in names if found and name in found["changes"]]
    if not measured:
        return []
    rows = []
    for name in measured:
        c = found["changes"][name]
        rows.append([names[name], f"{c['final']:.3f}", f"{c['worth']:.2f}", f"{c['low']:.2f} to {c['high']:.2f}"])
    header = [title, "final loss", "time to the same loss / ours", "95% interval (seeds)"]
    return [report.table(header, rows), "", f"{commits(found, *measured).capitalize()}.", ""]


def quality() -> list[str]:
    """README's accuracies after fine-tuning."""
    found = load("quality")
    if not found:
        return []
    settings, rows = found["settings"], []
    for task, results in found["tasks"].items():
        accuracy = {arm: statistics.fmean(sum(runs["test"], [])) for arm, runs in results["arms"].items()}
        for rival, d in results["differences"].items():
            names = f"{accuracy['ours']:.3f}", NAMES[rival], f"{accuracy[rival]:.3f}"
            rows.append([task, *names, f"{d['mean']:+.3f}", f"{d['low']:+.3f} to {d['high']:+.3f}"])
    return [
        f"Accuracy on test rows after fine-tuning on {settings['rows']:,}, of small models that were pretrained from "
        f"scratch on the same text for the same {settings['minutes']:g} minutes of {found['machine']['device']}: the "
        f"topics of Wikipedia leads (11), the sentences of Rotten Tomatoes (2). {settings['seeds']} pretraining seeds, "
        f"{settings['finetuning_seeds']} fine-tuning seeds each, commit {found['machine']['commit']}; "
        f"`python -m benchmarks.learning.quality` ([how]({link('quality', 'md')})).",
        "",
        report.table(["task", "MosaicBERT", "beside", "its", "difference", "95% interval"], rows),
        "",
    ]


def extrapolation() -> list[str]:
    """README's loss beyond the length of training."""
    found = load("extrapolation")
    if not found:
        return []
    losses = {length: statistics.fmean(each) for length, each in found["losses"]["ours"].items()}
    changes = {"1x": "", **{t: f"{d['mean']:+.4f}" for t, d in found["differences"].items()}}
    intervals = {"1x": "", **{t: f"{d['low']:+.4f} to {d['high']:+.4f}" for t, d in found["differences"].items()}}
    rows = [
        [length, f"{loss:.4f}", changes[times], intervals[times]]
        for times, (length, loss) in zip(changes, losses.items(), strict=True)
    ]
    (trained, hf), *_ = found["losses"]["hf_bert"].items()
    return [
        f"Beyond the length of training: the same models, pretrained at {trained} tokens, on {found['reviews']} film "
        f"reviews, the same {found['masked']:,} masked tokens at each length. HF BERT's loss is "
        f"{statistics.fmean(hf):.4f} at {trained}, where its positions end; commit {found['machine']['commit']}, "
        f"`python -m benchmarks.learning.extrapolation` ([how]({link('extrapolation', 'md')})).",
        "",
        report.table(["tokens", "MosaicBERT's loss", f"to {trained}", "95% interval"], rows),
        "",
    ]


def link(name: str, suffix: str) -> str:
    """To a benchmark's file, from the repository's root."""
    return f"benchmarks/results/{name}-{device_of(name)}.{suffix}"


def scaling(part: str) -> list[str]:
    """A part of how cost grows."""
    found = load("scaling")
    if not found or part not in found:
        return []
    rows, machine = found[part]["rows"], found[part]["machine"]
    return [f"{report.described(machine)}; `{found[part]['command']}`.", "", table(part, rows), ""]


def gpu() -> list[str]:
    """docs/gpu.md's figures: of each card, what benchmarks/gpu/run.sh left, as gpu-CARD.json.

    ``commit`` and ``note`` of a part are added by hand: where it ran at another commit, or did not run whole.
    """
    lines = []
    for path in sorted(RESULTS.glob("gpu-*.json")):
        parts = json.loads(path.read_text())
        about = parts.get("environment", {}).get("results") or {}
        machine = {name: about[name] for name in ("device", "python", "torch", "triton", "date") if name in about}
        lines += [f"### {about.get('device', path.stem.removeprefix('gpu-'))}", ""]
        lines += [f"{report.described(machine) if machine else 'Unknown machine'}. [{path.name}]({GPU}{path.name})", ""]
        if "matmul_tflops" in about:  # not on a CPU
            lines += [
                f"Measured: {about['matmul_tflops']:.0f} TFLOP/s in a bf16 product, {about['copy_tb_per_s']:.1f} TB/s "
                f"in a copy. To start an addition the host needs {about['host_us_of_an_addition']:.0f} µs, a kernel of "
                f"ours {about['host_us_of_a_kernel']:.0f} µs.",
                "",
            ]
        for name, (title, rows_of) in GPU_PARTS.items():
            part = parts.get(name, {"status": "not run", "results": None})
            notes = [f"commit {part.get('commit') or about.get('commit', 'unknown')}"]
            notes += [f"exit status {part['status']}"] if part["status"] not in ("0", "not run") else []
            notes += [part["note"]] if "note" in part else []
            if name == "tests":
                lines += [
                    f"**{title}** ({'; '.join(notes)}): {part.get('last_line', '').strip('= ') or 'no result'}",
                    "",
                ]
            elif part["results"]:
                lines += [f"**{title}** ({'; '.join(notes)})", "", rows_of(part["results"]), ""]
            else:
                lines += [f"**{title}**: no result ({part['status']})", ""]
    return lines


def values_of(row: dict, **formats: str) -> list[str]:
    """A row's values, each in its format; empty where the row has none."""
    return [format(row[name], form) if name in row else "" for name, form in formats.items()]


def _curve(rows: list[dict]) -> str:
    header = ["length", "sequences", "tokens/s", "fill", "microbatches", "copied", "dropout", "peak GiB"]
    body = []
    for row in sorted(rows, key=lambda row: (row["length"], row["microbatches"], row["sequences"])):
        speed = values_of(row, tokens_per_s=",.0f")[0] or "out of memory"
        rest = (str(row[name]) for name in ("fill", "microbatches", "copy"))
        numbers = [f"{row['dropout']:g}", *values_of(row, peak_gib=".1f")]
        body.append([str(row["length"]), str(row["sequences"]), speed, *rest, *numbers])
    return report.table(header, body)


def _trainer(rows: list[dict]) -> str:
    header = ["microbatch", "tokens/s", "fill", "MFU", "waiting for data"]
    formats = {"step/tokens_per_s": ",.0f", "step/fill": ".2f", "step/mfu": ".2f", "step/data_wait_share": ".2f"}
    return report.table(header, [[str(row["microbatch"]), *values_of(row, **formats)] for row in rows])


def _kernels(found: dict) -> str:
    header = ["kernel", "size", "implementation", "ms, minimum", "ms, median", "time / ours, median", "error"]
    formats = {"ms": ".2f", "ms_median": ".2f", "times_ours": ".2f", "error": ".1e"}
    names = ("case", "size", "implementation")
    return report.table(header, [[*(row[name] for name in names), *values_of(row, **formats)] for row in found["rows"]])


def _profile(found: dict) -> str:
    body = []
    for name, step in found.items():
        longest = ", ".join(f"{k['name'].split('<')[0][:40]} {k['ms']:.1f} ms" for k in step["kernels"][:4])
        body.append([name, str(step["launches"]), f"{step['busy_share'] * step['ms']:.1f}", longest])
    return report.table(["step", "kernels", "ms in all of them", "the longest"], body)


def _tiles(found: dict) -> str:
    body = [
        [row["kernel"], tile, *(f"{ms:.3f}" for ms in by_length.values())]
        for row in found["rows"]
        for tile, by_length in row["ms"].items()
    ]
    lengths = next(iter(found["rows"][0]["ms"].values()))
    return report.table(["kernel", "rows, columns, warps, stages", *lengths], body)


def _model(rows: list[dict]) -> str:
    header = ["dtype", "length", "error of the loss", "of the gradients"]
    formats = {"dtype": "", "length": "", "loss_error": ".0e", "gradient_error": ".1e"}
    return report.table(header, [values_of(row, **formats) for row in rows])


GPU = "../benchmarks/results/"
GPU_PARTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "tests": ("Tests", str),
    "model": ("Two layers of base widths, compared with the same weights run plainly", _model),
    "curve": ("A step of base size, bf16, AdamW", _curve),
    "profile": ("Kernels of a step", _profile),
    "trainer": ("main.py with Composer, length 128", _trainer),
    "attention": ("Attention, forward and backward", _kernels),
    "rowwise": ("Other kernels, forward and backward", _kernels),
    "tiles": ("Tiles of the attention kernels, ms by length", _tiles),
}
"""Parts of run.sh that have a table; those of benchmarks.step are in the pages of that."""


BLOCKS: dict[str, Callable[[], list[str]]] = {
    "step": step,
    "gpu": gpu,
    "time to loss": time_to_loss,
    "taken away": partial(changes, TAKEN_AWAY, "taken away"),
    "changed": partial(changes, CHANGED, "changed"),
    "quality": quality,
    "extrapolation": extrapolation,
    **{f"scaling {part}": partial(scaling, part) for part in TABLES},
}


def filled(text: str, name: str) -> str:
    """A page with its blocks written anew.

    Raises:
        SystemExit: a block's name is none.
    """

    def block(match: re.Match[str]) -> str:
        if match[2] not in BLOCKS:
            sys.exit(f"{name}: there is no block {match[2]!r}; there are {', '.join(BLOCKS)}")
        lines = BLOCKS[match[2]]() or ["Not measured yet.", ""]
        return match[1] + "\n" + "\n".join(lines) + "\n" + match[3]

    return BLOCK.sub(block, text)


def page() -> str:
    """docs/results.md."""
    parts = [
        "# Results",
        "",
        "Made by `python -m benchmarks.publish`, of [benchmarks/results](../benchmarks/results); each file there names",
        "the script that wrote it. The kernels, compiled for seven architectures, are in",
        "[kernels_aot.md](../benchmarks/results/kernels_aot.md); how cost grows is in [scaling.md](scaling.md).",
        "",
    ]
    for name in PAGES:
        for device in FIRST:
            path = RESULTS / f"{name}-{device}.md"
            if path.exists():
                title, _, text = path.read_text().strip().partition("\n")
                text = re.sub(r"^#", "##", f"{title} ({device})\n{text}", flags=re.MULTILINE)
                parts += [re.sub(r"\]\((?=[\w-]+\.png)", "](../benchmarks/results/", text), ""]
    for name, title in LINES.items():
        if (RESULTS / name).exists():
            text = (RESULTS / name).read_text().strip()
            parts += [f"## {title}", "", f"[{name}](../benchmarks/results/{name})", "", "```", text, "```", ""]
    return "\n".join(parts).rstrip() + "\n"


def main(argv: list[str]) -> None:
    """Write, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    wanted = {path: filled(path.read_text(), path.name) for path in pages if path.name != "results.md"}
    wanted[ROOT / "docs" / "results.md"] = page()
    for path, text in wanted.items():
        if args.check and (not path.exists() or path.read_text() != text):
            sys.exit(f"{path.name} is not what benchmarks/results says; run python -m benchmarks.publish")
        if not args.check:
            path.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
