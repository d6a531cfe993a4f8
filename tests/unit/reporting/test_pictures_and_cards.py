from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image, ImageFont

from safelight.errors import SafelightError
from safelight.reporting import grid, write_model_card
from safelight.reporting.pictures import _extent, _wrap, enlarge, to_image


def test_tensors_become_the_right_bytes() -> None:
    values = torch.tensor([0.0, 0.5, 1.0, 2.0, -1.0, float("nan")]).reshape(1, 1, 6)
    image = to_image(values)
    assert [image.getpixel((x, 0)) for x in range(6)] == [(v, v, v) for v in (0, 128, 255, 255, 0, 0)]
    colour = torch.tensor([1.0, 0.0, 0.2]).reshape(3, 1, 1)
    assert to_image(colour).getpixel((0, 0)) == (255, 0, 51)
    assert to_image((colour * 255).byte()).getpixel((0, 0)) == (255, 0, 51)
    assert to_image(colour.bfloat16()).getpixel((0, 0)) == (255, 0, 51)
    with pytest.raises(SafelightError, match=r"got shape \(4, 2, 2\)"):
        to_image(torch.zeros(4, 2, 2))


def test_small_pictures_grow_by_whole_factors() -> None:
    image = to_image(torch.rand(3, 3, 5))
    large = enlarge(image, 18)
    assert large.size == (20, 12)
    assert large.getpixel((19, 11)) == image.getpixel((4, 2))
    assert enlarge(large, 10) is large


def test_grid_puts_every_picture_in_its_cell() -> None:
    red, blue = (torch.tensor(c).reshape(3, 1, 1).expand(3, 8, 8) for c in ([1.0, 0, 0], [0, 0, 1.0]))
    sheet = grid([[red, blue], [blue]], cell=40, gap=4)
    assert sheet.size == (4 + 2 * 44, 4 + 2 * 44)
    centres = [(24, 24), (68, 24), (24, 68), (68, 68)]
    assert [sheet.getpixel(c) for c in centres] == [(255, 0, 0), (0, 0, 255), (0, 0, 255), (238, 236, 233)]


def test_labels_stay_off_the_pictures_and_off_each_other() -> None:
    white = torch.ones(3, 8, 8)
    words = (
        "a very long prompt with a pneumonoultramicroscopicsilicovolcanoconiosis on a yellow background in noto style"
    )
    cell, gap = 96, 8
    sheet = grid([[white] * 3] * 2, ["row " + words, "b"], [words, "short", words], cell=cell, gap=gap).convert("L")
    left, top = sheet.width - 3 * (cell + gap), sheet.height - 2 * (cell + gap)
    ink = [(x, y) for x in range(sheet.width) for y in range(sheet.height) if sheet.getpixel((x, y)) < 128]
    assert ink
    # No ink below the column labels and right of the row labels: there are only white pictures and gaps.
    assert not [(x, y) for x, y in ink if x >= left and y >= top]
    # A column label stays over its own column.
    gaps = [x for k in (1, 2) for x in range(left + k * (cell + gap) - gap + 2, left + k * (cell + gap) - 2)]
    assert not [(x, y) for x, y in ink if y < top and x in gaps]
    assert min(x for x, _ in ink) >= 0


def test_wrapping_keeps_the_words_and_cuts_with_an_ellipsis() -> None:
    font = ImageFont.load_default(14)
    lines = _wrap("one two three four five six", font, 70, 10)
    assert " ".join(lines) == "one two three four five six"
    assert all(_extent(line, font)[2] <= 70 for line in lines)
    cut = _wrap("one two three four five six", font, 70, 2)
    assert len(cut) == 2
    assert cut[1].endswith("…")


def test_grid_refuses_what_does_not_fit() -> None:
    with pytest.raises(SafelightError, match="rows is empty"):
        grid([[]])
    with pytest.raises(SafelightError, match="1 row_labels for 2"):
        grid([[torch.zeros(3, 2, 2)]] * 2, ["one"])


def test_model_card_header_is_what_the_hub_reads(tmp_path: Path) -> None:
    path = write_model_card(
        tmp_path, title="Pruned FLUX", command="python train.py method=ecodiff", data="emoji (Apache-2.0, CC-BY 4.0)",
        metrics={"ssim": 0.927, "keep_params": 0.8}, licence="Apache-2.0", base_model="zoo:tiny_flux",
        text="A fifth is gone.", tags=["pruning", "safelight"], library_name="diffusers",
        pipeline_tag="text-to-image", datasets=["emoji"], usage="FluxPipeline.from_pretrained('.')",
    )  # fmt: skip
    front, body = path.read_text().removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(front) == {
        "license": "apache-2.0", "library_name": "diffusers", "pipeline_tag": "text-to-image",
        "tags": ["safelight", "pruning"], "datasets": ["emoji"], "metrics": ["ssim", "keep_params"],
    }  # fmt: skip
    for part in ("# Pruned FLUX", "A fifth", "```bash\npython train.py method=ecodiff\n```", "| ssim | 0.927 |",
                 "`zoo:tiny_flux`", "emoji (Apache-2.0, CC-BY 4.0)", "FluxPipeline.from_pretrained"):  # fmt: skip
        assert part in body


def test_model_card_names_foreign_licences_and_hub_bases(tmp_path: Path) -> None:
    path = write_model_card(
        tmp_path, title="t", command="c", data="d", metrics={}, licence="FLUX.1 [dev] Non-Commercial",
        base_model="black-forest-labs/FLUX.1-dev",
    )  # fmt: skip
    header = yaml.safe_load(path.read_text().split("---\n")[1])
    assert header["license"] == "other"
    assert header["license_name"] == "FLUX.1 [dev] Non-Commercial"
    assert header["base_model"] == "black-forest-labs/FLUX.1-dev"
    with pytest.raises(SafelightError, match="data is empty"):
        write_model_card(tmp_path, title="t", command="c", data=" ", metrics={}, licence="mit")


def test_importing_the_packages_is_light() -> None:
    import subprocess
    import sys

    code = (
        "import sys, safelight.reporting, safelight.metrics, safelight.callbacks;"
        "heavy = {'torch', 'lightning', 'transformers', 'PIL', 'torchmetrics'} & set(sys.modules);"
        "assert not heavy, heavy;"
        "from safelight.reporting import Summary, Claim; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert Image.Image
