"""An exported file in the place of a live model's encoder."""
