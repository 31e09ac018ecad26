"""Training data: reading, splitting, encoding, order of samples and image augmentation."""
