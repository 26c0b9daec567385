"""Names of the variables in which a router finds experts' keys and the hosts that may see them (values).

    <VARIABLE>         the key
    <VARIABLE>_HOSTS   hosts that it may be sent to, separated by commas or spaces: ``api.example.com``, ``models.example:8443``
    ANTIPHON_EXPERT_KEY_HOSTS=required   a key without such a list goes nowhere (as the operator starts routers)

Must not know: who sends keys, or who sets them.
"""

from typing import Final

HOSTS_SUFFIX: Final = "_HOSTS"
REQUIRED_VARIABLE: Final = "ANTIPHON_EXPERT_KEY_HOSTS"
