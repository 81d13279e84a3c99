"""4-bit formats: how a matrix is coded, how it lies in memory, and what it stands for."""
