"""Recipes: one module per training method beside its YAML files; `llada-trm train` runs them."""
