import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safelight.errors import SafelightError
from safelight.masking.files import import_reference_masks, load_masks, save_masks, save_pruned, write_manifest
from safelight.masking.hardening import harden
from safelight.masking.load import load_pipeline, load_pruned
from safelight.masking.removal import fold, remove
from safelight.masking.units import KINDS, find_units
from safelight.testing.denoisers import FAMILIES, build_denoiser, example_inputs

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data" / "ecodiff_sdxl_masks"
PICKLES = {".pt", ".pth", ".bin", ".pkl", ".ckpt"}


def run(denoiser, inputs):
    with torch.no_grad():
        return denoiser(**inputs)[0]


def in_fresh_process(code, folder):
    """Run code where safelight cannot be imported and the folder is the working directory."""
    prelude = "import sys; sys.modules['safelight'] = None; import torch\n"
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", prelude + code], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr


def test_everything_opens_in_a_fresh_process_without_safelight(tmp_path, helpers):
    """Folded folders with plain diffusers, removed ones with the loader that lies beside them."""
    import diffusers

    classes = {}
    for shift, family in enumerate(FAMILIES):
        denoiser = build_denoiser(family)
        inputs = example_inputs(denoiser)
        masks = helpers.awkward(find_units(denoiser, KINDS), shift)
        fold(denoiser, masks)
        denoiser.save_pretrained(tmp_path / family / "folded")
        torch.save({"inputs": inputs, "output": run(denoiser, inputs)}, tmp_path / family / "expected.test")
        removed = build_denoiser(family)
        remove(removed, masks)
        save_pruned(removed, tmp_path / family / "removed", {"base": "random"})
        classes[family] = type(denoiser).__name__
        assert hasattr(diffusers, classes[family])
    assert not [p for p in tmp_path.rglob("*") if p.suffix in PICKLES]
    in_fresh_process(
        f"""
import diffusers
for family, name in {classes!r}.items():
    expected = torch.load(family + "/expected.test", weights_only=True)
    sys.path.insert(0, family + "/removed")
    from load import load_pruned
    folded = getattr(diffusers, name).from_pretrained(family + "/folded")
    removed = load_pruned(family + "/removed")
    sizes = [sum(p.numel() for p in m.parameters()) for m in (folded, removed)]
    assert sizes[1] < sizes[0], sizes
    for model in (folded, removed):
        with torch.no_grad():
            error = (model(**expected["inputs"])[0] - expected["output"]).abs().max().item()
        assert error <= 1e-5, (family, type(model), error)
try:
    import safelight
except ImportError:
    pass
else:
    raise AssertionError("safelight was importable")
""",
        tmp_path,
    )


def test_a_pipeline_folder_may_hold_a_pruned_denoiser(tmp_path):
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    denoiser = build_denoiser("dit")
    inputs = example_inputs(denoiser)
    specs = find_units(denoiser)
    remove(denoiser, harden({s.name: torch.rand(s.n_units) for s in specs}, specs, keep=0.5, price="params"))
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    DiTPipeline(denoiser, vae, DDIMScheduler()).save_pretrained(tmp_path)
    write_manifest(denoiser, tmp_path / "transformer")
    pipeline = load_pipeline(tmp_path)
    assert type(pipeline).__name__ == "DiTPipeline"
    assert torch.equal(run(pipeline.transformer, inputs), run(denoiser, inputs))


def test_the_manifest_names_every_kept_unit_and_reloading_keeps_the_record(tmp_path, helpers):
    denoiser = build_denoiser("flux")
    masks = helpers.awkward(find_units(denoiser, KINDS), 2)
    remove(denoiser, masks)
    save_pruned(denoiser, tmp_path / "one", {"base": "x"})
    manifest = json.loads((tmp_path / "one" / "pruning.json").read_text())
    assert manifest["meta"] == {"base": "x"}
    (stage,) = manifest["stages"]
    assert [layer["name"] for layer in stage] == list(masks)
    assert all(layer["kept"] == masks[layer["name"]].nonzero()[:, 0].tolist() for layer in stage)
    again = load_pruned(tmp_path / "one", dtype=torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    again = load_pruned(tmp_path / "one")
    specs = find_units(again)
    remove(again, {specs[0].name: torch.zeros(specs[0].n_units)})
    save_pruned(again, tmp_path / "two")
    inputs = example_inputs(again)
    assert torch.equal(run(load_pruned(tmp_path / "two"), inputs), run(again, inputs))


def test_damaged_pruned_folders_are_refused_by_name(tmp_path):
    denoiser = build_denoiser("dit")
    with pytest.raises(SafelightError, match="remove"):
        save_pruned(denoiser, tmp_path)
    remove(denoiser, {"transformer_blocks.0.attn1": torch.tensor([True, False, True])})
    save_pruned(denoiser, tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model.safetensors is damaged"):
        load_pruned(tmp_path)
    save_file(build_denoiser("dit").state_dict(), weights)
    with pytest.raises(ValueError, match=r"do not fit its pruning.json"):
        load_pruned(tmp_path)
    (tmp_path / "pruning.json").write_text("{")
    with pytest.raises(ValueError, match=r"pruning.json is damaged"):
        load_pruned(tmp_path)
    (tmp_path / "pruning.json").unlink()
    with pytest.raises(ValueError, match=r"pruning.json is missing"):
        load_pruned(tmp_path)


def test_masks_round_trip_by_name(tmp_path):
    specs = find_units(build_denoiser("unet_sdxl"))
    logits = {s.name: torch.randn(s.n_units) for s in specs}
    masks = harden(logits, specs, keep=0.6)
    file = save_masks(tmp_path / "logits", logits, specs, {"beta": 0.01})
    save_masks(tmp_path / "hard.safetensors", dict(reversed(masks.items())), specs)
    assert set(load_file(file)) == set(logits)
    values, meta = load_masks(tmp_path / "logits", specs)
    assert meta == {"beta": 0.01}
    assert all(torch.equal(values[name], logits[name]) for name in logits)
    values, _ = load_masks(tmp_path / "hard.safetensors", specs)
    assert all(torch.equal(values[name], masks[name]) for name in masks)
    assert {v.dtype for v in values.values()} == {torch.bool}
    layers = json.loads((tmp_path / "hard.json").read_text())["layers"]
    assert layers[specs[0].name] == {"kind": specs[0].kind, "n_units": specs[0].n_units}


def test_damaged_or_foreign_masks_are_refused(tmp_path):
    specs = find_units(build_denoiser("dit"))
    file = save_masks(tmp_path, {s.name: torch.ones(s.n_units) for s in specs}, specs)
    with pytest.raises(SafelightError, match="denoiser lacks"):
        load_masks(tmp_path, find_units(build_denoiser("flux")))
    with pytest.raises(SafelightError, match="pickled"):
        load_masks(tmp_path / "masks.pt")
    file.write_bytes(b"\x08nonsense")
    with pytest.raises(SafelightError, match="damaged"):
        load_masks(tmp_path)
    file.unlink()
    with pytest.raises(SafelightError, match="missing"):
        load_masks(tmp_path)


def reference_lists(specs, tmp_path):
    files = {}
    for kind in ("head", "neuron"):
        values = [torch.randn(s.n_units).bfloat16() for s in specs if s.kind == kind]
        torch.save(values, tmp_path / f"{kind}.pt")
        files[kind] = (tmp_path / f"{kind}.pt", values)
    return files


def test_reference_lists_are_matched_in_execution_order(tmp_path):
    denoiser = build_denoiser("unet_sdxl")
    inputs, specs = example_inputs(denoiser), find_units(denoiser)
    order = []
    for spec in specs:
        denoiser.get_submodule(spec.name).register_forward_hook(lambda m, a, o, n=spec.name: order.append(n))
    run(denoiser, inputs)
    assert order == [spec.name for spec in specs]
    files = reference_lists(specs, tmp_path)
    logits = import_reference_masks(files["head"][0], files["neuron"][0], specs)
    heads = [logits[s.name] for s in specs if s.kind == "head"]
    assert all(torch.equal(a, b.float()) for a, b in zip(heads, files["head"][1], strict=True))
    assert {v.dtype for v in logits.values()} == {torch.float32}


def test_reference_lists_that_do_not_fit_are_refused(tmp_path):
    specs = find_units(build_denoiser("unet_sdxl"))
    files = reference_lists(specs, tmp_path)
    with pytest.raises(SafelightError, match="which must match"):
        import_reference_masks(files["neuron"][0], files["head"][0], specs)
    torch.save({"a": torch.ones(2)}, tmp_path / "dict.pt")
    with pytest.raises(SafelightError, match="not a list"):
        import_reference_masks(tmp_path / "dict.pt", files["neuron"][0], specs)
    torch.save([build_denoiser("dit")], tmp_path / "module.pt")
    with pytest.raises(SafelightError, match="more than tensors"):
        import_reference_masks(tmp_path / "module.pt", files["neuron"][0], specs)
    with pytest.raises(SafelightError, match=r"absent.pt is missing"):
        import_reference_masks(tmp_path / "absent.pt", files["neuron"][0], specs)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the published SDXL mask files beside the repository")
def test_published_sdxl_masks_give_the_published_model(helpers):
    import diffusers

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    specs = find_units(unet)
    logits = import_reference_masks(SHARED / "attn.pt", SHARED / "ff.pt", specs)
    assert sum(s.kind == "head" for s in specs) == 140
    assert sum(s.kind == "neuron" for s in specs) == 70
    assert sum(len(logits[s.name]) for s in specs if s.kind == "head") == 2600
    assert sum(len(logits[s.name]) for s in specs if s.kind == "neuron") == 332_800
    total = helpers.parameters(unet)
    assert total == 2_567_463_684
    uniform = harden(logits, specs, keep=0.8)
    masks = harden(logits, specs, keep={"head": 0.68, "neuron": 0.88})
    empty = [name for name, mask in masks.items() if not mask.any()]
    assert [name.rsplit(".", 1)[1] for name in empty] == ["attn2", "attn2"]
    assert all(name.startswith("mid_block") for name in empty)
    for chosen, left in ((uniform, 2_114_220_548), (masks, 2_088_752_388)):
        with torch.device("meta"):
            pruned = diffusers.UNet2DConditionModel.from_config(unet.config)
        remove(pruned, chosen)
        assert helpers.parameters(pruned) == left
