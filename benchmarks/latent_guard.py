"""What Latent Guard costs: factorised scores beside the authors' pairwise ones, the head beside its encoder, features.

    python benchmarks/latent_guard.py

Counted in multiply-adds at D = 768, 78 rows a prompt, C concepts: keys and values cost 61.3 M a prompt. Pairwise that
is paid for every pair, C * 61.3 M; factorised once a prompt, and C * 0.15 M more for attention and output. All figures
come from one process; weights and features are random, which changes no cost.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from tempfile import TemporaryDirectory

import torch
from ecodiff import machine
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from safelight import zoo
from safelight.lightning_modules.latent_guard.encoders import load_text_encoder
from safelight.lightning_modules.latent_guard.features import FeatureStore
from safelight.lightning_modules.latent_guard.head import EmbeddingMappingLayer
from safelight.lightning_modules.latent_guard.objective import guard_loss

DIM, ROWS, CONCEPTS = 768, 78, 578


def pairwise(head: EmbeddingMappingLayer, tokens: Tensor, pooled: Tensor) -> Tensor:
    """Scores of all pairs as the authors' code has them: every pair is a row of its own, projected by itself."""
    rows = []
    for prompt in tokens:
        pairs = prompt.expand(len(pooled), -1, -1)
        key, value, query = head.x1_to_key(pairs), head.x1_to_value(pairs), head.x2_to_query(pooled)
        key, value = (part.unflatten(-1, (head.num_heads, head.head_dim)).transpose(1, 2) for part in (key, value))
        heads = query.unflatten(-1, (head.num_heads, 1, head.head_dim))
        weights = (heads @ key.transpose(-1, -2) / head.head_dim**0.5).softmax(-1)
        latent = head.final_mlp((weights @ value).flatten(1))
        rows.append(head.tempr * F.cosine_similarity(latent, head.mlp_query1(query), dim=-1))
    return torch.stack(rows)


def timed(run: Callable[[], object], repeats: int) -> list[float]:
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return found


def peak() -> float:
    """Largest size of this process so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def encoder_seconds(prompts: int) -> float:
    """One pass of CLIP ViT-L/14's text encoder, which a text-to-image model makes anyway."""
    config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    encoder = CLIPTextModel(config).eval()
    ids = torch.randint(0, 49000, (prompts, 77))
    with torch.no_grad():
        encoder(input_ids=ids[:2])
        return statistics.median(timed(lambda: encoder(input_ids=ids), 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.manual_seed(0)
    head = EmbeddingMappingLayer(DIM)
    tokens, pooled = torch.randn(given.prompts, ROWS, DIM), torch.randn(CONCEPTS, DIM)
    print(machine())

    # First, while nothing larger has raised the peak.
    before = peak()
    with torch.no_grad():
        many = head.concepts(torch.randn(10_000, DIM))
        (wide,) = timed(lambda: head(tokens, many), 1)
    print(f"\n10,000 concepts: {wide:.2f} s, {peak() - before:.2f} GB more than before at the peak")

    with torch.no_grad():
        bank = head.concepts(pooled)
        head(tokens, bank)
        fast = timed(lambda: head(tokens, bank), given.repeats)
        (slow,) = timed(lambda: pairwise(head, tokens, pooled), 1)
        gap = float((pairwise(head, tokens[:2], pooled) - head(tokens[:2], bank)).abs().max())
    median = statistics.median(fast)
    print(f"{given.prompts} prompts, {CONCEPTS} concepts: pairwise {slow:.1f} s, factorised {median:.3f} s "
          f"({min(fast):.3f} to {max(fast):.3f}): {slow / median:.0f} times; largest difference {gap:.1e}")  # fmt: skip

    def step(scores: Callable[[Tensor, Tensor], Tensor], count: int) -> Callable[[], None]:
        def run() -> None:
            both = scores(torch.cat([tokens[:count], tokens[:count]]), pooled[:count])
            head.zero_grad()
            guard_loss(both[:count], both[count:]).backward()

        return run

    count = min(32, given.prompts)
    quick = statistics.median(timed(step(lambda t, c: head(t, head.concepts(c)), count), given.repeats))
    (long,) = timed(step(lambda t, c: pairwise(head, t, c), count), 1)
    print(
        f"training step of {count} concepts: pairwise {long:.2f} s, factorised {quick:.3f} s: {long / quick:.0f} times"
    )

    whole = encoder_seconds(given.prompts)
    print(f"text encoder of CLIP-L/14: {whole:.2f} s for the same prompts; the head adds {100 * median / whole:.1f} %")

    texts = (zoo.path("copro_mini") / "benign.txt").read_text(encoding="utf-8").splitlines()
    with TemporaryDirectory() as folder:
        store = FeatureStore(load_text_encoder("tiny_clip"), folder)
        (spent,) = timed(lambda: store.add(texts), 1)
        rows = store.bytes / len(texts) / (2 * 128)
    print(
        f"features: {len(texts)} texts at {len(texts) / spent:.0f} texts/s with tiny_clip; {rows:.1f} rows a text, "
        f"which is {rows * 2 * DIM / 1e3:.1f} kB at D = {DIM} (authors: {ROWS * 4 * DIM / 1e3:.1f} kB)"
    )


if __name__ == "__main__":
    main()
