"""YAML -> frozen dataclasses and components by name. One error names all faults."""

import dataclasses
import difflib
import inspect
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from src.common.errors import ConfigError


@dataclass(frozen=True)
class Component:
    """A component by name: in the YAML, a section with ``name`` and the options of its class."""

    name: str
    options: dict[str, Any]


Named = dict[str, Component]


class UnknownKey(str):
    """A fault: the key does not exist."""


def read(kind: type, path: str, overrides: Sequence[str], check: Callable[[Any, list[str]], None]) -> Any:
    """A frozen dataclass ``kind`` from a YAML and ``key=value`` overrides.

    ``${other.key}`` is replaced by the value at that path, ``${oc.env:NAME}`` by an environment variable. ``check``
    appends to a list what is wrong with values of the right type.

    Raises:
        ConfigError: the file cannot be read, an override has no ``=``, or keys are unknown, missing or ill-typed. One
            message names all of them.
    """
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r}: expected key=value")
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file")
    faults: list[str] = []
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        tree: Any = OmegaConf.to_container(merged)
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: the top level must be keys and values")
        try:
            tree = OmegaConf.to_container(merged, resolve=True)
        except InterpolationResolutionError as error:
            _dataclass(kind, tree, "", faults)  # a misspelt key is often why another cannot refer to it
            unknown = [fault for fault in faults if isinstance(fault, UnknownKey)]
            raise ConfigError("\n  ".join([f"{path}: {error}", *unknown])) from None
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, AssertionError) as error:
        # OmegaConf raises the last two when an override does not fit the YAML's shape.
        raise ConfigError(f"{path}: {error}") from None

    config = _dataclass(kind, tree, "", faults)
    if config is not None:
        check(config, faults)
    if faults:
        raise ConfigError("\n  ".join([f"{path}: {len(faults)} fault{'s' * (len(faults) > 1)}", *faults]))
    return config


def to_dict(config: Any) -> Any:
    """A resolved config as plain values, as in a YAML; ``read`` of them returns the same config."""
    if isinstance(config, Component):
        return {"name": config.name, **config.options}
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {k: v.options if isinstance(v, Component) else to_dict(v) for k, v in config.items()}
    return config


def is_within(path: str, section: str) -> bool:
    """Whether ``path`` is ``section`` or a key in it."""
    return path == section or path.startswith(f"{section}.")


def hide_environment(text: str, path: str, overrides: Sequence[str] = ()) -> str:
    """``text`` with ``${oc.env:NAME}`` in place of the value of each variable that the YAML and overrides read."""
    source = "\n".join([Path(path).read_text(), *overrides])
    for name in set(re.findall(r"\$\{oc\.env:\s*([A-Za-z_]\w*)", source)):
        if os.environ.get(name):
            text = text.replace(os.environ[name], f"${{oc.env:{name}}}")
    return text


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint for a misspelt name: the nearest known name, else all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def _dataclass(kind: type, tree: Any, path: str, faults: list[str]) -> Any:
    """``tree`` as a ``kind``; None if it does not fit, and ``faults`` then says why."""
    if not isinstance(tree, dict):
        faults.append(f"{path}: expected keys and values, got {tree!r}")
        return None
    prefix = f"{path}." if path else ""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for name in tree:
        if name not in fields:
            faults.append(UnknownKey(f"{prefix}{name}: unknown key; {nearest(str(name), list(fields))}"))
    values, before = {}, len(faults)  # unknown keys alone: the other values are still checked
    for name, f in fields.items():
        if tree.get(name, "???") != "???":  # OmegaConf's mark of a required value
            values[name] = _value(hints[name], tree[name], prefix + name, faults)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            faults.append(f"{prefix}{name}: missing")
    return kind(**values) if len(faults) == before else None


def _value(hint: Any, value: Any, path: str, faults: list[str]) -> Any:
    """``value`` as a ``hint``; None if it does not fit, and ``faults`` then says why."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Component:
        if isinstance(value, dict) and isinstance(value.get("name"), str):
            return Component(value["name"], {k: v for k, v in value.items() if k != "name"})
    elif dataclasses.is_dataclass(hint):
        return _dataclass(hint, value, path, faults)  # pyright: ignore[reportArgumentType]
    elif hint == Named and (value is None or isinstance(value, dict)):
        given = {name: {} if options is None else options for name, options in (value or {}).items()}
        return {k: Component(str(k), _value(dict, options, f"{path}.{k}", faults)) for k, options in given.items()}
    elif origin is dict and isinstance(value, dict):
        if not dataclasses.is_dataclass(args[1]):
            return value
        return {name: _value(args[1], section, f"{path}.{name}", faults) for name, section in value.items()}
    elif origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        for arg in args:
            attempt: list[str] = []
            result = _value(arg, value, path, attempt)
            if not attempt:
                return result
            if dataclasses.is_dataclass(arg) and isinstance(value, dict):
                faults.extend(attempt)
                return None
    elif hint is float and type(value) is int:
        return float(value)
    elif origin is Literal:
        if value in args:
            return value
    elif type(value) is (origin or hint):  # not isinstance: True is an int, too
        if not args or all(type(item) is args[0] for item in value):
            return value
    faults.append(f"{path}: expected {_described(hint)}, got {value!r}")
    return None


def _described(hint: Any) -> str:
    """A type as an error message names it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Component:
        return "a section with a 'name'"
    if hint in (str, int, float, bool):
        return hint.__name__
    if origin is Literal:
        return "one of " + ", ".join(args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if arg is type(None) else _described(arg) for arg in args)
    return f"a list of {args[0].__name__}" if origin is list else "keys and values"


def build(path: str, table: Mapping[str, Callable[..., Any]], component: Component, **given: Any) -> Any:
    """``table[name](**options, **given)``; ``given`` comes from the code and cannot be set in the YAML.

    Raises:
        ConfigError: the name is not in the table, an option is unknown, missing or refused, or a package is not
            installed. The message has the key's full path.
    """
    if component.name not in table:
        raise ConfigError(f"{path}: unknown {component.name!r}; {nearest(component.name, list(table))}")
    target, path = table[component.name], f"{path}.{component.name}"
    check_options(path, target, component.options, given)
    try:
        return target(**component.options, **given)
    except ImportError as error:  # Composer's loggers import the package of their service in __init__
        raise ConfigError(f"{path}: a package is not installed: {error}") from None
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def check_options(path: str, target: Callable[..., Any], options: Mapping[str, Any], given: Iterable[str]) -> None:
    """Refuse options that ``target`` does not take, and required ones that are missing; one error names all."""
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
    if faults:
        raise ConfigError(f"{path}: {'; '.join(faults)}; it takes {', '.join(parameters) or 'nothing'}")
