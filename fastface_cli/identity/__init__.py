"""Photos to identities: read the photo, find the face, embed and crop it."""
