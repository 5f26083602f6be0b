"""Where self-attention looks, latent frame by latent frame, and what changes if a part of it is replaced."""
