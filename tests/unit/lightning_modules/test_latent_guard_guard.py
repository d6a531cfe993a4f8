"""The guard in use: lists, thresholds, disguises, long prompts, files, and a pipeline behind it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from safelight.errors import SafelightError
from safelight.lightning_modules import LatentGuard
from safelight.lightning_modules.latent_guard.__main__ import main as command_line
from safelight.lightning_modules.latent_guard.bank import Concept
from safelight.lightning_modules.latent_guard.concept_lists import CURATED, curated
from safelight.lightning_modules.latent_guard.encoders import TextEncoder, load_text_encoder
from safelight.lightning_modules.latent_guard.features import FeatureStore
from safelight.lightning_modules.latent_guard.guard import PromptGuard
from safelight.lightning_modules.latent_guard.head import EmbeddingMappingLayer
from safelight.lightning_modules.latent_guard.pipelines import BlockedPromptError, GuardedPipeline
from safelight.testing.pipelines import build_pipeline, pipeline_folder

PROMPTS = ["a pistol on a red background", "a small cat", "a dagger in noto style"]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return load_text_encoder("tiny_clip")


def new_head(seed: int = 0) -> EmbeddingMappingLayer:
    torch.manual_seed(seed)
    return EmbeddingMappingLayer(128, num_heads=2, head_dim=8, dim_out=16)


@pytest.fixture
def guard(encoder: TextEncoder) -> PromptGuard:
    found = PromptGuard(encoder, new_head(), threshold=0.0)
    found.bank.extend([Concept("pistol", category="Violence"), "dagger", "skull"])
    return found


# -- the list ----------------------------------------------------------------------------------------------------------


def test_an_empty_list_blocks_nothing(encoder: TextEncoder) -> None:
    (verdict,) = PromptGuard(encoder, new_head(), threshold=-100.0).check("anything at all")
    assert (verdict.blocked, verdict.concept, verdict.score) == (False, None, -math.inf)


def test_adding_never_lowers_and_removing_never_raises_the_best_score(guard: PromptGuard) -> None:
    before = guard.scores(PROMPTS).amax(1)
    guard.bank.add("bomb", aliases=["big bomb"], category="Violence")
    more = guard.scores(PROMPTS).amax(1)
    assert bool((more >= before - 1e-6).all())
    guard.bank.remove("BOMB")
    assert torch.allclose(guard.scores(PROMPTS).amax(1), before, atol=1e-6)
    with pytest.raises(SafelightError, match="no concept 'bomb'"):
        guard.bank.remove("bomb")


def test_an_alias_speaks_for_its_concept(guard: PromptGuard) -> None:
    alone = guard.scores(PROMPTS)
    other = PromptGuard(guard.encoder, guard.head, 0.0)
    other.add(["handgun"])
    alias = other.scores(PROMPTS)
    guard.bank.add("pistol", aliases=["handgun"])
    expected = torch.maximum(alone[:, 0], alias[:, 0])
    assert torch.allclose(guard.scores(PROMPTS)[:, guard.bank.names.index("pistol")], expected, atol=1e-6)
    assert guard.bank.names == ["pistol", "dagger", "skull"]


def test_merging_keeps_own_settings_and_gains_the_rest(guard: PromptGuard) -> None:
    guard.bank.change("pistol", threshold=3.0)
    other = PromptGuard(guard.encoder, guard.head, 0.0)
    other.bank.extend([Concept("Pistol", aliases=("gun",), threshold=9.0), "bomb"])
    guard.bank.merge(other.bank)
    assert guard.bank.names == ["pistol", "dagger", "skull", "bomb"]
    assert guard.bank["pistol"] == Concept("pistol", ("gun",), "Violence", 3.0)
    assert torch.allclose(guard.scores(PROMPTS)[:, 3], other.scores(PROMPTS)[:, 1], atol=1e-6)
    with pytest.raises(SafelightError, match="different heads or encoders"):
        guard.bank.merge(PromptGuard(guard.encoder, new_head(1), 0.0).bank)


def test_curated_lists(guard: PromptGuard) -> None:
    everything = curated()
    assert len(everything) == sum(map(len, CURATED.values())) == len({concept.name for concept in everything})
    phrases = [phrase for concept in everything for phrase in concept.phrases]
    assert len(phrases) == len(set(phrases))
    guard.bank.extend(curated("weapons", "gore"))
    assert guard.bank["gun"].aliases[0] == "pistol"
    assert guard.bank["corpse"].category == "gore"
    with pytest.raises(SafelightError, match="no list 'cats'"):
        curated("cats")


@pytest.mark.parametrize("name", ["", " ", "\u200b"])
def test_a_concept_needs_a_name(guard: PromptGuard, name: str) -> None:
    with pytest.raises(SafelightError, match="needs a name"):
        guard.bank.add(name)


# -- verdicts ----------------------------------------------------------------------------------------------------------


def test_a_prompt_is_blocked_from_its_threshold_on(guard: PromptGuard) -> None:
    scores = guard.scores(PROMPTS)
    guard.threshold = float(scores[0].max()) - 1e-5
    first = guard.check(PROMPTS)[0]
    assert first.blocked
    assert first.concept == guard.bank.names[int(scores[0].argmax())]
    assert first.score == pytest.approx(float(scores[0].max()))
    guard.threshold = first.score + 1e-3  # alone, a prompt may score some last bits differently
    assert not guard.check(PROMPTS[0])[0].blocked


def test_a_score_equal_to_the_threshold_is_blocked(guard: PromptGuard) -> None:
    scores = torch.tensor([[0.0, -1.0, -2.0], [-1e-9, -1.0, -2.0]]).double()
    assert [verdict.blocked for verdict in guard.verdicts(["x", "y"], scores)] == [True, False]


def test_a_concept_may_have_its_own_threshold_and_scale(guard: PromptGuard) -> None:
    scores = guard.scores(PROMPTS)
    guard.threshold = float(scores.max()) + 1
    assert not any(verdict.blocked for verdict in guard.check(PROMPTS))
    guard.bank.change("dagger", threshold=float(scores[1, 1]) - 0.5)
    second = guard.check(PROMPTS)[1]
    assert (second.blocked, second.concept) == (True, "dagger")
    guard.bank.change("dagger", shift=1.0, scale=2.0)
    assert torch.allclose(guard.scores(PROMPTS)[:, 1], (scores[:, 1] - 1) / 2, atol=1e-5)


def test_the_words_that_carry_the_score(guard: PromptGuard) -> None:
    guard.threshold = -100.0
    (verdict,) = guard.check(PROMPTS[0], explain=True)
    assert sorted(word for word, _ in verdict.words) == sorted(PROMPTS[0].split())
    place = guard.bank.names.index(str(verdict.concept))
    word, lost = verdict.words[0]
    without = " ".join(part for part in PROMPTS[0].split() if part != word)
    assert lost == pytest.approx(verdict.score - float(guard.scores([without])[0, place]), abs=1e-5)
    assert [value for _, value in verdict.words] == sorted((v for _, v in verdict.words), reverse=True)


@pytest.mark.parametrize("hidden", ["A PІSTОL on a red background", "a pi\u200bstol on a r\u0301ed background"])
def test_disguises_change_no_score(guard: PromptGuard, hidden: str) -> None:
    assert torch.equal(guard.scores([hidden]), guard.scores([PROMPTS[0]]))


def test_of_two_readings_the_worse_counts(guard: PromptGuard) -> None:
    plain, hidden = guard.scores([PROMPTS[0]]), guard.scores(["a p1st0l on a red background"])
    assert bool((hidden >= plain - 1e-5).all())


def test_nothing_of_a_long_prompt_is_cut_off(guard: PromptGuard) -> None:
    filler = "a small cat on a large cat on a small dog on a large dog on a red background in noto style and "
    assert len(guard.encoder.windows(filler * 3)) > 5
    joined = " ".join(guard.encoder.windows(filler * 3 + "a pistol"))
    assert set((filler + "a pistol").split()) <= set(joined.split())
    tail = guard.encoder.windows(filler * 3 + "a pistol")[-1]
    assert tail.endswith("a pistol")
    assert bool((guard.scores([filler * 3 + "a pistol"]) >= guard.scores([tail]) - 1e-5).all())
    limit = guard.encoder.max_length
    assert all(len(guard.encoder.tokenizer(w).input_ids) <= limit for w in guard.encoder.windows("pistol" * 40))


def test_what_is_no_number_passes_nothing(guard: PromptGuard) -> None:
    with torch.no_grad():
        guard.head.tempr.fill_(math.nan)
    with pytest.raises(SafelightError, match="no prompt passes unjudged"):
        guard.check(PROMPTS)


def test_only_texts_are_judged(guard: PromptGuard) -> None:
    with pytest.raises(SafelightError, match="expected texts, got int"):
        guard.check([1])  # type: ignore[list-item]
    assert guard.check([]) == []


# -- calibration -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_concept", [False, True])
def test_calibrated_prompts_are_rarely_blocked(guard: PromptGuard, per_concept: bool) -> None:
    colours = ["red", "blue", "green", "grey", "pink", "white", "purple", "yellow"]
    things = ["cat", "dog", "car", "key", "moon", "rose", "bus", "pizza", "cake", "owl", "fox", "pig", "bee"]
    prompts = [f"a {thing} on a {colour} background" for colour in colours for thing in things]
    threshold = guard.calibrate(prompts[:80], target_fpr=0.05, per_concept=per_concept)
    blocked = [verdict.blocked for verdict in guard.check(prompts[:80])]
    assert sum(blocked) <= 6
    assert guard.threshold == threshold
    if per_concept:
        scores = guard.scores(prompts[:80:2])
        assert torch.allclose(scores.mean(0), torch.zeros(3).double(), atol=1e-5)
        assert torch.allclose(scores.std(0), torch.ones(3).double(), atol=1e-4)
    with pytest.raises(SafelightError, match="harmless prompts to calibrate on"):
        guard.calibrate(prompts[:5], target_fpr=0.01)


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_saved_guard_is_the_same_guard(guard: PromptGuard, tmp_path: Path) -> None:
    guard.bank.change("dagger", threshold=1.5)
    guard.save_pretrained(tmp_path / "export")
    again = LatentGuard.from_pretrained(tmp_path)
    assert again.check(PROMPTS) == guard.check(PROMPTS)
    assert list(again.bank) == list(guard.bank)
    again.add(["bomb"])
    assert again.scores(PROMPTS).shape == (3, 4)
    settings = json.loads((tmp_path / "export/guard.json").read_text())
    assert settings["threshold_cosine"] == pytest.approx(guard.threshold / float(guard.head.tempr))


def spoil_weights(folder: Path) -> None:
    state = load_file(folder / "head.safetensors")
    state["tempr"] = state["tempr"] + 1
    save_file(state, folder / "head.safetensors")


def drop(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (drop("guard.json"), "there is no guard.json"),
        (drop("head.safetensors"), "cannot be read"),
        (drop("concepts.json"), "list of concepts cannot be read"),
        (drop("concepts.safetensors"), "list of concepts cannot be read"),
        (spoil_weights, "do not belong together"),
        (lambda folder: (folder / "concepts.json").write_text("{"), "list of concepts cannot be read"),
    ],
)
def test_a_broken_guard_does_not_open(guard: PromptGuard, tmp_path: Path, spoil: Any, text: str) -> None:
    guard.save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(SafelightError, match=text):
        PromptGuard.from_pretrained(tmp_path, encoder=guard.encoder)


def test_a_guard_needs_a_threshold_and_its_own_encoder(encoder: TextEncoder) -> None:
    with pytest.raises(SafelightError, match="needs a number"):
        PromptGuard(encoder, new_head(), math.nan)
    with pytest.raises(SafelightError, match="width 8"):
        PromptGuard(encoder, EmbeddingMappingLayer(8), 0.0)


# -- command line ------------------------------------------------------------------------------------------------------


def told(monkeypatch: pytest.MonkeyPatch, capsys: Any, *words: Any) -> tuple[int, list[str], str]:
    monkeypatch.setattr("sys.argv", ["latent_guard", *map(str, words)])
    status = command_line()
    out, error = capsys.readouterr()
    return status, out.splitlines(), error


def test_a_file_of_prompts_is_judged_line_by_line(
    guard: PromptGuard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    scores = guard.scores(PROMPTS).amax(1)
    guard.threshold = float(scores.sort().values[1:].mean())
    guard.save_pretrained(tmp_path / "guard")
    (tmp_path / "prompts.txt").write_text("\n\n".join(PROMPTS), encoding="utf-8")
    status, lines, _ = told(monkeypatch, capsys, tmp_path / "guard", tmp_path / "prompts.txt", "--explain")
    assert status == 1
    assert [line.split("\t")[1] for line in lines[:3]] == [
        "BLOCKED" if s >= guard.threshold else "passed" for s in scores
    ]
    assert [float(line.split("\t")[2]) for line in lines[:3]] == pytest.approx(scores.tolist(), abs=1e-3)
    assert sum(len(line.split("\t")) == 6 for line in lines[:3]) == 1, "words of the blocked prompt"
    assert lines[3] == "1 of 3 prompts blocked, 3 concepts in the list"
    words = ("--only", "bomb", "skull", "--remove", "skull", "--threshold", 1000)
    status, lines, _ = told(monkeypatch, capsys, tmp_path / "guard", tmp_path / "prompts.txt", *words)
    assert (status, lines[3]) == (0, "0 of 3 prompts blocked, 1 concepts in the list")
    words = ("--list", "gore", "--add", "pistol", "--threshold", 1000)
    _, lines, _ = told(monkeypatch, capsys, tmp_path / "guard", tmp_path / "prompts.txt", *words)
    assert lines[3] == f"0 of 3 prompts blocked, {1 + len(CURATED['gore'])} concepts in the list"
    status, _, error = told(monkeypatch, capsys, tmp_path / "absent", tmp_path / "prompts.txt")
    assert (status, "there is no guard.json" in error) == (2, True)
    status, _, error = told(monkeypatch, capsys, tmp_path / "guard", tmp_path / "absent.txt")
    assert (status, "cannot be read" in error) == (2, True)


# -- encoders and features ---------------------------------------------------------------------------------------------


def test_clip_features_are_the_authors_rows() -> None:
    encoder = load_text_encoder({"pretrained": "zoo:tiny_clip", "pooling": "eos", "mask_padding": False})
    features = encoder(["A cat", "a small dog on a red background"])
    assert features.tokens.shape == (2, 17, 128)
    assert bool(features.mask.all())
    ids = encoder.tokenizer(["a cat"], padding="max_length", max_length=16, return_tensors="pt").input_ids
    output = encoder.model(input_ids=ids)
    assert torch.allclose(features.tokens[:1, 1:], output.last_hidden_state, atol=1e-5)
    # <start> a cat <end>: the pooled row is the state of the first end token, as in transformers.
    assert torch.allclose(features.pooled[0], output.last_hidden_state[0, 3], atol=1e-5)
    assert torch.allclose(features.pooled[:1], output.pooler_output, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_other_poolings(pooling: str) -> None:
    encoder = load_text_encoder({"pretrained": "zoo:tiny_clip", "pooling": pooling, "mask_padding": True})
    features = encoder(["a cat", "a small dog on a red background"])
    states = features.tokens[0, 1:5]
    assert features.mask.sum(1).tolist() == [5, 10]
    expected = states.mean(0) if pooling == "mean" else states[0]
    assert torch.allclose(features.pooled[0], expected, atol=1e-5)


def test_either_text_encoder_of_a_pipeline_will_do() -> None:
    folder = str(pipeline_folder("flux"))
    first = load_text_encoder(folder)
    given = {"pretrained": folder, "component": "text_encoder_2", "pooling": "mean", "mask_padding": True}
    second = load_text_encoder(given)
    assert (first.model.config.model_type, second.model.config.model_type) == ("clip_text_model", "t5")
    for encoder in (first, second):
        features = encoder(["a cat", "a small dog"])
        assert features.tokens.shape[::2] == (2, encoder.dim)
        assert not torch.equal(features.pooled[0], features.pooled[1])
    with pytest.raises(SafelightError, match="has no text_encoder_3"):
        load_text_encoder({"pretrained": folder, "component": "text_encoder_3"})
    with pytest.raises(SafelightError, match="say how a text is pooled"):
        load_text_encoder({"pretrained": folder, "component": "text_encoder_2"})


@pytest.mark.parametrize(
    ("encoder", "text"),
    [
        ("/absent/folder", "cannot be opened"),
        ({"pretrained": "tiny_clip", "pooling": "max"}, "none of eos, mean, cls"),
        ({"pretrained": "tiny_clip", "max_length": 99}, "reads 4 to 16 tokens"),
        ({"pretrained": "tiny_clip", "size": 1}, "size"),
        ({"pooling": "eos"}, "pretrained is missing"),
    ],
)
def test_encoders_that_cannot_be_opened(encoder: Any, text: str) -> None:
    with pytest.raises(SafelightError, match=text):
        load_text_encoder(encoder)


def test_features_are_kept_and_do_not_depend_on_company(encoder: TextEncoder, tmp_path: Path) -> None:
    store = FeatureStore(encoder, tmp_path)
    assert store.add([*PROMPTS, "A small CAT"]) == 3
    again, alone = FeatureStore(encoder, tmp_path), FeatureStore(encoder)
    assert len(again) == 3
    assert again.add(PROMPTS) == 0
    together = again(PROMPTS)
    for place, prompt in enumerate(PROMPTS):
        single = alone([prompt])
        length = single.tokens.shape[1]
        assert torch.equal(single.tokens[0], together.tokens[place, :length])
        assert together.mask[place].sum() == length
    # fp16, and no padding is stored.
    lengths = [len(encoder.tokenizer(prompt).input_ids) + 1 for prompt in PROMPTS]
    assert again.bytes == sum(lengths) * 128 * 2
    other = load_text_encoder({"pretrained": "tiny_clip", "pooling": "mean"})
    assert len(FeatureStore(other, tmp_path)) == 0, "another pooling makes other features"


def test_a_damaged_cache_is_made_again(encoder: TextEncoder, tmp_path: Path) -> None:
    FeatureStore(encoder, tmp_path).add(PROMPTS)
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    store = FeatureStore(encoder, tmp_path)
    assert len(store) == 0
    assert store.add(PROMPTS) == 3


# -- pipelines ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["unet_sd", "unet_sdxl", "flux"])
def pipeline(request: pytest.FixtureRequest) -> Any:
    return build_pipeline(request.param)


def guarded(pipeline: Any, threshold: float = 1000.0) -> GuardedPipeline:
    encoder = TextEncoder(
        pipeline.text_encoder, pipeline.tokenizer, pooling="eos", mask_padding=False, name="own",
        max_length=min(pipeline.tokenizer.model_max_length, pipeline.text_encoder.config.max_position_embeddings),
    )  # fmt: skip
    torch.manual_seed(0)
    head = EmbeddingMappingLayer(encoder.dim, num_heads=2, head_dim=4, dim_out=8)
    guard = PromptGuard(encoder, head, threshold)
    guard.bank.extend(["pistol", "dagger"])
    return GuardedPipeline(pipeline, guard)


def settings(pipeline: Any) -> dict[str, Any]:
    size = {} if hasattr(pipeline, "unet") else {"height": 16, "width": 16}
    return {"num_inference_steps": 2, "output_type": "np", "generator": torch.Generator().manual_seed(0), **size}


def test_what_passes_is_drawn_as_before_from_the_same_encoding(pipeline: Any) -> None:
    plain = pipeline("a cat", **settings(pipeline)).images
    calls: list[int] = []
    hook = pipeline.text_encoder.register_forward_hook(lambda *args: calls.append(1))
    pipeline("a cat", **settings(pipeline))
    needed = len(calls)
    wrapped = guarded(pipeline)
    calls.clear()
    assert (wrapped("a cat", **settings(pipeline)).images == plain).all()
    assert len(calls) == needed, "the guard encoded the prompt again"
    hook.remove()
    (verdict,) = wrapped.verdicts
    assert verdict.score == pytest.approx(float(wrapped.guard.scores(["a cat"]).max()), abs=1e-4)
    assert not pipeline.text_encoder._forward_hooks


def test_nothing_is_drawn_for_a_blocked_prompt(pipeline: Any) -> None:
    wrapped = guarded(pipeline, threshold=-1000.0)
    denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    calls: list[int] = []
    hook = denoiser.register_forward_hook(lambda *args: calls.append(1))
    with pytest.raises(BlockedPromptError, match=r"1 of 1 prompt\(s\) blocked") as caught:
        wrapped("a secret wish", **settings(pipeline))
    hook.remove()
    assert calls == []
    assert "secret" not in str(caught.value)
    assert caught.value.verdicts[0].prompt == "a secret wish"


def test_disguised_and_long_prompts_are_read_in_full(pipeline: Any) -> None:
    wrapped = guarded(pipeline)
    for prompt in ("a p1st0l", "a pіstol", "a cat on a mat and " * 30 + "a pistol"):
        wrapped(prompt, **settings(pipeline))
        assert wrapped.verdicts[0].score == pytest.approx(float(wrapped.guard.scores([prompt]).max()), abs=1e-4)


def test_without_a_text_nothing_is_drawn(pipeline: Any) -> None:
    wrapped = guarded(pipeline)
    with pytest.raises(SafelightError, match="embeddings cannot be judged"):
        wrapped(prompt_embeds=torch.zeros(1, 4, 8))
    with pytest.raises(SafelightError, match="only texts can be judged"):
        wrapped("a cat", prompt_embeds=torch.zeros(1, 4, 8))


def test_a_guard_with_another_encoder_judges_first(pipeline: Any, encoder: TextEncoder) -> None:
    guard = PromptGuard(encoder, new_head(), threshold=-1000.0)
    guard.add(["pistol"])
    wrapped = GuardedPipeline(pipeline, guard)
    assert not wrapped.shares_features
    with pytest.raises(BlockedPromptError):
        wrapped("a cat", **settings(pipeline))
    guard.threshold = 1000.0
    assert wrapped("a cat", **settings(pipeline)).images.shape[0] == 1


def test_a_guard_opens_on_the_encoder_of_the_pipeline(tmp_path: Path) -> None:
    pipeline = build_pipeline("unet_sd")
    wrapped = guarded(pipeline)
    wrapped.guard.save_pretrained(tmp_path)
    again = GuardedPipeline.with_own_encoder(pipeline, tmp_path)
    assert again.shares_features
    assert torch.equal(again.guard.scores(PROMPTS), wrapped.guard.scores(PROMPTS))
