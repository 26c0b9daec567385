"""A Kubernetes API server in memory and a scripted KubeRay, for tests of operators (control speed). Shipped."""
