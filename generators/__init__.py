"""Condition -> media, and text -> condition (the target of caption-only alignment). Nothing here knows the LLM."""

if __name__ != "anygen.generators":
    raise ImportError("import this folder as anygen.generators: one module, one name")

COMPONENTS: dict[str, dict[str, str]] = {
    "generator": {
        "audioldm2": "anygen.generators.audioldm2:AudioLDM2Generator",
        "stable_diffusion": "anygen.generators.stable_diffusion:StableDiffusionGenerator",
        "zeroscope": "anygen.generators.zeroscope:ZeroscopeGenerator",
    },
}
