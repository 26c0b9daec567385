"""Reconciles LLMDeployments: acceptance, pools, rollout, status (control speed)."""
