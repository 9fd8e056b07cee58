"""Tables and pictures from results; needs no torch."""
