"""The mathematics and the networks of Matryoshka Diffusion: torch and numpy only."""
