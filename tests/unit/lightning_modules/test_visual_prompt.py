"""The visual prompt: what is trained, what it has to beat, what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ecodiff_toys import trainer
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import ViTConfig, ViTModel

from safelight.datamodules import EmojiDataModule
from safelight.errors import SafelightError
from safelight.lightning_modules import VisualPrompt
from safelight.lightning_modules.visual_prompt.deploy import prompt_image, read_prompt
from safelight.lightning_modules.visual_prompt.encoders import load_encoder
from safelight.lightning_modules.visual_prompt.evaluation import SHUFFLED, Evaluation
from safelight.lightning_modules.visual_prompt.objective import gaussian_target
from safelight.lightning_modules.visual_prompt.report import best_control, claim, overlay
from safelight.reporting import Report
from safelight.testing.contracts import MethodContract

SMALL: dict[str, Any] = {"prompt_size": 16, "width": 8, "noise_channels": 2, "label": "thing", "pool_size": 24}


class TestContract(MethodContract):
    method = "visual_prompt"
    overfit_ratio = 0.9
    opens_with = """
import json
from PIL import Image
from safetensors.torch import load_file
settings = json.loads((folder / "config.json").read_text())
size = settings["prompt_size"]
assert load_file(folder / "prompt.safetensors")["colours"].shape == (3, size, size)
picture = Image.open(folder / "prompt.png")
assert picture.mode == "RGBA" and picture.size == (size, size)
"""

    def overrides(self) -> list[str]:
        return [*(f"method.{key}={value}" for key, value in SMALL.items()), "data.test_size=12"]


class Smooth(Dataset[dict[str, Any]]):
    """Random smooth pictures, as the specification's toy takes them."""

    def __init__(self, count: int, first: int = 0) -> None:
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.first + index)
        coarse = torch.rand(1, 3, 6, 6, generator=generator)
        image = F.interpolate(coarse, (64, 64), mode="bicubic", align_corners=False)[0].clamp(0, 1)
        return {"image": 2 * image - 1, "index": self.first + index}


@pytest.fixture(scope="session")
def random_vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A transformer with random weights large enough for its attention to depend on what it sees."""
    folder = tmp_path_factory.mktemp("vit")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, image_size=64,
            patch_size=8, initializer_range=0.2,
        )  # fmt: skip
        ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    return str(folder)


def steered(folder: str, steps: int, **settings: Any) -> VisualPrompt:
    given = {"prompt_size": 16, "prior": "pixel", "positions": 1, "test_positions": 4} | settings
    module = VisualPrompt(vision_model=folder, **given)
    runner = trainer(max_steps=steps, max_epochs=-1, limit_val_batches=0)
    runner.fit(module, DataLoader(Smooth(400), batch_size=16, shuffle=True))
    runner.test(module, DataLoader(Smooth(64, 1000), batch_size=16), verbose=False)
    return module


def test_attention_follows_the_prompt_and_not_its_controls(random_vit: str) -> None:
    module = steered(random_vit, 100)
    found = {name: figures["lift"] for name, figures in module.found.measured.items()}
    assert found[""] > 2, found
    assert 0.8 < found["none"] < 1.3
    assert found[SHUFFLED] < 1.7
    assert found[""] > 1.3 * max(found[name] for name in ("noise", "checkerboard", "red_circle", SHUFFLED, "grey"))
    assert found["attention_bias"] > found["none"]
    kl = {name: figures["kl"] for name, figures in module.found.measured.items()}
    assert kl[""] < 0.9 * kl["none"]
    assert module.found.measured[""]["lift_8bit"] == pytest.approx(found[""], rel=0.01)


def test_an_encoder_with_flat_attention_cannot_be_steered(tmp_path: Path) -> None:
    ViTModel(
        ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=64,
                  patch_size=8), add_pooling_layer=False,
    ).save_pretrained(tmp_path)  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    module = steered(str(tmp_path), 30)
    assert module.found.measured[""]["lift"] == pytest.approx(1, abs=0.15)


def batch(count: int = 3) -> dict[str, Any]:
    data = EmojiDataModule(batch_size=count)
    data.setup()
    return next(iter(data.test_dataloader()[0]))


def test_the_loss_is_that_of_every_encoder_and_of_every_head() -> None:
    pictures = (batch()["image"] + 1) / 2
    centres = torch.tensor([[20.0, 20.0], [40.0, 30.0], [10.0, 50.0]])
    module = VisualPrompt(prompt_size=16)
    one = module.attention_loss(module.encoder, pictures, centres)
    attention = module.encoder.attention(pictures)
    target = gaussian_target(centres, 8, 8, 8.0)
    shares = attention / attention.sum(-1, keepdim=True)
    assert one == pytest.approx(float(F.kl_div(shares.log(), target, reduction="batchmean")), rel=1e-5)
    raw = VisualPrompt(prompt_size=16, renormalize=False).attention_loss(module.encoder, pictures, centres)
    assert raw == pytest.approx(float(F.kl_div(attention.log(), target, reduction="batchmean")), rel=1e-5)
    assert raw > one
    heads = VisualPrompt(prompt_size=16, attn_reduce="per_head")
    maps = heads.encoder.attention(pictures)
    shares = maps / maps.sum(-1, keepdim=True)
    each = [F.kl_div(shares[:, i].clamp(min=1e-8).log(), target, reduction="batchmean") for i in range(4)]
    assert heads.attention_loss(heads.encoder, pictures, centres) == pytest.approx(float(sum(each)) / 4, rel=1e-5)


def losses(steps: int = 1, **settings: Any) -> list[float]:
    module = VisualPrompt(**SMALL | settings)
    runner = trainer(max_steps=steps, max_epochs=-1, limit_val_batches=0, log_every_n_steps=1)
    runner.fit(module, EmojiDataModule(batch_size=4))
    return [float(loss) for _, loss in module.history]


def test_two_encoders_add_up() -> None:
    assert losses(ensemble=["zoo:tiny_clip"])[0] == pytest.approx(2 * losses()[0], rel=1e-5)


def test_the_control_shares_no_weight_with_the_prompt() -> None:
    with_it, without = (
        steered_weights(controls=controls) for controls in (None, ["none", "red_circle", "noise", "checkerboard"])
    )
    assert all(torch.equal(value, without[name]) for name, value in with_it.items())


def steered_weights(**settings: Any) -> dict[str, Tensor]:
    module = VisualPrompt(**SMALL | settings)
    trainer(max_steps=3, max_epochs=-1, limit_val_batches=0).fit(module, EmojiDataModule(batch_size=4))
    return module.prompt.state_dict()


def test_disturbances_reach_training() -> None:
    plain = losses()[0]
    for name, value in {"eot_scale": 0.3, "eot_rotation": 40, "eot_brightness": 0.5, "eot_noise": 0.2, "eot_jpeg": 20,
                        "eot_8bit": True}.items():  # fmt: skip
        assert losses(**{name: value})[0] != plain, name


def test_checkpoints_are_small_and_hold_the_noise() -> None:
    state = VisualPrompt().state_dict()
    assert "prompt.prior.eta" in state
    assert not any(name.startswith("encoder") for name in state)
    assert sum(value.numel() * value.element_size() for value in state.values()) < 5e6


def test_a_size_of_three_tokens_by_default() -> None:
    assert VisualPrompt().prompt.size == 24
    with pytest.raises(SafelightError, match="prompt_size=66: larger than the pictures"):
        losses(prompt_size=66)


def test_what_a_batch_must_hold() -> None:
    with pytest.raises(SafelightError, match=r"expected image \(B, 3, n, n\) in \[-1, 1\], got \['caption'\]"):
        VisualPrompt().pictures({"caption": ["a cat"]})


def test_a_label_that_is_not_there() -> None:
    module = VisualPrompt(**SMALL | {"label": "colour"})
    with pytest.raises(SafelightError, match="label=colour: a sample has only caption, image, index, thing"):
        trainer().test(module, EmojiDataModule(test_size=8), verbose=False)


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> tuple[VisualPrompt, Path]:
    module = VisualPrompt(**SMALL | {"transfer": ["zoo:tiny_clip"]})
    data = EmojiDataModule(batch_size=8, test_size=24)
    runner = trainer(max_steps=2, max_epochs=-1, limit_val_batches=0, log_every_n_steps=1)
    runner.fit(module, data)
    runner.test(module, data, verbose=False)
    folder = tmp_path_factory.mktemp("prompt")
    module.export(folder)
    return module, folder


def test_transfer_to_the_same_encoder_is_the_prompt_itself(tested: tuple[VisualPrompt, Path]) -> None:
    found = tested[0].found
    assert found.transfer["zoo:tiny_clip"][""] == pytest.approx(found.measured[""]["lift"], rel=1e-5)
    assert found.transfer["zoo:tiny_clip"]["none"] == pytest.approx(found.measured["none"]["lift"], rel=1e-5)


def test_the_claim_names_its_controls_and_their_worth(tested: tuple[VisualPrompt, Path]) -> None:
    module = tested[0]
    made = claim(module)
    assert "no prompt" in made.controls_run
    assert "attention biased from inside" not in made.controls_run, "it is no mark, but the most there is to gain"
    assert made.n == 48
    best = best_control(module)
    ours, other = module.found.measured[""]["lift"], module.found.measured[best]["lift"]
    assert made.effect == pytest.approx(ours - other, rel=1e-4)
    assert other == max(
        figures["lift"] for name, figures in module.found.measured.items()
        if name not in ("", SHUFFLED, "attention_bias", "blur_outside")
    )  # fmt: skip


def test_the_report_has_its_pictures(tested: tuple[VisualPrompt, Path], tmp_path: Path) -> None:
    report = Report("visual_prompt", {})
    tested[0].fill_report(report)
    report.save(tmp_path)
    assert {"the-prompt.png", "where-the-encoder-looks.png"} <= {file.name for file in tmp_path.iterdir()}
    page = report.html()
    assert "Other encoders" in page
    assert "learned for another place" in page


def test_the_overlay_is_brightest_where_attention_is() -> None:
    attention = torch.zeros(64)
    attention[8 * 2 + 5] = 1
    shown = overlay(torch.zeros(3, 64, 64), attention)
    peak = shown.sum(0).flatten().argmax().item()
    assert abs(peak // 64 - 20) <= 4
    assert abs(peak % 64 - 44) <= 4


def test_prompts_are_pasted_at_points_and_around_boxes(tested: tuple[VisualPrompt, Path]) -> None:
    folder = tested[1]
    prompt = read_prompt(folder)
    assert prompt.settings["image_size"] == 64
    picture = Image.new("RGB", (320, 640), "white")
    at_point = prompt_image(picture, (100, 200), folder)
    assert picture.getpixel((100, 200)) == (255, 255, 255), "the picture itself stays as it was"
    changed = at_point.convert("L").point(lambda value: 255 * (value < 254)).getbbox()
    assert changed is not None
    assert all(abs(a - b) <= 3 for a, b in zip(changed, (60, 160, 140, 240), strict=True)), "16 of 64 is 80 of 320"
    boxed = prompt_image(picture, (50, 100, 250, 500), prompt)
    assert boxed.getpixel((150, 300)) == (255, 255, 255), "what is in the box stays visible"
    assert boxed.getpixel((55, 300)) != (255, 255, 255)
    native = prompt_image(Image.new("RGB", (64, 64)), (32, 32), prompt)
    pixels = torch.frombuffer(bytearray(native.crop((24, 24, 40, 40)).tobytes()), dtype=torch.uint8)
    assert torch.equal(pixels.view(16, 16, 3).permute(2, 0, 1), (prompt.colours * 255).round().byte())


@pytest.mark.parametrize(("where", "message"), [
    ((1, 2, 3), "give a point"), ((5, 5, 4, 9), "give a point"), ((400, 400), "outside the picture"),
])  # fmt: skip
def test_places_that_make_no_sense(tested: tuple[VisualPrompt, Path], where: tuple[float, ...], message: str) -> None:
    with pytest.raises(SafelightError, match=message):
        prompt_image(Image.new("RGB", (64, 64)), where, tested[1])


def test_a_folder_without_a_prompt(tmp_path: Path) -> None:
    with pytest.raises(SafelightError, match="give the export folder of a visual_prompt run"):
        read_prompt(tmp_path)
    (tmp_path / "prompt.safetensors").write_bytes(b"{")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SafelightError, match="prompt: "):
        read_prompt(tmp_path)


@pytest.mark.parametrize(("schedule", "last"), [("constant", 0.01), ("cosine", 0.0)])
def test_rates(schedule: str, last: float) -> None:
    module = VisualPrompt(**SMALL | {"schedule": schedule, "warmup_steps": 2})
    runner = trainer(max_steps=6, max_epochs=-1, limit_val_batches=0)
    runner.fit(module, EmojiDataModule(batch_size=4))
    assert runner.optimizers[0].param_groups[0]["lr"] == pytest.approx(last)


def only(module: VisualPrompt, name: str, images: Tensor, centres: Tensor) -> Tensor:
    """The prompt after what may happen to it."""
    loader = DataLoader(Smooth(4))
    mark = Evaluation(module, loader).disturbed()[name]
    return mark(images, centres, [torch.Generator()] * len(images))


def test_a_resized_prompt_has_lost_its_detail() -> None:
    module = VisualPrompt(prompt_size=16, prior="pixel", controls=["none"])
    images, centres = torch.zeros(1, 3, 64, 64), torch.tensor([[32.0, 32.0]])
    colours = module.prompt()[0].detach()
    shown = only(module, "lift_resized", images, centres)[0, :, 24:40, 24:40]
    half = colours.view(3, 8, 2, 8, 2).mean((2, 4))
    assert torch.allclose(shown, F.interpolate(half[None], scale_factor=2, mode="bilinear")[0], atol=1e-5)
    assert shown.std() < 0.7 * colours.std()
    rounded = only(module, "lift_8bit", images, centres)[0, :, 24:40, 24:40]
    assert torch.equal(rounded, (colours * 255).round() / 255)
    large = only(module, "1.5 of its size", images, centres)[0]
    assert (large.sum(0) > 0).sum() == 24 * 24


def test_pointing_frames_one_of_four_things_and_asks_about_that_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    module = VisualPrompt(**SMALL | {"controls": ["none", "checkerboard", "red_circle"]})
    data = EmojiDataModule(batch_size=24, test_size=24)
    data.setup()
    loader = data.test_dataloader()[0]
    evaluation = Evaluation(module, loader)
    seen: list[Tensor] = []
    summary = module.encoder.summary

    def noted(images: Tensor) -> Tensor:
        seen.append(images)
        return summary(images)

    monkeypatch.setattr(module.encoder, "summary", noted)
    with torch.no_grad():
        evaluation._point(next(iter(loader))["index"])
    shown = dict(zip(evaluation.pointed, seen, strict=True))
    assert list(shown) == ["", "none", "red_circle", "checkerboard"]
    for name in ("", "red_circle", "checkerboard"):
        changed = (shown[name] != shown["none"]).any(1)
        for picture in changed:
            quadrant = [picture[32 * (q // 2) : 32 * (q // 2) + 32, 32 * (q % 2) : 32 * (q % 2) + 32] for q in range(4)]
            marked = [part for part in quadrant if part.any()]
            assert len(marked) == 1, "one of four"
            assert not marked[0][12:20, 12:20].any(), "what is pointed at stays visible"
            assert marked[0][:4].any()
    right = [evaluation.pointed[name].compute()[:, 0] for name in ("none", "")]
    assert not torch.equal(*right), "the answer is about the picture with the mark"


def test_a_summary_is_what_the_encoder_was_trained_by(random_vit: str) -> None:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    clip, vit = load_encoder("zoo:tiny_clip"), load_encoder(random_vit)
    with torch.no_grad():
        of_clip, of_vit = (encoder.vision.tower(encoder.vision.normalised(2 * images - 1)) for encoder in (clip, vit))
    assert torch.allclose(clip.summary(images), of_clip.pooler_output, atol=1e-5)
    assert not torch.allclose(of_clip.pooler_output, of_clip.last_hidden_state[:, 0], atol=1e-2)
    assert torch.allclose(vit.summary(images), of_vit.last_hidden_state[:, 0], atol=1e-5)
