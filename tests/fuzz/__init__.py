"""Attacks on a server of its own: `make fuzz`, and the kept seeds in `make test`.

An attack is told by a recipe, which is JSON, and says which kind it is of: `{"kind": "bodies", ...}`. Each
kind is a module here, with `attack(victim, recipe)`, a hypothesis strategy `recipes()`, and `KNOWN`, the
recipes of faults that were found once. Recipes that do harm are written to `seeds`.
"""
