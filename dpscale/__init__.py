"""dpscale: differentially private training of JAX models, from a laptop to a SLURM cluster."""
