"""How the rows of the loss are computed."""
