"""Model files to loaded, fused and placed models."""
