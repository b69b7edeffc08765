"""What the builder made of a graph: the layer report."""
