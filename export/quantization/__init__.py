"""Which products are quantized, and in which ranges: told by real images and measured errors."""
