"""The paper's analysis: scaling law, parameter counts and inference cost. The core imports nothing from here."""
