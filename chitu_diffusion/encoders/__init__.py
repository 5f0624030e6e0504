"""From a prompt to the embedding rows that condition the diffusion transformer."""
