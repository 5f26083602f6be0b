"""Makes a bundle of the engine's modules, which then runs without them."""
