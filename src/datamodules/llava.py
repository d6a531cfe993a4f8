"""Visual instructions: pictures with conversations about them, of emoji scenes or out of LLaVA's files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Interval, MinLen
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset

from safelight.datamodules.emoji import EmojiDataset, Scene
from safelight.datamodules.emoji_dialogues import QUESTIONS, conversation
from safelight.datamodules.faults import Faults, OnError, drawn
from safelight.datamodules.llava_files import IMAGE_TAG, Entry, Turn, read_entries, square_picture
from safelight.datamodules.loading import ResumableLoader
from safelight.errors import SafelightError

_EMOJI = "zoo:emoji"


def collate_conversations(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch: ``image`` (B, 3, S, S) and ``index`` (B,) as tensors, everything else as lists of length B."""
    batch: dict[str, Any] = {name: [item[name] for item in items] for name in items[0]}
    return batch | {"image": torch.stack(batch["image"]), "index": torch.tensor(batch["index"])}


def spread(rows: Sequence[tuple[str, str]], size: int | None) -> list[int]:
    """Places of up to ``size`` rows, as many of each group as of every other while there are any, in their order.

    A larger choice holds the smaller ones.

    Args:
        rows: group of each, and a name that no other has.
        size: None for all.
    """
    if size is None or size >= len(rows):
        return list(range(len(rows)))
    turns: Counter[str] = Counter()
    ranked = []
    for place in sorted(range(len(rows)), key=lambda place: drawn(f"row {rows[place][1]}")):
        group = rows[place][0]
        ranked.append((turns[group], place))
        turns[group] += 1
    # Sorting is stable, so that within a turn the order stays the drawn one.
    return sorted(place for _, place in sorted(ranked, key=lambda row: row[0])[:size])


def _tagged(turns: Sequence[Turn], keep_image_tag: bool) -> list[Turn]:
    if not keep_image_tag:
        return list(turns)
    (question, answer), *others = turns
    return [(f"{IMAGE_TAG}\n{question}", answer), *others]


class EmojiConversations(Dataset[dict[str, Any]]):
    """Emoji scenes with conversations about them.

    Items: ``image`` (3, S, S) float in [-1, 1], ``conversation`` (pairs of question and answer), ``caption`` (the full
    one), ``index`` (of the scene among all of either split), and the scene's ``thing``, ``background``, ``size`` and
    ``style``.

    Args:
        drawings: draws the scenes.
        places: which of its scenes.
        conversations: about each.
    """

    def __init__(self, drawings: EmojiDataset, places: Sequence[int], conversations: Sequence[list[Turn]]) -> None:
        self.drawings, self.places, self.conversations = drawings, places, conversations

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = self.places[index]
        scene = self.drawings.scenes[place]
        return {
            "image": self.drawings.draw(scene),
            "conversation": list(self.conversations[index]),
            "caption": scene.caption,
            "index": self.drawings.indices[place],
            "thing": scene.thing,
            "background": scene.background,
            "size": scene.size,
            "style": scene.style,
        }


class PictureConversations(Dataset[dict[str, Any]]):
    """Pictures in files with conversations about them.

    Items: ``image`` (3, S, S) float in [-1, 1], ``conversation`` (pairs of question and answer), ``caption`` (the first
    answer) and ``index`` (number of the entry in its file).

    Args:
        entries: in their order.
        folder: of the pictures.
        image_size: S, pixels.
        turns: so many first pairs only; None for all.
        keep_image_tag: put ``<image>`` and a line break before the first question.
        on_error: ``skip`` puts the next entry in the place of one whose picture cannot be decoded.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        folder: Path,
        image_size: int,
        turns: int | None = None,
        keep_image_tag: bool = False,
        on_error: OnError = "raise",
    ) -> None:
        self.entries, self.folder, self.image_size = entries, folder, image_size
        self.turns, self.keep_image_tag = turns, keep_image_tag
        self._faults = Faults(on_error)
        self._unreadable: set[str] = set()

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        first = range(len(self))[index]  # its IndexError is what ends a for loop over the rows
        for step in range(len(self)):
            entry = self.entries[(first + step) % len(self)]
            if entry.image in self._unreadable:
                continue
            try:
                picture = square_picture(self.folder / entry.image, self.image_size)
            except SafelightError as error:
                self._faults.add(str(error))
                self._faults.report()
                self._unreadable.add(entry.image)
                continue
            turns = _tagged(entry.conversation[: self.turns], self.keep_image_tag)
            return {"image": picture, "conversation": turns, "caption": turns[0][1], "index": entry.number}
        raise SafelightError(f"data.image_folder: no picture of {len(self)} entries in {self.folder} can be used")


Conversations = EmojiConversations | PictureConversations


class LLaVADataModule(LightningDataModule):
    """Pictures with questions and answers: emoji scenes that ship with the package, or files in LLaVA's format.

    Batches are those of :func:`collate_conversations`, from rows of :class:`EmojiConversations` or
    :class:`PictureConversations`. A row has the same conversation in every epoch: of an emoji scene it is a function of
    scene and ``seed``, and the epochs differ in their order only.

    Emoji scenes that training never sees are tested with one question each, "what is this?", and validated with
    conversations like those of training. Entries of files that training never sees are used as they are for both.

    Args:
        path: ``zoo:emoji``; or a ``.json`` file with a list of entries, or ``.jsonl`` with one on each line. Entries
            without a picture are left out and counted.
        image_folder: what the pictures' paths in the file start from; null for the folder of the file.
        image_size: edge of the square pictures, pixels. Those of files are cut as CLIP's processor does: shorter edge
            to this, bicubic, then the centre.
        turns: questions of a conversation; null for one to four about an emoji scene, and for all there are in a file,
            of which otherwise the first are taken.
        questions: what emoji conversations ask for in training: ``thing``, ``background``, ``size``, ``style``,
            ``caption``; null for all of these. Tests always ask for the thing.
        captions_only: one turn, whatever ``turns`` says: "describe the picture." with the caption of an emoji scene, or
            the first turn of a file's entry; for the first stage of training.
        keep_image_tag: put ``<image>`` and a line break before the first question, as the authors do; otherwise and in
            later questions there are no such tags.
        held_out: share of a file's pictures that training never sees, by a hash of their paths; emoji have scenes of
            their own for this.
        limit: train on so many rows only, spread evenly over things or pictures, a larger choice holding the smaller
            ones; null for all.
        test_size: held-out rows, chosen in the same way; null for all.
        on_error: an entry or picture that cannot be used ends the run, or is left out with a warning. Whether a picture
            can be decoded shows when it is needed, and then the next row takes its place.
        batch_size: rows per device and step (paper: 8, then 4).
        test_batch_size: test rows per device.
        num_workers: loader processes.
        seed: order of the rows, and conversations about emoji.

    Raises:
        SafelightError: arguments do not go together.
    """

    def __init__(
        self,
        *,
        path: str = _EMOJI,
        image_folder: str | None = None,
        image_size: Annotated[int, Ge(8)] = 64,
        turns: Annotated[int, Ge(1)] | None = None,
        questions: Annotated[list[Literal["thing", "background", "size", "style", "caption"]], MinLen(1)] | None = None,
        captions_only: bool = False,
        keep_image_tag: bool = False,
        held_out: Annotated[float, Interval(gt=0, lt=1)] = 0.05,
        limit: Annotated[int, Ge(1)] | None = None,
        test_size: Annotated[int, Ge(1)] | None = 200,
        on_error: OnError = "raise",
        batch_size: Annotated[int, Gt(0)] = 8,
        test_batch_size: Annotated[int, Ge(1)] = 32,
        num_workers: Annotated[int, Ge(0)] = 0,
        seed: Annotated[int, Ge(0)] = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # Lightning refuses to log names that the model has with other values
        if path == _EMOJI and image_folder is not None:
            raise SafelightError(f"data.image_folder={image_folder!r} is for files, {_EMOJI} is drawn; leave it out")
        if path != _EMOJI and questions is not None:
            raise SafelightError(f"data.questions={questions} is for {_EMOJI}; files say what they ask themselves")
        if path == _EMOJI and turns is not None and turns > len(QUESTIONS):
            raise SafelightError(f"data.turns={turns}: about an emoji scene there are {len(QUESTIONS)} questions")
        self.path, self.image_folder, self.image_size = path, image_folder, image_size
        self.questions = list(questions or QUESTIONS)
        self.turns, self.captions_only, self.keep_image_tag = turns, captions_only, keep_image_tag
        self.held_out, self.limit, self.test_size, self.on_error = held_out, limit, test_size, on_error
        self.batch_size, self.test_batch_size = batch_size, test_batch_size
        self.num_workers, self.seed = num_workers, seed
        self.train_set: Conversations | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read the entries; safe to call again.

        Raises:
            SafelightError: the file or an entry cannot be used, or nothing is left to train or test on.
        """
        if self.train_set is not None:
            return
        sets: tuple[Conversations, ...] = self._emoji() if self.path == _EMOJI else self._entries()
        self.train_set, self.val_set, self.test_set = sets

    def _emoji(self) -> tuple[EmojiConversations, ...]:
        train, held = EmojiDataset("train", self.image_size), EmojiDataset("held_out", self.image_size)

        def rows(drawings: EmojiDataset, size: int | None, tests: bool = False) -> EmojiConversations:
            places = spread([(scene.thing, scene.caption) for scene in drawings.scenes], size)
            talks = [self._about(drawings.scenes[place], tests) for place in places]
            return EmojiConversations(drawings, places, [_tagged(talk, self.keep_image_tag) for talk in talks])

        return rows(train, self.limit), rows(held, self.test_size), rows(held, self.test_size, tests=True)

    def _about(self, scene: Scene, tests: bool) -> list[Turn]:
        if tests:
            return [(QUESTIONS["thing"][0], scene.thing)]
        if self.captions_only:
            return [(QUESTIONS["caption"][0], scene.caption)]
        return conversation(scene, self.seed, self.turns, self.questions)

    def _entries(self) -> tuple[PictureConversations, ...]:
        file = Path(self.path).expanduser()
        folder = file.parent if self.image_folder is None else Path(self.image_folder).expanduser()
        if not folder.is_dir():
            raise SafelightError(f"data.image_folder: there is no folder {str(folder)!r}")
        faults = Faults(self.on_error)
        entries, without_picture = read_entries(file, folder, faults)
        faults.report()
        if without_picture:
            rank_zero_info(f"{file}: {without_picture:,} entries without a picture are left out")
        train = [entry for entry in entries if drawn(entry.image) >= self.held_out]
        held = [entry for entry in entries if drawn(entry.image) < self.held_out]
        if not train or not held:
            raise SafelightError(
                f"data.held_out={self.held_out}: of {len(entries)} entries with a picture in {file} {len(train)} are "
                f"left to train and {len(held)} to test on; give more entries or another share"
            )

        def rows(found: list[Entry], size: int | None) -> PictureConversations:
            places = spread([(entry.image, f"{entry.image} {entry.number}") for entry in found], size)
            return PictureConversations(
                [found[place] for place in places], folder, self.image_size,
                1 if self.captions_only else self.turns, self.keep_image_tag, self.on_error,
            )  # fmt: skip

        tests = rows(held, self.test_size)
        return rows(train, self.limit), tests, tests

    def train_dataloader(self) -> ResumableLoader:
        """Rows in an order fixed by (seed, epoch)."""
        assert self.train_set is not None
        return ResumableLoader(
            self.train_set, batch_size=self.batch_size, shuffle=True, drop_last=True, num_workers=self.num_workers,
            seed=self.seed, collate_fn=collate_conversations,
        )  # fmt: skip

    def val_dataloader(self) -> DataLoader[Any]:
        """Held-out rows, with conversations like those of training."""
        return self._loader(self.val_set)

    def test_dataloader(self) -> DataLoader[Any]:
        """Held-out rows."""
        return self._loader(self.test_set)

    def _loader(self, rows: Conversations) -> DataLoader[Any]:
        return DataLoader(
            rows, batch_size=self.test_batch_size, num_workers=self.num_workers, collate_fn=collate_conversations
        )
