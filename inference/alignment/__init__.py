"""Alignment reported and measured: advice, pictures, a page, comparisons of methods."""
