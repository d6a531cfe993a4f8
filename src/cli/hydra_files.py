"""What the configuration files say: Hydra's loader, with one exception for everything that can be wrong with a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from typing import TYPE_CHECKING, Any

from safelight.cli import plugins
from safelight.errors import SafelightError

if TYPE_CHECKING:
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from omegaconf import DictConfig

SHIPPED = "pkg://safelight.configs"


class CompositionError(SafelightError):
    """Hydra or OmegaConf could not make a configuration of what they were given.

    Attributes:
        key: the configuration key it is about, or None.
    """

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


@cache
def loader_over(extra: tuple[str, ...]) -> ConfigLoaderImpl:
    """Hydra's loader over the shipped configs, installed plug-ins and ``extra`` folders, in this order."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path

    path = create_config_search_path(SHIPPED)
    schema = path.get_path().pop(-1)
    for plugin in plugins.usable():
        path.append(provider=plugin.name, path=f"pkg://{plugin.configs}")
    for place in extra:
        scheme, found, _ = place.partition("://")
        if found and scheme not in ("pkg", "file"):
            raise SafelightError(f"{place!r} begins with {scheme}://; a place is a folder or pkg://<package>")
        path.append(provider="hydra.searchpath", path=place)
    path.append(schema.provider, schema.path)
    loader = ConfigLoaderImpl(config_search_path=path)
    for source in loader.repository.get_sources():
        if source.provider == "hydra.searchpath" and not source.available():
            raise SafelightError(f"there is no folder or package {source.path!r} with configs")
    return loader


@contextmanager
def _translated() -> Iterator[None]:
    """One exception for everything that Hydra, OmegaConf and YAML raise."""
    import yaml
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except yaml.YAMLError as error:
        raise CompositionError(f"a configuration file is not valid YAML: {one_line(error)}") from error
    except UnicodeDecodeError as error:
        raise CompositionError(f"a configuration file is not text in UTF-8 ({error})") from error
    except (HydraException, OmegaConfBaseException, ValueError, TypeError, AttributeError) as error:
        # Hydra itself raises plain ValueErrors, and stumbles in other ways over files that are not mappings.
        text = one_line(error).partition(" Config search path:")[0]
        raise CompositionError(text, getattr(error, "full_key", None)) from error


def load(loader: ConfigLoaderImpl, groups: Sequence[str]) -> DictConfig:
    """What the files say for a choice of groups."""
    from hydra.types import RunMode
    from omegaconf import OmegaConf, open_dict

    with _translated():
        config = loader.load_configuration("train", list(groups), run_mode=RunMode.RUN, from_shell=False)
        choices = {str(k): v for k, v in config.hydra.runtime.choices.items() if not str(k).startswith("hydra/")}
        with open_dict(config):
            del config["hydra"]
            config.choices = {key: value for key, value in choices.items() if "@" not in key}
        OmegaConf.set_struct(config, False)
        return config


def with_values(base: DictConfig, words: Sequence[str]) -> DictConfig:
    """A copy with value overrides applied, as Hydra does it last.

    Hydra merges a mapping into what is there; where that is a list it cannot, and here the mapping takes its place.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import ListConfig, OmegaConf

    config = deepcopy(base)
    with _translated():
        for override in OverridesParser.create().parse_overrides(list(words)):
            key = override.key_or_group
            if isinstance(override.value(), dict) and isinstance(OmegaConf.select(config, key), ListConfig):
                OmegaConf.update(config, key, None)
            ConfigLoaderImpl._apply_overrides_to_config([override], config)
    return config


def resolved(config: DictConfig) -> dict[str, Any]:
    """Plain values with all references filled in."""
    from omegaconf import OmegaConf

    with _translated():
        content = OmegaConf.to_container(config, resolve=True)
    assert isinstance(content, dict)
    return {str(name): value for name, value in content.items()}


def one_line(error: Exception) -> str:
    """The message of one of Hydra's or OmegaConf's errors without their own notes and line breaks."""
    lines = [line for line in str(error).splitlines() if not line.strip().startswith(("full_key:", "object_type="))]
    return " ".join(" ".join(lines).split())
