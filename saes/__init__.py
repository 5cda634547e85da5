"""Train sparse autoencoders on a Gemma-2's residual stream, and measure them."""
