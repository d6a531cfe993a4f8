"""The map from vision to language on models made here: what is read where, from files and from pictures, and a toy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.lightning_modules import VisionMapping
from safelight.lightning_modules.vision_mapping.adapters import new_adapter
from safelight.lightning_modules.vision_mapping.conversations import Batch, Chat
from safelight.lightning_modules.vision_mapping.descriptions import (
    Described,
    WordsAtFeatures,
    read_descriptions,
    words_of,
)
from safelight.lightning_modules.vision_mapping.dictionaries import RandomDirections, sources_by_layer
from safelight.lightning_modules.vision_mapping.evaluation import Evaluation
from safelight.lightning_modules.vision_mapping.judging import ChatJudge, LexicalJudge, PictureJudge, load_judge
from safelight.lightning_modules.vision_mapping.objective import answer_losses, answered_exactly, mean_loss
from safelight.lightning_modules.vision_mapping.probe import Probe, convergence_layer
from safelight.lightning_modules.vision_mapping.reading import noisy, recomputed, run, without_softcap
from safelight.lightning_modules.vision_mapping.splicing import check_positions, over
from safelight.metrics.samples import mean_interval
from safelight.probing.dictionary import SparseDictionary
from safelight.probing.vision import VisionTower, front_tokens, load_vision_model, patch_features, pooled

# -- language models ---------------------------------------------------------------------------------------------------


def gemma(layers: int = 3, width: int = 32, vocabulary: int = 40, **further: Any) -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, intermediate_size=2 * width,
            num_attention_heads=4, num_key_value_heads=2, head_dim=width // 4, max_position_embeddings=64,
            attn_implementation="eager", pad_token_id=0, **further,
        )
    ).eval()  # fmt: skip


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=3, n_head=4, n_positions=32)).eval()


def rows(ids: Tensor, start: int = 5, stop: int = 7, inserted: int = 3) -> Batch:
    """Rows with pictures from position 1 on and an answer."""
    turns, placed, prompt = torch.zeros_like(ids), torch.zeros_like(ids).bool(), torch.zeros_like(ids).bool()
    turns[:, start:stop], placed[:, 1 : 1 + inserted], prompt[:, :start] = 1, True, True
    return Batch(ids, torch.ones_like(ids), turns, placed, prompt)


IDS = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("made", [gemma, gpt2])
def test_embeddings_in_place_of_their_tokens_change_no_bit(made: Any) -> None:
    model, batch = made(), rows(IDS)
    with torch.no_grad():
        blank = batch.ids.clone()
        blank[:, 1:4] = 0
        change = over(model, model.get_input_embeddings()(IDS[:, 1:4]), 1)
        found = run(model, Batch(blank, batch.mask, batch.turns, batch.inserted, batch.prompt), change, [0, 2])
        plain = model(input_ids=IDS, output_hidden_states=True)
    assert found.logits.shape[1] == 9 - 4, "from the position before the answer on"
    assert torch.equal(found.logits, plain.logits[:, 4:])
    # A layer is what its block puts out; transformers' last hidden state has the final norm in it.
    assert torch.equal(found.states[0], plain.hidden_states[1])
    assert not torch.allclose(found.states[0], plain.hidden_states[2])
    assert not torch.allclose(found.states[2], plain.hidden_states[3])


def test_positions_that_hide_elsewhere_are_noticed() -> None:
    class Hidden(nn.Module):
        """Adds positions under a name that nobody knows."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.where = gemma(), nn.Parameter(torch.randn(64, 32))
            self.layers = self.inner.model.layers

        def forward(self, input_ids: Tensor) -> Any:
            vectors = self.inner.get_input_embeddings()(input_ids) + self.where[: input_ids.shape[1]]
            return self.inner(inputs_embeds=vectors)

    with pytest.raises(SafelightError, match="adds something to its embeddings"):
        check_positions(Hidden())


def test_the_cap_on_logits_is_left_out_only_on_demand() -> None:
    model, batch = gemma(final_logit_softcapping=0.5), rows(IDS)
    capped = run(model, batch, None).logits
    with without_softcap(model, True):
        free = run(model, batch, None).logits
    with without_softcap(model, False):
        assert torch.equal(run(model, batch, None).logits, capped)
    assert model.config.final_logit_softcapping == 0.5
    assert torch.allclose(0.5 * torch.tanh(free / 0.5), capped, atol=1e-6)
    assert not torch.allclose(free, capped, atol=1e-3)


@pytest.mark.parametrize("made", [gemma, gpt2])
def test_computing_again_gives_the_same_gradients(made: Any) -> None:
    model, batch = made().requires_grad_(False), rows(IDS)
    found = []
    for again in (False, True):
        calls: list[int] = []
        handle = list(model.modules())[-1].register_forward_hook(lambda *_: None)
        watch = [
            block.register_forward_pre_hook(lambda *_: calls.append(1))  # noqa: B023
            for block in (model.model.layers if made is gemma else model.transformer.h)[1].children()
        ]
        visual = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with recomputed(model, again):
            logits = run(model, batch, over(model, visual, 1)).logits
        once = len(calls)
        mean_loss(*answer_losses(logits, batch.ids, batch.turns)).backward()  # type: ignore[no-untyped-call]
        assert (len(calls) > once) == again
        found.append(visual.grad)
        for hook in [handle, *watch]:
            hook.remove()
    assert all("forward" not in vars(module) for module in model.modules())
    assert float(found[0].abs().sum()) > 0
    assert torch.allclose(found[0], found[1], atol=1e-7)


def test_noise_is_as_long_as_the_word_it_is_added_to() -> None:
    entering = torch.randn(2, 4, 8) * torch.tensor([1.0, 10.0, 100.0, 3.0])[:, None]
    mask = torch.tensor([[True, True, False, True]] * 2)
    added = noisy(mask, torch.randn(2, 4, 8))(entering) - entering
    assert torch.allclose(added.norm(dim=-1)[mask], entering.norm(dim=-1)[mask], rtol=1e-4)
    assert not added[~mask].any()


# -- conversations -----------------------------------------------------------------------------------------------------

TURNS = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn> {{ 'model' if m['role'] == 'assistant' else m['role'] }}"
    "\n{{ m['content'] }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn> model\n{% endif %}"
)
WORDS = [
    "<pad>",
    "<bos>",
    "<end_of_turn>",
    "<start_of_turn>",
    "<unk>",
    "\n",
    "user",
    "model",
    "what",
    "is",
    "red",
    "cat",
]


def tokenizer(template: str | None) -> Any:
    """Whole words, line breaks by themselves, and a template like Gemma's."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    lines = pre_tokenizers.Split(Regex(r"\n| "), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([lines, pre_tokenizers.Split(" ", "removed")])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=["<end_of_turn>", "<start_of_turn>"],
    )  # fmt: skip
    if template is not None:
        made.chat_template = template
    return made


def test_the_token_that_ends_a_turn_is_said_and_the_line_break_behind_it_is_not() -> None:
    chat = Chat(tokenizer(TURNS))
    found = chat.turns((("what is", "red cat"), ("is", "cat")))
    said = [[WORDS[token] for token in found.ids[start:stop]] for start, stop in found.spans]
    assert said == [["red", "cat", "<end_of_turn>"], ["cat", "<end_of_turn>"]]
    assert WORDS[found.ids[found.spans[0][0] - 1]] == "\n"


def test_what_is_too_long_is_cut_and_answers_behind_the_cut_are_dropped() -> None:
    chat = Chat(tokenizer(TURNS))
    talk = (("what is", "red cat"), ("is", "cat"))
    (start, _), (later, _) = chat.turns(talk).spans
    batch = chat.batch([talk, talk[1:]], [[4, 4], [4, 4]], start + 1)
    assert batch.turns[0].tolist() == [0] * (start + 2) + [1], "one word of the first answer is left"
    assert batch.ids.shape[1] == start + 1 + 2
    assert chat.batch([talk], [[]], later).turns.max() == 1
    assert chat.batch([talk], [[]], later + 1).turns.max() == 2
    # A model's positions are shared with what is inserted.
    assert chat.batch([talk], [[4] * 5], 100, longest=12).ids.shape[1] == 12


def test_a_tokenizer_without_a_template_is_refused() -> None:
    with pytest.raises(SafelightError, match="no chat template"):
        Chat(tokenizer(None))


# -- vision ------------------------------------------------------------------------------------------------------------


def tower(kind: str = "clip") -> VisionTower:
    from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    of = {"clip": (CLIPVisionModel, CLIPVisionConfig), "siglip": (SiglipVisionModel, SiglipVisionConfig)}[kind]
    model = of[0](of[1](image_size=32, patch_size=8, **sizes))
    return VisionTower(model, [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]).eval()


def test_patches_are_those_of_the_block_that_is_named() -> None:
    model, images = tower(), torch.rand(2, 3, 32, 32) * 2 - 1
    pixels = ((images + 1) / 2 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.25, 0.5]).view(
        3, 1, 1
    )
    with torch.no_grad():
        seen = model.tower(pixel_values=pixels, output_hidden_states=True).hidden_states
    assert torch.allclose(patch_features(model, images), seen[-1][:, 1:], atol=1e-6)
    assert torch.allclose(patch_features(model, images, -2), seen[-2][:, 1:], atol=1e-6)
    assert torch.allclose(patch_features(model, images, 0), seen[1][:, 1:], atol=1e-6)
    assert torch.allclose(patch_features(model, images, drop_cls=False), seen[-1], atol=1e-6)


def test_siglip_has_no_class_token_and_its_last_norm_is_left_out() -> None:
    model, images = tower("siglip"), torch.rand(1, 3, 32, 32)
    assert front_tokens(model) == 0
    found = patch_features(model, images)
    assert found.shape == (1, 16, 16)
    with torch.no_grad():
        output = model.tower(pixel_values=model.normalised(images)).last_hidden_state
        normed = model.tower.post_layernorm(found)  # type: ignore[operator]
    assert torch.allclose(normed, output, atol=1e-5)
    assert not torch.allclose(found, output, atol=1e-2)


def test_pictures_of_another_size_are_refused() -> None:
    with pytest.raises(SafelightError, match=r"set data\.image_size=32"):
        patch_features(tower(), torch.zeros(1, 3, 64, 64))
    with pytest.raises(SafelightError, match="expected"):
        patch_features(tower(), torch.zeros(1, 3, 32, 16))


def test_neighbours_are_averaged() -> None:
    grid = torch.arange(16.0).view(1, 16, 1)
    assert pooled(grid, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert pooled(grid, 1) is grid
    with pytest.raises(SafelightError, match="pool=3"):
        pooled(grid, 3)


def test_how_pictures_are_normalised_must_be_known(tmp_path: Path) -> None:
    tower().tower.save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(SafelightError, match="is not known"):
        load_vision_model(str(tmp_path))
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 3.0]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    made = load_vision_model(str(tmp_path))
    assert torch.allclose(made.normalised(torch.ones(1, 3, 32, 32))[0, :, 0, 0], torch.tensor([0.9, 0.4, 0.7 / 3]))
    assert not any(parameter.requires_grad for parameter in made.parameters())


# -- what features stand for -------------------------------------------------------------------------------------------


def test_a_token_stands_for_the_word_it_is_a_part_of() -> None:
    assert words_of(["a", "Ġoct", "opus", "Ċ", "question", ":", "▁Hot"]) == [
        "a", "octopus", "octopus", "⏎", "question", ":", "hot"
    ]  # fmt: skip


def test_features_are_described_by_where_they_are_strongest() -> None:
    found = WordsAtFeatures(3, top=2)
    found.add(torch.tensor([[1.0, 0, 0], [3.0, 0, 2.0], [2.0, 0, 0]]), ["sun", "cat", "owl"])
    found.add(torch.tensor([[0.5, 0, 5.0]]), ["cat"])
    made = found.described()
    assert made.texts == {0: "cat, owl", 2: "cat"}
    assert made.usable(3, None).tolist() == [True, False, True]
    assert Described({0: "a", 1: "b"}, {0: 0.3}).usable(2, 0.005).tolist() == [False, True]


def test_explanations_of_neuronpedia(tmp_path: Path) -> None:
    folder = tmp_path / "3-gemmascope-res-16k"
    folder.mkdir()
    features = [
        {"explanations": [{"description": "cats"}], "frac_nonzero": 0.001},
        {"explanations": [], "frac_nonzero": 0.2},
        {"index": "140", "explanations": [{"description": "owls"}]},
    ]
    (folder / "128-255.json").write_text(json.dumps(features))
    found = read_descriptions(str(tmp_path), [3])[3]
    assert found.texts == {128: "cats", 140: "owls"}
    assert found.density == {128: 0.001, 129: 0.2}
    with pytest.raises(SafelightError, match="has no 2-"):
        read_descriptions(str(tmp_path), [2])


def test_judges() -> None:
    told = [["cat, sun", "a"], ["on the cats"], []]
    assert LexicalJudge()(told, ["a cat", "the cat", "cat"], None) == [True, False, False], (
        "function words match nothing"
    )
    asked: list[str] = []

    def ask(prompt: str) -> str:
        asked.append(prompt)
        return ["It says: YES", "no idea"][len(asked) - 1]

    assert ChatJudge(ask)(told, ["cat", "dog", "owl"], None) == [True, False, False]
    assert len(asked) == 2, "nothing is asked about nothing"
    assert "cat, sun" in asked[0]

    class Detector:
        def detect(self, pictures: Tensor, concept: str) -> Any:
            assert float(pictures.min()) >= 0
            assert float(pictures.max()) <= 1
            return type("Found", (), {"found": [len(concept) > 3 and bool(pictures.mean() > 0.4)]})

    verdicts = PictureJudge(Detector())(
        told, ["", "", ""], torch.tensor([1.0, -1.0, 1.0]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    )
    assert verdicts == [True, False, False]
    with pytest.raises(SafelightError, match="give lexical"):
        load_judge("chat:")


def test_where_dictionaries_are() -> None:
    assert sources_by_layer("a/{layer}/b", [0, 3]) == {0: "a/0/b", 3: "a/3/b"}
    assert sources_by_layer({"1": "x", 2: "y"}, [1]) == {1: "x"}  # type: ignore[dict-item]
    with pytest.raises(SafelightError, match=r"none for layers \[3\]"):
        sources_by_layer({1: "x"}, [1, 3])
    with pytest.raises(SafelightError, match="write {layer}"):  # noqa: RUF043
        sources_by_layer("a/b", [0, 1])


def test_random_directions_get_the_best_length() -> None:
    pytest.importorskip("sae_lens")
    dictionary = SparseDictionary(8, 32, k=4, scale=2.0)
    with torch.no_grad():
        dictionary.sae.b_dec.copy_(torch.arange(8.0))
    control = RandomDirections(dictionary, 4, seed=0)
    x = torch.randn(20, 8) + torch.arange(8.0) / 2
    codes = control.encode(x)
    assert (codes != 0).sum(1).max() == 4
    made, away = control.decode(codes), x - torch.arange(8.0) / 2
    assert (x - made).norm(dim=1).le(away.norm(dim=1) + 1e-5).all()
    direction = made - torch.arange(8.0) / 2
    assert torch.allclose(((x - made) * direction).sum(1), torch.zeros(20), atol=1e-4), "no other length is nearer"


# -- figures -----------------------------------------------------------------------------------------------------------


def test_the_published_curve_comes_near_at_layer_17() -> None:
    # L0 of text and of visual tokens, read off the paper's figure (layer: text, visual).
    curve = {
        0: (140, 1126), 1: (84, 1046), 2: (104, 1112), 4: (106, 782), 6: (84, 342), 8: (172, 317), 10: (124, 289),
        12: (131, 287), 14: (108, 196), 16: (91, 148), 17: (95, 121), 18: (74, 71), 19: (86, 63), 20: (81, 70),
        22: (81, 70), 24: (76, 66), 25: (133, 142),
    }  # fmt: skip
    text, visual = ({layer: float(pair[side]) for layer, pair in curve.items()} for side in (0, 1))
    assert convergence_layer(visual, text) == 17


def test_verdicts_count_each_picture_once_and_beside_their_chance() -> None:
    probe = Probe(4, torch.device("cpu"))
    for index, right, chance in (([0, 1], [True, True], [False, True]), ([1, 2], [True, False], [True, False])):
        probe.judge(("trained", "vlm_img", 0), right, chance, torch.tensor(index))
    found = {row.metric: row for row in probe.rows(200, 0)}
    assert found["match_rate"].mean == pytest.approx(2 / 3)
    assert found["match_chance"].mean == pytest.approx(1 / 3)
    assert found["match_rate"].n == 3
    assert found["match_rate"].low <= 2 / 3 <= found["match_rate"].high
    low, high = mean_interval(torch.tensor([0.0, 1.0] * 50), 2000, 0)
    assert (low, high) == (pytest.approx(0.4, abs=0.03), pytest.approx(0.6, abs=0.03))


def test_another_picture_is_a_function_of_the_index() -> None:
    class Holder(Evaluation):
        def __init__(self, seed: int = 0) -> None:
            self.pool_index = [10, 20, 30]
            self.module = type("Module", (), {"hparams": type("H", (), {"seed": seed})})()  # type: ignore[assignment]

    index = torch.arange(60)
    found = Holder().donors(index)
    assert found == [place for own in index for place in Holder().donors(own[None])]
    own = torch.tensor([10, 20, 30])
    assert all(place != number for seed in range(20) for number, place in enumerate(Holder(seed).donors(own)))
    assert {found.count(place) > 10 for place in range(3)} == {True}


def test_the_first_weights_can_be_made_small() -> None:
    plain, small = (new_adapter(kind, 6, 4, 3, gain) for kind, gain in (("linear", 1.0), ("linear", 0.25)))  # type: ignore[arg-type]
    assert torch.equal(small.weight, 0.25 * plain.weight)  # type: ignore[operator]
    assert VisionMapping(layers=[0], init_gain=0.5, sae_expansion=1).projection.weight.abs().max() <= 0.5 * 128**-0.5


# -- a toy of the whole ------------------------------------------------------------------------------------------------

SCENES = torch.cartesian_prod(torch.arange(6), torch.arange(6))
"""Colour and shape."""
BOS, SCENE, ASK, END = 1, 2, 3, 6
"""Then 4 and 5 ask for colour and shape, and from 7 on there are six words of either."""


def told(scene: Tensor, about: int) -> tuple[list[int], int]:
    colour, shape = (7 + int(scene[0])), (13 + int(scene[1]))
    return [BOS, colour, shape, SCENE, ASK, 4 + about], (colour, shape)[about]


def talk(scenes: Tensor, abouts: Tensor, visual: bool) -> Batch:
    lines = [told(scene, int(about)) for scene, about in zip(scenes, abouts, strict=True)]
    ids = torch.tensor([[*prompt, answer, END] for prompt, answer in lines])
    if visual:
        ids[:, 1:3] = 0
    return rows(ids, 6, 8, inserted=2)


@pytest.mark.slow
def test_a_frozen_model_answers_about_pictures_and_only_about_those_it_sees() -> None:
    draw = torch.Generator().manual_seed(0)
    model = gemma(layers=3, width=48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 400)
    for _ in range(400):
        which, about = torch.randint(36, (64,), generator=draw), torch.randint(2, (64,), generator=draw)
        batch = talk(SCENES[which], about, visual=False)
        loss = mean_loss(*answer_losses(run(model, batch, None).logits, batch.ids, batch.turns))
        optimizer.zero_grad(), loss.backward(), optimizer.step(), schedule.step()  # type: ignore[no-untyped-call]
    model.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    looks = torch.randn(12, 2, 24, generator=draw)

    def see(scenes: Tensor) -> Tensor:
        noise = 0.1 * torch.randn(len(scenes), 2, 24, generator=draw)
        return torch.tanh(looks[scenes[:, 0]] + looks[6 + scenes[:, 1]]) + noise

    def accuracy(adapter: nn.Module, shuffled: bool) -> float:
        which, about = torch.randint(36, (400,), generator=draw), torch.randint(2, (400,), generator=draw)
        batch, seen = talk(SCENES[which], about, visual=True), see(SCENES[which])
        with torch.no_grad():
            visual = adapter(seen[torch.randperm(400, generator=draw)] if shuffled else seen)
            logits = run(model, batch, over(model, visual, 1)).logits
        return float(answered_exactly(logits, batch.ids, batch.turns).float().mean())

    adapter = new_adapter("linear", 24, 48, 0)
    assert accuracy(adapter, False) < 0.4
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 400)
    for _ in range(400):
        which, about = torch.randint(36, (64,), generator=draw), torch.randint(2, (64,), generator=draw)
        batch = talk(SCENES[which], about, visual=True)
        logits = run(model, batch, over(model, adapter(see(SCENES[which])), 1)).logits
        loss = mean_loss(*answer_losses(logits, batch.ids, batch.turns))
        optimizer.zero_grad(), loss.backward(), optimizer.step(), schedule.step()  # type: ignore[no-untyped-call]
    assert accuracy(adapter, False) >= 0.9
    assert accuracy(adapter, True) <= 0.25
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
