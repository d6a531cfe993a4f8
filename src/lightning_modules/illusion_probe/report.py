"""What a run shows: accuracies by strength and scene beside controls, confusions, pictures, and what they support."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from safelight.lightning_modules.illusion_probe.published import PUBLISHED
from safelight.reporting import Claim, Tile, measured_rows
from safelight.reporting.claims import finite

if TYPE_CHECKING:
    from safelight.lightning_modules.illusion_probe.evaluation import Findings
    from safelight.lightning_modules.illusion_probe.module import IllusionProbe
    from safelight.reporting import Report

LABELS = {
    "": "the model's features",
    "shuffled_labels": "trained on drawn labels",
    "colour": "mean colour and 8 x 8 grey",
    "untrained": "features of an untrained model",
    "zero_shot": "zero-shot, names of one kind",
    "zero_shot_joint": "zero-shot, shapes and scenes",
    "vlm": "vision-language model",
}
COLUMNS = {
    "shape_accuracy": "shape", "scene_accuracy": "scene", "gap": "scene - shape",
    "shape_accuracy_unseen": "shape, unseen scenes",
}  # fmt: skip


def table(module: IllusionProbe) -> list[dict[str, Any]] | None:
    """One row for the probe and each control; None before testing."""
    return measured_rows(module.found.measured, "read from", LABELS, COLUMNS)


def fill(module: IllusionProbe, report: Report) -> None:
    """Add the sections of the probe to a report."""
    rows = table(module)
    if rows is None:
        return
    found = module.found
    report.add_tiles(_tiles(module))
    names = list(rows[0])
    report.add_table(
        "What can be read of hidden shapes", names, [[row[name] for name in names] for row in rows],
        note=f"Accuracy on {found.pictures:,} test pictures of {found.sources} silhouettes; chance is "
        f"{1 / len(module.shapes):.3g} for shapes, {1 / (len(module.scenes) - len(module.unseen)):.3g} for scenes of "
        f"training. {_unseen_note(module)}Drawn labels have nothing to do with the pictures: near chance, the test is "
        "fair. Zero-shot among shapes and scenes together counts as neither where the other kind wins.",
        controls=[LABELS[name] for name in module.control_names], ours=[LABELS[""]],
        better={"shape": "higher", "scene": "higher", "shape, unseen scenes": "higher"},
    )  # fmt: skip
    _curves(module, report)
    _scenes(module, report)
    _confusion(module, report)
    _examples(found, report)
    _told(module, report)
    if module.history:
        report.add_curve(
            "Training", {"shape": [(step, float(loss)) for step, loss in module.history]}, "optimisation step",
            "loss of the shape", log_y=True,
        )  # fmt: skip
    report.add_claims(claims(module))


def _unseen_note(module: IllusionProbe) -> str:
    if not module.unseen:
        return ""
    return f"Scenes left out of training: {', '.join(name.replace('_', ' ') for name in module.unseen)}. "


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _tiles(module: IllusionProbe) -> list[Tile]:
    ours, tiles = module.found.measured[""], []
    chance = f"chance: {_share(1 / len(module.shapes))}"
    if "shape_accuracy" in ours:
        figure = module.found.whole("", "shape", "seen")
        assert figure is not None
        tiles = [
            Tile(
                "hidden shape", _share(ours["shape_accuracy"]),
                f"{chance}; 95 % interval over silhouettes: {_share(figure.low)} to {_share(figure.high)}", tone="lead",
            ),
            Tile("scene around it", _share(ours["scene_accuracy"])),
        ]  # fmt: skip
    if "shape_accuracy_unseen" in ours:
        tiles.append(Tile("shape, in scenes not trained on", _share(ours["shape_accuracy_unseen"]), chance))
    strengths = module.found.curve("", "shape", "seen", "strength")
    if len(strengths) > 1:
        weak, strong = min(strengths, key=float), max(strengths, key=float)
        tiles.append(
            Tile("shape, weakest to strongest", f"{_share(strengths[weak])} to {_share(strengths[strong])}",
                 f"strengths {weak} and {strong}")
        )  # fmt: skip
    return tiles


def _curves(module: IllusionProbe, report: Report) -> None:
    found, series = module.found, {}
    for scorer in ("", *module.control_names):
        for target, scenes in (("shape", "seen"), ("shape", "unseen"), ("scene", "seen")):
            # The scene is read at every strength: one line tells it.
            if (target == "scene" or scenes == "unseen") and scorer:
                continue
            points = found.curve(scorer, target, scenes, "strength")
            told = {"seen": "", "unseen": ", unseen scenes"}[scenes]
            series[f"{target}{told}: {LABELS[scorer]}"] = sorted((float(x), y) for x, y in points.items())
    shown = {name: points for name, points in series.items() if len(points) > 1}
    if shown:
        report.add_curve(
            "By strength of the hiding", shown, "strength", "accuracy",
            note="More is plainer. Intervals are in accuracies.csv of the artefact.",
        )  # fmt: skip
    blurred = {}
    for scorer in ("", "zero_shot"):
        points = found.curve(scorer, "shape", "seen", "low_pass")
        edge = found.examples[0][0].image.shape[-1] if found.examples else 0
        blurred[LABELS[scorer]] = sorted((float(edge if x == "full" else x), y) for x, y in points.items())
    if any(blurred.values()):
        report.add_curve(
            "Hard pictures, seen through fewer pixels", {name: line for name, line in blurred.items() if line},
            "pixels that the picture was reduced to", "accuracy of the shape",
            note="Reduced, enlarged again and shown to the same heads. Blurring takes away the detail that makes the "
            "scene, and leaves the shape.",
        )  # fmt: skip


def _scenes(module: IllusionProbe, report: Report) -> None:
    found, rows = module.found, []
    for scenes in ("seen", "unseen"):
        shape, scene = (found.curve("", target, scenes, "scene") for target in ("shape", "scene"))
        colour = found.curve("colour", "shape", scenes, "scene")
        rows += [
            [name.replace("_", " "), scenes, value, colour.get(name), scene.get(name)] for name, value in shape.items()
        ]
    report.add_table(
        "By scene", ["scene", "in training", "shape", "shape from colour and grey", "scene itself"], rows,
        note="No head can name a scene that it was not told about.",
    )  # fmt: skip


def most_confused(counts: Tensor, names: list[str], count: int = 8) -> list[tuple[str, str, int, float]]:
    """The most frequent mistakes: true shape, named shape, pictures, share of the true shape's pictures."""
    wrong = counts.clone()
    wrong.fill_diagonal_(0)
    totals = counts.sum(1)
    order = wrong.flatten().argsort(descending=True, stable=True)[:count]
    places = [(int(place) // len(names), int(place) % len(names)) for place in order]
    return [
        (names[true], names[said], int(wrong[true, said]), float(wrong[true, said] / totals[true]))
        for true, said in places
        if wrong[true, said] > 0
    ]


def _confusion(module: IllusionProbe, report: Report) -> None:
    from safelight.lightning_modules.illusion_probe.confusion import confusion_picture

    counts = module.found.confusion
    if counts is None or not int(counts.sum()):
        return
    report.add_picture(
        "Which shapes are taken for which", confusion_picture(counts, module.shapes),
        "Rows: the hidden shape; columns: what the probe named; numbers are per cent of the row's pictures.",
    )  # fmt: skip
    mistakes = most_confused(counts, module.shapes)
    report.add_table(
        "Most frequent mistakes",
        ["hidden", "named", "pictures", "share of the shape's"],
        [list(row) for row in mistakes],
    )


def _examples(found: Findings, report: Report) -> None:
    """The same silhouette in the same scene, plainest in the first row and weakest in the last."""
    shown = [line for line in found.examples if line]
    if not shown:
        return
    ends = [(line[-1], line[0]) for line in shown]
    labels = [
        f"{strong.shape} in {strong.scene.replace('_', ' ')}: {strong.said[0]} / {weak.said[0]}"
        for strong, weak in ends
    ]  # fmt: skip
    rows: list[list[Tensor | None]] = [[(pair[n].image + 1) / 2 for pair in ends] for n in (0, 1)]
    report.add_grid(
        "Pictures and what was read in them", rows,
        [f"strength {strength:g}" for strength in (ends[0][0].strength, ends[0][1].strength)], labels,
        caption="Above each column: what is hidden, then what the probe named in the plain picture and in the other.",
    )  # fmt: skip


def _told(module: IllusionProbe, report: Report) -> None:
    told = module.found.told
    if not told:
        return
    asked = {"tc": "for the shape", "ts": "for the scene"}
    report.add_table(
        "What the vision-language model names", ["asked", "names the shape", "names the scene", "names neither"],
        [[asked[task], one["shape_recall"], one["scene_recall"], one["neither"]] for task, one in told.items()],
        note=f"{module.hparams.vlm} with {module.hparams.vlm_shots} examples before the question.",
    )  # fmt: skip
    report.add_table(
        "What the paper shows, zero-shot, asked for the shape", ["model", "names the shape", "names the scene"],
        [[name, *(value / 100 for value in pair)] for name, pair in PUBLISHED[module.hparams.subset].items()],
        note=f"{module.hparams.subset} of the authors' pictures, read from their figure; not measured here.",
    )  # fmt: skip


# -- what is supported -------------------------------------------------------------------------------------------------


def claims(module: IllusionProbe) -> list[Claim]:
    """Whether the shape can be read, whether the scene is read better, and whether other scenes matter."""
    found = module.found
    made = [_claim_of_reading(module, scenes) for scenes in ("seen", "unseen") if found.whole("", "shape", scenes)]
    if "gap" in found.differences:
        made.append(
            _claim_of_difference(
                module, "gap", "The scene is read from a picture more often than the shape hidden in it.",
                "The scene was not seen to be read more often than the shape.", "scene accuracy minus shape accuracy",
            )
        )  # fmt: skip
    if "unseen_drop" in found.differences:
        made.append(
            _claim_of_difference(
                module, "unseen_drop", "Shapes are read less often in scenes that were not trained on.",
                "Shapes were not seen to be read less often in scenes that were not trained on.",
                "shape accuracy in known scenes minus that in others",
            )
        )  # fmt: skip
    return made


def _claim_of_reading(module: IllusionProbe, scenes: str) -> Claim:
    found, h = module.found, module.hparams
    figure = found.whole("", "shape", scenes)
    assert figure is not None
    run = {"chance": 1 / len(module.shapes)}
    for name in module.control_names:
        if (other := found.whole(name, "shape", scenes)) is not None:
            run[LABELS[name]] = other.mean
    held = figure.low > run["chance"]
    where = "scenes of training" if scenes == "seen" else "scenes that were not trained on"
    reader = "Text embeddings read" if h.tune == "text_proj" else "A linear map reads"
    what = "features that were tuned with it" if module.through_vision else "frozen features"
    return Claim(
        kind="semantic",
        support="correlational",
        statement=f"{reader} the hidden shape from {what} above chance, in {where}."
        if held
        else f"The hidden shape was not seen to be read from {what} above chance, in {where}.",
        evidence=[f"accuracy {figure.mean:.3f} among {len(module.shapes)} shapes"],
        controls_beaten=[name for name, value in run.items() if figure.low > value],
        not_shown=[
            "that the model itself makes anything of the shape: a linear map can read what nothing else reads",
            "that what is read is more than coarse brightness, where the grey picture is read as well",
            "that it holds for pictures drawn in another way",
        ],
        subject=f"{h.vision_model}, class token and mean patch token",
        assumptions=["test pictures are not among those trained on"],
        controls_run=run,
        n=figure.n,
        n_of="test pictures",
        effect=finite(figure.mean),
        effect_of="accuracy of the shape",
        interval=(figure.low, figure.high),
        follow_up="Take the directions that are read out of the features, and see what else is lost.",
    )


def _claim_of_difference(module: IllusionProbe, name: str, held: str, not_held: str, of: str) -> Claim:
    mean, low, high = module.found.differences[name]
    known = all(finite(value) is not None for value in (mean, low, high))
    return Claim(
        kind="behavioural",
        support="correlational",
        statement=held if known and low > 0 else not_held,
        evidence=[f"{of}: {mean:.3f}"],
        controls_beaten=["no difference"] if known and low > 0 else [],
        not_shown=["that shapes are as hard to tell apart as scenes in themselves: there are more of them"]
        if name == "gap"
        else ["which property of the other scenes it is"],
        subject=module.hparams.vision_model,
        controls_run={"no difference": 0.0},
        n=module.found.sources,
        n_of="silhouettes, which intervals are over",
        effect=finite(mean),
        effect_of=of,
        interval=(low, high) if known else None,
        follow_up="Show the same silhouettes in scenes of one's own making.",
    )
