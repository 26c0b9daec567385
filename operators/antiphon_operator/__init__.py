"""The Kubernetes operator of Antiphon: kinds, planning, rendering, reconciling (control speed)."""
