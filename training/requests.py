"""Conversations to learn from: free-form requests for media, questions about media, and plain talk.

Everything is drawn from a seeded generator, so that example number n is the same in every process. A conversation is
a list of messages whose media are rows of a pool of encoded media, and for each medium that is made the caption whose
condition its run has to reach. What can be made and asked about is the matter of `wishes`, the wordings of `phrases`.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from anygen.errors import ConfigError
from anygen.messages import MediaPart, Message, TextPart
from anygen.training.captions import plural, with_article
from anygen.training.phrases import (
    CANNOT,
    CANNOT_NOUN,
    GREET,
    JOIN,
    NAMES,
    PAIR,
    PART,
    PLAIN,
    PLAIN_FIXED,
    REPLY,
    SMALL,
)
from anygen.training.phrases_media import (
    AGAIN_JOINTS,
    IN_NOUNS,
    INTO,
    INTO_FROM,
    KINDS_OF,
    NOUNS_JOINED,
    ONE_THING,
    ONE_THING_WHOLE,
    TURNED_ROUND,
)
from anygen.training.wishes import Wish, Wishes, by_modality


@dataclass(frozen=True, slots=True)
class Seen:
    """A medium of the pool that questions are asked about."""

    modality: str
    index: int
    """Its row in the pool of encoded media of its modality."""
    content: Any
    """As `Wish.content`; a picture's style and background are always known."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that end with the answer to be learned, or with a question that words answer."""

    messages: list[Message]
    """Media in user messages are pool rows; in answers, captions."""
    words: bool = False
    """Whether to learn only that the answer is one of words: the messages end with the question."""


def user(text: str, seen: Seen | None = None, *, last: bool = False) -> Message:
    """A user's turn, its medium before or behind the words."""
    words = (TextPart(text),) if text else ()
    media = (MediaPart(seen.modality, seen.index),) if seen else ()  # type: ignore[arg-type]
    return Message("user", words + media if last else media + words)


def told(text: str) -> Message:
    """An answer of words."""
    return Message("assistant", (TextPart(text),))


MIXTURE = {
    "make": 0.31,
    "make_several": 0.08,
    "one_thing": 0.03,
    "ask": 0.2,
    "again": 0.05,
    "change": 0.06,
    "into": 0.12,
    "cannot": 0.02,
    "talk": 0.08,
    "talk_after": 0.03,
    "media_after": 0.02,
}
"""Kind of conversation -> share."""
SHARES = {"image": 0.44, "video": 0.28, "audio": 0.28}
"""Modality -> how often a wish is of it, among those that can be made."""


class Conversations:
    """An endless, indexable supply of conversations.

    Args:
        wishes: what can be made; one for each output modality.
        pool: media to ask about, of modalities that have wishes.
        seed: every seed has its own conversations.
        mixture: kind -> weight, in place of `MIXTURE`; kinds that these wishes and this pool cannot make are left out.
        answers: plain question -> the LLM's own answer, for conversations that go on after one; without any, they
            start with what was made or seen.

    Raises:
        ConfigError: a kind of `mixture` does not exist.
    """

    def __init__(
        self,
        wishes: Sequence[Wishes],
        pool: Sequence[Seen],
        seed: int,
        mixture: Mapping[str, float] | None = None,
        answers: Mapping[str, str] | None = None,
    ) -> None:
        self.wishes, self.seed = by_modality(wishes), seed
        self.answers = list((answers or {}).items())
        self.pools: dict[str, list[Seen]] = {}
        for seen in pool:
            self.pools.setdefault(seen.modality, []).append(seen)
        self.linked: dict[tuple[str, str], list[Seen]] = {}
        if unknown := sorted(set(mixture or ()) - set(MIXTURE)):
            raise ConfigError(f"unknown kinds of conversation: {', '.join(unknown)}; known: {', '.join(MIXTURE)}")
        impossible = {"into", "one_thing"} if len(self.wishes) < 2 else set()
        if not self.pools:
            impossible |= {"ask", "again"}
        self.mixture = {k: v for k, v in (MIXTURE if mixture is None else mixture).items() if k not in impossible}
        self.modalities, self.shares = list(self.wishes), [SHARES.get(name, 0.3) for name in self.wishes]
        self.forms: dict[str, Callable[[random.Random], Conversation]] = {
            "make": self._make,
            "make_several": self._make_several,
            "one_thing": self._one_thing,
            "ask": self._ask_about,
            "again": self._make_again,
            "change": self._change,
            "into": self._into,
            "cannot": self._cannot,
            "talk": self._talk,
            "talk_after": self._talk_after,
            "media_after": self._media_after,
        }

    def __getitem__(self, number: int) -> Conversation:
        rng = random.Random(f"{self.seed}/{number}")
        form = rng.choices(list(self.mixture), list(self.mixture.values()))[0]
        return self.forms[form](rng)

    def answer(self, *made: tuple[str, Any]) -> Message:
        """The assistant's turn: each (modality, content) is told in a sentence, its run behind it.

        A run's target is the canonical caption, with which the sentence ends.
        """
        parts: list[TextPart | MediaPart] = []
        for modality, content in made:
            sentence = self.wishes[modality].told(content)
            if parts:
                sentence = " And " + sentence[:1].lower() + sentence[1:]
            caption = self.wishes[modality].caption(content)
            parts += [TextPart(sentence), MediaPart(modality, caption)]  # type: ignore[arg-type]
        return Message("assistant", tuple(parts))

    def ask_for(self, modality: str, content: Any, words: str, rng: random.Random) -> Conversation:
        """A request in those words, and the answer with that content."""
        asked = user(typed(self.wishes[modality].request(words, rng), rng))
        return Conversation([asked, self.answer((modality, content))])

    def free_request(self, rng: random.Random) -> Conversation:
        """A request for one medium, several or a changed one, without media in it, and the answer."""
        make = rng.choices([self._make, self._make_several, self._change], [0.7, 0.15, 0.15])[0]
        return make(rng)

    def _wish(self, rng: random.Random, *, plain: float = 0.45) -> Wish:
        return self.wishes[rng.choices(self.modalities, self.shares)[0]].wish(rng, plain=plain)

    def _seen(self, rng: random.Random) -> Seen:
        names = list(self.pools)
        return rng.choice(self.pools[rng.choices(names, [SHARES.get(name, 0.3) for name in names])[0]])

    def _make(self, rng: random.Random) -> Conversation:
        wish = self._wish(rng)
        return self.ask_for(wish.modality, wish.content, wish.words, rng)

    def _make_several(self, rng: random.Random) -> Conversation:
        """Two or three media, in the order asked."""
        wishes = [self._wish(rng, plain=0.7) for _ in range(2 if rng.random() < 0.75 else 3)]
        if [wish.modality for wish in wishes] == ["image", "image"] and rng.random() < 0.5:
            x, y = (wish.words for wish in wishes)
            text = rng.choice(PAIR).format(x=x, y=y, X=x[:1].upper() + x[1:])
        elif rng.random() < 0.25:
            nouns = [rng.choice(IN_NOUNS[wish.modality]).format(wish.words) for wish in wishes]
            text = rng.choice(NOUNS_JOINED[len(wishes) - 2]).format(*nouns)
        else:
            clauses = [self.wishes[wish.modality].clause(wish.words, rng) for wish in wishes]
            joints = TURNED_ROUND if len(wishes) == 2 and rng.random() < 0.12 else JOIN[len(wishes) - 2]
            text = rng.choice(joints).format(*clauses) + rng.choice(["", ".", ".", "!", "?", " please"])
        made = [(wish.modality, wish.content) for wish in wishes]
        return Conversation([user(typed(text, rng)), self.answer(*made)])

    def _one_thing(self, rng: random.Random) -> Conversation:
        """One thing in two or three modalities, in the order asked; the thing is named once."""
        modalities = rng.sample(self.modalities, 2 if len(self.modalities) < 3 or rng.random() < 0.7 else 3)
        if (known := self._known(modalities, rng)) is None:
            return self._make_several(rng)
        name, contents = known
        x = with_article(name)
        if rng.random() < 0.3:
            kinds = [rng.choice(KINDS_OF[modality]) for modality in modalities]
            listed = ", ".join(kinds[:-1]) + " and " + kinds[-1]
            text = rng.choice(ONE_THING_WHOLE).format(x=x, X=x[:1].upper() + x[1:], m=listed)
        else:
            first, *others = modalities
            clauses = [self.wishes[first].clause(x, rng), *(rng.choice(ONE_THING[modality]) for modality in others)]
            text = rng.choice(JOIN[len(modalities) - 2]).format(*clauses) + rng.choice(["", ".", ".", "!", " please"])
        return Conversation([user(typed(text, rng)), self.answer(*zip(modalities, contents, strict=True))])

    def _known(self, modalities: Sequence[str], rng: random.Random) -> tuple[str, list[Any]] | None:
        """A thing that can be made in each of these modalities, and its contents; None if none was found."""
        # of all that is seen, little is heard as well
        source = self.wishes["audio" if "audio" in modalities else modalities[0]]
        for _ in range(64):
            name = source.named(source.wish(rng, plain=1.0).content)
            contents = [self.wishes[modality].of(name, rng) for modality in modalities]
            if None not in contents:
                return name, contents
        return None

    def _ask_about(self, rng: random.Random) -> Conversation:
        return Conversation(self._asked(rng))

    def _asked(self, rng: random.Random) -> list[Message]:
        seen = self._seen(rng)
        question, answer = self.wishes[seen.modality].question(seen.content, rng)
        return [user(typed(question, rng), seen, last=rng.random() < 0.5), told(answer)]

    def _make_again(self, rng: random.Random) -> Conversation:
        """What a medium shows, once more, as it is or otherwise."""
        seen = self._seen(rng)
        wishes, wanted = self.wishes[seen.modality], seen.content
        words = rng.choice(wishes.again)
        if rng.random() < 0.7:
            wanted, change = wishes.changed(wanted, rng)
            words = rng.choice(AGAIN_JOINTS).format(words, change)
        asked = user(typed(words, rng), seen, last=rng.random() < 0.5)
        return Conversation([asked, self.answer((seen.modality, wanted))])

    def _change(self, rng: random.Random) -> Conversation:
        wish = self._wish(rng, plain=0.7)
        wishes = self.wishes[wish.modality]
        opening = self.ask_for(wish.modality, wish.content, wish.words, rng).messages
        make = wishes.other if rng.random() < 0.5 else wishes.changed
        wanted, change = make(wish.content, rng)
        return Conversation([*opening, user(typed(change, rng)), self.answer((wish.modality, wanted))])

    def _into(self, rng: random.Random) -> Conversation:
        """What was shown, heard or made, in another modality; a thing that has no sound is said to have none.

        Most things that are seen have no sound, but who asks for one mostly has a thing that has.
        """
        possible = rng.random() < 0.9
        opening: list[Message] = []
        seen: Seen | None = None
        if self.pools and rng.random() < 0.7:
            seen = self._seen(rng)
            source, target = seen.modality, self._other_than(seen.modality, rng)
            if possible and (linked := self._linked(source, target)):
                seen = rng.choice(linked)
            content = seen.content
        else:
            wish = self._wish(rng, plain=0.8)
            source, content, words = wish.modality, wish.content, wish.words
            target = self._other_than(source, rng)
            made = self.wishes[target].of(self.wishes[source].named(content), rng)
            if possible and made is None and (known := self._known([source, target], rng)):
                words, (content, _) = with_article(known[0]), known[1]
            opening = self.ask_for(source, content, words, rng).messages
        wordings = INTO[target]
        if seen is not None and rng.random() < 0.55:
            wordings = INTO_FROM[source, target]
        asked = user(typed(rng.choice(wordings), rng), seen, last=rng.random() < 0.5)
        name = self.wishes[source].named(content)
        wanted = self.wishes[target].of(name, rng)
        if wanted is None:
            reply = told(f"I do not know what {with_article(name)} {'sounds' if target == 'audio' else 'looks'} like.")
        else:
            reply = self.answer((target, wanted))
        return Conversation([*opening, asked, reply])

    def _other_than(self, source: str, rng: random.Random) -> str:
        return rng.choice([modality for modality in self.modalities if modality != source])

    def _linked(self, source: str, target: str) -> list[Seen]:
        """The media of the pool whose thing can be made in the other modality."""
        if (source, target) not in self.linked:
            named, of, rng = self.wishes[source].named, self.wishes[target].of, random.Random(0)
            names = {name: of(name, rng) is not None for name in {named(seen.content) for seen in self.pools[source]}}
            self.linked[source, target] = [seen for seen in self.pools[source] if names[named(seen.content)]]
        return self.linked[source, target]

    def _cannot(self, rng: random.Random) -> Conversation:
        """Something that cannot be made, and what can."""
        kind = rng.choice([kind for kind in CANNOT if kind not in self.wishes])
        name = self._wish(rng, plain=1.0)
        thing = self.wishes[name.modality].named(name.content)
        asked = rng.choice(CANNOT[kind]).format(x=with_article(thing), n=thing)
        able = " and ".join(CANNOT_NOUN[modality] for modality in self.wishes)
        able = able.replace(" and ", ", ", len(self.wishes) - 2) if len(self.wishes) > 2 else able
        return Conversation(
            [
                user(typed(asked, rng)),
                told(f"I cannot make {CANNOT_NOUN[kind]}. I can make {able}, or answer in words."),
            ]
        )

    def _plain(self, rng: random.Random) -> str:
        kind = rng.random()
        if kind < 0.4:
            return rng.choice(self_prompts())
        if kind < 0.52:
            return typed(rng.choice(PLAIN_FIXED), rng)
        if kind < 0.68:
            return typed(self._small_talk(rng), rng)
        label, other = (self.wishes[wish.modality].named(wish.content) for wish in (self._wish(rng), self._wish(rng)))
        form = rng.choice(PLAIN)
        return typed(form.format(x=with_article(label), n=label, p=plural(label), q=plural(other)), rng)

    def _small_talk(self, rng: random.Random) -> str:
        """A greeting, a farewell, a word of thanks, or two of these."""
        said = []
        for kinds in rng.choice([(GREET,), (PART,), (REPLY,), (SMALL,), (GREET, SMALL), (REPLY, PART), (REPLY, SMALL)]):
            words = rng.choice(kinds)
            called = rng.choice(NAMES) if kinds in (GREET, PART, REPLY) else ""
            said.append(words + (rng.choice([",", ""]) if called else "") + called + rng.choice(["", ".", "!", "."]))
        if said[0][-1].isalnum() and len(said) > 1:
            said[0] += rng.choice([",", ".", "!"])
        if rng.random() < 0.15:
            said[-1] = said[-1].rstrip(".!") + rng.choice(["?", " :)", "...", "!!"])
        return " ".join(said)

    def _talk(self, rng: random.Random) -> Conversation:
        return Conversation([user(self._plain(rng))], words=True)

    def _talked(self, rng: random.Random) -> list[Message]:
        """One or two turns of plain talk, as the LLM itself answered them."""
        turns: list[Message] = []
        for asked, answered in rng.sample(self.answers, min(len(self.answers), rng.choice([1, 1, 2]))):
            turns += [user(asked), told(answered)]
        return turns

    def _talk_after(self, rng: random.Random) -> Conversation:
        """A plain question after a medium was made or asked about, or after talk: the answer is of words again."""
        kind = rng.random()
        if kind < 0.3:
            before = self._talked(rng)
        else:
            before = self._make(rng).messages if kind < 0.7 or not self.pools else self._asked(rng)
        return Conversation([*before, user(self._plain(rng))], words=True)

    def _media_after(self, rng: random.Random) -> Conversation:
        """A request for a medium, or a question about one, after talk."""
        asks = self._ask_about if self.pools else self._make
        make = rng.choices([self._make, asks, self._change], [0.6, 0.25, 0.15])[0]
        return Conversation([*self._talked(rng), *make(rng).messages])


def typed(text: str, rng: random.Random) -> str:
    """As people type: mostly well, sometimes without capitals or with a slip."""
    kind = rng.random()
    if kind < 0.35:
        return text[:1].upper() + text[1:]
    if kind < 0.5:
        return text.lower()
    if kind < 0.54 and len(text) > 12:
        place = rng.randrange(1, len(text) - 1)
        if text[place : place + 2].isalpha():
            return text[:place] + text[place + 1] + text[place] + text[place + 2 :]
    return text


@cache
def self_prompts() -> tuple[str, ...]:
    """The plain questions of `magpie`, as shipped with the recipes."""
    text = files("anygen.training").joinpath("words/self_prompts.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line)
