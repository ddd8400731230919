"""Values from the environment: used, and neither written, nor printed, nor in a checkpoint."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from composer.core import Callback, Timestamp

import main
from src.common.errors import CheckpointError, ConfigError, Finished
from src.train import builders, checkpoint, run, weights, yaml12
from src.train.config import from_environment, load, settings
from src.train.ending import RunEnd
from src.train.resume import ResumeCheck
from src.train.schema import Component, build
from tests.runs import QUICKSTART, losses_of

SECRETS = (
    "s3kr1t-t0ken",
    "pässword",
    "-----BEGIN KEY-----\nMIIE\n-----END KEY-----",
    "tab\tsecret",
    "1",
    "e",
    "${x}",
    "off",
)
ENV = "${oc.env:MY_SECRET}"


@pytest.fixture
def written(write):
    """The quickstart's YAML with more lines."""

    def written(lines="", **replaced):
        text = Path(QUICKSTART).read_text()
        for old, new in replaced.items():
            text = text.replace(f"{old}: ", f"{old}: {new} #", 1)
        return write(f"{text}\n{lines}\n")

    return written


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("overrides", [False, True])
def test_a_written_config_has_the_interpolation_and_gives_the_same_run(
    secret, overrides, written, monkeypatch, tmp_path
):
    monkeypatch.setenv("MY_SECRET", secret)
    line = f"data_remote={ENV}"
    config = load(written(), [line]) if overrides else load(written(line.replace("=", ": ")))
    assert config.data_remote == config.train_loader.remote == secret
    text = run.describe(config)
    assert f"data_remote: {ENV}" in text and "remote: ${data_remote}" in text
    if len(secret) > 4:
        for form in (secret, repr(secret)[1:-1], secret.splitlines()[0], secret.split("\t")[-1]):
            assert form not in text
    (tmp_path / "config.yaml").write_text(text)
    again = load(str(tmp_path / "config.yaml"))
    assert again == config and again.interpolations == config.interpolations
    monkeypatch.setenv("MY_SECRET", "another")
    assert load(str(tmp_path / "config.yaml")).data_remote == "another"


@pytest.mark.parametrize(
    ("key", "text", "hidden"),
    [
        ("run_name", f"trial-{ENV}", ["run_name", "save_folder", "loggers.metrics_file.path"]),
        ("data_local", f"'{ENV}/x'", ["data_local", "train_loader.local", "eval_loader.local"]),
        ("seed", "${oc.decode:${oc.env:MY_NUMBER}}", ["seed", "train_loader.shuffle_seed"]),
        ("eval_interval", "'${oc.env:NOTHING,3ba}'", ["eval_interval"]),
        ("tokenizer_name", "${oc.select:data_local,x}${.run_name}" + ENV, ["tokenizer_name"]),
        ("save_interval", "${..optimizer.name}", []),
    ],
)
def test_what_depends_on_the_environment_is_found_through_references(key, text, hidden, written, monkeypatch, tmp_path):
    monkeypatch.setenv("MY_SECRET", "s3kr1t")
    monkeypatch.setenv("MY_NUMBER", "271828")
    path = written(**{key: text})
    if key == "save_interval":
        with pytest.raises(ConfigError, match="optimizer"):
            load(path)
        return
    config = load(path)
    assert set(hidden) <= set(from_environment(config))
    assert not {"max_duration", "optimizer.lr", "train_loader.split"} & set(from_environment(config))
    described = run.describe(config)
    assert "s3kr1t" not in described and "271828" not in described
    (tmp_path / "config.yaml").write_text(described)
    assert load(str(tmp_path / "config.yaml")) == config


def test_sections_and_lists_from_the_environment_are_hidden(written, monkeypatch, tmp_path):
    monkeypatch.setenv("MY_SECRET", "s3kr1t")
    monkeypatch.setenv("MY_SECTION", "{num_workers: 0, split: s3kr1t}")
    options = [
        f"loggers.wandb={{project: x, tags: [a, '{ENV}'], init_kwargs: {{api: {{key: '{ENV}'}}}}}}",
        f"train_loader.streams={{a: {{local: x, remote: 'x/{ENV}'}}}}",
        "eval_loader='${oc.decode:${oc.env:MY_SECTION}}'",
        "eval_loaders={more: '${eval_loader}'}",
    ]
    config = load(written(), options)
    assert config.eval_loaders["more"].split == "s3kr1t"
    assert "s3kr1t" not in run.describe(config) and "s3kr1t" not in str(settings(config))
    (tmp_path / "config.yaml").write_text(run.describe(config))
    assert load(str(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"seed={ENV}", f"seed: expected int, got '{ENV}'"),
        (f"max_duration={ENV}", f"max_duration: expected a number with ba, sp, tok or ep, got '{ENV}'"),
        ("max_duration=${run_name} run_name=" + ENV, "max_duration: expected a number with ba, sp, tok or ep, got"),
        (f"train_loader={ENV}", f"train_loader: expected keys and values, got '{ENV}'"),
        (f"algorithms=['{ENV}']", f"algorithms: expected keys and values, got ['{ENV}']"),
        (f"loggers.wandb=['{ENV}']", f"loggers.wandb: expected keys and values, got ['{ENV}']"),
        (f"train_loader.streams={{a: ['{ENV}']}}", f"streams.a: expected keys and values, got ['{ENV}']"),
        (f"resume.allow=['{ENV}']", f"resume.allow: expected another value, got ['{ENV}']"),
        ("seed=${oc.decode:${oc.env:MY_SECRET}}", "seed: '${oc.decode:${oc.env:MY_SECRET}}' cannot be resolved"),
        ("seed=${oc.env:NOT_THERE}", "NOT_THERE"),
        (f"sed={ENV}", "sed: unknown key; did you mean 'seed'"),
    ],
)
def test_messages_about_a_config_show_the_interpolation(override, message, written, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "s3kr1t ${")
    with pytest.raises(ConfigError) as error:
        load(written(), override.split(" ") if " run_name" in override else [override])
    assert message in str(error.value) and "s3kr1t" not in str(error.value)


def test_a_text_that_is_no_interpolation_stays_one(written, tmp_path):
    config = load(written(**{"tokenizer_name": r"'a\${x}'"}), [r"data_local=\${run_name}"])
    assert (config.tokenizer_name, config.data_local) == ("a${x}", "${run_name}")
    (tmp_path / "config.yaml").write_text(run.describe(config))
    assert load(str(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize(
    ("options", "value", "message"),
    [
        (f"model.attention={ENV}", "s3kr1t", f"model: .*'{ENV}'"),
        (f"model.kernels={ENV}", "s3kr1t", f"model: .*'{ENV}'"),
        (f"model.attention={ENV}", "fast", f"model: .*'{ENV}'"),
        (f"model.model_config.hidden_size=${{oc.decode:{ENV}}}", "25", f"hidden_size {ENV} is not a multiple of"),
        (f"max_seq_len=${{oc.decode:{ENV}}}", "7", f"max_seq_len is {ENV}"),
        (f"max_duration={ENV} scheduler.t_warmup=9ba scheduler.t_decay=9ba", "13ba", f"the run's length .{ENV}.; got"),
        (f"data_local=x data_remote=https://h/x?sig={ENV}", "s3kr1t", "https://h/x"),
        (f"data_local=x data_remote=./trial_{ENV}_x", "s3kr1t", f"trial_{ENV}_x/train holds no dataset"),
        (f"tokenizer_name={ENV}", "/s3kr1t/", f"{ENV}"),
        (f"pretrained={ENV}/x.pt", "/s3kr1t", f"{ENV}/x.pt"),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--validate"]])
def test_messages_of_a_run_show_the_interpolation(options, value, message, flags, overrides, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SECRET", value)
    options = [option.replace("=x", f"={tmp_path}/x") for option in options.split()]
    with pytest.raises(SystemExit) as end:
        main.run([QUICKSTART, *flags, *overrides, "save_folder=null", *options])
    shown = str(end.value.code)
    assert re.search(message.replace("${", r"\$\{"), shown), shown
    assert not re.search(rf"(?<!\w){re.escape(value)}(?!\w)", shown)


@pytest.mark.parametrize(
    ("value", "message", "shown"),
    [
        ("4", "x: 4 devices", "x: 4 devices"),
        ("4", "a.b: 14 of 4", f"a.b: 14 of {ENV}"),
        ("ab", "abc ab/ab 'ab' cab", f"abc {ENV}/{ENV} '{ENV}' cab"),
        ("s3kr1t", "s3kr1ts_s3kr1t", f"{ENV}s_{ENV}"),
        ("a\nb\n", "a\nb\n or 'a\\nb\\n'", f"{ENV} or '{ENV}'"),
        ("oc.env", "${oc.env:MY_SECRET} oc.env", f"${{{ENV}:MY_SECRET}} {ENV}"),
        ("", "", ""),
    ],
)
def test_what_is_hidden_in_a_message(value, message, shown, monkeypatch):
    monkeypatch.setenv("MY_SECRET", value)
    assert yaml12.hidden(message, {"a.b": f"x/{ENV}", "c": "${a.b}", "d": "${oc.env:NOT_SET,4}"}) == shown
    with pytest.raises(OSError) as error, yaml12.hiding({"a.b": ENV}):
        raise FileNotFoundError(2, "no such file", "s3kr1t/b")
    assert str(error.value).endswith("'s3kr1t/b'" if value != "s3kr1t" else f"'{ENV}/b'")


def test_messages_about_a_section_show_no_value_in_it(write, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "s3kr1t")
    text = Path(QUICKSTART).read_text().replace("name: muon ", f"nme: x\n  fused: '{ENV}' ")
    with pytest.raises(ConfigError) as error:
        load(write(text))
    assert "optimizer: expected a section with a 'name', got a section that depends" in str(error.value)
    assert "s3kr1t" not in str(error.value)


@pytest.mark.parametrize(
    "override",
    [
        f"optimizer.lr={ENV}",
        f"optimizer.name={ENV}",
        f"scheduler.t_warmup={ENV}",
        f"callbacks.step_monitor.window_size={ENV}",
        f"loggers.tensorboard.flush_interval={ENV}",
        f"model.model_config.hidden_size={ENV}",
    ],
)
def test_messages_about_options_show_the_interpolation(override, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "s3kr1t")
    with pytest.raises(ConfigError) as error:
        builders.check_components(load(QUICKSTART, [override]))
    assert "s3kr1t" not in str(error.value) and ENV in str(error.value)


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        (f"callbacks.early_stopper={{monitor: '{ENV}', dataloader_label: eval}}", f"monitor: no metric '{ENV}'"),
        (
            f"callbacks.threshold_stopper={{monitor: x, threshold: 1, dataloader_label: '{ENV}'}}",
            f"no data set '{ENV}'",
        ),
        (f"parallelism_config={{fsdp: '{ENV}'}}", f"expected {{fsdp: {{...}}}}, got {{'fsdp': '{ENV}'}}"),
        (f"parallelism_config={ENV}", "parallelism_config: expected"),
        (f"parallelism_config={{fsdp: {{reshard_after_forward: '{ENV}'}}}}", f"expected true or false, got '{ENV}'"),
        (f"compile_config={{mode: '{ENV}'}}", f"compile_config: torch.compile refuses it; got {{'mode': '{ENV}'}}"),
        (f"compile_config={{dynamic: '{ENV}'}}", f"compile_config.dynamic: expected bool or null, got '{ENV}'"),
    ],
)
def test_messages_about_what_is_built_show_the_interpolation(override, shown, overrides, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "s3kr1t")
    with pytest.raises(ConfigError) as error:
        builders.build_trainer(load(QUICKSTART, [*overrides, override]))
    assert shown in str(error.value) and "s3kr1t" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "is_read"),
    [
        ("seed=", True),
        ("optimizer.lr=", True),
        ("max_duration=", False),
        ("data_verify=", False),
        ("callbacks.step_monitor.window_size=", True),
        ("scheduler.t_warmup=", False),
        ("run_name=x seed=a", False),
    ],
)
def test_a_text_from_the_environment_where_another_type_is_expected(override, is_read, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "17x")
    with pytest.raises(ConfigError) as error:
        builders.check_components(load(QUICKSTART, (override + ENV).split()))
    assert (f"got '{ENV}' (use ${{oc.decode:{ENV}}} for values that are no text)" in str(error.value)) == is_read


def test_a_constructors_message_with_the_value_is_not_shown(monkeypatch):
    def wandb(api_key: str, project: str = "x"):
        raise ValueError(f"bad key {api_key}")

    monkeypatch.setenv("MY_SECRET", "s3kr1t")
    component = load(QUICKSTART, [f"loggers.wandb.api_key={ENV}"]).loggers["wandb"]
    with pytest.raises(ConfigError, match=r"loggers.wandb: ValueError$"):
        build("loggers", {"wandb": wandb}, component)
    with pytest.raises(ConfigError, match="bad key plain"):
        build("loggers", {"wandb": wandb}, Component("wandb", {"api_key": "plain"}))


def test_checkpoints_config_and_terminal_have_no_value(overrides, monkeypatch, tmp_path, capfd, tokenizer_folder):
    monkeypatch.setenv("MY_SECRET", "s3kr1t")
    monkeypatch.setenv("MY_NUMBER", "271828")
    options = [
        *overrides,
        "max_duration=2ba",
        "seed=${oc.decode:${oc.env:MY_NUMBER}}",
        f"load_path={ENV}",
        "load_path=null",
        f"loggers.tensorboard.log_dir={tmp_path}/{ENV}",
        f"callbacks.oom_observer.folder={tmp_path}/{ENV}",
        f"data_remote={ENV}",
        "train_loader.local=${data_local}",
        "eval_loader.local=${data_local}",
        f"pretrained={ENV}",
        "pretrained=null",
        "algorithms.gradient_clipping={clipping_type: '${oc.env:MY_CLIPPING}', clipping_threshold: 1.0}",
    ]
    monkeypatch.setenv("MY_CLIPPING", "norm")
    main.main([QUICKSTART, *options])
    shown = capfd.readouterr()
    folder = tmp_path / "checkpoints"
    for text in (shown.out, shown.err, (folder / "config.yaml").read_text()):
        assert "s3kr1t" not in text and "271828" not in text
    for path in [*folder.rglob("*.pt"), *folder.rglob("*.json")]:
        assert b"s3kr1t" not in path.read_bytes()
    stored = torch.load(folder / "latest-rank0.pt", weights_only=False)["state"]["callbacks"]["ResumeCheck"]
    assert stored["seed"].startswith("${oc.decode:${oc.env:MY_NUMBER}} (")
    assert stored["algorithms.gradient_clipping.clipping_type"].startswith("${oc.env:MY_CLIPPING} (")
    losses_of([*options, "max_duration=3ba", "autoresume=true", "resume.allow=[max_duration]"])  # it resumes
    monkeypatch.setenv("MY_NUMBER", "3")
    with pytest.raises(ConfigError, match="seed: .*MY_NUMBER.* there, .*MY_NUMBER.* here"):
        losses_of([*options, "max_duration=3ba", "autoresume=true", "resume.allow=[max_duration]"])


def test_a_model_from_the_environment_can_be_loaded_again(overrides, monkeypatch, tmp_path):
    """Its settings are in the checkpoint, because its weights mean nothing without them; an older one is refused."""
    monkeypatch.setenv("WIDTH", "24")
    monkeypatch.setenv("KIND", "mosaic_bert")
    options = ["model.model_config.hidden_size=${oc.decode:${oc.env:WIDTH}}", "model.name=${oc.env:KIND}"]
    losses_of([*overrides, *options, "max_duration=2ba", "eval_interval=0"])
    monkeypatch.delenv("WIDTH")
    path = tmp_path / "checkpoints" / "latest-rank0.pt"
    assert weights.read(path).config.hidden_size == 24
    held = checkpoint.load_data(path)
    settings = held["state"]["callbacks"]["ResumeCheck"]
    settings["model.model_config.hidden_size"] = "${oc.env:WIDTH} (0a1b)"
    torch.save(held, tmp_path / "older.pt")
    with pytest.raises(CheckpointError, match="model.model_config.hidden_size came from the environment"):
        weights.read(tmp_path / "older.pt")


def test_settings_of_earlier_versions_are_compared_by_value(monkeypatch):
    monkeypatch.setenv("MY_SECRET", "s3kr1t")
    config = load(QUICKSTART, [f"pretrained={ENV}"])
    held, values = settings(config), from_environment(config)
    assert "s3kr1t" not in str(held) and values["pretrained"] == "s3kr1t"
    check = ResumeCheck(held, [], {name: [value] for name, value in values.items()})
    assert check.compare({**held, "pretrained": "s3kr1t"}, "x") == []
    with pytest.raises(ConfigError, match=r"pretrained: a value there") as error:
        check.compare({**held, "pretrained": "0ther"}, "x")
    assert "0ther" not in str(error.value)


LR = "${oc.decode:${oc.env:MY_LR}}"


@pytest.mark.parametrize("there", [LR, "0.003", "${oc.decode:${oc.env:NOT_SET,0.003}}", "${oc.decode:'0.003'}"])
@pytest.mark.parametrize("here", [LR, "0.003", "${oc.decode:${oc.env:NOT_SET,0.003}}", "${optimizer.weight_decay}"])
def test_one_value_written_in_two_ways_is_the_same_setting(there, here, monkeypatch):
    monkeypatch.setenv("MY_LR", "0.003")
    found, check = (
        settings(load(QUICKSTART, ["optimizer.weight_decay=0.003", f"optimizer.lr={text}"])) for text in (there, here)
    )
    assert ResumeCheck(check, []).compare(found, "x") == []
    with pytest.raises(ConfigError, match="optimizer.lr"):
        ResumeCheck(check, []).compare(settings(load(QUICKSTART, ["optimizer.lr=0.004"])), "x")


def test_a_stored_text_is_compared_by_its_digest_alone_if_it_is_an_interpolation():
    assert yaml12.is_same("x (8d68)", "x (8d68)") and not yaml12.is_same("x (8d68)", "y (8d68)")
    hidden = yaml12.stored({"a": {"b": 1}}, {"a": "${x}"})
    assert yaml12.is_same({"a": {"b": 1}}, hidden) and yaml12.is_same(
        hidden, yaml12.stored({"a": {"b": 1}}, {"a": "${y}"})
    )
    assert not yaml12.is_same({"a": {"b": 2}}, hidden) and not yaml12.is_same({"a": {}}, hidden)


def test_a_stoppers_options_are_stored_as_settings_are(overrides, monkeypatch, tmp_path, capsys):
    """And a finished run is known by the value, however it is written; checkpoints of earlier versions have it."""
    monkeypatch.setenv("MY_NUMBER", "98.76543")
    stopper = "callbacks.threshold_stopper={monitor: LanguageCrossEntropy, dataloader_label: eval, threshold: %s}"
    options = [*overrides, "eval_interval=1ba", "max_duration=9ba", "autoresume=true"]
    text = "${oc.decode:${oc.env:MY_NUMBER}}"
    main.main([QUICKSTART, *options, stopper % f"'{text}'"])
    stopped = torch.load(tmp_path / "checkpoints/latest-rank0.pt", weights_only=False)["state"]["callbacks"]["RunEnd"]
    assert stopped["stopped"]["options"]["threshold"].startswith(f"{text} (")
    assert stopped["stopped"]["options"]["monitor"] == "LanguageCrossEntropy"
    for again in (f"'{text}'", "98.76543"):
        capsys.readouterr()
        main.main([QUICKSTART, *options, stopper % again])
        assert "is finished: stopped by threshold_stopper after step 1" in capsys.readouterr().out
    end = RunEnd("x", "9ba")
    end.watch(Callback(), "stop", yaml12.stored({"threshold": 98.76543}, {"threshold": text}))
    with pytest.raises(Finished):
        end.check(Timestamp(), {"name": "stop", "options": {"threshold": 98.76543}})


def test_settings_without_the_environment_are_the_values():
    config = load(QUICKSTART)
    assert config.interpolations == {} and settings(config)["optimizer.lr"] == 4e-3
    assert dataclasses.replace(config, interpolations={"seed": "x"}) == config
