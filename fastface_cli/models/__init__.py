"""Load models, fuse LoRAs, and place models on devices."""
