"""Measurements: one module per published figure, results as JSON, and the tables that README shows of them."""
