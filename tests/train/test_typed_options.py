"""Options of components: types, ranges, times; and how a YAML's texts are read and written."""

import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import main
from src.common.errors import ConfigError
from src.finetune.config import load as load_finetune
from src.train import builders, models, optim, yaml12
from src.train.config import load
from src.train.schema import Component, build, to_dict
from src.train.validate import validate
from tests.conftest import YAMLS
from tests.runs import QUICKSTART

TIME = "expected a time such as 100ba or 0.1dur, got"
PERIOD = "expected a time above 0 such as 100ba or 0.1dur, got"
RATE = "expected a number from 0 to less than 1, got"
SHAPE = "model.model_config"

ILL_TYPED = [
    ("optimizer.lr=fast", "optimizer.lr: expected a positive number, got 'fast'"),
    ("optimizer.lr=-0.1", "optimizer.lr: expected a positive number, got -0.1"),
    ("optimizer.lr=0", "optimizer.lr: expected a positive number, got 0"),
    ("optimizer.lr=.inf", "optimizer.lr: expected a positive number, got inf"),
    ("optimizer.lr=true", "optimizer.lr: expected a positive number, got True"),
    ("optimizer.betas=0.9", "optimizer.betas: expected a list of two numbers from 0 to less than 1, got 0.9"),
    ("optimizer.betas=[0.9, 0.98, 0.99]", "optimizer.betas: expected a list of two numbers"),
    ("optimizer.betas=[0.9, 1.0]", "optimizer.betas: expected a list of two numbers from 0 to less than 1"),
    ("optimizer.eps=0", "optimizer.eps: expected a positive number, got 0"),
    ("optimizer.weight_decay=-1", "optimizer.weight_decay: expected 0 or more, got -1"),
    ("optimizer.decay_matrices_only='no'", "optimizer.decay_matrices_only: expected bool, got 'no'; write false"),
    ("optimizer.decay_matrices_only=1", "optimizer.decay_matrices_only: expected bool, got 1"),
    ("optimizer={name: muon, lr: 1e-3, momentum: 1.0}", f"optimizer.momentum: {RATE} 1.0"),
    ("optimizer={name: muon, lr: 1e-3, momentum: high}", f"optimizer.momentum: {RATE} 'high'"),
    ("optimizer={name: muon, lr: 1e-3, momentum: null}", f"optimizer.momentum: {RATE} None"),
    ("optimizer={name: muon, lr: null}", "optimizer.lr: expected a positive number, got None"),
    ("optimizer={name: muon, lr: 1e-3, adamw_lr: 0}", "optimizer.adamw_lr: expected a positive number"),
    ("optimizer={name: muon, lr: 1e-3, betas: 0.9}", "optimizer.betas: expected a list of two numbers"),
    ("optimizer={name: muon, lr: 1e-3, eps: 0}", "optimizer.eps: expected a positive number, got 0"),
    ("optimizer={name: muon, lr: 1e-3, weight_decay: -1}", "optimizer.weight_decay: expected 0 or more, got -1"),
    ("optimizer={name: muon, lr: 1e-3, decay_matrices_only: 1}", "decay_matrices_only: expected bool, got 1"),
    ("scheduler.t_warmup=100", f"scheduler.t_warmup: {TIME} 100"),
    ("scheduler.t_warmup=-5ba", f"scheduler.t_warmup: {TIME} '-5ba'"),
    ("scheduler.t_decay=10", f"scheduler.t_decay: {TIME} 10"),
    ("scheduler.alpha_f=1.5", "scheduler.alpha_f: expected a number from 0 to 1, got 1.5"),
    ("scheduler.alpha_f=-0.1", "scheduler.alpha_f: expected a number from 0 to 1, got -0.1"),
    ("scheduler.decay=cosine", "scheduler.decay: expected one of linear, sqrt, got 'cosine'"),
    ("scheduler={name: constant_with_warmup, t_warmup: 0ba, t_max: 0ba}", f"scheduler.t_max: {PERIOD} '0ba'"),
    (
        "callbacks.step_monitor.window_size=many",
        "step_monitor.window_size: expected int, a positive number, got 'many'",
    ),
    ("callbacks.step_monitor.window_size=2.5", "step_monitor.window_size: expected int, a positive number, got 2.5"),
    (f"callbacks.step_monitor.window_size={2**63}", "window_size: expected int, a positive number, got 9223"),
    (f"scheduler.t_warmup={'9' * 19}ba", f"scheduler.t_warmup: {TIME} '999"),
    ("callbacks.step_monitor.window_size=0", "callbacks.step_monitor.window_size: expected a positive number, got 0"),
    ("callbacks.step_monitor.warmup=-1", "callbacks.step_monitor.warmup: expected 0 or more, got -1"),
    ("callbacks.memory_monitor.memory_keys=3", "memory_monitor.memory_keys: expected keys and values or null, got 3"),
    ("callbacks.memory_snapshot.interval=0ba", f"callbacks.memory_snapshot.interval: {PERIOD} '0ba'"),
    ("callbacks.memory_snapshot.folder='{who}/x'", "callbacks.memory_snapshot.folder: expected no {placeholder} but"),
    ("callbacks.system_metrics_monitor.log_all_data='yes'", "log_all_data: expected bool, got 'yes'; write true"),
    ("algorithms.ema.half_life=5", f"algorithms.ema.half_life: {PERIOD} 5"),
    ("algorithms.ema.half_life=0ba", f"algorithms.ema.half_life: {PERIOD} '0ba'"),
    ("algorithms.ema={half_life: null, smoothing: 1.0}", f"algorithms.ema.smoothing: {RATE} 1.0"),
    ("algorithms.ema.update_interval=0ba", f"algorithms.ema.update_interval: {PERIOD} '0ba'"),
    (
        "algorithms.gradient_clipping={clipping_type: nrm, clipping_threshold: 1}",
        "gradient_clipping.clipping_type: expected one of norm, value, adaptive, got 'nrm'",
    ),
    ("loggers.console_line.interval=.0dur", f"loggers.console_line.interval: {PERIOD} '.0dur'"),
    ("loggers.console_line.interval=100", f"loggers.console_line.interval: {PERIOD} 100"),
    ("loggers.metrics_file.path=3", "loggers.metrics_file.path: expected str, got 3"),
    ("loggers.tensorboard.flush_interval=0", "loggers.tensorboard.flush_interval: expected a positive number, got 0"),
    (
        "loggers.file_logger.filename='{who}.txt'",
        "loggers.file_logger.filename: expected no {placeholder} but run_name",
    ),
    (f"{SHAPE}.hidden_dropout_prob=high", f"{SHAPE}.hidden_dropout_prob: {RATE} 'high'"),
    (f"{SHAPE}.hidden_dropout_prob=1.0", f"{SHAPE}.hidden_dropout_prob: {RATE} 1.0"),
    (f"{SHAPE}.hidden_size=24.0", f"{SHAPE}.hidden_size: expected int, a positive number, got 24.0"),
    (f"{SHAPE}.num_hidden_layers=0", f"{SHAPE}.num_hidden_layers: expected a positive number, got 0"),
    ("model.gradient_checkpointing='on'", "model.gradient_checkpointing: expected bool, got 'on'; write true"),
    ("model.attention=3", "model.attention: expected str, got 3"),
    ("compile_config={bogus: 1}", "compile_config: unexpected 'bogus'"),
    ("compile_config={model: x}", "compile_config: unexpected 'model'"),
    ("compile_config={mode: bad}", "compile_config: Unrecognized mode=bad"),
    ("compile_config={mode: 3}", "compile_config.mode: expected str or null, got 3"),
    ("compile_config={backend: nope}", "compile_config: Invalid backend: 'nope'"),
    ("compile_config={dynamic: 'x'}", "compile_config.dynamic: expected bool or null, got 'x'"),
    ("compile_config={options: {nope: 1}}", "compile_config: Unexpected optimization option nope"),
    ("compile_config={mode: default, options: {}}", "compile_config: Either mode or options"),
]


@pytest.mark.parametrize(("override", "message"), ILL_TYPED)
def test_an_ill_typed_option_is_refused_by_its_path(override, message):
    with pytest.raises(ConfigError) as error:
        builders.check_components(load(QUICKSTART, [override]))
    assert message in str(error.value)


BERT = "model={name: hf_bert, model_config: {hidden_size: 24, num_attention_heads: 3, num_hidden_layers: 1}}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hidden_size=24.0", f"{SHAPE}.hidden_size: expected int, a positive number, got 24.0"),
        ("attention_probs_dropout_prob=high", f"{SHAPE}.attention_probs_dropout_prob: {RATE} 'high'"),
        ("hidden_act=3", f"{SHAPE}.hidden_act: expected str, got 3"),
        ("use_cache='no'", f"{SHAPE}.use_cache: expected bool, got 'no'"),
    ],
)
def test_an_ill_typed_shape_of_hugging_faces_bert_is_refused(override, message):
    with pytest.raises(ConfigError) as error:
        builders.check_components(load(QUICKSTART, [BERT, f"{SHAPE}.{override}"]))
    assert message in str(error.value)


def test_what_a_constructor_raises_names_the_component(tokenizer):
    run = load(QUICKSTART, [BERT, f"{SHAPE}.hidden_act=nonsense"])
    builders.check_components(run)
    with pytest.raises(ConfigError, match="model: .*nonsense"):
        models.build_model(run, tokenizer)


@pytest.mark.parametrize("given", ["{}", "{mode: max-autotune, dynamic: false, fullgraph: true}", "{backend: eager}"])
def test_what_torch_compile_takes_is_accepted(given):
    builders.check_components(load(QUICKSTART, [f"compile_config={given}"]))


def test_a_learning_rate_of_swa_is_refused():
    """Composer's fails at the first checkpoint."""
    component = load(QUICKSTART, ["algorithms.swa.schedule_swa_lr=true"]).algorithms["swa"]
    with pytest.raises(ConfigError, match="algorithms.swa: schedule_swa_lr: Composer's cannot be saved"):
        build("algorithms", builders.ALGORITHMS, component)


@pytest.mark.parametrize("error", [TypeError, ValueError, AssertionError, AttributeError, KeyError])
def test_no_error_of_a_constructor_is_a_traceback(error):
    def target(x: int):
        raise error("no good")

    with pytest.raises(ConfigError, match=r"section.target: .*no good"):
        build("section", {"target": target}, Component("target", {"x": 3}))


def test_one_error_names_the_faults_of_all_components():
    broken = ["optimizer.lr=fast", "scheduler.t_warmup=100", f"{SHAPE}.hidden_size=big", "callbacks.lr_monitor.x=1"]
    with pytest.raises(ConfigError) as error:
        builders.check_components(load(QUICKSTART, broken))
    for name in ("optimizer.lr:", "scheduler.t_warmup:", f"{SHAPE}.hidden_size:", "lr_monitor: unexpected 'x'"):
        assert name in str(error.value)


@pytest.mark.parametrize("check", [builders.build_trainer, validate])
def test_training_and_validating_check_components(check, overrides):
    with pytest.raises(ConfigError, match="optimizer.lr: expected a positive number, got 'fast'"):
        check(load(QUICKSTART, [*overrides, "optimizer.lr=fast"]))


@pytest.mark.parametrize(
    ("section", "options", "message"),
    [
        (
            "warmup_stable_decay",
            {"t_warmup": "0.6dur", "t_decay": "0.6dur"},
            "the run's length .10ba.; got 0.6dur",
        ),
        ("linear_decay_with_warmup", {"t_warmup": "10sp"}, "must use the same units"),
        ("linear_decay_with_warmup", {"t_warmup": "1ba", "t_max": "5ba"}, "must be greater than or equal"),
        ("cosine_with_warmup", {"t_warmup": "10sec"}, "Wall clock time"),
        ("constant_with_warmup", {"t_warmup": "10tok"}, "must use the same units"),
    ],
)
def test_a_schedule_that_fails_in_a_step_is_refused_when_it_is_built(section, options, message):
    with pytest.raises(ConfigError, match=message):
        optim.build_scheduler(Component(section, options), "10ba", 5)


@pytest.mark.parametrize(
    ("duration", "units"), [("10ba", "dur, ba or ep"), ("10ep", "dur, ba or ep"), ("10sp", "dur or sp")]
)
def test_a_schedule_that_does_not_fit_names_units_and_the_given_length(duration, units):
    component = Component("warmup_stable_decay", {"t_warmup": "0.6dur", "t_decay": "0.6dur"})
    with pytest.raises(ConfigError) as error:
        optim.build_scheduler(component, duration, 5)
    assert f"in {units}, with a sum of at most the run's length ({duration});" in str(error.value)


@pytest.mark.parametrize("duration", ["10ba", "3ep", "1000sp", "1000tok"])
@pytest.mark.parametrize("warmup", ["0dur", "0.06dur", "1dur"])
def test_a_schedule_in_shares_of_the_run_fits_any_duration(duration, warmup):
    for name in optim.SCHEDULERS:
        decay = {"t_decay": "0dur"} if name == "warmup_stable_decay" else {}
        optim.build_scheduler(Component(name, {"t_warmup": warmup, **decay}), duration, 5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("save_interval=.0dur", "save_interval: expected a number with ba, sp, tok, ep, sec or dur, got '.0dur'"),
        ("eval_interval=0.00dur", "eval_interval: expected a number"),
        ("save_folder=runs/{who}", "save_folder: expected no {placeholder} but run_name, got 'runs/{who}'"),
        ("save_folder=runs/{rank}", "save_folder: expected no {placeholder} but run_name, got 'runs/{rank}'"),
        ("save_folder='runs/{'", "save_folder: expected no {placeholder} but run_name, got 'runs/{'"),
        ("save_folder='s3://b/{who}'", "save_folder: expected no {placeholder} but run_name, rank"),
        ("load_path='x/{who}'", "load_path: expected no {placeholder} but run_name, rank"),
        ("time_limit=0h", "time_limit: expected a number with d, h, min or s, got '0h'"),
        ("seed=-1", "seed: expected a number from 0 to less than 2^32, got -1"),
        ("train_loader.shuffle_seed=-1", "train_loader.shuffle_seed: expected a number from 0"),
        ("save_interval=1.1dur", "save_interval: expected a number with"),
        ("save_folder='runs/{run_name:{rank}}'", "save_folder: expected no {placeholder} but run_name, got"),
        ("save_folder='runs/{run_name:d}'", "save_folder: expected no {placeholder} but run_name, got"),
        ("save_folder='runs/{run_name.x}'", "save_folder: expected no {placeholder} but run_name, got"),
        ("save_folder='runs/{}'", "save_folder: expected no {placeholder} but run_name, got"),
        ("load_path='x/{rank[}'", "load_path: expected no {placeholder} but run_name, rank"),
        (f"max_duration={'9' * 19}ba", "max_duration: expected a number with ba, sp, tok or ep"),
        (f"save_interval={'9' * 19}ba", "save_interval: expected a number with"),
        (f"eval_interval={'9' * 19}tok", "eval_interval: expected a number with"),
        (f"seed={2**63}", f"seed: expected int, got {2**63}, which has more than 64 bits"),
        (f"global_train_batch_size={10**30}", "global_train_batch_size: expected int, got 1000"),
        (f"train_loader.streams={{a: {{choose: -{10**30}}}}}", "train_loader.streams.a.choose: expected int or null"),
        ("dist_timeout=1e15", "dist_timeout: expected at most 2,000,000 seconds, got 1000000000000000.0"),
        (f"dist_timeout={10**400}", "dist_timeout: expected float, got 1000"),
        (f"dist_timeout=-{10**400}", "dist_timeout: expected float, got -1000"),
        ("train_loader.timeout=1e12", "train_loader.timeout: expected at most 2,000,000 seconds"),
        ("eval_loaders={a: {split: x, timeout: 3e6}}", "eval_loaders.a.timeout: expected at most 2,000,000 seconds"),
        ("eval_loader.download_timeout=1e12", "eval_loader.download_timeout: expected at most 2,000,000 seconds"),
        ("dist_timeout=.inf", "dist_timeout: expected float, got inf"),
        ("train_loader.timeout=.nan", "train_loader.timeout: expected float, got nan"),
        ("train_loader.shuffle=yes", "train_loader.shuffle: expected bool, got 'yes'; write true"),
        ("save_overwrite=off", "save_overwrite: expected bool, got 'off'; write false"),
        ("max_seq_len=1_000", "max_seq_len: expected int, got '1_000'; write 1000"),
        ("resume.allow=[optimiser]", "resume.allow: unknown setting 'optimiser'; did you mean 'optimizer'"),
        (
            "resume.allow=[train_loader.shufle]",
            "unknown setting 'train_loader.shufle'; did you mean 'train_loader.shuffle",
        ),
        ("resume.allow=[interpolations]", "resume.allow: unknown setting 'interpolations'"),
    ],
)
def test_a_value_without_a_meaning_is_refused(override, message):
    with pytest.raises(ConfigError) as error:
        load(QUICKSTART, [override])
    assert message in str(error.value)


def test_times_may_be_written_as_shares():
    run = load(QUICKSTART, ["save_interval=1.0dur", "eval_interval=1.00dur", "save_folder='s3://b/{rank:02d}'"])
    assert (run.save_interval, run.eval_interval) == ("1.0dur", "1.00dur")
    assert run.save_folder == "s3://b/{rank:02d}"


@pytest.mark.parametrize("size", [10**12, 2**62])
def test_a_model_beyond_the_memory_is_refused(size, tokenizer):
    run = load(QUICKSTART, [f"{SHAPE}.vocab_size={size}"])
    with pytest.raises(ConfigError, match="^model: .+"):
        models.build_model(run, tokenizer)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("optimizer.lrr", "did you mean 'optimizer.lr'"),
        ("model.model_config.hidden_sizes", "did you mean 'model.model_config.hidden_size'"),
        ("algorithms.ema.halflife", "did you mean 'algorithms.ema.half_life'"),
        ("algorithms.emma", "did you mean 'algorithms.ema'"),
    ],
)
def test_resume_refuses_to_allow_an_option_that_does_not_exist(name, hint):
    with pytest.raises(ConfigError) as error:
        builders.check_components(load(QUICKSTART, [f"resume.allow=[{name}]"]))
    assert f"unknown setting {name!r}; {hint}" in str(error.value)


def test_resume_may_allow_all_that_can_differ():
    """Also options and sections that only the checkpoint has."""
    names = "optimizer optimizer.lr optimizer.name scheduler.t_max algorithms algorithms.ema algorithms.ema.half_life "
    names += "model.model_config model.model_config.hidden_dropout_prob train_loader.streams.a.proportion dataset "
    names += "tokenizer max_duration mlm_probability.initial train_loader.shuffle"
    run = load(QUICKSTART, [f"resume.allow={names.split()}"])
    builders.check_components(run)


# Texts


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((word, word) for word in ("off", "no", "yes", "y", "1:04", "1_000", "2026-11-28", "=", "0b11", "0o8", "1e")),
        *((word, True) for word in ("true", "True", "TRUE")),
        *((word, None) for word in ("null", "~", "")),
        ("017", 17),
        ("0o17", 15),
        ("0x1F", 31),
        ("-5", -5),
        ("5e-4", 5e-4),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", -math.inf),
        ("[1, off]", [1, "off"]),
        ("!!float 3", 3.0),
        ("!!str 3", "3"),
        ("!!bool true", True),
        ("{1: a, off: b, 0x1: c, true: d, null: e}", {"1": "a", "off": "b", "0x1": "c", "true": "d", "null": "e"}),
    ],
)
def test_yaml_1_2_in_files_and_overrides(text, value, write):
    assert yaml12.load(text) == value and type(yaml12.load(text)) is type(value)
    path = write(f"a: {text}\n")
    assert yaml12.load(open(path).read()) == {"a": value}


def test_the_reader_has_no_readings_of_yaml_1_1():
    assert load(QUICKSTART, ["data_verify=off"]).data_verify == "off"
    assert load(QUICKSTART, ["seed=017"]).seed == 17
    assert load(QUICKSTART, ["optimizer.lr=5e-4"]).optimizer.options["lr"] == 5e-4
    assert load(QUICKSTART, ["run_name=1:04"]).run_name == "1:04"
    assert load_finetune("yamls/finetune_glue.yaml", ["pretrained=x", "folder=off"]).folder == "off"


def test_off_in_a_file_is_a_text(write):
    text = open(QUICKSTART).read().replace("seed: 17", "seed: 017\ndata_verify: off")
    run = load(write(text))
    assert (run.seed, run.data_verify) == (17, "off")


NASTY = (
    "off no Yes y 1:04 5e-4 0o17 0x1f null ~ 1_000 .5 1. 2026-11-28 = << .inf .nan -.INF 017 - ? : true True".split()
)
NASTY += [
    "",
    " ",
    "a: b",
    "# x",
    "- x",
    "&a",
    "*a",
    "!x",
    "%",
    "@",
    "`",
    "'",
    '"',
    "\t",
    "a\nb",
    "ä",
    "\x07",
    "{",
    "[",
    "|",
]


@pytest.mark.parametrize("text", NASTY)
def test_a_written_text_is_read_as_the_same_text(text):
    tree = {"a": text, "b": [text], text or "empty": 1}
    assert yaml12.load(yaml12.dump(tree)) == tree
    assert yaml.safe_load(yaml12.dump({"a": text})) == {"a": text}  # a reader of YAML 1.1


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.sampled_from(NASTY)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.dictionaries(st.text(), st.recursive(PLAIN, lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=9))
)
def test_written_values_are_read_as_the_same_values(tree):
    read = yaml12.load(yaml12.dump(tree))
    assert read == tree and repr(read) == repr(tree)  # types, too


def test_anchors_and_merges_still_work(write):
    text = open(QUICKSTART).read().replace("eval_loader:\n", "eval_loader: &val\n")
    text += "\neval_loaders:\n  more:\n    <<: *val\n    mlm_probability: 0.2\n  same: *val\n"
    run = load(write(text))
    assert run.eval_loaders["same"] == run.eval_loader
    assert run.eval_loaders["more"].mlm_probability == 0.2 and run.eval_loaders["more"].split == "val"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2", "duplicate key 'seed'"),
        ("optimizer:\n  lr: 1\n  name: adamw\n  lr: 2", "duplicate key 'lr'"),
        ("loggers: {a: {x: 1, x: 2}}", "duplicate key 'x'"),
        ("a: &a [*a]", "hold themselves"),
        ("a: &a {b: *a}", "hold themselves"),
        ("\n".join(["a0: &a0 x", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))]), "10,000"),
        ("a: !!int x", "expected int, got 'x'"),
        ("a: !!bool maybe", "expected bool, got 'maybe'"),
        ("a: !!bool 'yes'", "expected bool, got 'yes'"),
        ("a: !!float x", "expected float, got 'x'"),
        ("a: !!null x", "expected null, got 'x'"),
        ("a: !!int [1]", "expected a scalar node"),
        ("a: !!seq 1", "expected a sequence node"),
        ("a: !!timestamp foo", "could not determine a constructor"),
        ("a: !!binary '*'", "could not determine a constructor"),
        ("a: !!set {x}", "could not determine a constructor"),
        ("a: <<", "could not determine a constructor"),
        (f"a: {'1' * 5000}", "4300"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
    ],
)
def test_a_text_that_is_no_config_is_refused(text, message, write):
    with pytest.raises(ConfigError) as error:
        load(write(text))
    assert message in str(error.value)


def test_a_duplicate_key_in_an_override_is_refused():
    with pytest.raises(ConfigError, match="duplicate key 'lr'"):
        load(QUICKSTART, ["optimizer={name: adamw, lr: 1.0, lr: 2.0}"])


def test_a_wrong_setting_ends_in_one_message(capsys):
    with pytest.raises(SystemExit) as end:
        main.run([QUICKSTART, "--validate", "optimizer.lr=fast"])
    assert "main.py: optimizer.lr: expected a positive number, got 'fast'" == end.value.code


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_shipped_options_fit(path):
    builders.check_components(load(str(path)))
    assert yaml12.load(yaml12.dump(to_dict(load(str(path))))) == to_dict(load(str(path)))
