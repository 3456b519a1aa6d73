"""Write examples/fastface.ipynb, the Python use step by step, with the outputs of its cells.

    pip install nbclient ipykernel
    python examples/make_notebook.py

A test executes its cells in order.
"""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).with_name("fastface.ipynb")

CELLS = [
    """\
# fastface in Python

Every cell runs on a CPU without a download, with the *pocket* stack: a trained miniature that is included
in the package. For full-size models use `FastFace("hyper-fastface")`; it requires an NVIDIA GPU and 12 GB
of models. Install with `pip install .` in the checkout and start the notebook in the folder `examples/`.""",
    """\
from fastface_cli import FastFace

face = FastFace("pocket")
me = face.identity("portrait.png")
face.generate(me, "watercolour; a smiling woman", seed=3)[0]""",
    """\
A recipe is loaded once and stays loaded. `identity` accepts one or several photos, as paths or Pillow
images. `generate` returns Pillow images. The same seed gives the same image.""",
    """\
from PIL import Image

images = face.generate(me, "pencil drawing; a serious woman", seed=1, count=4)
row = Image.new("RGB", (128 * len(images), 128))
for index, image in enumerate(images):
    row.paste(image, (128 * index, 0))
row""",
    """\
## Strength of the identity adapter

`adapter_scale` scales the identity part of attention; 0 disables it.""",
    """\
scales = (0.0, 0.4, 0.8, 1.2)
row = Image.new("RGB", (128 * len(scales), 128))
for index, scale in enumerate(scales):
    row.paste(face.generate(me, "a photo of a woman", seed=1, adapter_scale=scale)[0], (128 * index, 0))
row""",
    """\
## Changing the recipe

Overrides work like `--set`. The plan shows the weights of each step and which of the three guidance
branches are computed.""",
    """\
gentle = FastFace("pocket", overrides=["guidance.text=[1, 2, 2, 1]", "adapter.scale=0.7"])
for step in gentle.pipeline.plan():
    print(f"t {step.timestep:.0f}: identity {step.identity}, text {step.text}, branches {step.branches}")
gentle.generate(me, "watercolour; a smiling woman", seed=3)[0]""",
    """\
## Keeping the best image

`best_of` generates several images and keeps the one most similar to the person, among those that follow the
prompt. It uses dlib if it is installed, because dlib is independent of the models that generate.""",
    """\
best = face.best_of(me, "watercolour; a smiling woman", n=4, seed=1)
for score in best.scores:
    print(score)
print("scored by", best.judge, "- kept seed", best.seed)
best.image""",
    """\
## Saving an identity

An identity contains a face embedding and an aligned face crop. It identifies a person, so protect the file
as you protect the photo.""",
    """\
import tempfile
from pathlib import Path

from fastface_cli.identity.identity import Identity

with tempfile.TemporaryDirectory() as folder:
    file = me.save(Path(folder) / "me.safetensors")
    loaded = Identity.load(file)
face.generate(loaded, "a photo of a woman", seed=1)[0]""",
    """\
## Errors

Errors are raised as `FastFaceError` with a message, a hint, and the exit code of the command line.""",
    """\
from fastface_cli.errors import FastFaceError

try:
    face.identity(Image.new("RGB", (256, 256), "white"))
except FastFaceError as error:
    print(error.message)
    print("hint:", error.hint)
    print("exit code:", error.exit_code)""",
]
"""Text and code cells alternate, starting with text."""


def main() -> None:
    """Run the cells and write the notebook."""
    import nbformat
    from nbclient import NotebookClient

    new = (nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell)
    cells = [new[index % 2](source, id=f"cell-{index}") for index, source in enumerate(CELLS)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    here = {"metadata": {"path": str(PAGE.parent)}}
    NotebookClient(notebook, resources=here, record_timing=False).execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/jpeg", None)  # Pillow offers each image twice
    nbformat.write(notebook, PAGE)


if __name__ == "__main__":
    main()
