"""Train only the decoder, for sharper faces; the encoder is frozen, so the latents do not change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from training import data, vae
from training.common import Ema, Run, autocast, descend, device, load_part, options

BATCH = 8
NOISE = 0.1
"""Standard deviation of the noise added to the whitened latents, to make the decoder robust."""


def frozen(work: Path, size: int) -> AutoencoderKL:
    """Return the autoencoder of ``training.vae``, with averaged weights and whitened latents.

    Mean and standard deviation of each channel are folded into the two 1x1 convolutions around the latents,
    so ``scaling_factor`` is 1 and every channel has mean 0 and standard deviation 1.
    """
    model = vae.build(size)
    shadow = load_part(work / "vae.pt", "ema")
    model.load_state_dict(shadow, strict=True)
    statistics = torch.load(work / "latent_statistics.pt", weights_only=True)
    fold(model, statistics["mean"], statistics["std"])
    return model


@torch.no_grad()
def fold(model: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Make the encoder return (z - mean) / std and the decoder accept it; mean and std are [4]."""
    assert model.quant_conv is not None
    assert model.post_quant_conv is not None
    inward, outward = model.quant_conv, model.post_quant_conv
    assert inward.bias is not None
    assert outward.bias is not None
    inward.weight[:4] /= std[:, None, None, None]
    inward.bias[:4] = (inward.bias[:4] - mean) / std
    # The log-variance is scaled accordingly.
    inward.bias[4:] -= 2 * std.log()
    outward.bias += outward.weight[:, :, 0, 0] @ mean
    outward.weight *= std[None, :, None, None]


@torch.no_grad()
def encode(model: AutoencoderKL, images: Tensor) -> Tensor:
    """Return the means of the posterior, [n, 4, s / 8, s / 8] float32."""
    with autocast():
        mean: Tensor = model.encode(images).latent_dist.mean
    return mean.float()


def measure(work: Path, portraits: data.Portraits) -> None:
    """Write mean and standard deviation of each latent channel over 1,024 training images."""
    path = work / "latent_statistics.pt"
    if path.exists():
        return
    model = vae.build(portraits.size)
    model.load_state_dict(load_part(work / "vae.pt", "ema"), strict=True)
    model = model.eval().to(device())
    generator = np.random.default_rng(1)
    latents = torch.cat([encode(model, vae.draw(portraits, generator, 32)[0]).cpu() for _ in range(32)])
    torch.save({"mean": latents.mean((0, 2, 3)), "std": latents.std((0, 2, 3))}, path)


def trained(work: Path, size: int) -> AutoencoderKL:
    """Return the final autoencoder: the frozen encoder, and the decoder of the latest stage."""
    model = frozen(work, size)
    if (work / "decoder.pt").exists():
        model.load_state_dict(load_part(work / "decoder.pt", "ema"), strict=False)
    return model.eval().requires_grad_(False).to(device())


def main() -> None:
    """Train within the time budget."""
    settings = options("decoder", 30)
    portraits = data.load(settings)
    measure(settings.work, portraits)
    weights = vae.face_weights(portraits)
    model = frozen(settings.work, settings.size).to(device())
    model.encoder.requires_grad_(False)
    assert model.quant_conv is not None
    assert model.post_quant_conv is not None
    model.quant_conv.requires_grad_(False)
    half = torch.nn.ModuleDict({"decoder": model.decoder, "post_quant_conv": model.post_quant_conv})
    optimizer = torch.optim.AdamW(half.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    ema = Ema(half)
    parts = {"model": half, "ema": ema, "optimizer": optimizer}
    run = Run(settings.work / "decoder.pt", settings.minutes, parts, save_every=60)
    generator = np.random.default_rng(settings.seed + 1000 + run.step)
    face_loss = vae.FaceLoss(settings, portraits)
    for _ in run.steps():
        target, index, flip = vae.draw(portraits, generator, BATCH)
        weight = weights[index]
        weight[flip] = weight[flip].flip(-1)
        weight = weight.to(target.device)
        latents = encode(model, target)
        with autocast():
            output = model.decode(latents + NOISE * torch.rand(1).item() * torch.randn_like(latents)).sample
        reconstruction = vae.pyramid_loss(output.float(), target, weight)
        features, person = face_loss(output.float(), target, index, flip)
        loss = reconstruction + vae.FEATURE_WEIGHT * features + vae.PERSON_WEIGHT * person
        descend(loss, optimizer, run.rate(6e-4, warm_up=100))
        ema.update(half)
        psnr = -10 * np.log10(F.mse_loss(output.detach().float(), target).item() / 4)
        run.log(100, loss=reconstruction.item(), psnr=psnr, features=features.item(), person=person.item())


if __name__ == "__main__":
    main()
