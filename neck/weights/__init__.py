"""Files of weights: what kind each is, what a pickle holds without running it, which state of it is wanted."""
