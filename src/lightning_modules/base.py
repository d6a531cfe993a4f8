"""The one base class of all methods: small checkpoints, frozen parts that stay frozen, declared metric names."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.reporting import write_model_card

if TYPE_CHECKING:
    from safelight.generators import Generator
    from safelight.reporting import Report


class SafelightModule(LightningModule):
    """A ``LightningModule`` whose checkpoints hold only what it trains.

    A subclass names its frozen sub-modules in ``frozen``: they never require gradients, stay in eval mode, and are
    left out of ``state_dict``. Everything else about training stands in the subclass.

    Attributes:
        frozen: attribute names of sub-modules that are never trained or saved.
        sharded: paths of sub-modules whose weights are worth cutting over processes (``trainer=fsdp2``), each called as
            a whole; empty when the method is better copied (``trainer=ddp``). All that is trained must be below them.
        families: kinds of backbone it can use (``flux``, ``sd3``, ``unet``, ``dit``); empty when it does not say.
        metric_names: names that ``test_step`` logs, without the ``test/`` prefix.
        control_names: baselines evaluated beside the method; logged as ``test/<control>/<metric>``. A method where
            either depends on its arguments sets it in the constructor.
        paper_numbers: the paper's figures by metric name, ``{"value": ..., "source": ...}``.
        monitor: what ``best.ckpt`` is chosen by, or None to keep only the last.
        monitor_mode: whether a smaller or a larger monitored value is better.
        run_facts: what the command line tells about the run before ``export`` and ``fill_report``: ``command``,
            ``eval_command``, ``method``, ``backbone``, ``data``, ``seed``, ``metrics`` and ``controls``; empty in a run
            of one's own.
    """

    frozen: ClassVar[tuple[str, ...]] = ()
    sharded: ClassVar[tuple[str, ...]] = ()
    families: ClassVar[tuple[str, ...]] = ()
    metric_names: tuple[str, ...] = ()
    control_names: tuple[str, ...] = ()
    paper_numbers: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    monitor: ClassVar[str | None] = None
    monitor_mode: ClassVar[Literal["min", "max"]] = "min"
    run_facts: Mapping[str, Any] = MappingProxyType({})

    if TYPE_CHECKING:

        @property
        def hparams(self) -> Any:
            """The constructor's arguments as attributes; Lightning's own annotation knows none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False

    def frozen_modules(self) -> Iterator[nn.Module]:
        """The sub-modules named in ``frozen`` that exist already."""
        for name in self.frozen:
            module = getattr(self, name, None)
            if isinstance(module, nn.Module):
                yield module

    def freeze_parts(self) -> None:
        """Put the frozen parts in eval mode and stop their gradients; call when they have been built."""
        for module in self.frozen_modules():
            module.eval().requires_grad_(False)

    def configure_model(self) -> None:
        """Cut what ``sharded`` names over the processes, when the strategy has a mesh of them to cut for."""
        if self.device_mesh is not None and self.sharded:
            from safelight.lightning_modules.sharding import shard

            shard(self, self.sharded, self.device_mesh["data_parallel"])

    def train(self, mode: bool = True) -> SafelightModule:
        """Switch the trained parts only: dropout in a frozen network would be noise that nobody asked for."""
        super().train(mode)
        for module in self.frozen_modules():
            module.eval()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """State of the trained parts; the frozen ones are rebuilt from where they came from."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        hidden = tuple(f"{prefix}{name}." for name in self.frozen)
        return {key: value for key, value in state.items() if not key.startswith(hidden)} if hidden else state

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Load the trained parts; anything missing or left over beyond the frozen parts is an error.

        Raises:
            SafelightError: a trained tensor is missing or has another shape, or the state holds a tensor this module
                does not know.
        """
        own = self.state_dict()
        shapes = [
            f"{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}"
            for key, value in state_dict.items()
            if key in own and value.shape != own[key].shape
        ]
        if shapes:
            raise SafelightError(
                f"the checkpoint does not fit this {type(self).__name__}: {', '.join(shapes[:3])}; "
                "was it trained with another backbone or other units?"
            )
        if self.device_mesh is not None:
            from safelight.lightning_modules.sharding import cut_like

            state_dict = {key: cut_like(value, own.get(key)) for key, value in state_dict.items()}
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        hidden = tuple(f"{name}." for name in self.frozen)
        missing = [key for key in result.missing_keys if not (hidden and key.startswith(hidden))]
        if missing or result.unexpected_keys:
            raise SafelightError(
                f"the checkpoint does not fit this {type(self).__name__}: "
                f"missing {missing[:3] or 'nothing'}, unknown {result.unexpected_keys[:3] or 'nothing'}; "
                "was it trained with another backbone or other units?"
            )
        # Lightning would print the path of every frozen tensor as a warning.
        result.missing_keys.clear()
        return result

    def log_measured(self, measured: Mapping[str, Mapping[str, Any]]) -> None:
        """Log what a test has measured: of the method itself under ``""``, of each control under its name."""
        for name, figures in measured.items():
            prefix = f"test/{name}/" if name else "test/"
            self.log_dict({prefix + key: value for key, value in figures.items()})

    def words(self, key: str, first_only: bool = False) -> list[str]:
        """The distinct texts under ``key`` in the test samples, sorted: what a judge is to choose between.

        Args:
            key: of the samples.
            first_only: look into the first test loader only.
        """
        loaders = self.trainer.test_dataloaders
        loaders = loaders if isinstance(loaders, list) else [loaders]
        loaders = loaders[:1] if first_only else loaders
        return sorted({sample[key] for loader in loaders for sample in loader.dataset})

    def export(self, folder: Path) -> Path:
        """Write what was trained in a format that other libraries open.

        Args:
            folder: an existing, empty folder.

        Returns:
            The artefact: ``folder`` or something inside it.
        """
        raise SafelightError(f"{type(self).__name__} has nothing to export")

    def write_card(
        self, folder: Path, *, title: str, command: str, data: str, base: Generator | None = None, **further: Any
    ) -> Path:
        """Write the model card of an artefact: what the run knows about itself, and what the method says here.

        Args:
            folder: of the artefact.
            title: heading of the card.
            command: what to state as the command where no command line started the run.
            data: what it was trained on, in words; ``{data}`` in it becomes the name of the run's data.
            base: the model it was made from, which decides about the licence; None for one trained from nothing.
            further: other arguments of :func:`safelight.reporting.write_model_card`.

        Returns:
            The card's file.
        """
        further.setdefault("licence", "apache-2.0")
        if base is not None:
            further["base_model"] = str(base.source or base.name)
            if not str(base.name).startswith("tiny_"):
                further["licence"] = "that of the base model"
        return write_model_card(
            folder,
            title=title,
            command=self.run_facts.get("command") or command,
            data=data.format(data=self.run_facts.get("data") or "given"),
            metrics=self.run_facts.get("metrics", {}),
            **further,
        )

    def fill_report(self, report: Report) -> None:
        """Add this method's tables, pictures and curves to the report of a run.

        By default ``fill`` of a ``report.py`` beside the method's ``module.py``.
        """
        if (pages := self._pages()) is not None:
            pages.fill(self, report)

    def summary_table(self) -> list[dict[str, Any]] | None:
        """Rows of the table printed at the end of a run, the method beside its controls; None for no table.

        By default ``table`` of a ``report.py`` beside the method's ``module.py``.
        """
        pages = self._pages()
        rows: list[dict[str, Any]] | None = None if pages is None else pages.table(self)
        return rows

    def _pages(self) -> Any:
        """The ``report.py`` beside the method's ``module.py``, imported on first use; None where there is none."""
        for kind in type(self).__mro__:
            package, _, file = kind.__module__.rpartition(".")
            if file == "module" and kind is not LightningModule and importlib.util.find_spec(f"{package}.report"):
                return importlib.import_module(f"{package}.report")
        return None

    def full_size_command(self) -> str | None:
        """The command that does the same at full size, for the last line of a run; None if there is none."""
        return None
