"""Measure the pocket stack on photos from outside its training data, with dlib.

The photos come with two libraries: InsightFace's group photo ``t1`` (six people), scikit-image's astronaut.
``python -m training.elsewhere --work DIR`` prints the likeness of the default recipe and writes
``DIR/elsewhere.png``: a column for each person, the aligned crop above the generated images.
"""

from __future__ import annotations

import cv2
import insightface.data
import numpy as np
import skimage.data
from PIL import Image

from fastface_cli.app.pipeline import Request
from training.common import options
from training.dlib_recognizer import DlibRecognizer
from training.generation import likeness, product

SEEDS = 8
SHOWN = 4
PROMPTS = ("photo; a person", "comic; a person")


def main() -> None:
    """Print a row for each prompt and write the images."""
    settings = options("elsewhere", 0)
    face, recognizer = product("baseline"), DlibRecognizer()
    group = Image.fromarray(np.ascontiguousarray(insightface.data.get_image("t1")[:, :, ::-1]))
    people = [face.identity(group, face_index=index) for index in range(6)]
    people.append(face.identity(Image.fromarray(skimage.data.astronaut())))  # type: ignore[no-untyped-call]
    crops = [np.ascontiguousarray(person.crop()[:, :, ::-1]) for person in people]
    whole = np.array([0, 0, *crops[0].shape[1::-1]], np.float32)
    described = [recognizer.describe(crop, whole) for crop in crops]
    references = np.stack([each for each in described if each is not None])
    own = [index for index in range(len(people)) for _ in range(SEEDS)]
    columns = [[cv2.resize(crop, (128, 128), interpolation=cv2.INTER_AREA)] for crop in crops]
    for prompt in PROMPTS:
        requests = [Request(prompt, seed, person) for person in people for seed in range(SEEDS)]
        images = [np.asarray(result.image) for result in face.pipeline.generate(requests, batch_size=8)]
        result = likeness(recognizer, images, references, own)
        by_person = result.similarity.reshape(len(people), SEEDS).mean(1)
        print(
            f"{prompt}: dlib similarity {result.similarity.mean():.3f} "
            f"({', '.join(f'{share:.2f}' for share in by_person)}), "
            f"rank-1 {(result.ranks == 0).mean():.1%}, no face {1 - result.has_face.mean():.1%}"
        )
        for index, column in enumerate(columns):
            column.extend(images[index * SEEDS : index * SEEDS + SHOWN])
    Image.fromarray(np.concatenate([np.concatenate(column) for column in columns], axis=1)).save(
        settings.work / "elsewhere.png"
    )


if __name__ == "__main__":
    main()
