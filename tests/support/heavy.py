"""Packages that cheap commands must not import."""

HEAVY = (
    "torch",
    "diffusers",
    "transformers",
    "numpy",
    "huggingface_hub",
    "insightface",
    "cv2",
    "onnxruntime",
    "PIL",
    "safetensors",
)
