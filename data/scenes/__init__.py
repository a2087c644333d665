"""Made-up scenes of shapes: each drawn, described in three languages, and played by a synthesiser."""
