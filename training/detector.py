"""Train a small face detector with SCRFD's layout (strides 8, 16, 32; two anchors; five key points).

It is trained on composed scenes: complete or cut-out portraits in all styles and many sizes, rotated,
squeezed, shaded, blurred or partly covered, on synthetic textures and face-free parts of portraits.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from training import data
from training.common import Ema, Options, Run, autocast, descend, device, options

STRIDES = (8, 16, 32)
ANCHORS = ((16, 32), (64, 128), (256, 512))
"""Face sizes, in pixels, of the two anchors of each stride."""
CANVASES = ((160, 32, 0.25), (320, 12, 0.4), (640, 4, 0.35))
"""Scene size, scenes per batch, share of the batches."""


def _conv(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(True),
    )


class _Block(nn.Module):
    """Residual 3x3 convolution."""

    def __init__(self, width: int, dilation: int = 1) -> None:
        super().__init__()
        self.body = _conv(width, width, 1, dilation)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.body(x)
        return y


class Detector(nn.Module):
    """RGB scenes [n, 3, h, w], (x - 127.5) / 128, sides multiples of 32 -> maps of both anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.to4 = nn.Sequential(_conv(3, 16, 2), _conv(16, 32, 2), _Block(32))
        self.to8 = nn.Sequential(_conv(32, 56, 2), _Block(56), _Block(56))
        self.to16 = nn.Sequential(_conv(56, 80, 2), _Block(80), _Block(80))
        # Faces of 500 pixels are detected at stride 32: dilation enlarges the receptive field to cover them.
        self.to32 = nn.Sequential(_conv(80, 96, 2), _Block(96), _Block(96, 2), _Block(96, 4))
        self.lateral = nn.ModuleList([nn.Conv2d(width, 48, 1) for width in (56, 80, 96)])
        self.smooth = nn.ModuleList([_conv(48, 48) for _ in STRIDES])
        self.tower = nn.Sequential(_conv(48, 48), _conv(48, 48))
        self.heads = nn.ModuleList([nn.Conv2d(48, 2 * 15, 1) for _ in STRIDES])
        for head in self.heads:
            assert isinstance(head, nn.Conv2d)
            assert head.bias is not None
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
            with torch.no_grad():
                head.bias[:2] = -4.0

    def maps(self, scenes: Tensor) -> list[Tensor]:
        """Return raw maps [n, 30, h / stride, w / stride] per stride: 2 scores, 2x4 sides, 2x10 points."""
        x8 = self.to8(self.to4(scenes))
        x16 = self.to16(x8)
        x32 = self.to32(x16)
        inner = [lateral(x) for lateral, x in zip(self.lateral, (x8, x16, x32), strict=True)]
        inner[1] = inner[1] + F.interpolate(inner[2], scale_factor=2.0)
        inner[0] = inner[0] + F.interpolate(inner[1], scale_factor=2.0)
        towers = [self.tower(smooth(x)) for smooth, x in zip(self.smooth, inner, strict=True)]
        return [head(x) for head, x in zip(self.heads, towers, strict=True)]

    def forward(self, scene: Tensor) -> tuple[Tensor, ...]:
        """Return nine outputs for one scene: scores [m, 1], sides [m, 4], points [m, 10] at each stride.

        Sides are distances (left, top, right, bottom) and points are offsets from the position of the
        anchor, in strides; the order is rows, columns, anchors.
        """
        scores, sides, points = [], [], []
        for level, raw in enumerate(self.maps(scene)):
            score, side, point = decode(raw.float(), level)
            scores.append(score.sigmoid().reshape(-1, 1))
            sides.append(side.reshape(-1, 4))
            points.append(point.reshape(-1, 10))
        return (*scores, *sides, *points)


def decode(raw: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split raw maps into logits [n, h, w, 2], sides [n, h, w, 2, 4], points [n, h, w, 2, 10], in strides."""
    raw = raw.permute(0, 2, 3, 1)
    half = torch.tensor(ANCHORS[level], dtype=raw.dtype, device=raw.device)[:, None] / (2 * STRIDES[level])
    shape = raw.shape[:3]
    sides = raw[..., 2:10].reshape(*shape, 2, 4).clamp(-4, 4).exp() * half
    points = raw[..., 10:].reshape(*shape, 2, 10) * half
    return raw[..., :2], sides, points


def face_free_photographs() -> list[np.ndarray]:
    """Return RGB photos without people from scikit-image; an empty list if it is not installed."""
    if importlib.util.find_spec("skimage") is None:
        return []
    import skimage

    names = [
        "brick",
        "chelsea",
        "coffee",
        "coins",
        "grass",
        "gravel",
        "page",
        "text",
        "clock_motion",
        "motorcycle_left",
        "color",
    ]
    names += ["hubble_deep_field", "rocket", "retina"]
    folder = Path(skimage.__file__).parent / "data"
    paths = [folder / f"{name}{suffix}" for name in names for suffix in (".png", ".jpg")]
    return [np.asarray(Image.open(path).convert("RGB")) for path in paths if path.exists()]


class Scenes:
    """Composes training scenes with known faces."""

    def __init__(self, portraits: data.Portraits, seed: int) -> None:
        self.portraits = portraits
        self.generator = np.random.default_rng(seed)
        landmarks = np.array([label["landmarks"] for label in portraits.labels], np.float32)
        # The forehead has no landmarks: estimate its height from the distance between brows and nose.
        brows = landmarks[:, 17:27]
        up = brows.mean(1, keepdims=True) - landmarks[:, 33:34]
        self.outline = np.concatenate([landmarks, brows + 0.62 * up], axis=1)
        self.photographs = face_free_photographs()

    def background(self, side: int) -> np.ndarray:
        """Return a face-free image [side, side, 3] float32: colors, noise, stripes, clothes, photos."""
        g = self.generator
        kind = int(g.integers(8 if self.photographs else 6))
        if kind == 0:
            scene = np.broadcast_to(g.uniform(0, 255, 3), (side, side, 3)).astype(np.float32)
        elif kind in (1, 2):
            cells = int(2 ** g.uniform(1, 5.5))
            coarse = g.uniform(0, 255, (cells, cells, 3)).astype(np.float32)
            if kind == 2:
                coarse = coarse.mean(-1, keepdims=True) * g.uniform(0.3, 1, 3).astype(np.float32)
            scene = cv2.resize(coarse, (side, side), interpolation=int(g.choice([0, 1, 2])))
        elif kind == 3:
            y, x = np.mgrid[0:side, 0:side] / side
            angle, rate = g.uniform(0, np.pi), g.uniform(2, 40)
            wave = np.sin(rate * (np.cos(angle) * x + np.sin(angle) * y) * 2 * np.pi)[..., None] * 0.5 + 0.5
            scene = (wave * g.uniform(0, 255, 3) + (1 - wave) * g.uniform(0, 255, 3)).astype(np.float32)
        elif kind >= 6:
            photograph = self.photographs[int(g.integers(len(self.photographs)))]
            extent = int(min(photograph.shape[:2]) * g.uniform(0.25, 1))
            top, left = (int(g.integers(0, n - extent + 1)) for n in photograph.shape[:2])
            scene = cv2.resize(photograph[top : top + extent, left : left + extent], (side, side)).astype(
                np.float32
            )
            scene = scene[:, ::-1] if g.random() < 0.5 else scene
        else:
            # Corners of portraits contain hair, walls and trees; below the chin there are cloth and skin.
            index = int(g.choice(self.portraits.train))
            chin = int(self.outline[index, :, 1].max())
            left = int(self.outline[index, :, 0].min())
            right = int(self.outline[index, :, 0].max())
            parts = [(0, 256, 0, left), (0, 256, right, 256), (chin + 4, 256, 0, 256)]
            top, bottom, start, end = parts[int(g.integers(3))]
            part = self.portraits.originals[index][top:bottom, start:end]
            if min(part.shape[:2]) < 12:
                part = self.portraits.originals[index][:24, :24]
            if g.random() < 0.5:
                part = np.rot90(part, int(g.integers(4)))
            repeat = int(g.integers(1, 4))
            part = np.tile(part, (repeat, repeat, 1))
            scene = cv2.resize(part, (side, side)).astype(np.float32)
        return np.array(scene, np.float32)

    def clutter(self, scene: np.ndarray) -> None:
        """Draw shapes and lines into the scene, skin-colored ellipses among them."""
        g, side = self.generator, scene.shape[0]
        for _ in range(int(g.integers(0, 12))):
            color = [float(c) for c in g.uniform(0, 255, 3)]
            if g.random() < 0.4:
                skin = self.portraits.crops[int(g.choice(self.portraits.train)), 75, 35]
                color = [float(c) for c in skin]
            x, y = (int(v) for v in g.uniform(0, side, 2))
            width, height = (int(v) for v in side * 10 ** g.uniform(-1.7, -0.4, 2))
            kind = g.integers(4)
            if kind == 0:
                cv2.rectangle(scene, (x, y), (x + width, y + height), color, -1 if g.random() < 0.6 else 2)
            elif kind == 1:
                cv2.ellipse(
                    scene, (x, y), (width // 2, height // 2), float(g.uniform(0, 180)), 0, 360, color, -1
                )
            elif kind == 2:
                cv2.line(scene, (x, y), (x + width, y + height), color, int(g.integers(1, 6)))
            else:
                word = "".join(chr(g.integers(33, 122)) for _ in range(6))
                scale = float(g.uniform(0.3, 2))
                cv2.putText(scene, word, (x, y), 0, scale, color, int(g.integers(1, 3)))

    def decoy(self, scene: np.ndarray) -> None:
        """Draw a face with shuffled tiles: it has the colors of a face but is not a face."""
        g, side = self.generator, scene.shape[0]
        tile = (
            self.portraits.crops[int(g.choice(self.portraits.train))].reshape(4, 28, 4, 28, 3).swapaxes(1, 2)
        )
        tiles = tile.reshape(16, 28, 28, 3)[g.permutation(16)].reshape(4, 4, 28, 28, 3).swapaxes(1, 2)
        size = int(side * 10 ** g.uniform(-1.2, -0.4))
        x, y = (int(v) for v in g.uniform(0, side - size, 2))
        scene[y : y + size, x : x + size] = cv2.resize(tiles.reshape(112, 112, 3), (size, size))

    def paste(self, scene: np.ndarray, taken: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray] | None:
        """Add a face to the scene; return its box [4] and key points [5, 2], or None without free space."""
        g, side = self.generator, scene.shape[0]
        index = int(g.choice(self.portraits.train))
        if g.random() < 0.2:
            style = int(g.integers(1, len(data.STYLE_NAMES)))
            source = self.portraits.images[index, style]
        else:
            source = self.portraits.originals[index]
        unit = 256 / source.shape[0]
        outline, points = self.outline[index] / unit, self.portraits.key_points[index] / unit
        if g.random() < 0.5:
            source = source[:, ::-1]
            outline = data.mirrored(outline, source.shape[1])
            points = data.mirrored_points(points, source.shape[1])
        face = outline.max(0) - outline.min(0)
        size = float(np.exp(g.uniform(np.log(11), np.log(side * 0.95))))
        if g.random() < 0.35:
            # Portraits enlarged to the size of the detector: the most frequent input of the product.
            size = side * float(g.uniform(0.4, 0.9))
        scale = size / float(np.sqrt(face.prod()))
        angle = float(np.clip(g.normal(0, 18), -60, 60)) * np.pi / 180
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        # Squeezing and shearing imitate heads turned to the side.
        shape = np.array(
            [[g.uniform(0.72, 1.12), g.normal(0, 0.06)], [g.normal(0, 0.06), g.uniform(0.9, 1.1)]]
        )
        linear = scale * turn @ shape
        moved = outline @ linear.T
        low, high = moved.min(0), moved.max(0)
        margin = 0.2 * size if g.random() < 0.2 else -0.02 * size
        room_low, room_high = -low - margin, side - high + margin
        place = g.uniform(np.minimum(room_low, room_high), np.maximum(room_low, room_high))
        box = np.concatenate([low + place, high + place])
        for other in taken:
            if (np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2]) > 0).all():
                return None
        matrix = np.concatenate([linear, place[:, None]], axis=1)
        if scale < 0.7:
            # Shrink without aliasing first; the affine transform alone would skip pixels.
            step = max(scale, 0.08)
            source = cv2.resize(source, None, fx=step, fy=step, interpolation=cv2.INTER_AREA)
            matrix = np.concatenate([linear / step, place[:, None]], axis=1)
        warped = cv2.warpAffine(
            np.ascontiguousarray(source), matrix, (side, side), borderMode=cv2.BORDER_REPLICATE
        )
        mask = self._mask(source.shape[:2], outline * (source.shape[1] / (256 / unit)), matrix, side)
        for other in taken:
            left, top, right, bottom = (max(int(v), 0) for v in other)
            if mask[top : bottom + 1, left : right + 1].mean() > 0.05:
                return None
        patch = warped.astype(np.float32) * g.uniform(0.55, 1.2) * g.uniform(0.88, 1.12, 3).astype(np.float32)
        if g.random() < 0.25:
            direction = g.uniform(-1, 1, 2) / max(size, 1)
            center = (box[:2] + box[2:]) / 2
            y, x = np.mgrid[0:side, 0:side]
            patch *= np.clip(1 + (x - center[0]) * direction[0] + (y - center[1]) * direction[1], 0.3, 1.5)[
                ..., None
            ]
        scene *= 1 - mask
        scene += patch * mask
        key_points = points @ linear.T + place
        if g.random() < 0.12:
            self._cover(scene, box)
        return box, key_points

    def _mask(self, shape: tuple[int, ...], outline: np.ndarray, matrix: np.ndarray, side: int) -> np.ndarray:
        """Return the opacity [side, side, 1]: the complete portrait, or a soft ellipse around the head."""
        g = self.generator
        opacity = np.zeros((shape[0], shape[1]), np.float32)
        if g.random() < 0.4:
            opacity[:] = 1
        else:
            center, extent = (outline.max(0) + outline.min(0)) / 2, outline.max(0) - outline.min(0)
            axes = extent * g.uniform(0.52, 0.95, 2)
            middle = (float(center[0]), float(center[1] - 0.06 * extent[1]))
            cv2.ellipse(
                opacity,
                (round(middle[0]), round(middle[1])),
                (round(axes[0]), round(axes[1])),
                0,
                0,
                360,
                1.0,
                -1,
            )
            opacity = cv2.GaussianBlur(opacity, (0, 0), max(0.3, float(extent[0]) * g.uniform(0.01, 0.06)))
        return np.asarray(cv2.warpAffine(opacity, matrix, (side, side)))[..., None]

    def _cover(self, scene: np.ndarray, box: np.ndarray) -> None:
        """Cover a part of a face, as sunglasses, a hand or a mask would."""
        g = self.generator
        extent = box[2:] - box[:2]
        top = box[:2] + extent * (g.uniform(-0.1, 0.6), g.choice([0.2, 0.6, 0.75]))
        end = top + extent * (g.uniform(0.3, 1.0), g.uniform(0.12, 0.3))
        color = [float(c) for c in g.uniform(0, 255, 3)]
        cv2.rectangle(scene, (int(top[0]), int(top[1])), (int(end[0]), int(end[1])), color, -1)

    def compose(self, side: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a scene [side, side, 3] uint8 RGB and its faces [k, 14]: box corners, then five points."""
        g = self.generator
        canvas = np.ascontiguousarray(np.clip(self.background(side), 0, 255), np.uint8)
        self.clutter(canvas)
        scene = canvas.astype(np.float32)
        if g.random() < 0.3:
            self.decoy(scene)
        faces: list[np.ndarray] = []
        count = int(g.choice([0, 1, 2, 4, 8], p=(0.1, 0.4, 0.2, 0.15, 0.15)))
        for _ in range(count):
            pasted = self.paste(scene, [face[:4] for face in faces])
            if pasted is not None:
                faces.append(np.concatenate([pasted[0], pasted[1].ravel()]))
        if g.random() < 0.2:
            scene = cv2.GaussianBlur(scene, (0, 0), float(g.uniform(0.4, 1.6)))
        if g.random() < 0.2:
            scene = scene + g.normal(0, g.uniform(2, 14), scene.shape).astype(np.float32)
        if g.random() < 0.08:
            scene = np.repeat(scene.mean(-1, keepdims=True), 3, axis=-1)
        if g.random() < 0.15:
            # Letterboxing: InsightFace pads images with black at the right or at the bottom.
            cut, across = int(side * g.uniform(0.5, 0.95)), bool(g.random() < 0.5)
            if all(face[2 if across else 3] <= cut for face in faces):
                scene[(slice(None), slice(cut, None)) if across else slice(cut, None)] = 0
        table = np.array(faces, np.float32).reshape(-1, 14)
        return np.clip(scene, 0, 255).astype(np.uint8), table


def assign(faces: np.ndarray, level: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the face assigned to each anchor of a stride, [h, w, 2] (-1 none, -2 ignored), and face sizes.

    A face is assigned to the anchors nearest in size; positions close to its center are positive, a ring
    around them is ignored.
    """
    stride = STRIDES[level]
    cells = side // stride
    owner = np.full((cells, cells, 2), -1, np.int64)
    positions = np.arange(cells) * stride
    sizes: np.ndarray = np.sqrt(np.maximum((faces[:, 2:4] - faces[:, :2]).prod(1), 1))
    for anchor, anchor_size in enumerate(ANCHORS[level]):
        ratio = np.abs(np.log2(sizes / anchor_size))
        ends = (anchor_size == 16) * (sizes < 16) | (anchor_size == 512) * (sizes > 512)
        for number in np.argsort(-sizes):
            if ratio[number] > 1.0 and not ends[number]:
                continue
            strong = ratio[number] <= 0.66 or ends[number]
            center = (faces[number, :2] + faces[number, 2:4]) / 2
            distance = np.hypot(positions[None] - center[0], positions[:, None] - center[1])
            radius = max(0.75 * stride, 0.16 * sizes[number])
            view = owner[:, :, anchor]
            ring = (distance < 2.0 * radius) & (view == -1)
            view[ring] = -2
            if strong:
                view[distance < radius] = number
    return owner, sizes


def losses(maps: list[Tensor], faces: list[np.ndarray], side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return focal loss of scores, 1 - GIoU of boxes, L1 of points in face sizes, per positive anchor."""
    score_loss = box_loss = point_loss = maps[0].new_zeros(())
    positives = 0
    for level, raw in enumerate(maps):
        logits, sides, points = decode(raw.float(), level)
        owners = [assign(table, level, side)[0] for table in faces]
        owner = torch.from_numpy(np.stack(owners)).to(raw.device)
        positive, counted = owner >= 0, owner != -2
        labels = positive.float()
        probability = logits.sigmoid()
        miss = torch.where(positive, 1 - probability, probability)
        weight = 0.5 * miss**2 * counted
        score_loss = (
            score_loss + (weight * F.binary_cross_entropy_with_logits(logits, labels, reduction="none")).sum()
        )
        where = positive.nonzero()
        positives += len(where)
        if not len(where):
            continue
        stride = STRIDES[level]
        tables = [
            np.concatenate([table, np.zeros((1, 14), np.float32)])[own[own >= 0]]
            for table, own in zip(faces, owners, strict=True)
        ]
        truth = torch.from_numpy(np.concatenate(tables)).to(raw.device) / stride
        spot = where[:, [2, 1]].float()
        side_wanted = torch.cat([spot - truth[:, :2], truth[:, 2:4] - spot], dim=1)
        side_given = sides[positive]
        box_loss = box_loss + (1 - giou(side_given, side_wanted)).sum()
        size = (side_wanted[:, :2] + side_wanted[:, 2:]).clamp_min(0.1).prod(1).sqrt()
        offsets = truth[:, 4:] - spot.repeat(1, 5)
        point_loss = point_loss + ((points[positive] - offsets).abs().mean(1) / size).sum()
    count = max(positives, 1)
    return score_loss / count, box_loss / count, point_loss / count


def giou(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the generalized IoU of boxes [m, 4], given as distances from a common position."""
    overlap = torch.minimum(predicted, target)
    hull = torch.maximum(predicted, target)
    inner = (overlap[:, 0] + overlap[:, 2]).clamp_min(0) * (overlap[:, 1] + overlap[:, 3]).clamp_min(0)
    areas = [(sides[:, 0] + sides[:, 2]) * (sides[:, 1] + sides[:, 3]) for sides in (predicted, target, hull)]
    union = areas[0] + areas[1] - inner
    return inner / union.clamp_min(1e-6) - (areas[2] - union) / areas[2].clamp_min(1e-6)


def trained(settings: Options) -> Detector:
    """Return the network of the checkpoint, with averaged weights, in evaluation mode."""
    state = torch.load(settings.work / "detector.pt", map_location="cpu", weights_only=True)
    model = Detector()
    model.load_state_dict(state["model"])
    ema = Ema(model)
    ema.load_state_dict(state["ema"])
    ema.copy_to(model)
    return model.eval().requires_grad_(False)


def main() -> None:
    """Train within the time budget."""
    settings = options("detector", 15)
    portraits = data.load(settings)
    model = Detector().to(device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    ema = Ema(model, 0.995)
    run = Run(
        settings.work / "detector.pt", settings.minutes, {"model": model, "ema": ema, "optimizer": optimizer}
    )
    scenes = Scenes(portraits, settings.seed + run.step)
    shares = np.array([share for *_, share in CANVASES])
    for _ in run.steps():
        side, count, _ = CANVASES[int(scenes.generator.choice(len(CANVASES), p=shares))]
        composed = [scenes.compose(side) for _ in range(count)]
        images = torch.from_numpy(np.stack([scene for scene, _ in composed])).to(device())
        model.train()
        with autocast():
            maps = model.maps((images.permute(0, 3, 1, 2).float() - 127.5) / 128)
        score, box, point = losses(maps, [faces for _, faces in composed], side)
        # The key points determine the alignment and therefore the quality of the embedding.
        descend(score + box + 8 * point, optimizer, run.rate(2e-3, warm_up=50), clip=5.0)
        ema.update(model)
        run.log(25, side=side, score=score.item(), box=box.item(), point=point.item())


if __name__ == "__main__":
    main()
