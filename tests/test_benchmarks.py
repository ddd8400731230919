"""Benchmarks run; what they print on a busy machine means nothing here."""

import re
import subprocess
import sys

import pytest


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
