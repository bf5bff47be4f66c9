"""Machines: Ray nodes on this one, and descriptions of clusters elsewhere."""
