"""Prompts for concept erasure: what should go, what comes in its place, and what must stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Interval
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from safelight.datamodules.attack_prompts import read_attack_prompts
from safelight.datamodules.concept_emoji import (
    emoji_anchor,
    emoji_prompts,
    emoji_retain,
    neighbour_things,
)
from safelight.datamodules.concept_records import (
    ConceptRecords,
    Kind,
    read_pairs,
    refuse_other_settings,
    with_seeds,
)
from safelight.datamodules.concept_rows import (
    ConceptPrompts,
    ConceptTestSet,
    GroupDataset,
    Pair,
    Role,
    flatten_groups,
    repeat_over_noises,
)
from safelight.datamodules.concept_templates import spellings
from safelight.datamodules.concept_texts import (
    file_prompts,
    related_words,
    retain_captions,
    template_prompts,
    text_anchor,
)
from safelight.datamodules.concept_wording import found_concept, replace_concept, with_article
from safelight.datamodules.emoji_words import STYLE_WORDS, check_words
from safelight.datamodules.loading import ResumableLoader
from safelight.errors import SafelightError

# Seeds of test noises start here, so that no test sample shares its noise with a training sample.
TEST_SEEDS = 1_000_000_000


class ConceptDataModule(LightningDataModule):
    """Erase and retain prompts in groups, and test prompts of the erased thing, its neighbours and everything else.

    A training item is a group of one erase row and ``retain_per_erase`` retain rows, so ``batch_size`` counts groups.
    A batch is flat: ``prompt`` and ``anchor`` (n texts; equal for retain rows), ``concept`` (n words, what the prompt's
    picture shows), ``erase`` (n,) bool, ``seed`` (n,) int64, and ``target`` (n, *latent_shape) where ``source`` is a
    folder of records. A test batch has lists ``prompt``, ``anchor``, ``role`` (``target``, ``neighbour`` or
    ``retain``), ``concept`` and ``anchor_concept`` (what the two pictures should show), and tensors ``seed`` and
    ``index``. No test prompt of the erased concept and no test
    noise occurs in training.

    With ``source=emoji`` the test prompts are held-out scenes: between none and eight per thing (pistol: 5), so each is
    drawn with several noises; a thing with fewer than two gives up training scenes for it.

    Args:
        concept: what is erased: a thing, a ``noto style`` or ``twemoji style``, any words for other sources; several to
            erase them jointly.
        anchor: what takes its place; one for all, a list beside the list of concepts, or a mapping, which for a file of
            prompts may have further wordings; None takes it from a table (for emoji things beyond it, the nearest
            harmless thing of another category).
        source: erase prompts; ``emoji`` scenes, our ``templates``, a ``.txt``, ``.csv`` or ``.tsv`` file of prompts
            that name the concept, or a folder of records with latents to reach, which brings its own rows and tests.
        column: column of such a table, by number or by name in its header.
        kind: which templates; ``object``, ``character`` (50 scenes), ``nsfw`` (40 postures) or ``style`` (21).
        synonyms: other wordings that take turns with the concept; None for those known (gun, nude).
        pairs: erase prompts per concept, 20 to 50 in the paper.
        groups: training groups; each erase prompt comes up several times, with another noise and beside other retain
            prompts. None for one group per prompt, one noise each, as the authors do.
        retain: prompts that stay; ``emoji`` scenes, or a ``.txt``, ``.csv`` or ``.tsv`` file of captions such as the
            authors' Conceptual Captions validation TSV, which has no header.
        retain_column: column of such a table.
        retain_per_erase: retain rows beside every erase row, 1 in the authors' code.
        neighbours: how many related things are tested, or which.
        retain_neighbours: every second retain row of training shows a neighbour; otherwise training never sees them,
            and their test tells how far the erasure spreads by itself. Emoji retain prompts only.
        filter_ratio: share of erase pairs that training keeps, those that change the least beside the concept; the
            method draws and scores them (0.9 in the authors' FLUX runs).
        filter_scorer: how pairs are scored: by CLIP on what is around the concept, the same with a penalty where the
            concept is not in the first picture, or by the distance of the pictures.
        filter_parity: take the quantile as the authors do, who count every retain prompt as a pair of score 0.
        test_size: test samples per role, and for targets per concept.
        test_noises: noises per target prompt, at least.
        attack_file: a CSV file of adversarial prompts, which then are the target tests with the seeds it states.
        attack_format: its format; None recognises it by its columns.
        attack_nudity: I2P rows with a smaller ``nudity_percentage`` are left out, percent.
        batch_size: groups per device and step.
        test_batch_size: test samples per device.
        seed: choice and order of prompts, and their noise seeds.
    """

    early_check: ClassVar[str] = "safelight.datamodules.emoji_words.unknown_words"
    """What looks at the words before torch is imported."""

    def __init__(
        self,
        *,
        concept: str | list[str] = "pistol",
        anchor: str | list[str] | dict[str, str] | None = None,
        source: str = "emoji",
        column: int | str = 0,
        kind: Literal["object", "character", "style", "nsfw"] = "object",
        synonyms: list[str] | None = None,
        pairs: Annotated[int, Ge(1)] = 24,
        groups: Annotated[int, Ge(1)] | None = None,
        retain: str = "emoji",
        retain_column: int | str = 0,
        retain_per_erase: Annotated[int, Ge(1)] = 2,
        neighbours: Annotated[int, Ge(0)] | list[str] = 6,
        retain_neighbours: bool = False,
        filter_ratio: Annotated[float, Interval(gt=0, le=1)] = 1.0,
        filter_scorer: Literal["clip", "clip_foreground", "distance"] = "clip",
        filter_parity: bool = False,
        test_size: Annotated[int, Ge(1)] = 24,
        test_noises: Annotated[int, Ge(1)] = 4,
        attack_file: str | None = None,
        attack_format: Literal["i2p", "ring_a_bell", "mma_diffusion", "p4d", "unlearn_diff_atk"] | None = None,
        attack_nudity: Annotated[float, Interval(ge=0, le=100)] = 50.0,
        batch_size: Annotated[int, Ge(1)] = 4,
        test_batch_size: Annotated[int, Ge(1)] = 32,
        seed: Annotated[int, Ge(0)] = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # Lightning refuses to log names that the model has with other values
        self._concept, self._anchor = concept, anchor
        self.source, self.column, self.template_kind, self.synonyms = source, column, kind, synonyms
        self.pairs, self.groups, self.retain, self.retain_column = pairs, groups, retain, retain_column
        self.retain_per_erase, self.retain_neighbours = retain_per_erase, retain_neighbours
        self._neighbours = neighbours
        self.filter_ratio, self.filter_scorer, self.filter_parity = filter_ratio, filter_scorer, filter_parity
        self.test_size, self.test_noises = test_size, test_noises
        self.attack_file, self.attack_format, self.attack_nudity = attack_file, attack_format, attack_nudity
        self.batch_size, self.test_batch_size, self.seed = batch_size, test_batch_size, seed
        self.erased: dict[str, str] = {}
        """Concept to anchor."""
        self.concept, self.anchor_word = "", ""
        self.kind: Literal["object", "style"] = "object"
        self.concepts: list[str] = []
        self.neighbour_words: list[str] = []
        self.retain_words: list[str] = []
        self.record_settings: dict[str, Any] | None = None
        """What the latents of a folder of records depend on; None for other sources."""
        self.train_set: GroupDataset | None = None
        check_words(self.hparams)

    def setup(self, stage: str | None = None) -> None:
        """Choose the prompts; safe to call again, and then leaves filtered pairs as they are.

        Raises:
            SafelightError: an argument does not fit the others or the source.
        """
        if self.train_set is not None:
            return
        if Path(self.source).expanduser().is_dir():
            self._set_up_from_records(read_pairs(Path(self.source).expanduser()))
            return
        emoji = self.source == "emoji"
        self.erased = erased_words(self._concept, self._anchor, emoji_anchor if emoji else text_anchor)
        styles = emoji and any(concept in STYLE_WORDS for concept in self.erased)
        self.kind = "style" if styles or (not emoji and self.template_kind == "style") else "object"
        self.concept, self.anchor_word = " and ".join(self.erased), " and ".join(dict.fromkeys(self.erased.values()))
        prompts = self._emoji() if emoji else self._texts()
        self.concepts, self.neighbour_words = prompts.concepts, prompts.neighbour_words
        kept, kept_tests = self._retain((self.groups or len(prompts.erase)) * self.retain_per_erase)
        tested = {pair.prompt for pair in [*prompts.neighbour, *kept_tests]}
        # Among styles: a scene held out in one may be a training scene in the other.
        kept = [pair for pair in kept if pair.prompt not in tested]
        known = set(self.concepts)
        self.retain_words = list(dict.fromkeys(pair.concept for pair in kept_tests if pair.concept in known))
        first = self.seed * 1_000_000
        self.train_set = GroupDataset(prompts.erase, kept, self.retain_per_erase, first, groups=self.groups)
        self._set_tests(prompts.target, prompts.neighbour, kept_tests)

    def _set_tests(self, target: Sequence[Pair], neighbour: Sequence[Pair], retain: Sequence[Pair]) -> None:
        roles: dict[Role, Sequence[Pair]] = {"target": target, "neighbour": neighbour, "retain": retain}
        if self.attack_file is not None:
            roles["target"] = self._attacks(Path(self.attack_file).expanduser())
        self.test_set = ConceptTestSet(roles, TEST_SEEDS + self.seed * 1_000_000)

    def _attacks(self, file: Path) -> list[Pair]:
        """Adversarial prompts as target tests.

        Most hide the concept, and then the anchor is what stands in its place alone.
        """
        first = next(iter(self.erased))
        rows = []
        for found in read_attack_prompts(file, self.attack_format, self.attack_nudity):
            concept = found_concept(found.prompt, self.erased) or first
            known = found_concept(found.prompt, self.erased) is not None
            anchor = replace_concept(found.prompt, self.erased) if known else with_article(self.erased[first])
            rows.append(Pair(found.prompt, anchor, concept, self.erased[concept], seed=found.seed))
        return rows

    def _set_up_from_records(self, records: ConceptRecords) -> None:
        concepts = [self._concept] if isinstance(self._concept, str) else self._concept
        asked = erased_words(self._concept, self._anchor, lambda word: records.erased.get(word, "unknown"))
        if concepts != list(records.erased) or asked != records.erased:
            raise SafelightError(
                f"data.source: the records in {self.source} are of {records.erased}; set data.concept (now {concepts}) "
                "and data.anchor to the same"
            )
        self.erased, self.kind, self.concepts, self.record_settings = (
            records.erased, records.kind, records.concepts, records.settings,
        )  # fmt: skip
        self.concept, self.anchor_word = " and ".join(self.erased), " and ".join(dict.fromkeys(self.erased.values()))
        targets = {pair: latent for (_, pair), latent in zip(records.rows, records.x0_target, strict=True)}
        erase, retain = records.pairs("erase"), records.pairs("retain")
        self.train_set = GroupDataset(erase, retain, self.retain_per_erase, targets=targets)
        tests: dict[Role, list[Pair]] = {"target": [], "neighbour": [], "retain": []}
        for role, pair in records.tests:
            tests[role].append(pair)
        if not records.tests:
            # Nothing else is known of such records, so their own prompts are tested with noises they never had.
            renewed = [[replace(pair, seed=None) for pair in pairs] for pairs in (erase, retain)]
            tests["target"], tests["retain"] = (repeat_over_noises(pairs, self.test_size, 1) for pairs in renewed)
        self._set_tests(tests["target"], tests["neighbour"], tests["retain"])
        known = set(self.concepts)
        self.neighbour_words = list(dict.fromkeys(pair.concept for pair in tests["neighbour"]))
        self.retain_words = list(dict.fromkeys(pair.concept for pair in tests["retain"] if pair.concept in known))

    def _emoji(self) -> ConceptPrompts:
        words = [*self.erased, *self.erased.values()]
        if len({word in STYLE_WORDS for word in words}) > 1:
            raise SafelightError(
                f"data.anchor: {self.erased} mixes things and styles; a style gives way to a style, a thing to a thing"
            )
        if isinstance(self._neighbours, list):
            near = self._neighbours
        else:
            styles = self.kind == "style"
            near = [] if styles else neighbour_things(list(self.erased), list(self.erased.values()), self._neighbours)
        return emoji_prompts(
            self.erased, pairs=self.pairs, neighbours=near, test_size=self.test_size, test_noises=self.test_noises,
            seed=self.seed,
        )  # fmt: skip

    def _texts(self) -> ConceptPrompts:
        if self.synonyms and len(self.erased) > 1:
            raise SafelightError(
                f"data.synonyms={self.synonyms}: they are other words for one concept; with several give each as a "
                "concept with an anchor of its own"
            )
        near = self._neighbours
        if not isinstance(near, list):
            near = related_words(list(self.erased), list(self.erased.values()), self.template_kind, near)
        if self.source == "templates":
            return template_prompts(
                self.erased, self.template_kind, synonyms=self.synonyms, pairs=self.pairs, neighbours=near,
                test_size=self.test_size, test_noises=self.test_noises, seed=self.seed,
            )  # fmt: skip
        return file_prompts(
            Path(self.source).expanduser(), self.column, self.erased, synonyms=self.synonyms, pairs=self.pairs,
            neighbours=near, test_size=self.test_size, test_noises=self.test_noises, others=self._other_wordings(),
        )  # fmt: skip

    def _other_wordings(self) -> dict[str, str]:
        """What a mapping of anchors has besides the concepts: more words of theirs, such as a plural."""
        given = self._anchor if isinstance(self._anchor, dict) else {}
        return {word: anchor for word, anchor in given.items() if word not in self.erased}

    def _retain(self, size: int) -> tuple[list[Pair], list[Pair]]:
        if self.retain == "emoji":
            near = [] if self.kind == "style" else self.neighbour_words
            return emoji_retain(
                self.erased, near, train_neighbours=self.retain_neighbours, test_size=self.test_size, seed=self.seed
            )
        wordings = [word for concept in self.erased for word in spellings(concept, self.synonyms)]
        wordings += self._other_wordings()
        return retain_captions(
            Path(self.retain).expanduser(), self.retain_column, wordings, size=size, test_size=self.test_size
        )

    def erase_pairs(self) -> list[tuple[Pair, int]]:
        """The erase pairs of training with their noise seeds, in the order of the groups; for scoring them."""
        assert self.train_set is not None, "setup first"
        found = self.train_set
        return [(found.pairs(place)[0], found[place]["seed"][0]) for place in range(len(found))]

    def rows(self) -> list[tuple[Kind, Pair]]:
        """All training rows, each with its seed, group by group; what latents are made of for :meth:`records`."""
        assert self.train_set is not None, "setup first"
        found: list[tuple[Kind, Pair]] = []
        for place in range(len(self.train_set)):
            pairs = with_seeds(self.train_set.pairs(place), self.train_set[place]["seed"])
            found += [("retain" if row else "erase", pair) for row, pair in enumerate(pairs)]
        return found

    def records(self, x0_target: Tensor, settings: Mapping[str, Any]) -> ConceptRecords:
        """The rows with latents to reach and the tests, as ``write_pairs`` writes them for ``source=<folder>``.

        Args:
            x0_target: (N, *latent_shape), one for each of :meth:`rows`.
            settings: plain values that the latents depend on: model, steps, guidance, target mode.
        """
        tests = [(role, pair) for role, pair in self.test_set.rows]
        return ConceptRecords(
            dict(settings), dict(self.erased), self.kind, self.concepts, self.rows(), x0_target, tests
        )

    def check_records(self, settings: Mapping[str, Any]) -> None:
        """Refuse a run whose model or sampler is not the one that made the latents of ``source``.

        Args:
            settings: those of this run, as given to :meth:`records`.

        Raises:
            SafelightError: they differ; the message says in what.
        """
        if self.record_settings is not None:
            refuse_other_settings(self.record_settings, settings)

    def keep_pairs(self, places: Sequence[int]) -> None:
        """Train on these groups only, such as those that a filter left; each keeps its prompts and its noise.

        Args:
            places: numbers of groups, as ``erase_pairs`` lists them.

        Raises:
            SafelightError: none are left.
        """
        assert self.train_set is not None, "setup first"
        if not places:
            raise SafelightError(f"data.filter_ratio={self.filter_ratio}: no erase pair is left; raise it")
        self.train_set = self.train_set.only(places)

    def train_dataloader(self) -> ResumableLoader:
        """Groups in an order fixed by (seed, epoch), joined into flat batches."""
        assert self.train_set is not None, "setup first"
        return ResumableLoader(
            self.train_set, batch_size=self.batch_size, shuffle=True, drop_last=True, seed=self.seed,
            collate_fn=flatten_groups,
        )  # fmt: skip

    def test_dataloader(self) -> DataLoader[Any]:
        """Test samples, role after role."""
        return DataLoader(self.test_set, batch_size=self.test_batch_size)


def erased_words(
    concept: str | list[str], anchor: str | list[str] | dict[str, str] | None, default: Callable[[str], str]
) -> dict[str, str]:
    """Concept to anchor, from the ways in which the two may be given.

    Args:
        concept: one or several.
        anchor: one for all, one each, a mapping, or None for ``default(concept)``.
        default: anchor of a concept that has none.

    Raises:
        SafelightError: there is no concept, one has no anchor or itself, or another erased one, as anchor.
    """
    concepts = [concept] if isinstance(concept, str) else list(concept)
    if not concepts or not all(word.strip() for word in concepts) or len(set(concepts)) < len(concepts):
        raise SafelightError(f"data.concept={concept!r}: give one thing to erase, or several different ones")
    if anchor is None:
        erased = {word: default(word) for word in concepts}
    elif isinstance(anchor, dict):
        if missing := [word for word in concepts if word not in anchor]:
            raise SafelightError(f"data.anchor={anchor}: it names nothing for {missing}")
        erased = {word: anchor[word] for word in concepts}
    else:
        anchors = [anchor] * len(concepts) if isinstance(anchor, str) else list(anchor)
        if len(anchors) != len(concepts):
            raise SafelightError(f"data.anchor={anchor}: {len(anchors)} anchors for the concepts {concepts}")
        erased = dict(zip(concepts, anchors, strict=True))
    for word, other in erased.items():
        if not other.strip():
            raise SafelightError(f"data.anchor: the anchor of {word!r} is empty; for that choose method.target=empty")
        if other in erased:
            raise SafelightError(f"data.anchor={other!r}: it takes the place of {word!r} but is erased itself")
    return erased
