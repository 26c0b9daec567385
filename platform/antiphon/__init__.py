"""Antiphon: attention-FFN disaggregated serving of large language models (control speed)."""

__version__ = "0.1.0"
