"""How a run ends, what it says, and what the same command does after that."""

import contextlib
import json
import math
import os
import shutil
import signal

import pytest
import torch
from composer.callbacks import CheckpointSaver
from composer.core import Callback

import main
from src import data_c4
from src.common.errors import ConfigError, Interrupted, TrainingError
from src.train import callbacks
from src.train.callbacks import MemoryProbe, StopOnSignal
from src.train.checkpoint import read
from src.train.ending import SaveInterval
from src.train.monitors import StreamShares
from tests.conftest import TRAIN, VALIDATION
from tests.runs import DROPOUT, QUICKSTART, UNSAVED, Killed, fit, logged, losses_of, trainer_of

EVAL = "metrics/eval/LanguageCrossEntropy"


@pytest.fixture
def options(overrides):
    """Few steps an epoch, of one microbatch; saves after each step."""
    sizes = [
        "global_train_batch_size=100",
        "device_train_microbatch_size=100",
        "save_interval=1ba",
        "save_num_checkpoints_to_keep=-1",
    ]
    return [*overrides, *sizes, DROPOUT, "max_duration=1ep", "autoresume=true", "save_overwrite=false"]


@pytest.fixture(autouse=True)
def handlers():
    """A run that a signal ends leaves its handlers in place."""
    before = {number: signal.getsignal(number) for number in StopOnSignal.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def end_of(arguments):
    """Exit code or message of main.py."""
    try:
        main.run([QUICKSTART, *arguments])
    except SystemExit as end:
        return end.code
    return 0


def tree(folder):
    """All files and when they were written, except the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock")]
    return {path: (path.lstat().st_mtime_ns, path.read_bytes()) for path in files}


def latest(folder):
    return read(folder / "checkpoints" / "latest-rank0.pt")


def kill(trainer, event, step):
    """Fit, and end as by a kill at an event of a step."""

    class Kill(Callback):
        def run_event(self, now, state, logger):
            if now.value == event and state.timestamp.batch == step:
                raise Killed

    trainer.state.callbacks.append(Kill())
    with contextlib.suppress(Killed), contextlib.closing(trainer):
        trainer.fit()
        pytest.fail(f"no {event} at step {step}")


def add_composers_saver(trainer, folder, interval):
    """The saver of runs that save to an object store, here to a folder."""
    stop = next(c for c in trainer.state.callbacks if isinstance(c, StopOnSignal))
    folder.mkdir()
    trainer.state.callbacks.append(CheckpointSaver(folder, save_interval=SaveInterval(interval, stop)))


# Finished


@pytest.mark.parametrize(
    ("duration", "interval"),
    [("1ep", "1ba"), ("1ep", "1ep"), ("3ba", "1ep"), ("150sp", "1ba"), ("3000tok", "1000ba"), ("EPOCH", "1000ba")],
)
def test_finished_run_is_known_by_any_unit(duration, interval, options, tmp_path, capsys):
    """EPOCH: as many steps as the epoch has. The last state is saved after its evaluation; a restart writes nothing."""
    steps = len(trainer_of([*options, *UNSAVED]).state.train_dataloader)
    duration = duration.replace("EPOCH", f"{steps}ba")
    options = [*options, f"max_duration={duration}", f"save_interval={interval}", "eval_interval=1000ba"]
    main.main([QUICKSTART, *options])
    evaluated = [line["batch"] for line in logged(tmp_path) if EVAL in line]
    last = latest(tmp_path)["timestamp"]["Timestamp"]
    assert evaluated == [last["batch"]] and last["epoch"] == (last["batch"] == steps)
    before = tree(tmp_path)
    capsys.readouterr()
    main.main([QUICKSTART, *options])
    assert f"is finished: {last['batch']} steps, max_duration={duration}\n" in capsys.readouterr().out
    assert tree(tmp_path) == before


@pytest.mark.parametrize("duration", ["1ep", "3ba"])
def test_run_that_is_killed_in_its_last_evaluation_is_not_finished(duration, options, tmp_path):
    options = [*options, f"max_duration={duration}", "eval_interval=1000ba"]
    steps = 3 if duration == "3ba" else len(trainer_of([*options, *UNSAVED]).state.train_dataloader)
    kill(trainer_of(options), "eval_start", steps)
    assert not any(EVAL in line for line in logged(tmp_path))
    main.main([QUICKSTART, *options])
    assert [line["batch"] for line in logged(tmp_path) if EVAL in line] == [steps]


# Stopped by a component


STOPPERS = {
    # Never better than at first: stops when more than 2 steps have passed.
    "early_stopper": ("{monitor: LanguageCrossEntropy, dataloader_label: eval, comp: less, min_delta: 9, PATIENCE}", 4),
    "threshold_stopper": ("{monitor: LanguageCrossEntropy, dataloader_label: eval, comp: less, threshold: 99}", 3),
}


@pytest.mark.parametrize("name", STOPPERS)
@pytest.mark.parametrize("killed_at", [None, 2, "time_limit"])
def test_stopper_stops_a_run_at_the_same_step_after_a_restart(name, killed_at, options, tmp_path, capsys):
    text, step = STOPPERS[name]
    interval = "3ba" if name == "threshold_stopper" else "1ba"
    options = [*options, "max_duration=9ba", f"eval_interval={interval}"]
    stopper = f"callbacks.{name}={text.replace('PATIENCE', 'patience: 2ba')}"
    if killed_at == "time_limit":  # evaluates at its intervals only
        assert end_of([*options, stopper, "time_limit=0.001s"]) == 75
        capsys.readouterr()
    elif killed_at is not None:
        losses_of([*options, stopper], killed_at + 1)
    main.main([QUICKSTART, *options, stopper])
    assert f"stopped by {name} after step {step} (max_duration=9ba)" in capsys.readouterr().out
    assert logged(tmp_path)[-1]["batch"] == step and latest(tmp_path)["timestamp"]["Timestamp"]["batch"] == step
    before = tree(tmp_path)
    main.main([QUICKSTART, *options, stopper])
    assert f"is finished: stopped by {name} after step {step}." in capsys.readouterr().out
    assert tree(tmp_path) == before
    more, _ = losses_of(options)  # without it the run goes on
    assert list(more) == list(range(step + 1, 10))


def test_changed_stopper_lets_the_run_go_on(options):
    options = [*options, "max_duration=5ba", "eval_interval=1ba"]
    text = STOPPERS["early_stopper"][0]
    first, _ = losses_of([*options, f"callbacks.early_stopper={text.replace('PATIENCE', 'patience: 1ba')}"])
    more, _ = losses_of([*options, f"callbacks.early_stopper={text.replace('PATIENCE', 'patience: 9ba')}"])
    assert list(first) == [1, 2, 3] and list(more) == [4, 5]


# Stopped before the end: exit codes


@pytest.mark.parametrize("saves", [True, False])
def test_time_limit_says_so_and_75_means_saved(saves, options, tmp_path, capsys):
    options = [*options, "max_duration=100000ba", "save_interval=50000ba", "time_limit=1s", *UNSAVED * (not saves)]
    assert end_of(options) == (75 if saves else 124)
    step = logged(tmp_path)[-1]["batch"]
    said, kept = capsys.readouterr(), "its checkpoint is saved" if saves else "nothing is saved"
    assert f"main.py: stopped by time_limit after step {step} (max_duration=100000ba); {kept}" in said.err
    assert ("eval LanguageCrossEntropy=" in said.out) == (EVAL in logged(tmp_path)[-1]) == (not saves)
    if saves:
        more, _ = losses_of(options[:-1], kill_at=step + 1)
        assert list(more) == [step + 1]


def test_time_limit_at_the_last_step_is_the_end(options, capsys):
    assert end_of([*options, "max_duration=1ba", "time_limit=0.001s"]) == 0
    assert "stopped by" not in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("saves", [True, False])
def test_signal_exit_code_says_whether_it_is_saved(number, code, saves, options, tmp_path):
    options = [*options, "save_interval=1000ba", "max_duration=9ba", *UNSAVED * (not saves)]
    with pytest.raises(Interrupted, match="after step 2; its checkpoint" if saves else "; nothing is saved") as end:
        losses_of(options, 2, lambda: os.kill(os.getpid(), number))
    assert end.value.code == (75 if saves else code)
    assert (tmp_path / "checkpoints").exists() == saves


def test_signal_to_another_process_stops_this_one(options, tmp_path, monkeypatch):
    """Also where Composer's own saver, for object stores, comes after the callback that ends the run."""
    monkeypatch.setattr(callbacks, "highest", lambda state, value: int(state.timestamp.batch == 2) * signal.SIGTERM)
    trainer = trainer_of([*options, *UNSAVED])
    add_composers_saver(trainer, tmp_path / "checkpoints", "1000ba")
    with pytest.raises(Interrupted, match="its checkpoint is saved") as end, contextlib.closing(trainer):
        trainer.fit()
    assert end.value.code == 75 and latest(tmp_path)["timestamp"]["Timestamp"]["batch"] == 2


@pytest.mark.parametrize("duration", ["2ba", "1ep"])
def test_signal_in_the_last_step_lets_the_run_finish(duration, options, tmp_path):
    options = [*options, f"max_duration={duration}"]
    steps = 2 if duration == "2ba" else len(trainer_of([*options, *UNSAVED]).state.train_dataloader)
    fit(options, steps, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert end_of(options) == 0 and latest(tmp_path)["timestamp"]["Timestamp"]["batch"] == steps


ALGORITHMS = {
    "ema": "algorithms.ema={half_life: 2ba}",
    "swa": "algorithms.swa={swa_start: 0.2dur, swa_end: 1dur, update_interval: 1ba, schedule_swa_lr: false}",
    "gradient_clipping": "algorithms.gradient_clipping={clipping_type: norm, clipping_threshold: 0.1}",
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithm_resumes_bit_for_bit_and_a_signal_saves_what_an_interval_does(name, options, tmp_path):
    options = [*options, ALGORITHMS[name], "max_duration=6ba", "eval_interval=1ba", "optimizer.lr=0.01"]
    want, _ = losses_of(options)
    end = latest(tmp_path)["model"]
    plain, _ = losses_of([option for option in [*options, *UNSAVED] if option != ALGORITHMS[name]])
    assert plain != want or name != "gradient_clipping"
    every = [*options, f"save_folder={tmp_path}/b/checkpoints"]
    with pytest.raises(Interrupted):
        losses_of([*every, "save_interval=1000ba"], 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    by_signal, (by_interval,) = latest(tmp_path / "b"), (tmp_path / "checkpoints").glob("ep*-ba3-rank0.pt")
    same = read(by_interval)["model"]
    assert all(torch.equal(weight, same[key]) for key, weight in by_signal["model"].items())
    got, _ = losses_of(every)
    assert got == {step: loss for step, loss in want.items() if step > 3}
    again = latest(tmp_path / "b")["model"]
    assert all(torch.equal(weight, again[key]) for key, weight in end.items())


STOPPER = "callbacks.threshold_stopper={monitor: LanguageCrossEntropy, threshold: 99.0, dataloader_label: eval}"
"""Stops at the first evaluation."""
TWO_STEPS = ["global_train_batch_size=200", "device_train_microbatch_size=200"]
"""Steps of an epoch."""


def ends_of_pauses(options):
    """Exit codes of main.py until it is 0, with a time limit that each start's first step reaches."""
    codes = []
    while not codes or codes[-1] == 75:
        codes.append(end_of([*options, "time_limit=0.001s"]))
        assert len(codes) < 50
    return codes


SWA = {
    "steps": "{swa_start: 0.2dur, swa_end: 0.9dur, update_interval: 1ba}",
    "duration": "{swa_start: 0.2dur, swa_end: 0.7dur, update_interval: 1ep}",
    "epochs": "{swa_start: 1ep, swa_end: 2ep, update_interval: 1ba}",
}


@pytest.mark.parametrize("name", SWA)
def test_swa_averages_in_a_run_of_epochs_whether_paused_or_not(name, options, tmp_path):
    averaged = [*options, *TWO_STEPS, "max_duration=2ep", "eval_interval=0", f"algorithms.swa={SWA[name]}"]
    assert end_of(averaged) == 0
    want = latest(tmp_path)
    assert want["algorithms"][0][1]["swa_completed"]
    paused = [*averaged, f"save_folder={tmp_path}/b/checkpoints"]
    assert set(ends_of_pauses(paused)) == {75, 0}
    got = latest(tmp_path / "b")["model"]
    assert all(torch.equal(weight, got[key]) for key, weight in want["model"].items())


def test_longer_run_cannot_average_what_is_averaged(options):
    options = [*options, "algorithms.swa={}", "eval_interval=0"]
    assert end_of([*options, "max_duration=3ba"]) == 0
    message = end_of([*options, "max_duration=6ba", "resume.allow=[max_duration]"])
    assert "algorithms.swa: the checkpoint's weights are averages already" in message


@pytest.mark.parametrize(
    ("duration", "interval"),
    [("2ep", "0.5dur"), ("4ba", "0.5dur")],
)
def test_pauses_add_no_evaluation(duration, interval, options, tmp_path):
    options = [*options, *TWO_STEPS, f"eval_interval={interval}", f"max_duration={duration}"]

    def evaluated():
        return [line["batch"] for line in logged(tmp_path) if EVAL in line]

    assert end_of(options) == 0
    want = evaluated()
    ends_of_pauses([*options, f"save_folder={tmp_path}/b/checkpoints"])
    assert evaluated() == want


def test_stopper_that_fires_with_the_time_limit_ends_the_run(options, tmp_path):
    options = [*options, "max_duration=9ba", "eval_interval=2ba", STOPPER]
    assert ends_of_pauses(options) == [75, 0]
    assert latest(tmp_path)["timestamp"]["Timestamp"]["batch"] == 2
    assert end_of(options) == 0 and latest(tmp_path)["timestamp"]["Timestamp"]["batch"] == 2


# Failures


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["ours", "composer's", "ema"])
def test_weights_that_are_not_finite_are_not_saved(value, what, options, tmp_path):
    """By no saver; with EMA also if the averaged ones are finite. The error names the last sound checkpoint."""
    options = [*options, "max_duration=9ba", *[ALGORITHMS["ema"]] * (what == "ema")]
    trainer = trainer_of([*options, *UNSAVED * (what == "composer's")])
    if what == "composer's":
        add_composers_saver(trainer, tmp_path / "checkpoints", "1ba")

    class Spoil(Callback):
        def batch_end(self, state, logger):
            if state.timestamp.batch == 2:
                with torch.no_grad():
                    next(state.model.parameters()).view(-1)[0] = value

    trainer.state.callbacks.insert(0, Spoil())
    message = (
        r"after step 2, (model|algorithms)\.\S+ is NaN or infinite, so nothing is saved. Last checkpoint before it: "
    )
    with pytest.raises(TrainingError, match=message) as error, contextlib.closing(trainer):
        trainer.fit()
    name = str(error.value).split("before it: ")[1].split(". ")[0]
    assert os.readlink(tmp_path / "checkpoints" / "latest-rank0.pt") == os.path.basename(name)
    assert read(name)["timestamp"]["Timestamp"]["batch"] == 1


@pytest.mark.parametrize("lost", [1, 2])
def test_lost_last_batches_are_an_error(lost, options, monkeypatch):
    whole = data_c4.Loader.__iter__
    monkeypatch.setattr(data_c4.Loader, "__iter__", lambda self: iter(list(whole(self))[:-lost]))
    with pytest.raises(TrainingError, match=r"epoch 1 ended after \d+ of \d+ samples"):
        fit([*options, *UNSAVED, "eval_interval=0"])


def test_accepted_batch_size_ends_the_epoch_with_its_samples(options, tmp_path):
    losses_of(options, kill_at=2)
    accept = ["global_train_batch_size=40", "device_train_microbatch_size=40", "resume.allow=[global_train_batch_size]"]
    assert end_of([*options, *accept]) == 0
    steps = [line["sample"] for line in logged(tmp_path) if "loss/train/total" in line]
    assert steps[:2] == [100, 140] and end_of([*options, *accept]) == 0
    assert latest(tmp_path)["timestamp"]["Timestamp"]["epoch"] == 1


@pytest.mark.parametrize("duration", ["4ba", "2ep"])
def test_accepted_batch_size_makes_the_epoch_longer(duration, options, tmp_path):
    """A step of 40 samples, then of 100: the epoch of 307 has four steps, and with the first of them five or more."""
    small = ["global_train_batch_size=40", "device_train_microbatch_size=40", "resume.allow=[global_train_batch_size]"]
    losses_of([*options, *small, f"max_duration={duration}"], kill_at=3)
    options = [*options, f"max_duration={duration}", "resume.allow=[global_train_batch_size]", "eval_interval=3ba"]
    losses_of([*options], kill_at=4)  # again, with the batch size of the checkpoint
    assert end_of(options) == 0
    sizes = [line["sample"] for line in logged(tmp_path) if EVAL not in line]
    epoch = [40, 80, 180, 280, TRAIN]
    after = [TRAIN + size for size in (100, 200, 300, TRAIN)]
    assert sizes == {"4ba": epoch[:4], "2ep": epoch + after}[duration]
    end = latest(tmp_path)["timestamp"]["Timestamp"]
    assert (end["batch"], end["epoch"]) == (len(sizes), {"4ba": 0, "2ep": 2}[duration])


def test_other_data_whose_epoch_has_ended_before_is_refused(options):
    losses_of(options, kill_at=3)  # after 200 samples
    with pytest.raises(ConfigError, match=f"is {200 - VALIDATION} samples beyond the end of this data's epoch"):
        trainer_of([*options, "train_loader.split=val", "resume.allow=[dataset]"])


def test_batch_size_within_an_epoch_grouped_by_length_is_refused(options):
    options = [*options, "train_loader.length_window=2", "save_interval=1ep", "max_duration=2ep"]
    accept = ["global_train_batch_size=50", "device_train_microbatch_size=50", "resume.allow=[global_train_batch_size]"]
    losses_of([*options, "save_interval=1ba"], kill_at=2)
    with pytest.raises(ConfigError, match="global_train_batch_size decides the order of samples"):
        trainer_of([*options, *accept])
    steps = len(trainer_of([*options, *UNSAVED]).state.train_dataloader)
    losses_of(options, kill_at=steps + 1)  # saved at the end of the epoch
    trainer_of([*options, *accept]).close()


# What a start writes


@pytest.mark.parametrize("refused", ["conflict", "memory"])
def test_refused_start_writes_nothing(refused, options, tmp_path, monkeypatch, token_shards):
    options = [*options, "max_duration=2ba"]
    main.main([QUICKSTART, *options])
    before = tree(tmp_path)
    if refused == "memory":

        def fail(*_):
            raise TrainingError("too little memory")

        monkeypatch.setattr(MemoryProbe, "fit_start", fail)
        options = [*options, "save_overwrite=true"]
    assert "may conflict" in str(end_of([*options, "autoresume=false", "optimizer.lr=0.1"])) or refused == "memory"
    after = tree(tmp_path)
    assert {path: after[path] for path in before} == before
    assert not [path for path in set(after) - set(before) if "tensorboard" not in str(path)]


def test_metrics_file_that_is_a_folder_is_refused_before_anything_is_written(options, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "data").write_text("kept")
    message = end_of([*options, f"loggers.metrics_file.path={tmp_path}/mine"])
    assert f"loggers.metrics_file: path: expected a file, but {tmp_path}/mine is a folder" in message
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() and path.parts[-2] != "checkpoints"] == ["data"]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} <= {".lock", ".lock.holder"}


def test_metrics_file_may_be_a_link(options, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "elsewhere" / "metrics.jsonl")
    fit([*options, *UNSAVED, "eval_interval=0", f"loggers.metrics_file.path={tmp_path}/link.jsonl"])
    assert (tmp_path / "link.jsonl").is_symlink() and (tmp_path / "elsewhere" / "metrics.jsonl").read_text()


def test_new_run_keeps_an_earlier_metrics_file(options, tmp_path):
    path = tmp_path / "metrics.jsonl"
    texts = []
    for _ in range(3):
        fit([*options, *UNSAVED, "max_duration=1ba", "eval_interval=0"])
        texts.append(path.read_text())
    kept = [tmp_path / f"metrics.{number}.jsonl" for number in (1, 2)]
    assert [file.read_text() for file in [*kept, path]] == texts


def test_start_from_a_checkpoint_keeps_the_lines_of_a_finished_run(options, tmp_path):
    """Only the run's own resume writes lines after its checkpoint anew."""
    path = tmp_path / "metrics.jsonl"
    fit([*options, "max_duration=4ba"])
    whole = path.read_text()
    (start,) = (tmp_path / "checkpoints").glob("ep0-ba2-rank0.pt")
    options = [*options, *UNSAVED, f"load_path={start}", "eval_interval=0", "resume.allow=[max_duration]"]
    fit([*options, "max_duration=3ba"])
    assert (tmp_path / "metrics.1.jsonl").read_text() == whole
    assert [line["batch"] for line in logged(tmp_path)] == [1, 2, 3]
    fit([*options, "max_duration=5ba"])
    assert [line["batch"] for line in logged(tmp_path)] == [1, 2, 3, 4, 5]
    assert len(list(tmp_path.glob("metrics*.jsonl"))) == 3


# Metrics


@pytest.mark.parametrize("interval", ["1ba", "1ep", "1000ba", "stopper"])
def test_last_step_is_evaluated_once(interval, options):
    """Though it is due at the end of the step, of the epoch, and of the run; or stops the run at an epoch's end."""

    class Count(Callback):
        steps = []

        def eval_start(self, state, logger):
            self.steps.append(state.timestamp.batch.value)

    steps = -(-TRAIN // 100)
    if interval == "stopper":
        options = [*options, STOPPER, "max_duration=2ep"]
    every = f"{steps}ba" if interval == "stopper" else interval
    trainer, count = trainer_of([*options, *UNSAVED, f"eval_interval={every}"]), Count()
    trainer.state.callbacks.append(count)
    with contextlib.closing(trainer):
        trainer.fit()
    assert trainer.state.timestamp.batch.value == steps
    assert count.steps == (list(range(1, steps + 1)) if interval == "1ba" else [steps])


@pytest.mark.parametrize("label", ["eval", "a/b"])
def test_evaluation_is_in_the_metrics_once(label, options, tmp_path, token_shards):
    """After a kill between the last evaluation of an epoch and the next checkpoint."""
    options = [*options, "eval_interval=1ep", "max_duration=2ep"]
    if label != "eval":
        options.append(f"eval_loaders={{{label}: {{split: val}}}}")
    EVAL = f"metrics/{label}/LanguageCrossEntropy"
    steps = len(trainer_of([*options, *UNSAVED]).state.train_dataloader)
    kill(trainer_of(options), "epoch_checkpoint", steps)
    first = logged(tmp_path)
    assert EVAL in first[-1]
    more = len(first) - steps
    losses_of(options)
    lines = logged(tmp_path)
    assert [line["batch"] for line in lines if EVAL in line] == [steps, 2 * steps]
    trained = [line["batch"] for line in lines if "loss/train/total" in line]
    assert trained == list(range(1, 2 * steps + 1)) and len(lines) == 2 * (steps + more)
    assert lines[: steps + more] == first


def test_metrics_file_is_json_and_drops_damaged_lines_at_a_restart(options, tmp_path, caplog):
    options, path = [*options, "max_duration=4ba", "eval_interval=0"], tmp_path / "metrics.jsonl"
    losses_of(options, kill_at=3)
    lines = path.read_text().splitlines()
    typed = [b'{"batch": %s}' % value for value in (b'"3"', b"1e999", b"NaN", b"2.0", b"true", b"null", b"[" * 100_000)]
    damaged = [b"\xff\x00{]", b"[1]", *typed, b'{"batch": 2, "x"']
    path.write_bytes(b"\n".join([lines[0].encode(), *damaged[:-1], lines[1].encode(), damaged[-1]]))
    trainer, infinite = trainer_of(options), Callback()
    infinite.batch_end = lambda state, logger: logger.log_metrics({"a": math.nan, "b": -math.inf, "c": 1.0})
    trainer.state.callbacks.append(infinite)
    with contextlib.closing(trainer):
        trainer.fit()
    for number in (*range(2, 1 + len(damaged)), 2 + len(damaged)):
        assert f"{path}, line {number} is not a line of metrics" in caplog.text

    def refuse(constant):
        raise AssertionError(constant)

    read_again = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert [line["batch"] for line in read_again] == [1, 2, 3, 4]
    assert (read_again[-1]["a"], read_again[-1]["b"], read_again[-1]["c"]) == (None, None, 1.0)


def test_checkpoint_without_token_shares_is_loaded():
    """Earlier versions did not store them."""
    shares = StreamShares()
    shares.load_state_dict({})


def test_token_shares_continue_after_a_restart_from_an_epochs_last_step(options, tmp_path, token_shards):
    shutil.copytree(f"{token_shards}/val", tmp_path / "own" / "val")
    streams = f"{{a: {{local: {token_shards}}}, b: {{local: {tmp_path}/own, split: val}}}}"
    mixed = [*options, f"train_loader.streams={streams}", f"eval_loader.local={token_shards}", "eval_interval=0"]
    mixed += ["max_duration=2ep"]

    def shares(run):
        return [line["data/token_share/b"] for line in logged(run) if "data/token_share/b" in line]

    losses_of([*mixed, f"save_folder={tmp_path}/a/c", f"loggers.metrics_file.path={tmp_path}/a/metrics.jsonl"])
    steps = len(trainer_of([*mixed, *UNSAVED]).state.train_dataloader)
    for event in ("epoch_end", None):
        trainer = trainer_of(mixed)
        if event:
            kill(trainer, event, steps)
        else:
            trainer.fit()
            trainer.close()
    assert shares(tmp_path) == shares(tmp_path / "a") and 0 < shares(tmp_path)[0] < 1
