"""Features -> LLM tokens, and signal states -> generator conditions. Nothing here loads media."""

if __name__ != "anygen.projectors":
    raise ImportError("import this folder as anygen.projectors: one module, one name")

COMPONENTS: dict[str, dict[str, str]] = {
    "input_projector": {
        "linear": "anygen.projectors.input:LinearProjector",
        "mlp": "anygen.projectors.input:MLPProjector",
        "memory": "anygen.projectors.input:MemoryProjector",
    },
    "output_projector": {
        "text_fc": "anygen.projectors.output:TextFcLayer",
        "low_rank": "anygen.projectors.output:LowRankProjector",
        "mlp": "anygen.projectors.output:MLPOutputProjector",
    },
}
