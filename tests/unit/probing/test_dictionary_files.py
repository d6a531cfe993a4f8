"""Sparse autoencoders of four libraries as files: their codes by independent formulas, and what can break."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safelight import zoo
from safelight.errors import SafelightError
from safelight.probing import dictionary_files
from safelight.probing.dictionary_files import read_sae, sae_format, write_sae

lens = pytest.importorskip("sae_lens")

D, M, K = 6, 10, 3
ARCHITECTURES = ["standard", "topk", "topk_plain", "batchtopk", "jumprelu", "gated", "matryoshka"]
SCALE = 0.37


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 1))


X = numbers(7, D, seed=90) * 2
W_ENC, W_DEC, B_ENC, B_DEC = numbers(D, M), numbers(M, D, seed=1), numbers(M, seed=2) / 2, numbers(D, seed=3)
THRESHOLD, R_MAG, B_MAG = numbers(M, seed=4).abs(), numbers(M, seed=5) / 2, numbers(M, seed=6)


def largest(pre: Tensor, k: int) -> Tensor:
    """The ``k`` largest of each row, if positive, found one by one."""
    codes = torch.zeros_like(pre)
    for row in range(len(pre)):
        for column in sorted(range(pre.shape[1]), key=lambda c: -float(pre[row, c]))[:k]:
            codes[row, column] = max(float(pre[row, column]), 0.0)
    return codes


def agree(sae: Any, codes: Tensor, made: Tensor, x: Tensor = X) -> None:
    """``sae`` is for inference and gives these codes and reconstructions."""
    assert not sae.training
    assert not any(parameter.requires_grad for parameter in sae.parameters())
    assert not hasattr(sae, "training_forward_pass")
    assert 0 < int((codes != 0).sum()) < codes.numel(), "a test that says something"
    torch.testing.assert_close(sae.encode(x), codes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(x), made, rtol=1e-4, atol=1e-4)


def gemma_scope(place: Path, **changed: Any) -> Path:
    arrays = {"W_enc": W_ENC, "W_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": THRESHOLD} | changed
    place.mkdir(parents=True, exist_ok=True)
    np.savez(place / "params.npz", **{name: np.asarray(value) for name, value in arrays.items() if value is not None})
    return place


def sparsify(place: Path, weights: dict[str, Any] | None = None, **config: Any) -> Path:
    tensors = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC} | (weights or {})
    place.mkdir(parents=True, exist_ok=True)
    kept = {name: value.contiguous() for name, value in tensors.items() if value is not None}
    save_file(kept, place / "sae.safetensors")
    (place / "cfg.json").write_text(json.dumps({"d_in": D, "num_latents": M, "k": K} | config))
    return place


LINEAR = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T}
CLASSES: dict[str, dict[str, Any]] = {
    "AutoEncoder": LINEAR | {"bias": B_DEC},
    "AutoEncoderTopK": LINEAR | {"b_dec": B_DEC, "k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.1)},
    "BatchTopKSAE": LINEAR | {"b_dec": B_DEC, "k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(1.5)},
    "JumpReluAutoEncoder": {"W_enc": W_ENC, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC, "threshold": THRESHOLD},
    "GatedAutoEncoder": {
        "encoder.weight": W_ENC.T, "r_mag": R_MAG, "gate_bias": B_ENC, "mag_bias": B_MAG,
        "decoder.weight": W_DEC.T, "decoder_bias": B_DEC,
    },
}  # fmt: skip


def dictionary(place: Path, kind: str, weights: dict[str, Any] | None = None, **trainer: Any) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    tensors = {name: value for name, value in (CLASSES[kind] | (weights or {})).items() if value is not None}
    torch.save(tensors, place / "ae.pt")
    config = {"dict_class": kind, "activation_dim": D, "dict_size": M, "lm_name": "EleutherAI/pythia-70m"} | trainer
    (place / "config.json").write_text(json.dumps({"trainer": config, "buffer": {"ctx_len": 128}}))
    return place


def trained(architecture: str, seed: int = 0, d_sae: int = M) -> Any:
    """A training SAE with random weights, as if it had been trained on scaled vectors."""
    sizes = {"d_in": D, "d_sae": d_sae}
    with torch.random.fork_rng():
        sae: Any = {
            "standard": lambda: lens.StandardTrainingSAE(lens.StandardTrainingSAEConfig(**sizes)),
            "gated": lambda: lens.GatedTrainingSAE(lens.GatedTrainingSAEConfig(**sizes)),
            "jumprelu": lambda: lens.JumpReLUTrainingSAE(lens.JumpReLUTrainingSAEConfig(**sizes)),
            "topk": lambda: lens.TopKTrainingSAE(lens.TopKTrainingSAEConfig(**sizes, k=K)),
            "topk_plain": lambda: lens.TopKTrainingSAE(
                lens.TopKTrainingSAEConfig(
                    **sizes, k=K, rescale_acts_by_decoder_norm=False, use_sparse_activations=True,
                    apply_b_dec_to_input=False,
                )
            ),
            "batchtopk": lambda: lens.BatchTopKTrainingSAE(lens.BatchTopKTrainingSAEConfig(**sizes, k=float(K))),
            "matryoshka": lambda: lens.MatryoshkaBatchTopKTrainingSAE(
                lens.MatryoshkaBatchTopKTrainingSAEConfig(**sizes, k=float(K), matryoshka_widths=[4, d_sae])
            ),
        }[architecture]()  # fmt: skip
    for number, (name, parameter) in enumerate(sae.named_parameters()):
        parameter.data = numbers(*parameter.shape, seed=seed + number) * (0.5 if name == "r_mag" else 1.0)
        if name == "threshold":
            parameter.data.abs_()
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold.fill_(2.0)
    return sae


def by_hand(sae: Any, architecture: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and reconstruction of what a training SAE is fed, from its weights."""
    w = {name: tensor.detach().clone() for name, tensor in sae.state_dict().items()}
    norms = w["W_dec"].pow(2).sum(1).sqrt()
    centred = x if architecture == "topk_plain" else x - w["b_dec"]
    if architecture == "gated":
        shared = centred @ w["W_enc"]
        codes = ((shared * w["r_mag"].exp() + w["b_mag"]).clamp(min=0)) * (shared + w["b_gate"] > 0)
        return codes, codes @ w["W_dec"] + w["b_dec"]
    pre = centred @ w["W_enc"] + w["b_enc"]
    if architecture == "standard":
        codes = pre.clamp(min=0)
    elif architecture == "jumprelu":
        codes = pre.clamp(min=0) * (pre > w["threshold"])
    elif architecture == "topk_plain":
        codes = largest(pre, K)
    elif architecture == "topk":
        codes = largest(pre * norms, K)
    else:
        codes = (pre * norms).clamp(min=0) * (pre * norms > float(w["topk_threshold"]))
    rescaled = codes / norms if architecture in ("topk", "batchtopk", "matryoshka") else codes
    return codes, rescaled @ w["W_dec"] + w["b_dec"]


def test_gemma_scope(tmp_path: Path) -> None:
    pre = X @ W_ENC + B_ENC
    codes = pre * (pre > THRESHOLD)
    folder = gemma_scope(tmp_path / "a")
    old = gemma_scope(tmp_path / "b", W_enc=None, W_dec=None, w_enc=W_ENC.double(), w_dec=W_DEC)
    alone = (folder / "params.npz").rename(tmp_path / "other.npz")
    assert [sae_format(place) for place in (old, alone, folder)] == ["gemma-scope", "gemma-scope", None]
    for place in (old, alone):
        agree(read_sae(str(place)), codes, codes @ W_DEC + B_DEC)
    whole = read_sae(str(gemma_scope(tmp_path / "c", b_dec=torch.zeros(D, dtype=torch.int64))))
    agree(whole, codes, codes @ W_DEC)


@pytest.mark.parametrize("config", [{}, {"num_latents": 0, "expansion_factor": 2, "activation": "topk"}])
def test_sparsify_which_sae_lens_itself_cannot_read(tmp_path: Path, config: dict[str, Any]) -> None:
    m = 2 * D if config else M
    w_enc, w_dec, b_enc = numbers(D, m), numbers(m, D, seed=1), numbers(m, seed=2)
    weights = {"encoder.weight": w_enc.T, "W_dec": w_dec, "encoder.bias": b_enc}
    folder = sparsify(tmp_path / "layers.3", weights, normalize_decoder=True, transcode=False, **config)
    assert sae_format(folder) == "sparsify"
    codes = largest((X - B_DEC) @ w_enc + b_enc, K)
    agree(read_sae(str(folder)), codes, codes @ w_dec + B_DEC)
    loader = sys.modules["sae_lens.loading.pretrained_sae_loaders"].sparsify_disk_loader
    with pytest.raises(RuntimeError, match="size mismatch for W_dec"):
        lens.SAE.load_from_disk(folder, converter=loader)


def test_sparsify_in_half_precision(tmp_path: Path) -> None:
    weights = {name: value.bfloat16() for name, value in {"encoder.weight": W_ENC.T, "W_dec": W_DEC}.items()}
    sae = read_sae(str(sparsify(tmp_path, weights)))
    assert sae.W_enc.dtype == torch.float32
    codes = largest((X - B_DEC) @ W_ENC.bfloat16().float() + B_ENC, K)
    agree(sae, codes, codes @ W_DEC.bfloat16().float() + B_DEC)


def test_dictionary_learning(tmp_path: Path) -> None:
    pre, plain, norms = (X - B_DEC) @ W_ENC + B_ENC, X @ W_ENC + B_ENC, W_DEC.pow(2).sum(1).sqrt()
    gated = ((X - B_DEC) @ W_ENC * R_MAG.exp() + B_MAG).clamp(min=0) * (pre > 0)
    expected = {
        "AutoEncoder": pre.clamp(min=0),
        "AutoEncoderTopK": largest(pre, K),
        "BatchTopKSAE": pre * (pre > 1.5),
        "JumpReluAutoEncoder": plain * (plain > THRESHOLD),
        "GatedAutoEncoder": gated,
    }
    for kind, codes in expected.items():
        folder = dictionary(tmp_path / kind, kind)
        assert sae_format(folder) == "dictionary_learning"
        sae = read_sae(str(folder))
        factor = norms if kind in ("JumpReluAutoEncoder", "GatedAutoEncoder") else 1.0
        agree(sae, codes * factor, codes @ W_DEC + B_DEC)
    shifted = dictionary(tmp_path / "shifted", "JumpReluAutoEncoder", apply_b_dec_to_input=True)
    codes = pre * (pre > THRESHOLD)
    agree(read_sae(str(shifted)), codes * norms, codes @ W_DEC + B_DEC)
    without = dictionary(tmp_path / "k", "AutoEncoderTopK", {"k": None, "threshold": None}, k=2)
    codes = largest(pre, 2)
    agree(read_sae(str(without)), codes, codes @ W_DEC + B_DEC)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_written_saes_take_vectors_as_they_are_and_keep_their_codes(tmp_path: Path, architecture: str) -> None:
    sae = trained(architecture)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    settings, state = sae.cfg.to_dict(), torch.random.get_rng_state()
    x = X / SCALE
    codes, made = by_hand(sae, architecture, x * SCALE)
    folder = write_sae(sae, tmp_path / "deep" / "sae", scale=SCALE, metadata={"model_name": "toy", "hook_name": "h.1"})
    assert sorted(file.name for file in folder.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    for read in (read_sae(str(folder)), lens.SAE.load_from_disk(folder).requires_grad_(False).eval()):
        agree(read, codes, made / SCALE, x)
        assert (read.cfg.metadata.model_name, read.cfg.metadata.hook_name) == ("toy", "h.1")
    assert torch.equal(state, torch.random.get_rng_state())
    assert sae.cfg.to_dict() == settings
    assert sae.training
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    # An inference model can be scaled once more.
    again = read_sae(str(write_sae(read_sae(str(folder)), tmp_path / "again", scale=10.0)))
    agree(again, codes, made / SCALE / 10, x / 10)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folders_that_sae_lens_wrote_from_training_models(tmp_path: Path, architecture: str) -> None:
    sae = trained(architecture, seed=20)
    sae.save_model(tmp_path)
    agree(read_sae(str(tmp_path)), *by_hand(sae, architecture, X))


def test_thresholds_of_older_training_models(tmp_path: Path) -> None:
    sae = trained("jumprelu")
    sae.save_model(tmp_path)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    weights["log_threshold"] = weights.pop("threshold").log()
    save_file(weights, tmp_path / "sae_weights.safetensors")
    agree(read_sae(str(tmp_path)), *by_hand(sae, "jumprelu", X))


def test_how_it_was_trained_is_kept(tmp_path: Path) -> None:
    for architecture, key, value in (("batchtopk", "rescale_acts_by_decoder_norm", True), ("standard", "lp_norm", 1.0)):
        folder = write_sae(trained(architecture), tmp_path / architecture)
        metadata = json.loads((folder / "cfg.json").read_text())["metadata"]
        assert metadata["training_architecture_details"][key] == value


def test_thresholds_that_an_update_left_below_zero_are_zero(tmp_path: Path) -> None:
    sae = trained("jumprelu")
    sae.threshold.data[:5] = -0.5
    codes = ((X - sae.b_dec) @ sae.W_enc + sae.b_enc).detach()
    codes = codes.clamp(min=0) * (codes > sae.threshold.detach())
    agree(read_sae(str(write_sae(sae, tmp_path))), codes, (codes @ sae.W_dec + sae.b_dec).detach())


def test_a_model_that_is_not_read_back_as_it_was_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = dictionary_files._save
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "W_enc": lambda w: w * 1.001,
        "W_dec": lambda w: w + 0.001,
        "b_dec": lambda w: w + 0.1,
        "b_enc": lambda w: w - 1.0,
    }
    for name, change in changes.items():

        def spoilt(model: Any, *rest: Any, name: str = name, change: Any = change) -> None:
            getattr(model, name).data = change(getattr(model, name).data)
            whole(model, *rest)

        monkeypatch.setattr(dictionary_files, "_save", spoilt)
        for architecture in ("standard", "topk", "batchtopk"):
            with pytest.raises(SafelightError, match="nothing is written, for what is read back differs"):
                write_sae(trained(architecture), tmp_path, scale=SCALE)
    assert list(tmp_path.iterdir()) == []

    def silenced(model: Any, *rest: Any) -> None:
        model.threshold.data = model.threshold.data * 3
        whole(model, *rest)

    monkeypatch.setattr(dictionary_files, "_save", silenced)
    with pytest.raises(SafelightError, match=r"differs from the SAE in which features are active in \d+ of \d+ cases"):
        write_sae(trained("jumprelu"), tmp_path)


def test_weights_that_lie_in_memory_the_other_way_round(tmp_path: Path) -> None:
    sae = trained("standard")
    sae.W_dec.data = sae.W_dec.data.T.contiguous().T
    agree(read_sae(str(write_sae(sae, tmp_path))), *by_hand(sae, "standard", X))


def test_what_cannot_be_written(tmp_path: Path) -> None:
    sae = trained("standard")
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(SafelightError, match="finite number above 0"):
            write_sae(sae, tmp_path, scale=scale)
    with pytest.raises(SafelightError, match="only what JSON can hold"):
        write_sae(sae, tmp_path, metadata={"data": object()})
    sae.cfg.normalize_activations = "layer_norm"
    with pytest.raises(SafelightError, match="normalize_activations='layer_norm' with"):
        write_sae(sae, tmp_path)
    sae = trained("topk")
    sae.W_dec.data[0, 0] = float("nan")
    with pytest.raises(SafelightError, match="sae: W_dec has numbers that are not finite"):
        write_sae(sae, tmp_path)
    other = lens.AbsTopKTrainingSAE(lens.AbsTopKTrainingSAEConfig(d_in=D, d_sae=M, k=K))
    with pytest.raises(SafelightError, match="'abstopk' cannot be written"):
        write_sae(other, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_where_a_run_keeps_its_sae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    gemma_scope(run / "export" / "layer_3")
    sparsify(run / "other")
    assert read_sae(str(run)).cfg.architecture() == "jumprelu"
    deep = sparsify(tmp_path / "deep" / "a" / "b").parent.parent
    assert read_sae(str(deep)).cfg.architecture() == "topk"
    dictionary(deep / "c", "AutoEncoder")
    with pytest.raises(SafelightError, match=r"holds 2 SAEs, so give the folder of one of them: a/b, c"):
        read_sae(str(deep))
    monkeypatch.setattr(zoo, "path", lambda name: tmp_path / {"deep": "deep"}[name])
    assert read_sae("zoo:deep/a/b").cfg.architecture() == "topk"
    assert read_sae("zoo:deep/c").cfg.architecture() == "standard"


def test_places_without_one(tmp_path: Path) -> None:
    with pytest.raises(SafelightError, match=r"absent: there is no such file or folder; .*sae_weights.safetensors"):
        read_sae(str(tmp_path / "absent"))
    (tmp_path / "cfg.json").write_text("{}")
    (tmp_path / "weights.bin").write_text("")
    with pytest.raises(SafelightError, match=r"weights.bin: this file is no SAE"):
        read_sae(str(tmp_path / "weights.bin"))
    with pytest.raises(SafelightError, match=r"holds no SAE. Looked for, .*ae.pt.* It holds: cfg.json, weights.bin"):
        read_sae(str(tmp_path))
    with pytest.raises(SafelightError, match="zoo:nothing does not ship"):
        read_sae("zoo:nothing/sae")


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def from_pretrained(release: str, name: str, device: str) -> Any:
        asked.append((release, name, device))
        if release == "gone":
            raise ConnectionError("no\nroute")
        return lens.SAE.load_from_disk(write_sae(trained("topk"), tmp_path))

    monkeypatch.setattr(lens.SAE, "from_pretrained", from_pretrained)
    agree(read_sae("sae-lens:gemma-scope-2b/layer_3/width_16k"), *by_hand(trained("topk"), "topk", X))
    assert asked == [("gemma-scope-2b", "layer_3/width_16k", "cpu")]
    with pytest.raises(SafelightError, match=r"hub \(ConnectionError: no route\); download .*params.npz"):
        read_sae("sae-lens:gone/layer_3")
    for source in ("sae-lens:gpt2", "sae-lens:/a", "sae-lens:a/"):
        with pytest.raises(SafelightError, match="write sae-lens:<release>/<sae_id>"):
            read_sae(source)


def test_without_sae_lens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = gemma_scope(tmp_path)
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(SafelightError, match="sae-lens"):
        read_sae(str(folder))


def test_reading_draws_no_random_numbers(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    for number, folder in enumerate((gemma_scope(tmp_path / "a"), sparsify(tmp_path / "b"))):
        assert read_sae(str(folder)).W_enc.shape == (D, M), number
    assert torch.equal(state, torch.random.get_rng_state())


WRONG = float("nan")
DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda at: gemma_scope(at, W_enc=None), r"params.npz lacks W_enc \(expected: W_enc, b_enc"),
    (lambda at: gemma_scope(at, W_skip=W_ENC), "also has W_skip; that is another model"),
    (lambda at: gemma_scope(at, W_dec=W_DEC.T), r"W_dec has the shape \(6, 10\), expected is \(10, 6\)"),
    (lambda at: gemma_scope(at, W_enc=B_ENC), r"W_enc has the shape \(10,\) and is no matrix"),
    (lambda at: gemma_scope(at, b_dec=B_DEC * WRONG), "b_dec has numbers that are not finite"),
    (lambda at: gemma_scope(at, b_enc=np.array([{}] * M)), "params.npz is damaged, or is no archive of plain numbers"),
    (lambda at: sparsify(at, activation="groupmax"), "activation='groupmax' is not supported"),
    (lambda at: sparsify(at, transcode=True), "transcode=True is not supported"),
    (lambda at: sparsify(at, skip_connection=True), "skip_connection=True is not supported"),
    (lambda at: sparsify(at, k=None), "cfg.json: k=None, expected is a whole number above 0"),
    (lambda at: sparsify(at, k=M + 1), "k=11 of 10 features cannot be active"),
    (lambda at: sparsify(at, num_latents=0), "expansion_factor=None, expected is a whole number"),
    (lambda at: sparsify(at, d_in=True), "d_in=True, expected"),
    (lambda at: sparsify(at, num_latents=20), r"W_dec has the shape \(10, 6\), expected is \(20, 6\)"),
    (lambda at: sparsify(at, {"W_dec": None}), "sae.safetensors lacks W_dec"),
    (lambda at: sparsify(at, {"encoder.weight": W_ENC.T * WRONG}), "W_enc has numbers that are not finite"),
    (lambda at: (sparsify(at) / "cfg.json").write_text("{"), r"cfg.json is not JSON"),
    (lambda at: (sparsify(at) / "cfg.json").write_text("[]"), r"cfg.json holds a list"),
    (lambda at: dictionary(at, "AutoEncoder", dict_class="CrossCoder"), "dict_class='CrossCoder' is not one of Auto"),
    (lambda at: dictionary(at, "AutoEncoder", {"bias": None}), "ae.pt lacks bias"),
    (lambda at: dictionary(at, "AutoEncoder", dict_size=20), r"W_dec has the shape \(10, 6\), expected is \(20, 6\)"),
    (lambda at: dictionary(at, "AutoEncoder", activation_dim="6"), "activation_dim='6', expected"),
    (lambda at: dictionary(at, "AutoEncoderTopK", {"k": None}), "k=None, expected"),
    (lambda at: dictionary(at, "AutoEncoderTopK", {"k": torch.tensor([3])}), r"k=\[3\], expected"),
    (lambda at: dictionary(at, "BatchTopKSAE", {"threshold": None}), "lacks threshold"),
    (lambda at: dictionary(at, "GatedAutoEncoder", {"r_mag": R_MAG * WRONG}), "r_mag has numbers that are not finite"),
    (lambda at: dictionary(at, "AutoEncoder", {"bias": "text"}), "ae.pt is no state dict"),
    (
        lambda at: (dictionary(at, "AutoEncoder") / "config.json").write_text("{}"),
        "config.json has no 'trainer'",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damages(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(tmp_path)
    with pytest.raises(SafelightError, match=message):
        read_sae(str(tmp_path))


def test_damages_of_sae_lens_folders(tmp_path: Path) -> None:
    folder = write_sae(trained("topk"), tmp_path)
    config, weights = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    for changed, message in [
        ({"architecture": "transcoder"}, "architecture 'transcoder' is not one of"),
        ({"architecture": ["topk"]}, "is not one of"),
        ({"d_sae": 12}, r"sae-lens cannot read it \(RuntimeError: .*size mismatch"),
        ({"k": 11}, "k=11 of 10 features"),
        ({"k": "3"}, "k='3' of 10 features"),
        ({"architecture": "jumprelu"}, "Missing key.*threshold"),
        ({"normalize_activations": "expected_average_only_in"}, r"scaled to the norm sqrt\(d_in\), and does not say"),
        ({"normalize_activations": "rubbish"}, "sae-lens cannot read it"),
    ]:
        (folder / "cfg.json").write_text(json.dumps(config | changed))
        with pytest.raises(SafelightError, match=message):
            read_sae(str(folder))
    (folder / "cfg.json").write_text(json.dumps(config))
    for name, wrong, message in [
        ("b_dec", None, "Missing key.*b_dec"),
        ("W_enc", weights["W_enc"] * WRONG, "W_enc has numbers that are not finite"),
    ]:
        changed = {key: value for key, value in (weights | {name: wrong}).items() if value is not None}
        save_file(changed, folder / "sae_weights.safetensors")
        with pytest.raises(SafelightError, match=message):
            read_sae(str(folder))
    (folder / "cfg.json").write_text("{'a'}")
    with pytest.raises(SafelightError, match=r"cfg.json is not JSON"):
        read_sae(str(folder))


def test_files_that_are_cut_off(tmp_path: Path) -> None:
    folders = {
        "params.npz": gemma_scope(tmp_path / "a"),
        "sae.safetensors": sparsify(tmp_path / "b"),
        "ae.pt": dictionary(tmp_path / "c", "AutoEncoder"),
        "sae_weights.safetensors": write_sae(trained("gated"), tmp_path / "d"),
    }
    for name, folder in folders.items():
        whole = (folder / name).read_bytes()
        for content in (whole[: len(whole) // 2], whole[:-20], b"", b"no weights at all"):
            (folder / name).write_bytes(content)
            with pytest.raises(SafelightError, match=rf"{name}.*damaged"):
                read_sae(str(folder))
        (folder / name).write_bytes(whole)
        assert read_sae(str(folder)).W_enc.shape == (D, M)
    with (tmp_path / "a" / "params.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(SafelightError, match=r"params.npz is damaged, or is no archive"):
        read_sae(str(tmp_path / "a"))


class Trap:
    """What runs a command when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    folder = dictionary(tmp_path / "sae", "AutoEncoder")
    arrays = gemma_scope(tmp_path / "npz", b_enc=np.array([Trap(sprung)] * M, dtype=object))
    for write in (lambda: torch.save(CLASSES["AutoEncoder"] | {"bias": Trap(sprung)}, folder / "ae.pt"),
                  lambda: (folder / "ae.pt").write_bytes(pickle.dumps(Trap(sprung), protocol=2))):  # fmt: skip
        write()
        with pytest.raises(SafelightError, match=r"ae.pt is damaged, or holds more than tensors"):
            read_sae(str(folder))
        assert not sprung.exists()
    with pytest.raises(SafelightError, match="no archive of plain numbers"):
        read_sae(str(arrays))
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists(), "the trap works"
