"""Write docs/results.md and the measured blocks of README and docs from benchmarks/results.

    python -m benchmarks.publish            # write them
    python -m benchmarks.publish --check    # exit status 1 if they are not as it would write them

docs/results.md is made of the Markdown and text files there. A block stands between ``<!-- measured: NAME -->``, NAME
one of BLOCKS, and ``<!-- end -->``. Of a benchmark with results of several devices, it shows the first of DEVICES.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks import report
from benchmarks.speed.scaling import TABLES, table

ROOT = report.ROOT
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- measured: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
DEVICES = ("cuda", "cpu")
PAGES = ("step", "time_to_loss", "quality", "extrapolation")
"""Files NAME-DEVICE.md that docs/results.md holds, in its order."""
TEXTS = {
    "data-cpu.txt": "Loader, conversion, a large dataset's start",
    "startup-cpu.txt": "From the first line to the first step",
    "order-cpu.txt": "Order by length",
    "faults-cpu.txt": "Killed and started again",
}
"""Text files that it holds, and their titles."""
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
    "no_alibi": "ALiBi (learned positions instead)",
    "no_glu": "gated linear units (a plain layer of the same FLOPs instead)",
    "no_unpadding": "unpadding",
    "no_masked_rows": "the last layer on masked rows only",
    "no_masked_head": "the head on masked rows only, and the last layer",
    "mask_15": "30% masking (15% instead)",
}
CHANGED = {
    "dropout_0": "dropout 0 instead of 0.1",
    "masking_falls": "masking that falls from 30% to 15%",
    "no_decay_groups": "no weight decay on biases and norms",
    "warmup_stable_decay": "learning rate stable for 70% of the run, then falling",
    "nadamw": "AdamW with Nesterov momentum",
    "fast": "dropout 0 and a stable learning rate: `mosaic_bert_fast.yaml`",
}


def device_of(name: str) -> str | None:
    """The first of DEVICES that a benchmark has results of."""
    return next((device for device in DEVICES if (RESULTS / f"{name}-{device}.json").exists()), None)


def load(name: str) -> Any:
    """A benchmark's results; None: there are none."""
    device = device_of(name)
    return None if device is None else json.loads((RESULTS / f"{name}-{device}.json").read_text())


def link(name: str, suffix: str) -> str:
    """A benchmark's results file, from the repository's root."""
    return f"benchmarks/results/{name}-{device_of(name)}.{suffix}"


def values_of(row: dict, **formats: str) -> list[str]:
    """A row's values, each in its format; empty if the row has none."""
    return [format(row[name], form) if name in row else "" for name, form in formats.items()]


def low_to_high(row: dict, form: str) -> str:
    return f"{row['low']:{form}} to {row['high']:{form}}"


def commits(found: dict[str, Any], *names: str) -> str:
    """The commits at which these recipes ran."""
    known = sorted({run["machine"]["commit"] for name in names for run in found["curves"][name]})
    return f"commit{'s' * (len(known) > 1)} {', '.join(known)}"


def step() -> list[str]:
    """A training step at C4's lengths."""
    cells = [cell for cell in load("step") or [] if cell["fill"] == "c4"]
    if not cells:
        return []
    rows = []
    for cell in cells:
        for name, row in cell["arms"].items():
            ratio = f"{row['time_ratio']:.2f} ({row['time_ratio_low']:.2f} to {row['time_ratio_high']:.2f})"
            memory = f"{row['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in row else ""
            speed, flops = values_of(row, tokens_per_s=",.0f", flop_ratio=".2f")
            rows.append([str(cell["length"]), NAMES[name], speed, ratio, flops, memory])
    cell = cells[0]
    sizes = ", ".join(f"{c['sequences']} sequences at {c['length']} ({c['real_share']:.0%} not padding)" for c in cells)
    header = ["length", "model", "tokens per second", "time / ours, median (range)", "FLOPs / ours", "GiB"]
    overhead = ", ".join(f"{c['overhead_share']:.0%} at {c['length']}" for c in cells)
    return [
        f"A training step (forward, backward, AdamW) of {cell['layers']} layers of 768 on {cell['machine']['device']}: "
        f"{sizes}, lengths like C4's, {cell['masked']:.0%} masked, {cell['rounds']} interleaved rounds, commit "
        f"{', '.join(dict.fromkeys(c['machine']['commit'] for c in cells))}; `python -m benchmarks.speed.step` "
        f"([full results]({link('step', 'md')})).",
        "",
        report.table(header, rows),
        "",
        f"Padding does not count as tokens. A ratio above 1 means that ours is faster; tokens per second are those of "
        f"the fastest round. Non-matmul overhead of our step: {overhead}.",
        "",
    ]


def time_to_loss() -> list[str]:
    """Time to a given quality."""
    found = load("time_to_loss")
    if not found or not found["ratios"]:
        return []
    settings, rows = found["settings"], []
    for name, r in found["ratios"].items():
        loss = statistics.mean(run["points"][-1]["loss"] for run in found["curves"][name])
        rows.append([NAMES[name], f"{loss:.3f}", f"{r['ratio']:.2f}", low_to_high(r, ".2f")])
    header = ["baseline", "its final loss", "time of ours to it / the baseline's", "95% interval (seeds)"]
    return [
        "Time to the same validation loss: small models trained from scratch on Wikipedia leads, "
        f"{settings['minutes']:g} minutes each, {settings['seeds']} seeds, learning rates searched with equal effort, "
        f"on {found['machine']['device']}, {commits(found, 'ours', *found['ratios'])}; "
        f"`python -m benchmarks.learning.time_to_loss` ([how]({link('time_to_loss', 'md')})).",
        "",
        report.table(header, rows),
        "",
        f"![loss over time]({link('time_to_loss', 'png')})",
        "",
    ]


def changes(names: dict[str, str], title: str) -> list[str]:
    """The effect of parts of the recipe, or of changes of it, on the time to the same loss."""
    found = load("time_to_loss")
    measured = {name: found["changes"][name] for name in names if found and name in found["changes"]}
    if not measured:
        return []
    rows = [[names[n], *values_of(c, final=".3f", worth=".2f"), low_to_high(c, ".2f")] for n, c in measured.items()]
    header = [title, "final loss", "time to the same loss / ours", "95% interval (seeds)"]
    return [report.table(header, rows), "", f"{commits(found, *measured).capitalize()}.", ""]


def quality() -> list[str]:
    """Accuracy after fine-tuning."""
    found = load("quality")
    if not found:
        return []
    settings, rows = found["settings"], []
    for task, results in found["tasks"].items():
        accuracy = {name: statistics.fmean(sum(runs["test"], [])) for name, runs in results["arms"].items()}
        for baseline, d in results["differences"].items():
            numbers = f"{accuracy['ours']:.3f}", NAMES[baseline], f"{accuracy[baseline]:.3f}"
            rows.append([task, *numbers, f"{d['mean']:+.3f}", low_to_high(d, "+.3f")])
    return [
        f"Test accuracy after fine-tuning on {settings['rows']:,} rows, of small models pretrained from scratch on the "
        f"same text for {settings['minutes']:g} minutes of {found['machine']['device']}: topics of Wikipedia leads (11 "
        f"classes), sentences of Rotten Tomatoes (2). {settings['seeds']} pretraining seeds, "
        f"{settings['finetuning_seeds']} fine-tuning seeds each, commit {found['machine']['commit']}; "
        f"`python -m benchmarks.learning.quality` ([how]({link('quality', 'md')})).",
        "",
        report.table(["task", "MosaicBERT", "baseline", "its accuracy", "difference", "95% interval"], rows),
        "",
    ]


def extrapolation() -> list[str]:
    """Loss above the training length."""
    found = load("extrapolation")
    if not found:
        return []
    differences, rows = [None, *found["differences"].values()], []
    for (length, each), d in zip(found["losses"]["ours"].items(), differences, strict=True):
        change = ["", ""] if d is None else [f"{d['mean']:+.4f}", low_to_high(d, "+.4f")]
        rows.append([length, f"{statistics.fmean(each):.4f}", *change])
    (trained, hf), *_ = found["losses"]["hf_bert"].items()
    return [
        f"Above the training length: the same models, pretrained at {trained} tokens, on {found['reviews']} film "
        f"reviews, the same {found['masked']:,} masked tokens at each length. HF BERT has a loss of "
        f"{statistics.fmean(hf):.4f} at {trained}, where its positions end; commit {found['machine']['commit']}, "
        f"`python -m benchmarks.learning.extrapolation` ([how]({link('extrapolation', 'md')})).",
        "",
        report.table(["tokens", "MosaicBERT's loss", f"difference to {trained}", "95% interval"], rows),
        "",
    ]


def scaling(part: str) -> list[str]:
    """A part of benchmarks/speed/scaling.py."""
    found = (load("scaling") or {}).get(part)
    if not found:
        return []
    return [f"{report.described(found['machine'])}; `{found['command']}`.", "", table(part, found["rows"]), ""]


def gpu() -> list[str]:
    """docs/gpu.md: for each card, gpu-CARD.json, which benchmarks/gpu/run.sh wrote.

    ``commit`` and ``note`` of a part are added by hand if it ran at another commit or did not finish.
    """
    lines = []
    for path in sorted(RESULTS.glob("gpu-*.json")):
        parts = json.loads(path.read_text())
        about = parts.get("environment", {}).get("results") or {}
        machine = {name: about[name] for name in ("device", "python", "torch", "triton", "date") if name in about}
        described = report.described(machine) if machine else "Unknown machine"
        lines += [f"### {about.get('device', path.stem.removeprefix('gpu-'))}", ""]
        lines += [f"{described}. [{path.name}](../benchmarks/results/{path.name})", ""]
        if "matmul_tflops" in about:  # not on a CPU
            lines += [
                f"Measured: {about['matmul_tflops']:.0f} TFLOP/s in a bf16 product, {about['copy_tb_per_s']:.1f} TB/s "
                f"in a copy. The host needs {about['host_us_of_an_addition']:.0f} µs to launch an addition, "
                f"{about['host_us_of_a_kernel']:.0f} µs to launch a kernel of ours.",
                "",
            ]
        for name, (title, rows_of) in GPU_PARTS.items():
            part = parts.get(name, {"status": "not run", "results": None})
            notes = [f"commit {part.get('commit') or about.get('commit', 'unknown')}"]
            notes += [f"exit status {part['status']}"] if part["status"] not in ("0", "not run") else []
            notes += [part["note"]] if "note" in part else []
            if name == "tests":
                said = part.get("last_line", "").strip("= ") or "no result"
                lines += [f"**{title}** ({'; '.join(notes)}): {said}", ""]
            elif part["results"]:
                lines += [f"**{title}** ({'; '.join(notes)})", "", rows_of(part["results"]), ""]
            else:
                lines += [f"**{title}**: no result ({part['status']})", ""]
    return lines


def _curve(rows: list[dict]) -> str:
    header = ["length", "sequences", "tokens per second", "fill", "microbatches", "copied", "dropout", "peak GiB"]
    body = []
    for row in sorted(rows, key=lambda row: (row["length"], row["microbatches"], row["sequences"])):
        speed = values_of(row, tokens_per_s=",.0f")[0] or "out of memory"
        rest = (str(row[name]) for name in ("fill", "microbatches", "copy"))
        numbers = [f"{row['dropout']:g}", *values_of(row, peak_gib=".1f")]
        body.append([str(row["length"]), str(row["sequences"]), speed, *rest, *numbers])
    return report.table(header, body)


def _trainer(rows: list[dict]) -> str:
    header = ["microbatch", "tokens per second", "fill", "MFU", "waiting for data"]
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
    return report.table(["step", "kernels", "ms in all kernels", "the longest"], body)


def _tiles(found: dict) -> str:
    body = [
        [row["kernel"], tile, *(f"{ms:.3f}" for ms in by_length.values())]
        for row in found["rows"]
        for tile, by_length in row["ms"].items()
    ]
    lengths = next(iter(found["rows"][0]["ms"].values()))
    return report.table(["kernel", "rows, columns, warps, stages", *lengths], body)


def _model(rows: list[dict]) -> str:
    header = ["dtype", "length", "error of the loss", "error of the gradients"]
    formats = {"dtype": "", "length": "", "loss_error": ".0e", "gradient_error": ".1e"}
    return report.table(header, [values_of(row, **formats) for row in rows])


GPU_PARTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "tests": ("Tests", str),
    "model": ("Two layers of base widths, compared with a plain implementation", _model),
    "curve": ("A training step, base size, bf16, AdamW", _curve),
    "profile": ("Kernels of a step", _profile),
    "trainer": ("main.py with Composer, length 128", _trainer),
    "attention": ("Attention, forward and backward", _kernels),
    "rowwise": ("Other kernels, forward and backward", _kernels),
    "tiles": ("Tiles of the attention kernels, ms by length", _tiles),
}
"""Parts of run.sh that docs/gpu.md shows, with their titles; those of benchmarks.speed.step are on its own pages."""

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
    """A page with new text in its blocks.

    Raises:
        SystemExit: an unknown block.
    """

    def block(match: re.Match[str]) -> str:
        if match[2] not in BLOCKS:
            sys.exit(f"{name}: unknown block {match[2]!r}; blocks: {', '.join(BLOCKS)}")
        lines = BLOCKS[match[2]]() or ["Not measured yet.", ""]
        return match[1] + "\n" + "\n".join(lines) + "\n" + match[3]

    return BLOCK.sub(block, text)


def page() -> str:
    """docs/results.md."""
    parts = [
        "# Results",
        "",
        "Made by `python -m benchmarks.publish` from [benchmarks/results](../benchmarks/results). Each file there",
        "names the script that wrote it. In older files a variant is an arm, and tokens are real tokens. Elsewhere:",
        "kernels compiled for seven architectures ([kernels_aot.md](../benchmarks/results/kernels_aot.md)), how cost",
        "grows ([scaling.md](scaling.md)), and all figures of a GPU ([gpu.md](gpu.md)).",
        "",
    ]
    for name in PAGES:
        for device in DEVICES:
            path = RESULTS / f"{name}-{device}.md"
            if path.exists():
                title, _, text = path.read_text().strip().partition("\n")
                text = re.sub(r"^#", "##", f"{title} ({device})\n{text}", flags=re.MULTILINE)
                parts += [re.sub(r"\]\((?=[\w-]+\.png)", "](../benchmarks/results/", text), ""]
    for name, title in TEXTS.items():
        if (RESULTS / name).exists():
            text = (RESULTS / name).read_text().strip()
            parts += [f"## {title}", "", f"[{name}](../benchmarks/results/{name})", "", "```", text, "```", ""]
    return "\n".join(parts).rstrip() + "\n"


def main(argv: list[str]) -> None:
    """Write the pages, or compare them."""
    parser = report.parser(__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    wanted = {path: filled(path.read_text(), path.name) for path in pages if path.name != "results.md"}
    wanted[ROOT / "docs" / "results.md"] = page()
    for path, text in wanted.items():
        if args.check and (not path.exists() or path.read_text() != text):
            sys.exit(f"{path.name} differs from benchmarks/results; run python -m benchmarks.publish")
        if not args.check:
            path.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
