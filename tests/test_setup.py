"""The two stacks: their requirements against each other and against Composer's, and what `make setup` installs."""

import os
import re
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

NEWER = {"torch", "torchvision", "transformers", "numpy"}
"""In the current stack, newer than Composer and streaming allow."""
NEVER_IMPORTED = {"torch-optimizer", "tabulate"}
OBJECT_STORES = {"google-cloud-storage", "oci", "paramiko"}
OBJECT_STORES |= {"azure-storage-blob", "azure-storage-file-datalake", "azure-identity"}
INDIRECT = {"pyyaml", "requests", "tqdm"}
"""Installed by other packages."""


def pins(name):
    """Versions that a requirements file pins, by name."""
    lines = [line.split(" #")[0].strip() for line in Path(name).read_text().splitlines()]
    requirements = [Requirement(line) for line in lines if line and not line.startswith(("#", "-r"))]
    return {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in requirements}


def test_both_stacks_have_the_same_composer_and_differ_where_they_must():
    pinned, current, composer = (pins(f"requirements{x}.txt") for x in ("", "-current", "-composer"))
    assert composer == {name: pinned.pop(name) for name in ("mosaicml", "mosaicml-streaming")}
    differing = {name for name in pinned if pinned[name] != current[name]}
    assert differing == {"torch", "transformers", "datasets"}


def test_the_current_stack_has_what_composer_and_streaming_list():
    """Within their bounds, except NEWER. The file names what it leaves out."""
    current, lacking = pins("requirements-current.txt"), set()
    listed = [Requirement(r) for name in ("mosaicml", "mosaicml-streaming") for r in metadata.requires(name) or ()]
    for requirement in listed:
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None:  # an extra
            continue
        if name not in current:
            lacking.add(name)
        elif name not in NEWER:
            assert requirement.specifier.contains(current[name]), requirement
    assert lacking == NEVER_IMPORTED | OBJECT_STORES | INDIRECT
    text = Path("requirements-current.txt").read_text()
    assert all(name in text for name in lacking)


def test_the_loggers_fit_both_stacks():
    """Their file installs with either in one call: no other version of a package that both name."""
    logged = pins("requirements-loggers.txt")
    for stack in ("requirements.txt", "requirements-current.txt"):
        assert logged.items() & pins(stack).items() == {("tensorboard", logged["tensorboard"])}
        assert logged.keys() & pins(stack).keys() == {"tensorboard"}
    assert "-r requirements-loggers.txt" in Path("requirements-dev.txt").read_text()
    assert {"comet_ml", "neptune"} <= set(re.findall(r"\w+", Path("requirements-loggers.txt").read_text()))


# The Makefile, with a stand-in for Python


@pytest.fixture
def make(tmp_path):
    """Runs make with a Python that records its calls; returns the finished process and the calls."""
    python, calls, venv = (tmp_path / name for name in ("python", "calls", "venv"))
    python.write_text(
        f'#!/bin/sh\necho "$*" >> {calls}\n[ "$2" = venv ] && mkdir -p {venv}/bin && cp $0 {venv}/bin/python || true\n'
    )
    python.chmod(0o755)

    def make(*arguments):
        calls.write_text("")
        command = ["make", "setup", f"VENV={venv}", f"PYTHON={python}", *arguments]
        env = {name: value for name, value in os.environ.items() if name not in ("STACK", "MAKEFLAGS")}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        return done, calls.read_text().splitlines()

    make.venv = venv
    return make


INSTALLS = {
    "current": ("requirements-current.txt", "-r requirements-composer.txt -r requirements-data.txt"),
    "pinned": ("requirements.txt", "-r requirements-data.txt"),
}
"""The stack's own requirements, and those installed without their dependencies."""


@pytest.mark.parametrize("stack", INSTALLS)
def test_setup_installs_a_stack_once(stack, make):
    done, calls = make(f"STACK={stack}")
    first, second = INSTALLS[stack]
    pip = "-m pip install --quiet"
    assert done.returncode == 0, done.stderr
    with_deps = f"-r {first} -r requirements-dev.txt"
    assert calls == [f"-m venv {make.venv}", f"{pip} {with_deps}", f"{pip} --no-deps {second}"]
    for arguments in ([f"STACK={stack}"], []):  # by default the installed stack
        done, calls = make(*arguments)
        assert done.returncode == 0 and calls == []
    other = next(name for name in INSTALLS if name != stack)
    done, calls = make(f"STACK={other}")
    assert done.returncode != 0 and calls == []
    assert f"holds the {stack} stack. Delete it first (rm -r {make.venv})" in done.stderr
    assert f"make setup STACK={other} VENV=.venv-{other}" in done.stderr


def test_setup_has_a_default_stack_and_knows_an_older_folder(make):
    default = re.search(r"^DEFAULT_STACK := (\w+)$", Path("Makefile").read_text(), flags=re.M)
    assert default is not None
    _, calls = make()
    assert INSTALLS[default[1]][0] in calls[1]
    (make.venv / ".installed").write_text("")  # from when there was only one stack
    done, calls = make()
    assert done.returncode == 0 and calls == []
    done, _ = make("STACK=current")
    assert "holds the pinned stack" in done.stderr


def test_setup_refuses_unknown_stack_and_missing_python(make):
    done, _ = make("STACK=newest")
    assert "STACK is pinned or current, not newest" in done.stderr
    done, _ = make("STACK=pinned", "PYTHON=")
    message = "the pinned stack needs Python 3.11 3.12, and none of these is found; name one: make setup PYTHON="
    assert done.returncode != 0 and message in done.stderr
