"""Runs as curves: read, grouped over seeds, and drawn as a PNG, a table and a page."""
