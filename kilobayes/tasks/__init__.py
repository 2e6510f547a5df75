"""Tasks: where examples come from and how a batch of them is made. This import brings in no torch."""
