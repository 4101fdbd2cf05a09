"""One Accelerate loop and the three tasks it trains."""
