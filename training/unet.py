"""The base: SDXL's UNet, small, an ordinary diffusion model of the captions; it never sees an identity."""

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
MOST = 4.0
"""Largest weight of a noisy step, see ``denoising_loss``."""
ASKED = 8
"""Pictures of a batch whose caption asks for an expression, whatever the portrait shows."""
MOOD_WEIGHT = 0.15
CONTRAST = 24.0
"""Factor of cosines before the softmax over people."""
CONTRAST_WEIGHT = 2 / CONTRAST


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


@dataclass(frozen=True)
class Batch:
    """Latents with their captions."""

    clean: Tensor
    """[n, 4, h, w]."""
    index: np.ndarray
    """Portraits, [n]."""
    slot: np.ndarray
    """Of each portrait's latents, [n]."""
    texts: list[str]
    """Captions, "" where dropped."""
    smile: np.ndarray
    """What the captions of the first ASKED say of the expression, [ASKED]: half of them not what the
    portrait shows."""
    places: Tensor
    """How much each place counts, [n, 1, h, w]."""


class Pictures:
    """Draws latents with their captions."""

    def __init__(self, settings: Options, portraits: data.Portraits, start: int) -> None:
        self.portraits = portraits
        self.facts = captions.all_facts(portraits)
        self.latents = np.load(latents.path(settings.work), mmap_mode="r")
        self.places = place_weights(portraits)
        self.upper = 1 - mouths(portraits, 1.3, 1.0)
        self.draws = np.random.default_rng(settings.seed + start)
        self.sentences = random.Random(settings.seed + start)
        # Smiles and women are four fifths and two thirds of the portraits; even them out somewhat.
        facts = [self.facts[i] for i in portraits.train]
        weight = np.array([(1.0 if f.smile else 3.0) * (1.0 if f.sex == "female" else 1.5) for f in facts])
        self.chances = weight / weight.sum()

    def draw(self, count: int, dropout: float) -> Batch:
        """A batch of ``count``; captions are dropped with that chance, but not of the first ASKED."""
        index = self.draws.choice(self.portraits.train, count, p=self.chances)
        slot = np.where(
            self.draws.random(count) < 0.5,
            self.draws.integers(0, 2, count),
            self.draws.integers(2, latents.SLOTS, count),
        )
        values = np.stack([self.latents[i, s] for i, s in zip(index, slot, strict=True)]).astype(np.float32)
        smile = self.draws.random(ASKED) < 0.5
        texts, places = [], []
        for place, (i, s) in enumerate(zip(index, slot, strict=True)):
            style, mirrored = latents.content(int(i), int(s))
            fact, weights = self.facts[i], self.places[i, int(mirrored)]
            asked = place < ASKED
            if asked:
                fact = replace(fact, smile=bool(smile[place]), surprised=False)
                if fact.smile != self.facts[i].smile:  # where the expression shows, the picture is no model
                    weights = weights * self.upper[i, int(mirrored)]
            dropped = not asked and self.sentences.random() < dropout
            text = captions.caption(fact, data.STYLE_NAMES[style], self.sentences, 1.0 if asked else 0.85)
            texts.append("" if dropped else text)
            places.append(weights)
        clean = torch.from_numpy(values).to(device())
        return Batch(clean, index, slot, texts, smile, torch.stack(places)[:, None].to(device()))


def timesteps(count: int, place: Any, lean: float = 1.0) -> Tensor:
    """Timesteps to train on, [n]; ``lean`` below 1 draws more of the noisy ones. The first ASKED are
    noisy: there it is decided who it is and what mood it shows."""
    found = (1000 * torch.rand(count, device=place) ** lean).long()
    found[:ASKED] = (1000 - 550 * torch.rand(ASKED, device=place) ** 1.5).long().clamp(max=999)
    return found


def ellipses(portraits: data.Portraits, centre: np.ndarray, wide: float, high: float) -> np.ndarray:
    """Masks on the latents' grid, [n, h, w]: half axes in units of the eyes' distance."""
    side = portraits.size // 8
    scale = side / 256
    eyes = np.linalg.norm(portraits.key_points[:, 1] - portraits.key_points[:, 0], axis=1)[:, None, None]
    y, x = np.mgrid[0:side, 0:side] + 0.5
    across = (x[None] - scale * centre[:, 0, None, None]) / (wide * scale * eyes)
    along = (y[None] - scale * centre[:, 1, None, None]) / (high * scale * eyes)
    return np.asarray(across**2 + along**2 < 1, np.float32)


def with_mirrored(values: np.ndarray) -> Tensor:
    """[n, h, w] as they are and mirrored, [n, 2, h, w]."""
    return torch.from_numpy(np.stack([values, values[:, :, ::-1]], axis=1).astype(np.float32))


def mouths(portraits: data.Portraits, wide: float, high: float) -> Tensor:
    """Masks of the mouth, as they are and mirrored, [n, 2, h, w]."""
    return with_mirrored(ellipses(portraits, portraits.key_points[:, 3:].mean(1), wide, high))


def place_weights(portraits: data.Portraits) -> Tensor:
    """Weights of the latents' places, as they are and mirrored, [n, 2, h, w], mean 1.

    The face counts twice and the mouth eight times: an expression is a few latents wide, and the model
    would otherwise learn it long after hair and background.
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


class Looks:
    """What the first pictures of a batch look like by now: the noise alone says little about that; the
    decoded prediction, seen by other networks, does."""

    def __init__(self, settings: Options, portraits: data.Portraits) -> None:
        self.faces = vae.FaceLoss(settings, portraits)
        self.decoder = decoder.trained(settings.work, settings.size)
        self.expression = expression.trained(settings.work)
        self.alphas = schedule().alphas_cumprod
        self.people = torch.from_numpy(portraits.embeddings[portraits.train]).to(device())
        self.places = {int(index): place for place, index in enumerate(portraits.train)}

    def crops(
        self, noisy: Tensor, predicted: Tensor, times: Tensor, batch: Batch, loose: bool = False
    ) -> Tensor:
        """Aligned faces of the clean pictures that these noise predictions amount to,
        [ASKED, 3, 112, 112]; ``loose`` as for ``FaceLoss.crops``. Faces stand within a pixel of the same
        place in all portraits, and so in what a model draws."""
        alphas = self.alphas.to(noisy.device)[times[:ASKED]][:, None, None, None]
        # At pure noise an error of the noise is fourteen times as large in the picture. The gradient on its
        # way back must not be, or those pictures alone would steer.
        share, noise = (alphas / (1 - alphas)).sqrt().clamp(max=1), predicted[:ASKED].float()
        noise = share * noise + (1 - share) * noise.detach()
        clean = (noisy[:ASKED] - (1 - alphas).sqrt() * noise) / alphas.sqrt()
        index, slot = batch.index[:ASKED], batch.slot[:ASKED]
        flip = [latents.content(int(i), int(s))[1] for i, s in zip(index, slot, strict=True)]
        with autocast():
            pictures = self.decoder.decode(clean.clamp(-4, 4)).sample
        return self.faces.crops(pictures.float(), torch.from_numpy(index), torch.tensor(flip), loose)

    def mood(self, crops: Tensor, batch: Batch) -> Tensor:
        """How unlike the expressions are that the captions ask for; a scalar."""
        with autocast():
            logits = self.expression(crops).float()
        wanted = torch.from_numpy(batch.smile.astype(np.float32)).to(logits.device)
        return expression.unlike(logits, wanted)

    def unlike(self, crops: Tensor, batch: Batch) -> Tensor:
        """How unlike the wanted people they are, and how like others; a scalar.

        One minus the cosine to the teacher's embedding, and the cross-entropy of finding the right person
        among all: faces of one kind are near one another, and what sets one apart is a small part of it.
        """
        with autocast():
            found = self.faces.network.embed(self.faces.network.features(crops)[-1]).float()
        own = torch.tensor([self.places[int(i)] for i in batch.index[:ASKED]], device=found.device)
        cosines = found @ self.people.T
        alike = cosines.gather(1, own[:, None]).mean()
        return 1 - alike + CONTRAST_WEIGHT * nn.functional.cross_entropy(CONTRAST * cosines, own)


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
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.99), weight_decay=0.01)
    ema = Ema(model, 0.998)
    # Captions alone taught the text towers little about expressions: "smiling" and "serious" hardly differ.
    text = conditions.towers.text_1.train().requires_grad_(True)
    text_optimizer = torch.optim.AdamW(text.parameters(), lr=6e-4, betas=(0.9, 0.99), weight_decay=0.01)
    text_ema = Ema(text, 0.998)
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    parts |= {"text": text, "text_ema": text_ema, "text_optimizer": text_optimizer}
    run = Run(settings.work / "unet.pt", settings.minutes, parts, save_every=90)
    portraits = data.load(settings)
    pictures = Pictures(settings, portraits, run.step)
    looks = Looks(settings, portraits)
    scheduler = schedule()
    smooth = smooth_mood = 0.0
    for _ in run.steps():
        batch = pictures.draw(BATCH, TEXT_DROPOUT)
        states, added = conditions(batch.texts)
        times = timesteps(BATCH, batch.clean.device)
        noise = torch.randn_like(batch.clean)
        with autocast():
            noisy = scheduler.add_noise(batch.clean, noise, times)
            predicted = model(noisy, times, states, added_cond_kwargs=added).sample
        loss = denoising_loss(predicted, noise, times, scheduler, batch.places, MOST)
        mood = looks.mood(looks.crops(noisy, predicted, times, batch), batch)
        text_optimizer.zero_grad(set_to_none=True)
        rate = run.rate(6e-4, warm_up=100)
        descend(loss + MOOD_WEIGHT * mood, optimizer, rate)
        step(text_optimizer, rate)
        ema.update(model)
        text_ema.update(text)
        smooth = loss.item() if smooth == 0 else 0.98 * smooth + 0.02 * loss.item()
        smooth_mood = mood.item() if smooth_mood == 0 else 0.98 * smooth_mood + 0.02 * mood.item()
        run.log(50, loss=smooth, mood=smooth_mood)


if __name__ == "__main__":
    main()
