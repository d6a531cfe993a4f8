"""What a module has put into its networks comes out again, whatever happens in training."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class EndFitOnException(Callback):
    """Calls the module's ``on_fit_end`` after an exception: Lightning tells callbacks about those, but not modules."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Clean up as if training had ended."""
        pl_module.on_fit_end()
