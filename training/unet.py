"""The base: SDXL's UNet, small, an ordinary diffusion model of the captions; it never sees an identity."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPTokenizer

from training import captions, clip, data, latents
from training.common import Ema, Options, Run, autocast, descend, device, load_part, options

BATCH = 32
TEXT_DROPOUT = 0.12
TIME_WIDTH = 16
MOST = 4.0
"""Largest weight of a noisy step, see ``denoising_loss``."""


def build(size: int) -> UNet2DConditionModel:
    """A fresh UNet on latents [n, 4, size / 8, size / 8]."""
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
    # For 64 positions the plain matrix products beat the fused kernel: its backward pass is slow on CPUs.
    model.set_attn_processor(AttnProcessor())
    return model


def schedule() -> DDPMScheduler:
    """SDXL's published noise schedule."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
    )


class Conditions:
    """Captions to what the UNet is conditioned on."""

    def __init__(self, settings: Options) -> None:
        self.towers, self.words = clip.trained(settings.work)
        self.size = settings.size

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Texts -> states of both towers [n, 77, 128] and the pooled text with time ids; "" gives zeros."""
        states, pooled = encode_texts(self.towers, self.words, texts)
        keep = torch.tensor([float(text != "") for text in texts], device=states.device)
        times = torch.tensor([self.size, self.size, 0, 0, self.size, self.size], device=states.device)
        added = {"text_embeds": pooled * keep[:, None], "time_ids": times.repeat(len(texts), 1).float()}
        return states * keep[:, None, None], added


def encode_texts(towers: clip.Clip, words: CLIPTokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """hidden_states[-2] of both towers side by side, [n, 77, 128], and the second's projection [n, 64]."""
    batch = words(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    ids = batch.input_ids.to(device())
    with autocast():
        first = towers.text_1(ids, output_hidden_states=True)
        second = towers.text_2(ids, output_hidden_states=True)
    states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    return states.float(), second.text_embeds.float()


class Pictures:
    """Draws latents with their captions."""

    def __init__(self, settings: Options, portraits: data.Portraits, start: int) -> None:
        self.portraits = portraits
        self.facts = captions.all_facts(portraits)
        self.latents = np.load(latents.path(settings.work), mmap_mode="r")
        self.places = place_weights(portraits)
        self.draws = np.random.default_rng(settings.seed + start)
        self.sentences = random.Random(settings.seed + start)
        # Smiles and women are three quarters and two thirds of the portraits; even them out somewhat.
        facts = [self.facts[i] for i in portraits.train]
        weight = np.array([(1.0 if f.smile else 2.2) * (1.0 if f.sex == "female" else 1.5) for f in facts])
        self.chances = weight / weight.sum()

    def draw(self, count: int, dropout: float) -> tuple[Tensor, np.ndarray, np.ndarray, list[str]]:
        """Latents [n, 4, h, w], portraits [n], their slots [n] and captions, "" where dropped."""
        index = self.draws.choice(self.portraits.train, count, p=self.chances)
        slot = np.where(
            self.draws.random(count) < 0.5,
            self.draws.integers(0, 2, count),
            self.draws.integers(2, latents.SLOTS, count),
        )
        values = np.stack([self.latents[i, s] for i, s in zip(index, slot, strict=True)]).astype(np.float32)
        texts = []
        for i, s in zip(index, slot, strict=True):
            style = data.STYLE_NAMES[latents.content(int(i), int(s))[0]]
            dropped = self.sentences.random() < dropout
            texts.append("" if dropped else captions.caption(self.facts[i], style, self.sentences))
        return torch.from_numpy(values).to(device()), index, slot, texts

    def weights(self, index: np.ndarray, slot: np.ndarray) -> Tensor:
        """How much each place of these latents counts, [n, 1, h, w], mean 1."""
        mirrored = [int(latents.content(int(i), int(s))[1]) for i, s in zip(index, slot, strict=True)]
        return self.places[index, mirrored][:, None].to(device())


def place_weights(portraits: data.Portraits) -> Tensor:
    """Weights of the latents' places, as they are and mirrored, [n, 2, h, w], mean 1.

    The face counts twice and the mouth eight times: an expression is a few latents wide, and the model
    would otherwise learn it long after hair and background.
    """
    side = portraits.size // 8
    points = portraits.key_points * (side / 256)
    eyes = np.linalg.norm(points[:, 1] - points[:, 0], axis=1)[:, None, None]
    y, x = np.mgrid[0:side, 0:side] + 0.5

    def ellipse(centre: np.ndarray, wide: float, high: float) -> np.ndarray:
        across = (x[None] - centre[:, 0, None, None]) / (wide * eyes)
        along = (y[None] - centre[:, 1, None, None]) / (high * eyes)
        return np.asarray(across**2 + along**2 < 1)

    values = 1.0 + ellipse(points.mean(1), 1.25, 1.6) + 6.0 * ellipse(points[:, 3:].mean(1), 0.75, 0.5)
    values /= values.mean((1, 2), keepdims=True)
    both = np.stack([values, values[:, :, ::-1]], axis=1)
    return torch.from_numpy(both.astype(np.float32))


def denoising_loss(
    predicted: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    scheduler: DDPMScheduler,
    places: Tensor,
    most: float = 1.0,
) -> Tensor:
    """Mean squared error of the noise with min-SNR-5 weights.

    Args:
        predicted: [n, 4, h, w].
        noise: [n, 4, h, w].
        timesteps: [n].
        scheduler: whose noise levels.
        places: weight of each place, [n, 1, h, w].
        most: above 1, noisy steps count as they would when velocity is predicted, at most so much. A
            few-step sampler decides at almost pure noise, where an error of the noise is an error of the
            picture many times as large.
    """
    alphas = scheduler.alphas_cumprod.to(noise.device)[timesteps]
    ratio = alphas / (1 - alphas)
    weight = ratio.clamp(max=5) / ratio * (1 + 1 / ratio).clamp(max=most)
    loss: Tensor = (weight * (places * (predicted.float() - noise).pow(2)).mean((1, 2, 3))).mean()
    return loss


def trained(work: Path, size: int) -> UNet2DConditionModel:
    """The base of the checkpoint, averaged weights, frozen."""
    model = build(size)
    model.load_state_dict(load_part(work / "unet.pt", "ema"), strict=True)
    return model.eval().requires_grad_(False).to(device())


def main() -> None:
    """Train within the budget."""
    settings = options("unet", 45)
    model: Any = build(settings.size).to(device())
    conditions = Conditions(settings)
    optimiser = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.99), weight_decay=0.01)
    ema = Ema(model, 0.998)
    parts = {"model": model, "ema": ema, "optimiser": optimiser}
    run = Run(settings.work / "unet.pt", settings.minutes, parts, save_every=90)
    pictures = Pictures(settings, data.load(settings), run.step)
    scheduler = schedule()
    smooth = 0.0
    for _ in run.steps():
        clean, index, slots, texts = pictures.draw(BATCH, TEXT_DROPOUT)
        states, added = conditions(texts)
        timesteps = torch.randint(0, 1000, (BATCH,), device=clean.device)
        noise = torch.randn_like(clean)
        with autocast():
            noisy = scheduler.add_noise(clean, noise, timesteps)
            predicted = model(noisy, timesteps, states, added_cond_kwargs=added).sample
        loss = denoising_loss(predicted, noise, timesteps, scheduler, pictures.weights(index, slots), MOST)
        descend(loss, optimiser, run.rate(8e-4, warm_up=100))
        ema.update(model)
        smooth = loss.item() if run.step == 0 else 0.98 * smooth + 0.02 * loss.item()
        run.log(50, loss=smooth)


if __name__ == "__main__":
    main()
