"""What custom resources, and pods that they name, can do to the operator and through it."""
