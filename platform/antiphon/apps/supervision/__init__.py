"""Keeps worker processes running, and writes down what happened to them (control speed)."""
