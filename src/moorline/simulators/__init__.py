"""Hardware that is not here, simulated spec-exactly under roots that say SIMULATED. Production refuses their roots."""
