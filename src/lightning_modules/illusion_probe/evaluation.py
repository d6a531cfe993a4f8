"""Accuracy of a probe and its controls by strength and scene, with intervals over silhouettes."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset

from safelight.lightning_modules.illusion_probe.heads import low_passed
from safelight.lightning_modules.illusion_probe.zero_shot import joint_choice
from safelight.metrics import IllusionRecall, SampleRows

if TYPE_CHECKING:
    from safelight.lightning_modules.illusion_probe.module import IllusionProbe

SHOWN = 6
"""Pictures in the report, each at all its strengths."""
_FIXED = 6
_SHAPE, _SCENE, _STRENGTH, _HARD, _SOURCE, _SOURCE_REST = range(_FIXED)
_HALF = 2**24
"""Whole numbers below it are exact in float32."""


@dataclass(frozen=True)
class Figure:
    """One line of ``accuracies.csv``.

    Attributes:
        scorer: the probe (empty) or a control.
        target: ``shape`` or ``scene``.
        scenes: ``seen`` or ``unseen`` in training.
        group: what pictures have in common: ``all``, ``strength``, ``scene``, ``shape`` or ``low_pass``.
        value: which of the group.
        mean: accuracy.
        low: lower end of its 95 % interval over silhouettes.
        high: upper end.
        n: pictures.
    """

    scorer: str
    target: str
    scenes: str
    group: str
    value: str
    mean: float
    low: float
    high: float
    n: int


@dataclass
class Example:
    """A picture at one strength, and what the probe said.

    Attributes:
        image: (3, S, S) in [-1, 1].
        shape: hidden in it.
        scene: that it shows.
        strength: of the hiding.
        said: shape and scene that the probe named.
    """

    image: Tensor
    shape: str
    scene: str
    strength: float
    said: tuple[str, str]


@dataclass
class Findings:
    """What a test found.

    Attributes:
        measured: metrics by control, the probe's under an empty name.
        figures: accuracies in groups.
        differences: 95 % intervals of differences, ``gap`` and ``unseen_drop``: (mean, low, high).
        confusion: (shapes, shapes), pictures of a row's shape that were called by a column's, in scenes of training
            where there are any.
        examples: pictures, each a list over strengths.
        told: what a vision-language model's answers named, by what it was asked: ``tc`` and ``ts``.
        sources: number of silhouettes tested.
        pictures: number of pictures tested.
    """

    measured: dict[str, dict[str, float]] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    differences: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    confusion: Tensor | None = None
    examples: list[list[Example]] = field(default_factory=list)
    told: dict[str, dict[str, float]] = field(default_factory=dict)
    sources: int = 0
    pictures: int = 0

    def curve(self, scorer: str, target: str, scenes: str, group: str) -> dict[str, float]:
        """Accuracies of a group by its values."""
        wanted = (scorer, target, scenes, group)
        return {
            one.value: one.mean for one in self.figures if (one.scorer, one.target, one.scenes, one.group) == wanted
        }

    def whole(self, scorer: str, target: str, scenes: str) -> Figure | None:
        """The figure over all pictures."""
        wanted = (scorer, target, scenes, "all")
        return next(
            (one for one in self.figures if (one.scorer, one.target, one.scenes, one.group) == wanted), None
        )  # fmt: skip


class Resampled:
    """Sets of silhouettes drawn with replacement; pictures of one are drawn together.

    All means use the same sets, so that differences of means are paired.

    Args:
        sources: (N,), the silhouette of each picture.
        draws: number of sets.
        seed: of the draws.
    """

    def __init__(self, sources: Tensor, draws: int, seed: int) -> None:
        known, self.place = sources.unique(return_inverse=True)
        self.size = len(known)
        drawn = torch.randint(self.size, (draws, self.size), generator=torch.Generator().manual_seed(seed))
        self.counts = torch.zeros(draws, self.size, dtype=torch.float64)
        self.counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))

    def means(self, values: Tensor, chosen: Tensor) -> Tensor:
        """(draws,), means of values (N,) over the chosen pictures (N,) of each set; NaN where it has none of them."""
        sums, sizes = (
            torch.zeros(self.size, dtype=torch.float64).index_add(0, self.place[chosen], part[chosen].double())
            for part in (values, torch.ones_like(values))
        )
        return (self.counts @ sums) / (self.counts @ sizes)

    @staticmethod
    def interval(means: Tensor) -> tuple[float, float]:
        """95 % of the means that there are."""
        low, high = means.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return low, high


class Evaluation:
    """Collects answers batch by batch; the same numbers whatever the batches and the number of processes.

    Args:
        module: that is tested.
    """

    def __init__(self, module: IllusionProbe) -> None:
        self.module = module
        self.scorers = ["", *(name for name in module.control_names if name != "vlm")]
        self.sizes = list(module.hparams.low_pass or [])
        self.blurred = [name for name in ("", "zero_shot") if name in self.scorers] if self.sizes else []
        self.rows = SampleRows().to(module.device)
        self.shown: dict[int, dict[float, Example]] = {}

    # -- every batch -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, batch: dict[str, Any]) -> None:
        """Take in a test batch."""
        shape, scene = self.module.labels(batch)
        index = torch.as_tensor(batch["index"])
        hard = torch.tensor([level.lower() == "hard" for level in batch["level"]], device=shape.device)
        keys = [f"{one}/{two}" for one, two in zip(batch["shape"], batch["source_id"], strict=True)]
        codes = torch.tensor([_number(key) for key in keys], device=shape.device)
        strength = torch.as_tensor(batch["strength"]).to(shape.device)
        answers = self.answers(batch["image"], index.tolist())
        columns = [shape, scene, strength, hard, codes // _HALF, codes % _HALF]
        columns += [answer for pair in answers.values() for answer in pair]
        columns += self._blurred(batch["image"], hard)
        self.rows.update(torch.stack([column.float() for column in columns], 1), index)
        self._show(batch, *answers[""])

    def answers(self, images: Tensor, index: list[int]) -> dict[str, tuple[Tensor, Tensor]]:
        """Classes (B,) of shape and scene that each scorer names; -1 for neither."""
        inputs = self.module.inputs(images, index)
        given = {"": self.module.probe_logits(inputs), **self.module.control_logits(inputs)}
        found = {}
        if any(name.startswith("zero_shot") for name in self.scorers):
            given["zero_shot"] = self._by_name(images, inputs)
            found["zero_shot_joint"] = joint_choice(*given["zero_shot"])
        found |= {name: (one.argmax(1), other.argmax(1)) for name, (one, other) in given.items()}
        return {name: found[name] for name in self.scorers}

    def _by_name(self, images: Tensor, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Cosines of pictures with the names of shapes (B, shapes) and scenes (B, scenes), before any training."""
        module = self.module
        assert module.towers is not None
        assert module.named is not None
        embeddings = inputs.get("embeddings")
        if embeddings is None:
            embeddings = module.towers.of_pictures(module.vision.normalised(images))
        shapes, scenes = (embeddings @ names.to(embeddings).T for names in module.named)
        return shapes, scenes

    def _blurred(self, images: Tensor, hard: Tensor) -> Iterator[Tensor]:
        """For each size and scorer the shapes (B,) named in hard pictures of that size; NaN in others."""
        for size in self.sizes:
            answers = {}
            if bool(hard.any()):
                small = low_passed(images[hard], size)
                inputs = self.module.encode(small)
                answers[""] = self.module.probe_logits(inputs)[0].argmax(1)
                if "zero_shot" in self.blurred:
                    answers["zero_shot"] = self._by_name(small, inputs)[0].argmax(1)
            for name in self.blurred:
                column = torch.full((len(hard),), float("nan"), device=hard.device)
                if answers:
                    column[hard] = answers[name].float()
                yield column

    def _show(self, batch: dict[str, Any], shapes: Tensor, scenes: Tensor) -> None:
        """Keep the pictures whose names have the smallest numbers, so that all strengths of one are kept together."""
        module = self.module
        for place, (shape, scene, source) in enumerate(
            zip(batch["shape"], batch["scene"], batch["source_id"], strict=True)
        ):
            key = zlib.crc32(f"{shape}/{source}/{scene}".encode())
            if key not in self.shown and len(self.shown) == SHOWN and key > max(self.shown):
                continue
            strength = round(float(batch["strength"][place]), 4)
            said = (module.shapes[int(shapes[place])], module.scenes[int(scenes[place])])
            image = batch["image"][place].detach().cpu()
            self.shown.setdefault(key, {})[strength] = Example(image, shape, scene, strength, said)
            if len(self.shown) > SHOWN:
                del self.shown[max(self.shown)]

    # -- the end -----------------------------------------------------------------------------------------------------

    def finish(self) -> Findings:
        """All figures; processes put together what each has seen."""
        module, h = self.module, self.module.hparams
        rows = self.rows.compute().double().cpu()
        sources = (rows[:, _SOURCE].long() * _HALF) + rows[:, _SOURCE_REST].long()
        resampled = Resampled(sources, h.bootstrap, h.seed)
        unseen = torch.tensor([name in module.unseen for name in module.scenes])[rows[:, _SCENE].long()]
        found = Findings(sources=resampled.size, pictures=len(rows))
        found.examples = [[one[key] for key in sorted(one)] for _, one in sorted(self.shown.items())]
        for place, scorer in enumerate(self.scorers):
            for column, target in ((_SHAPE, "shape"), (_SCENE, "scene")):
                right = (rows[:, _FIXED + 2 * place + column] == rows[:, column]).double()
                for scenes, within in (("seen", ~unseen), ("unseen", unseen)):
                    # No head can name a scene that it was never told about.
                    if target == "shape" or scenes == "seen":
                        found.figures += self._figures(scorer, target, scenes, right, within, rows, resampled)
        self._low_pass(found, rows, ~unseen, resampled)
        self._metrics(found, rows, unseen, resampled)
        told = rows if bool(unseen.all()) else rows[~unseen]
        pairs = told[:, _SHAPE].long() * len(module.shapes) + told[:, _FIXED].long()
        found.confusion = pairs.bincount(minlength=len(module.shapes) ** 2).view(len(module.shapes), -1)
        if h.vlm is not None:
            self._ask(found)
        return found

    def _figures(
        self, scorer: str, target: str, scenes: str, right: Tensor, within: Tensor, rows: Tensor, resampled: Resampled
    ) -> Iterator[Figure]:
        groups: list[tuple[str, str, Tensor]] = [("all", "", torch.ones_like(within))]
        strengths = rows[:, _STRENGTH]
        known = strengths[~strengths.isnan()].unique().tolist()
        groups += [("strength", f"{value:.2f}", strengths == value) for value in known]
        groups += [("scene", name, rows[:, _SCENE] == n) for n, name in enumerate(self.module.scenes)]
        groups += [("shape", name, rows[:, _SHAPE] == n) for n, name in enumerate(self.module.shapes)]
        for group, value, member in groups:
            chosen = within & member
            if bool(chosen.any()):
                low, high = resampled.interval(resampled.means(right, chosen))
                mean = float(right[chosen].mean())
                yield Figure(scorer, target, scenes, group, value, mean, low, high, int(chosen.sum()))

    def _low_pass(self, found: Findings, rows: Tensor, seen: Tensor, resampled: Resampled) -> None:
        chosen = seen & (rows[:, _HARD] == 1)
        if not self.sizes or not bool(chosen.any()):
            return
        start = _FIXED + 2 * len(self.scorers)
        columns = [(str(size), name) for size in self.sizes for name in self.blurred]
        answers = {key: rows[:, start + place] for place, key in enumerate(columns)}
        answers |= {("full", name): rows[:, _FIXED + 2 * self.scorers.index(name)] for name in self.blurred}
        for (size, name), answer in answers.items():
            right = (answer == rows[:, _SHAPE]).double()
            low, high = resampled.interval(resampled.means(right, chosen))
            found.figures.append(
                Figure(
                    name, "shape", "seen", "low_pass", size, float(right[chosen].mean()), low, high, int(chosen.sum())
                )
            )

    def _metrics(self, found: Findings, rows: Tensor, unseen: Tensor, resampled: Resampled) -> None:
        """What is logged; what no test picture could show is left out."""
        for scorer in self.scorers:
            metrics = {}
            for name, figure in (
                ("shape_accuracy", found.whole(scorer, "shape", "seen")),
                ("scene_accuracy", found.whole(scorer, "scene", "seen")),
                ("shape_accuracy_unseen", found.whole(scorer, "shape", "unseen")),
            ):
                if figure is not None:
                    metrics[name] = figure.mean
            if "shape_accuracy" in metrics:
                metrics["gap"] = metrics["scene_accuracy"] - metrics["shape_accuracy"]
            found.measured[scorer] = metrics
        shape, scene = ((rows[:, _FIXED + n] == rows[:, n]).double() for n in (_SHAPE, _SCENE))
        ours = found.measured[""]
        if "gap" in ours:
            low, high = resampled.interval(resampled.means(scene - shape, ~unseen))
            found.differences["gap"] = (ours["gap"], low, high)
        if "shape_accuracy_unseen" in ours and "shape_accuracy" in ours:
            drop = resampled.means(shape, ~unseen) - resampled.means(shape, unseen)
            mean = ours["shape_accuracy"] - ours["shape_accuracy_unseen"]
            found.differences["unseen_drop"] = (mean, *resampled.interval(drop))

    def _ask(self, found: Findings) -> None:
        """Questions to a vision-language model, shared out over processes."""
        from safelight.lightning_modules.illusion_probe.asking import VlmAnswerer, ask

        module, h = self.module, self.module.hparams
        loaders: Any = module.trainer.test_dataloaders
        sets = [loader.dataset for loader in (loaders if isinstance(loaders, list) else [loaders])]
        samples: Any = ConcatDataset(sets)
        count = min(h.vlm_pictures or len(samples), len(samples))
        places = [n * len(samples) // count for n in range(count)]
        own = places[module.global_rank :: module.trainer.world_size]
        answerer = VlmAnswerer(h.vlm, device=module.device)
        recalls = {}
        for task in ("tc", "ts"):
            recall = IllusionRecall("icl" if h.vlm_shots else "zero_shot").to(module.device)
            answered = ask(
                samples, answerer, task, shapes=module.shapes, scenes=module.scenes, shots=h.vlm_shots,
                setting=h.vlm_setting, seed=h.seed, places=own,
            )  # fmt: skip
            if answered:
                rows = [row for row, _ in answered]
                recall.update(
                    [answer for _, answer in answered], [row.shape for row in rows], [row.scene for row in rows],
                    torch.tensor([row.index for row in rows], device=module.device),
                )  # fmt: skip
            recalls[task] = recall
        found.told = {
            task: {name: float(value) for name, value in recall.compute().items()} for task, recall in recalls.items()
        }
        shape, scene = found.told["tc"]["shape_recall"], found.told["ts"]["scene_recall"]
        found.measured["vlm"] = {"shape_accuracy": shape, "scene_accuracy": scene, "gap": scene - shape}


def _number(text: str) -> int:
    """A number below 2^48 that a text always has."""
    raw = text.encode()
    return (zlib.crc32(raw) % _HALF) * _HALF + zlib.crc32(raw[::-1] + b"/") % _HALF
