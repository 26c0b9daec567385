"""Hardware and model cost arithmetic, AFD ratio plan, simulation, reports (control speed)."""
