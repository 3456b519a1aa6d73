"""The identity adapter, FaceID-PlusV2's layout, trained on the base alone.

Four identity tokens come from the recognizer's embedding, refined by the vision tower's states of
the aligned crop; each cross-attention gets keys and values for them; a LoRA on all attention layers
goes with it. The reference is another view of the portrait than the target: mirrored, in other light,
and mostly with the mouth of somebody else. Each person has one portrait, so an untouched reference
always wears the target's expression, and the adapter would learn to copy it over the prompt's.

Most of a batch learns to see through noise that was added to portraits. Some of it starts from nothing
but noise and is judged by what comes out: a noisy portrait still gives away who it is, so an adapter that
only ever sees those need not say it.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor
from diffusers.models.embeddings import IPAdapterFaceIDPlusImageProjection
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessor

from training import captions, clip, data, low_rank, recognizer, unet
from training.common import Ema, Options, Run, autocast, descend, device, load_part, options
from training.walk import GUIDANCE, STATIONS, Guide, Walk

BATCH = 32
TOKENS = 4
RANK = 6
ADAPTER_SCALE = 0.8
LORA_SCALE = 0.6
"""The scales at which the recipes run the adapter; trained so, they need no extrapolation."""
VIEWS = 6
"""Reference views a portrait: two with its own mouth, four with another's; odd ones are mirrored."""
VIEW_CHANCES = (0.08, 0.08, 0.21, 0.21, 0.21, 0.21)
MOUTH = ((112, 186), (54, 34))
"""Centre and half axes of the mouth in an aligned crop of 224 pixels."""
STRONGEST = 0.4
"""Half of the steps run the adapter by up to this above its scale: what looks right only at one strength
becomes a caricature under guidance or scale-power."""
PERSON_WEIGHT = 2.0
MOOD_WEIGHT = 1.5
MOST = 12.0
"""Largest weight of a noisy step, see ``unet.denoising_loss``."""
IDENTITY_DROPOUT = 0.12
TEXT_DROPOUT = 0.1
ENDINGS = ("to_q", "to_k", "to_v", "to_out.0")


def image_processor() -> CLIPImageProcessor:
    """What the product builds: resize and center-crop to the encoder's image size."""
    size = clip.VISION_SIDE
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


@torch.no_grad()
def crop_states(towers: clip.Clip, crops_bgr: list[np.ndarray]) -> Tensor:
    """224x224 crops, BGR as the published code has them -> hidden_states[-2], [n, 65, 96]."""
    pictures = [Image.fromarray(crop) for crop in crops_bgr]
    pixels = image_processor()(pictures, return_tensors="pt").pixel_values.to(device())
    states: Tensor = towers.vision(pixels, output_hidden_states=True).hidden_states[-2]
    return states


@torch.no_grad()
def empty_states(towers: clip.Clip) -> Tensor:
    """States of an all-zero pixel tensor, [1, 65, 96]: half of "no identity"."""
    pixels = torch.zeros(1, 3, clip.VISION_SIDE, clip.VISION_SIDE, device=device())
    states: Tensor = towers.vision(pixels, output_hidden_states=True).hidden_states[-2]
    return states


def with_mouth(crop: np.ndarray, donor: np.ndarray) -> np.ndarray:
    """A 224x224 aligned crop with the mouth of another, softly joined and in the first one's skin tone."""
    (x, y), axes = MOUTH
    mask = np.zeros(crop.shape[:2], np.float32)
    cv2.ellipse(mask, (x, y), axes, 0, 0, 360, 1.0, -1)
    ring = cv2.dilate(mask, np.ones((15, 15))) - mask > 0
    mask = cv2.GaussianBlur(mask, (0, 0), 6)[..., None]
    own, other = crop.astype(np.float32), donor.astype(np.float32)
    other = other + own[ring].mean(0) - other[ring].mean(0)
    return np.asarray(np.clip(own + mask * (other - own), 0, 255), np.uint8)


def views(settings: Options, portraits: data.Portraits) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings [n, views, 512] and states [n, views, 65, 96] of all reference views, cached.

    A donor of a mouth has the person's sex and group; half of the donors smile, whoever the person is.
    """
    ids_path, states_path = settings.work / "view_embeddings.npy", settings.work / "view_states.npy"
    if not states_path.exists():
        network = recognizer.trained(settings.work)
        towers, _ = clip.trained(settings.work)
        generator = np.random.default_rng(settings.seed + 11)
        facts = captions.all_facts(portraits)
        donors: dict[tuple[str, str, bool], list[int]] = {}
        for index in portraits.train:
            fact = facts[index]
            donors.setdefault((fact.sex, fact.group, fact.smile), []).append(int(index))
        embeddings = np.zeros((len(portraits.labels), VIEWS, recognizer.WIDTH), np.float32)
        states = np.zeros((len(portraits.labels), VIEWS, 65, 96), np.float16)

        def aligned(index: int) -> np.ndarray:
            return data.crop(np.asarray(portraits.originals[index]), portraits.key_points[index], 224)

        for index in portraits.train:
            crops = []
            for view in range(VIEWS):
                picture = aligned(index)
                if view >= 2:
                    kind = (facts[index].sex, facts[index].group, view < 4)
                    picture = with_mouth(picture, aligned(int(generator.choice(donors[kind]))))
                if view:
                    picture = recognizer.degrade(picture, generator, 0.6)
                if view % 2 == 1:
                    picture = picture[:, ::-1]
                crops.append(np.ascontiguousarray(picture))
            small = np.stack([cv2.resize(crop, (112, 112), interpolation=cv2.INTER_AREA) for crop in crops])
            embeddings[index] = recognizer.embed_all(network, small)
            reversed_crops = [np.ascontiguousarray(crop[:, :, ::-1]) for crop in crops]
            states[index] = crop_states(towers, reversed_crops).cpu().numpy()
        np.save(ids_path, embeddings)
        np.save(states_path, states)
    return np.asarray(np.load(ids_path)), np.asarray(np.load(states_path, mmap_mode="r"))


class Adapter(nn.Module):
    """All that is trained; the base stays outside."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        width = 2 * clip.TEXT_WIDTH
        self.projection = IPAdapterFaceIDPlusImageProjection(
            embed_dims=width, output_dims=width, hidden_dims=96, heads=2, id_embeddings_dim=recognizer.WIDTH
        )
        self.projection.shortcut = True
        self.wrapped = [low_rank.inject(base, ENDINGS, RANK, LORA_SCALE)]
        self.additions = low_rank.Additions(self.wrapped[0])
        processors = {}
        for name, processor in base.attn_processors.items():
            if name.endswith("attn2.processor"):
                attention = base.get_submodule(name.removesuffix(".processor"))
                own = IPAdapterAttnProcessor(
                    attention.inner_dim, width, num_tokens=(TOKENS,), scale=ADAPTER_SCALE
                )
                # Starting from the text's own keys and values saves most of the way.
                for mine, text in ((own.to_k_ip[0], attention.to_k), (own.to_v_ip[0], attention.to_v)):
                    mine.weight.data.copy_(text.layer.weight.data)
                processors[name] = own
            else:
                processors[name] = processor
        # diffusers empties the dictionary it is given.
        base.set_attn_processor(dict(processors))
        self.names = list(processors)
        crossing = [number for number, name in enumerate(self.names) if name.endswith("attn2.processor")]
        self.attention = nn.ModuleDict({str(number): processors[self.names[number]] for number in crossing})

    def strengthen(self, scale: float) -> None:
        """Run the identity's keys and values at another scale."""
        processor: Any
        for processor in self.attention.values():
            processor.scale = [scale]

    def tokens(self, embeddings: Tensor, states: Tensor) -> Tensor:
        """Embeddings [n, 512] and states [n, 65, 96] -> identity tokens [n, 4, 128]."""
        self.projection.clip_embeds = states[:, None]
        found: Tensor = self.projection(embeddings)
        return found

    def places(self) -> dict[str, dict[str, list[Tensor]]]:
        """``image_proj`` and ``ip_adapter`` of the published file: each tensor's name, and the parameters
        that it holds, one below the other."""
        image: dict[str, list[Tensor]] = {}
        state = dict(self.projection.named_parameters())
        for key, value in state.items():
            if key.endswith("attn.to_v.weight"):
                continue
            if key.endswith("attn.to_k.weight"):
                pair = [value, state[key.replace("to_k", "to_v")]]
                image[published_name(key.replace("to_k", "to_kv"))] = pair
            else:
                image[published_name(key)] = [value]
        table: dict[str, list[Tensor]] = {}
        tensors = self.additions.tensors()
        for number, name in enumerate(self.names):
            place = name.removesuffix(".processor")
            for short, long in (("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out", "to_out.0")):
                down, up = tensors[f"{place}.{long}"]
                table[f"{number}.{short}_lora.down.weight"] = [down]
                table[f"{number}.{short}_lora.up.weight"] = [up]
            if name.endswith("attn2.processor"):
                own: Any = self.attention[str(number)]
                table[f"{number}.to_k_ip.weight"] = [own.to_k_ip[0].weight]
                table[f"{number}.to_v_ip.weight"] = [own.to_v_ip[0].weight]
        return {"image_proj": image, "ip_adapter": table}

    def file_layout(self) -> dict[str, dict[str, Tensor]]:
        """The published file's content, half precision."""
        return {
            part: {
                key: torch.cat(tensors).detach().half().cpu().contiguous() for key, tensors in table.items()
            }
            for part, table in self.places().items()
        }


def published_name(key: str) -> str:
    """A projection's name in diffusers -> its name in the FaceID-PlusV2 file."""
    for ours, theirs in (("proj.net.0.proj.", "proj.0."), ("proj.net.2.", "proj.2.")):
        if key.startswith(ours):
            return key.replace(ours, theirs)
    if key.startswith("norm."):
        return key
    for ours, theirs in (
        (".ln0.", ".0.norm1."),
        (".ln1.", ".0.norm2."),
        (".attn.to_out.0.", ".0.to_out."),
        (".attn.", ".0."),
        (".ff.0.", ".1.0."),
        (".ff.1.net.0.proj.", ".1.1."),
        (".ff.1.net.2.", ".1.3."),
    ):
        key = key.replace(ours, theirs)
    return "perceiver_resampler." + key


@torch.no_grad()
def drawn(guide: Guide, walk: Walk, noise: Tensor, legs: int) -> tuple[Tensor, Tensor]:
    """Where the base's own guided steps lead from noise [n, 4, h, w] after so many legs, and its noise
    there without the text."""
    x = noise
    for start, end in itertools.islice(itertools.pairwise(STATIONS), legs):
        x = walk.step(x, guide.guided(x, start), start, end)
    return x, guide(x, STATIONS[legs])[0]


def trained(work: Path, size: int) -> Adapter:
    """The adapter of the checkpoint, averaged weights."""
    adapter = Adapter(unet.build(size))
    adapter.load_state_dict(load_part(work / "adapter.pt", "ema"), strict=True)
    return adapter


def main() -> None:
    """Train within the budget."""
    settings = options("adapter", 30)
    portraits = data.load(settings)
    embeddings, states = views(settings, portraits)
    base: Any = unet.trained(settings.work, settings.size)
    adapter = Adapter(base).to(device())
    conditions = unet.Conditions(settings)
    nothing = empty_states(conditions.towers)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    ema = Ema(adapter, 0.998)
    parts = {"model": adapter, "ema": ema, "optimizer": optimizer}
    run = Run(settings.work / "adapter.pt", settings.minutes, parts, save_every=90)
    pictures = unet.Pictures(settings, portraits, 900_000 + run.step)
    scheduler = unet.schedule()
    torch.manual_seed(settings.seed + 3 + run.step)
    smooth: dict[str, float] = {}
    looks = unet.Looks(settings, portraits)
    walk, drawing, noising = Walk(), slice(unet.ASKED), slice(unet.ASKED, None)
    for _ in run.steps():
        batch = pictures.draw(BATCH, TEXT_DROPOUT)
        text_states, added = conditions(batch.texts)
        view = pictures.draws.choice(VIEWS, BATCH, p=VIEW_CHANCES)
        person = torch.from_numpy(embeddings[batch.index, view]).to(device())
        seen = torch.from_numpy(states[batch.index, view].astype(np.float32)).to(device())
        drop = torch.rand(BATCH, device=person.device) < IDENTITY_DROPOUT
        drop[drawing] = False
        person[drop] = 0
        seen[drop] = nothing
        # Who it is gets decided early, at high noise: draw more of it.
        times = unet.timesteps(BATCH, person.device, 0.6)
        legs = int(pictures.draws.integers(len(STATIONS) - 1))
        times[drawing] = STATIONS[legs]
        noise = torch.randn_like(batch.clean)
        adapter.strengthen(ADAPTER_SCALE + max(0.0, float(pictures.draws.uniform(-STRONGEST, STRONGEST))))
        with autocast():
            tokens = adapter.tokens(person, seen)
            noisy = scheduler.add_noise(batch.clean, noise, times)
        part = {name: value[drawing] for name, value in added.items()}
        guide = Guide(base, text_states[drawing], part, tokens[drawing])
        noisy[drawing], blind = drawn(guide, walk, noise[drawing], legs)
        with autocast():
            context = (text_states, [tokens[:, None]])
            predicted = base(noisy, times, context, added_cond_kwargs=added).sample.float()
        loss = unet.denoising_loss(
            predicted[noising], noise[noising], times[noising], scheduler, batch.places[noising], MOST
        )
        # The guided picture is what is judged, but guidance must not multiply the gradient.
        guided = predicted[drawing] + (GUIDANCE - 1) * (predicted[drawing] - blind).detach()
        crops = looks.crops(noisy, guided, times, batch, loose=True)
        unlike, mood = looks.unlike(crops, batch), looks.mood(crops, batch)
        total = loss + PERSON_WEIGHT * unlike + MOOD_WEIGHT * mood
        descend(total, optimizer, run.rate(8e-4, warm_up=100))
        ema.update(adapter)
        for name, value in (("loss", loss), ("unlike", unlike), ("mood", mood)):
            smooth[name] = 0.98 * smooth.get(name, value.item()) + 0.02 * value.item()
        run.log(50, **smooth)


if __name__ == "__main__":
    main()
