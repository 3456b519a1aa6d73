"""The recipe: frozen, validated and hashed. `recipe.files` reads recipes from files."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from ..errors import RecipeError

Block: TypeAlias = Literal["down", "mid", "up"]
Order: TypeAlias = Literal["identity_first", "text_first", "independent"]

TIMESTEPS = 1000
"""T of the guidance functions: the training timesteps of SDXL."""


AdapterName: TypeAlias = Literal["faceid_plusv2", "plus_face", "instantid", "pulid_v1", "pulid_v1.1"]

IDENTITY_TOKENS: dict[AdapterName, int] = {
    "faceid_plusv2": 4,
    "plus_face": 16,
    "instantid": 16,
    "pulid_v1": 10,
    "pulid_v1.1": 32,
}
"""Identity tokens of each kind of adapter, which attention manipulation selects by number."""


CONFIG = "sdxl-base-config"
"""Artifact with the configuration of a base that is a single checkpoint file."""


class Section(BaseModel):
    """Base of every part of a recipe: rejects unknown keys, never converts values, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class HubReference(Section):
    """A file or folder of a Hugging Face repository at one commit."""

    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    file: str | None = None
    """Path inside the repository; None is the complete snapshot."""


ModelReference: TypeAlias = str | HubReference
"""Where a model part comes from: a name of the manifest, a local path, or a pinned Hub repository."""

ByStep: TypeAlias = (
    ModelReference
    | Annotated[dict[Annotated[int, Field(ge=1, le=1000)], ModelReference], Field(min_length=1)]
)
"""One reference for all step counts, or one per step count that a checkpoint is distilled for."""


class StyleLora(Section):
    """An extra LoRA, fused into the UNet at `scale`."""

    file: ModelReference
    scale: float = 1.0


class Scheduler(Section):
    """The diffusion scheduler. Always built from a published configuration, never from class defaults."""

    kind: Literal["ddim", "euler", "euler_ancestral", "lcm", "tcd", "dpm_singlestep"]
    spacing: Literal["trailing", "leading", "linspace"] | None = None
    """Timestep spacing; None keeps the value of the configuration."""
    timesteps: list[Annotated[int, Field(ge=0, lt=TIMESTEPS)]] | None = None
    """The timesteps that a checkpoint was distilled for, for `lcm`; None: the scheduler's."""
    original_steps: Annotated[int, Field(ge=1, le=TIMESTEPS)] | None = None
    """Steps of the schedule from which `lcm` selects; None keeps the value of the configuration."""
    shift: Annotated[int, Field(ge=1, le=TIMESTEPS)] | None = None
    """The UNet gets the timestep times shift / 1000, for `lcm` (NitroFusion); None: the timestep."""
    config: ModelReference | None = None
    """Folder that contains `scheduler/scheduler_config.json`; None is the base's."""


class Model(Section):
    """The model parts (docs/how-it-works.md, What goes in)."""

    base: ModelReference
    """A diffusers SDXL folder, or one .safetensors checkpoint file in the original layout."""
    unet: ByStep | None = None
    """Replaces the base's UNet; None: the base's own."""
    distillation: ByStep | None = None
    """LoRA fused into the UNet at scale 1."""
    loras: list[StyleLora] = []
    vae: ModelReference | None = None
    """Replaces the base's VAE; None: the base's own."""
    adapter: ModelReference
    """The file of the identity adapter."""
    controlnet: ModelReference | None = None
    """A folder with the ControlNet of InstantID."""
    image_encoder: ModelReference | None = None
    """The encoder of the face crop: CLIP for FaceID and plus-face, EVA02-CLIP for PuLID."""
    face: ModelReference
    """An InsightFace pack, or a YuNet detector for adapters that use no face recognizer."""
    face_parsing: ModelReference | None = None
    """The face parser of PuLID, an ONNX file. Without it and `image_encoder`, PuLID reads only saved
    identities that hold the features of a face."""
    scheduler: Scheduler

    def step_choices(self) -> list[int] | None:
        """Step counts that have a checkpoint, or None if any count is allowed."""
        keyed = [set(part) for part in (self.unet, self.distillation) if isinstance(part, dict)]
        return sorted(set.intersection(*keyed)) if keyed else None

    def unet_for(self, steps: int) -> ModelReference | None:
        """The UNet for `steps` steps."""
        return _by_step(self.unet, steps)

    def distillation_for(self, steps: int) -> ModelReference | None:
        """The distillation LoRA for `steps` steps."""
        return _by_step(self.distillation, steps)


class Sampling(Section):
    """Step count and image size in pixels."""

    steps: Annotated[int, Field(ge=1, le=1000)] = 4
    width: Annotated[int, Field(ge=64, le=4096, multiple_of=8)] = 1024
    height: Annotated[int, Field(ge=64, le=4096, multiple_of=8)] = 1024


Strength: TypeAlias = Annotated[float, Field(ge=-5, le=5, allow_inf_nan=False)]
AdapterScale: TypeAlias = Strength | Annotated[list[Strength], Field(min_length=1)]
"""A constant, or one number per step; a list of another length is interpolated."""


class Adapter(Section):
    """Kind and strength of the identity adapter."""

    kind: AdapterName = "faceid_plusv2"
    """What `model.adapter` is."""
    scale: AdapterScale = 0.8
    """Weight of the identity part of decoupled cross-attention."""
    lora_scale: Strength = 0.6
    """Weight of the LoRA inside the adapter file, fused once."""
    controlnet_scale: Annotated[float, Field(ge=0, le=2)] = 0.8
    """Weight of InstantID's ControlNet."""
    zero_tokens: Annotated[int, Field(ge=0, le=64)] = 0
    """PuLID: tokens without content beside those of the identity. They only take attention away."""
    orthogonal: Literal["off", "ortho", "ortho_v2"] = "off"
    """PuLID: remove from identity attention what it shares with text attention: completely (`ortho`), or
    except where the attention to the first five tokens keeps it (`ortho_v2`)."""
    crop_order: Literal["bgr", "rgb"] = "bgr"
    """Channel order of the face crop given to the image encoder; published results used BGR."""


class WeightFunction(Section):
    """A guidance weight as a function of the timestep t in [0, 1000] (docs/how-it-works.md)."""

    function: Literal["constant", "linear", "cosine", "power_cosine", "cap"]
    scale: float = 1.0
    """w in the formulas."""
    power: Annotated[float, Field(gt=0)] = 1.0
    """s in `power_cosine`."""
    inverse: bool = False
    """Evaluate at T - t."""
    floor: float | None = None
    """Clamp: the weight is max(floor, value)."""


PerStep: TypeAlias = float | Annotated[list[float], Field(min_length=1)]
"""A constant, or one number per step; a list of another length is interpolated."""

Weight: TypeAlias = PerStep | WeightFunction


class Guidance(Section):
    """Decoupled classifier-free guidance (paper section 3; docs/how-it-works.md)."""

    order: Order = "identity_first"
    identity: Weight = 1.0
    """Weight of the identity direction."""
    text: Weight = 1.0
    """Weight of the text direction."""
    renorm: bool = False
    """Scale the second term to the norm of the first, per image, before the weights."""
    rescale: Annotated[float, Field(ge=0, le=1)] = 0.0
    """phi: blend towards the mean standard deviation of e1 and e2; 0 is off."""


class Blocks(Section):
    """A value for each part of the UNet. `attention.blocks` must not select a part without a value."""

    down: PerStep | None = None
    mid: PerStep | None = None
    up: PerStep | None = None


PerBlock: TypeAlias = PerStep | Blocks


class Power(Section):
    """A ** p."""

    kind: Literal["power"]
    p: PerBlock = Blocks(down=1.3, mid=1.0, up=1.3)


class Scale(Section):
    """min(g A, cap)."""

    kind: Literal["scale"]
    g: PerBlock = Blocks(down=1.55, mid=1.0, up=1.45)
    cap: Annotated[float, Field(gt=0)] = 10.0


class Softmask(Section):
    """N(1 / (1 + exp(-k (N(A) - threshold))))."""

    kind: Literal["softmask"]
    k: PerBlock = Blocks(down=12.5, mid=1.0, up=12.5)
    threshold: float = 0.5


class AdaptiveSoftmask(Section):
    """Softmask whose threshold is the quantile of A over positions at `level`."""

    kind: Literal["adaptive_softmask"]
    k: PerBlock = Blocks(down=12.5, mid=1.0, up=12.5)
    level: PerBlock = Blocks(down=0.6, mid=1.0, up=0.6)


Transform: TypeAlias = Annotated[Power | Scale | Softmask | AdaptiveSoftmask, Field(discriminator="kind")]


class Blend(Section):
    """Statistics blend of the changed attention with the original one."""

    weight: Annotated[float, Field(ge=0, le=1)] = 0.7
    eps: Annotated[float, Field(gt=0)] = 1e-6


class Attention(Section):
    """Attention manipulation on the identity part of decoupled cross-attention (docs/how-it-works.md)."""

    transforms: list[Transform] = []
    """Applied in this order; empty disables manipulation (unless `blend` or `invert_token_0` is set)."""
    blocks: list[Block] = ["down", "up"]
    tokens: Literal["all"] | list[Annotated[int, Field(ge=0, le=31)]] = [0, 1, 2, 3]
    steps: Literal["all"] | list[Annotated[int, Field(ge=0)]] = "all"
    """Step indices to manipulate, from 0."""
    invert_token_0: bool = False
    normalisation: Literal["joint", "branch"] = "joint"
    """Min-max over all branches of an image together (published), or over each branch separately."""
    blend: Blend | None = None

    @field_validator("transforms", mode="before")
    @classmethod
    def _bare_names(cls, value: Any) -> Any:
        """`- power` is short for `- kind: power`."""
        if isinstance(value, list):
            return [{"kind": item} if isinstance(item, str) else item for item in value]
        return value

    @field_validator("blocks", "tokens", "steps")
    @classmethod
    def _no_repeats(cls, value: Any) -> Any:
        if isinstance(value, list) and len(set(value)) != len(value):
            raise ValueError("a value is given twice")
        return value

    @model_validator(mode="after")
    def _blocks_defined(self) -> Attention:
        for index, transform in enumerate(self.transforms):
            for name in ("p", "g", "k", "level"):
                value = getattr(transform, name, None)
                if isinstance(value, Blocks):
                    for block in self.blocks:
                        if getattr(value, block) is None:
                            raise _fault(
                                f"transforms.{index}.{name}",
                                f"{transform.kind}.{name} has no value for the {block} blocks, "
                                f"which attention.blocks selects",
                            )
            self._in_range(index, transform)
        return self

    @staticmethod
    def _in_range(index: int, transform: Power | Scale | Softmask | AdaptiveSoftmask) -> None:
        for name, low, high in (("p", 0.0, 100.0), ("g", 0.0, 1e4), ("k", 0.0, 1e4), ("level", 0.0, 1.0)):
            value = getattr(transform, name, None)
            if value is None:
                continue
            parts = [value.down, value.mid, value.up] if isinstance(value, Blocks) else [value]
            for part in parts:
                for number in part if isinstance(part, list) else [part]:
                    if number is not None and not low <= number <= high:
                        raise _fault(
                            f"transforms.{index}.{name}",
                            f"{transform.kind}.{name} must be in [{low:g}, {high:g}], not {number:g}",
                        )

    @property
    def active(self) -> bool:
        """Whether attention is manipulated."""
        return bool((self.transforms or self.blend or self.invert_token_0) and self.blocks and self.tokens)


class Recipe(Section):
    """Everything that determines the pixels, except the photo, the prompt and the seed."""

    name: str
    summary: str = ""
    model: Model
    sampling: Sampling = Sampling()
    adapter: Adapter = Adapter()
    guidance: Guidance = Guidance()
    attention: Attention = Attention()
    prompt: str | None = None
    """Used if no prompt is given (configurations of the published code contain one)."""
    negative_prompt: str | None = None
    """None: zero embeddings, which differ from the encoding of an empty text."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Used if no seed is given."""

    @model_validator(mode="after")
    def _scheduler_is_consistent(self) -> Recipe:
        scheduler, steps = self.model.scheduler, self.sampling.steps
        for name in ("timesteps", "original_steps", "shift"):
            if getattr(scheduler, name) is not None and scheduler.kind != "lcm":
                raise _fault(f"model.scheduler.{name}", f"is for lcm, not for {scheduler.kind}")
        if scheduler.timesteps is not None and len(scheduler.timesteps) != steps:
            raise _fault(
                "sampling.steps",
                f"the model was distilled for {len(scheduler.timesteps)} timesteps, not for {steps} steps",
            )
        return self

    @model_validator(mode="after")
    def _adapter_has_its_parts(self) -> Recipe:
        kind, model = self.adapter.kind, self.model
        for name, value, kinds in (
            ("image_encoder", model.image_encoder, ("faceid_plusv2", "plus_face")),
            ("controlnet", model.controlnet, ("instantid",)),
        ):
            if value is None and kind in kinds:
                raise _fault(f"model.{name}", f"is missing, and {kind} needs it")
        if kind.startswith("pulid"):
            if (model.face_parsing is None) != (model.image_encoder is None):
                raise _fault("model.face_parsing", "and model.image_encoder belong together for PuLID")
        elif model.face_parsing is not None:
            raise _fault("model.face_parsing", f"{kind} has no face parser")
        if model.controlnet is not None and kind != "instantid":
            raise _fault("model.controlnet", f"{kind} has no ControlNet")
        if not kind.startswith("pulid") and (self.adapter.zero_tokens or self.adapter.orthogonal != "off"):
            raise _fault("adapter.orthogonal", f"zero_tokens and orthogonal are PuLID's, not {kind}'s")
        return self

    @model_validator(mode="after")
    def _attention_fits_the_adapter(self) -> Recipe:
        kind, attention = self.adapter.kind, self.attention
        count = IDENTITY_TOKENS[kind]
        if not attention.active:
            return self
        for token in attention.tokens if isinstance(attention.tokens, list) else []:
            if token >= count:
                raise _fault("attention.tokens", f"{kind} has tokens 0 to {count - 1}, not {token}")
        if attention.invert_token_0 and kind != "faceid_plusv2":
            raise _fault(
                "attention.invert_token_0",
                f"is for the first token of FaceID-PlusV2, which has a meaning of its own; {kind} has no "
                "such token, so set it to false",
            )
        return self

    @model_validator(mode="after")
    def _steps_have_a_checkpoint(self) -> Recipe:
        choices = self.model.step_choices()
        if choices is not None and self.sampling.steps not in choices:
            raise _fault(
                "sampling.steps",
                f"no checkpoint is distilled for {self.sampling.steps} steps; "
                f"choose one of {', '.join(map(str, choices))}",
            )
        return self

    def references(self) -> dict[str, ModelReference]:
        """Every model part that this recipe needs, by role; `lora.0`, ... are the style LoRAs."""
        model, steps = self.model, self.sampling.steps
        parts: dict[str, ModelReference | None] = {
            "base": model.base,
            "unet": model.unet_for(steps),
            "distillation": model.distillation_for(steps),
            "vae": model.vae,
            "adapter": model.adapter,
            "controlnet": model.controlnet,
            "image_encoder": model.image_encoder,
            "face": model.face,
            "face_parsing": model.face_parsing,
            "scheduler": model.scheduler.config,
            "config": CONFIG if is_single_file(model.base) else None,
            **{f"lora.{i}": lora.file for i, lora in enumerate(model.loras)},
        }
        return {role: reference for role, reference in parts.items() if reference is not None}

    def photo_roles(self) -> frozenset[str]:
        """The roles of `references` that only read photos; a saved identity makes them unnecessary."""
        pulid = self.adapter.kind.startswith("pulid")
        roles = {"face", *(("face_parsing", "image_encoder") if pulid else ())}
        return frozenset(roles & self.references().keys())

    def fuses_loras(self) -> bool:
        """Whether a LoRA changes the published weights; FaceID's file contains one."""
        model = self.model
        return model.distillation is not None or bool(model.loras) or self.adapter.kind == "faceid_plusv2"

    def canonical(self) -> dict[str, Any]:
        """Plain data including every default; `model_validate_json` of its JSON restores the recipe."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """SHA-256 (hex) of what determines the pixels: the canonical form without name and summary."""
        data = {key: value for key, value in self.canonical().items() if key not in ("name", "summary")}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _fault(field: str, problem: str) -> PydanticCustomError:
    """A validation error with its field, as a dotted path from the validating section."""
    return PydanticCustomError("field", "{problem}", {"field": field, "problem": problem})


SINGLE_FILES = frozenset({"sdxl-flash"})
"""Bases of the manifest that are a single checkpoint file."""


def is_single_file(base: ModelReference) -> bool:
    """Whether a base is a single checkpoint file, which has no configuration and no tokenizer."""
    if base in SINGLE_FILES:
        return True
    name = base.file or "" if isinstance(base, HubReference) else base
    return name.lower().endswith(".safetensors")


def _by_step(value: ByStep | None, steps: int) -> ModelReference | None:
    if not isinstance(value, dict):
        return value
    if steps not in value:
        raise RecipeError(f"no checkpoint is distilled for {steps} steps", f"choose one of {sorted(value)}")
    return value[steps]


def scale_text(scale: AdapterScale) -> str:
    """An adapter scale as metadata and labels show it: `0.8`, or `0, 0.8, 0.8`."""
    return ", ".join(f"{number:g}" for number in scale) if isinstance(scale, list) else f"{scale:g}"


def per_step(value: PerStep, steps: int) -> list[float]:
    """Return one number per step.

    Repeats a constant, keeps a list of `steps` numbers, and interpolates another list linearly over the
    normalized step index (a single step uses the first value).

    Args:
        value: a number or a non-empty list.
        steps: number of steps, at least 1.
    """
    if not isinstance(value, list):
        return [float(value)] * steps
    if len(value) == steps:
        return [float(number) for number in value]
    if steps == 1 or len(value) == 1:
        return [float(value[0])] * steps
    values = []
    for index in range(steps):
        position = index * (len(value) - 1) / (steps - 1)
        low = min(int(position), len(value) - 2)
        share = position - low
        values.append((1 - share) * value[low] + share * value[low + 1])
    return values
