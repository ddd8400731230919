import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from src.common.errors import ConfigError
from src.train import config
from src.train.config import load
from src.train.schema import to_dict
from tests.conftest import YAMLS


def paths_of(tree, prefix=""):
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from paths_of(value, f"{prefix}{key}.")


def misspell(tree, path):
    """``tree`` with the last key of ``path`` misspelt."""
    first, _, rest = path.partition(".")
    if rest:
        return {**tree, first: misspell(tree[first], rest)}
    return {(key + "x" if key == first else key): value for key, value in tree.items()}


@pytest.fixture
def quickstart():
    return yaml.safe_load(Path("yamls/quickstart.yaml").read_text())


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_shipped_yamls_load_and_survive_a_round_trip(path, write):
    run = load(str(path))
    assert load(write(to_dict(run))) == run


def test_loaders_take_defaults_of_the_run(write, quickstart):
    sets = {"domain": {"split": "dev", "local": "elsewhere"}, "c4": {"split": "val", "mlm_probability": 0.2}}
    run = load(write({**quickstart, "eval_loaders": sets}), ["data_remote=s3://bucket/c4", "seed=3"])
    for loader in (run.train_loader, run.eval_loader, run.eval_loaders["c4"]):
        assert (loader.local, loader.remote) == (run.data_local, "s3://bucket/c4")
    assert (run.eval_loaders["domain"].local, run.eval_loaders["domain"].remote) == ("elsewhere", None)
    assert run.train_loader.shuffle_seed == 3 and run.eval_loader.mlm_probability == 0.15
    assert load(write(to_dict(run))) == run


def test_streams_take_defaults_of_the_run(write, quickstart):
    streams = {"wiki": {"proportion": 0.9}, "own": {"proportion": 0.1, "local": "own", "remote": "s3://own"}}
    quickstart["train_loader"] = {"streams": streams, "predownload": 8, **quickstart["train_loader"]}
    run = load(write(quickstart))
    assert list(run.train_loader.streams) == ["own", "wiki"]  # sorted, not in the order of the lines
    own, wiki = run.train_loader.streams.values()
    assert (wiki.local, wiki.remote, wiki.split) == (run.data_local, None, "train")
    assert (own.local, own.remote, own.split, own.proportion) == ("own", "s3://own", "train", 0.1)
    assert load(write(to_dict(run))) == run


def test_overrides_and_interpolation(write, quickstart, monkeypatch):
    monkeypatch.setenv("MY_FOLDER", "/data/secret-place")
    path = write({**quickstart, "save_folder": "${data_local}/${run_name}", "data_local": "${oc.env:MY_FOLDER}"})
    run = load(path, ["run_name=x", "max_duration=7ba", "optimizer.lr=1e-5", "model.model_config.hidden_size=12"])
    assert run.save_folder == "/data/secret-place/x" and run.max_duration == "7ba"
    assert run.optimizer.options["lr"] == 1e-5 and run.model.options["model_config"]["hidden_size"] == 12


def test_one_error_reports_all_faults(write, quickstart):
    broken = {**quickstart, "sed": 1, "max_seq_len": "long", "max_duration": "1h", "train_loader": {"splt": "train"}}
    del broken["tokenizer_name"]
    with pytest.raises(ConfigError) as error:
        load(write(broken), ["eval_loader.num_workers=-1"])
    message = str(error.value)
    for fault in (
        "sed: unknown key; did you mean 'seed'?",
        "tokenizer_name: missing",
        "max_seq_len: expected int, got 'long'",
        "train_loader.splt: unknown key; did you mean 'split'?",
        "train_loader.split: missing",
        "train_loader.num_canonical_nodes: missing",
    ):
        assert fault in message
    assert "6 faults" in message


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("max_duration=1h", "max_duration: expected a number with ba, sp, tok or ep, got '1h'"),
        ("max_duration=0ba", "max_duration: expected a number with ba, sp, tok or ep, got '0ba'"),
        ("mlm_probability=1.5", "mlm_probability: expected a share between 0 and 1, got 1.5"),
        ("mlm_probability=true", "mlm_probability: expected float or keys and values, got True"),
        ("eval_loader.mlm_probability=0", "eval_loader.mlm_probability: expected a share between 0 and 1, got 0.0"),
        ("precision=fp64", "precision: expected one of fp32, amp_bf16, amp_fp16, got 'fp64'"),
        ("device_train_microbatch_size=big", "size: expected int or one of auto or null, got 'big'"),
        ("device_train_microbatch_size=0", "device_train_microbatch_size: expected a positive number, got 0"),
        ("device_train_microbatch_tokens=63", "microbatch_tokens: expected at least max_seq_len (64), got 63"),
        ("device_train_microbatch_tokens=64 && model.name=hf_bert", "hf_bert computes padding too, so give device_tr"),
        ("max_seq_len=2", "max_seq_len: expected more than the 2 special tokens of a sample, got 2"),
        ("model=bert", "model: expected a section with a 'name', got 'bert'"),
        ("loggers=[]", "loggers: expected keys and values, got []"),
        ("callbacks=3", "callbacks: expected keys and values, got 3"),
        ("callbacks.nan_monitor=null", "nothing to remove; callbacks: step_monitor, lr_monitor"),
        ("algorithms={ema: null}", "nothing to remove; algorithms: none"),
        ("optimizer.betas[0]=0.8", "override 'optimizer.betas[0]=0.8': it changes a part of a list; give the whole"),
        ("optimizer.betas.0=0.8", "it changes a part of a list; give the whole list"),
        ("seed=???", "override 'seed=???': ??? stands for a value that is still to be given"),
        ("pretrained=???", "override 'pretrained=???': ??? stands for a value"),
        ("optimizer.lr=???", "override 'optimizer.lr=???': ??? stands for a value"),
        ("optimizer={name: adamw, lr: '???'}", "??? stands for a value"),
        ("train_loader={}", "train_loader.split: missing"),
        ("algorithms=[]", "algorithms: expected keys and values, got []"),
        ("callbacks.speed_monitor=3", "callbacks.speed_monitor: expected keys and values"),
        ("train_loader=3", "train_loader: expected keys and values, got 3"),
        ("train_loader.num_canonical_nodes=0", "train_loader.num_canonical_nodes: expected a positive number, got 0"),
        ("train_loader.download_retry=0", "train_loader.download_retry: expected a positive number, got 0"),
        ("train_loader.predownload=0", "train_loader.predownload: expected a positive number, got 0"),
        ("train_loader.prefetch_factor=4", "train_loader.prefetch_factor: has no effect without num_workers"),
        ("eval_loader.persistent_workers=true", "eval_loader.persistent_workers: has no effect without num_workers"),
        ("train_loader.predownload=8", "train_loader.predownload: has no effect without a remote"),
        ("train_loader.cache_limit=1gb", "train_loader.cache_limit: has no effect without a remote"),
        ("eval_loader.download_retry=3", "eval_loader.download_retry: has no effect without a remote"),
        ("eval_loader.predownload=8", "eval_loader.predownload: unknown"),
        ("eval_loader.moving_crop=true", "eval_loader.moving_crop: unknown"),
        ("train_loader.length_window=-1", "train_loader.length_window: expected 0 or more, got -1"),
        ("train_loader={length_window: 8, shuffle: false}", "length_window: has no effect without shuffle"),
        (
            "train_loader={length_window: 8, num_canonical_nodes: 7}",
            "global_train_batch_size: expected a multiple of num_canonical_nodes (7)",
        ),
        ("train_loader.streams={a: {weight: 2}}", "train_loader.streams.a.weight: unknown"),
        ("train_loader.streams={a: {proportion: 0}}", "a.proportion: expected a positive number of at most 1e+12"),
        ("train_loader.streams={a: {choose: -5}}", "a.choose: expected a positive number of at most 1e+12, got -5"),
        ("train_loader.streams={a: {repeat: 1e300}}", "streams.a.repeat: expected a positive number of at most 1e+06"),
        ("train_loader.streams={a: {repeat: 2, choose: 5}}", "streams.a: repeat and choose: give one of them"),
        (
            "train_loader.streams={a: {proportion: 2}, b: {local: x, repeat: 2}}",
            "streams: give a proportion to each of them, or to none",
        ),
        ("train_loader.streams={a: {}, b: {split: train}}", "streams.b: same folder as streams.a"),
        ("train_loader.streams={a: {local: x}, b: {local: y/../x/, split: ./train}}", "same folder as streams.a"),
        ("train_loader.streams={'': {}}", "train_loader.streams: expected names that are not empty"),
        ("train_loader={local: x, streams: {a: {}}}", "train_loader: with streams, give local and remote in each"),
        ("time_limit=4hours", "time_limit: expected a number with d, h, min or s, got '4hours'"),
        ("load_weights_only=true", "load_weights_only: has no effect without load_path"),
        (
            "pretrained=a && load_path=b && load_weights_only=true",
            "pretrained: load_path with load_weights_only sets the weights, too",
        ),
        ("save_folder=null && autoresume=true", "autoresume: nothing to resume from without a save_folder"),
        ("mlm_probability={initial: 0.3, finl: 0.15}", "mlm_probability.finl: unknown key; did you mean 'final'"),
        ("eval_loaders={a: {splt: x}}", "eval_loaders.a.splt: unknown key"),
        ("eval_loaders={a: {splt: x}}", "eval_loaders.a.split: missing"),
        ("eval_loaders={b: 3}", "eval_loaders.b: expected keys"),
        ("eval_loaders={eval: {split: x}}", "expected a name other than train and eval, got 'eval'"),
        ("max_duration", "override 'max_duration': expected key=value"),
    ],
)
def test_each_fault_is_reported(override, fault, write, quickstart):
    with pytest.raises(ConfigError) as error:
        load(write(quickstart), override.split(" && "))
    assert fault in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "section", "want"),
    [
        ("callbacks={}", "callbacks", {}),
        ("callbacks=null", "callbacks", {}),
        ("loggers={}", "loggers", {}),
        ("algorithms.ema={} && algorithms={}", "algorithms", {}),
        ("loggers={} && loggers.console_line={}", "loggers", {"console_line": {}}),
        ("callbacks.step_monitor=null", "callbacks", {"lr_monitor": {}}),
        ("callbacks={step_monitor: null, nan_monitor: {}}", "callbacks", {"lr_monitor": {}, "nan_monitor": {}}),
        (
            "callbacks.step_monitor.window_size=3 && callbacks={step_monitor: {}}",
            "callbacks",
            {"step_monitor": {}, "lr_monitor": {}},
        ),
        (
            "loggers={wandb: {project: x}} && loggers.wandb={name: y} && loggers.tensorboard=null && "
            "loggers.metrics_file=null",
            "loggers",
            {"wandb": {"project": "x", "name": "y"}},  # here, name is an option
        ),
        (
            "scheduler={name: linear_decay_with_warmup, t_warmup: 5ba}",
            "scheduler",
            {"name": "linear_decay_with_warmup", "t_warmup": "5ba"},
        ),
        (
            "scheduler={t_decay: 0.2dur} && scheduler.alpha_f=0.1",
            "scheduler",
            {"name": "warmup_stable_decay", "t_warmup": "0.1dur", "t_decay": "0.2dur", "alpha_f": 0.1},
        ),
        ("optimizer={name: adamw, lr: 1} && optimizer.eps=2", "optimizer", {"name": "adamw", "lr": 1, "eps": 2}),
        ("model.model_config={} && model.name=hf_bert", "model", {"name": "hf_bert", "model_config": {}}),
        ("resume.allow=[a, seed] && resume={allow: [seed]}", "resume", {"allow": ["seed"]}),
    ],
)
def test_what_an_override_changes(overrides, section, want, write, quickstart):
    assert to_dict(load(write(quickstart), overrides.split(" && ")))[section] == want


def test_an_override_of_a_reference_changes_no_other_section(write, quickstart):
    path = write({**quickstart, "eval_loaders": {"more": "${eval_loader}"}})
    run = load(path, ["eval_loaders.more.split=dev", "eval_loaders.more.num_workers=0"])
    assert (run.eval_loader.split, run.eval_loaders["more"].split) == ("val", "dev")


def test_each_value_that_is_still_to_be_given_is_missing(write, quickstart):
    """Also one with a default, and the options of components."""
    for section, key in (("optimizer", "lr"), ("loggers", "tensorboard"), ("train_loader", "shuffle")):
        quickstart[section] = {**quickstart[section], key: "???"}
    quickstart["loggers"]["metrics_file"] = {"path": "???"}
    with pytest.raises(ConfigError) as error:
        load(write({**quickstart, "seed": "???", "pretrained": "???"}))
    names = ("seed", "pretrained", "optimizer.lr", "loggers.tensorboard", "loggers.metrics_file.path")
    for name in (*names, "train_loader.shuffle"):
        assert f"  {name}: missing\n" in f"{error.value}\n"


def test_names_are_texts_as_written(write):
    streams = "{2019: {proportion: 1}, c4: {local: x, proportion: 1}, 0x1: {local: y, proportion: 2}}"
    text = Path("yamls/quickstart.yaml").read_text().replace("  split: train", f"  split: train\n  streams: {streams}")
    run = load(write(text), ["train_loader.streams.2019.proportion=3"])
    proportions = {name: stream.proportion for name, stream in run.train_loader.streams.items()}
    assert proportions == {"0x1": 2, "2019": 3, "c4": 1}
    assert load(write(to_dict(run))) == run


@pytest.mark.parametrize("seed", [0, 5])
def test_a_given_seed_of_the_order_is_not_the_runs(seed):
    run = load("yamls/quickstart.yaml", ["seed=3", f"train_loader.shuffle_seed={seed}"])
    assert run.train_loader.shuffle_seed == seed


def test_pretrained_may_stand_next_to_a_checkpoint_to_resume(write, quickstart):
    assert load(write(quickstart), ["pretrained=a", "load_path=b"]).pretrained == "a"


def test_required_value_may_come_from_an_override(write, quickstart):
    path = write({**quickstart, "tokenizer_name": "???"})
    with pytest.raises(ConfigError, match="tokenizer_name: missing"):
        load(path)
    assert load(path, ["tokenizer_name=mine"]).tokenizer_name == "mine"


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_each_key_misspelt_is_refused(path, write):
    """Keys of config.py; test_builders.py has the options of components."""
    tree = yaml.safe_load(path.read_text())
    components = ("model.", "optimizer.", "scheduler.", "callbacks.", "loggers.", "algorithms.")
    tried = 0
    for key in paths_of(tree):
        if not key.startswith(components) or key.endswith(".name"):
            with pytest.raises(ConfigError, match=f"{key}x: unknown" if not key.endswith(".name") else "name"):
                load(write(misspell(tree, key)))
            tried += 1
    assert tried > 20


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("- 1", "Cannot merge|top level"),
        ("a: [", "while parsing"),
        ("a: 1\na: 2", "duplicate"),
        ("run_name: ${nothing}", "nothing"),
        (None, "no such file"),
    ],
)
def test_file_without_a_config_is_refused(text, fault, write):
    with pytest.raises(ConfigError, match=fault):
        load("none.yaml" if text is None else write(text))


def test_failed_reference_names_misspelt_key(write, quickstart):
    """Only unknown keys are reported: other faults may follow from the failed reference."""
    quickstart["data_locl"] = quickstart.pop("data_local")
    with pytest.raises(ConfigError) as error:
        load(write({**quickstart, "save_folder": "${data_local}/x"}))
    assert "data_locl: unknown key; did you mean 'data_local'?" in str(error.value)
    assert "missing" not in str(error.value)


@pytest.mark.parametrize(("text", "seconds"), [("4h", 14400), ("1.5min", 90), ("90s", 90), ("2d", 172800)])
def test_time_limit_in_seconds(text, seconds):
    assert config.seconds(text) == seconds


def test_every_field_has_a_docstring():
    for node in ast.parse(Path(config.__file__).read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Schedule")):
            for field, following in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign):
                    documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                    assert documented, f"{node.name}: {ast.unparse(field)}"


def test_config_imports_no_torch():
    code = "import sys, src.train.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_config_is_frozen():
    run = load("yamls/quickstart.yaml")
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.seed = 1  # pyright: ignore


def test_limits_of_a_microbatch_may_change_on_resume():
    plain = config.settings(load("yamls/mosaic_bert.yaml"))
    for change in ("device_train_microbatch_size=7", "device_train_microbatch_tokens=200"):
        assert config.settings(load("yamls/mosaic_bert.yaml", [change])) == plain
