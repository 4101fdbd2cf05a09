"""Captioned pictures in: sources, preparation, made scenes, caches."""
