"""How things look on a terminal, and what may reach it."""
