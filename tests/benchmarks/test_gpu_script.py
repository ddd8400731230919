"""benchmarks/gpu/run.sh at toy size, on the CPU, through the interpreter."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import convert_c4
from benchmarks import publish


def test_the_gpu_script_runs_all_tests_of_the_kernels():
    names = re.search(r"tests/model/test_\{([\w,]+)\}\.py", Path("benchmarks/gpu/run.sh").read_text())
    named = {Path(f"tests/model/test_{name}.py") for name in names[1].split(",")}
    files = set(Path("tests/model").glob("test_*.py"))
    assert {path for path in files if re.search("DEVICE|cuda", path.read_text())} <= named <= files


@pytest.mark.slow  # minutes: each part is a process of its own
def test_the_gpu_script_runs_on_a_copy_without_git(c4_folder, tokenizer_folder, tmp_path, monkeypatch):
    copy, out = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(".", copy, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__"))
    shutil.copytree(tokenizer_folder, copy / ".gpu" / "tokenizer")
    (copy / ".gpu" / "commit").write_text("abc123\n")
    tokens = ["--tokenizer", tokenizer_folder, "--max_seq_len", "128", "--pack", "chunk"]
    shards = ["--out_root", str(copy / ".gpu" / "mds" / "128"), "--splits", "train", "val", "--source", str(c4_folder)]
    convert_c4.main([*shards, *tokens])

    def run(**settings):
        environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(out), "TOY": "1", "SCALE": "10", **settings}
        command = ["bash", str(copy / "benchmarks" / "gpu" / "run.sh")]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done, json.loads((out / "gpu.json").read_text())

    done, parts = run(BUDGET="3000")
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1].startswith("gpu card=1_thread") and " parts=10 failed=0 " in done.stdout
    assert parts["environment"]["results"]["commit"] == "abc123"
    assert all(part["status"] == "0" and part["results"] for name, part in parts.items() if name != "tests")
    assert "5 passed, 1 skipped" in parts["tests"]["last_line"]  # of flash_attn_triton, fused_kernels and kernels
    assert parts["step"]["last_line"].startswith("step overhead_share=")
    monkeypatch.setattr(publish, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    shutil.copy(out / "gpu.json", tmp_path / "results" / "gpu-toy.json")
    assert re.search(r"\| 32 \| 4 \| [\d,]+ \| \d+ \| c4 \| 1 \| before \|", "\n".join(publish.gpu()))
    assert {file.name for file in out.iterdir()} == {"gpu.json", "log.txt"}
    log = (out / "log.txt").read_text()
    assert " passed" in log and "attention_S64_vs_sdpa=" in log
    assert parts["trainer"]["results"][0]["step/tokens_per_s"] > 0

    (copy / "benchmarks" / "kernels" / "tune.py").unlink()
    done, parts = run(ONLY="tiles environment modernbert", BUDGET="3000")
    assert done.returncode == 1 and "FAILED: tiles: 1" in done.stdout
    assert {name: part["status"] for name, part in parts.items()} == {
        "environment": "0",
        "tiles": "1",
        "modernbert": "0",
    }
    done, _ = run(ONLY="curve enviroment")
    assert done.returncode == 2 and "unknown part enviroment; parts: environment tests" in done.stderr
    done, parts = run(ONLY="environment curve", BUDGET="14")
    assert done.returncode == 1 and [part["status"] for part in parts.values()] == ["no time"] * 2
