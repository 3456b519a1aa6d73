"""Train the face recognizer: a small residual network that predicts the embeddings of a teacher.

Half of the faces are portraits; the other half are blends of two people, because 3,580 people are too few to
generalize. Inputs are degraded (light, blur, shift, style); targets are the teacher's embeddings of the clean
crops, so that the student becomes invariant to these changes.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training import data
from training.common import Ema, Options, Run, autocast, descend, device, images_to_tensor, options

TEACHER_WIDTH = 192
WIDTH = 512
BATCH = 64
BLENDS = 20_000


class Residual(nn.Module):
    """Residual block of two 3x3 convolutions with PReLU, as is usual for face recognition."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.PReLU(outputs),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, stride, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.activation = nn.PReLU(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.body(x) + self.shortcut(x))
        return y


class Recognizer(nn.Module):
    """RGB crops [n, 3, 112, 112] in [-1, 1] -> embeddings [n, 512], unit norm.

    The teacher has 192 dimensions; a fixed orthonormal matrix maps them to 512 dimensions without changing
    any cosine.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 24, 3, 2, 1, bias=False),
            nn.BatchNorm2d(24),
            nn.PReLU(24),
            nn.Conv2d(24, 48, 3, 2, 1, bias=False),
            nn.BatchNorm2d(48),
            nn.PReLU(48),
        )
        self.stages = nn.ModuleList(
            [
                nn.Sequential(Residual(48, 48, 1), Residual(48, 48, 1)),
                nn.Sequential(Residual(48, 96, 2), Residual(96, 96, 1), Residual(96, 96, 1)),
                nn.Sequential(Residual(96, 128, 2), Residual(128, 128, 1)),
            ]
        )
        self.reduce = nn.Sequential(nn.Conv2d(128, 64, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        self.head = nn.Linear(64 * 49, TEACHER_WIDTH)
        frame = torch.empty(TEACHER_WIDTH, WIDTH, dtype=torch.float64)
        frame = nn.init.orthogonal_(frame, generator=torch.Generator().manual_seed(512))
        self.frame: Tensor
        self.register_buffer("frame", frame.float())

    def features(self, crops: Tensor) -> list[Tensor]:
        """Return maps at 28, 14 and 7 pixels, for perceptual losses."""
        x = self.stem(crops)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def embed(self, last: Tensor) -> Tensor:
        """Return unit vectors [n, 192] in the teacher's space for the last map [n, 128, 7, 7]."""
        return F.normalize(self.head(self.reduce(last).flatten(1)), dim=1)

    def forward(self, crops: Tensor) -> Tensor:
        return self.embed(self.features(crops)[-1]) @ self.frame


class Teacher:
    """MobileFaceNet, for two crops at a time."""

    def __init__(self, path: Path) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self.network = Interpreter(str(path), num_threads=1)
        self.network.allocate_tensors()
        self.input = self.network.get_input_details()[0]["index"]
        self.output = self.network.get_output_details()[0]["index"]

    def __call__(self, crops: np.ndarray) -> np.ndarray:
        """Return embeddings [n, 192], unit norm, of crops uint8 RGB [n, 112, 112, 3]; n is even."""
        results = []
        for pair in crops.reshape(-1, 2, 112, 112, 3):
            self.network.set_tensor(self.input, (pair.astype(np.float32) - 127.5) / 128)
            self.network.invoke()
            results.append(self.network.get_tensor(self.output).copy())
        embeddings = np.concatenate(results)
        return np.asarray(embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True))


def blend(first: np.ndarray, second: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return a new face from two aligned ones: a mixture or two halves, slightly stretched."""
    y, x = np.mgrid[0:112, 0:112] / 111.0 - 0.5
    if generator.random() < 0.5:
        share = np.full((112, 112), generator.uniform(0.3, 0.7))
    else:
        angle = generator.uniform(0, 2 * np.pi)
        edge = np.cos(angle) * x + np.sin(angle) * y - generator.uniform(-0.15, 0.15)
        share = 1 / (1 + np.exp(-edge * 14))
    mixed = first * share[..., None] + second * (1 - share[..., None])
    stretch = np.diag(generator.uniform(0.88, 1.12, 2)) + np.array(
        [[0, generator.uniform(-0.06, 0.06)], [0, 0]]
    )
    center = np.array([56.0, 66.0])
    matrix = np.concatenate([stretch, (center - stretch @ center)[:, None]], axis=1)
    warped = cv2.warpAffine(mixed.astype(np.float32), matrix, (112, 112), borderMode=cv2.BORDER_REFLECT_101)
    tone = generator.uniform(0.75, 1.25) * generator.uniform(0.93, 1.07, 3)
    return np.asarray(np.clip(warped * tone, 0, 255), np.uint8)


def blended(settings: Options, portraits: data.Portraits) -> tuple[np.ndarray, np.ndarray]:
    """Return crops [20000, 112, 112, 3] of blended people and their teacher embeddings, cached."""
    crops_path, targets_path = settings.work / "blends.npy", settings.work / "blend_embeddings.npy"
    if not targets_path.exists():
        generator = np.random.default_rng(settings.seed + 7)
        pairs = generator.choice(portraits.train, (BLENDS, 2))
        crops = np.stack([blend(portraits.crops[a], portraits.crops[b], generator) for a, b in pairs])
        np.save(crops_path, crops)
        np.save(targets_path, Teacher(settings.teacher)(crops))
    return np.asarray(np.load(crops_path, mmap_mode="r")), np.asarray(np.load(targets_path))


def degrade(image: np.ndarray, generator: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """Change light, contrast, tint, sharpness, noise and alignment of a crop at random."""
    side = image.shape[0]
    angle, scale = generator.normal(0, 2.5 * strength), 1 + generator.normal(0, 0.035 * strength)
    matrix = cv2.getRotationMatrix2D((side / 2, side / 2), angle, scale)
    matrix[:, 2] += generator.normal(0, 0.014 * side * strength, 2)
    image = cv2.warpAffine(image, matrix, (side, side), borderMode=cv2.BORDER_REPLICATE)
    if generator.random() < 0.5:
        small = int(side * generator.uniform(0.3, 0.9))
        reduced = cv2.resize(image, (small, small), interpolation=cv2.INTER_AREA)
        image = cv2.resize(reduced, (side, side), interpolation=cv2.INTER_LINEAR)
    if generator.random() < 0.25:
        image = cv2.GaussianBlur(image, (0, 0), generator.uniform(0.4, 1.8))
    curve = (np.arange(256) / 255.0) ** np.exp(generator.normal(0, 0.3 * strength))
    gain = generator.uniform(0.75, 1.2)
    table = curve * gain + (1 - gain) * generator.uniform(0, 0.6)
    tint = 1 + generator.normal(0, 0.05 * strength, 3)
    tables = np.clip(table[:, None] * tint * 255, 0, 255).astype(np.uint8)
    image = np.stack([tables[:, c][image[..., c]] for c in range(3)], axis=-1)
    if generator.random() < 0.3:
        slope = np.linspace(generator.uniform(0.5, 1), generator.uniform(0.8, 1.2), side)
        light = slope[None, :, None] if generator.random() < 0.5 else slope[::-1][None, :, None]
        image = np.clip(image * light, 0, 255).astype(np.uint8)
    if generator.random() < 0.2:
        noise = generator.normal(0, generator.uniform(2, 10), image.shape)
        image = np.clip(image + noise, 0, 255).astype(np.uint8)
    if generator.random() < 0.06:
        gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        image = np.repeat(gray[..., None], 3, axis=2)
    return np.asarray(image)


def draw(
    portraits: data.Portraits,
    blends: tuple[np.ndarray, np.ndarray],
    generator: np.random.Generator,
    count: int,
) -> tuple[Tensor, Tensor]:
    """Return crops [n, 3, 112, 112] and target embeddings [n, 192], with sources in random order."""
    crops, targets = [], []
    for kind in generator.choice(4, count, p=(0.3, 0.45, 0.15, 0.1)):
        if kind == 1:
            index = int(generator.integers(len(blends[1])))
            image, target = blends[0][index], blends[1][index]
        else:
            index = int(generator.choice(portraits.train))
            target = portraits.embeddings[index]
            if kind == 0:
                image = portraits.crops[index]
            else:
                # The size of generated images, half of them in a style.
                style = 0 if kind == 3 else int(generator.integers(1, len(data.STYLE_NAMES)))
                points = portraits.key_points[index] * (portraits.size / 256)
                image = data.crop(portraits.images[index, style], points)
        if generator.random() < 0.85:
            image = degrade(image, generator)
        if generator.random() < 0.5:
            image = image[:, ::-1]
        crops.append(image)
        targets.append(target)
    return images_to_tensor(np.stack(crops)), torch.from_numpy(np.stack(targets)).to(device())


@torch.no_grad()
def embed_all(model: Recognizer, crops: np.ndarray) -> np.ndarray:
    """Return embeddings [n, 512] float32 of crops uint8 RGB [n, 112, 112, 3]."""
    model.eval()
    batches = [model(images_to_tensor(crops[i : i + 64])).cpu() for i in range(0, len(crops), 64)]
    return np.asarray(torch.cat(batches).numpy())


def trained(work: Path) -> Recognizer:
    """Return the network of the checkpoint, with averaged weights, in evaluation mode."""
    state = torch.load(work / "recognizer.pt", map_location="cpu", weights_only=True)
    model = Recognizer()
    model.load_state_dict(state["model"])
    ema = Ema(model)
    ema.load_state_dict(state["ema"])
    ema.copy_to(model)
    return model.eval().requires_grad_(False).to(device())


def main() -> None:
    """Train within the time budget, then print the cosine to the teacher on held-out portraits."""
    settings = options("recognizer", 15)
    portraits = data.load(settings)
    blends = blended(settings, portraits)
    model = Recognizer().to(device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    ema = Ema(model, 0.995)
    run = Run(
        settings.work / "recognizer.pt",
        settings.minutes,
        {"model": model, "ema": ema, "optimizer": optimizer},
    )
    generator = np.random.default_rng(settings.seed + run.step)
    for _ in run.steps():
        crops, targets = draw(portraits, blends, generator, BATCH)
        model.train()
        with autocast():
            maps = model.features(crops)
            embeddings = model.embed(maps[-1]).float()
        cosine = (embeddings * targets).sum(1)
        # Distances between people matter as much as the embeddings, to keep people distinct.
        relation = F.mse_loss(embeddings @ embeddings.T, targets @ targets.T)
        descend((1 - cosine).mean() + 2 * relation, optimizer, run.rate(2e-3, warm_up=50), clip=5.0)
        ema.update(model)
        run.log(25, cosine=cosine.mean().item(), relation=relation.item())
    held_out = portraits.held_out
    student = embed_all(trained(settings.work), portraits.crops[held_out])
    frame = Recognizer().frame.numpy()
    cosine_clean = (student * (portraits.embeddings[held_out] @ frame)).sum(1)
    print(f"held-out cosine to the teacher {cosine_clean.mean():.4f} (lowest {cosine_clean.min():.4f})")


if __name__ == "__main__":
    main()
