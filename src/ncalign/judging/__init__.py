"""Question sets, models' answers, and those who judge them."""
