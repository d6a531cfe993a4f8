"""The parts of the map from vision to language: where vectors are written, which tokens are answers, what is judged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.errors import SafelightError
from safelight.lightning_modules.vision_mapping.adapters import load_adapter, new_adapter
from safelight.lightning_modules.vision_mapping.conversations import Chat
from safelight.lightning_modules.vision_mapping.judging import OracleJudge
from safelight.lightning_modules.vision_mapping.objective import answer_losses, answered_exactly, mean_loss
from safelight.lightning_modules.vision_mapping.probe import convergence_layer, peaks, strongest
from safelight.lightning_modules.vision_mapping.splicing import check_positions, rescaled, token_vectors, written
from safelight.probing.language import load_tokenizer

IDS = torch.randint(0, 20, (2, 9), generator=torch.Generator().manual_seed(0))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return _made(GPT2LMHeadModel, GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=3, n_head=2))


def gemma2() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    return _made(Gemma2ForCausalLM, Gemma2Config(vocab_size=20, num_key_value_heads=1, head_dim=8, **sizes))


def pythia() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    return _made(GPTNeoXForCausalLM, GPTNeoXConfig(vocab_size=20, **sizes))


def _made(kind: Any, config: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = kind(config).eval().requires_grad_(False)
    return model


@pytest.mark.parametrize("family", [gpt2, gemma2, pythia])
def test_words_written_as_vectors_are_words(family: Any) -> None:
    model = family()
    check_positions(model)
    plain = model(input_ids=IDS).logits
    vectors = token_vectors(model, IDS)
    other = IDS.clone()
    other[:, 1:5] = 0
    assert not torch.allclose(model(input_ids=other).logits, plain, atol=1e-3)
    with written(model, vectors[:, 1:5], 1):
        after = model(input_ids=other).logits
    # Learned positions are taken away and added again, which rounds.
    assert torch.allclose(after, plain, atol=1e-6)
    # Moved by one place they are the same words elsewhere.
    shifted = torch.cat([IDS[:, :2], IDS[:, 1:5], IDS[:, 6:]], 1)
    moved = model(input_ids=shifted).logits
    blank = shifted.clone()
    blank[:, 2:6] = 0
    with written(model, vectors[:, 1:5], 2):
        assert torch.allclose(model(input_ids=blank).logits, moved, atol=1e-6)


@pytest.mark.parametrize("family", [gpt2, gemma2, pythia])
def test_only_what_comes_behind_sees_a_picture(family: Any) -> None:
    model = family()
    plain = model(input_ids=IDS).logits
    visual = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))
    with written(model, visual, 2):
        after = model(input_ids=IDS).logits
    assert torch.equal(after[:, :2], plain[:, :2])
    assert all(not torch.allclose(after[:, place], plain[:, place], atol=1e-4) for place in range(2, 9))


def test_a_picture_has_to_fit() -> None:
    model = gpt2()
    with (
        written(model, torch.zeros(2, 9, 16), 1),
        pytest.raises(SafelightError, match="9 vectors for 2 rows do not fit from position 1 on"),
    ):
        model(input_ids=IDS)


def test_norms_of_words() -> None:
    found = rescaled(torch.randn(2, 3, 4), torch.tensor(5.0))
    assert torch.allclose(found.norm(dim=-1), torch.full((2, 3), 5.0))


def test_answers_are_what_the_assistant_says_and_how_it_stops() -> None:
    chat = Chat(load_tokenizer("zoo:tiny_lm"))
    talk = [("what is this?", "octopus"), ("how big is it?", "small")]
    batch = chat.batch([talk, talk[:1]], [[5] * 3, [5] * 2], 64)
    decode = chat.tokenizer.decode
    assert decode(batch.ids[0][batch.turns[0] == 1]) == " octopus\n"
    assert decode(batch.ids[0][batch.turns[0] == 2]) == " small\n"
    assert batch.inserted[0].nonzero().flatten().tolist() == [1, 2, 3]
    assert decode(batch.ids[0][batch.after[0]]) == "question: what is this?\nanswer:"
    assert batch.mask[1].sum() == len(chat.turns(tuple(talk[:1])).ids) + 2
    assert not batch.turns[1][batch.mask[1] == 0].any()


def test_each_turn_counts_alike_and_nothing_else_counts() -> None:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 7, (2, 8), generator=draw)
    logits = torch.randn(2, 8, 7, generator=draw)
    turns = torch.tensor([[0, 0, 1, 1, 1, 0, 2, 0], [0, 0, 0, 1, 1, 0, 0, 0]])

    def cost(row: int, place: int) -> Tensor:
        return F.cross_entropy(logits[row, place - 1], ids[row, place])

    first = (torch.stack([cost(0, 2), cost(0, 3), cost(0, 4)]).mean() + cost(0, 6)) / 2
    second = torch.stack([cost(1, 3), cost(1, 4)]).mean()
    losses, answered = answer_losses(logits, ids, turns)
    assert torch.allclose(losses, torch.stack([first, second]))
    assert float(mean_loss(losses, answered)) == pytest.approx(float((first + second) / 2))
    changed = logits.clone()
    changed[0, [0, 4, 6, 7]] += 3 * torch.randn(4, 7, generator=draw)
    changed[1, [0, 1, 4, 5, 6, 7]] += 3
    assert torch.equal(answer_losses(changed, ids, turns)[0], losses)
    part = answer_losses(logits[:, 1:], ids, turns)[0]
    assert torch.equal(part, losses), "the first positions predict no answer"


def test_an_answer_is_right_to_its_end() -> None:
    ids, turns = torch.tensor([[0, 3, 4, 5]]), torch.tensor([[0, 0, 1, 1]])
    logits = torch.zeros(1, 4, 6)
    logits[0, 1, 4] = logits[0, 2, 5] = 1
    assert answered_exactly(logits, ids, turns).tolist() == [True]
    logits[0, 2, 2] = 2
    assert answered_exactly(logits, ids, turns).tolist() == [False]


def test_the_strongest_features_that_may_be_shown() -> None:
    codes = torch.tensor([[[0.0, 3.0, 1.0, 5.0], [2.0, 0.0, 0.0, 9.0]]])
    mask = torch.tensor([[True, False]])
    peak = peaks(codes, mask)
    assert peak.tolist() == [[0.0, 3.0, 1.0, 5.0]]
    usable = torch.tensor([True, True, True, False])
    assert strongest(peak, usable, 3) == [[1, 2]], "silent and forbidden ones are not among them"


def test_an_oracle_is_right_about_its_own_and_wrong_about_others() -> None:
    judge = OracleJudge({"legs": {"octopus", "spider"}, "wings": {"owl"}})
    told = [["wings", "legs"], ["wings"], ["wings"]]
    assert judge(told, ["spider", "owl", "octopus"], None) == [True, True, False]
    assert judge(told, ["owl", "octopus", "spider"], None) == [True, False, False]


def test_where_layers_become_alike() -> None:
    text = {0: 10.0, 1: 10.0, 2: 10.0, 3: 10.0}
    assert convergence_layer({0: 80.0, 1: 12.0, 2: 11.0, 3: 9.0}, text) == 1
    assert convergence_layer({0: 10.0, 1: 40.0, 2: 11.0, 3: 9.0}, text) == 2, "and stay so"
    assert convergence_layer({0: 10.0, 1: 10.0, 2: 10.0, 3: 40.0}, text) == -1


@pytest.mark.parametrize("prefix", ["", "module.", "projection."])
def test_the_authors_files_can_be_read(prefix: str, tmp_path: Any) -> None:
    saved, fresh = new_adapter("linear", 4, 3, 0), new_adapter("linear", 4, 3, 1)
    torch.save({f"{prefix}{name}": value for name, value in saved.state_dict().items()}, tmp_path / "a.pth")
    load_adapter(fresh, str(tmp_path / "a.pth"))
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in fresh.state_dict().items())
    with pytest.raises(SafelightError, match="this adapter is"):
        load_adapter(new_adapter("linear", 5, 3, 0), str(tmp_path / "a.pth"))
