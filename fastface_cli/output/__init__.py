"""Images, their metadata, latents, and how they are written."""
