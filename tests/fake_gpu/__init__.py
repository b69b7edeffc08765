"""A GPU that is none: TensorRT's and torch.cuda's surfaces, played on a CPU; `play.play` puts them in."""
