"""A linear probe on frozen features, and the same probe on shuffled labels beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Gt
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.lightning_modules import SafelightModule
from safelight.metrics import ClipJudge, SampleMean
from safelight.reporting import Claim, Report, Tile, write_model_card

BACKGROUNDS = ("white", "yellow", "pink", "red", "purple", "blue", "green", "grey")


class BackgroundProbe(SafelightModule):
    """Ask a frozen CLIP model on which background a thing was drawn.

    Batches: a dict with ``image`` (B, 3, H, W) in [-1, 1] and ``caption`` (B texts) that name the background.

    Args:
        judge: CLIP folder or ``zoo:`` name.
        lr: learning rate of AdamW.
        seed: labels of the control are a function of (seed, step).
    """

    frozen = ("judge",)
    metric_names = ("accuracy",)
    control_names = ("shuffled",)

    def __init__(self, *, judge: str = "zoo:tiny_clip", lr: Annotated[float, Gt(0)] = 1e-2, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.seed = lr, seed
        self.judge = ClipJudge(judge)
        width = self.judge(torch.zeros(1, 3, 64, 64)).shape[1]
        self.probe, self.control = nn.Linear(width, len(BACKGROUNDS)), nn.Linear(width, len(BACKGROUNDS))
        self.freeze_parts()
        self.measured: dict[str, float] = {}

    def features(self, images: Tensor) -> Tensor:
        """Unit-length features (B, D) of pictures in [-1, 1], scaled so that a probe learns at ordinary rates."""
        with torch.no_grad():
            found: Tensor = self.judge((images + 1) / 2)
        return found * found.shape[1] ** 0.5

    @staticmethod
    def labels(captions: list[str]) -> Tensor:
        """The background that each caption names, as a number."""
        return torch.tensor([BACKGROUNDS.index(text.split(" background")[0].split()[-1]) for text in captions])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Cross entropy of the probe on true labels and of the control on shuffled ones."""
        seen, labels = self.features(batch["image"]), self.labels(batch["caption"]).to(batch["image"].device)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.global_step)
        shuffled = labels[torch.randperm(len(labels), generator=generator)]
        loss, control = F.cross_entropy(self.probe(seen), labels), F.cross_entropy(self.control(seen), shuffled)
        self.log_dict({"train/loss": loss, "train/control": control})
        return loss + control

    def on_test_start(self) -> None:
        """Fresh counts, over all processes; a sample that two of them see counts once."""
        self.right = {name: SampleMean().to(self.device) for name in ("accuracy", "shuffled/accuracy")}

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Accuracy on held-out pictures; the loader of trained ones is passed over."""
        if dataloader_idx:
            return
        seen, labels = self.features(batch["image"]), self.labels(batch["caption"]).to(batch["image"].device)
        for prefix, head in (("", self.probe), ("shuffled/", self.control)):
            self.right[f"{prefix}accuracy"].update(head(seen).argmax(dim=1) == labels, batch["index"])

    def on_test_epoch_end(self) -> None:
        """Log the numbers and keep them for the report."""
        self.measured = {name: float(metric.compute()) for name, metric in self.right.items()}
        self.log_dict({f"test/{name}": value for name, value in self.measured.items()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on the two heads."""
        return torch.optim.AdamW([*self.probe.parameters(), *self.control.parameters()], lr=self.lr)

    def export(self, folder: Path) -> Path:
        """The probe as safetensors, its labels as JSON, and a card that says where the numbers come from."""
        save_file(self.probe.state_dict(), folder / "probe.safetensors")
        (folder / "probe.json").write_text(json.dumps({"labels": BACKGROUNDS, "judge": self.hparams.judge}))
        facts = getattr(self, "run_facts", {})
        write_model_card(
            folder,
            title="Background probe",
            command=facts.get("command") or "python train.py method=background_probe",
            data=f"pictures of the data set `{facts.get('data') or 'given'}`",
            metrics=facts.get("metrics", {}),
            licence="apache-2.0",
        )
        return folder

    def fill_report(self, report: Report) -> None:
        """The one number, and what it does not show."""
        accuracy, chance = self.measured["accuracy"], self.measured["shuffled/accuracy"]
        tile = Tile("background named", f"{100 * accuracy:.0f} %", f"shuffled labels: {100 * chance:.0f} %", "lead")
        report.add_tiles([tile])
        claim = Claim(
            kind="semantic",
            support="correlational",
            statement="The judge's features say on which background a thing was drawn.",
            evidence=[f"a linear probe is right in {100 * accuracy:.1f} % of held-out pictures"],
            controls_beaten=[f"shuffled labels: {100 * chance:.1f} %"] if accuracy > chance else [],
            not_shown=["that anything in the model uses this direction"],
        )
        report.add_claims([claim])
