"""Condition -> media, and text -> condition (the target of caption-only alignment). Nothing here knows the LLM."""

if __name__ != "anygen.generators":
    raise ImportError("import this folder as anygen.generators: one module, one name")

COMPONENTS: dict[str, dict[str, str]] = {
    "generator": {
        "audioldm2": "anygen.generators.audioldm2:AudioLDM2Generator",
        "diffusers/audioldm": "anygen.generators.diffusers_specs:DiffusersAudioLDM",
        "diffusers/flux": "anygen.generators.diffusers_specs:DiffusersFlux",
        "diffusers/ltx": "anygen.generators.diffusers_specs:DiffusersLTX",
        "diffusers/sd3": "anygen.generators.diffusers_specs:DiffusersSD3",
        "diffusers/sdxl": "anygen.generators.diffusers_specs:DiffusersSDXL",
        "diffusers/stable_audio": "anygen.generators.diffusers_specs:DiffusersStableAudio",
        "diffusers/stable_diffusion": "anygen.generators.diffusers_specs:DiffusersStableDiffusion",
        "diffusers/wan": "anygen.generators.diffusers_specs:DiffusersWan",
        "stable_diffusion": "anygen.generators.stable_diffusion:StableDiffusionGenerator",
        "zeroscope": "anygen.generators.zeroscope:ZeroscopeGenerator",
    },
}
