"""Restarts: what they may not change, what they refuse, and what a killed run leaves behind."""

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import main
from src.common.errors import ConfigError, Interrupted
from src.data import shared_memory
from src.data.shards import dataset_fingerprint
from src.train import checkpoint, processes
from src.train.callbacks import StopOnSignal
from src.train.config import load, settings
from src.train.resume import ResumeCheck
from tests.runs import (
    DROPOUT,
    QUICKSTART,
    UNSAVED,
    Killed,
    Watch,
    change_tokenizer,
    logged,
    losses_of,
    start,
    trainer_of,
    wait,
)


@pytest.fixture
def options(overrides):
    """Two epochs of 300 samples in 6 steps of two microbatches, with dropout."""
    return [
        *overrides,
        DROPOUT,
        "global_train_batch_size=100",
        "device_train_microbatch_size=50",
        "max_duration=6ba",
        "eval_interval=2ba",
        "autoresume=true",
        "save_overwrite=false",
        "save_num_checkpoints_to_keep=2",
    ]


def folder_of(options):
    return Path(next(o for o in reversed(options) if o.startswith("save_folder=")).split("=")[1])


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".pt", ".partial", ".damaged"))


RESTARTS = {
    "within an epoch": ("2ba", [3], (0, 0)),
    "at an epoch's end": ("3ba", [4], (0, 0)),
    "at an epoch's end, saved by epochs": ("1ep", [4], (0, 0)),
    "in the second epoch, other workers": ("1ba", [3, 6], (0, 2, 1)),
}


def test_a_restart_changes_nothing(options, tmp_path):
    """Bit for bit, with dropout; a second time with a rate of masking that falls."""
    for name, masking, cases in (
        ("constant", "0.3", RESTARTS),
        ("falling", "{initial: 0.3, final: 0.1}", ["within an epoch"]),
    ):
        run = [*options, f"mlm_probability={masking}"]
        want, weights = losses_of([*run, *UNSAVED])
        assert len(want) == 6
        for case in cases:
            save, kills, workers = RESTARTS[case]
            saved = [f"save_folder={tmp_path}/{name} {case}", f"save_interval={save}"]
            for kill_at, number in zip([*kills, None], workers, strict=True):
                got, same = losses_of([*run, *saved, f"train_loader.num_workers={number}"], kill_at)
                assert got == {step: want[step] for step in got}, (case, kill_at)
            assert max(got) == 6 and min(got) > 1 and torch.equal(same, weights), case


def test_the_first_backward_that_is_discarded_leaves_no_trace(options):
    """Random states, gradients, weights, buffers, and the optimizer's state."""
    trainer = trainer_of([*options, *UNSAVED])
    state = trainer.state
    largest = next(c for c in state.callbacks if type(c).__name__ == "MemoryProbe")

    def everything():
        held = {name: value.clone() for name, value in state.model.state_dict().items()}
        held |= {f"buffer {name}": value.clone() for name, value in state.model.named_buffers()}
        return held, torch.get_rng_state(), state.optimizers[0].state_dict()["state"]

    before = everything()
    largest.fit_start(state, trainer.logger)
    after = everything()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert torch.equal(before[1], after[1]) and not after[2]
    assert all(p.grad is None for p in state.model.parameters())
    trainer.close()


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path):
    path.write_bytes(b"")


def change_a_bit(path):
    """In a tensor: nothing but the sum of its bytes tells."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def lose(path):
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, empty, change_a_bit, lose])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(damage, options, tmp_path, caplog):
    options = [*options, "save_interval=2ba", "eval_interval=0"]
    want, weights = losses_of([*options, *UNSAVED])
    folder = folder_of(options)
    losses_of(options, kill_at=5)
    assert names(folder) == ["ep0-ba2-rank0.pt", "ep1-ba4-rank0.pt", "latest-rank0.pt"]
    damage(folder / "ep1-ba4-rank0.pt")
    got, same = losses_of(options)
    assert min(got) == 3 and got == {step: want[step] for step in got} and torch.equal(same, weights)
    if damage is not lose:
        assert "ep1-ba4-rank0.pt is damaged" in caplog.text
        assert "ep1-ba4-rank0.pt.damaged" in names(folder)


def test_when_all_are_damaged_the_run_does_not_begin_anew(options, capsys):
    losses_of([*options, "save_interval=2ba", "eval_interval=0"], kill_at=5)
    for path in folder_of(options).glob("ep*"):
        truncate(path)
    with pytest.raises(SystemExit) as exit:
        main.run([QUICKSTART, *options])
    assert "every checkpoint is damaged" in str(exit.value)


def test_a_checkpoint_is_complete_or_absent(options, monkeypatch):
    """Killed within the write, before the rename, and before ``latest`` knows: what is there can be loaded."""
    options = [*options, "save_interval=2ba", "eval_interval=0"]
    want, weights = losses_of([*options, *UNSAVED])
    folder = folder_of(options)

    whole = torch.save

    def half(held, file, **options):
        if "state" not in held:  # generators, on their way to another process
            return whole(held, file, **options)
        file.write(b"PK" * 100)
        raise Killed

    def die(path, *_):
        if not str(path).endswith(".holder.partial"):  # the folder's lock
            raise Killed

    for target, name, double in (
        (torch, "save", half),
        (Path, "replace", die),
        (checkpoint.RunFolder, "point_latest", die),
    ):
        shutil.rmtree(folder, ignore_errors=True)
        losses_of(options, kill_at=3)
        with monkeypatch.context() as patch:
            patch.setattr(target, name, double)
            losses_of(options)
        assert os.readlink(folder / "latest-rank0.pt") == "ep0-ba2-rank0.pt"
        got, same = losses_of(options)
        assert min(got) == 3 and got == {step: want[step] for step in got} and torch.equal(same, weights)
        assert not list(folder.glob("*.partial"))


def test_latest_is_never_absent(tmp_path):
    """It is swapped: a link that is there at any moment."""
    folder = checkpoint.RunFolder(str(tmp_path))
    for name in ("ep0-ba1-rank0.pt", "ep0-ba2-rank0.pt"):
        torch.save({}, tmp_path / name)
        folder.point_latest(tmp_path / name)
        assert os.readlink(tmp_path / "latest-rank0.pt") == name
    folder.close()


def test_rotation_survives_restarts(options):
    """Three starts; two checkpoints stay, whichever start wrote them; a later one of an earlier run is not counted."""
    options = [*options, "save_interval=1ba", "eval_interval=0"]
    for kill_at in (3, 5, None):
        losses_of(options, kill_at)
        assert len([name for name in names(folder_of(options)) if name.startswith("ep")]) == 2
    assert names(folder_of(options)) == ["ep1-ba5-rank0.pt", "ep1-ba6-rank0.pt", "latest-rank0.pt"]


def test_an_old_run_in_the_folder(options):
    """Not resumed: refused, or with save_overwrite written over; its later checkpoints are not gone on from."""
    options = [*options, "save_interval=2ba", "eval_interval=0"]
    losses_of(options)
    with pytest.raises(SystemExit, match="may conflict"):
        main.run([QUICKSTART, *options, "autoresume=false"])
    anew = [*options, "autoresume=false", "save_overwrite=true"]
    want, _ = losses_of(anew, kill_at=3)
    got, _ = losses_of(options)
    assert min(want) == 1 and min(got) == 3


def test_damage_is_found_anywhere(tmp_path):
    """Each byte of what torch.save wrote, but the padding between records, is covered."""
    path = tmp_path / "x.pt"
    torch.save({"weights": torch.arange(1000.0)}, path)
    assert checkpoint.damage(path) is None
    content = path.read_bytes()
    at = content.index(torch.arange(1000.0).numpy().tobytes())
    for position in (at, at + 1999, at + 3999):
        changed = bytearray(content)
        changed[position] ^= 1
        path.write_bytes(changed)
        assert "wrong CRC of" in str(checkpoint.damage(path))
    for size in range(0, len(content), 97):
        path.write_bytes(content[:size])
        assert checkpoint.damage(path) is not None


# ----------------------------------------------------------------------------------------------------------------------
# Other settings, other shapes
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(options):
    """A run that was killed in its fourth step, its checkpoint of the second; evaluation off."""
    options = [*options, "save_interval=2ba", "eval_interval=0"]
    losses_of(options, kill_at=3)
    return options


def test_settings_that_would_change_the_run_are_refused_with_both_values(stopped, capsys):
    changes = [
        "global_train_batch_size=50",
        "seed=18",
        "train_loader.shuffle=false",
        "mlm_probability=0.2",
        "model.model_config.hidden_size=48",
        "optimizer.lr=0.5",
        "max_duration=9ba",
        "algorithms.gradient_clipping={clipping_type: norm, clipping_threshold: 1.0}",
    ]
    with pytest.raises(SystemExit) as exit:
        main.run([QUICKSTART, *stopped, *changes, "resume.allow=[seed]"])
    message = str(exit.value)
    for line in (
        "ep0-ba2-rank0.pt is of a run with different settings",
        "global_train_batch_size: 100 there, 50 here",
        "train_loader.shuffle: True there, False here",
        "mlm_probability: 0.3 there, 0.2 here",
        "model.model_config.hidden_size: 24 there, 48 here",
        "optimizer.lr: 0.003 there, 0.5 here",
        "max_duration: '6ba' there, '9ba' here",
        "algorithms.gradient_clipping.clipping_threshold: 'not set' there, 1.0 here",
        "train_loader.shuffle_seed: 17 there, 18 here",
        "train_loader.shuffle_seed cannot change within a run",
    ):
        assert line in message
    assert "\n  seed:" not in message


def test_a_moving_crop_goes_on_and_cannot_be_switched(options, text_shards, tmp_path):
    """In the second epoch, with other workers; without it the losses are others."""
    text = [*options, f"data_local={text_shards}", "eval_interval=0", "save_interval=1ba", "max_duration=5ba"]
    moving = [*text, "train_loader.moving_crop=true"]
    want, weights = losses_of([*moving, *UNSAVED])
    still, _ = losses_of([*text, *UNSAVED], kill_at=1)
    assert still[1] != want[1]
    losses_of(moving, kill_at=5)
    with pytest.raises(ConfigError, match=r"train_loader\.moving_crop: True there, False here"):
        losses_of(text)
    got, same = losses_of([*moving, "train_loader.num_workers=1"])
    assert got == {5: want[5]} and torch.equal(same, weights)


def test_another_dataset_and_another_tokenizer_are_refused(stopped, text_shards, tokenizer_folder, tmp_path):
    change_tokenizer(tokenizer_folder, tmp_path / "other")
    other = [f"data_local={text_shards}", f"tokenizer_name={tmp_path}/other"]
    with pytest.raises(ConfigError) as refused:
        losses_of([*stopped, *other])
    assert "\n  dataset: '" in str(refused.value) and "\n  tokenizer: '" in str(refused.value)
    assert "resume.allow=[dataset,tokenizer]" in str(refused.value)
    got, _ = losses_of([*stopped, *other, "resume.allow=[dataset, tokenizer]"])
    assert min(got) == 3


def test_a_kill_before_the_first_step_keeps_the_lines_of_the_metrics_file(stopped, tmp_path):
    """Read before anything is closed: a killed process closes nothing."""
    metrics = tmp_path / "metrics.jsonl"
    before = metrics.read_text().splitlines()
    trainer = trainer_of(stopped)
    logger = next(c for c in trainer.state.callbacks if type(c).__name__ == "MetricsFile")
    logger.fit_start(trainer.state, trainer.logger)
    assert metrics.read_text().splitlines() == before[:2]
    trainer.close()


def test_what_may_always_change(stopped, tmp_path, token_shards):
    """Where the data lies, workers, microbatch, intervals, loggers: the same run."""
    want, weights = losses_of([*stopped, *UNSAVED])
    shutil.copytree(token_shards, tmp_path / "copy")
    free = [
        f"data_local={tmp_path}/copy",
        "train_loader.num_workers=1",
        "save_interval=3ba",
        f"loggers.metrics_file.path={tmp_path}/other.jsonl",
        "run_name=other",
        "eval_interval=3ba",
    ]
    got, same = losses_of([*stopped, *free])
    assert got == {step: want[step] for step in (3, 4, 5, 6)} and torch.equal(same, weights)


def test_a_restart_takes_its_own_weights_not_the_pretrained_ones(options, trained, tmp_path):
    """Bit for bit, though they are gone; another name for them is compared as any setting."""
    shutil.copytree(trained, tmp_path / "first")
    begun = [*options, f"pretrained={tmp_path}/first", "save_interval=2ba"]
    want, weights = losses_of([*begun, *UNSAVED])
    assert want[1] != losses_of([*options, *UNSAVED], kill_at=1)[0][1]
    losses_of(begun, kill_at=3)
    shutil.rmtree(tmp_path / "first")
    got, same = losses_of(begun)
    assert got == {step: want[step] for step in (3, 4, 5, 6)} and torch.equal(same, weights)
    with pytest.raises(ConfigError, match="pretrained: '.*/first' there, None here"):
        losses_of([*options, "save_interval=2ba"])


@pytest.mark.parametrize("change", ["optimizer.lr=1e-9", "scheduler.alpha_f=0.5", "max_duration=60ba"])
def test_accepted_settings_act(change, stopped):
    """The rate of the resumed run is that of the new settings from its first step, whatever the checkpoint holds."""
    end = 4
    rates = []
    allow = "resume.allow=[optimizer,scheduler,max_duration]"
    trainer = trainer_of([*stopped, change, "scheduler.t_decay=0.9dur", allow])
    group = trainer.state.optimizers[0].param_groups[0]
    watch = Watch(end)
    watch.batch_start = lambda state, logger: rates.append(group["lr"])
    trainer.state.callbacks.append(watch)
    with pytest.raises(Killed):
        trainer.fit()
    trainer.close()
    lr, total, floor = 3e-3, 6, 0.02
    if change.startswith("optimizer"):
        lr = 1e-9
    elif change.startswith("max"):
        total = 60
    else:
        floor = 0.5
    warmup, falls = total // 10, 9 * total // 10
    # A step's rate is of the time before the step before it, as Composer steps its schedules; the first here, of now.
    decay = 2 / warmup if warmup > 2 else 1 - (1 - floor) * (2 - (total - falls)) / falls
    assert rates == pytest.approx([lr * decay] * 2, rel=1e-6)


def test_a_finished_run_says_so(options, capsys):
    losses_of([*options, "save_interval=3ba", "eval_interval=0"])
    before = names(folder_of(options))
    main.run([QUICKSTART, *options])
    assert "quickstart is finished: 6 steps, max_duration=6ba" in capsys.readouterr().out
    assert names(folder_of(options)) == before


def test_a_fingerprint_is_of_the_samples(token_shards, text_shards, tmp_path):
    shutil.copytree(token_shards, tmp_path / "copy")

    def of(local, split="train"):
        return dataset_fingerprint([Path(local) / split])

    assert of(token_shards) == of(tmp_path / "copy")
    assert len({of(token_shards), of(token_shards, "val"), of(text_shards)}) == 3


def test_each_setting_is_free_or_compared():
    """A new setting is compared until somebody says that it is free."""
    run = load("yamls/mosaic_bert.yaml")
    compared = settings(run)
    assert {"seed", "precision", "optimizer.lr", "train_loader.shuffle_seed", "max_seq_len"} <= set(compared)
    assert not {"train_loader.num_workers", "save_interval", "model.attention"} & set(compared)
    assert settings(dataclasses.replace(run, max_seq_len=64)) != compared


def test_a_checkpoint_without_settings_is_said(caplog):
    assert ResumeCheck({"seed": 1}, []).compare(None, "x.pt") == []
    assert "x.pt has no settings" in caplog.text


# ----------------------------------------------------------------------------------------------------------------------
# Signals, locks, leftovers
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 2), (signal.SIGINT, 0)])
def test_a_signal_ends_the_run_after_a_saved_step(number, workers, options):
    """With evaluation of that step done; the restart changes nothing."""
    options = [*options, "save_interval=100ba", f"train_loader.num_workers={workers}"]
    want, weights = losses_of([*options, *UNSAVED])
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(Interrupted, match="stopped by a signal after step 4; its checkpoint is saved"):
            losses_of(options, 4, lambda: os.kill(os.getpid(), number))
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    assert names(folder_of(options)) == ["ep1-ba4-rank0.pt", "latest-rank0.pt"]
    got, same = losses_of(options)
    assert got == {5: want[5], 6: want[6]} and torch.equal(same, weights)
    assert signal.getsignal(signal.SIGTERM) == before[0]  # at the end of fit, as it was


def test_a_second_signal_ends_at_once_unless_it_is_an_echo():
    stop = StopOnSignal()
    stop._note(signal.SIGTERM, None)
    stop._note(signal.SIGTERM, None)  # the launcher's, at once
    stop.received = time.monotonic() - stop.ECHO - 1
    with pytest.raises(SystemExit) as exit:
        stop._note(signal.SIGINT, None)
    assert exit.value.code == 130


def test_a_second_live_run_in_the_folder_is_refused(tmp_path):
    first = checkpoint.RunFolder(str(tmp_path))
    with pytest.raises(ConfigError, match=f"another run uses this folder .process {os.getpid()} on "):
        checkpoint.RunFolder(str(tmp_path), timeout=0.2)
    first.close()
    checkpoint.RunFolder(str(tmp_path), timeout=0.2).close()


def hold_until_killed(code):
    """A process that runs ``code``, says "ready", and sleeps."""
    child = subprocess.Popen(
        [sys.executable, "-c", f"{code}\nprint('ready', flush=True)\nimport time; time.sleep(60)"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    return child


def test_shared_memory_of_dead_runs_is_removed_and_of_live_ones_is_not(tmp_path, monkeypatch):
    """With a folder in place of /dev/shm, and processes that are killed."""
    monkeypatch.setattr(shared_memory, "SHARED", tmp_path)
    (tmp_path / "locks").mkdir()
    for prefix in (3, 4, 5):
        for name in ("locals", "barrier", "epoch_data"):
            (tmp_path / f"{prefix:06}_{name}").touch()
        for name in ("barrier_filelock", "cache_filelock"):
            (tmp_path / "locks" / f"{prefix:06}_{name}").touch()
    everything = {path.name for path in tmp_path.rglob("*")}

    def owner(prefix):
        return hold_until_killed(
            "from pathlib import Path; from src.data import shared_memory\n"
            f"shared_memory.SHARED = Path({str(tmp_path)!r})\n"
            f"shared_memory.own_shared_memory({prefix}, {str(tmp_path / 'locks')!r})"
        )

    dead, live = owner(3), owner(4)  # the fifth has no record: somebody else's
    dead.kill()
    dead.wait()
    try:
        assert shared_memory.remove_stale_shared_memory() == [3]
        left = {path.name for path in tmp_path.rglob("*")}
        assert left == {name for name in everything if not name.startswith("000003")} | {"000004_owner"}
        # A new run took the dead one's prefix, and has yet to record it.
        live.kill()
        live.wait()
        (tmp_path / "000004_locals").rename(tmp_path / "old")
        (tmp_path / "000004_locals").touch()
        assert shared_memory.remove_stale_shared_memory() == []
    finally:
        live.kill()


def test_a_run_records_its_shared_memory_and_a_worker_keeps_it(options, token_shards):
    trainer = trainer_of([*options, *UNSAVED])
    prefix = trainer.state.train_dataloader.dataset.shared_memory_prefix  # pyright: ignore
    record = shared_memory.SHARED / f"{prefix:06}_owner"
    with record.open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert json.loads(record.read_text())["locals"] == (shared_memory.SHARED / f"{prefix:06}_locals").stat().st_ino
    trainer.close()


def test_those_whose_parent_is_killed_end(tmp_path):
    """As workers do whose rank is killed; what else is sent to them they leave to it."""
    child = (
        "from src.train.processes import settle_worker; settle_worker(0); print(1, flush=True); "
        "import time; time.sleep(60)"
    )
    parent = hold_until_killed(
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        f"child.stdout.readline(); open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))"
    )
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")

    def lives():
        return status.exists() and status.read_text().rsplit(")")[1].split()[0] != "Z"

    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(int(status.parent.name), number)
    time.sleep(0.3)
    assert lives()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while lives():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ----------------------------------------------------------------------------------------------------------------------
# Launched: several processes and nodes
# ----------------------------------------------------------------------------------------------------------------------


def launched(folder):
    """Losses by step, as the metrics file has them."""
    return {line["batch"]: line["loss/train/total"] for line in logged(folder) if "loss/train/total" in line}


def finish(launchers, folder):
    wait(launchers, folder)
    model = torch.load(folder / "latest-rank0.pt", mmap=True, weights_only=True)["state"]["model"]
    return launched(folder), torch.cat([value.flatten() for value in model.values()])


def wait_for(step, launchers, folder):
    while max(launched(folder), default=0) < step:
        assert all(launcher.poll() is None for launcher in launchers), (folder / "output.txt").read_text()
        time.sleep(0.005)


def ranks_of(launchers):
    """Processes that the launchers started, and their workers."""
    sessions = {str(launcher.pid) for launcher in launchers}
    stats = [path.read_text().rsplit(")")[1].split() for path in Path("/proc").glob("[0-9]*/stat") if path.exists()]
    return [stat for stat in stats if stat[3] in sessions and stat[0] != "Z"]


@pytest.fixture
def long_options(overrides):
    """80 steps, 4 epochs; with dropout and a loader's worker."""
    checkpoint.load_as_data()
    return [
        *overrides,
        DROPOUT,
        "train_loader.num_workers=1",
        "device_train_microbatch_size=4",
        "max_duration=80ba",
        "save_interval=8ba",
        "save_num_checkpoints_to_keep=2",
        "autoresume=true",
        "save_overwrite=false",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("place", [2, 4, "nodes"])
def test_processes_that_are_killed_and_started_again(place, long_options, tmp_path):
    """kill -9 of all at once, then of one; SIGTERM to the launchers: the same losses and weights, bit for bit."""
    want, weights = finish(start(place, long_options, tmp_path / "whole"), tmp_path / "whole")
    assert len(want) == 80
    folder = tmp_path / "killed"

    launchers = start(place, long_options, folder)
    wait_for(12, launchers, folder)
    for launcher in launchers:
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()

    launchers = start(place, long_options, folder)
    wait_for(30, launchers, folder)
    for launcher in launchers:  # the launchers alone: their processes must not live on
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.wait()
    deadline = time.monotonic() + 10
    while ranks_of(launchers):
        assert time.monotonic() < deadline, ranks_of(launchers)
        time.sleep(0.1)

    launchers = start(place, long_options, folder)
    wait_for(50, launchers, folder)
    for launcher in launchers:
        os.kill(launcher.pid, signal.SIGTERM)
    assert [launcher.wait(timeout=60) for launcher in launchers] == [processes.EXIT_INTERRUPTED] * len(launchers)
    stopped = max(launched(folder))
    assert (
        torch.load(folder / "latest-rank0.pt", weights_only=True)["state"]["timestamp"]["Timestamp"]["batch"] == stopped
    )

    got, same = finish(start(place, long_options, folder), folder)
    assert got == want and torch.equal(same, weights)


@pytest.mark.slow
def test_a_restart_on_other_processes(long_options, tmp_path):
    """1, 2 and 4 processes in turn, no dropout: the same global batches and masks, losses to fp32 rounding."""
    options = [*long_options, "model.model_config.hidden_dropout_prob=0.0"]
    want, weights = finish(start(1, options, tmp_path / "whole"), tmp_path / "whole")
    folder = tmp_path / "killed"
    for place, step in ((1, 12), (2, 30), (4, 50)):
        launchers = start(place, options, folder)
        wait_for(step, launchers, folder)
        os.killpg(launchers[0].pid, signal.SIGKILL)
        launchers[0].wait()
    got, same = finish(start(2, options, folder), folder)
    assert got == pytest.approx(want, rel=2e-5)
    torch.testing.assert_close(same, weights, rtol=1e-3, atol=1e-4)
