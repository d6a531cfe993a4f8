"""The command line from a notebook: plain dicts in, plain values out. Each ``# %%`` starts a cell."""

# %% Train. Keys are those of the command line, nested or dotted; mistakes are listed as there.
import json
import os

from safelight import cli

settings = {
    "method": "ecodiff",
    "method.keep": 0.8,
    "trainer": {"max_steps": 100},
    "run_dir": "runs/notebook",
    "resume": "auto",  # the same cell again returns the finished run
}
settings |= json.loads(os.environ.get("SETTINGS", "{}"))  # for a smaller or larger one
summary = cli.train(settings)

# %% What came out.
assert summary is not None
for name, numbers in {"pruned": summary.metrics, **summary.controls}.items():
    print(f"{name:<12} latent error {numbers['latent_mse_median']:.4f}  recognised {numbers['clip_accuracy']:.2f}")
print("open", summary.artefact, "with diffusers")

# %% A checkpoint is all that is needed to repeat the numbers; it fails loudly if they are others.
again = cli.evaluate(f"{settings['run_dir']}/checkpoints/best.ckpt")
assert abs(again.metrics["latent_mse_median"] - summary.metrics["latent_mse_median"]) <= 1e-6
