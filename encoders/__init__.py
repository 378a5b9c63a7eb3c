"""Media -> features. One module per encoder family; nothing here knows the LLM."""

if __name__ != "anygen.encoders":
    raise ImportError("import this folder as anygen.encoders: one module, one name")

COMPONENTS: dict[str, dict[str, str]] = {
    "encoder": {"imagebind": "anygen.encoders.imagebind:ImageBindEncoder"},
}
