"""Muon: its numbers, its groups, restarts, and what it does not run with."""

import copy
import math
from functools import partial

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from src.bert_layers import BertForMaskedLM, BertForSequenceClassification
from src.common.errors import CheckpointError, ConfigError
from src.configuration_bert import MosaicBertConfig
from src.train import models, muon, optim
from src.train.config import load
from src.train.muon import COEFFICIENTS, Muon, newton_schulz_flops, orthogonalize
from src.train.schema import Component, build
from src.train.validate import optimizer_groups, validate
from tests.runs import DROPOUT, QUICKSTART, UNSAVED, fit, logged, losses_of, trainer_of

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
}
HF_SHAPE = transformers.BertConfig(**SHAPE)
MUON = "optimizer={name: muon, lr: 3e-3}"
LR, DECAY, MOMENTUM = 3e-3, 0.1, 0.9


# Singular values


def polynomial(x):
    a, b, c = COEFFICIENTS
    for _ in range(5):
        x = a * x + b * x**3 + c * x**5
    return x


def test_singular_values_within_the_stated_range():
    values = polynomial(torch.logspace(math.log10(0.002), 0, 100_000, dtype=torch.float64))
    assert 0.68 < values.min() and values.max() < 1.21
    tiny = torch.tensor(1e-6, dtype=torch.float64)
    assert polynomial(tiny) / tiny == pytest.approx(485, rel=1e-3)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 16, 16), (2, 40, 7), (2, 7, 40), (1, 1, 9), (2, 9, 1)])
@pytest.mark.parametrize("condition", [1, 30, 1e8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_orthogonalize_changes_singular_values_alone(shape, condition, dtype):
    """Each by the polynomial. In bf16 to 0.04 (measured: 0.02); there, tiny ones are rounding, which grows up to 1."""
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    s = torch.logspace(0, -math.log10(condition), u.shape[-1], dtype=torch.float64)
    x = 1e-3 * (u * s) @ vh
    got = orthogonalize(x, dtype)
    assert got.dtype == dtype and got.shape == x.shape
    got = got.double()
    want = (u * polynomial(s / s.norm())) @ vh
    if dtype == torch.float64 or condition <= 30:
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9 if dtype == torch.float64 else 0.04)
    values = torch.linalg.svdvals(got)
    assert values.max() < 1.3
    if condition <= 30:
        assert values.min() > 0.6


def test_zero_and_tiny_matrices():
    assert not orthogonalize(torch.zeros(2, 3, 4)).any()
    assert orthogonalize(torch.full((1, 3, 4), 1e-30)).isfinite().all()
    one = torch.zeros(1, 3, 4)
    one[0, 1, 2] = 5.0
    assert orthogonalize(torch.cat([one, torch.zeros_like(one)]))[1].eq(0).all()


# A step


def small_model(dtype=torch.float32, model_class=BertForMaskedLM, **shape):
    torch.manual_seed(0)
    config = MosaicBertConfig(**{**SHAPE, **shape}) if model_class.__module__.startswith("src") else HF_SHAPE
    return model_class(config).to(dtype)


def set_gradients(model, seed, scale=1e-2):
    """The same for models of one shape; those of one weight differ in size by 1e4 within a matrix."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = (scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)
        if p.ndim == 2:
            p.grad *= torch.logspace(-4, 0, p.shape[1], dtype=p.dtype)


def matrices_of(name, p):
    """What Muon changes as one matrix, written by hand for MosaicBERT."""
    if "encoder.layer" not in name or p.ndim < 2:
        return []
    return list(p.chunk(3 if "Wqkv" in name else 2 if "gated_layers" in name else 1))


def test_step_is_the_papers():
    """Liu et al., section 2: M = momentum * M + G; W -= lr * (0.2 * sqrt(max(rows, columns)) * O + decay * W), in fp64,
    one matrix after another, with O from the singular values."""
    model = small_model(torch.float64)
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    sums = {name: torch.zeros_like(p) for name, p in own.items()}
    optimizer = optim.muon(model, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(4):
        set_gradients(model, step)
        lr = LR / (1 + step)
        for name, p in model.named_parameters():
            assert p.grad is not None
            sums[name] = MOMENTUM * sums[name] + p.grad
            update = p.grad + MOMENTUM * sums[name]
            for weight, part in zip(matrices_of(name, own[name]), matrices_of(name, update), strict=True):
                u, s, vh = torch.linalg.svd(part, full_matrices=False)
                direction = (u * polynomial(s / s.norm())) @ vh
                weight -= lr * (0.2 * math.sqrt(max(weight.shape)) * direction + DECAY * weight)
        optimizer.step()
        schedule.step()
    layers = [name for name in own if matrices_of(name, own[name])]
    assert len(layers) == 8
    for name in layers:
        torch.testing.assert_close(model.get_parameter(name).data, own[name], rtol=0, atol=1e-9)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_step_is_torchs(monkeypatch):
    """On q, k, v, gate and up apart. torch multiplies in bf16, so this does, too."""
    monkeypatch.setattr(muon, "orthogonalize", partial(orthogonalize, dtype=torch.bfloat16))
    model = small_model()
    own = {}
    for name, p in model.named_parameters():
        own |= {(name, i): torch.nn.Parameter(part.clone()) for i, part in enumerate(matrices_of(name, p.detach()))}
    optimizer = optim.muon(model, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    torchs = torch.optim.Muon(
        own.values(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(4):
        set_gradients(model, step)
        for (name, i), part in own.items():
            gradient = model.get_parameter(name).grad
            part.grad = matrices_of(name, gradient)[i].clone()
        optimizer.step()
        torchs.step()
    for (name, i), part in own.items():
        got = matrices_of(name, model.get_parameter(name).detach())[i]
        torch.testing.assert_close(got, part.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("decay_matrices_only", [False, True])
def test_all_else_is_adamws_to_the_bit(decay_matrices_only):
    model, same = small_model(), small_model()
    options = {"lr": LR, "weight_decay": DECAY, "decay_matrices_only": decay_matrices_only}
    optimizers = optim.muon(model, **options), optim.adamw(same, **options)
    for step in range(3):
        for each, optimizer in zip((model, same), optimizers, strict=True):
            set_gradients(each, step)
            optimizer.step()
    for (name, p), q in zip(model.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(p, q) == (not matrices_of(name, p)), name


def test_parameters_without_a_gradient_are_left_alone():
    """And those with a zero gradient only shrink, without NaN."""
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    optimizer = optim.muon(model, lr=LR, weight_decay=DECAY)
    optimizer.step()
    assert not optimizer.state
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    left = model.bert.encoder.layer[1].mlp.wo.weight
    left.grad = None
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.data, before[name] * (1 if p is left else 1 - LR * DECAY), rtol=1e-6, atol=0)
    assert left not in optimizer.state


def test_closure_and_gradient_scaler():
    """A gradient scaler unscales gradients, and skips a step with infinities."""
    model, same = small_model(), small_model()
    optimizer, scaled = optim.muon(model, lr=LR), optim.muon(same, lr=LR)
    set_gradients(model, 1)
    assert optimizer.step(lambda: torch.tensor(5.0)) == 5.0
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))  # creates the scale
    for bad in (True, False):
        set_gradients(same, 1, scale=1e-2 * scaler.get_scale())
        if bad:
            same.bert.encoder.layer[0].mlp.wo.weight.grad[0, 0] = math.inf
        scaler.step(scaled)
        scaler.update()
        assert bool(scaled.state) != bad and scaler.get_scale() == 512
    for p, q in zip(model.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


# Groups


def names_by_group(model, **options):
    """Names of the parameters of each group, by (parts, decay). Each trained parameter is in one group, once."""
    names = {p: name for name, p in model.named_parameters()}
    groups = optim.muon(model, lr=LR, weight_decay=DECAY, **options).param_groups
    found = [p for group in groups for p in group["params"]]
    assert len(found) == len(set(found)) and set(found) == {p for p in names if p.requires_grad}
    return {(g["parts"], g["weight_decay"]): [names[p] for p in g["params"]] for g in groups}


@pytest.mark.parametrize("model_class", [BertForMaskedLM, BertForSequenceClassification])
def test_groups(model_class):
    groups = names_by_group(small_model(model_class=model_class), decay_matrices_only=True)
    assert set(groups) == {(0, DECAY), (0, 0.0), (1, DECAY), (2, DECAY), (3, DECAY)}
    held = {3: ["attention.self.Wqkv"], 2: ["mlp.gated_layers"], 1: ["attention.output.dense", "mlp.wo"]}
    for parts, modules in held.items():
        names = [f"bert.encoder.layer.{i}.{module}.weight" for i in range(2) for module in modules]
        assert groups[parts, DECAY] == names
    head = {"cls.predictions.transform.dense.weight"}
    if model_class is BertForSequenceClassification:
        head = {"bert.pooler.dense.weight", "classifier.weight"}
    embeddings = {f"bert.embeddings.{name}_embeddings.weight" for name in ("word", "token_type")}
    assert set(groups[0, DECAY]) == head | embeddings
    assert all(name.endswith("bias") or "norm" in name.lower() for name in groups[0, 0.0])


@pytest.mark.parametrize("model_class", [transformers.BertForMaskedLM, transformers.BertForSequenceClassification])
def test_groups_of_hugging_faces_bert(model_class):
    groups = names_by_group(small_model(model_class=model_class))
    assert set(groups) == {(0, DECAY), (1, DECAY)}
    modules = [f"attention.self.{name}" for name in ("query", "key", "value")]
    modules += ["attention.output.dense", "intermediate.dense", "output.dense"]
    assert groups[1, DECAY] == [f"bert.encoder.layer.{i}.{module}.weight" for i in range(2) for module in modules]


def test_groups_of_wrapped_compiled_frozen_and_other_models():
    model = small_model()
    want = {key: len(names) for key, names in names_by_group(model).items()}
    wrapped = torch.nn.Sequential(torch.compile(model))
    assert {key: len(names) for key, names in names_by_group(wrapped).items()} == want
    for layer in model.bert.encoder.layer:
        layer.attention.self.Wqkv = torch.compile(layer.attention.self.Wqkv)
        layer.mlp.gated_layers = torch.compile(layer.mlp.gated_layers)
    assert {key: len(names) for key, names in names_by_group(model).items()} == want
    model.bert.embeddings.requires_grad_(False)
    names_by_group(model)

    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Parameter(torch.ones(2, 3))
            self.Wqkv = torch.nn.Linear(2, 5)

    assert set(names_by_group(Other())) == {(0, DECAY)}


def test_model_without_layers_for_checks_of_fine_tuning():
    optimizer = build("optimizer", optim.OPTIMIZERS, Component("muon", {}), model=torch.nn.Linear(1, 1), lr=1.0)
    assert [(group["parts"], len(group["params"])) for group in optimizer.param_groups] == [(0, 2)]
    assert newton_schulz_flops(optimizer) == 0


class Gathering:
    """Processes one after another, in place of torch.distributed: the first round of all collects what they send."""

    def __init__(self, world):
        self.world, self.rank, self.sent = world, 0, {}

    def is_available(self):
        return True

    is_initialized = is_available

    def get_world_size(self):
        return self.world

    def get_rank(self):
        return self.rank

    def all_gather_into_tensor(self, gathered, mine):
        self.sent[self.rank] = mine
        if len(self.sent) == self.world:
            torch.cat([self.sent[rank] for rank in range(self.world)], out=gathered)


@pytest.mark.parametrize(("n", "world"), [(1, 3), (2, 3), (3, 3), (7, 3), (24, 16)])
def test_processes_share_the_matrices(n, world, monkeypatch):
    group = Gathering(world)
    monkeypatch.setattr(muon, "dist", group)
    x, sizes = torch.randn(n, 4, 9), []
    monkeypatch.setattr(muon, "orthogonalize", lambda x: (sizes.append(len(x)), orthogonalize(x))[1])
    for group.rank in range(world):
        muon.orthogonalize_shared(x)
    assert sum(sizes) == n and max(sizes) == -(-n // world)
    for group.rank in range(world):
        torch.testing.assert_close(muon.orthogonalize_shared(x), orthogonalize(x), rtol=1e-5, atol=1e-6)


def test_adamw_has_a_rate_of_its_own():
    """Matrices of the layers change as without it, all others as by torch's AdamW at that rate."""
    plain, model = small_model(), small_model()
    model.load_state_dict(plain.state_dict())
    others = [name for name, p in model.named_parameters() if not matrices_of(name, p)]
    own = [torch.nn.Parameter(model.get_parameter(name).detach().clone()) for name in others]
    torchs = torch.optim.AdamW(own, lr=LR / 4, betas=(0.9, 0.98), eps=1e-6, weight_decay=DECAY, fused=True)
    optimizers = [
        optim.muon(plain, lr=LR, weight_decay=DECAY),
        optim.muon(model, lr=LR, weight_decay=DECAY, adamw_lr=LR / 4),
    ]
    for step in range(3):
        for each in (plain, model):
            set_gradients(each, step)
        for name, p in zip(others, own, strict=True):
            p.grad = model.get_parameter(name).grad.clone()
        for optimizer in (*optimizers, torchs):
            optimizer.step()
    for name, p in zip(others, own, strict=True):
        assert torch.equal(model.get_parameter(name), p), name
    for name, p in plain.named_parameters():
        assert torch.equal(p, model.get_parameter(name)) != (name in others), name
    assert "lr 0.00025" in optimizer_groups(optim.muon(model, lr=1e-3, adamw_lr=2.5e-4))


# What is said of it


def test_flops_of_the_products():
    """Counted by torch, of a step of the model."""
    model = small_model()
    optimizer = optim.muon(model, lr=LR)
    set_gradients(model, 0)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert counter.get_total_flops() == newton_schulz_flops(optimizer) > 0


def test_flops_of_a_share(monkeypatch):
    """Counted by torch, of the first of 3 processes, which has most; of many, one matrix of each shape and group."""
    group, model = Gathering(3), small_model()
    monkeypatch.setattr(muon, "dist", group)
    optimizer = optim.muon(model, lr=LR)
    set_gradients(model, 0)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert counter.get_total_flops() == newton_schulz_flops(optimizer, 3) < newton_schulz_flops(optimizer)
    assert newton_schulz_flops(optimizer, 100) == newton_schulz_flops(optimizer, 1000) > 0


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (
            optim.muon,
            {},
            "Muon for 14 matrices (0.1 M), decay 0.02 * lr; AdamW for 23 tensors (1.6 M), decay 0.02 * lr",
        ),
        (
            optim.muon,
            {"decay_matrices_only": True},
            "Muon for 14 matrices (0.1 M), decay 0.02 * lr; AdamW for 3 matrices (1.6 M), decay 0.02 * lr; "
            "AdamW for 20 vectors (0.1 M), no decay",
        ),
        (optim.decoupled_adamw, {"weight_decay": 1e-3}, "AdamW for 31 tensors (1.7 M), decay 0.333333 * lr"),
        (
            optim.adamw,
            {"decay_matrices_only": True},
            "AdamW for 11 matrices (1.7 M), decay 0.02 * lr; AdamW for 20 vectors (0.1 M), no decay",
        ),
    ],
)
def test_validate_says_what_changes_how(make, options, text):
    """Of two layers with 7 matrices each; q, k and v, and gate and up, count apart."""
    model = small_model(vocab_size=2**16, intermediate_size=640)
    assert optimizer_groups(make(model, lr=LR, **options)) == text


def test_validate_prints_it_with_the_cost(overrides, tokenizer):
    run = load(QUICKSTART, [*overrides, MUON])
    printed = dict(line.split(":", 1) for line in validate(run).splitlines())
    assert printed["optimizer"].strip().startswith("muon: Muon for 14 matrices ")
    work, added = printed["work"].split("; Muon's products add ")
    per_token = float(work.split()[0]) * 1e6
    tokens = float(printed["global batch"].split("about ")[1].split()[0])
    products = newton_schulz_flops(optim.muon(models.build_model(run, tokenizer), lr=LR))
    assert float(added.removesuffix("%")) / 100 == pytest.approx(products / (per_token * tokens), rel=0.1)
    assert "Muon" not in validate(load(QUICKSTART, overrides))


# Runs


def test_resume_is_bit_identical_and_keeps_its_optimizer(overrides):
    """A new rate reaches all groups; another optimizer is refused, also if it is allowed to change."""
    run = [*overrides, DROPOUT, "autoresume=true", "save_overwrite=false", "device_train_microbatch_size=8"]
    adamw = [*run, "optimizer={name: adamw, lr: 3e-3}"]
    run += [MUON]
    whole, weights = losses_of([*run, *UNSAVED])
    losses_of(run, kill_at=3)
    with pytest.raises(ConfigError, match="optimizer.name: 'muon' there, 'adamw' here"):
        trainer_of(adamw)
    with pytest.raises(CheckpointError, match="state of another optimizer: Muon there, AdamW here. Set optimizer.name"):
        trainer_of([*adamw, "resume.allow=[optimizer]"])
    trainer = trainer_of([*run, "optimizer.lr=1e-9", "resume.allow=[optimizer.lr]"])
    groups = trainer.state.optimizers[0].param_groups
    assert [group["parts"] for group in groups] == [0, 3, 1, 2] and len({group["lr"] for group in groups}) == 1
    assert all(0 < group["lr"] <= 1e-9 and group["initial_lr"] == 1e-9 for group in groups)
    trainer.close()
    resumed, same = losses_of(run)
    assert resumed == {step: whole[step] for step in (3, 4)} and torch.equal(same, weights)


@pytest.mark.parametrize("check", [trainer_of, lambda options: validate(load(QUICKSTART, options))])
def test_state_of_adamw_is_refused(check, overrides, trained):
    start = [*overrides, MUON, *UNSAVED, f"load_path={trained}/latest-rank0.pt", "max_duration=6ba"]
    with pytest.raises(CheckpointError, match="latest-rank0.pt: .*: AdamW there, Muon here. Set optimizer.name back"):
        check([*start, "resume.allow=[optimizer,max_duration]"])


def test_runs_with_algorithms_and_monitors(overrides, tmp_path):
    clipping = "algorithms.gradient_clipping={clipping_type: norm, clipping_threshold: 0.01}"
    monitors = [f"callbacks.{name}={{}}" for name in ("lr_monitor", "step_monitor")]
    monitors.append("callbacks.optimizer_monitor={batch_log_interval: 1}")
    options = [*overrides, MUON, clipping, *monitors, "algorithms.ema={half_life: 2ba}", "save_folder=null"]
    trainer, watch, weights = fit(options)
    assert len(watch.losses) == 4 and weights.isfinite().all()
    assert watch.gradient.norm() == pytest.approx(0.01, rel=1e-3)
    last = [line for line in logged(tmp_path) if "loss/train/total" in line][-1]
    assert {f"lr-Muon/group{i}" for i in range(4)} <= set(last)
    assert last["l2_norm/grad/global"] == pytest.approx(0.01, rel=1e-3) == last["step/grad_norm"]
    assert isinstance(trainer.state.optimizers[0], Muon)
