"""The model: pose alignment, the conditioned video UNet and the mathematics around them."""
