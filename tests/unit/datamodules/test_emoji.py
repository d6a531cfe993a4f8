"""The emoji set: its scenes, captions, splits and pictures."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from safelight.datamodules import EmojiDataModule
from safelight.datamodules.emoji import BACKGROUNDS, SIZES, EmojiDataset, Scene, scenes
from safelight.datamodules.emoji_words import STYLES, things


def test_every_combination_is_a_scene() -> None:
    assert (len(things()), len(STYLES), len(BACKGROUNDS), len(SIZES)) == (100, 2, 8, 2)
    everything = scenes()
    assert len(everything) == len(set(everything)) == 3200
    assert len({scene.caption for scene in everything}) == 3200
    names = [thing.name for thing in things()]
    assert len(set(names)) == 100
    assert all(len(name.split()) == 1 for name in names)
    assert 8 <= sum(thing.unsafe for thing in things()) <= 20
    assert [scene.thing for scene in scenes(names=("apple",))] == ["apple"] * 32


def test_held_out_scenes_compose_from_what_was_trained() -> None:
    train, held_out = scenes("train"), scenes("held_out")
    assert not {s.caption for s in train} & {s.caption for s in held_out}
    assert len(train) + len(held_out) == 3200
    assert len(held_out) / 3200 == pytest.approx(0.125, abs=0.015)
    trained = {
        *((s.thing, s.style) for s in train),
        *((s.thing, s.background) for s in train),
        *((s.thing, s.size) for s in train),
        *((s.background, s.size, s.style) for s in train),
    }
    for scene in held_out:
        assert (scene.thing, scene.style) in trained
        assert (scene.background, scene.size, scene.style) in trained
    words = {word for s in train for word in s.caption.split()}
    assert {word for s in held_out for word in s.caption.split()} <= words
    per_thing = Counter(scene.thing for scene in train)
    assert len(per_thing) == 100
    assert min(per_thing.values()) >= 20


def test_captions_are_english() -> None:
    apple = Scene("apple", "noto", "yellow", "small")
    assert apple.caption == "a small apple on a yellow background in noto style"
    assert apple.describe(size=False) == "an apple on a yellow background in noto style"
    assert apple.describe(size=False, background=False, style=False) == "an apple"
    assert apple.describe(style=False) == "a small apple on a yellow background"
    assert Scene("unicorn", "noto", "red", "large").describe(False, False, False) == "a unicorn"
    assert Scene("octopus", "noto", "red", "large").describe(False, False) == "an octopus in noto style"
    vowels = {scene.thing for scene in scenes() if scene.describe(False).startswith("an ")}
    assert {"umbrella", "elephant", "axe", "owl"} <= vowels
    assert "unicorn" not in vowels


@pytest.fixture(scope="module")
def every_picture() -> EmojiDataset:
    return EmojiDataset("all", image_size=32)


def test_pictures_show_their_scene(every_picture: EmojiDataset) -> None:
    by_scene = {scene: index for index, scene in enumerate(every_picture.scenes)}
    for scene, index in list(by_scene.items())[::37]:
        image = every_picture[index]["image"]
        assert image.shape == (3, 32, 32)
        assert image.dtype == torch.float32
        assert image.min() >= -1
        assert image.max() <= 1
        colour = torch.tensor(BACKGROUNDS[scene.background]) / 127.5 - 1
        assert torch.allclose(image[:, 0, 0], colour, atol=0.02)
        assert (image - colour.view(3, 1, 1)).abs().amax() > 0.3  # and there is something on it
    large, small = (every_picture.draw(Scene("car", "noto", "white", size)) for size in ("large", "small"))
    covered = [(picture < 0.99).any(dim=0).sum().item() for picture in (large, small)]
    assert covered[0] > 1.8 * covered[1]
    assert not torch.equal(large, every_picture.draw(Scene("car", "twemoji", "white", "large")))


def test_things_look_different(every_picture: EmojiDataset) -> None:
    pictures = torch.stack([every_picture.draw(Scene(t.name, "noto", "white", "large")).flatten() for t in things()])
    distance = torch.cdist(pictures, pictures) + torch.eye(100) * 1e6
    assert distance.min() > 1.0


def test_items_are_a_function_of_their_index() -> None:
    first, second = EmojiDataset("train", 16), EmojiDataset("train", 16)
    for index in (0, 5, 1000):
        a, b = first[index], second[index]
        assert torch.equal(a["image"], b["image"])
        assert {k: v for k, v in a.items() if k != "image"} == {k: v for k, v in b.items() if k != "image"}
        assert scenes()[a["index"]] == first.scenes[index]
        assert a["thing"] in a["caption"]


def test_attributes_are_dropped_at_the_asked_rate() -> None:
    data = EmojiDataset("train", 16, drop_attribute=0.5)
    data.draw = lambda scene: torch.zeros(1)  # type: ignore[method-assign]
    torch.manual_seed(0)
    captions = [data[i]["caption"] for i in range(1000)]
    for word in ("background", "style"):
        assert sum(word in caption for caption in captions) / 1000 == pytest.approx(0.5, abs=0.06)
    full = EmojiDataset("train", 16)
    full.draw = data.draw  # type: ignore[method-assign]
    assert all(full[i]["caption"] == full.scenes[i].caption for i in range(100))


def test_data_module_orders_by_seed_and_spreads_its_tests() -> None:
    def captions(seed: int) -> list[str]:
        module = EmojiDataModule(batch_size=8, image_size=16, seed=seed, test_size=20)
        module.setup()
        return list(next(iter(module.train_dataloader()))["caption"])

    assert captions(0) == captions(0)
    assert captions(0) != captions(1)
    module = EmojiDataModule(batch_size=8, image_size=16, test_size=20)
    module.setup()
    held_out, trained = module.test_dataloader()
    place = {scene.caption: scene for scene in scenes()}
    for loader, wanted in ((held_out, True), (trained, False)):
        found = [place[caption] for batch in loader for caption in batch["caption"]]
        assert len(found) == 20
        assert all(scene.held_out is wanted for scene in found)
        assert len({scene.thing for scene in found}) >= 18
    assert len(module.val_dataloader().dataset) == len(scenes("held_out"))  # type: ignore[arg-type]
