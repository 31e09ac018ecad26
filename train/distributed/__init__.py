"""Workers: how Ray Train starts them, and how they share the work and agree."""
