"""Ray and where things are kept. Imports nothing else of this project."""
