"""Attention, rotary positions and transformer blocks."""
