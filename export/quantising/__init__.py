"""Which products are quantised, and in which ranges: told by real pictures and measured errors."""
