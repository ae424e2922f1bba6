"""Recipes: training settings as plain YAML, shipped or a user's own.

The keys are those of `TrainingConfig`, in groups as there. What a recipe leaves out has the value
of that class, but `augment` starts from no augmentation. `optimizer.lr`, `optimizer.weight_decay`
and `optimizer.warmup_epochs` are short for the same key of both stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args, get_type_hints

from biper_engine.training.config import AugmentConfig, TrainingConfig

__all__ = [
    "read_recipe",
    "recipe_for",
    "shipped",
    "to_yaml",
    "with_settings",
    "with_values",
    "yaml_value",
]

_BOTH_STAGES = ("lr", "weight_decay", "warmup_epochs")
# Words that people may try for a key.
_OTHER_NAMES = {
    "arch": "architecture",
    "batch": "batch_size",
    "data": "dataset",
    "freq": "frequency",
    "learning_rate": "optimizer.lr",
    "lr": "optimizer.lr",
    "model": "architecture",
    "network": "architecture",
    "wd": "optimizer.weight_decay",
    "weight_decay": "optimizer.weight_decay",
    "epochs": "stage1.epochs",
    "tau": "stage1.tau",
}


def shipped() -> tuple[str, ...]:
    """Return the names of the recipes in the package."""
    return tuple(sorted(path.name.removesuffix(".yaml") for path in _folder().iterdir()))


def recipe_for(dataset: str) -> str:
    """Return the shipped recipe for a data set: one of its name, or the one for any folder."""
    name = dataset.replace("-", "_")
    return {"cifar10": "cifar10_resnet20", "imagenet": "imagenet_resnet18"}.get(
        name, name if name in shipped() else "folder"
    )


def read_recipe(recipe: str, settings: Sequence[str] = ()) -> TrainingConfig:
    """Read a recipe and change some of its settings.

    Args:
        recipe: a name from `shipped()`, or the path of a YAML file.
        settings: `key=value`, such as "optimizer.lr=0.01" or "augment.flip=true"; later ones win.

    Raises:
        ValueError: there is no such recipe, it is not YAML, or has an unknown key (the message has
            the nearest one) or a value of another type.
    """
    text, where = _text(recipe)
    values = yaml_value(text, where)
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} has a {type(values).__name__}; wanted `key: value` lines.")
    base = TrainingConfig().to_dict()
    if "augment" in values:
        base["augment"] = TrainingConfig(augment=AugmentConfig()).to_dict()["augment"]
    pairs = sorted(
        _pairs(values, where), key=lambda pair: not _is_short(pair[0])
    )  # longer keys win
    return _config(base, pairs, where, settings)


def with_settings(config: TrainingConfig, settings: Sequence[str]) -> TrainingConfig:
    """Return the config with some `key=value` changed; raises as `read_recipe`."""
    return _config(config.to_dict(), (), "", settings)


def with_values(config: TrainingConfig, values: Mapping[str, Any], where: str) -> TrainingConfig:
    """Return the config with some values changed, by dotted key; raises as `read_recipe`."""
    return _config(config.to_dict(), tuple(values.items()), where, ())


def to_yaml(config: TrainingConfig) -> str:
    """Return a recipe that `read_recipe` reads as this config."""
    import yaml

    text: str = yaml.safe_dump(config.to_dict(), sort_keys=False, default_flow_style=None)
    return text


def _config(
    base: dict[str, Any], pairs: Sequence[tuple[str, Any]], where: str, settings: Sequence[str]
) -> TrainingConfig:
    for key, value in pairs:
        _set(base, key, value, where)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"'{setting}' is no setting; wanted key=value, as optimizer.lr=0.01.")
        _set(base, key.strip(), yaml_value(text, f"The value of '{setting}'"), f"'{setting}'")
    return TrainingConfig.from_dict(base)


def _text(recipe: str) -> tuple[str, str]:
    """Return a recipe's text, and what messages call it."""
    if recipe in shipped():
        return (_folder() / f"{recipe}.yaml").read_text(encoding="utf-8"), f"Recipe '{recipe}'"
    path = Path(recipe).expanduser()
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), f"'{path}'"
        except UnicodeDecodeError as error:
            raise ValueError(f"'{path}' is not text, so that it is no recipe: {error}.") from error
    close = get_close_matches(recipe, shipped(), n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    raise ValueError(
        f"There is no recipe {recipe!r}.{hint} Shipped: {', '.join(shipped())}; or pass the path "
        "of a YAML file."
    )


def _folder() -> Any:
    return files("biper_engine.training") / "recipes"


def yaml_value(text: str, where: str) -> Any:
    """Return the value of a YAML text; `where` is what an error calls it."""
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            f"Recipes need 'yaml', which cannot be imported: {error}. "
            'Run: pip install "biper-engine[train]"'
        ) from error
    try:
        mappings = list(_mappings(yaml.compose(text, yaml.SafeLoader)))
        value = yaml.safe_load(text)
    except RecursionError:
        raise ValueError(f"{where} has values in values without end, or too deep.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{where} is not YAML: {error}") from error
    for mapping in mappings:  # YAML would silently take the last one
        _require_once([key.value for key, _ in mapping.value], where)
    return value


def _mappings(node: Any) -> Iterator[Any]:
    """Yield the mappings of a YAML text; its values may not hold themselves."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        yield node
        for key, value in node.value:
            yield from _mappings(key)
            yield from _mappings(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _mappings(value)


def _require_once(keys: list[Any], where: str) -> None:
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ValueError(f"{where} has the key '{twice}' twice. Leave one out.")


def _pairs(values: Mapping[Any, Any], where: str) -> list[tuple[str, Any]]:
    """Return dotted keys and values; none may come twice, as `a.b: 1` and `a: {b: 2}` would."""
    found = list(_flat(values))
    _require_once([key for key, _ in found], where)
    return found


def _flat(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_short(key: str) -> bool:
    group, _, name = key.rpartition(".")
    return group == "optimizer" and name in _BOTH_STAGES


def _set(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Put a checked value into nested dicts."""
    if _is_short(key):
        for stage in ("stage1", "stage2"):
            _set(values, f"{stage}.{key.rpartition('.')[2]}", value, where)
        return
    types = _types()
    if inside := [one for one in types if one.startswith(f"{key}.")]:
        raise ValueError(
            f"{where}: '{key}' is {value!r}, wanted `key: value` lines below it. Known keys: "
            f"{', '.join(inside)}."
        )
    if key not in types:
        raise ValueError(f"{where} has the unknown key '{key}'. {_nearest(key, types)}")
    group, _, name = key.rpartition(".")
    target = values[group] if group else values
    target[name] = _checked(value, types[key], key, where)


def _nearest(key: str, types: Mapping[str, Any]) -> str:
    name = key.rpartition(".")[2]
    if name in _OTHER_NAMES:
        return f"Did you mean '{_OTHER_NAMES[name]}'?"
    known = [*types, *(f"optimizer.{one}" for one in _BOTH_STAGES)]
    ends = {one.rpartition(".")[2]: one for one in known}
    close = get_close_matches(key, known, n=1, cutoff=0.6)
    close = close or [ends[one] for one in get_close_matches(name, ends, n=1, cutoff=0.6)]
    if close:
        return f"Did you mean '{close[0]}'?"
    return f"Known keys: {', '.join(known)}."


def _types(kind: type[Any] = TrainingConfig, prefix: str = "") -> dict[str, Any]:
    """Return the type of each dotted key."""
    hints, found = get_type_hints(kind), {}
    for field in fields(kind):
        hint = hints[field.name]
        if is_dataclass(hint):
            found.update(_types(hint, f"{field.name}."))  # type: ignore[arg-type]
        else:
            found[prefix + field.name] = hint
    return found


def _checked(value: Any, hint: Any, key: str, where: str) -> Any:
    """Return the value in its type, or say what was wanted."""
    kinds = [one for one in get_args(hint) if one is not type(None)]
    optional = type(None) in get_args(hint)
    if value is None and optional:
        return None
    kind = kinds[0] if optional else hint
    if get_args(kind):  # a tuple of numbers
        wanted = len(get_args(kind))
        if isinstance(value, list | tuple) and len(value) == wanted:
            return [_checked(one, float, key, where) for one in value]
        raise ValueError(f"{where}: '{key}' is {value!r}, wanted {wanted} numbers in [].")
    if kind is float and isinstance(value, str):  # YAML takes 1e-3, without a dot, for text
        try:
            return float(value)
        except ValueError:
            pass
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise ValueError(f"{where}: '{key}' is {value!r}, wanted {names[kind]}.")
    return float(value) if kind is float else value
