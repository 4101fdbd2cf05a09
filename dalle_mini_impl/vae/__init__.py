"""The discrete VAE: pictures to grids of ids and back."""
