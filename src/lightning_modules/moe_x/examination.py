"""What a test measures of every model, batch by batch, and what is made of it at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from safelight.lightning_modules.moe_x.board_reading import BoardReader, BoardResult
from safelight.lightning_modules.moe_x.measuring import firing, inputs_of
from safelight.lightning_modules.moe_x.modeling_moe_x import MoEXForCausalLM
from safelight.lightning_modules.moe_x.neurons import NeuronReader
from safelight.lightning_modules.moe_x.reading import Reading, read_closely
from safelight.lightning_modules.moe_x.sae_baseline import LABEL as SAE
from safelight.lightning_modules.moe_x.sae_baseline import SparseBaseline
from safelight.lightning_modules.moe_x.sampling import sample
from safelight.lightning_modules.moe_x.telling import Telling, tell
from safelight.metrics import LegalMoveRate, SampleMean
from safelight.metrics.routing import LayerRouting, RoutingStatistics
from safelight.probing.language import token_losses


@dataclass
class Findings:
    """What a test found, by model; ours has the empty name.

    Attributes:
        measured: the figures that are logged.
        layers: routing of each layer with experts.
        boards: of each layer (model, block), by property set.
        games: sampled ones.
        scatter: scores and shares of neurons that fire, of the last layer on the first batch.
        reading: neurons of ours that were looked at closely.
        telling: detection scores.
    """

    measured: dict[str, dict[str, float]] = field(default_factory=dict)
    layers: dict[str, dict[int, LayerRouting]] = field(default_factory=dict)
    boards: dict[tuple[str, int], dict[str, BoardResult]] = field(default_factory=dict)
    games: dict[str, list[str]] = field(default_factory=dict)
    scatter: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    reading: Reading | None = None
    telling: dict[str, Telling] = field(default_factory=dict)


class Examination:
    """One test of all models.

    Args:
        models: by name.
        settings: the method's hyper-parameters.
        device: of the models.
        sae: the baseline on the dense control, if there is one.
    """

    def __init__(
        self,
        models: Mapping[str, MoEXForCausalLM],
        settings: Any,
        device: torch.device,
        sae: SparseBaseline | None = None,
    ) -> None:
        self.models, self.settings, self.device, self.sae = dict(models), settings, device, sae
        names = [*self.models, *([SAE] if sae else [])]
        self.ce = {name: SampleMean().to(device) for name in names}
        places = [(name, layer) for name, model in self.models.items() for layer in model.expert_layers()]
        self.routing = {place: RoutingStatistics().to(device) for place in places}
        self.fired: dict[tuple[str, int], Tensor] = {}
        self.reader = BoardReader(per_square=settings.bge_compat)
        self.neurons = NeuronReader()
        self.rows: list[Tensor] = []
        self.found = Findings()

    # -- batch by batch ----------------------------------------------------------------------------------------------

    def step(self, tokens: Tensor, batch: Mapping[str, Any]) -> None:
        """Take in (B, T + 1) tokens: loss, at some positions all experts, and neurons where boards are known."""
        index = torch.as_tensor(batch["index"])
        if "board" in batch:
            self.reader.note(batch["board_at"], batch["board"], index)
        for name, model in self.models.items():
            with inputs_of(model) as seen:
                self.ce[name].update(token_losses(model, tokens).mean(1), index)
            self._route(name, model, seen, index)
            if "board" in batch:
                for number in self.settings.board_layers or range(len(model.blocks)):
                    mlp: Any = model.blocks[number].mlp
                    self.reader.add((name, number), mlp, seen[number], batch["board_at"], index)
            if not name and self.settings.reported_neurons:
                self.neurons.add(model, tokens[:, :-1], seen)
        if self.settings.detection_features:
            self.rows.append(tokens[:, :-1])
        if self.sae is not None:
            self._sae(self.sae, tokens, batch, index)

    def _route(self, name: str, model: MoEXForCausalLM, seen: dict[int, Tensor], index: Tensor) -> None:
        """Compute all experts at evenly spaced positions."""
        for number, layer in model.expert_layers().items():
            length = seen[number].shape[1]
            count = min(self.settings.probed_tokens, length)
            found = firing(layer, seen[number][:, [place * length // count for place in range(count)]])
            place, fired = (name, number), found.fired.float()
            self.routing[place].update(found.scores, found.share, found.index, index)
            self.fired[place] = torch.maximum(self.fired.get(place, fired), fired)
            if number == max(model.expert_layers()):
                self.found.scatter.setdefault(name, (found.scores.flatten().float().cpu(), found.share.flatten().cpu()))

    def _sae(self, sae: SparseBaseline, tokens: Tensor, batch: Mapping[str, Any], index: Tensor) -> None:
        """The dense control with its residual stream replaced by the autoencoder's reconstruction."""
        dense = self.models["dense"]
        with sae.tapped(dense, replace=True) as seen:
            self.ce[SAE].update(token_losses(dense, tokens).mean(1), index)
        if "board" in batch:
            self.reader.add((SAE, sae.layer), sae, seen[sae.site], batch["board_at"], index)

    # -- at the end --------------------------------------------------------------------------------------------------

    def finish(self, stacked: Callable[[Tensor], Tensor], rank: int, text_of: Callable[[int], str]) -> Findings:
        """Everything that was found: over the layers the worst of each figure, of the boards the best.

        Args:
            stacked: all processes' tensors of one shape, with a first dimension for them.
            rank: of this process.
            text_of: token number to what it reads.
        """
        found, settings = self.found, self.settings
        if self.reader.labels:
            found.boards = self.reader.results(stacked, rank, self.device)
        if settings.reported_neurons:
            headline = {layer: next(iter(sets.values())) for (name, layer), sets in found.boards.items() if not name}
            found.reading = read_closely(
                self.models[""], self.neurons, headline, settings.reported_neurons, settings.seed
            )
        for name, model in self.models.items():
            figures = self._loss(name) | self._routed(name, stacked) | self._of_boards(name)
            if settings.detection_features:
                figures |= self._tell(name, model, text_of)
            if settings.sampled_games and ";" in (settings.vocabulary or "") and find_spec("chess"):
                figures["legal_move_rate"] = self._play(name, model)
            found.measured[name] = figures
        if self.sae is not None:
            found.measured[SAE] = (
                self._loss(SAE) | self._of_boards(SAE) | {"active_fraction": self.sae.active_fraction()}
            )
        return found

    def _loss(self, name: str) -> dict[str, float]:
        ce = float(self.ce[name].compute())
        return {"val_ce": ce, "perplexity": math.exp(ce)}

    def _routed(self, name: str, stacked: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Of layers with experts."""
        numbers = [number for model, number in self.routing if model == name]
        self.found.layers[name] = {number: self.routing[name, number].layer() for number in numbers}
        layers = self.found.layers[name].values()
        if not layers:
            return {}
        alive = [float(stacked(self.fired[name, number]).amax(0).mean()) for number in numbers]
        return {
            "score_l0_r": max(layer.score_l0_r for layer in layers),
            "active_fraction": max(layer.active_fraction for layer in layers),
            "load_entropy": min(layer.load_entropy for layer in layers),
            "dead_fraction": 1 - sum(alive) / len(alive),
        }

    def _of_boards(self, name: str) -> dict[str, float]:
        """Coverage and reconstruction of the headline property set, each of the layer that is best at it."""
        layers = [next(iter(sets.values())) for (model, _), sets in self.found.boards.items() if model == name]
        if not layers:
            return {}
        return {
            "coverage": max(layer.coverage for layer in layers),
            "reconstruction": max(layer.reconstruction for layer in layers),
        }

    def _tell(self, name: str, model: MoEXForCausalLM, text_of: Callable[[int], str]) -> dict[str, float]:
        """Detection score of a model's neurons and its control, on this process's rows."""
        s = self.settings
        layer = s.n_layer * 2 // 3 if s.detection_layer is None else s.detection_layer
        texts = [text_of(token) for token in range(s.vocab_size)]
        told = tell(model, layer, self.rows, texts, count=s.detection_features, seed=s.seed)
        if told is None:
            return {}
        self.found.telling[name] = told
        return {"detection": told.score, "detection_swapped": told.swapped}

    def _play(self, name: str, model: MoEXForCausalLM) -> float:
        """Sample games from the first character on; the share of their half-moves that are legal."""
        s = self.settings
        start = torch.tensor([[s.vocabulary.index(c) for c in ";1."]] * s.sampled_games, device=self.device)
        tokens = sample(model, start, s.block_size + 1, seed=s.seed)
        self.found.games[name] = ["".join(s.vocabulary[token] for token in row) for row in tokens.tolist()]
        rate = LegalMoveRate(sync_on_compute=False)  # every process samples the same games
        rate.update(self.found.games[name], [0] * s.sampled_games)
        return float(rate.compute())
