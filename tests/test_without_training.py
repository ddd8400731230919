"""The model, its kernels, their tests and benchmarks run without the packages that only training needs."""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import MODEL

WITHOUT = """
import sys
from importlib.machinery import PathFinder

ABSENT = {"composer", "streaming", "omegaconf", "datasets", "torchmetrics", "einops", "matplotlib"}


class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""
"""Hides those packages. Python imports sitecustomize when it starts, in child processes too."""

ON_A_GPU_MACHINE = """
import contextlib
import importlib
import pytest

for arguments in ("--collect-only", "--collect-only -m gpu", "tests/model/test_geglu_triton.py::test_large_gates"):
    assert pytest.main(["-p", "no:cacheprovider", *arguments.split()]) == 0
for name in ("kernels.compare", "speed.step", "kernels.tune", "kernels.aot"):
    module = importlib.import_module(f"benchmarks.{name}")
    with contextlib.suppress(SystemExit):
        module.main(["--toy" if name == "kernels.compare" else "--help"])
"""
"""In one process, as torch takes seconds to import."""


@pytest.mark.slow
def test_kernels_need_only_torch_triton_transformers_and_pytest(tmp_path):
    """Without Composer, streaming and git, tests and benchmarks of the kernels run, through the interpreter."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    (tmp_path / "bin").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PATH": str(tmp_path / "bin"), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", ON_A_GPU_MACHINE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(re.findall(r"^tests/([\w/.]+)::", done.stdout, re.MULTILINE)) == MODEL
    assert re.search(r"^\d+/\d+ tests collected", done.stdout, re.MULTILINE) and "\n1 passed" in done.stdout
    for module in ("speed.step", "kernels.tune", "kernels.aot"):
        assert f"python -m benchmarks.{module} " in done.stdout
    (last,) = re.findall("^kernels device=.*", done.stdout, re.MULTILINE)
    # Each case and peer is checked before it is timed. Newer torch runs FlexAttention on a CPU, 2.7 has no backward.
    left_out = re.findall(
        "^attention .* FlexAttention: does not run: .* does not support backward on CPU", done.stdout, re.M
    )
    flex = [] if left_out else ["attention_S64_vs_flex"]
    assert last.startswith(f"kernels device=cpu checked={8 + len(flex)} failed=0 left_out={len(left_out)} ")
    plain = (f"{case}_vs_torch" for case in ("layer_norm_T200", "geglu_T200", "head_M60"))
    assert all(f" {name}=" in last for name in (*flex, "attention_S64_vs_sdpa", *plain)), last
