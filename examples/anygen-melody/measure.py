"""Does what anygen composes do what was asked for? Asks in words that were not trained on, and reads the notes.

    python measure.py ../../runs/melody/model [SEED]

Each row: the share of requests whose notes do what the caption says, by the LLM's condition and by the composer's own
text encoder from the same noise; their ratio is retention.
"""

import random
import sys

from train_composer import captions, fits

from anygen import AnyGenPipeline
from anygen.reply import PlannedPart

REQUESTS = ("Please compose {}.", "Could you write me {}?", "Make {}.", "Let me hear {}.")
"""Other wordings than those of the recipe."""
COUNT = 96


def main(model: str, seed: int) -> None:
    """Prints the table."""
    pipe = AnyGenPipeline.from_pretrained(model)
    composer, rng = pipe.generator("melody"), random.Random(seed)
    wanted = rng.sample(captions(), COUNT)
    plans = pipe.plan([rng.choice(REQUESTS).format(words) for words in wanted], seed=seed, max_new_tokens=40)
    made = [[p for p in plan.content if isinstance(p, PlannedPart) and p.modality == "melody"] for plan in plans]
    print(f"{sum(len(parts) == 1 for parts in made)} of {COUNT} requests got one melody, seed {seed}")
    verdicts: dict[str, list[dict[str, bool]]] = {"LLM": [], "text encoder": []}
    for number, (words, parts) in enumerate(zip(wanted, made, strict=True)):
        direct = composer.encode_text([words])
        for source, condition in (("LLM", parts[0].condition if parts else None), ("text encoder", direct)):
            heard = composer.generate(condition, seeds=[number])[0] if condition is not None else None
            told = fits(composer.generate(direct, seeds=[0])[0], words)
            verdicts[source].append(fits(heard, words) if heard is not None else dict.fromkeys(told, False))
    for kind in ("pace", "instrument", "mood", "turn"):
        ours, theirs = ([v[kind] for v in verdicts[source] if kind in v] for source in verdicts)
        shares = sum(ours) / len(ours), sum(theirs) / len(theirs)
        print(f"{kind:>10}: LLM {shares[0]:.3f}, text encoder {shares[1]:.3f}, of {len(ours)}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0)
