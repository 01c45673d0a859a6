"""The one function through which every entry point reads a configuration."""

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, LazyConfig, get_cfg
from detectron2.utils.registry import locate
from hydra.errors import HydraException
from iopath.common.file_io import g_pathmgr
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ..wording import suggest
from .keys import add_deformable_detr_config

# Of a misspelt name to what was meant; names of configurations are long and much alike.
_NEAR = 0.8
# Of the models that have a name: in a checkout, and in an installed package.
_CONFIGS = (Path(__file__).parents[3] / "configs", Path(__file__).parents[1] / "model_zoo" / "configs")


def load_config(path: str | os.PathLike, opts: Sequence[str] = ()) -> CfgNode | DictConfig:
    """Read a configuration and apply overrides.

    Args:
        path: what :func:`find_config_file` takes. A ``.yaml`` file is Detectron2's CfgNode with this project's keys,
            or the ``config.yaml`` that a run with a LazyConfig has left in its output folder; a ``.py`` file is a
            LazyConfig.
        opts: overrides as on the command line: ``KEY VALUE`` pairs for yaml, ``key=value`` for LazyConfig, where
            ``+key=value`` adds a key.

    Raises:
        FileNotFoundError: if there is no such file; names the nearest one.
        ValueError: on anything else than a configuration, on an override that cannot be read or whose value its key
            cannot take.
        KeyError: on a yaml key that does not exist, on a LazyConfig key that nothing takes.
    """
    path = find_config_file(path)
    if not g_pathmgr.exists(path) and "://" not in path:
        raise FileNotFoundError(f"there is no configuration file {path!r}{_nearest_file(path)}")
    # argparse takes everything behind the first override for overrides.
    for opt in opts:
        if opt.startswith("--"):
            raise ValueError(
                f"{opt} is an option: put it before the first KEY VALUE pair (yaml) or key=value (LazyConfig)"
            )
    if path.endswith(".py") or _is_saved_lazy_config(path):
        cfg = _read_lazy(path)
        for opt in opts:
            _override_lazy(cfg, opt)
        return cfg
    cfg = _read_yaml(path)
    _override_yaml(cfg, opts)
    return cfg


def find_config_file(config: str | os.PathLike, *, suffix: str = ".yaml") -> str:
    """Return the path of a configuration, which need not exist.

    Args:
        config: a ``.yaml`` or ``.py`` file, the output folder of a training, or the name of a model of the zoo.
        suffix: of the file of a model's name: ".yaml", or ".py" for the LazyConfig.

    Raises:
        ValueError: on anything else.
    """
    config = os.fspath(config)
    if config.endswith((".yaml", ".yml", ".py")):
        return config
    if os.path.isdir(config):
        return os.path.join(config, "config.yaml")
    files = _zoo_files(suffix)
    if config in files:
        return os.fspath(files[config])
    raise ValueError(
        "a configuration must be a .yaml or .py file, the OUTPUT_DIR of a training or a model of the zoo, "
        f"got {config!r}{suggest(config, list(files), cutoff=_NEAR)}; there are the models {', '.join(files)}"
    )


def _zoo_files(suffix: str) -> dict[str, Path]:
    """Return the configurations that have a name."""
    return {path.stem: path for folder in _CONFIGS for path in sorted(folder.glob(f"COCO-Detection/*{suffix}"))}


def _nearest_file(path: str) -> str:
    """Return the file beside a missing one, or the zoo's model, that may have been meant, as the end of a sentence."""
    folder, name = os.path.split(path)
    stem, suffix = os.path.splitext(name)
    siblings = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    files = [sibling for sibling in siblings if sibling.endswith((".yaml", ".yml", ".py"))]
    if near := suggest(name, files, cutoff=_NEAR):
        return near.replace("mean ", f"mean {os.path.join(folder, '')}")
    return suggest(stem, list(_zoo_files(suffix)), cutoff=_NEAR)


def _read_lazy(path: str) -> DictConfig:
    try:
        return LazyConfig.load(path)
    except SyntaxError as error:
        # Detectron2 names the file, its cause the line.
        raise ValueError(f"{path} is not Python: {error.__cause__ or error}") from error
    # Of a run's file, perhaps cut short.
    except YAMLError as error:
        raise ValueError(f"{path} is not a configuration: {error}") from error


def _read_yaml(path: str) -> CfgNode:
    cfg = get_cfg()
    add_deformable_detr_config(cfg)
    try:
        cfg.merge_from_file(path)
    except KeyError as error:
        # The key is the last word.
        key = str(error.args[0]).rpartition(" ")[2]
        raise KeyError(f"{path}: the configuration has no key {key}{_suggest(key, list(_keys(cfg)))}") from error
    # Lists and words for dictionaries, values of another type, older versions, files that are no YAML.
    except (AssertionError, AttributeError, TypeError, ValueError, YAMLError) as error:
        with g_pathmgr.open(path) as file:
            reason = error if file.read().strip() else "it is empty"
        raise ValueError(f"{path} is not a configuration: {reason}") from error
    return cfg


def _is_saved_lazy_config(path: str) -> bool:
    """Whether a yaml file is a LazyConfig: only such a file names what to call, right below its top level."""
    with g_pathmgr.open(path) as file:
        return any(line.startswith("  _target_:") for line in file)


def _override_yaml(cfg: CfgNode, opts: Sequence[str]) -> None:
    for opt in opts[::2]:
        if "=" in opt:
            raise ValueError(f"overrides of a yaml configuration are pairs KEY VALUE; {opt!r} is for LazyConfig")
    if len(opts) % 2:
        raise ValueError(f"overrides of a yaml configuration are pairs KEY VALUE; {opts[-1]!r} has no value")
    known = list(_keys(cfg))
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        # Detectron2 tells of an unknown key by an assertion.
        if key not in known:
            raise KeyError(f"the configuration has no key {key}{_suggest(key, known)}")
        try:
            cfg.merge_from_list([key, value])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{value!r} cannot be the value of {key}: {error}") from error


def _override_lazy(cfg: DictConfig, opt: str) -> None:
    key, equals, _ = opt.partition("=")
    if not equals and not key.startswith("~"):
        raise ValueError(f"overrides of a LazyConfig are key=value, got {opt!r}; KEY VALUE pairs are for yaml")
    _check_lazy_key(cfg, key)
    before = _select(cfg, key)
    try:
        LazyConfig.apply_overrides(cfg, [opt])
        _check_lazy_value(before, _select(cfg, key))
    except (HydraException, OmegaConfBaseException, NotImplementedError, ValueError) as error:
        raise ValueError(f"the override {opt!r} cannot be applied: {error}") from error


def _select(cfg: DictConfig, key: str) -> Any:
    """Return what an override's key holds; None where that is nothing, or an interpolation of nothing."""
    return OmegaConf.select(cfg, key.lstrip("+"), throw_on_resolution_failure=False)


def _check_lazy_value(before: Any, after: Any) -> None:
    """Refuse a value of another kind than the one it replaces, where OmegaConf would take it without a word."""
    if OmegaConf.is_dict(before) and isinstance(after, bool | int | float | str):
        raise ValueError(f"it is no value but a node, got {after!r}; set one of its keys ({', '.join(before)})")
    if isinstance(before, bool | int | float) and isinstance(after, str):
        raise ValueError(
            f"its value must be {'true or false' if isinstance(before, bool) else 'a number'}, got {after!r}"
        )


def _check_lazy_key(cfg: DictConfig, key: str) -> None:
    """Refuse a key that Detectron2 would add to a LazyConfig without anything ever reading it."""
    if key.startswith(("+", "~")):
        # The words of the override grammar for adding and deleting.
        return
    parent_key, _, name = key.rpartition(".")
    parent = OmegaConf.select(cfg, parent_key) if parent_key else cfg
    if OmegaConf.is_list(parent) or (OmegaConf.is_dict(parent) and (name in parent or _takes(parent, name))):
        return
    # Interpolations as they are written: a key like any other, without what it points to.
    known = list(_keys(OmegaConf.to_container(cfg)))
    raise KeyError(f"the LazyConfig has no key {key}{_suggest(key, known)} (+{key}=... adds it)")


def _suggest(key: str, known: Sequence[str]) -> str:
    """Return the known keys that an unknown one may have been meant for, as the end of a sentence."""
    # Names are unique enough to be looked for first: a misplaced key is as common as a misspelt one.
    name = key.rpartition(".")[2]
    same = [k for k in known if k.rpartition(".")[2] == name]
    return f"; did you mean {' or '.join(same[:3])}?" if same else suggest(key, known)


def _takes(call: DictConfig, name: str) -> bool:
    """Whether what a LazyCall calls has a parameter of this name."""
    target = call.get("_target_")
    if target is None:
        return False
    parameters = inspect.signature(locate(target) if isinstance(target, str) else target).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _keys(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Every key of nested dictionaries, with its way there: "train.amp.enabled"."""
    for name, value in node.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{name}.")
