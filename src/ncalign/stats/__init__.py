"""Pure functions of numbers: rates, ratings, strengths, and their intervals."""
