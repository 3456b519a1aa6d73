"""Identity adapters: how a face conditions the UNet."""
