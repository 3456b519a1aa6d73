"""Train the base model: a small UNet with SDXL's layout, conditioned on captions, without identity."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTokenizer

from training import captions, clip, data, decoder, expression, latents, vae
from training.common import Ema, Options, Run, autocast, descend, device, load_part, options, step

BATCH = 32
TEXT_DROPOUT = 0.12
TIME_WIDTH = 16
MAX_WEIGHT = 4.0
"""Largest loss weight of a noisy step, see ``denoising_loss``."""
DECODED_COUNT = 8
"""Number of images per batch, the first ones, whose predictions are decoded and scored. Their captions always
specify an expression, independently of the portrait."""
EXPRESSION_WEIGHT = 0.15
CONTRAST = 24.0
"""Factor of cosines before the softmax over people."""
CONTRAST_WEIGHT = 2 / CONTRAST


def build(size: int) -> UNet2DConditionModel:
    """Return an untrained UNet for latents [n, 4, size / 8, size / 8]."""
    model = UNet2DConditionModel(
        sample_size=size // 8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 112, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 1),
        attention_head_dim=(2, 4, 4),
        cross_attention_dim=2 * clip.TEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_WIDTH + clip.PROJECTION,
        norm_num_groups=16,
    )
    # For 64 positions, eager attention is faster than the fused kernel, whose backward pass is slow on CPUs.
    model.set_attn_processor(AttnProcessor())
    return model


def schedule() -> DDPMScheduler:
    """Return SDXL's published noise schedule."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
    )


class Conditions:
    """Encodes captions as conditions of the UNet."""

    def __init__(self, settings: Options) -> None:
        self.towers, self.words = clip.trained(settings.work)
        self.size = settings.size

    def __call__(self, texts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return states of both towers [n, 77, 128], and pooled embeddings with time ids; zeros for ""."""
        states, pooled = encode_texts(self.towers, self.words, texts)
        keep = torch.tensor([float(text != "") for text in texts], device=states.device)
        times = torch.tensor([self.size, self.size, 0, 0, self.size, self.size], device=states.device)
        added = {"text_embeds": pooled * keep[:, None], "time_ids": times.repeat(len(texts), 1).float()}
        return states * keep[:, None, None], added


def encode_texts(towers: clip.Clip, words: CLIPTokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return hidden_states[-2] of both towers, concatenated to [n, 77, 128], and the projection [n, 64]."""
    batch = words(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    ids = batch.input_ids.to(device())
    with autocast():
        first = towers.text_1(ids, output_hidden_states=True)
        second = towers.text_2(ids, output_hidden_states=True)
    states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    return states.float(), second.text_embeds.float()


@dataclass(frozen=True)
class Batch:
    """Latents with their captions."""

    clean: Tensor
    """[n, 4, h, w]."""
    index: np.ndarray
    """Indices of the portraits, [n]."""
    slot: np.ndarray
    """Slots in the cached latents of the portraits, [n]."""
    texts: list[str]
    """Captions; "" if dropped."""
    smile: np.ndarray
    """Whether the first captions specify a smile, [decoded]; half of them contradict the portrait."""
    weights: Tensor
    """Loss weights of the positions, [n, 1, h, w]."""


class CaptionedLatents:
    """Samples latents with their captions."""

    def __init__(self, settings: Options, portraits: data.Portraits, start: int) -> None:
        self.portraits = portraits
        self.facts = captions.all_facts(portraits)
        self.latents = np.load(latents.path(settings.work), mmap_mode="r")
        self.weights = position_weights(portraits)
        self.upper = 1 - mouths(portraits, 1.3, 1.0)
        self.draws = np.random.default_rng(settings.seed + start)
        self.sentences = random.Random(settings.seed + start)
        # Four fifths of the portraits smile and two thirds are women: reduce the imbalance.
        facts = [self.facts[i] for i in portraits.train]
        weight = np.array([(1.0 if f.smile else 3.0) * (1.0 if f.sex == "female" else 1.5) for f in facts])
        self.chances = weight / weight.sum()

    def draw(self, count: int, dropout: float, decoded: int = DECODED_COUNT) -> Batch:
        """Return a batch. The first ``decoded`` captions are never dropped and specify an expression."""
        index = self.draws.choice(self.portraits.train, count, p=self.chances)
        slot = np.where(
            self.draws.random(count) < 0.5,
            self.draws.integers(0, 2, count),
            self.draws.integers(2, latents.SLOTS, count),
        )
        values = np.stack([self.latents[i, s] for i, s in zip(index, slot, strict=True)]).astype(np.float32)
        smile = self.draws.random(decoded) < 0.5
        texts, batch_weights = [], []
        for position, (i, s) in enumerate(zip(index, slot, strict=True)):
            style, mirrored = latents.content(int(i), int(s))
            fact, weights = self.facts[i], self.weights[i, int(mirrored)]
            with_expression = position < decoded
            if with_expression:
                fact = replace(fact, smile=bool(smile[position]), surprised=False)
                if fact.smile != self.facts[i].smile:  # the mouth of the portrait is no target
                    weights = weights * self.upper[i, int(mirrored)]
            dropped = not with_expression and self.sentences.random() < dropout
            text = captions.caption(
                fact, data.STYLE_NAMES[style], self.sentences, 1.0 if with_expression else 0.85
            )
            texts.append("" if dropped else text)
            batch_weights.append(weights)
        clean = torch.from_numpy(values).to(device())
        return Batch(clean, index, slot, texts, smile, torch.stack(batch_weights)[:, None].to(device()))


def timesteps(count: int, target: Any, lean: float = 1.0) -> Tensor:
    """Sample timesteps, [n]; ``lean`` below 1 increases the share of noisy ones. The first ``DECODED_COUNT``
    are noisy, because identity and expression are determined there."""
    times = (1000 * torch.rand(count, device=target) ** lean).long()
    times[:DECODED_COUNT] = (
        (1000 - 550 * torch.rand(DECODED_COUNT, device=target) ** 1.5).long().clamp(max=999)
    )
    return times


def ellipses(portraits: data.Portraits, center: np.ndarray, wide: float, high: float) -> np.ndarray:
    """Return elliptic masks on latents, [n, h, w]; half axes in units of the distance between the eyes."""
    side = portraits.size // 8
    scale = side / 256
    eyes = np.linalg.norm(portraits.key_points[:, 1] - portraits.key_points[:, 0], axis=1)[:, None, None]
    y, x = np.mgrid[0:side, 0:side] + 0.5
    across = (x[None] - scale * center[:, 0, None, None]) / (wide * scale * eyes)
    along = (y[None] - scale * center[:, 1, None, None]) / (high * scale * eyes)
    return np.asarray(across**2 + along**2 < 1, np.float32)


def with_mirrored(values: np.ndarray) -> Tensor:
    """Stack values [n, h, w] with their mirror images, [n, 2, h, w]."""
    return torch.from_numpy(np.stack([values, values[:, :, ::-1]], axis=1).astype(np.float32))


def mouths(portraits: data.Portraits, wide: float, high: float) -> Tensor:
    """Return masks of the mouth and their mirror images, [n, 2, h, w]."""
    return with_mirrored(ellipses(portraits, portraits.key_points[:, 3:].mean(1), wide, high))


def position_weights(portraits: data.Portraits) -> Tensor:
    """Return loss weights of the positions and their mirror images, [n, 2, h, w], mean 1.

    The face has weight 2 and the mouth weight 8: an expression covers few latents, and the model would
    otherwise learn it long after hair and background.
    """
    points = portraits.key_points
    values = 1.0 + ellipses(portraits, points.mean(1), 1.25, 1.6)
    values += 6.0 * ellipses(portraits, points[:, 3:].mean(1), 0.75, 0.5)
    return with_mirrored(values / values.mean((1, 2), keepdims=True))


def denoising_loss(
    predicted: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    scheduler: DDPMScheduler,
    position_weights: Tensor,
    max_weight: float = 1.0,
) -> Tensor:
    """Return the mean squared error of the noise with min-SNR-5 weights.

    Args:
        predicted: [n, 4, h, w].
        noise: [n, 4, h, w].
        timesteps: [n].
        scheduler: noise schedule.
        position_weights: weights of the positions, [n, 1, h, w].
        max_weight: above 1, noisy steps are weighted as for velocity prediction, up to this maximum. A
            few-step sampler depends on predictions at almost pure noise, where an error of the noise causes a
            much larger error of the image.
    """
    alphas = scheduler.alphas_cumprod.to(noise.device)[timesteps]
    ratio = alphas / (1 - alphas)
    weight = ratio.clamp(max=5) / ratio * (1 + 1 / ratio).clamp(max=max_weight)
    loss: Tensor = (weight * (position_weights * (predicted.float() - noise).pow(2)).mean((1, 2, 3))).mean()
    return loss


class DecodedLosses:
    """Losses of decoded predictions, computed by other networks for the first images of a batch. The error of
    the noise alone does not measure identity and expression."""

    def __init__(self, settings: Options, portraits: data.Portraits) -> None:
        self.faces = vae.FaceLoss(settings, portraits)
        self.decoder = decoder.trained(settings.work, settings.size)
        self.expression = expression.trained(settings.work)
        self.alphas = schedule().alphas_cumprod
        self.people = torch.from_numpy(portraits.embeddings[portraits.train]).to(device())
        self.rows = {int(index): row for row, index in enumerate(portraits.train)}

    def crops(
        self, noisy: Tensor, predicted: Tensor, times: Tensor, batch: Batch, loose: bool = False
    ) -> Tensor:
        """Return aligned face crops of the denoised images, [DECODED_COUNT, 3, 112, 112]; ``loose`` as in
        ``FaceLoss.crops``. The position of the face varies by less than a pixel among the portraits, and
        therefore also in predictions."""
        alphas = self.alphas.to(noisy.device)[times[:DECODED_COUNT]][:, None, None, None]
        # At pure noise, an error of the noise is 14 times larger in the image. Limit its gradient, which
        # would otherwise dominate the batch.
        share, noise = (alphas / (1 - alphas)).sqrt().clamp(max=1), predicted[:DECODED_COUNT].float()
        noise = share * noise + (1 - share) * noise.detach()
        clean = (noisy[:DECODED_COUNT] - (1 - alphas).sqrt() * noise) / alphas.sqrt()
        index, slot = batch.index[:DECODED_COUNT], batch.slot[:DECODED_COUNT]
        flip = [latents.content(int(i), int(s))[1] for i, s in zip(index, slot, strict=True)]
        with autocast():
            images = self.decoder.decode(clean.clamp(-4, 4)).sample
        return self.faces.crops(images.float(), torch.from_numpy(index), torch.tensor(flip), loose)

    def expression_loss(self, crops: Tensor, batch: Batch) -> Tensor:
        """Return the loss of the expressions that the captions specify, a scalar."""
        with autocast():
            logits = self.expression(crops).float()
        smiles = torch.from_numpy(batch.smile.astype(np.float32)).to(logits.device)
        return expression.smile_loss(logits, smiles)

    def identity_loss(self, crops: Tensor, batch: Batch) -> Tensor:
        """Return the identity loss, a scalar.

        One minus the cosine to the teacher's embedding, plus the cross-entropy of the correct person among
        all: similar faces have a high cosine, so the cosine alone does not distinguish them.
        """
        with autocast():
            embeddings = self.faces.network.embed(self.faces.network.features(crops)[-1]).float()
        own = torch.tensor([self.rows[int(i)] for i in batch.index[:DECODED_COUNT]], device=embeddings.device)
        cosines = embeddings @ self.people.T
        cosine = cosines.gather(1, own[:, None]).mean()
        return 1 - cosine + CONTRAST_WEIGHT * nn.functional.cross_entropy(CONTRAST * cosines, own)


def trained(work: Path, size: int) -> UNet2DConditionModel:
    """Return the base of the checkpoint, with averaged weights, frozen."""
    model = build(size)
    model.load_state_dict(load_part(work / "unet.pt", "ema"), strict=True)
    return model.eval().requires_grad_(False).to(device())


def main() -> None:
    """Train within the time budget."""
    settings = options("unet", 45)
    model: Any = build(settings.size).to(device())
    conditions = Conditions(settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.99), weight_decay=0.01)
    ema = Ema(model, 0.998)
    # Contrastive training hardly separates "smiling" from "serious" in the text towers: train one further.
    text = conditions.towers.text_1.train().requires_grad_(True)
    text_optimizer = torch.optim.AdamW(text.parameters(), lr=6e-4, betas=(0.9, 0.99), weight_decay=0.01)
    text_ema = Ema(text, 0.998)
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    parts |= {"text": text, "text_ema": text_ema, "text_optimizer": text_optimizer}
    run = Run(settings.work / "unet.pt", settings.minutes, parts, save_every=90)
    portraits = data.load(settings)
    images = CaptionedLatents(settings, portraits, run.step)
    decoded_losses = DecodedLosses(settings, portraits)
    scheduler = schedule()
    smooth = smooth_expression = 0.0
    for _ in run.steps():
        batch = images.draw(BATCH, TEXT_DROPOUT)
        states, added = conditions(batch.texts)
        times = timesteps(BATCH, batch.clean.device)
        noise = torch.randn_like(batch.clean)
        with autocast():
            noisy = scheduler.add_noise(batch.clean, noise, times)
            predicted = model(noisy, times, states, added_cond_kwargs=added).sample
        loss = denoising_loss(predicted, noise, times, scheduler, batch.weights, MAX_WEIGHT)
        expression_loss = decoded_losses.expression_loss(
            decoded_losses.crops(noisy, predicted, times, batch), batch
        )
        text_optimizer.zero_grad(set_to_none=True)
        rate = run.rate(6e-4, warm_up=100)
        descend(loss + EXPRESSION_WEIGHT * expression_loss, optimizer, rate)
        step(text_optimizer, rate)
        ema.update(model)
        text_ema.update(text)
        smooth = loss.item() if smooth == 0 else 0.98 * smooth + 0.02 * loss.item()
        smooth_expression = (
            expression_loss.item()
            if smooth_expression == 0
            else 0.98 * smooth_expression + 0.02 * expression_loss.item()
        )
        run.log(50, loss=smooth, expression=smooth_expression)


if __name__ == "__main__":
    main()
