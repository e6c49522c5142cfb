"""In the way of PyTorch: what users run must do without it, whatever tests compare it with."""

raise ModuleNotFoundError("PyTorch is hidden from what tests start", name="torch")
