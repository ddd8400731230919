"""Write docs/results.md and the measured and calculated blocks of README and docs from benchmarks/results.

    python -m benchmarks.publish            # write them
    python -m benchmarks.publish --check    # exit status 1 if they are not as it would write them

docs/results.md is made of the Markdown and text files there. A block stands between ``<!-- KIND: NAME -->``, NAME one
of BLOCKS, and ``<!-- end -->``. KIND is ``measured``, or what CALCULATED says. Of a benchmark with results of several
devices, a block shows the first of DEVICES.
"""

import itertools
import json
import operator
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from benchmarks import report
from benchmarks.speed import roofline
from benchmarks.speed.scaling import TABLES
from benchmarks.speed.step import TIME_RATIO
from src.common.environment import ROOT

RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- ([a-z ]+): (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
DEVICES = ("cuda", "cpu")
PAGES = ("step", "time_to_loss", "time_to_loss_changes", "quality")
"""Files NAME-DEVICE.md that docs/results.md holds, in its order."""
TEXTS = {
    "data-cpu.txt": "Loader, conversion, a large dataset's start",
    "order-cpu.txt": "Order by length",
    "faults-cpu.txt": "Killed and started again",
    "forms-cpu.txt": "Forms of text",
    "int8-cpu.txt": "int8",
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
    "ours": "`mosaic_bert.yaml`",
    "muon": "Muon for the layers' matrices",
    "soap": "SOAP",
    "dropout_0": "dropout 0 instead of 0.1",
    "stable_to_0": "rate stable for 70% of the run, then falling to 0",
    "stable_sqrt": "the same, falling by 1 - sqrt",
    "short_first": "32, then 64, then 128 tokens",
    "batch_warmup": "a quarter, then half of the batch size first",
    "masking_20": "20% masked instead of 30%",
    "masking_40": "40% masked",
    "masking_falls": "masking that falls from 40% to 15%",
    "embeddings_3x": "three times the rate for embeddings",
    "decay_matrices": "no weight decay on biases and norms",
    "scaled_init": "smaller initial weights at the residual stream",
    "z_loss": "z-loss of 1e-4",
    "muon_together": "Muon, dropout 0, stable rate falling to 0",
    "muon_half_together": "the same, half the rate for what AdamW updates",
    "soap_together": "SOAP, dropout 0, stable rate falling to 0",
}
FORMS = {
    "txt": ("one document per line", "Python", "test_text_is_read_under_each_compression"),
    "jsonl": ('`{"text": "…"}` per line', "Python", "test_text_is_read_under_each_compression"),
    "json": ("the same, an array, or objects over several lines", "Python", "test_json_over_several_lines_is_read"),
    "csv": ("a header, rows quoted as by a spreadsheet", "Python", "test_rows_of_csv"),
    "tsv": ("the same with tabs", "Python", "test_text_is_read_under_each_compression"),
    "parquet": ("`part-00000.parquet`, also of Spark", "pyarrow", "test_tables_hold_strings_in_many_types"),
    "arrow": ("a folder of `save_to_disk`", "pyarrow", "test_a_folder_of_save_to_disk_is_a_source"),
    "mds": ("shards of `MDSWriter`", "streaming", "test_mds_holds_text_as_strings_or_bytes"),
    "streaming-json": ("shards of `JSONWriter`, `CSVWriter`", "streaming", "test_other_shards_of_streaming_are_read"),
    "jsonl.gz": ("", "Python", "test_damaged_streams_are_named"),
    "jsonl.bz2": ("", "Python", "test_damaged_streams_are_named"),
    "jsonl.xz": ("", "Python", "test_damaged_streams_are_named"),
    "jsonl.zst": ("also `.zstd`, and windows up to 2 GB", "zstandard", "test_zstd_of_long_windows"),
    "csv.zst": ("", "Python, zstandard", "test_text_is_read_under_each_compression"),
}
"""Forms of text: an example, the library that reads it, a test."""


def commits(runs: Iterable[dict[str, Any]]) -> str:
    """The commits at which these ran."""
    known = sorted({run["machine"]["commit"] for run in runs})
    return f"commit{'s' * (len(known) > 1)} {', '.join(known)}"


def step(cells: list[dict], path: str) -> list[str]:
    """A training step at C4's lengths."""
    cells = [cell for cell in cells if cell["fill"] == "c4"]
    titles = "length | model | tokens per second | time / ours, median (range) | FLOPs / ours | GiB"
    row = f"{{length}} | {{model}} | {{tokens_per_s:,.0f}} | {TIME_RATIO} | {{flop_ratio:.2f}} | {{peak_bytes:Gi.1f}}"
    rows = [
        {"length": cell["length"], "model": NAMES[name], **row} for cell in cells for name, row in cell["arms"].items()
    ]
    sizes = ", ".join(f"{c['sequences']} sequences at {c['length']} ({c['real_share']:.0%} not padding)" for c in cells)
    overhead = ", ".join(f"{c['overhead_share']:.0%} at {c['length']}" for c in cells)
    cell = cells[0]
    return [
        f"A training step (forward, backward, AdamW) of {cell['layers']} layers of 768 on {cell['machine']['device']}: "
        f"{sizes}, lengths like C4's, {cell['masked']:.0%} masked, {cell['rounds']} interleaved rounds, commit "
        f"{', '.join(dict.fromkeys(c['machine']['commit'] for c in cells))}; `python -m benchmarks.speed.step` "
        f"([full results]({path}.md)).",
        report.table(titles, row, rows),
        f"Padding does not count as tokens. A ratio above 1 means that ours is faster; tokens per second are those of "
        f"the fastest round. Non-matmul overhead of our step: {overhead}.",
    ]


def time_to_loss(found: dict[str, Any], path: str) -> list[str]:
    """Time to a given quality."""
    settings, runs = found["settings"], {name: found["curves"][name] for name in ("ours", *found["ratios"])}
    rows = [
        {"name": NAMES[name], "loss": statistics.mean(run["points"][-1]["loss"] for run in runs[name]), **ratio}
        for name, ratio in found["ratios"].items()
    ]
    titles = "baseline | its final loss | time of ours to it / the baseline's | 95% interval (seeds)"
    row = "{name} | {loss:.3f} | {ratio:.2f} | {low:.2f} to {high:.2f}"
    return [
        "Time to the same validation loss: small models trained from scratch on Wikipedia leads, "
        f"{settings['minutes']:g} minutes each, {settings['seeds']} seeds, learning rates searched with equal effort, "
        f"on {found['machine']['device']}, {commits(itertools.chain(*runs.values()))}; "
        f"`python -m benchmarks.learning.time_to_loss` ([how]({path}.md)).",
        report.table(titles, row, rows),
        f"![loss over time]({path}.png)",
    ]


def taken_away(found: dict[str, Any], path: str) -> list[str]:
    """The effect of parts of the recipe on the time to the same loss."""
    measured = [name for name in TAKEN_AWAY if name in found["changes"]]
    titles = "taken away | final loss | time to the same loss / ours | 95% interval (seeds)"
    row = "{name} | {final:.3f} | {worth:.2f} | {low:.2f} to {high:.2f}"
    table = report.table(titles, row, [{"name": TAKEN_AWAY[name], **found["changes"][name]} for name in measured])
    return [table, f"{commits(run for name in measured for run in found['curves'][name]).capitalize()}."]


def changed(found: dict[str, Any], path: str) -> list[str]:
    """The effect of changes of the recipe on the time to the same loss."""
    curves, setup = found["curves"], found["settings"]
    ours = statistics.fmean(curves["ours"][0]["step_seconds"])
    rows = []
    for name in (name for name in CHANGED if name in curves):
        run, masking = curves[name][0], dict.fromkeys(found["recipes"][name]["masking"])
        row = {"name": CHANGED[name], "masked": " to ".join(f"{rate:.0%}" for rate in masking), **run}
        row |= {"final": statistics.fmean(run["points"][-1]["loss"] for run in curves[name])}
        row |= {"step": statistics.fmean(run["step_seconds"]) / ours}
        effect = found["found"].get(name)
        row["time"] = "{worth:.2f} ({low:.2f} to {high:.2f})".format(**effect) if effect else "1"
        rows.append(row)
    passes = statistics.fmean(run["passes"] for run in curves["ours"])
    titles = "recipe | masked | M parameters | learning rate | time per step / ours | final loss | "
    row = "{name} | {masked} | {parameters:M.2f} | {rate:g} | {step:.2f} | {final:.3f} | {time}"
    return [
        f"Changes of the recipe: {setup['shape']['layers']} layers of {setup['shape']['hidden']}, trained from scratch "
        f"on 9 million tokens of film reviews and Wikipedia leads for {setup['minutes']:g} minutes ({passes:.1f} "
        f"passes), {setup['seeds']} seeds, the learning rate of each searched with equal effort, on "
        f"{found['machine']['device']}, {commits(itertools.chain(*curves.values()))}; `python -m "
        f"benchmarks.learning.time_to_loss changes` ([how]({path}.md)).",
        report.table(f"{titles}time to the same loss / ours (95%, seeds)", row, rows),
    ]


def quality(found: dict[str, Any], path: str) -> list[str]:
    """Accuracy after fine-tuning."""
    settings, rows = found["settings"], []
    for task, results in found["tasks"].items():
        accuracy = {name: statistics.fmean(sum(runs["test"], [])) for name, runs in results["arms"].items()}
        for baseline, difference in results["differences"].items():
            numbers = {"ours": accuracy["ours"], "accuracy": accuracy[baseline], **difference}
            rows.append({"task": task, "baseline": NAMES[baseline], **numbers})
    titles = "task | MosaicBERT | baseline | its accuracy | difference | 95% interval"
    row = "{task} | {ours:.3f} | {baseline} | {accuracy:.3f} | {mean:+.3f} | {low:+.3f} to {high:+.3f}"
    return [
        f"Test accuracy after fine-tuning on {settings['rows']:,} rows, of small models pretrained from scratch on the "
        f"same text for {settings['minutes']:g} minutes of {found['machine']['device']}: topics of Wikipedia leads (11 "
        f"classes), sentences of Rotten Tomatoes (2). {settings['seeds']} pretraining seeds, "
        f"{settings['finetuning_seeds']} fine-tuning seeds each, commit {found['machine']['commit']}; "
        f"`python -m benchmarks.learning.quality` ([how]({path}.md)).",
        report.table(titles, row, rows),
    ]


def extrapolation(found: dict[str, Any], path: str) -> list[str]:
    """Loss above the training length."""
    found = found["extrapolation"] | {"machine": found["machine"]}
    (trained, hf), *_ = found["losses"]["hf_bert"].items()
    differences = [{}, *found["differences"].values()]
    titles = f"tokens | MosaicBERT's loss | difference to {trained} | 95% interval"
    row = "{length} | {loss:.4f} | {mean:+.4f} | {low:+.4f} to {high:+.4f}"
    rows = [
        {"length": length, "loss": statistics.fmean(each), **difference}
        for (length, each), difference in zip(found["losses"]["ours"].items(), differences, strict=True)
    ]
    return [
        f"Above the training length: the same models, pretrained at {trained} tokens, on {found['reviews']} film "
        f"reviews, the same {found['masked']:,} masked tokens at each length. HF BERT has a loss of "
        f"{statistics.fmean(hf):.4f} at {trained}, where its positions end; commit {found['machine']['commit']}, "
        f"`python -m benchmarks.learning.quality` ([how]({path}.md)).",
        report.table(titles, row, rows),
    ]


def scaling(part: str, found: dict[str, Any], path: str) -> list[str]:
    """A part of benchmarks/speed/scaling.py."""
    results = found[part]
    machine = results["machine"]
    about = (
        f"Calculated at commit {machine['commit']}" if f"scaling {part}" in CALCULATED else report.described(machine)
    )
    return [f"{about}; `{results['command']}`.", report.table(*TABLES[part], results["rows"])]


def of_roofline() -> list[str]:
    """Calculated and measured times of the profiled steps."""
    path = RESULTS / "gpu-h200.json"
    profile = json.loads(path.read_text())["profile"]
    about = f"Calculated / measured, ms on an H200, the code of commit {profile['commit']} ([results]"
    return [f"{about}(../benchmarks/results/{path.name})).", roofline.compared(profile["results"])]


def forms() -> list[str]:
    """Documents per second of each form of text."""
    path = RESULTS / "forms-cpu.txt"
    about, *lines = path.read_text().splitlines()
    *found, last = (dict(field.split("=") for field in line.split()[1:]) for line in lines)
    rows = []
    for fields in found:
        numbers = {name: int(value) for name, value in fields.items() if name != "name"}
        example, library, test = FORMS[fields["name"]]
        rows.append({"name": fields["name"], "example": example, "library": library, "test": test, **numbers})
    titles = "form | example | read by | documents per second, read | converted | test"
    row = "`{name}` | {example} | {library} | {read_docs_per_s:,} | {convert_docs_per_s:,} | `{test}`"
    return [
        report.table(titles, row, rows),
        f"Per second of CPU time: reading alone, and from the file to shards of text. {about.removeprefix('# ')}; "
        f"Wikipedia leads, `python -m benchmarks.speed.forms` ([results](../benchmarks/results/{path.name})). Reading "
        f"{last['text_mb']} MB of text from one `.jsonl.zst` takes {last['memory_mb']} MB of memory at the peak, "
        f"{last['imports_mb']} MB of them before reading.",
    ]


def int8() -> list[str]:
    """What int8 costs and gains."""
    path = RESULTS / "int8-cpu.txt"
    about, *lines = path.read_text().splitlines()
    rows = [dict(field.split("=") for field in line.split()[1:]) for line in lines]
    titles = "form | nats per masked token | accuracy | file, MB | ms, 1 sequence | ms, 32 sequences"
    row = "`{form}` | {loss} | {accuracy} | {mb} | {ms_1} | {ms_32}"
    return [
        report.table(titles, row, rows),
        f"Latencies are minima over interleaved rounds. {about.removeprefix('# ')}; "
        f"`python -m benchmarks.speed.int8` ([results](../benchmarks/results/{path.name})).",
    ]


def of(name: str, lines: Callable[[Any, str], list[str]]) -> list[str]:
    """What ``lines`` makes of a benchmark's results of the first of DEVICES, and of their path without its suffix."""
    paths = (RESULTS / f"{name}-{device}.json" for device in DEVICES)
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return ["Not measured yet."]
    return lines(json.loads(path.read_text()), f"benchmarks/results/{path.stem}")


def gpu() -> list[str]:
    """docs/gpu.md: for each card, gpu-CARD.json, which benchmarks/gpu/run.sh wrote.

    ``commit`` and ``note`` of a part are added by hand if it ran at another commit or did not finish.
    """
    lines = []
    for path in sorted(RESULTS.glob("gpu-*.json")):
        parts = json.loads(path.read_text())
        about = parts["environment"]["results"]
        machine = {name: about[name] for name in ("device", "python", "torch", "triton", "date") if name in about}
        lines += [f"### {about['device']}"]
        lines += [f"{report.described(machine)}. [{path.name}](../benchmarks/results/{path.name})"]
        if "matmul_tflops" in about:  # not on a CPU
            lines += [
                f"Measured: {about['matmul_tflops']:.0f} TFLOP/s in a bf16 product, {about['copy_tb_per_s']:.1f} TB/s "
                f"in a copy. The host needs {about['host_us_of_an_addition']:.0f} µs to launch an addition, "
                f"{about['host_us_of_a_kernel']:.0f} µs to launch a kernel of ours.",
            ]
        for name, (title, table) in GPU_PARTS.items():
            part = parts.get(name, {"status": "not run", "results": None})
            notes = [f"commit {part.get('commit', about['commit'])}"]
            notes += [f"exit status {part['status']}"] if part["status"] not in ("0", "not run") else []
            notes += [part["note"]] if "note" in part else []
            if name == "tests":
                said = part.get("last_line", "").strip("= ") or "no result"
                lines.append(f"**{title}** ({'; '.join(notes)}): {said}")
            elif part["results"]:
                lines += [f"**{title}** ({'; '.join(notes)})", table(part["results"])]
            else:
                lines.append(f"**{title}**: no result ({part['status']})")
    return lines


def curve(rows: list[dict]) -> str:
    for setting in rows:
        setting["speed"] = f"{setting['tokens_per_s']:,.0f}" if "tokens_per_s" in setting else "out of memory"
        setting["tflops"] = f"{setting['tflops']:.0f}" if "tflops" in setting else "not counted"
    return report.table(
        "length | sequences | tokens per second | TFLOP/s | fill | microbatches | copied | dropout | peak GiB",
        "{length} | {sequences} | {speed} | {tflops} | {fill} | {microbatches} | {copy} | {dropout:g} | {peak_gib:.1f}",
        sorted(rows, key=operator.itemgetter("length", "microbatches", "sequences")),
    )


def profile(found: dict) -> str:
    for name, step in found.items():
        longest = (f"{kernel['name'].split('<')[0][:40]} {kernel['ms']:.1f} ms" for kernel in step["kernels"][:4])
        step |= {"name": name, "busy": step["busy_share"] * step["ms"], "longest": ", ".join(longest)}
    titles = "step | kernels | ms in all kernels | the longest"
    return report.table(titles, "{name} | {launches} | {busy:.1f} | {longest}", found.values())


def kernels(found: dict) -> str:
    titles = "kernel | size | implementation | ms, minimum | ms, median | time / ours, median | error"
    row = "{case} | {size} | {implementation} | {ms:.2f} | {ms_median:.2f} | {times_ours:.2f} | {error:.1e}"
    return report.table(titles, row, found["rows"])


def tiles(found: dict) -> str:
    by_tile = [(row["kernel"], *tile) for row in found["rows"] for tile in row["ms"].items()]
    rows = [{"kernel": kernel, "tile": tile, "ms": [*ms.values()]} for kernel, tile, ms in by_tile]
    lengths = by_tile[0][2]
    times = (f"{{ms[{i}]:.3f}}" for i in range(len(lengths)))
    titles = " | ".join(["kernel", "rows, columns, warps, stages", *lengths])
    return report.table(titles, " | ".join(["{kernel}", "{tile}", *times]), rows)


model = partial(
    report.table,
    "dtype | length | error of the loss | error of the gradients",
    "{dtype} | {length} | {loss_error:.0e} | {gradient_error:.1e}",
)
trainer = partial(
    report.table,
    "length | microbatch | tokens per second | fill | MFU | waiting for data",
    "{length} | {microbatch} | {step/tokens_per_s:,.0f} | {step/fill:.2f} | {step/mfu:.2f} "
    "| {step/data_wait_share:.2f}",
)
GPU_PARTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "tests": ("Tests", str),
    "model": ("Two layers of base widths, compared with a plain implementation", model),
    "curve": ("A training step, base size, bf16, AdamW", curve),
    "profile": ("Kernels of a step", profile),
    "trainer": ("main.py with Composer", trainer),
    "attention": ("Attention, forward and backward", kernels),
    "rowwise": ("Other kernels, forward and backward", kernels),
    "tiles": ("Tiles of the attention kernels, ms by length", tiles),
}
"""Parts of run.sh that docs/gpu.md shows, with their titles; those of benchmarks.speed.step are on its own pages."""

BLOCKS: dict[str, Callable[[], list[str]]] = {
    "step": partial(of, "step", step),
    "gpu": gpu,
    "time to loss": partial(of, "time_to_loss", time_to_loss),
    "taken away": partial(of, "time_to_loss", taken_away),
    "changed": partial(of, "time_to_loss_changes", changed),
    "quality": partial(of, "quality", quality),
    "extrapolation": partial(of, "quality", extrapolation),
    "forms": forms,
    "int8": int8,
    **{f"scaling {part}": partial(of, "scaling", partial(scaling, part)) for part in TABLES},
    "roofline": of_roofline,
    "roofline now": lambda: [roofline.expected()],
    "optimizers": lambda: [roofline.optimizers()],
}
CALCULATED = {
    **dict.fromkeys(("scaling gpus", "scaling sizes", "roofline now", "optimizers"), "calculated"),
    "roofline": "calculated and measured",
}
"""Blocks with figures that were not measured."""


def filled(text: str, name: str) -> str:
    """A page with new text in its blocks.

    Raises:
        SystemExit: an unknown block, or one whose mark says measured where it is calculated, or the reverse.
    """

    def block(match: re.Match[str]) -> str:
        _, kind, block, end = match.groups()
        if block not in BLOCKS:
            sys.exit(f"{name}: unknown block {block!r}; blocks: {', '.join(BLOCKS)}")
        if kind != CALCULATED.get(block, "measured"):
            sys.exit(f"{name}: expected block {block!r} to be {CALCULATED.get(block, 'measured')!r}, got {kind!r}")
        return "\n\n".join([match[1].strip(), *BLOCKS[block](), end])

    return BLOCK.sub(block, text)


def page() -> str:
    """docs/results.md."""
    parts = [
        "# Results",
        "Made by `python -m benchmarks.publish` from [benchmarks/results](../benchmarks/results). Each file there\n"
        "names the script that wrote it. In older files a variant is an arm, and tokens are real tokens. Elsewhere:\n"
        "kernels compiled for seven architectures ([kernels_aot.md](../benchmarks/results/kernels_aot.md)), how cost\n"
        "grows ([scaling.md](scaling.md)), and all figures of a GPU ([gpu.md](gpu.md)).",
    ]
    for name, device in itertools.product(PAGES, DEVICES):
        path = RESULTS / f"{name}-{device}.md"
        if path.exists():
            title, _, text = path.read_text().strip().partition("\n")
            text = re.sub(r"^#", "##", f"{title} ({device})\n{text}", flags=re.MULTILINE)
            parts.append(re.sub(r"\]\((?=[\w-]+\.png)", "](../benchmarks/results/", text))
    for name, title in TEXTS.items():
        text = (RESULTS / name).read_text().strip()
        parts += [f"## {title}", f"[{name}](../benchmarks/results/{name})", f"```\n{text}\n```"]
    return "\n\n".join(parts) + "\n"


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
