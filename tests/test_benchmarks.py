"""Benchmarks run; what they print on a busy machine means nothing here."""

import os
import re
import subprocess
import sys

import pytest


def test_the_benchmark_of_kernels_runs():
    """All cases and peers that a CPU has, at toy size, through the interpreter: each is checked before it is timed."""
    command = [sys.executable, "-m", "benchmarks.kernels", "--toy"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("kernels device=cpu checked=10 failed=0 ")
    for name in ("attention_S64_vs_flex", "layer_norm_T200_vs_torch", "geglu_T200_vs_torch", "head_M60_vs_torch"):
        assert f" {name}=" in last


@pytest.mark.slow  # half a minute: it converts, loads and starts in processes of their own, as users do
def test_the_data_benchmark_ends_with_its_line(tmp_path):
    out = tmp_path / "data.txt"
    command = [sys.executable, "-m", "benchmarks.data", "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    number = r"\d+(\.\d+)?"
    assert re.fullmatch(
        f"data loader_tokens_per_s={number} loader_vs_plain={number} text_loader_vs_plain={number} "
        f"convert_docs_per_s={number} bytes_per_token={number}",
        done.stdout.splitlines()[-1],
    )
    assert out.read_text() == done.stdout
    assert "start at 100,000 samples" in done.stdout
