"""What every file of ours promises: names, shapes, manifests (no torch)."""
