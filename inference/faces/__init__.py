"""HJB face optimisation: predictions steered towards the reference's face."""
