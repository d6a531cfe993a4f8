"""Sections of the report about what is inside the model: boards, routing, neurons, what their absence costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safelight.lightning_modules.moe_x.lineup import CONTROLS, OURS
from safelight.lightning_modules.moe_x.reading import mean_firing, principal
from safelight.lightning_modules.moe_x.router import firing_probability
from safelight.lightning_modules.moe_x.sae_baseline import LABEL as SAE
from safelight.metrics.board_state import PIECES, piece_on_square
from safelight.reporting import Claim
from safelight.reporting.claims import finite
from safelight.reporting.highlights import Highlighted, Passage

if TYPE_CHECKING:
    from safelight.lightning_modules.moe_x.module import MoEX
    from safelight.lightning_modules.moe_x.neurons import NeuronReport
    from safelight.reporting import Report

LABELS = (
    {"": OURS.label}
    | {name: entry.label for name, entry in CONTROLS.items()}
    | {SAE: "dense with a sparse autoencoder"}
)
_DOTS = 400
"""Drawn at most of each kind."""


def boards(module: MoEX, report: Report) -> None:
    """Tables of coverage and reconstruction, and where on the board the best neurons are how good."""
    if not module.found.boards:
        return
    headline = next(iter(next(iter(module.found.boards.values()))))
    some = next(iter(module.found.boards.values()))[headline]
    lines = [
        [f"{LABELS[name]}, layer {layer}", sets[headline].coverage, sets[headline].coverage / max(some.ceiling, 1e-9),
         sets[headline].reconstruction]
        for (name, layer), sets in module.found.boards.items()
    ]  # fmt: skip
    report.add_table(
        "What single neurons know of the board",
        ["model, layer", "coverage", "of the ceiling", "reconstruction"],
        lines,
        note=f"Property set {headline}. Coverage: mean over squares and pieces of the F1 of the best single neuron. "
        f"Perfect neurons would reach {some.ceiling:.3f}, because some classes never occur; one that always fires "
        f"{some.floor:.3f}. Reconstruction: F1 of the board that is read from neurons right 95 % of the time, on games "
        "other than those they were chosen on. Numbers of different test sets cannot be compared.",
        ours=[str(line[0]) for line in lines if str(line[0]).startswith(OURS.label)],
        better={"coverage": "higher", "reconstruction": "higher"},
    )  # fmt: skip
    ours = {layer: sets for (name, layer), sets in module.found.boards.items() if not name}
    if len(next(iter(ours.values()))) > 1:
        best = {
            name: max(ours.values(), key=lambda sets, name=name: sets[name].coverage)[name]  # type: ignore[misc]
            for name in next(iter(ours.values()))
        }
        report.add_table(
            "All property sets",
            ["property set", "coverage", "ceiling", "always on", "reconstruction"],
            [[name, r.coverage, r.ceiling, r.floor, r.reconstruction] for name, r in best.items()],
            note="MoE-X, of each set the layer of the best coverage.",
        )
    layer = max(ours, key=lambda number: ours[number][headline].coverage)
    f1 = ours[layer][headline].best_f1
    if len(f1) == 64 * len(PIECES):
        maps = f1.view(8, 8, len(PIECES)).flip(0)  # the eighth rank on top
        rows = [
            [_shaded(maps[..., number]) for number in range(6, 12)],
            [_shaded(maps[..., n]) for n in range(5, -1, -1)],
        ]
        report.add_grid(
            "Squares and pieces that one neuron knows",
            rows,
            ["White", "Black"],
            [name.removeprefix("white ") for name in PIECES[6:]],
            f"Layer {layer}: F1 of the best single neuron for each piece on each square, seen from White; red is 1. "
            "Pieces on their first squares are not counted.",
        )


def _shaded(values: Tensor) -> Tensor:
    """(8, 8) in [0, 1], the eighth rank on top, as a picture: the squares of a pale board, turning red."""
    rank, file = torch.arange(8)[:, None], torch.arange(8)
    board = torch.where((rank + file) % 2 == 0, 0.97, 0.91)  # a8 is light
    red = torch.tensor([0.78, 0.2, 0.1])[:, None, None]
    return board + values.clamp(0, 1) * (red - board)


def routing(module: MoEX, report: Report) -> None:
    """The router's score against what fires, and the experts' encoder rows."""
    clouds = {
        LABELS[name]: (scores, shares)
        for name, (scores, shares) in module.found.scatter.items()
        if name in ("", "router_linear") and len(scores)
    }
    if clouds:
        groups = {}
        for label, (scores, shares) in clouds.items():
            spread = (scores - scores.mean()) / scores.std().clamp(min=1e-9)
            keep = torch.linspace(0, len(spread) - 1, min(_DOTS, len(spread))).long()
            groups[label] = list(zip(spread[keep].tolist(), shares[keep].tolist(), strict=True))
        report.add_cloud(
            "The router's score against what fires", groups,
            "One point for each token and expert, chosen or not, last layer with experts.",
            x_label="score, in its standard deviations", y_label="share of the expert's neurons that fire",
        )  # fmt: skip
    calibration = {
        LABELS[name]: calibrated(scores, shares)
        for name, (scores, shares) in module.found.scatter.items()
        if module.models()[name].config.router == "sparsity" and len(scores)
    }
    if calibration:
        report.add_curve(
            "How many neurons the router expects to fire, and how many do",
            {**calibration, "as expected": [(0.0, 0.0), (1.0, 1.0)]},
            "expected share of an expert's neurons", "share that fires",
            note="Tenths of the expected share, last layer with experts, all experts of each token. The closed form "
            "takes an expert's pre-activations for Gaussian and its input coordinates for independent.",
        )  # fmt: skip
    layers = module.model.expert_layers()
    if layers:
        number, layer = max(layers.items())
        each = min(_DOTS // 4, layer.expert_hidden)
        rows = layer.w_enc.detach()[:, :each].flatten(0, 1).cpu()
        places = principal(rows).view(layer.n_experts, each, 2)
        report.add_cloud(
            "Encoder rows of the experts",
            {
                f"expert {j}": [(float(x), float(y)) for x, y in places[j].tolist()]
                for j in range(min(layer.n_experts, 6))
            },
            f"Layer {number}, {each} neurons of each expert in the two directions of the largest spread.",
        )


def calibrated(scores: Tensor, shares: Tensor) -> list[tuple[float, float]]:
    """Mean expected and mean true share in each tenth of the expected one that occurs."""
    expected = firing_probability(scores)
    tenth = (10 * expected).long().clamp(max=9)
    return [
        (float(expected[tenth == number].mean()), float(shares[tenth == number].mean()))
        for number in tenth.unique().tolist()
    ]


def neuron_name(module: MoEX, report: NeuronReport) -> str:
    """Where a neuron lies."""
    layer = module.model.expert_layers().get(report.layer)
    if layer is None:
        return f"layer {report.layer}, neuron {report.neuron}"
    expert, number = divmod(report.neuron, layer.expert_hidden)
    return f"layer {report.layer}, expert {expert}, #{number}"


def neurons(module: MoEX, report: Report) -> None:
    """Where chosen neurons fire, and what is lost without them."""
    reading = module.found.reading
    if reading is None or not reading.reports:
        return
    cards, rows = [], []
    for found, known, effect, control in zip(
        reading.reports, reading.known, reading.effects, reading.controls, strict=True
    ):
        name = neuron_name(module, found)
        what = "drawn at random" if known is None else f"{piece_on_square(known[0])}, F1 {known[1]:.2f}"
        pushes = ", ".join(repr(module.token_text(token)) for token in found.pushes)
        passages = [
            Passage([module.token_text(token) for token in context.tokens], [max(v, 0.0) for v in context.values])
            for context in found.contexts
        ]
        cards.append(
            Highlighted(f"{name}: {what}", f"fires on {100 * found.rate:.2g} % of tokens; pushes {pushes}", passages)
        )
        rows.append([name, what, found.rate, effect.firing, control.firing, effect.silent])
    report.add_highlights(
        "Neurons and where they fire", cards,
        "Around the strongest token of six rows each. Pushes: tokens whose logits the neuron's decoder row raises most "
        "(logit lens, past the last norm).",
    )  # fmt: skip
    report.add_table(
        "Without them",
        ["neuron", "what", "fires on", "loss where it fires", "a neuron that fires as often", "loss elsewhere"],
        rows,
        note="Rise of the cross entropy, nats a token, when the neuron's decoder row is set to zero; beside it another "
        "neuron of the same layer with about the same firing rate, where that one fires.",
    )
    if reading.experts:
        report.add_table(
            "Without an expert",
            ["expert", "its share of tokens", "loss where it fires", "loss everywhere"],
            [
                [f"layer {layer}, expert {expert}", effect.rate, effect.firing, effect.everywhere]
                for (layer, expert), effect in reading.experts.items()
            ],
            note="Rise of the cross entropy, nats a token, when all its decoder rows are zero.",
        )


def telling(module: MoEX, report: Report) -> None:
    """Detection scores by decile of the activation."""
    if not module.found.telling:
        return
    report.add_curve(
        "Neurons told by the tokens at which they fire",
        {
            LABELS[name]: [(float(decile), share) for decile, share in enumerate(found.by_decile, 1)]
            for name, found in module.found.telling.items()
        },
        "decile of the activation", "share of windows recognised",
        note="Of "
        + ", ".join(f"{found.count} neurons of {LABELS[name]}" for name, found in module.found.telling.items())
        + ". An explanation is the 20 tokens with the highest mean activation; a window with one of them counts as one "
        "where the neuron fires. Only models measured alike can be compared. Recognised without the neuron: "
        + ", ".join(f"{found.silent:.2f} ({LABELS[name]})" for name, found in module.found.telling.items())
        + ".",
    )  # fmt: skip


def claim_of_neurons(module: MoEX) -> Claim | None:
    """What cutting neurons out supports."""
    reading = module.found.reading
    if reading is None or not any(reading.known):
        return None
    best = [known is not None for known in reading.known]
    own, other = mean_firing(reading.effects, best), mean_firing(reading.controls, best)
    scores = [known[1] for known in reading.known if known is not None]
    return Claim(
        kind="semantic",
        support="interventional",
        statement="Neurons that tell where a piece stands are used by the model where they fire."
        if own > max(other, 0)
        else "Neurons that tell where a piece stands are of no more use to the model than others.",
        evidence=[
            f"F1 {min(scores):.2f} to {max(scores):.2f} on one piece and square each",
            f"without one of them the loss rises by {own:.3g} nats a token where it fires, of {len(scores)} neurons on "
            "average",
        ],
        controls_beaten=["neurons of the same firing rate"] if own > other else [],
        not_shown=["that the model reads a board from them: any useful neuron costs something when it is cut out"],
        subject="neurons of the experts that are best at a piece and a square",
        controls_run={"neurons of the same firing rate": other},
        n=len(scores),
        n_of="neurons",
        effect=finite(own),
        effect_of="rise of the loss where they fire, nats a token",
    )
