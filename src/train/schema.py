"""YAML -> frozen dataclasses and components by name. One error names all faults."""

import collections.abc
import dataclasses
import difflib
import enum
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from src.common.errors import ConfigError
from src.train import yaml12
from src.train.yaml12 import hidden, interpolation, is_within

NO_KEY = {"key": False}
"""Metadata of a dataclass's field that no YAML sets."""


@dataclass(frozen=True)
class Component:
    """A component by name: in the YAML, a section with ``name`` and the options of its class."""

    name: str
    options: dict[str, Any]
    path: str = field(default="", compare=False, repr=False)
    """Of its section."""
    interpolations: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The whole config's, as returned by ``read``."""


Named = dict[str, Component]


class UnknownKey(str):
    """A fault: the key does not exist."""


class IllTyped(str):
    """A fault: the value is a text, and the type is another."""


class Faults(list[str]):
    """What is wrong with a config, one line each.

    Args:
        interpolations: the texts of values that are never shown, by path.
    """

    def __init__(self, interpolations: Mapping[str, Any]):
        super().__init__()
        self.interpolations = interpolations

    def lines(self) -> list[str]:
        """The faults; a value from the environment is shown as the interpolation that reads it."""
        return [hidden(_without_value(fault, self.interpolations), self.interpolations) for fault in self]


def read(kind: type, path: str, overrides: Sequence[str], check: Callable[[Any, list[str]], None]) -> Any:
    """A frozen dataclass ``kind`` from a YAML and ``key=value`` overrides, both YAML 1.2.

    ``${other.key}`` is replaced by the value at that path, ``${oc.env:NAME}`` by an environment variable. ``_merged``
    says what an override changes. ``check`` appends to a list what is wrong with values of the right type. A field
    ``interpolations`` of ``kind`` is set to the texts of values that depend on the environment, by path: what is
    written and printed has them, not the values.

    Raises:
        ConfigError: the file cannot be read, an override has no ``=``, or keys are unknown, missing or ill-typed. One
            message names all of them.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        given: Any = yaml12.load(Path(path).read_text())
        if not isinstance(given, dict | None):
            raise ConfigError("the top level must be keys and values")
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    return read_values(kind, given or {}, path, overrides, check)


def read_values(
    kind: type, given: dict[str, Any], path: str, overrides: Sequence[str], check: Callable[[Any, list[str]], None]
) -> Any:
    """As ``read``, from the values of a YAML; ``path`` names them in messages."""
    faults = Faults({})
    try:
        merged: Any = OmegaConf.create(given)
        for override in overrides:
            merged = _merged(kind, merged, override)
        try:
            faults = Faults(yaml12.interpolations(merged))
            tree: Any = OmegaConf.to_container(merged, resolve=True)
        except InterpolationResolutionError as error:
            # A misspelt key is often why another cannot refer to it.
            _dataclass(kind, OmegaConf.to_container(merged), "", faults)
            unknown = [fault for fault in faults if isinstance(fault, UnknownKey)]
            raise ConfigError("\n  ".join([str(error), *unknown])) from None
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, AssertionError, RecursionError, ValueError) as error:
        # OmegaConf raises TypeError and AssertionError for a key that it cannot read.
        raise ConfigError(f"{path}: {error}") from None

    config = _dataclass(kind, tree, "", faults)
    if config is not None:
        check(config, faults)
    if faults:
        raise ConfigError("\n  ".join([f"{path}: {len(faults)} fault{'s' * (len(faults) > 1)}", *faults.lines()]))
    assert config is not None, "else there is a fault"
    holds = any(f.name == "interpolations" for f in dataclasses.fields(config))
    return dataclasses.replace(config, interpolations=faults.interpolations) if holds else config


def _merged(kind: type, config: DictConfig, override: str) -> Any:
    """The config with an override.

    A mapping changes the keys that it names, as dotted keys do. ``{}``, a list, and a mapping with the ``name`` of a
    model, optimizer or scheduler replace what is there. ``null`` removes a callback, logger or algorithm.
    """
    if "=" not in override:
        raise ConfigError(f"override {override!r}: expected key=value")
    key, text = re.split(r"(?<!\\)=", override, maxsplit=1)
    value = yaml12.load(text)
    if MISSING in flat(value).values():
        raise ConfigError(f"override {override!r}: {MISSING} stands for a value that is still to be given; give it")
    hints, changes = typing.get_type_hints(kind), []
    is_whole = hints.get(key) is Component and isinstance(value, dict) and "name" in value
    for part in (None if is_whole else _nulls(value), value):  # null first, or OmegaConf would keep what {} replaces
        changes.append(OmegaConf.create({}))
        OmegaConf.update(changes[-1], key, part)
    try:
        merged: Any = OmegaConf.merge(config, *changes)
    except TypeError:
        raise ConfigError(f"override {override!r}: it changes a part of a list; give the whole list") from None
    changed: Any = OmegaConf.to_container(changes[-1])
    for section in (name for name, hint in hints.items() if hint == Named and isinstance(changed.get(name), dict)):
        for name in (name for name, options in changed[section].items() if options is None):
            known = list(config.get(section) or {})
            if name not in known:
                raise ConfigError(f"override {override!r}: nothing to remove; {section}: {', '.join(known) or 'none'}")
            del merged[section][name]
    return merged


def _nulls(value: Any) -> Any:
    """A mapping with null for all that is no mapping with keys."""
    return {name: _nulls(part) for name, part in value.items()} if isinstance(value, dict) and value else None


def _without_value(fault: str, interpolations: Mapping[str, Any]) -> str:
    """A fault ``path: message``; at a path of ``interpolations``, without what follows ``, got``."""
    path, _, message = fault.partition(":")
    text = interpolation(path, interpolations)
    expected = message.split(", got ")[0] if ", got " in message else " expected another value"
    if text is not None and not isinstance(fault, UnknownKey):
        is_read = isinstance(fault, IllTyped) and str(text).startswith("${oc.env:")
        advice = f" (use ${{oc.decode:{text}}} for values that are no text)" if is_read else ""
        return f"{path}:{expected}, got {text!r}{advice}"
    if any(is_within(name, path) for name in interpolations):
        return f"{path}:{expected}, got a section that depends on the environment" if ", got " in message else fault
    return fault


def to_dict(config: Any) -> Any:
    """A resolved config as plain values, as in a YAML; ``read`` of them returns the same config."""
    if isinstance(config, Component):
        return {"name": config.name, **config.options}
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in keys_of(config)}
    if isinstance(config, dict):
        return {k: v.options if isinstance(v, Component) else to_dict(v) for k, v in config.items()}
    return config


def keys_of(kind: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a dataclass that a YAML may set."""
    return [f for f in dataclasses.fields(kind) if f.metadata != NO_KEY]


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Values by path: ``{"optimizer.lr": 5e-4, ...}``. An empty section is a value."""
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    inner = [flat(value, f"{path}.{name}" if path else str(name)) for name, value in tree.items()]
    return {name: value for part in inner for name, value in part.items()}


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint for a misspelt name: the nearest known name, else all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def _dataclass(kind: type, tree: Any, path: str, faults: Faults) -> Any:
    """``tree`` as a ``kind``; None if it does not fit, and ``faults`` then says why."""
    if not isinstance(tree, dict):
        faults.append(f"{path}: expected keys and values, got {tree!r}")
        return None
    prefix = f"{path}." if path else ""
    fields = {f.name: f for f in keys_of(kind)}
    hints = typing.get_type_hints(kind)
    for name in tree:
        if name not in fields:
            faults.append(UnknownKey(f"{prefix}{name}: unknown key; {nearest(str(name), list(fields))}"))
    values, before = {}, len(faults)  # unknown keys alone: the other values are still checked
    for name, f in fields.items():
        if name in tree:
            values[name] = _value(hints[name], tree[name], prefix + name, faults)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            faults.append(f"{prefix}{name}: missing")
    return kind(**values) if len(faults) == before else None


def _value(hint: Any, value: Any, path: str, faults: Faults) -> Any:
    """``value`` as a ``hint``; None if it does not fit, and ``faults`` then says why."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if value == MISSING:
        faults.append(f"{path}: missing")
        return None
    if not _is_checkable(hint):
        return value
    if hint is Component:
        if isinstance(value, dict) and isinstance(value.get("name"), str):
            options = {k: v for k, v in value.items() if k != "name"}
            return _component(value["name"], options, path, faults)
    elif dataclasses.is_dataclass(hint):
        return _dataclass(hint, value, path, faults)  # pyright: ignore[reportArgumentType]
    elif hint == Named and (value is None or isinstance(value, dict)):
        given = {name: {} if options is None else options for name, options in (value or {}).items()}
        checked = {k: (f"{path}.{k}", _value(dict, options, f"{path}.{k}", faults)) for k, options in given.items()}
        return {k: _component(str(k), options, at, faults) for k, (at, options) in checked.items()}
    elif origin in (dict, collections.abc.Mapping) and isinstance(value, dict):
        if not dataclasses.is_dataclass(args[1]):
            return value
        return {str(name): _value(args[1], section, f"{path}.{name}", faults) for name, section in value.items()}
    elif origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        for arg in filter(_is_checkable, args):
            attempt = Faults({})
            result = _value(arg, value, path, attempt)
            if not attempt:
                return result
            if dataclasses.is_dataclass(arg) and isinstance(value, dict):
                faults.extend(attempt)
                return None
    elif hint is float:
        if type(value) in (int, float) and abs(value) <= sys.float_info.max:
            return float(value)
    elif hint is int:
        if type(value) is int and abs(value) < 2**63:  # not isinstance: True is an int, too
            return value
    elif origin is Literal:
        if value in args and type(value) in map(type, args):
            return value
    elif inspect.isclass(hint) and issubclass(hint, enum.Enum):
        if any(value == member.value for member in hint):
            return value
    elif origin in SEQUENCES:
        if type(value) is list and (_is_open(hint) or len(value) == len(args)):
            attempt = Faults({})
            kinds = [args[0]] * len(value) if _is_open(hint) else args
            result = [_value(kind, item, path, attempt) for kind, item in zip(kinds, value, strict=True)]
            if not attempt:
                return result
    elif type(value) is (list if hint is tuple else hint):
        return value
    takes_text = origin is Literal or (inspect.isclass(hint) and issubclass(hint, enum.Enum))
    kind = IllTyped if isinstance(value, str) and not takes_text else str
    faults.append(kind(f"{path}: expected {_described(hint)}, got {value!r}{_advice(value)}"))
    return None


def _component(name: str, options: Any, path: str, faults: Faults) -> Component:
    """A component; ``faults`` name each of its options that is still to be given."""
    faults += [f"{key}: missing" for key, value in flat(options, path).items() if value == MISSING]
    return Component(name, options, path, faults.interpolations)


MISSING = "???"
"""OmegaConf's mark of a value that is still to be given."""
PLAIN = (str, int, float, bool, list, dict, tuple, type(None))
SEQUENCES = (list, tuple, collections.abc.Sequence)


def _is_open(hint: Any) -> bool:
    """Whether a sequence has any length."""
    return typing.get_origin(hint) is not tuple or typing.get_args(hint)[1:] == (...,)


def _is_checkable(hint: Any) -> bool:
    """Whether a YAML can hold such a value. Of a union, a part that it cannot hold is not expected."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is_checkable(arg) for arg in typing.get_args(hint) if arg is not type(None))
    if inspect.isclass(hint) and origin is None:
        return hint in PLAIN or hint is Component or dataclasses.is_dataclass(hint) or issubclass(hint, enum.Enum)
    return origin in (*SEQUENCES, dict, collections.abc.Mapping, Literal)


def _described(hint: Any) -> str:
    """A type as an error message names it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Component:
        return "a section with a 'name'"
    if hint in (str, int, float, bool):
        return hint.__name__
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if inspect.isclass(hint) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(str(member.value) for member in hint)
    if origin in (typing.Union, types.UnionType):
        parts = [arg for arg in args if arg is type(None) or _is_checkable(arg)]
        return " or ".join(dict.fromkeys("null" if arg is type(None) else _described(arg) for arg in parts))
    if origin in SEQUENCES:
        return f"a list of {_described(args[0]) if _is_open(hint) else f'{len(args)} {_described(args[0])}'}"
    return "a list" if hint in (list, tuple) else "keys and values"


def _advice(value: Any) -> str:
    """How to write what YAML 1.1 reads in another way; or why a number is refused."""
    if type(value) is int and abs(value) >= 2**63:
        return ", which has more than 64 bits"
    if isinstance(value, str) and re.fullmatch(r"y|yes|on|n|no|off", value.lower()):
        return f"; write {'true' if value.lower() in ('y', 'yes', 'on') else 'false'}"
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(_\d+)+", value):
        return f"; write {value.replace('_', '')}"
    return ""


# ----------------------------------------------------------------------------------------------------------------------
# Components
# ----------------------------------------------------------------------------------------------------------------------

INTERVAL = re.compile(r"[1-9]\d{0,17}(ba|sp|tok|ep|sec)|0?\.\d*[1-9]\d*dur|1(\.0+)?dur")
"""How often, in a unit of Composer."""
LENGTH = re.compile(r"\d{1,18}(ba|sp|tok|ep|sec)|(0|1|[01]\.0+|0?\.\d+)dur")
"""How long, in a unit of Composer."""
PLACEHOLDERS = "run_name rank local_rank world_size local_world_size node_rank".split()
"""Composer's names in braces."""
NAMES = [*PLACEHOLDERS, *"epoch batch batch_in_epoch sample sample_in_epoch token token_in_epoch file_name".split()]
"""Those of names of files."""


def are_known(text: str, known: Sequence[str]) -> bool:
    """Whether all names in braces are known, and the braces match."""
    try:
        text.format(**{name: "" if name in ("run_name", "file_name") else 0 for name in known})
    except (LookupError, ValueError, TypeError, AttributeError):
        return False
    return True


def _is_period(value: int | str) -> bool:
    """A time above 0; an int counts epochs."""
    return value > 0 if isinstance(value, int) else bool(INTERVAL.fullmatch(value))


def _is_length(value: int | str) -> bool:
    """A time; an int counts epochs."""
    return value >= 0 if isinstance(value, int) else bool(LENGTH.fullmatch(value))


RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    name: (what, fits)
    for names, what, fits in (
        (
            "lr adamw_lr alpha eps layer_norm_eps clipping_threshold gpu_flops_available window_size "
            "batch_log_interval max_entries flush_interval buffer_size dist_aggregate_batch_interval vocab_size "
            "hidden_size num_hidden_layers num_attention_heads intermediate_size max_position_embeddings "
            "type_vocab_size",
            "a positive number",
            lambda x: x > 0,
        ),
        ("weight_decay initializer_range min_delta warmup skip_batches", "0 or more", lambda x: x >= 0),
        (
            "hidden_dropout_prob attention_probs_dropout_prob classifier_dropout smoothing momentum",
            "a number from 0 to less than 1",
            lambda x: 0 <= x < 1,
        ),
        ("betas", "a list of two numbers from 0 to less than 1", lambda x: all(0 <= beta < 1 for beta in x)),
        ("alpha_f", "a number from 0 to 1", lambda x: 0 <= x <= 1),
        ("clipping_type", "one of norm, value, adaptive", lambda x: x in ("norm", "value", "adaptive")),
        ("half_life update_interval interval t_max", "a time above 0 such as 100ba or 0.1dur", _is_period),
        ("t_warmup t_decay ema_start swa_start swa_end patience", "a time such as 100ba or 0.1dur", _is_length),
        (
            "folder filename remote_file_name",
            f"no {{placeholder}} but {', '.join(NAMES)}",
            lambda x: are_known(x, NAMES),
        ),
    )
    for name in names.split()
}
"""Options by name, with the same meaning in every component that has them: what is expected, and whether it is so."""


ILL_TYPED = (TypeError, AssertionError, AttributeError, KeyError)
"""What constructors raise for values that they do not expect, besides ValueError."""


def build(path: str, table: Mapping[str, Callable[..., Any]], component: Component, **given: Any) -> Any:
    """``table[name](**options, **given)``; ``given`` comes from the code and cannot be set in the YAML.

    Raises:
        ConfigError: the name is not in the table, or an option is unknown, missing, ill-typed or refused. The message
            has the key's full path.
    """
    check_component(path, table, component, given)
    path = f"{path}.{component.name}"
    try:
        return table[component.name](**component.options, **given)
    except ConfigError:
        raise
    except (ValueError, *ILL_TYPED) as error:
        values = flat(component.options, component.path).items()
        secrets = [value for key, value in values if interpolation(key, component.interpolations) is not None]
        shown = not any(str(value) in str(error) for value in secrets)
        raise ConfigError(f"{path}: {error if shown else type(error).__name__}") from error


def check_component(
    path: str, table: Mapping[str, Callable[..., Any]], component: Component, given: Iterable[str]
) -> None:
    """Raises ``build``'s ConfigError for a name or options that do not fit; builds nothing."""
    if component.name not in table:
        name = interpolation(f"{component.path}.name", component.interpolations) or component.name
        raise ConfigError(f"{path}: unknown {name!r}; {nearest(name, list(table))}")
    target, keys = table[component.name], component.path or f"{path}.{component.name}"
    check_options(f"{path}.{component.name}", target, component.options, given, keys, component.interpolations)


def check_options(
    path: str,
    target: Callable[..., Any],
    options: Mapping[str, Any],
    given: Iterable[str],
    keys: str = "",
    interpolations: Mapping[str, Any] = types.MappingProxyType({}),
) -> None:
    """Refuse options that ``target`` does not take, ill-typed ones, and required ones that are missing.

    Types are those of its annotations and defaults; see also ``RANGES``. One ConfigError names all faults.

    Args:
        given: options that are not the YAML's.
        keys: path of the section with the options, by default ``path``.
        interpolations: texts to show in place of values, by path.
    """
    signature = inspect.signature(target).parameters
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = {name: p for name, p in signature.items() if p.kind in named and name not in given}
    # Loggers pass **kwargs to their service. *args with **kwargs are a base class's and have no effect.
    others = [p.kind for p in signature.values() if p.kind not in named]
    open_ended = inspect.isclass(target) and others == [inspect.Parameter.VAR_KEYWORD]
    faults = [
        f"unexpected {str(name)!r} ({nearest(str(name), list(parameters))})"
        for name in options
        if name not in parameters and not open_ended
    ]
    faults += [f"missing {name!r}" for name, p in parameters.items() if p.default is p.empty and name not in options]
    lines = [f"{path}: {'; '.join(faults)}; it takes {', '.join(parameters) or 'nothing'}"] if faults else []
    scope = getattr(inspect.unwrap(target.__init__ if inspect.isclass(target) else target), "__globals__", {})
    ill_typed = Faults(interpolations)
    for name in parameters.keys() & options.keys():
        _option(_hint(parameters[name], scope), name, options[name], f"{keys or path}.{name}", ill_typed)
    if lines or ill_typed:
        raise ConfigError("\n  ".join([*lines, *sorted(ill_typed.lines())]))


def _hint(parameter: inspect.Parameter, scope: dict[str, Any]) -> Any:
    """The type of an option: its annotation, else the type of its default, else Any."""
    hint, default = parameter.annotation, parameter.default
    if isinstance(hint, str):
        try:
            return eval(hint, scope)  # one by one: a name may be imported for type checkers only
        except NameError:
            return Any
    if hint is not parameter.empty:
        return hint
    return Any if default is None or default is parameter.empty else type(default)


def _option(hint: Any, name: str, value: Any, path: str, faults: Faults) -> None:
    """Append to ``faults`` why ``value`` is none for the option ``name``."""
    attempt = Faults({})
    _value(hint, value, path, attempt)
    if name not in RANGES:
        faults.extend(attempt)
        return
    what, fits = RANGES[name]
    try:
        good = value is None or fits(value)
    except TypeError:  # of an option without a type
        good = False
    kinds = _described(hint)
    if attempt and "int" in kinds.split() and "float" not in kinds:  # a float may be in the range
        what = f"{kinds}, {what}"
    if attempt or not good:
        kind = type(attempt[0]) if attempt else str
        faults.append(kind(f"{path}: expected {what}, got {value!r}"))
