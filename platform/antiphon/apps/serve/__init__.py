"""``antiphon serve``: Ray Serve deployments of a document, on one machine (control speed)."""
