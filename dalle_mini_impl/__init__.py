"""A minimal DALL·E-style text-to-image transformer: train it on captioned pictures, sample from it, rank with CLIP."""
