"""``antiphon coe``: train, evaluate, try and serve a composition-of-experts router (control speed).

Must not know: how any of it is done.
"""

# In the order of the help, which is that of first use.
from antiphon.cli.coe import training  # isort: skip
from antiphon.cli.coe import serving  # isort: skip
from antiphon.cli.coe import options

app = options.app

__all__ = ["app", "serving", "training"]
