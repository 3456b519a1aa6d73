"""Train the identity adapter, with the layout of FaceID-PlusV2, on the frozen base.

The recognizer's embedding gives four identity tokens, refined by the vision tower's states of the aligned
crop. Every cross-attention layer has keys and values for them, and all attention layers have a LoRA. The
reference is a different view of the portrait than the target: mirrored, in different light, and mostly with
the mouth of another person. Each person has only one portrait, so an unchanged reference would always have
the target's expression, and the adapter would learn to copy it instead of following the prompt.

Most of a batch is trained to denoise portraits. The rest starts from pure noise, and its decoded result is
scored: a portrait with added noise still reveals the identity, so an adapter trained on those alone does
not need to provide it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

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
from training.ddim import GUIDANCE, TIMESTEPS, Ddim, GuidedDenoiser

BATCH = 32
TOKENS = 4
RANK = 6
ADAPTER_SCALE = 0.8
LORA_SCALE = 0.6
"""Scales of the adapter in the recipes; training uses the same scales."""
VIEWS = 6
"""Reference views per portrait: two with its own mouth, four with another's; odd indices are mirrored."""
VIEW_CHANCES = (0.08, 0.08, 0.21, 0.21, 0.21, 0.21)
MOUTH = ((112, 186), (54, 34))
"""Center and half axes of the mouth in an aligned crop of 224 pixels."""
STRONGEST = 0.4
"""Largest increase of the adapter scale, used in half of the steps: an adapter trained at a single scale
generates caricatures under guidance or scale-power."""
IDENTITY_WEIGHT = 2.0
EXPRESSION_WEIGHT = 1.5
MAX_WEIGHT = 12.0
"""Largest weight of a noisy step, see ``unet.denoising_loss``."""
IDENTITY_DROPOUT = 0.12
TEXT_DROPOUT = 0.1
ENDINGS = ("to_q", "to_k", "to_v", "to_out.0")


def image_processor() -> CLIPImageProcessor:
    """Return the product's image processor: resize and center-crop to the encoder's image size."""
    size = clip.VISION_SIDE
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


@torch.no_grad()
def crop_states(towers: clip.Clip, crops: list[np.ndarray]) -> Tensor:
    """Return hidden_states[-2], [n, 65, 96], of 224x224 crops, in the color order of the adapter."""
    images = [Image.fromarray(crop) for crop in crops]
    pixels = image_processor()(images, return_tensors="pt").pixel_values.to(device())
    states: Tensor = towers.vision(pixels, output_hidden_states=True).hidden_states[-2]
    return states


@torch.no_grad()
def empty_states(towers: clip.Clip) -> Tensor:
    """Return the states of an all-zero image, [1, 65, 96]: with a zero embedding they mean "no identity"."""
    pixels = torch.zeros(1, 3, clip.VISION_SIDE, clip.VISION_SIDE, device=device())
    states: Tensor = towers.vision(pixels, output_hidden_states=True).hidden_states[-2]
    return states


def with_mouth(crop: np.ndarray, donor: np.ndarray) -> np.ndarray:
    """Return a 224x224 aligned crop with the mouth of a donor, blended and adjusted to the skin tone."""
    (x, y), axes = MOUTH
    mask = np.zeros(crop.shape[:2], np.float32)
    cv2.ellipse(mask, (x, y), axes, 0, 0, 360, 1.0, -1)
    ring = cv2.dilate(mask, np.ones((15, 15))) - mask > 0
    mask = cv2.GaussianBlur(mask, (0, 0), 6)[..., None]
    base, mouth = crop.astype(np.float32), donor.astype(np.float32)
    mouth = mouth + base[ring].mean(0) - mouth[ring].mean(0)
    return np.asarray(np.clip(base + mask * (mouth - base), 0, 255), np.uint8)


def views(
    settings: Options, portraits: data.Portraits, order: Literal["bgr", "rgb"] = "bgr"
) -> tuple[np.ndarray, np.ndarray]:
    """Return embeddings [n, views, 512] and states [n, views, 65, 96] of all reference views, cached.

    Mouth donors have the sex and group of the person; half of them smile, independently of the person.
    The image encoder reads the crops in BGR order for FaceID, as the published code does.
    """
    ids_path = settings.work / "view_embeddings.npy"
    states_path = settings.work / ("view_states.npy" if order == "bgr" else "view_states_rgb.npy")
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
                image = aligned(index)
                if view >= 2:
                    kind = (facts[index].sex, facts[index].group, view < 4)
                    image = with_mouth(image, aligned(int(generator.choice(donors[kind]))))
                if view:
                    image = recognizer.degrade(image, generator, 0.6)
                if view % 2 == 1:
                    image = image[:, ::-1]
                crops.append(np.ascontiguousarray(image))
            small = np.stack([cv2.resize(crop, (112, 112), interpolation=cv2.INTER_AREA) for crop in crops])
            embeddings[index] = recognizer.embed_all(network, small)
            ordered = crops if order == "rgb" else [np.ascontiguousarray(crop[:, :, ::-1]) for crop in crops]
            states[index] = crop_states(towers, ordered).cpu().numpy()
        np.save(ids_path, embeddings)
        np.save(states_path, states)
    return np.asarray(np.load(ids_path)), np.asarray(np.load(states_path, mmap_mode="r"))


class IdentityAttention(nn.ModuleDict):
    """Keys and values for identity tokens in every cross-attention layer of a base, by processor number.

    Initializing with the keys and values of the text converges much faster than random numbers.
    """

    def __init__(self, base: Any, tokens: int, scale: float) -> None:
        super().__init__()
        width = 2 * clip.TEXT_WIDTH
        processors = {}
        self.names = list(base.attn_processors)
        for number, (name, processor) in enumerate(base.attn_processors.items()):
            processors[name] = processor
            if name.endswith("attn2.processor"):
                attention = base.get_submodule(name.removesuffix(".processor"))
                own = IPAdapterAttnProcessor(attention.inner_dim, width, num_tokens=(tokens,), scale=scale)
                for added, text in ((own.to_k_ip[0], attention.to_k), (own.to_v_ip[0], attention.to_v)):
                    added.weight.data.copy_(getattr(text, "layer", text).weight.data)
                processors[name] = self[str(number)] = own
        # diffusers empties the dictionary that it receives.
        base.set_attn_processor(dict(processors))

    def strengthen(self, scale: float) -> None:
        """Set the scale of the identity attention."""
        processor: Any
        for processor in self.values():
            processor.scale = [scale]

    def by_key(self) -> dict[str, list[Tensor]]:
        """Return the parameters under the keys of ``ip_adapter`` in published files."""
        table = {}
        for number, module in self.items():
            own: Any = module
            table[f"{number}.to_k_ip.weight"] = [own.to_k_ip[0].weight]
            table[f"{number}.to_v_ip.weight"] = [own.to_v_ip[0].weight]
        return table


class Adapter(nn.Module):
    """The trained parameters; the base is not part of the module."""

    def __init__(self, base: Any, scale: float = ADAPTER_SCALE, lora_scale: float = LORA_SCALE) -> None:
        super().__init__()
        width = 2 * clip.TEXT_WIDTH
        self.projection = IPAdapterFaceIDPlusImageProjection(
            embed_dims=width, output_dims=width, hidden_dims=96, heads=2, id_embeddings_dim=recognizer.WIDTH
        )
        self.projection.shortcut = True
        self.wrapped = [low_rank.inject(base, ENDINGS, RANK, lora_scale)]
        self.additions = low_rank.Additions(self.wrapped[0])
        self.attention = IdentityAttention(base, TOKENS, scale)

    def tokens(self, embeddings: Tensor, states: Tensor) -> Tensor:
        """Return identity tokens [n, 4, 128] of embeddings [n, 512] and states [n, 65, 96]."""
        self.projection.clip_embeds = states[:, None]
        tokens: Tensor = self.projection(embeddings)
        return tokens

    def parameters_by_key(self) -> dict[str, dict[str, list[Tensor]]]:
        """Return the keys of ``image_proj`` and ``ip_adapter`` in the published file, and for each key the
        parameters that are concatenated in its tensor."""
        projection = {published_name(key): value for key, value in paired(self.projection).items()}
        table = self.attention.by_key()
        tensors = self.additions.tensors()
        for number, name in enumerate(self.attention.names):
            layer = name.removesuffix(".processor")
            for short, long in (("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out", "to_out.0")):
                down, up = tensors[f"{layer}.{long}"]
                table[f"{number}.{short}_lora.down.weight"] = [down]
                table[f"{number}.{short}_lora.up.weight"] = [up]
        return {"image_proj": projection, "ip_adapter": table}

    def file_layout(self) -> dict[str, dict[str, Tensor]]:
        """Return the content of the published file, in half precision."""
        return halved(self.parameters_by_key())


def halved(parameters: dict[str, dict[str, list[Tensor]]]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a file in half precision; parameters of one key are concatenated."""
    return {
        part: {key: torch.cat(tensors).detach().half().cpu().contiguous() for key, tensors in table.items()}
        for part, table in parameters.items()
    }


def paired(projection: nn.Module) -> dict[str, list[Tensor]]:
    """Return the parameters of a projection by name; keys and values are a pair named ``to_kv``."""
    state = dict(projection.named_parameters())
    return {
        key.replace("attn.to_k.", "attn.to_kv."): (
            [value, state[key.replace("to_k", "to_v")]] if key.endswith("attn.to_k.weight") else [value]
        )
        for key, value in state.items()
        if not key.endswith("attn.to_v.weight")
    }


def published_name(key: str) -> str:
    """Return the key in the FaceID-PlusV2 file of a projection parameter of diffusers."""
    for ours, theirs in (("proj.net.0.proj.", "proj.0."), ("proj.net.2.", "proj.2.")):
        if key.startswith(ours):
            return key.replace(ours, theirs)
    if key.startswith("norm."):
        return key
    return "perceiver_resampler." + resampler_name(key)


def resampler_name(key: str) -> str:
    """Return the key of a parameter of diffusers' resampler in FaceID-PlusV2 and plus-face files."""
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
    return key


@torch.no_grad()
def sample(denoiser: GuidedDenoiser, ddim: Ddim, noise: Tensor, step_count: int) -> tuple[Tensor, Tensor]:
    """Return the latents after some guided steps from noise [n, 4, h, w], and the unconditional noise
    prediction for them."""
    x = noise
    for start, end in itertools.islice(itertools.pairwise(TIMESTEPS), step_count):
        x = ddim.step(x, denoiser.guided(x, start), start, end)
    return x, denoiser(x, TIMESTEPS[step_count])[0]


def trained(work: Path, size: int) -> Adapter:
    """Return the adapter of the checkpoint, with averaged weights."""
    adapter = Adapter(unet.build(size))
    adapter.load_state_dict(load_part(work / "adapter.pt", "ema"), strict=True)
    return adapter


def train(
    settings: Options, create: Callable[[Any], Any], checkpoint: str, order: Literal["bgr", "rgb"] = "bgr"
) -> None:
    """Train an adapter within the time budget.

    Args:
        settings: of the stage.
        create: returns a module with `tokens` and `attention` of `Adapter` for a base.
        checkpoint: name of the file in the work folder.
        order: color order in which the image encoder reads the crops.
    """
    portraits = data.load(settings)
    embeddings, states = views(settings, portraits, order)
    base: Any = unet.trained(settings.work, settings.size)
    adapter = create(base).to(device())
    conditions = unet.Conditions(settings)
    no_identity = empty_states(conditions.towers)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    ema = Ema(adapter, 0.998)
    parts = {"model": adapter, "ema": ema, "optimizer": optimizer}
    run = Run(settings.work / checkpoint, settings.minutes, parts, save_every=90)
    images = unet.CaptionedLatents(settings, portraits, 900_000 + run.step)
    scheduler = unet.schedule()
    torch.manual_seed(settings.seed + 3 + run.step)
    smooth: dict[str, float] = {}
    decoded_losses = unet.DecodedLosses(settings, portraits)
    ddim, generated, noised = Ddim(), slice(unet.DECODED_COUNT), slice(unet.DECODED_COUNT, None)
    for _ in run.steps():
        batch = images.draw(BATCH, TEXT_DROPOUT)
        text_states, added = conditions(batch.texts)
        view = images.draws.choice(VIEWS, BATCH, p=VIEW_CHANCES)
        person = torch.from_numpy(embeddings[batch.index, view]).to(device())
        crop_states_batch = torch.from_numpy(states[batch.index, view].astype(np.float32)).to(device())
        drop = torch.rand(BATCH, device=person.device) < IDENTITY_DROPOUT
        drop[generated] = False
        person[drop] = 0
        crop_states_batch[drop] = no_identity
        # Identity is determined early, at high noise levels: sample more of them.
        times = unet.timesteps(BATCH, person.device, 0.6)
        step_count = int(images.draws.integers(len(TIMESTEPS) - 1))
        times[generated] = TIMESTEPS[step_count]
        noise = torch.randn_like(batch.clean)
        adapter.attention.strengthen(
            ADAPTER_SCALE + max(0.0, float(images.draws.uniform(-STRONGEST, STRONGEST)))
        )
        with autocast():
            tokens = adapter.tokens(person, crop_states_batch)
            noisy = scheduler.add_noise(batch.clean, noise, times)
        generated_added = {name: value[generated] for name, value in added.items()}
        denoiser = GuidedDenoiser(base, text_states[generated], generated_added, tokens[generated])
        noisy[generated], unconditional = sample(denoiser, ddim, noise[generated], step_count)
        with autocast():
            context = (text_states, [tokens[:, None]])
            predicted = base(noisy, times, context, added_cond_kwargs=added).sample.float()
        loss = unet.denoising_loss(
            predicted[noised], noise[noised], times[noised], scheduler, batch.weights[noised], MAX_WEIGHT
        )
        # The losses use the guided image, but guidance must not multiply the gradient.
        guided = predicted[generated] + (GUIDANCE - 1) * (predicted[generated] - unconditional).detach()
        crops = decoded_losses.crops(noisy, guided, times, batch, loose=True)
        identity_loss, expression_loss = (
            decoded_losses.identity_loss(crops, batch),
            decoded_losses.expression_loss(crops, batch),
        )
        total = loss + IDENTITY_WEIGHT * identity_loss + EXPRESSION_WEIGHT * expression_loss
        descend(total, optimizer, run.rate(8e-4, warm_up=100))
        ema.update(adapter)
        for name, value in (("loss", loss), ("identity", identity_loss), ("expression", expression_loss)):
            smooth[name] = 0.98 * smooth.get(name, value.item()) + 0.02 * value.item()
        run.log(50, **smooth)


def main() -> None:
    """Train within the time budget."""
    train(options("adapter", 30), Adapter, "adapter.pt")


if __name__ == "__main__":
    main()
