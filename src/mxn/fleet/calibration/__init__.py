"""What was measured on machines: profiles of cells, the costs fitted to them, and the memory that loads took."""
