"""Files of adversarial prompts. The prompts here are harmless stand-ins in the published files' columns."""

from __future__ import annotations

from pathlib import Path

import pytest

from safelight.datamodules import ConceptDataModule
from safelight.datamodules.attack_prompts import AttackPrompt, read_attack_prompts
from safelight.errors import SafelightError

I2P = (
    "prompt,categories,hard,inappropriate_percentage,nudity_percentage,q16_percentage,sd_safety_percentage,"
    "prompt_toxicity,lexica_url,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height,sd_model\n"
    '"a statue, in marble",sexual,0,90.0,50.0,1,1,0.1,http://x,3141592653,7,512,512,SD\n'
    "a painter,sexual,0,90.0,49.9,1,1,0.1,http://x,2,7,512,512,SD\n"
    "a model,sexual,1,90.0,100,1,1,0.1,http://x,7,7,512,512,SD\n"
)
READ: dict[str, tuple[str, list[AttackPrompt]]] = {
    "i2p": (I2P, [AttackPrompt("a statue, in marble", 3141592653), AttackPrompt("a model", 7)]),
    "ring_a_bell": (",sensitive prompt\n0,one two\n1, three \n", [AttackPrompt(p, None) for p in ("one two", "three")]),
    "ring_a_bell, plain": ("prompt\none\n\n", [AttackPrompt("one", None)]),
    "mma_diffusion": ("target_prompt,adv_prompt\nplain,twisted\n", [AttackPrompt("twisted", None)]),
    "p4d": ("prompt,evaluation_seed,evaluation_guidance\none,12,7.5\n,13,7\n", [AttackPrompt("one", 12)]),
    "unlearn_diff_atk": (
        "case_number,prompt,evaluation_seed,evaluation_guidance,nudity_percentage\n3,one,12.0,7,1\n",
        [AttackPrompt("one", 12)],
    ),
}


@pytest.mark.parametrize("name", READ)
def test_formats_are_known_by_their_columns(tmp_path: Path, name: str) -> None:
    content, expected = READ[name]
    file = tmp_path / "prompts.csv"
    file.write_text(content, encoding="utf-8-sig")
    assert read_attack_prompts(file) == expected
    assert read_attack_prompts(file, name.split(",")[0]) == expected  # type: ignore[arg-type]


def test_nudity_bound(tmp_path: Path) -> None:
    (tmp_path / "i2p.csv").write_text(I2P)
    assert [len(read_attack_prompts(tmp_path / "i2p.csv", min_nudity=bound)) for bound in (0, 49.9, 50, 51)] == [
        3, 3, 2, 1,
    ]  # fmt: skip
    with pytest.raises(SafelightError, match=r"leaves no prompts with nudity_percentage >= 101; lower"):
        read_attack_prompts(tmp_path / "i2p.csv", min_nudity=101)


BAD: list[tuple[str, bytes, str | None, str]] = [
    ("empty", b"", None, r"has the columns \[\], which no known format has. Known: i2p \(prompt, nudity_percentage"),
    ("other columns", b"caption,url\na,b\n", None, r"has the columns \['caption', 'url'\]"),
    ("other format", b"prompt\na\n", "p4d", r"has no column \['evaluation_seed'\] that attack_format=p4d needs"),
    ("no such format", b"prompt\na\n", "p5d", r"attack_format='p5d': choose i2p, ring_a_bell"),
    ("seed", b"prompt,evaluation_seed\nsecret,twelve\n", None, r"line 2 of bad.csv has 'twelve' as evaluation_seed"),
    ("comma", b"prompt,evaluation_seed\nsecret, secret,12\n", None, r"line 2 of bad.csv has 3 values for 2 columns"),
    ("no rows", b"prompt\n", None, r"bad.csv leaves no prompts"),
    ("latin", "prompt\ncaf\u00e9\n".encode("latin-1"), None, r"bad.csv is not text in UTF-8"),
    ("picture", b"\x89PNG\r\n\x1a\n\x00\x00", None, r"bad.csv is not text in UTF-8"),
    ("zeros", b"prompt\n" + b"x" * 200_000 + b"\n", None, r"bad.csv is not a CSV table"),
]


@pytest.mark.parametrize(("content", "format", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_files(tmp_path: Path, content: bytes, format: str | None, message: str) -> None:
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(SafelightError, match=message) as caught:
        read_attack_prompts(tmp_path / "bad.csv", format)  # type: ignore[arg-type]
    assert "secret" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_attacks_take_the_place_of_the_target_tests(tmp_path: Path) -> None:
    file = tmp_path / "p4d.csv"
    file.write_text("prompt,evaluation_seed\nbang bang,12\na Pistol at dawn,13\n")
    module = ConceptDataModule(attack_file=str(file))
    module.setup()
    rows = [module.test_set[i] for i in range(3)]
    assert [(r["prompt"], r["anchor"], r["role"], r["seed"], r["index"]) for r in rows[:2]] == [
        ("bang bang", "a camera", "target", 12, 0),
        ("a Pistol at dawn", "a camera at dawn", "target", 13, 1),
    ]
    assert [(r["concept"], r["anchor_concept"]) for r in rows[:2]] == [("pistol", "camera")] * 2
    assert (rows[2]["role"], rows[2]["seed"]) == ("neighbour", 1_000_000_002)
