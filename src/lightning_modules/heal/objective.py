"""What a healed model is trained on: the data loss of the paper, or agreement with the dense model."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from safelight.generators import Conditioning, Generator
from safelight.generators.noising import diffuse, diffusion_target, flow_interpolate


def denoising_loss(generator: Generator, cond: Conditioning, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """The model's ordinary training loss on given latents, at random noise levels.

    Flow models regress the velocity ``noise - clean`` on the straight path; the others what their scheduler's
    ``prediction_type`` says, epsilon or ``v = sqrt(a) noise - sqrt(1 - a) clean``, on the variance-preserving path.

    Args:
        generator: the model that learns.
        cond: conditioning with B rows; negative rows are not used.
        clean: latents (B, ...), here the dense model's final ones.
        noise: standard normal, like ``clean``.
        level: noise level of each row, (B,), uniform in [0, 1).

    Returns:
        Mean squared error, fp32 scalar.
    """
    positive = {key: value for key, value in cond.items() if not key.startswith("negative_")}
    table = getattr(generator.scheduler, "alphas_cumprod", None)
    if table is None:
        noisy, target = flow_interpolate(clean, noise, level)
        timestep = level * 1000
    else:
        steps = (level * len(table)).long()
        alpha_bar = table.to(clean)[steps]
        noisy, timestep = diffuse(clean, noise, alpha_bar), steps.to(clean)
        target = diffusion_target(generator.scheduler.config.prediction_type, clean, noise, alpha_bar)
    prediction = generator.denoise(noisy.to(generator.dtype), timestep, _cast(positive, generator))
    return F.mse_loss(prediction.float(), target.float())


def step_loss(generator: Generator, cond: Conditioning, before: Tensor, after: Tensor, i: int) -> Tensor:
    """One sampler step from the dense model's latent shall land on the dense model's next one.

    Divided by the mean square of the sample's own step, so that all steps weigh the same and a batch's loss is the mean
    of its samples' losses, however they are spread over processes.

    Args:
        generator: the model that learns.
        cond: conditioning with B rows.
        before: dense latents before step ``i``, (B, ...).
        after: dense latents after it.
        i: step index.
    """
    moved = generator.step(before, i, cond)
    error, size = ((latent - after).square().flatten(1).mean(1) for latent in (moved, before))
    return (error / size.clamp_min(1e-12)).mean()


def final_loss(generator: Generator, cond: Conditioning, noise: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of the final latent, with the whole sampling loop inside the gradient.

    Args:
        generator: the model that learns.
        cond: conditioning with B rows.
        noise: initial latents, (B, ...).
        target: dense final latents, like ``noise``.
    """
    return F.mse_loss(generator.rollout(noise, cond, checkpoint="step"), target)


def _cast(cond: Conditioning, generator: Generator) -> Conditioning:
    return {key: value.to(generator.dtype) if value.is_floating_point() else value for key, value in cond.items()}
