"""YAML -> frozen dataclasses, and components by name; all faults in one error."""

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
    """A component by name: in the YAML a section with ``name`` and the options that its class takes."""

    name: str
    options: dict[str, Any]


Named = dict[str, Component]


def read(kind: type, path: str, overrides: Sequence[str], check: Callable[[Any, list[str]], None]) -> Any:
    """A ``kind``, which is a frozen dataclass, from a YAML and ``key=value`` overrides.

    ``${other.key}`` is replaced by the value at that path, ``${oc.env:NAME}`` by an environment variable.

    Args:
        check: adds to a list what is wrong with values of the right type.

    Raises:
        ConfigError: the file cannot be read, an override has no ``=``, or keys are unknown, missing or ill-typed. All
            such keys are in the one message.
    """
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r} is not of the form key=value")
    if not Path(path).is_file():
        raise ConfigError(f"{path}: there is no such file")
    faults: list[str] = []
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        tree: Any = OmegaConf.to_container(merged, throw_on_missing=False)
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: the top level must be keys and values")
        try:
            tree = OmegaConf.to_container(merged, resolve=True, throw_on_missing=False)
        except InterpolationResolutionError as error:
            _dataclass(kind, tree, "", faults)  # a misspelt key is often why another cannot refer to it
            unknown = [fault for fault in faults if ": unknown; " in fault]
            raise ConfigError("\n  ".join([f"{path}: {error}", *unknown])) from None
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, AssertionError) as error:
        # The last two are what OmegaConf raises when an override does not fit the YAML's shape.
        raise ConfigError(f"{path}: {error}") from None

    config = _dataclass(kind, tree, "", faults)
    if config is not None:
        check(config, faults)
    if config is None or faults:
        heading = f"{path}: {len(faults)} fault{'s' * (len(faults) > 1)}"
        raise ConfigError("\n  ".join([heading, *faults]))
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """A resolved config as plain values, components as they stand in a YAML. ``read`` of it gives the config again."""

    def plain(value: Any) -> Any:
        if isinstance(value, Component):
            return {"name": value.name, **value.options}
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, dict):
            return {k: v.options if isinstance(v, Component) else plain(v) for k, v in value.items()}
        return value

    return plain(config)


def is_within(path: str, section: str) -> bool:
    """Whether a path is that of a section or of something in it."""
    return path == section or path.startswith(f"{section}.")


def hide_environment(text: str, path: str, overrides: Sequence[str] = ()) -> str:
    """``text`` with the value of each environment variable that the YAML or an override reads replaced by its name."""
    source = "\n".join([Path(path).read_text(), *overrides])
    for name in set(re.findall(r"\$\{oc\.env:\s*([A-Za-z_]\w*)", source)):
        if os.environ.get(name):
            text = text.replace(os.environ[name], f"${{oc.env:{name}}}")
    return text


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint for a misspelt name: the nearest known one, else all."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def _dataclass(kind: type, tree: Any, path: str, faults: list[str]) -> Any:
    """``tree`` as a ``kind``, or None with the reasons added to ``faults``."""
    if not isinstance(tree, dict):
        faults.append(f"{path}: keys and values are wanted here, not {tree!r}")
        return None
    prefix = f"{path}." if path else ""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for name in tree:
        if name not in fields:
            faults.append(f"{prefix}{name}: unknown; {nearest(str(name), list(fields))}")
    values, before = {}, len(faults)
    for name, f in fields.items():
        if name in tree and tree[name] != "???":  # OmegaConf's mark of a value that must be given
            values[name] = _value(hints[name], tree[name], prefix + name, faults)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            faults.append(f"{prefix}{name}: missing")
    return kind(**values) if len(faults) == before else None


def _value(hint: Any, value: Any, path: str, faults: list[str]) -> Any:
    """``value`` as a ``hint``, or None with the reason added to ``faults``."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Component:
        return _component(value, path, faults)
    if origin is dict and args[1] is Component:
        return _components(value, path, faults)
    if origin is dict and dataclasses.is_dataclass(args[1]) and isinstance(value, dict):
        return {name: _value(args[1], section, f"{path}.{name}", faults) for name, section in value.items()}
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, value, path, faults)  # pyright: ignore[reportArgumentType]
    if origin in (typing.Union, types.UnionType):
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
    elif origin is Literal:
        if value in args and not isinstance(value, bool):
            return value
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif origin is list:
        if isinstance(value, list) and all(type(item) is args[0] for item in value):  # true is no whole number
            return value
    elif isinstance(value, origin or hint):
        return value
    faults.append(f"{path}: {value!r} is not {_describe(hint)}")
    return None


def _describe(hint: Any) -> str:
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    if hint in names:
        return names[hint]
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_describe(arg) for arg in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return "a list of texts" if typing.get_args(hint)[0] is str else "a list of whole numbers"
    return "keys and values"


def _component(value: Any, path: str, faults: list[str]) -> Component | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        faults.append(f"{path}: a section with a 'name' is wanted here, not {value!r}")
        return None
    return Component(value["name"], {k: v for k, v in value.items() if k != "name"})


def _components(value: Any, path: str, faults: list[str]) -> Named | None:
    if value is None:
        return {}
    if not isinstance(value, dict):
        faults.append(f"{path}: names, each with what it takes, are wanted here, not {value!r}")
        return None
    components = {}
    for name, options in value.items():
        if options is not None and not isinstance(options, dict):
            faults.append(f"{path}.{name}: keys and values (or {{}}) are wanted here, not {options!r}")
        components[name] = Component(str(name), options or {})
    return components


VARIADIC = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def build(path: str, table: Mapping[str, Callable[..., Any]], component: Component, **given: Any) -> Any:
    """``table[name](**options, **given)``; ``given`` comes from the code and is no option of the YAML's.

    Raises:
        ConfigError: the name is not in the table, options are unknown or missing, or a package that it needs is not
            installed; by the key's full path.
    """
    if component.name not in table:
        raise ConfigError(f"{path}: unknown {component.name!r}; {nearest(component.name, list(table))}")
    target = table[component.name]
    check_options(f"{path}.{component.name}", target, component.options, given)
    try:
        return target(**component.options, **given)
    except ImportError as error:  # Composer's loggers import their service's package when they are made
        raise ConfigError(f"{path}.{component.name}: a package is not installed: {error}") from None
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}.{component.name}: {error}") from None


def check_options(path: str, target: Callable[..., Any], options: Mapping[str, Any], given: Iterable[str]) -> None:
    """Refuse, in one error, options that ``target`` does not take, and say which it lacks."""
    parameters = inspect.signature(target).parameters
    takes = [
        name
        for name, p in parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and name not in given
    ]
    # Loggers hand **kwargs on to their service; *args, **kwargs are a base class's and go nowhere.
    kinds = {p.kind for p in parameters.values()}
    open_ended = inspect.isclass(target) and kinds & VARIADIC == {inspect.Parameter.VAR_KEYWORD}
    faults = []
    for name in options:
        if name not in takes and not open_ended:
            faults.append(f"unexpected {str(name)!r} ({nearest(str(name), takes)})")
    faults += [
        f"missing {name!r}"
        for name in takes
        if parameters[name].default is inspect.Parameter.empty and name not in options
    ]
    if faults:
        raise ConfigError(f"{path}: {'; '.join(faults)}; it takes {', '.join(takes) or 'nothing'}")
