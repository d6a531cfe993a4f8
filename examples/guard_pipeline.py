"""Put an exported guard in front of a pipeline: blocked prompts are not drawn, the others cost no second encoding.

python examples/guard_pipeline.py runs/latent_guard/<run>/export --backbone tiny_sdxl "a small cat" "a small pistol"
"""

import argparse
from pathlib import Path

from safelight.generators import load_generator
from safelight.lightning_modules.latent_guard.pipelines import BlockedPromptError, GuardedPipeline

parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
parser.add_argument("guard", type=Path, help="export of a latent_guard run with method.encoder=<the pipeline's folder>")
parser.add_argument("prompts", nargs="+")
parser.add_argument("--backbone", default="tiny_sdxl", help="the pipeline to guard")
parser.add_argument("--out", type=Path, default=Path("runs/guarded"), help="where the pictures go")
given = parser.parse_args()

generator = load_generator(given.backbone)
pipeline = GuardedPipeline.with_own_encoder(generator.pipeline, given.guard)
given.out.mkdir(parents=True, exist_ok=True)
for number, prompt in enumerate(given.prompts):
    try:
        picture = pipeline(prompt, num_inference_steps=generator.num_inference_steps).images[0]
    except BlockedPromptError as error:
        (verdict,) = error.verdicts
        print(f"{prompt!r}: blocked, {verdict.concept!r} at {verdict.score:.2f} (threshold {verdict.threshold:.2f})")
        continue
    picture.save(given.out / f"{number}.png")
    (verdict,) = pipeline.verdicts
    print(f"{prompt!r}: drawn to {given.out / f'{number}.png'}, best {verdict.concept!r} at {verdict.score:.2f}")
