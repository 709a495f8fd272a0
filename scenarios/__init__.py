"""Bundled scenarios, one question each; `llmopt list` names them."""
