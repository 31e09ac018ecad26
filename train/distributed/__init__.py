"""Workers: how Ray Train starts them, connects them and runs the training loop on them."""
