"""Evidence as collected on a machine: TPM, configfs-tsm, the simulated silicon's socket."""
