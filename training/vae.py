"""Train a small autoencoder with SDXL's layout (factor 8, 4 channels).

Encoder and decoder are trained together on pixels, pixel differences and, if the recognizer is trained, its
features of the aligned face, because the details that identify a face are only a few pixels wide. Afterwards
the encoder is frozen, so that latents can be cached, and ``training.decoder`` can continue with the decoder.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from training import data, recognizer
from training.common import Ema, Options, Run, autocast, descend, device, images_to_tensor, options

BATCH = 8
KL_WEIGHT = 5e-4
FEATURE_WEIGHT = 0.2
PERSON_WEIGHT = 0.2
LATENT_NOISE = 0.05
"""Standard deviation of the noise added to latents before decoding, because the UNet is not exact."""


def build(size: int) -> AutoencoderKL:
    """Return an untrained autoencoder; latents are [n, 4, size / 8, size / 8]."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 96, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=size,
        scaling_factor=1.0,
        force_upcast=True,
    )


def face_weights(portraits: data.Portraits) -> Tensor:
    """Return weights [n, 1, size, size], mean about 1, three times higher in an ellipse around the face."""
    size = portraits.size
    points = portraits.key_points * (size / 256)
    center = points.mean(1)
    eyes = np.linalg.norm(points[:, 1] - points[:, 0], axis=1)
    y, x = np.mgrid[0:size, 0:size]
    across = (x[None] - center[:, 0, None, None]) / (1.25 * eyes[:, None, None])
    along = (y[None] - center[:, 1, None, None]) / (1.6 * eyes[:, None, None])
    weights = np.where(across**2 + along**2 < 1, 3.0, 1.0).astype(np.float32)
    return torch.from_numpy(weights[:, None] / 1.4)


def pyramid_loss(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Return the L1 loss of pixels and of differences between neighbors, at three resolutions."""
    loss = (weight * (output - target).abs()).mean()
    error = output - target
    for _ in range(3):
        across = (error[..., 1:] - error[..., :-1]).abs() * weight[..., 1:]
        along = (error[..., 1:, :] - error[..., :-1, :]).abs() * weight[..., 1:, :]
        loss = loss + 0.5 * (across.mean() + along.mean())
        error, weight = F.avg_pool2d(error, 2), F.avg_pool2d(weight, 2)
    return loss


def draw(
    portraits: data.Portraits, generator: np.random.Generator, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return images [n, 3, s, s] in [-1, 1], portrait indices [n] and flips [n]; two thirds are photos."""
    index = generator.choice(portraits.train, count)
    style = np.where(generator.random(count) < 0.65, 0, generator.integers(1, len(data.STYLE_NAMES), count))
    flip = generator.random(count) < 0.5
    images = np.stack([portraits.images[i, s] for i, s in zip(index, style, strict=True)])
    images[flip] = images[flip][:, :, ::-1]
    return images_to_tensor(images), torch.from_numpy(index), torch.from_numpy(flip)


def loosened(matrices: Tensor) -> Tensor:
    """Rotate, scale, shift and mirror the matrices [n, 2, 3] of ``affine_grid`` at random."""
    count = len(matrices)
    angle, scale = 0.05 * torch.randn(count), 1 + 0.05 * torch.randn(count)
    side = 1 - 2 * (torch.rand(count) < 0.5).float()
    cos, sin, shift = angle.cos() * scale, angle.sin() * scale, 0.03 * torch.randn(2, count)
    change = torch.stack([cos * side, -sin, shift[0], sin * side, cos, shift[1]], 1).reshape(count, 2, 3)
    last = torch.tensor([[[0.0, 0.0, 1.0]]]).expand(count, 1, 3)
    return (torch.cat([matrices, last], 1) @ torch.cat([change, last], 1))[:, :2]


class FaceLoss:
    """Difference of the faces of two images in the recognizer: features at three scales, and embedding."""

    def __init__(self, settings: Options, portraits: data.Portraits) -> None:
        self.network = recognizer.trained(settings.work)
        size, side = portraits.size, 112
        matrices = []
        for points in portraits.key_points * (size / 256):
            for view in (points, data.mirrored_points(points, size)):
                forward = np.vstack([data.alignment(view, side), (0, 0, 1)])
                # From pixel indices to [-1, 1] in grid_sample (edges, not centers) and back.
                to_unit = np.array([[2 / size, 0, 1 / size - 1], [0, 2 / size, 1 / size - 1], [0, 0, 1]])
                from_unit = np.array(
                    [[side / 2, 0, side / 2 - 0.5], [0, side / 2, side / 2 - 0.5], [0, 0, 1]]
                )
                matrices.append((to_unit @ np.linalg.inv(forward) @ from_unit)[:2])
        self.matrices = torch.from_numpy(np.stack(matrices).astype(np.float32)).reshape(-1, 2, 2, 3)

    def crops(self, images: Tensor, index: Tensor, flip: Tensor, loose: bool = False) -> Tensor:
        """Return aligned crops [n, 3, 112, 112] of images [n, 3, s, s] of portraits; ``loose`` rotates,
        scales, shifts and mirrors them slightly at random."""
        matrix = self.matrices[index, flip.long()]
        if loose:
            matrix = loosened(matrix)
        matrix = matrix.to(images.device)
        grid = F.affine_grid(matrix, [len(images), 3, 112, 112], align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)

    def __call__(self, output: Tensor, target: Tensor, index: Tensor, flip: Tensor) -> tuple[Tensor, Tensor]:
        """Return the relative feature distance, and one minus the cosine of the embeddings; scalars."""
        with torch.no_grad(), autocast():
            expected = self.network.features(self.crops(target, index, flip))
            person = self.network.embed(expected[-1]).float()
        with autocast():
            actual = self.network.features(self.crops(output, index, flip))
            embedding = self.network.embed(actual[-1]).float()
        pairs = zip(actual, expected, strict=True)
        features = [(a.float() - b.float()).abs().mean() / b.float().abs().mean() for a, b in pairs]
        return torch.stack(features).mean(), 1 - (embedding * person).sum(1).mean()


def train_autoencoder(settings: Options) -> None:
    """Train encoder and decoder together."""
    portraits = data.load(settings)
    weights = face_weights(portraits)
    model = build(settings.size).to(device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    ema = Ema(model)
    run = Run(
        settings.work / "vae.pt",
        settings.minutes,
        {"model": model, "ema": ema, "optimizer": optimizer},
        save_every=60,
    )
    generator = np.random.default_rng(settings.seed + run.step)
    face_loss = FaceLoss(settings, portraits) if (settings.work / "recognizer.pt").exists() else None
    for _ in run.steps():
        target, index, flip = draw(portraits, generator, BATCH)
        weight = weights[index]
        weight[flip] = weight[flip].flip(-1)
        weight = weight.to(target.device)
        with autocast():
            posterior = model.encode(target).latent_dist
            latents = posterior.sample()
            output = model.decode(latents + LATENT_NOISE * torch.randn_like(latents)).sample
        reconstruction = pyramid_loss(output.float(), target, weight)
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        loss = reconstruction + KL_WEIGHT * kl
        features = person = torch.zeros(())
        if face_loss is not None:
            features, person = face_loss(output.float(), target, index, flip)
            loss = loss + FEATURE_WEIGHT * features + PERSON_WEIGHT * person
        descend(loss, optimizer, run.rate(1.2e-3, warm_up=200, floor=0.1))
        ema.update(model)
        mse = F.mse_loss(output.detach().float(), target).item() / 4
        figures = {"features": features.item(), "person": person.item()}
        run.log(100, loss=reconstruction.item(), kl=kl.item(), psnr=-10 * np.log10(mse), **figures)


def main() -> None:
    """Train within the time budget."""
    train_autoencoder(options("vae", 45))


if __name__ == "__main__":
    main()
