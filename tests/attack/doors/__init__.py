"""Attacks on what is in front of workers: browsers, crowds, routers."""
