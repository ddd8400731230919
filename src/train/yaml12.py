"""YAML 1.2, read and written, and which values depend on the environment. Imports no torch."""

import contextlib
import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError
from omegaconf.resolvers import oc

from src.common.errors import ConfigError, Interrupted, TrainingError


class Loader(yaml.SafeLoader):
    """YAML 1.2's core schema (yaml.org/spec/1.2.2, section 10.3): ``off`` and ``1:04`` are texts, and 017 is 17.

    Keys are texts, as written. Refuses a key that occurs twice in a mapping, tags other than those of the core schema,
    and aliases that make a text larger than ``LARGEST`` values.
    """

    LARGEST = 10_000
    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}  # without those of YAML 1.1
    yaml_constructors: ClassVar[dict[Any, Any]] = {
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.endswith((":str", ":seq", ":map"))
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: Any = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {key.value!r}", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        node.value = [(self._text(key), value) for key, value in node.value]
        return node

    def _text(self, key: yaml.Node) -> yaml.Node:
        is_text = not isinstance(key, yaml.ScalarNode) or key.tag == f"{CORE}merge"
        return key if is_text else yaml.ScalarNode(f"{CORE}str", key.value, key.start_mark)

    def construct_document(self, node: yaml.Node) -> Any:
        sizes: dict[int, float] = {}

        def size(part: Any) -> float:
            if id(part) not in sizes:
                sizes[id(part)] = math.inf  # of a value that is an alias of what holds it
                inner = [] if isinstance(part, yaml.ScalarNode) else part.value
                sizes[id(part)] = 1 + sum(sum(map(size, item)) if type(item) is tuple else size(item) for item in inner)
            return sizes[id(part)]

        if size(node) > self.LARGEST:
            raise yaml.YAMLError(f"its aliases hold themselves, or it has more than {self.LARGEST:,} values")
        return super().construct_document(node)


class Dumper(yaml.SafeDumper):
    """Quotes each text that ``Loader``, or a reader of YAML 1.1, would take for something else."""


CORE = "tag:yaml.org,2002:"
PATTERNS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}


def _scalar(loader: Loader, node: yaml.ScalarNode) -> int | float | bool | None:
    kind, text = node.tag.removeprefix(CORE), str(loader.construct_scalar(node))
    if not re.fullmatch(PATTERNS[kind], text):
        raise yaml.MarkedYAMLError(problem=f"expected {kind}, got {text!r}", problem_mark=node.start_mark)
    text = text.lower()
    if kind in ("null", "bool"):
        return {"true": True, "false": False}.get(text)
    if kind == "int":
        return int(text, 0 if text[:2] in ("0o", "0x") else 10)
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


for _kind, _pattern in {**PATTERNS, "merge": "<<"}.items():
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(f"{CORE}{_kind}", re.compile(rf"(?:{_pattern})\Z"), [None])  # pyright: ignore
for _kind in PATTERNS:
    Loader.add_constructor(f"{CORE}{_kind}", _scalar)


def load(text: str) -> Any:
    """Plain values from a YAML; raises yaml.YAMLError, or ValueError for a value that its tag does not fit."""
    return yaml.load(text, Loader)


def dump(tree: Any) -> str:
    """Plain values as a YAML, which ``Loader`` reads as the same values."""
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False)


def is_within(path: str, section: str) -> bool:
    """Whether ``path`` is ``section`` or a key in it."""
    return path == section or path.startswith(f"{section}.")


def interpolations(config: DictConfig) -> dict[str, Any]:
    """By path, the unresolved value of each key whose value depends on the environment or holds a ``${``."""
    reads: list[str] = []
    found: dict[str, Any] = {}

    def env(name: str, *default: Any) -> Any:
        value = oc.env(name, *default)
        reads.append(name)
        return value

    def walk(section: DictConfig, prefix: str) -> None:
        texts: Any = OmegaConf.to_container(section)
        for key, text in texts.items():
            path = f"{prefix}{key}"
            reads.clear()
            try:
                value = None if OmegaConf.is_missing(section, key) else section[key]
                if isinstance(value, DictConfig) and isinstance(text, dict):
                    walk(value, f"{path}.")
                    continue
                value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            except InterpolationResolutionError:
                if reads:  # the error may quote the value
                    raise ConfigError(f"{path}: {text!r} cannot be resolved") from None
                raise
            if reads or "${" in str(value):
                found[path] = text

    OmegaConf.register_resolver("oc.env", env, replace=True, annotation_validation="off")
    walk(config, "")
    return found


def interpolation(path: str, texts: Mapping[str, Any]) -> Any:
    """The unresolved value at ``path`` or at a section that holds it; None if it does not depend on the environment."""
    return next((text for name, text in texts.items() if is_within(path, name)), None)


def hidden(message: str, texts: Mapping[str, Any]) -> str:
    """A message with ``${oc.env:NAME}`` in place of the values of environment variables.

    Of those that ``texts``, interpolations by path, read. A value of less than 6 characters must be a word of the
    message, and if it is a number, the message must name a key that reads it: others may have the same number.
    """
    shown: dict[str, str] = {}
    for path, text in texts.items():
        for name in re.findall(r"\$\{\s*oc\.env:\s*([^,}\s]+)", str(text)):
            value = os.environ.get(name, "")
            if len(value) > 5 or (value and not value.isdecimal()) or (value and path.split(".")[-1] in message):
                shown |= dict.fromkeys((value, repr(value)[1:-1]), f"${{oc.env:{name}}}")
    forms = [re.escape(form) for form in sorted(shown, key=len, reverse=True)]
    words = [form if len(form) > 5 else rf"(?<!\w){form}(?!\w)" for form in forms]
    return re.sub("|".join(words), lambda match: shown[match[0]], message) if shown else message


@contextlib.contextmanager
def hiding(texts: Mapping[str, Any]) -> Iterator[None]:
    """``hidden`` for the messages of errors that the ``with`` block raises."""
    try:
        yield
    except (ValueError, OSError, TrainingError, Interrupted) as error:
        message = hidden(str(error), texts)
        if isinstance(error, OSError) and message != str(error):
            raise OSError(message) from None  # its own text is made of several arguments
        error.args = (message,) if message != str(error) else error.args
        raise


def unresolved(tree: Any, texts: Mapping[str, Any], path: str = "") -> Any:
    """Plain values with the unresolved ``texts`` of some paths."""
    if path in texts:
        return texts[path]
    if not isinstance(tree, dict):
        return tree
    return {k: unresolved(v, texts, f"{path}.{k}" if path else str(k)) for k, v in tree.items()}


def stored(tree: Any, texts: Mapping[str, Any], path: str = "") -> Any:
    """Plain values as checkpoints hold them: the interpolation, and a digest, of those that depend on the environment.

    Args:
        texts: of interpolations, by path.
        path: of ``tree``.
    """
    if isinstance(tree, dict) and tree:
        return {k: stored(v, texts, f"{path}.{k}" if path else str(k)) for k, v in tree.items()}
    text = interpolation(path, texts)
    return tree if text is None else f"{text} ({_digest(tree)})"


def is_same(one: Any, other: Any) -> bool:
    """Whether two values that checkpoints hold are the same; of interpolations, whether their digests are."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_same(value, other[name]) for name, value in one.items())
    held = [is_stored(value) for value in (one, other)]
    digests = [match[1] if match else _digest(value) for match, value in zip(held, (one, other), strict=True)]
    return one == other or (any(held) and digests[0] == digests[1])


def is_stored(value: Any) -> re.Match[str] | None:
    """Whether a value that a checkpoint holds is an interpolation with the digest of its value."""
    return STORED.fullmatch(value) if isinstance(value, str) else None


STORED = re.compile(r".*\$\{.* \(([0-9a-f]{4})\)", re.DOTALL)
"""An interpolation with the digest of its value."""


def _digest(value: Any) -> str:
    """16 bits: another value is noticed, and nobody can find the value from them."""
    return hashlib.blake2b(repr(value).encode(), digest_size=2).hexdigest()
