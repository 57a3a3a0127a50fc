"""Matrices and trigonometric polynomials, which know of no layer."""
