"""Restarts: bit-identical results, refused settings, and what a killed run leaves behind."""

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
from src.train import checkpoint, processes
from src.train.callbacks import StopOnSignal
from src.train.config import load, settings
from src.train.resume import ResumeCheck
from tests import runs
from tests.runs import DROPOUT, QUICKSTART, UNSAVED, Killed, Watch, losses_of, start, trainer_of

SIX_STEPS = [
    DROPOUT,
    "global_train_batch_size=104",
    "device_train_microbatch_size=52",
    "max_duration=6ba",
    "eval_interval=2ba",
    "autoresume=true",
    "save_overwrite=false",
    "save_num_checkpoints_to_keep=2",
]
"""Two epochs of three steps, the third smaller, of two microbatches, with dropout."""


@pytest.fixture
def options(overrides):
    return [*overrides, *SIX_STEPS]


@pytest.fixture
def saving(options):
    """Saves every second step; evaluation off."""
    return [*options, "save_interval=2ba", "eval_interval=0"]


@pytest.fixture
def stopped(saving):
    """A run that was killed after its third step; its checkpoint is of the second."""
    losses_of(saving, kill_at=3)
    return saving


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture(scope="module")
def whole(token_shards, tokenizer_folder, tmp_path_factory):
    """Losses by step and final weights of the uninterrupted run."""
    overrides = [*runs.tiny_run(token_shards, tokenizer_folder, tmp_path_factory.mktemp("whole")), *runs.ADAMW]
    return losses_of([*overrides, *SIX_STEPS, *UNSAVED])


def check_resumes(options, whole, first):
    """A resumed run begins with step ``first``; losses and weights are those of the uninterrupted run, to the bit."""
    losses, weights = losses_of(options)
    assert losses == {step: loss for step, loss in whole[0].items() if step >= first}
    assert torch.equal(weights, whole[1])


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".pt", ".partial", ".damaged"))


@pytest.mark.parametrize(
    ("save", "kills", "masking"),
    [
        ("2ba", {3: 0}, "0.3"),
        ("2ba", {3: 0}, "{initial: 0.3, final: 0.1}"),
        ("3ba", {4: 0}, "0.3"),  # at the end of an epoch
        ("1ep", {4: 0}, "0.3"),
        ("1ba", {3: 0, 6: 2}, "0.3"),  # in the second epoch, each start with other workers
    ],
)
def test_resume_is_bit_identical(save, kills, masking, options, whole):
    """``kills`` are the workers of the starts that are killed, by step."""
    run = [*options, f"mlm_probability={masking}", f"save_interval={save}"]
    if masking != "0.3":
        whole = losses_of([*run, *UNSAVED])
    for kill_at, workers in kills.items():
        killed, _ = losses_of([*run, f"train_loader.num_workers={workers}"], kill_at)
        assert max(killed) == kill_at and killed == {step: whole[0][step] for step in killed}
    check_resumes([*run, f"train_loader.num_workers={len(kills) - 1}"], whole, first=max(kills))


def test_run_that_began_with_other_weights_resumes_with_its_own_state(options, trained):
    """Optimizer, step and place in the data, though ``load_weights_only`` is set."""
    run = [*options, f"load_path={trained}/latest-rank0.pt", "load_weights_only=true", "save_interval=2ba"]
    whole = losses_of([*run, *UNSAVED])
    losses_of(run, kill_at=3)
    check_resumes(run, whole, first=3)


# Checkpoints


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def change_a_bit(path):
    """In a tensor, so that only the CRC shows it."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, lambda path: path.write_bytes(b""), change_a_bit, Path.unlink])
def test_resume_falls_back_from_a_damaged_checkpoint(damage, saving, whole, folder, caplog):
    losses_of(saving, kill_at=5)
    assert names(folder) == ["ep0-ba2-rank0.pt", "ep1-ba4-rank0.pt", "latest-rank0.pt"]
    damage(folder / "ep1-ba4-rank0.pt")
    check_resumes(saving, whole, first=3)
    if damage is not Path.unlink:
        assert "ep1-ba4-rank0.pt is damaged" in caplog.text
        assert "ep1-ba4-rank0.pt.damaged" in names(folder)


def test_resume_refuses_a_folder_whose_checkpoints_are_all_damaged(saving, folder):
    losses_of(saving, kill_at=5)
    for path in folder.glob("ep*"):
        truncate(path)
    with pytest.raises(SystemExit, match="every checkpoint is damaged"):
        main.run([QUICKSTART, *saving])


def test_checkpoint_writes_are_atomic(saving, whole, folder, monkeypatch):
    """A kill within the write, before the rename and before ``latest`` changes leaves checkpoints that load."""
    save = torch.save

    def half(held, file, **options):
        if "state" not in held:  # random states, on their way to another process
            return save(held, file, **options)
        file.write(b"PK" * 100)
        raise Killed

    def die(path, *_):
        if not str(path).endswith(".holder.partial"):  # the folder's lock
            raise Killed

    folders = checkpoint.RunFolder
    for target, name, double in ((torch, "save", half), (Path, "replace", die), (folders, "point_latest", die)):
        shutil.rmtree(folder, ignore_errors=True)
        losses_of(saving, kill_at=3)
        with monkeypatch.context() as patch:
            patch.setattr(target, name, double)
            losses_of(saving)
        assert os.readlink(folder / "latest-rank0.pt") == "ep0-ba2-rank0.pt"
        check_resumes(saving, whole, first=3)
        assert not list(folder.glob("*.partial"))


def test_rotation_includes_checkpoints_of_earlier_starts(saving, folder):
    for kill_at in (3, 5, None):
        losses_of([*saving, "save_interval=1ba"], kill_at)
        saved = [name for name in names(folder) if name.startswith("ep")]
        assert len(saved) == 2
    assert [name.split("-")[1] for name in saved] == ["ba5", "ba6"]
    assert os.readlink(folder / "latest-rank0.pt") == saved[-1]


def test_new_run_in_the_folder_of_an_old_one(saving):
    """Without autoresume it is refused; save_overwrite starts anew, and the old run's later checkpoints are ignored."""
    losses_of(saving)
    with pytest.raises(SystemExit, match="may conflict"):
        main.run([QUICKSTART, *saving, "autoresume=false"])
    anew, _ = losses_of([*saving, "autoresume=false", "save_overwrite=true"], kill_at=3)
    resumed, _ = losses_of(saving)
    assert min(anew) == 1 and min(resumed) == 3


def test_damage_is_found_anywhere(tmp_path):
    """In each byte that torch.save wrote, except the padding between records."""
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


# Other settings


def test_resume_refuses_changed_settings_with_both_values(stopped):
    changes = {
        "global_train_batch_size=52": "global_train_batch_size: 104 there, 52 here",
        "seed=18": "train_loader.shuffle_seed: 17 there, 18 here",
        "train_loader.shuffle=false": "train_loader.shuffle: True there, False here",
        "mlm_probability=0.2": "mlm_probability: 0.3 there, 0.2 here",
        "model.model_config.hidden_size=48": "model.model_config.hidden_size: 24 there, 48 here",
        "optimizer.lr=0.5": "optimizer.lr: 0.003 there, 0.5 here",
        "max_duration=9ba": "max_duration: '6ba' there, '9ba' here",
        "algorithms.ema={half_life: 2ba}": "algorithms.ema.half_life: 'not set' there, '2ba' here",
    }
    with pytest.raises(SystemExit) as exit:
        main.run([QUICKSTART, *stopped, *changes, "resume.allow=[seed]"])
    message = str(exit.value)
    assert all(f"\n  {line}" in message for line in changes.values()), message
    assert "ep0-ba2-rank0.pt is of a run with different settings" in message and "\n  seed:" not in message
    assert "train_loader.shuffle_seed cannot change within a run" in message


def test_resume_with_moving_crop(options, text_shards):
    """In the second epoch, with other workers; it changes the losses, and cannot be switched off."""
    text = [*options, f"data_local={text_shards}", "eval_interval=0", "save_interval=1ba", "max_duration=5ba"]
    moving = [*text, "train_loader.moving_crop=true"]
    whole = losses_of([*moving, *UNSAVED])
    still, _ = losses_of([*text, *UNSAVED], kill_at=1)
    assert still[1] != whole[0][1]
    losses_of(moving, kill_at=5)
    with pytest.raises(ConfigError, match=r"train_loader\.moving_crop: True there, False here"):
        losses_of(text)
    check_resumes([*moving, "train_loader.num_workers=1"], whole, first=5)


def test_resume_refuses_another_dataset_and_tokenizer(stopped, text_shards, tokenizer_folder, tmp_path, folder):
    kept = (folder / "tokenizer" / "tokenizer.json").read_bytes()
    other = runs.change_tokenizer(tokenizer_folder, tmp_path / "other")
    changed = [*stopped, f"data_local={text_shards}", f"tokenizer_name={other}"]
    with pytest.raises(ConfigError) as refused:
        losses_of(changed)
    assert "\n  dataset: '" in str(refused.value) and "\n  tokenizer: '" in str(refused.value)
    assert "resume.allow=[dataset,tokenizer]" in str(refused.value)
    with pytest.raises(FileExistsError):
        losses_of([*changed, "autoresume=false"])
    assert (folder / "tokenizer" / "tokenizer.json").read_bytes() == kept
    resumed, _ = losses_of([*changed, "resume.allow=[dataset, tokenizer]"])
    assert min(resumed) == 3


def test_kill_before_the_first_step_keeps_the_metrics_file(stopped, tmp_path):
    """Read before anything is closed, because a killed process closes nothing."""
    metrics = tmp_path / "metrics.jsonl"
    before = metrics.read_text().splitlines()
    trainer = trainer_of(stopped)
    logger = next(c for c in trainer.state.callbacks if type(c).__name__ == "MetricsFile")
    logger.fit_start(trainer.state, trainer.logger)
    assert metrics.read_text().splitlines() == before[:2]
    trainer.close()


def test_resume_accepts_settings_that_do_not_affect_the_result(stopped, whole, tmp_path, token_shards):
    shutil.copytree(token_shards, tmp_path / "copy")
    changes = [
        f"data_local={tmp_path}/copy",
        "train_loader.num_workers=1",
        "save_interval=3ba",
        f"loggers.metrics_file.path={tmp_path}/other.jsonl",
        "run_name=other",
        "eval_interval=3ba",
    ]
    check_resumes([*stopped, *changes], whole, first=3)


def test_resume_ignores_the_pretrained_weights(saving, trained, tmp_path):
    """They may be gone; but ``pretrained`` itself may not change."""
    shutil.copytree(trained, tmp_path / "first")
    begun = [*saving, f"pretrained={tmp_path}/first"]
    whole = losses_of([*begun, *UNSAVED])
    assert whole[0][1] != losses_of([*saving, *UNSAVED], kill_at=1)[0][1]
    losses_of(begun, kill_at=3)
    shutil.rmtree(tmp_path / "first")
    with pytest.raises(ConfigError, match="pretrained: '.*/first' there, None here"):
        losses_of(saving)
    check_resumes(begun, whole, first=3)


@pytest.mark.parametrize(
    ("change", "rate"),
    [
        ("optimizer.lr=1e-9", 1e-9 * (1 - 0.98 / 5)),  # no warmup; decays to 0.02 in 5 steps
        ("scheduler.alpha_f=0.5", 3e-3 * (1 - 0.5 / 5)),
        ("max_duration=60ba", 3e-3 * 2 / 6),  # warmup of 6 steps
    ],
)
def test_accepted_settings_change_the_learning_rate(change, rate, stopped):
    """From the first resumed step on. Composer's rate of a step lags one step behind, so two steps have one rate."""
    rates = []
    allow = "resume.allow=[optimizer,scheduler,max_duration]"
    trainer, watch = trainer_of([*stopped, change, "scheduler.t_decay=0.9dur", allow]), Watch(4)
    watch.batch_start = lambda state, logger: rates.append(state.optimizers[0].param_groups[0]["lr"])
    trainer.state.callbacks.append(watch)
    with pytest.raises(Killed):
        trainer.fit()
    trainer.close()
    assert rates == pytest.approx([rate] * 2, rel=1e-6)


def test_finished_run_is_reported_and_not_changed(saving, folder, capsys):
    losses_of(saving)
    before = names(folder)
    main.run([QUICKSTART, *saving])
    assert "quickstart is finished: 6 steps, max_duration=6ba" in capsys.readouterr().out
    assert names(folder) == before


def test_runs_of_earlier_versions_took_special_words_as_tokens():
    assert ResumeCheck({"seed": 1, "special_tokens": "tokens"}, []).compare({"seed": 1}, "x.pt") == []
    with pytest.raises(ConfigError, match="special_tokens: .*tokens.* there, .*text.* here"):
        ResumeCheck({"special_tokens": "text"}, []).compare({}, "x.pt")


def test_settings_are_compared_by_default():
    run = load("yamls/mosaic_bert.yaml")
    compared = settings(run)
    assert {"seed", "precision", "optimizer.lr", "train_loader.shuffle_seed", "max_seq_len"} <= set(compared)
    assert not {"train_loader.num_workers", "save_interval", "model.attention"} & set(compared)
    assert settings(dataclasses.replace(run, max_seq_len=64)) != compared


@pytest.mark.parametrize("name", ["train_loader.shuffle_seed", "train_loader.num_canonical_nodes"])
def test_settings_restored_by_streaming_cannot_be_allowed(name):
    """By their section neither."""
    for allow in ([name], ["train_loader"]):
        with pytest.raises(ConfigError, match=f"{name}: 2 there, 1 here(?s:.*)cannot change within a run"):
            ResumeCheck({name: 1}, allow).compare({name: 2}, "x.pt")


def test_checkpoint_without_settings_is_a_warning(caplog):
    assert ResumeCheck({"seed": 1}, []).compare(None, "x.pt") == []
    assert "x.pt has no settings" in caplog.text


# Signals, locks, leftovers


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 2), (signal.SIGINT, 0)])
def test_signal_ends_the_run_after_a_saved_step(number, workers, options, whole, folder):
    """After the evaluation of that step; the resumed run is bit-identical."""
    options = [*options, "save_interval=100ba", f"train_loader.num_workers={workers}"]
    before = {each: signal.getsignal(each) for each in StopOnSignal.SIGNALS}
    with pytest.raises(Interrupted, match="stopped by a signal after step 4; its checkpoint is saved"):
        losses_of(options, 4, lambda: os.kill(os.getpid(), number))
    for each, handler in before.items():
        signal.signal(each, handler)
    assert names(folder) == ["ep1-ba4-rank0.pt", "latest-rank0.pt"]
    check_resumes(options, whole, first=5)
    assert signal.getsignal(number) == before[number]  # fit restores the handler


def test_second_signal_ends_at_once_unless_it_is_an_echo():
    stop = StopOnSignal()
    stop._note(signal.SIGTERM, None)
    stop._note(signal.SIGTERM, None)  # the launcher's, at once
    stop.received = time.monotonic() - stop.ECHO - 1
    with pytest.raises(SystemExit) as exit:
        stop._note(signal.SIGINT, None)
    assert exit.value.code == 130


def test_second_run_in_the_folder_is_refused(tmp_path):
    first = checkpoint.RunFolder(str(tmp_path))
    with pytest.raises(ConfigError, match=f"another run uses this folder .process {os.getpid()} on "):
        checkpoint.RunFolder(str(tmp_path), timeout=0.2)
    first.close()
    checkpoint.RunFolder(str(tmp_path), timeout=0.2).close()


def hold_until_killed(code):
    """A process that runs ``code``, says "ready", and sleeps."""
    code += "\nprint('ready', flush=True)\nimport time; time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    return child


def test_shared_memory_of_dead_runs_is_removed_and_of_live_ones_kept(tmp_path, monkeypatch):
    """With a folder in place of /dev/shm, and processes that are killed."""
    monkeypatch.setattr(shared_memory, "SHARED", tmp_path)
    (tmp_path / "locks").mkdir()
    for prefix in (3, 4, 5):
        for name in ("locals", "barrier", "epoch_data", "locks/barrier_filelock", "locks/cache_filelock"):
            path = tmp_path / name
            path.with_name(f"{prefix:06}_{path.name}").touch()
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


def test_the_record_of_shared_memory_outlives_its_segments(tmp_path):
    """A process that is killed while it ends leaves a record as long as it leaves a segment."""
    (tmp_path / "000003_locals").touch()
    ending = (
        "import atexit, os, pathlib, signal; from src.data import shared_memory\n"
        f"shared_memory.SHARED = pathlib.Path({str(tmp_path)!r})\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGKILL)\n"  # as streaming's, when it makes a dataset
        "shared_memory.own_shared_memory(3, '.')"
    )
    subprocess.run([sys.executable, "-c", ending], check=False)
    assert (tmp_path / "000003_owner").exists()


def test_run_records_and_locks_its_shared_memory(options):
    trainer = trainer_of([*options, *UNSAVED])
    prefix = trainer.state.train_dataloader.dataset.shared_memory_prefix  # pyright: ignore
    record = shared_memory.SHARED / f"{prefix:06}_owner"
    with record.open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert json.loads(record.read_text())["locals"] == (shared_memory.SHARED / f"{prefix:06}_locals").stat().st_ino
    trainer.close()


def until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_worker_ignores_signals_and_ends_with_its_parent(tmp_path):
    child = "import signal, src.train.processes as p; p.settle_worker(0); print(1, flush=True); signal.pause()"
    parent = hold_until_killed(
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        f"child.stdout.readline(); open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))"
    )
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")

    def ended():
        return not status.exists() or status.read_text().rsplit(")")[1].split()[0] == "Z"

    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(int(status.parent.name), number)
    time.sleep(0.3)
    assert not ended()
    parent.kill()
    parent.wait()
    until(ended, seconds=20)


# Launched: several processes and nodes


def launched(folder):
    """Losses by step, from the metrics file."""
    return {line["batch"]: line["loss/train/total"] for line in runs.logged(folder) if "loss/train/total" in line}


def finish(launchers, folder):
    """Losses by step, and the weights at the end."""
    runs.wait(launchers, folder)
    model = torch.load(folder / "latest-rank0.pt", mmap=True, weights_only=True)["state"]["model"]
    return launched(folder), runs.flat(model.values())


def wait_for(step, launchers, folder):
    while max(launched(folder), default=0) < step:
        assert all(launcher.poll() is None for launcher in launchers), (folder / "output.txt").read_text()
        time.sleep(0.005)


def kill(launchers, send):
    """SIGKILL by os.kill to the launchers alone, or by os.killpg to their processes too."""
    for launcher in launchers:
        send(launcher.pid, signal.SIGKILL)
        launcher.wait()


def ranks_of(launchers):
    """Processes that the launchers started, and their workers."""
    sessions = {str(launcher.pid) for launcher in launchers}
    stats = [path.read_text().rsplit(")")[1].split() for path in Path("/proc").glob("[0-9]*/stat") if path.exists()]
    return [stat for stat in stats if stat[3] in sessions and stat[0] != "Z"]


@pytest.fixture
def long_options(overrides):
    """80 steps, 4 epochs; with dropout and a loader worker."""
    checkpoint.load_as_data()
    return [
        *overrides,
        *SIX_STEPS,
        "train_loader.num_workers=1",
        "global_train_batch_size=16",
        "device_train_microbatch_size=4",
        "eval_interval=100ba",
        "max_duration=80ba",
        "save_interval=8ba",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("place", [2, 4, "nodes"])
def test_resume_of_killed_processes_is_bit_identical(place, long_options, tmp_path):
    """kill -9 of all processes, then of the launchers alone; then SIGTERM to the launchers."""
    want, weights = finish(start(place, long_options, tmp_path / "whole"), tmp_path / "whole")
    assert len(want) == 80
    folder = tmp_path / "killed"

    launchers = start(place, long_options, folder)
    wait_for(12, launchers, folder)
    kill(launchers, os.killpg)

    launchers = start(place, long_options, folder)
    wait_for(30, launchers, folder)
    kill(launchers, os.kill)
    until(lambda: not ranks_of(launchers), seconds=10)  # none may outlive its launcher

    launchers = start(place, long_options, folder)
    wait_for(50, launchers, folder)
    for launcher in launchers:
        os.kill(launcher.pid, signal.SIGTERM)
    assert [launcher.wait(timeout=60) for launcher in launchers] == [processes.EXIT_INTERRUPTED] * len(launchers)
    saved = torch.load(folder / "latest-rank0.pt", weights_only=True)["state"]["timestamp"]["Timestamp"]["batch"]
    assert saved == max(launched(folder))

    got, same = finish(start(place, long_options, folder), folder)
    assert got == want and torch.equal(same, weights)
