"""Several processes on one node and two nodes, processes that do not connect, the Dockerfile and the Slurm script."""

import re
import shutil
import socket
import sys
from pathlib import Path

import pytest

from tests.runs import BIN, QUICKSTART, environment, free_port, launch, options_in, results_of, run_command


def test_composer_launches(overrides, tmp_path):
    losses, _, _ = launch(1, [*overrides, "max_duration=1ba"], tmp_path / "run")
    assert len(losses) == 1


@pytest.mark.slow
def test_losses_do_not_depend_on_processes_and_nodes(overrides, tmp_path):
    """1, 2 and 4 processes, and 2 nodes by arguments and by environment variables: equal to fp32 rounding."""
    options = [*overrides, "global_train_batch_size=32", "device_train_microbatch_size=4", "device_eval_batch_size=7"]
    want, want_eval, tokens = launch(1, options, tmp_path / "1")
    assert len(want) == 4
    results = [launch(processes, options, tmp_path / str(processes)) for processes in (2, 4)]
    assert shutil.which("unshare"), "util-linux is needed"
    results += [launch("nodes", options, tmp_path / f"nodes-{by_env}", by_env) for by_env in (False, True)]
    for got, got_eval, got_tokens in results:
        assert got == pytest.approx(want, rel=1e-5)
        assert got_eval == pytest.approx(want_eval, rel=1e-5)
        assert got_tokens == tokens


@pytest.mark.slow
def test_torchrun(overrides, tmp_path):
    command = [BIN / "torchrun", "--nproc-per-node", "2", "--master-port", str(free_port()), "main.py", QUICKSTART]
    done = run_command([*command, *options_in(overrides, tmp_path)], env=environment(NODE_RANK=0))
    assert done.returncode == 0, done.stderr
    assert len(results_of(tmp_path)[0]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["peer missing", "wrong address", "port taken"])
def test_processes_that_do_not_connect(fault, overrides):
    """One clear message within the timeout, and no traceback."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1] if fault == "port taken" else free_port()
        address = "127.0.0.2" if fault == "wrong address" else "127.0.0.1"
        rank = 1 if fault == "wrong address" else 0
        place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "NODE_RANK": rank}
        env = environment(**place, MASTER_ADDR=address, MASTER_PORT=port)
        done = run_command([sys.executable, "main.py", QUICKSTART, *overrides, "dist_timeout=5"], env=env, timeout=60)
    assert done.returncode == 1
    assert f"main.py: process {rank} of 2 did not connect to the others at {address}:{port} within 5 s" in done.stderr
    assert "Check that node 0" in done.stderr and "Traceback" not in done.stderr


def test_full_disk_ends_the_run_and_keeps_the_earlier_checkpoint(overrides, tmp_path):
    """A file system with room for one checkpoint."""
    folder = tmp_path / "disk"
    folder.mkdir()
    saving = [f"save_folder={folder}", "save_interval=1ba", "max_duration=4ba", "eval_interval=0"]
    mount = f'mount -t tmpfs -o size=700k tmpfs {folder} && "$@"; code=$?; ls -l {folder}; exit $code'
    command = ["unshare", "-Urm", "sh", "-c", mount, "sh", sys.executable, "main.py", QUICKSTART, *overrides, *saving]
    done = run_command(command, env=environment(), timeout=120)
    assert done.returncode == 1, done.stderr
    message = r"ep0-ba2-rank0.pt: cannot write the checkpoint of step 2 \(.*[Nn]o space left.*Earlier checkpoints are"
    assert re.search(message, done.stderr), done.stderr
    assert "ep0-ba1-rank0.pt" in done.stdout and "ep0-ba2" not in done.stdout
    assert "latest-rank0.pt -> ep0-ba1-rank0.pt" in done.stdout


# The Dockerfile and the Slurm script, which cannot run here.


def test_dockerfile_copies_and_installs_files_that_exist():
    text = Path("Dockerfile").read_text().replace("\\\n", " ")
    copied = re.findall(r"^COPY --chown=\S+ (.+) \S+$", text, flags=re.M)
    names = [name for line in copied for name in line.split()]
    assert "." in names and all(Path(name).exists() for name in names)
    installed = re.findall(r"-r (\S+\.txt)", text)
    assert installed and all(Path(name).exists() and name in names for name in installed)
    assert re.search(r"^USER (?!root|0)", text, flags=re.M)


def test_dockerfile_installs_the_current_stack():
    """In the same way as the Makefile, so that it reuses the environment; CUDA is the version of torch's."""
    text, makefile = Path("Dockerfile").read_text(), Path("Makefile").read_text()
    runtime = re.search(r"^RUNTIME_current := (.+)$", makefile, flags=re.M)
    no_deps = re.search(r"^NO_DEPS_current := (.+)$", makefile, flags=re.M)
    assert runtime and f"install --no-cache-dir -r {runtime[1]} -r requirements-dev.txt" in text
    assert no_deps and f"--no-deps -r {' -r '.join(no_deps[1].split())}" in text
    assert "echo current > /opt/venv/.installed" in text and "$(VENV)/.installed" in makefile
    cuda = re.search(r"^FROM nvidia/cuda:(\d+)", text, flags=re.M)
    assert cuda and f"# CUDA {cuda[1]}: driver" in Path("requirements-current.txt").read_text()


@pytest.mark.parametrize("code", [0, 1, 75, 124, 143])
def test_slurm_script_starts_a_launcher_on_each_node(code, tmp_path):
    """With scripts in place of Slurm's commands and of composer, which prints its arguments. Exit code 75 requeues."""
    stand_ins = {
        "scontrol": f"[ $1 = show ] && printf 'node-a\\nnode-b\\n' || echo $* > {tmp_path}/asked",
        "srun": f'shift; for i in 0 1; do SLURM_NODEID=$i "$@"; done; exit {code}',
        "composer": 'echo "$NODE_RANK of $WORLD_SIZE at $MASTER_ADDR:$MASTER_PORT: $*"',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_ID": "7"}
    script = ["bash", "docs/slurm.sbatch", "yamls/mosaic_bert.yaml", "data_local=/data/c4"]
    done = run_command(script, env={"PATH": f"{tmp_path}:/usr/bin:/bin", **slurm})
    assert done.returncode == code, done.stderr
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 7\n" if code == 75 else "")
    said = {0: "", 75: "", 1: "an error, a crash or a kill"}.get(code, "nothing is saved")
    assert said in done.stderr and bool(said) == ("is not queued again" in done.stderr)
    assert done.stdout.splitlines() == [
        f"{rank} of 16 at node-a:20007: --nproc 8 main.py yamls/mosaic_bert.yaml data_local=/data/c4" for rank in (0, 1)
    ]
