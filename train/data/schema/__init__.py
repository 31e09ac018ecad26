"""Schema inference: what each column of a source is, and the options that suit it."""
