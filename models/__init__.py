"""
Networks as Pyro models, one file each; imported from a checkout, not installed.

Each model is called with inputs, and with observations to condition on them: ``model(x, y=None)``. It has one data
plate, "data", and in it one observed site, "obs".
"""
