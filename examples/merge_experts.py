"""Merge safety experts that were trained in runs of their own into one adapter, and say who owns how much of it.

python examples/merge_experts.py runs/hate/export runs/violence/export --backbone sd15 --csv train.csv --images DIR
"""

import argparse
from pathlib import Path

from safelight.datamodules import CoProV2DataModule
from safelight.generators import load_generator
from safelight.lightning_modules.safety_dpo.adapters import load_adapter, save_adapter
from safelight.lightning_modules.safety_dpo.experts import calibrate
from safelight.lightning_modules.safety_dpo.merging import co_merge, compress, shares

parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
parser.add_argument(
    "exports", type=Path, nargs="+", help="export folders of runs with the same backbone, rank and seed"
)
parser.add_argument("--backbone", default="tiny_sdxl", help="what the experts were trained on")
parser.add_argument("--csv", default="zoo:copro_mini", help="training file with the calibration prompts")
parser.add_argument("--images", default="zoo:copro_mini", help="where its pictures are")
parser.add_argument("--rows", type=int, default=64, help="calibration pictures")
parser.add_argument("--rank", type=int, default=None, help="cut the merged adapter to this rank")
parser.add_argument("--out", type=Path, default=Path("runs/merged_experts"), help="where the merged adapter goes")
given = parser.parse_args()

experts, starts = {}, set()
for folder in given.exports:
    adapter, about = load_adapter(folder)
    experts[folder.parent.name if folder.name == "export" else folder.name] = adapter
    starts.add(about.get("lora_seed"))
if len(starts) > 1:
    print(f"the experts started from different seeds ({', '.join(sorted(map(str, starts)))}); whole rows still mix")

generator = load_generator(given.backbone)
data = CoProV2DataModule(csv=given.csv, images=given.images, image_size=generator.height, shared_flip=False)
data.setup()
statistics = calibrate(generator, experts, data.calibration_dataloader(), rows=given.rows)
merged = co_merge(experts, statistics)
owned = list(shares(statistics.owners(), len(experts)).values())
for number, name in enumerate(experts):
    print(f"{name:20s} owns {sum(layer[number] for layer in owned) / len(owned):.0%} of the rows")
if given.rank is not None:
    merged, error = compress(merged, given.rank)
    print(f"cut to rank {given.rank}: relative error {error:.2f}")
part = "unet" if hasattr(generator.pipeline, "unet") else "transformer"
file = save_adapter(given.out, merged, part, {"method": "safety_dpo", "merge": "delta_rows", "experts": list(experts)})
print(f"merged adapter: {file}")
