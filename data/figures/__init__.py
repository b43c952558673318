"""Figures and statistics: curves, maps, films, and averages of scores with their intervals."""
