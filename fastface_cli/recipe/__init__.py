"""Recipes: everything that decides the pixels of an image, apart from the photo, the prompt and the seed."""
