"""Evaluators: the fluid model, the iteration-level simulator, and the comparison that runs both."""
