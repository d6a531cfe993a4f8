"""The embedding mapping layer against the authors' pairwise computation, and its loss against the formula."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from safelight.errors import SafelightError
from safelight.lightning_modules.latent_guard import head as heads
from safelight.lightning_modules.latent_guard.batches import labels, read_batch, to_ignore
from safelight.lightning_modules.latent_guard.head import EmbeddingMappingLayer, load_head
from safelight.lightning_modules.latent_guard.objective import concept_loss, guard_loss, prompt_loss

DIM, LENGTH = 24, 7


def layer(**settings: bool) -> EmbeddingMappingLayer:
    torch.manual_seed(0)
    return EmbeddingMappingLayer(DIM, num_heads=3, head_dim=5, dim_out=6, **settings).double()


def data(prompts: int = 4, concepts: int = 5) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return (
        torch.randn(prompts, LENGTH, DIM, generator=draw, dtype=torch.float64),
        torch.randn(concepts, DIM, generator=draw, dtype=torch.float64),
    )


def pairwise(head: EmbeddingMappingLayer, tokens: Tensor, concept: Tensor, mask: Tensor | None = None) -> Tensor:
    """One prompt and one concept, everything projected for the pair, head after head."""
    keys, values = head.x1_to_key(tokens), head.x1_to_value(tokens)
    query = head.x2_to_query(concept)
    mixed = []
    for number in range(head.num_heads):
        part = slice(number * head.head_dim, (number + 1) * head.head_dim)
        logits = keys[:, part] @ query[part] / math.sqrt(head.head_dim)
        if mask is not None:
            logits = torch.where(mask, logits, -math.inf)
        weights = logits.exp() / logits.exp().sum()
        mixed.append((weights[:, None] * values[:, part]).sum(0))
    prompt, own = head.final_mlp(torch.cat(mixed)), head.mlp_query1(query)
    return head.tempr * (prompt @ own) / (prompt.norm() * own.norm())


def test_factorised_scores_and_gradients_are_the_pairwise_ones() -> None:
    head = layer()
    tokens, pooled = data()
    mask = torch.ones(4, LENGTH, dtype=torch.bool)
    mask[1, 5:] = False
    fast = head(tokens, head.concepts(pooled), mask)
    rows = zip(tokens, mask, strict=True)
    slow = torch.stack([torch.stack([pairwise(head, row, c, m) for c in pooled]) for row, m in rows])
    assert torch.allclose(fast, slow, atol=1e-12)
    weight = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gradients = [torch.autograd.grad((scores * weight).sum(), list(head.parameters())) for scores in (fast, slow)]
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*gradients, strict=True))
    assert all(float(gradient.abs().sum()) > 0 for gradient in gradients[0])


def test_chunks_of_concepts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    head = layer()
    tokens, pooled = data(concepts=11)
    with torch.no_grad():
        whole = head(tokens, head.concepts(pooled))
        monkeypatch.setattr(heads, "CHUNK_VALUES", 4 * 3 * 5 * 2)  # two concepts at once
        seen: list[int] = []
        inner = head._cosines
        monkeypatch.setattr(head, "_cosines", lambda *a: (seen.append(len(a[2])), inner(*a))[1])
        assert torch.allclose(head(tokens, head.concepts(pooled)), whole, atol=1e-12)
    assert max(seen) == 2
    assert sum(seen) == 11


def test_latents_are_those_behind_the_scores() -> None:
    head = layer()
    tokens, pooled = data(prompts=5)
    concepts = head.concepts(pooled)
    own = F.cosine_similarity(head.latents(tokens, concepts), concepts.latent, dim=-1)
    assert torch.allclose(head.cosines(tokens, concepts).diagonal(), own)


def test_without_cross_attention_only_pooled_features_count() -> None:
    head = layer(cross_attention=False)
    tokens, pooled = data()
    before = head(tokens, head.concepts(pooled))
    tokens[:, 1:] = 0
    assert torch.equal(head(tokens, head.concepts(pooled)), before)
    assert not torch.allclose(before, layer()(tokens, layer().concepts(pooled)))
    own = F.cosine_similarity(head.latents(tokens, head.concepts(pooled[:4])), head.concepts(pooled[:4]).latent, dim=-1)
    assert torch.allclose(head.cosines(tokens, head.concepts(pooled[:4])).diagonal(), own)


@pytest.mark.parametrize("masked", [True, False])
def test_padding_counts_only_where_it_is_not_masked(masked: bool) -> None:
    head = layer()
    tokens, pooled = data()
    longer = torch.cat([tokens, torch.randn(4, 3, DIM, dtype=torch.float64)], 1)
    mask = torch.ones(4, LENGTH + 3, dtype=torch.bool)
    mask[:, LENGTH:] = not masked
    same = torch.allclose(head(tokens, head.concepts(pooled)), head(longer, head.concepts(pooled), mask))
    assert same is masked


def test_a_score_does_not_depend_on_other_prompts() -> None:
    head = layer()
    tokens, pooled = data()
    together = head(tokens, head.concepts(pooled))
    assert torch.allclose(together[2:3], head(tokens[2:3], head.concepts(pooled)))
    # Nor does the best score fall when a concept is added.
    fewer = head(tokens, head.concepts(pooled[:3]))
    assert bool((together.amax(1) >= fewer.amax(1) - 1e-12).all())


def test_size_and_names_are_those_of_the_released_weights(tmp_path: Path) -> None:
    head = EmbeddingMappingLayer(768)
    assert sum(p.numel() for p in head.parameters()) == 1_312_513
    assert sum(p.numel() for p in EmbeddingMappingLayer(384).parameters()) == 722_689
    shapes = {
        "x1_to_key": (512, 768), "x1_to_value": (512, 768), "x2_to_query": (512, 768), "final_mlp": (128, 512),
        "mlp_query1": (128, 512),
    }  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    state = {f"{name}.weight": torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    state |= {f"{name}.bias": torch.randn(shape[0], generator=draw) for name, shape in shapes.items()}
    state["tempr"] = torch.tensor(17.3)
    torch.save(state, tmp_path / "model_parameters.pth")
    load_head(head, tmp_path / "model_parameters.pth")
    assert all(torch.equal(value, state[name]) for name, value in head.state_dict().items())
    save_file(state, tmp_path / "head.safetensors")
    other = EmbeddingMappingLayer(768)
    load_head(other, tmp_path / "head.safetensors")
    assert torch.equal(other.x1_to_key.weight, head.x1_to_key.weight)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    torch.save({"x1_to_key.weight": torch.zeros(2, 2)}, tmp_path / "small.pth")
    torch.save(EmbeddingMappingLayer(DIM), tmp_path / "whole.pth")  # the authors' checkpoints are pickled modules
    (tmp_path / "no.safetensors").write_bytes(b"nothing")
    for name in ("small.pth", "whole.pth", "no.safetensors", "absent.pth"):
        with pytest.raises(SafelightError, match="pretrained"):
            load_head(EmbeddingMappingLayer(DIM), tmp_path / name)


def test_features_of_another_width_are_refused() -> None:
    head = layer()
    with pytest.raises(SafelightError, match="the encoder that the head was trained on"):
        head(torch.zeros(1, 3, DIM + 1, dtype=torch.float64), head.concepts(data()[1]))


# -- loss --------------------------------------------------------------------------------------------------------------


def scores(n: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, n, generator=draw).double() * 3, torch.randn(n, n, generator=draw).double() * 3


def test_losses_are_the_formulas() -> None:
    unsafe, safe = scores()
    n = len(unsafe)
    down, along = 0.0, 0.0
    for j in range(n):
        down -= math.log(
            math.exp(unsafe[j, j]) / (sum(math.exp(unsafe[i, j]) + math.exp(safe[i, j]) for i in range(n)))
        ) / n  # fmt: skip
    for i in range(n):
        others = sum(math.exp(unsafe[i, j]) for j in range(n)) + sum(math.exp(safe[k].max()) for k in range(n))
        along -= math.log(math.exp(unsafe[i, i]) / others) / n
    assert float(concept_loss(unsafe, safe)) == pytest.approx(down)
    assert float(prompt_loss(unsafe, safe)) == pytest.approx(along)
    assert float(guard_loss(unsafe, safe)) == pytest.approx(down + along)
    assert float(guard_loss(unsafe, safe, "supcon")) == pytest.approx(down)
    assert down != pytest.approx(along, rel=0.01)


@pytest.mark.parametrize("n", [64, 7])
def test_at_temperature_zero_everything_is_equally_likely(n: int) -> None:
    nothing = torch.zeros(n, n)
    assert float(guard_loss(nothing, nothing)) == pytest.approx(2 * math.log(2 * n), abs=1e-5)
    assert float(guard_loss(nothing, None)) == pytest.approx(2 * math.log(n), abs=1e-5)


def test_the_order_of_a_batch_does_not_matter() -> None:
    unsafe, safe = scores()
    order = torch.tensor([3, 1, 4, 0, 2])
    moved = unsafe[order][:, order], safe[order][:, order]
    assert float(guard_loss(*moved)) == pytest.approx(float(guard_loss(unsafe, safe)))


def test_harmless_prompts_are_further_safe_ones_and_the_margin_lifts_them() -> None:
    unsafe, safe = scores()
    more = torch.cat([safe, scores(seed=1)[1][:2]])
    assert float(guard_loss(unsafe, more)) > float(guard_loss(unsafe, safe))
    assert float(concept_loss(unsafe, safe, margin=1.0)) > float(concept_loss(unsafe, safe))


def test_ignored_prompts_are_no_negatives() -> None:
    unsafe, safe = scores()
    ignore = torch.zeros(5, 5, dtype=torch.bool)
    ignore[0, 1] = True
    loss = guard_loss(unsafe, safe, ignore=ignore)
    unsafe[0, 1] = 50.0
    assert float(guard_loss(unsafe, safe, ignore=ignore)) == pytest.approx(float(loss))
    assert float(guard_loss(unsafe, safe)) > float(loss) + 5


def test_what_is_ignored() -> None:
    concepts, categories = labels(["gun", "Gun ", "cat", "dog", "owl"]), labels(["a", "", "b", "b", ""])
    same = torch.zeros(5, 5, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    assert torch.equal(to_ignore(concepts, None), same)
    same[2, 3] = same[3, 2] = True
    assert torch.equal(to_ignore(concepts, categories), same)


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (["x"], "got list"),
        ({"unsafe": ["a"], "safe": ["b"]}, r"got \['safe', 'unsafe'\]"),
        ({"unsafe": ["a"], "safe": ["b", "c"], "concept": ["d"]}, "'safe': 2"),
        ({"unsafe": [], "safe": [], "concept": []}, "'concept': 0"),
    ],
)
def test_batches_that_cannot_be_read(batch: object, text: str) -> None:
    with pytest.raises(SafelightError, match=text):
        read_batch(batch)
