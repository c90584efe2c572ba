"""Templates for Ray clusters on Kubernetes."""
