"""The prompt's parts: how it is made, pasted, disturbed, and what is measured of attention."""

from __future__ import annotations

import io
import math

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from safelight.errors import SafelightError
from safelight.lightning_modules.randomness import row_generator
from safelight.lightning_modules.visual_prompt.markers import blurred_outside, checkerboard, circle, marks
from safelight.lightning_modules.visual_prompt.objective import (
    divergence,
    gaussian_target,
    over_patches,
    token_centres,
)
from safelight.lightning_modules.visual_prompt.pasting import draw_centres, paste
from safelight.lightning_modules.visual_prompt.patch import Prompt, shape_mask
from safelight.lightning_modules.visual_prompt.pointing import Pool, centres_of, named, prototypes, quadrants
from safelight.lightning_modules.visual_prompt.robustness import Disturbances, like_jpeg, rotated, rounded
from safelight.lightning_modules.visual_prompt.steering import COLUMNS, foveal_bias, measured
from safelight.metrics.samples import mean_interval


def rows(count: int, start: int = 0) -> list[torch.Generator]:
    return [row_generator(7, start + i) for i in range(count)]


# -- pasting ----------------------------------------------------------------------------------------------------------


def test_the_prompt_replaces_pixels_and_leaves_all_others() -> None:
    images, colours = torch.rand(3, 3, 32, 32), torch.rand(3, 8, 8)
    centres = torch.tensor([[4.0, 4.0], [28.0, 28.0], [13.0, 21.0]])
    pasted = paste(images, colours, torch.ones(1, 8, 8), centres)
    for image, before, (row, column) in zip(pasted, images, centres.int().tolist(), strict=True):
        assert torch.equal(image[:, row - 4 : row + 4, column - 4 : column + 4], colours)
        untouched = torch.ones(32, 32, dtype=torch.bool)
        untouched[row - 4 : row + 4, column - 4 : column + 4] = False
        assert torch.equal(image[:, untouched], before[:, untouched])


def test_opacity_blends() -> None:
    images, colours, opacity = torch.rand(1, 3, 16, 16), torch.rand(3, 8, 8), torch.rand(1, 8, 8)
    pasted = paste(images, colours, opacity, torch.tensor([[8.0, 8.0]]))
    expected = opacity * colours + (1 - opacity) * images[0, :, 4:12, 4:12]
    assert torch.allclose(pasted[0, :, 4:12, 4:12], expected, atol=1e-6)


def test_each_row_may_have_a_prompt_of_its_own() -> None:
    images, colours = torch.zeros(2, 3, 16, 16), torch.rand(2, 3, 8, 8)
    pasted = paste(images, colours, torch.ones(1, 8, 8), torch.full((2, 2), 8.0))
    assert torch.equal(pasted[:, :, 4:12, 4:12], colours)


def test_a_scaled_prompt_covers_more_and_keeps_its_place() -> None:
    images = torch.zeros(2, 3, 32, 32)
    pasted = paste(images, torch.ones(3, 8, 8), torch.ones(1, 8, 8), torch.full((2, 2), 16.0), torch.tensor([2.0, 0.5]))
    assert pasted[0, 0].sum() == 256
    assert pasted[0, 0, 8:24, 8:24].min() == 1
    assert pasted[1, 0].sum() == 16
    ramp = torch.arange(8.0).expand(3, 8, 8) / 8
    doubled = paste(images[:1], ramp, torch.ones(1, 8, 8), torch.full((1, 2), 16.0), 2.0)[0, :, 8:24, 8:24]
    assert torch.allclose(
        doubled, F.interpolate(ramp[None], scale_factor=2, mode="bilinear", align_corners=False)[0], atol=1e-5
    )


def test_what_is_outside_the_picture_is_cut_off() -> None:
    pasted = paste(torch.zeros(1, 3, 16, 16), torch.ones(3, 8, 8), torch.ones(1, 8, 8), torch.tensor([[0.0, 16.0]]))
    assert pasted[0, 0].sum() == 16
    assert pasted[0, 0, :4, 12:].min() == 1


def test_the_gradient_of_a_pixel_is_that_of_all_its_copies() -> None:
    colours = torch.rand(3, 8, 8, requires_grad=True)
    pasted = paste(torch.zeros(2, 3, 16, 16), colours, torch.ones(1, 8, 8), torch.tensor([[4.0, 4.0], [10.0, 9.0]]))
    pasted.sum().backward()
    assert torch.equal(colours.grad, torch.full((3, 8, 8), 2.0))


def test_places_are_valid_uniform_and_not_tied_to_tokens() -> None:
    centres = draw_centres(rows(2000), 3, 32, 8).flatten(0, 1)
    assert centres.min() == 4
    assert centres.max() == 28
    counts = torch.bincount(centres[:, 0].int())[4:29]
    assert len(counts) == 25
    assert counts.min() > 170, "each of 25 rows about 240 times"
    assert torch.equal(draw_centres(rows(1, 5), 3, 32, 8)[0], draw_centres(rows(6), 3, 32, 8)[5])
    with pytest.raises(SafelightError, match="larger than the pictures, which have 16"):
        draw_centres(rows(1), 1, 16, 24)


# -- the objective -----------------------------------------------------------------------------------------------------


def test_the_target_is_a_gaussian_on_the_tokens() -> None:
    target = gaussian_target(torch.tensor([[20.0, 12.0], [4.0, 28.0]]), 4, 8, 6.0)
    assert torch.allclose(target.sum(-1), torch.ones(2))
    for row, (i, j) in zip(target, [(20, 12), (4, 28)], strict=True):
        weights = [
            math.exp(-((8 * u + 4 - i) ** 2 + (8 * v + 4 - j) ** 2) / (2 * 36)) for u in range(4) for v in range(4)
        ]
        assert torch.allclose(row, torch.tensor(weights) / sum(weights), atol=1e-6)
    assert target[0].view(4, 4).argmax() == 2 * 4 + 1, "row 2, column 1"


def test_divergences_and_their_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    attention, target = (torch.rand(3, 16, generator=generator).softmax(-1) for _ in range(2))
    forward = F.kl_div(attention.log(), target, reduction="none").sum(-1)
    backward = F.kl_div(target.log(), attention, reduction="none").sum(-1)
    assert torch.allclose(divergence(attention, target), forward, atol=1e-6)
    assert torch.allclose(divergence(attention, target, "attn_to_target"), backward, atol=1e-6)
    assert (forward > 0).all()
    assert not torch.allclose(forward, backward, atol=1e-4)
    entropy = -(target * target.log()).sum(-1)
    assert torch.allclose(divergence(attention, target, "ce") - entropy, forward, atol=1e-6)
    assert torch.allclose(divergence(target, target), torch.zeros(3), atol=1e-6)


def test_cross_entropy_has_the_gradient_of_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 9, generator=generator, requires_grad=True)
    target = torch.rand(2, 9, generator=generator).softmax(-1)
    kl, ce = (
        torch.autograd.grad(divergence(logits.softmax(-1), target, way).sum(), logits)[0]  # type: ignore[arg-type]
        for way in ("target_to_attn", "ce")
    )
    assert torch.allclose(kl, ce, atol=1e-6)


def test_heads_are_compared_one_by_one_and_tiny_numbers_do_no_harm() -> None:
    attention, target = torch.zeros(1, 2, 4), torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    attention[0, 0, 0] = attention[0, 1, 3] = 1
    found = divergence(attention, target)
    assert found.shape == (1, 2)
    assert found[0, 0].abs() < 1e-6
    assert found[0, 1] == pytest.approx(-math.log(1e-8), rel=1e-5)
    assert over_patches(torch.zeros(1, 4)).isfinite().all()


# -- what is measured --------------------------------------------------------------------------------------------------


def column(found: torch.Tensor, name: str) -> list[float]:
    return found[:, COLUMNS.index(name)].tolist()


def test_uniform_attention_has_lift_one() -> None:
    found = measured(torch.full((2, 16), 0.05), torch.tensor([[8.0, 8.0], [24.0, 15.0]]), 16, 8, 8.0)
    assert column(found, "lift") == pytest.approx([1, 1])
    assert column(found, "mass") == pytest.approx([0.25, 0.25]), "2 x 2 of 16 tokens"
    assert column(found, "raw_mass") == pytest.approx([0.2, 0.2]), "a fifth of all attention is on other tokens"


def test_attention_that_is_all_there() -> None:
    attention = torch.zeros(2, 16)
    attention[0, 5], attention[1, 15] = 0.5, 0.5
    found = measured(attention, torch.tensor([[8.0, 8.0], [8.0, 8.0]]), 16, 8, 8.0)
    assert column(found, "lift") == pytest.approx([4, 0])
    assert column(found, "argmax_hit") == [1, 0]
    assert column(found, "peak_error") == pytest.approx([math.hypot(4, 4), math.hypot(20, 20)])
    assert found[0, 2] < found[1, 2]


def test_a_region_without_tokens_is_refused() -> None:
    with pytest.raises(SafelightError, match="prompt_size=4"):
        measured(torch.full((1, 16), 0.05), torch.tensor([[8.0, 8.0]]), 4, 8, 8.0)


def test_token_centres_run_row_by_row() -> None:
    assert token_centres(2, 8).tolist() == [[4, 4], [4, 12], [12, 4], [12, 12]]


def test_the_interval_holds_the_mean_and_narrows() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) + 3
    low, high = mean_interval(values, 1000, 0)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.2)


def test_the_bias_is_strongest_at_the_centre() -> None:
    bias = foveal_bias(torch.tensor([[12.0, 4.0]]), 4, 8, 8.0, 3.0)[0].view(4, 4)
    assert bias[1, 0] == 3
    assert bias[2, 0] == pytest.approx(3 * math.exp(-0.5))


# -- the prompt --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 24, 28, 42])
@pytest.mark.parametrize("prior", ["unet", "pixel"])
def test_priors_are_bounded_and_a_function_of_the_seed(prior: str, size: int) -> None:
    made = [Prompt(size, prior, seed=seed)() for seed in (0, 0, 1)]  # type: ignore[arg-type]
    colours, opacity = made[0]
    assert colours.shape == (3, size, size)
    assert 0 <= colours.min() < colours.max() <= 1
    assert torch.equal(opacity, torch.ones(1, size, size))
    assert torch.equal(colours, made[1][0])
    assert not torch.equal(colours, made[2][0])


def test_the_prompt_at_export_is_that_of_training() -> None:
    prompt = Prompt(16).train()
    for parameter in prompt.parameters():
        torch.nn.init.normal_(parameter)
    assert torch.equal(prompt()[0], prompt.eval()()[0])
    assert "prior.eta" in prompt.state_dict(), "the noise belongs to the prompt"
    again = Prompt(16, seed=9)
    again.load_state_dict(prompt.state_dict())
    assert torch.equal(again()[0], prompt()[0])


def test_a_learned_shape_is_part_of_the_prompt() -> None:
    prompt = Prompt(16, shape="learned")
    colours, opacity = prompt()
    assert colours.shape == (3, 16, 16)
    assert opacity.shape == (1, 16, 16)
    opacity.sum().backward()
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in prompt.parameters())


def test_preset_shapes() -> None:
    square, disc, ring = (shape_mask(shape, 40, 0.2)[0] for shape in ("square", "disc", "ring"))  # type: ignore[arg-type]
    assert square.min() == 1
    assert disc.sum() == pytest.approx(math.pi * 20**2, rel=0.01)
    assert ring.sum() == pytest.approx(math.pi * (20**2 - 12**2), rel=0.01)
    assert disc[20, 20] == 1
    assert ring[20, 20] == 0
    assert disc[0, 0] == 0
    assert ring[20, 1] == 1


@pytest.mark.parametrize("size", [6, 15])
def test_odd_and_tiny_sizes_are_refused(size: int) -> None:
    with pytest.raises(SafelightError, match=f"prompt_size={size}"):
        Prompt(size)


# -- disturbances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", [30, 75, 95])
def test_jpeg_resembles_jpeg(quality: int) -> None:
    noise = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    image = F.interpolate(noise, (40, 40), mode="bicubic", align_corners=False).clamp(0, 1)
    image = (image * 255).round() / 255
    file = io.BytesIO()
    pixels = (image[0] * 255).byte().permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=0)
    decoded = torch.frombuffer(bytearray(Image.open(file).convert("RGB").tobytes()), dtype=torch.uint8)
    real = decoded.view(40, 40, 3).permute(2, 0, 1).float() / 255
    ours = like_jpeg(image, torch.tensor([float(quality)]))[0]
    lost = (real - image[0]).abs().mean()
    assert (ours - real).abs().mean() < 0.25 * lost + 1 / 255


def test_jpeg_and_rounding_let_gradients_through() -> None:
    image = torch.rand(1, 3, 20, 20, requires_grad=True)
    like_jpeg(image, torch.tensor([60.0])).sum().backward()
    assert image.grad.isfinite().all()
    assert image.grad.abs().sum() > 0
    x = torch.tensor([0.4, 1.6], requires_grad=True)
    rounded(x).sum().backward()
    assert rounded(x).tolist() == [0, 2]
    assert x.grad.tolist() == [1, 1]


def test_a_quarter_turn() -> None:
    layers = torch.rand(2, 4, 10, 10)
    turned = rotated(layers, torch.tensor([90.0, 0.0]))
    assert torch.allclose(turned[0], torch.rot90(layers[0], 1, (1, 2)), atol=1e-4)
    assert torch.allclose(turned[1], layers[1], atol=1e-4)


def test_disturbances_are_off_unless_asked_for_and_bounded() -> None:
    colours, opacity = torch.rand(3, 8, 8), torch.ones(1, 8, 8)
    shown, opaque, scale = Disturbances().of_prompt(colours, opacity, rows(5))
    assert torch.equal(shown, colours.expand(5, -1, -1, -1))
    assert torch.equal(opaque, opacity.expand(5, -1, -1, -1))
    assert torch.equal(scale, torch.ones(5))
    images = torch.rand(2, 3, 16, 16)
    assert Disturbances().of_picture(images, rows(2)) is images
    strong = Disturbances(scale=0.3, rotation=20, brightness=0.4, noise=0.1, jpeg=50, eight_bit=True)
    shown, opaque, scale = strong.of_prompt(colours, opacity, rows(200))
    assert 0.7 <= scale.min() < 0.75
    assert 1.25 < scale.max() <= 1.3
    assert shown.min() >= 0
    assert shown.max() <= 1
    assert torch.allclose(shown * 255, (shown * 255).round(), atol=1e-3)
    assert opaque.min() < 0.1, "corners turn out of the square"
    disturbed = strong.of_picture(images, rows(2))
    assert 0.02 < (disturbed - images).abs().mean() < 0.3


# -- marks -------------------------------------------------------------------------------------------------------------


def test_marks_are_where_they_belong() -> None:
    images, centres = torch.rand(2, 3, 64, 64), torch.tensor([[20.0, 30.0], [40.0, 16.0]])
    known = marks(16, 64)
    assert torch.equal(known["none"](images, centres, rows(2)), images)
    for name, mark in known.items():
        marked = mark(images, centres, rows(2))
        assert marked.shape == images.shape
        if name in ("none", "blur_outside", "red_circle_keypoint"):
            continue
        changed = (marked != images).any(1)
        for picture, (i, j) in zip(changed, centres.int().tolist(), strict=True):
            outside = torch.ones(64, 64, dtype=torch.bool)
            outside[i - 8 : i + 8, j - 8 : j + 8] = False
            assert not picture[outside].any(), name
            assert picture[~outside].any(), name
    colours, opacity = circle(16, 2.0)
    assert colours[:, 0, 0].tolist() == [1, 0, 0]
    assert opacity[0, 8, 8] == 0
    assert opacity[0, 8, 0] > 0.95
    board = checkerboard(8)
    assert board[0, :4, :4].sum() == 0
    assert board[0, :4, 4:].min() == 1
    twice = known["noise"](images, centres, rows(2)), known["noise"](images, centres, rows(2))
    assert torch.equal(*twice)


def test_only_the_outside_is_blurred() -> None:
    images, centres = torch.rand(1, 3, 32, 32), torch.tensor([[12.0, 20.0]])
    blurred = blurred_outside(images, centres, 8, 5.0)
    assert torch.equal(blurred[..., 8:16, 16:24], images[..., 8:16, 16:24])
    outside = torch.cat([blurred[..., :8, :].flatten(), blurred[..., 16:, :].flatten()])
    assert outside.std() < 0.2 * images.std()
    flat = torch.full((1, 3, 32, 32), 0.3)
    assert torch.allclose(blurred_outside(flat, centres, 8, 5.0), flat, atol=1e-6)


# -- pointing ----------------------------------------------------------------------------------------------------------


def test_four_things_in_one_picture() -> None:
    labels = torch.tensor([0, 0, 1, 2, 3, 4])
    images = (torch.arange(6.0) / 10).view(6, 1, 1, 1).expand(6, 3, 8, 8)
    pool = Pool(images, labels, torch.eye(5))
    own = torch.tensor([1, 3, 4])
    made, pointed, four = quadrants(pool, own, rows(3))
    assert made.shape == (3, 3, 8, 8)
    for picture, quadrant, shown, place in zip(made, pointed.tolist(), four.tolist(), own.tolist(), strict=True):
        assert len(set(shown)) == 4
        assert shown[quadrant] == labels[place]
        row, col = divmod(quadrant, 2)
        tile = picture[0, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4]
        assert torch.allclose(tile, torch.tensor(place / 10)), "the picture pointed at lies in its quadrant"
    assert len(set(quadrants(pool, own.repeat(40), rows(120))[1].tolist())) == 4
    assert centres_of(torch.tensor([0, 1, 2, 3]), 8).tolist() == [[2, 2], [2, 6], [6, 2], [6, 6]]
    summaries = torch.eye(5)[four[torch.arange(3), pointed]]
    assert torch.equal(named(summaries, pool, four), pointed)
    with pytest.raises(SafelightError, match="four different things"):
        quadrants(Pool(images, labels, torch.eye(3)), own, rows(3))


def test_prototypes_are_mean_directions() -> None:
    found = prototypes(torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 5.0]]), torch.tensor([0, 0, 1]))
    assert torch.allclose(found, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, 1.0]]))
