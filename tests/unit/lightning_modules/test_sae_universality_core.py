"""Matching, similarity, its tests and concepts, each against a slow reference or a case made by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from safelight.errors import SafelightError
from safelight.lightning_modules.sae_universality import matching, significance, similarity, subspaces
from safelight.lightning_modules.sae_universality.matching import Pairs, pair_features


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(size: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(noise(size, size, seed=seed).double())[0]


# Matching


def triples(pairs: Pairs) -> list[tuple[int, int, float]]:
    return list(zip(pairs.a.tolist(), pairs.b.tolist(), pairs.correlation.tolist(), strict=True))


CORRELATION = torch.tensor(
    [
        [0.50, 0.90, 0.20, 0.10, -0.1],
        [0.30, 0.80, 0.60, 0.00, -0.2],
        [0.10, 0.00, 0.70, 0.05, -0.3],
        [0.45, 0.20, 0.65, 0.03, -0.4],
    ],
    dtype=torch.float64,
)


def test_matchers_by_hand() -> None:
    many = matching.many_to_one(CORRELATION)
    assert triples(many) == [(0, 0, 0.5), (0, 1, 0.9), (2, 2, 0.7), (0, 3, 0.1), (0, 4, -0.1)]
    assert triples(matching.first(many)) == [(0, 0, 0.5), (2, 2, 0.7)]
    assert triples(matching.best(many)) == [(0, 1, 0.9), (2, 2, 0.7)]
    assert triples(matching.mutual(CORRELATION)) == [(0, 1, 0.9), (2, 2, 0.7)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(6, 5), (4, 7)])
def test_matchers_against_loops(seed: int, shape: tuple[int, int]) -> None:
    # Two digits, so that columns have ties.
    c = noise(*shape, seed=seed).mul(5).round().div(10)
    table = c.tolist()
    many = []
    for j in range(shape[1]):
        column = [row[j] for row in table]
        many.append((column.index(max(column)), j, max(column)))
    used = {a for a, _, _ in many}
    of = {a: [pair for pair in many if pair[0] == a] for a in used}
    assert triples(matching.many_to_one(c)) == many
    assert triples(matching.first(matching.many_to_one(c))) == sorted((of[a][0] for a in used), key=lambda p: p[1])
    best = [max(of[a], key=lambda pair: pair[2]) for a in used]
    assert triples(matching.best(matching.many_to_one(c))) == sorted(best, key=lambda p: p[1])
    assert triples(matching.mutual(c)) == [(a, b, v) for a, b, v in many if table[a].index(max(table[a])) == b]


@pytest.mark.parametrize("shape", [(5, 4), (4, 5)])
def test_hungarian_finds_the_largest_sum(shape: tuple[int, int]) -> None:
    c = noise(*shape, seed=3)
    pairs = matching.hungarian(c)
    few, many = min(shape), max(shape)
    wide = c if shape[0] <= shape[1] else c.T
    sums = [sum(wide[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(many), few)]
    assert float(pairs.correlation.sum()) == pytest.approx(float(max(sums)))
    assert torch.equal(c[pairs.a, pairs.b], pairs.correlation)
    assert pairs.b.tolist() == sorted(set(pairs.b.tolist()))
    assert len(set(pairs.a.tolist())) == len(pairs) == few


def test_hungarian_in_a_pool() -> None:
    pool = matching.most_active(torch.tensor([3, 9, 1, 5]), 3), matching.most_active(torch.tensor([0, 1, 4, 4, 1]), 2)
    assert [side.tolist() for side in pool] == [[0, 1, 3], [2, 3]]
    # Without feature 2 of A, and features 0, 1 and 4 of B: .65 + .10 beats .60 + .10 and .65 + .00.
    assert triples(matching.hungarian(CORRELATION, pool)) == [(3, 2, 0.65), (0, 3, 0.1)]
    tokens = [["x"]] * 5
    pairs, _ = pair_features(CORRELATION, tokens[:4], tokens, matcher="hungarian", corr_min=0, pool=pool)
    assert triples(pairs) == [(3, 2, 0.65), (0, 3, 0.1)]


def test_filters_by_hand() -> None:
    tokens_a = [[" day", "x"], ["y"], [" sea", "z"], []]
    tokens_b = [[" day", "."], [" day", "w"], ["z"], [" day"], [" day"]]
    left = {"paired": 5, "concept": 4, "one_to_one": 2, "correlated": 2}
    # Without the first B, whose tokens hold a full stop, the feature that both matchers keep differs.
    correlation = CORRELATION.clone()
    correlation[0, 1] = 0.81
    correlation[0, 3] = 0.95
    pairs, counts = pair_features(correlation, tokens_a, tokens_b, matcher="first")
    assert (triples(pairs), counts) == ([(0, 1, 0.81), (2, 2, 0.7)], left)
    pairs, counts = pair_features(correlation, tokens_a, tokens_b)
    assert (triples(pairs), counts) == ([(2, 2, 0.7), (0, 3, 0.95)], left)
    pairs, counts = pair_features(correlation, tokens_a, tokens_b, matcher="many_to_one")
    assert [pair[1] for pair in triples(pairs)] == [1, 2, 3]
    assert counts == {"paired": 5, "concept": 4, "one_to_one": 4, "correlated": 3}
    _, counts = pair_features(correlation, tokens_a, tokens_b, matcher="first", non_concept=None, corr_min=0.5)
    assert counts == {"paired": 5, "concept": 5, "one_to_one": 2, "correlated": 1}  # .5 is not above .5
    _, counts = pair_features(correlation, tokens_a, tokens_b, non_concept=())
    assert counts["concept"] == 5  # the full stop may stay
    _, counts = pair_features(correlation, [["q"]] * 4, tokens_b, non_concept=())
    assert counts["concept"] == 0  # nothing in common
    pairs, counts = pair_features(CORRELATION, [["x"]] * 4, [["x"]] * 5, matcher="mutual")
    assert (len(pairs), counts["paired"]) == (2, 2)


@pytest.mark.parametrize("token", matching.NON_CONCEPT)
@pytest.mark.parametrize("side", [0, 1])
def test_tokens_without_a_concept(token: str, side: int) -> None:
    tokens = [[[" day"]], [[" day"]]]
    assert pair_features(torch.ones(1, 1), *tokens)[1]["correlated"] == 1
    tokens[side] = [[" day", token]]
    assert pair_features(torch.ones(1, 1), *tokens)[1]["concept"] == 0
    tokens[side] = [[" day", f"a{token}b"]]  # only a token that is nothing else
    assert pair_features(torch.ones(1, 1), *tokens)[1]["concept"] == 1


def test_what_cannot_be_paired() -> None:
    with pytest.raises(SafelightError, match="matcher='nearest' is none of many_to_one, first, best"):
        pair_features(torch.ones(1, 1), [[]], [[]], matcher="nearest")  # type: ignore[arg-type]
    with pytest.raises(SafelightError, match=r"correlation \(1, 2\) needs the tokens .* got 1 and 1"):
        pair_features(torch.ones(1, 2), [[]], [[]])


# Similarity


def with_singular_values(values: list[float], rows: int = 12) -> Tensor:
    """A matrix (rows, k) of centred columns."""
    left = torch.linalg.qr(noise(rows, len(values)).double() - noise(rows, len(values)).double().mean(0))[0]
    return left @ torch.diag(torch.tensor(values).double()) @ rotation(len(values)).T + 5


def test_directions_that_hold_a_share_of_the_variance() -> None:
    x = with_singular_values([3, 1, 1, 0])
    kept = {share: similarity.left_basis(x, share).shape[1] for share in (0.8, 0.85, 0.92, 0.99, 1.0)}
    assert kept == {0.8: 1, 0.85: 2, 0.92: 3, 0.99: 3, 1.0: 3}
    for scale in (1e-3, 1, 1e3):
        assert similarity.left_basis(x * scale).shape[1] == 3
    basis = similarity.left_basis(x)
    torch.testing.assert_close(basis.T @ basis, torch.eye(3).double())
    torch.testing.assert_close(basis @ (basis.T @ (x - 5)), x - 5)
    assert similarity.left_basis(x, directions=2).shape[1] == 2
    with pytest.raises(SafelightError, match="share=99 must lie in"):
        similarity.left_basis(x, 99)


def test_svcca_of_a_rotation_and_against_the_definition() -> None:
    x, y = noise(60, 6).double(), noise(60, 8, seed=1).double()
    assert similarity.svcca(x, x @ rotation(6) * 3 + 1) == pytest.approx(1)
    y[:, :2] += x[:, :2]
    # Canonical correlations as eigenvalues: of Cxx⁻¹ Cxy Cyy⁻¹ Cyx.
    a, b = x - x.mean(0), y - y.mean(0)
    product = torch.linalg.solve(a.T @ a, a.T @ b) @ torch.linalg.solve(b.T @ b, b.T @ a)
    rho = torch.linalg.eigvals(product).real.clamp(min=0).sqrt()
    assert similarity.svcca(x, y, share=1) == pytest.approx(float(rho.mean()))


def test_svcca_of_few_pairs_says_nothing() -> None:
    x, y = noise(10, 12), noise(10, 12, seed=1)
    assert math.isnan(similarity.svcca(x, y, share=1))
    basis = similarity.left_basis(x, 1.0)
    assert similarity.canonical_correlation(basis, similarity.left_basis(y, 1.0)) == pytest.approx(1)
    assert similarity.why_undefined(basis, basis) == "10 pairs and 9 directions: 1 by construction"
    assert 0 < similarity.svcca(x, y, directions=1) < 0.95
    flat = torch.full((10, 3), 0.1)
    assert math.isnan(similarity.svcca(x, flat, directions=2))
    assert similarity.why_undefined(basis, similarity.left_basis(flat)) == "a side has no variance"


def test_random_pairs_of_the_size_of_the_paper() -> None:
    u_a, u_b = similarity.left_basis(noise(1200, 512)), similarity.left_basis(noise(1200, 768, seed=1))
    assert u_a.shape[1] == pytest.approx(482, abs=2)
    assert u_b.shape[1] == pytest.approx(687, abs=2)
    assert similarity.canonical_correlation(u_a, u_b) == pytest.approx(0.72, abs=0.01)


def test_pc1_correlation_is_that_of_the_first_scores() -> None:
    x, y = noise(50, 5).double(), noise(50, 7, seed=1).double()
    x[:, 1] *= 3
    y[:, 0] -= x[:, 1]
    scores = []
    for side in (x, y):
        values, vectors = torch.linalg.eigh(torch.cov(side.T))
        scores.append(side @ vectors[:, values.argmax()])
    r = float(torch.corrcoef(torch.stack(scores))[0, 1])
    assert abs(r) > 0.5
    assert similarity.pc1_correlation(x, y) == pytest.approx(abs(r))
    assert similarity.pc1_correlation(x, -y) == pytest.approx(abs(r))


def test_excess_over_the_null() -> None:
    assert similarity.svcca_excess(0.91, 0.65) == pytest.approx(0.26 / 0.35)
    assert similarity.svcca_excess(0.72, 0.72) == 0


@pytest.mark.parametrize("ties", [False, True])
def test_rsa_against_scipy(ties: bool) -> None:
    stats = pytest.importorskip("scipy.stats")
    x, y = noise(20, 9), noise(20, 7, seed=1)
    y[:, :4] += 2 * x[:, :4]
    if ties:
        x, y = x.round(), y.round()
        x[3:6], y[11] = x[6], y[12]
    upper = torch.triu_indices(20, 20, 1).unbind()
    one, two = (torch.corrcoef(side.double())[upper].round(decimals=12) for side in (x, y))
    assert ties == (len(one.unique()) < len(one))
    expected = stats.spearmanr(one.numpy(), two.numpy()).statistic
    assert expected > 0.1
    assert similarity.rsa(x, y) == pytest.approx(expected, abs=1e-9)
    assert significance.rsa_test(x, y, shuffles=1).score == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12))
def test_ranks_of_equal_values_are_their_mean(values: list[int]) -> None:
    found = similarity.average_ranks(torch.tensor(values).double()).tolist()
    assert found == [sum(w < v for w in values) + (values.count(v) + 1) / 2 for v in values]


def test_rsa_under_rotation() -> None:
    x = noise(80, 32)
    assert similarity.rsa(x, x.double() @ rotation(32)) > 0.95
    # A rotation that keeps the vector of ones leaves the centring of rows alone.
    basis = torch.linalg.qr(torch.cat([torch.ones(32, 1), noise(32, 31)], 1).double())[0]
    inner = torch.block_diag(torch.ones(1, 1).double(), rotation(31))
    assert similarity.rsa(x, x.double() @ basis @ inner @ basis.T) == pytest.approx(1, abs=1e-6)
    assert similarity.rsa(x, x * torch.rand(80, 1, generator=torch.Generator().manual_seed(0)) + 3) > 0.999
    assert abs(similarity.rsa(x, noise(80, 48, seed=2))) < 0.1


def test_cka_by_kernels() -> None:
    x, y = noise(30, 4).double() + 2, noise(30, 6, seed=1).double() - 1
    y[:, 0] += x[:, 0]
    centre = torch.eye(30).double() - 1 / 30
    one, two = (centre @ side @ side.T @ centre for side in (x, y))
    expected = float((one * two).sum() / ((one * one).sum() * (two * two).sum()).sqrt())
    assert similarity.linear_cka(x, y) == pytest.approx(expected)
    assert similarity.linear_cka(x, 2 * x @ rotation(4) - 1) == pytest.approx(1)


def test_procrustes_error() -> None:
    x = noise(20, 5).double()
    assert similarity.procrustes_error(x, x @ rotation(5)) == pytest.approx(0, abs=1e-12)
    wide = torch.cat([x, torch.zeros(20, 3)], 1) @ rotation(8)
    assert similarity.procrustes_error(x, wide) == pytest.approx(0, abs=1e-12)
    assert similarity.procrustes_error(wide, x) == pytest.approx(0, abs=1e-12)
    # Twice as long on one side: half of it, or all of it, is left.
    assert similarity.procrustes_error(x, 2 * x @ rotation(5)) == pytest.approx(0.5)
    assert similarity.procrustes_error(2 * x, x @ rotation(5)) == pytest.approx(1)
    # What has no place in the narrower side is left as well.
    assert similarity.procrustes_error(torch.eye(2), torch.eye(2)[:, :1]) == pytest.approx(1)


def test_pairs_of_another_shape() -> None:
    for score in (similarity.rsa, similarity.svcca, similarity.linear_cka, similarity.procrustes_error):
        with pytest.raises(SafelightError, match=r"must be \(n, d_a\) and \(n, d_b\), got \(4, 2\) and \(3, 2\)"):
            score(torch.ones(4, 2), torch.ones(3, 2))


# Significance


@pytest.mark.parametrize(
    ("test", "score"),
    [
        (significance.svcca_test, similarity.svcca),
        (significance.pc1_test, similarity.pc1_correlation),
        (significance.rsa_test, similarity.rsa),
    ],
)
def test_the_fast_null_is_the_slow_one(test, score) -> None:  # type: ignore[no-untyped-def]
    x, y = noise(40, 6), noise(40, 9, seed=1)
    y[:, :2] += 0.7 * x[:, :2]
    found = test(x, y, shuffles=12, seed=5)
    draw = torch.Generator().manual_seed(5)
    null = torch.tensor([score(x, y[torch.randperm(40, generator=draw)]) for _ in range(12)]).double()
    actual = score(x, y)
    assert found.score == pytest.approx(actual)
    assert found.null_mean == pytest.approx(float(null.mean()), rel=1e-6)
    assert found.null_std == pytest.approx(float(null.std(correction=0)), rel=1e-6)
    assert found.z == pytest.approx((actual - float(null.mean())) / float(null.std(correction=0)), rel=1e-5)
    assert found.p == pytest.approx((1 + int((null >= actual).sum())) / 13)
    assert (found.n, found.reason) == (40, "")
    assert test(x, y, shuffles=12, seed=5) == found
    assert test(x, y, shuffles=12, seed=6) != found


def test_p_is_never_zero() -> None:
    found = significance.against_null(0.5, [0.1, 0.2, 0.3], 7)
    assert (found.p, found.legacy_p, found.n) == (0.25, 0, 7)
    found = significance.against_null(0.2, [0.1, 0.2, 0.3], 7)
    assert (found.p, found.legacy_p) == (0.75, pytest.approx(2 / 3))
    assert found.z == pytest.approx(0, abs=1e-9)
    assert significance.against_null(0.5, [0.1, 0.3], 7).z == pytest.approx((0.5 - 0.2) / 0.1)
    assert math.isnan(significance.against_null(0.2, [0.1], 7).z)
    with pytest.raises(SafelightError, match="shuffles=0"):
        significance.pc1_test(noise(9, 3), noise(9, 3), shuffles=0)


def test_paired_and_unrelated_features_are_told_apart() -> None:
    x = noise(60, 8)
    shared, other = x.double() @ rotation(8), noise(60, 8, seed=9)
    for test in (significance.svcca_test, significance.rsa_test, significance.pc1_test):
        assert test(x, shared, shuffles=99).p == 0.01
        assert test(x, other, shuffles=99).p > 0.05


def test_the_null_of_pc1_is_what_the_paper_prints() -> None:
    # Its shuffle means are those of |r| of two independent variables, which shows that its k is 1.
    for n in (24, 400):
        null = significance.pc1_test(noise(n, 16), noise(n, 24, seed=1), shuffles=300).null_mean
        assert null == pytest.approx(math.sqrt(2 / (math.pi * (n - 1))), rel=0.2)


def test_a_score_that_says_nothing_is_not_tested() -> None:
    x = noise(6, 9)
    found = significance.svcca_test(x, x, share=1)
    assert found.reason == "6 pairs and 5 directions: 1 by construction"
    assert all(math.isnan(v) for v in (found.score, found.null_mean, found.null_std, found.p, found.z, found.legacy_p))
    assert significance.rsa_test(x[:2], x[:2]).reason == "2 pairs are too few"
    assert significance.rsa_test(torch.ones(6, 3), x).reason == "all pairs of a side are equally alike"
    # A shuffle can be the identity: it reaches the score.
    assert significance.rsa_test(x[:3], x[:3], shuffles=200).p > 0.1


def test_false_discovery_rate_by_hand() -> None:
    found = significance.benjamini_hochberg([0.01, math.nan, 0.04, 0.03, 0.9])
    assert math.isnan(found[1])
    assert [found[i] for i in (0, 2, 3, 4)] == pytest.approx([0.04, 0.04 * 4 / 3, 0.04 * 4 / 3, 0.9])
    assert significance.benjamini_hochberg([]) == []


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=9))
def test_false_discovery_rate_against_its_definition(p: list[float]) -> None:
    # The smallest level at which the step-up procedure rejects: among p values no smaller, the least p m / rank.
    ranks = [sum(w <= v for w in p) for v in p]
    expected = [min(1, *(w * len(p) / r for w, r in zip(p, ranks, strict=True) if w >= v)) for v in p]
    assert significance.benjamini_hochberg(p) == pytest.approx(expected)


# Concepts


def test_keyword_lists() -> None:
    sizes = {name: len(words) for name, words in subspaces.KEYWORDS.items()}
    assert sizes["month_names"] == 12
    assert sizes["countries"] == 19
    assert set(subspaces.KEYWORDS["calendar"]) < set(subspaces.KEYWORDS["time"])
    for words in subspaces.KEYWORDS.values():
        assert all(word == word.lower() and word.isalpha() for word in words)
        assert len(set(words)) == len(words)


@pytest.mark.parametrize(
    ("token", "window", "belongs"),
    [
        (" day", "one day at", True),
        (" Day", "one Day, at", True),
        ("day", "Sunday at", False),  # the token is the end of a longer word
        ("day", "the day!\n", True),
        (" day", "a day\nlong", False),  # a line break is removed, not a space
        (" days", "two days at", False),  # not a keyword
        (" day", "two nights at", False),  # another text
        (" d ay", "one day at", True),
        ("day", "one day's end", False),
    ],
)
def test_a_keyword_must_be_the_token_and_a_word(token: str, window: str, belongs: bool) -> None:
    assert subspaces.names_concept(token, window, ("day", "night")) is belongs


def test_features_of_a_concept() -> None:
    texts = ["It", " was", " Sun", "day", " all", " day", "."]
    windows = [subspaces.window_text(texts, place) for place in range(len(texts))]
    # From two before a place to one after it.
    assert [windows[place] for place in (0, 3, 6)] == ["It was", " was Sunday all", " all day."]
    tops = [["day"], ["day", " day"], [" all"], []]
    around = [[windows[3]], [windows[3], windows[5]], [windows[4]], []]
    assert subspaces.features_of_concept(tops, around, subspaces.KEYWORDS["time"]) == [1]
    assert subspaces.features_of_concept(tops, around, ("all", "day")) == [1, 2]
