"""Write held-out portraits as a data set for ``fastface eval``.

python -m training.held_out_set --work DIR --portraits ... ; the data set is DIR/held_out.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from training import data
from training.common import options

PEOPLE = 100
PROMPTS = ("a photo of a person", "a photo of a person smiling")


def main() -> None:
    """Write the photos and the prompts."""
    settings = options("held_out_set", 0)
    portraits = data.load(settings)
    folder = settings.work / "held_out"
    (folder / "id_photos").mkdir(parents=True, exist_ok=True)
    for number, index in enumerate(portraits.held_out[:PEOPLE]):
        photo = Image.fromarray(np.asarray(portraits.originals[int(index)]))
        photo.save(folder / "id_photos" / f"p{number:03}.png")
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS), encoding="utf-8")


if __name__ == "__main__":
    main()
