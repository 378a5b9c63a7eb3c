"""Losses, datasets, stages, recipes, and the recipes that build the embedded default. Never imported at inference."""

if __name__ != "anygen.training":
    raise ImportError("import this folder as anygen.training: one module, one name")
