"""Engine modules -> a bundle that runs without them."""
