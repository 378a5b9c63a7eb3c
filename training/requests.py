"""Conversations to learn from: free-form requests for pictures, questions about pictures, and plain talk.

Everything is drawn from a seeded generator, so that example number n is the same in every process. A conversation is
a list of messages whose media are indices into a pool of pictures, and for each drawn picture the caption whose
condition the run has to reach. The phrasings of `anygen eval` are other ones, written independently of these.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

from anygen.errors import ConfigError
from anygen.messages import MediaPart, Message, TextPart
from anygen.training.captions import (
    BACKGROUNDS,
    COLOURS,
    NUMBERS,
    Drawing,
    canonical,
    plural,
    random_drawing,
    said,
    subject,
    varied,
    with_article,
)
from anygen.training.icons import SCENES, TRAINED_STYLES, Concept

_WORDS_OF = {background: words for words, background in BACKGROUNDS.items()}

ASK = (
    "draw", "Draw", "please draw", "can you draw", "could you draw", "draw me", "show me", "show", "paint",
    "paint me",
    "sketch", "make", "make me", "create", "generate", "produce", "design", "render", "illustrate", "give me",
    "I want",
    "I'd like", "I would like to see", "I need", "let me see", "can you show me", "could you please make",
    "please create",
    "would you draw", "can I see", "may I have", "I wish to see", "go ahead and draw", "now draw", "try to draw",
    "just",
    "how about", "what about", "let's see", "visualize", "depict", "quickly sketch", "send me", "we need",
)  # fmt: skip
NOUN = (
    "a picture of", "an image of", "a drawing of", "an icon of", "an illustration of", "a sketch of", "a painting of",
    "some art of", "a photo of", "a graphic of", "an emoji of", "a nice picture of", "one picture of", "the image of",
    "a cute drawing of", "artwork showing", "a picture with", "a picture that shows", "a little icon showing",
)  # fmt: skip
TAIL = (
    "", "", "", "", "", " please", ", please", ", thanks", " for me", " for my kid", " for my website", " now",
    ", would you?", " if you can", " for a card", ", thank you!", " for my blog", " right away",
    " for a presentation",
)  # fmt: skip
WHOLE = (
    "{x}", "{x}, please", "picture: {x}", "image of {x}", "draw: {x}", "{x} - can you draw that?", "{X}.",
    "I have never seen {x}. Show me one.", "My daughter loves {x}. Can you draw it for her?",
    "For my presentation I need {x}.", "What would {x} look like? Draw it.", "Imagine {x} and draw it.",
    "Today I want to look at {x}", "Could I get {x}?", "Do you know how to draw {x}?", "Please visualise {x} for me.",
    "Surprise me with {x}!", "{X}? Show me!", "I was thinking of {x}. Paint it.", "Give us {x} on the screen.",
    "Hello! Please draw {x}.", "Hi, can you make {x}?", "It is raining and I am bored, draw me {x}.",
    "My teacher asked for a picture with {x}.", "Let there be {x}", "A picture with {x} in it, please.",
    "generate image {x}", "create an image: {x}", "i need an icon, {x}", "can u draw {x}", "pls draw {x}",
    "Would it be possible to see {x}?", "Make a sticker with {x}.", "Put {x} into a picture.", "Illustrate this: {x}",
    "Produce artwork. Subject: {x}.", "The picture should show {x}.", "I'd love to see {x}!", "{x}, drawn",
)  # fmt: skip
PAIR = (
    "Draw {x} and then {y}.", "Show me {x}, then show me {y}.", "I want two pictures: {x} and {y}.",
    "First {x}, after that {y}.", "Make one picture of {x} and another one of {y}.", "Draw {x}. Also draw {y}.",
    "Please create a picture of {x} and a separate picture of {y}.", "Can you draw {x} and also {y}, each by itself?",
    "Two images please, one with {x}, one with {y}.", "paint {x}, and next {y}", "{X} first and {y} second, please.",
    "Give me a drawing of {x} followed by a drawing of {y}.", "draw both: {x} and {y}",
    "Let me see {x} and then {y}.",
)  # fmt: skip
NAME_IT = (
    "What is this?", "what is it", "What do you see?", "What is shown here?", "Name this.", "Identify the object.",
    "What's in the picture?", "Can you tell me what this is?", "What does the image show?", "Which thing is this?",
    "Do you recognise this?", "What am I looking at?", "Tell me what is in this image.", "What is that called?",
    "and this?",
    "Look at this. What is it?", "Who or what is this?", "Please name the thing in this picture.", "what's this", "",
)  # fmt: skip
DESCRIBE = (
    "Describe this picture.", "Describe the image.", "Write a caption.", "Give me a caption for this.",
    "What does this picture look like?", "Tell me everything about this image.", "Explain what you see in detail.",
    "Caption this image, please.", "How would you describe this?", "Describe it with style and background.",
)  # fmt: skip
ASK_STYLE = (
    "Which style is this drawn in?",
    "What is the style of this picture?",
    "In what style is it drawn?",
    "style?",
)
ASK_GROUND = (
    "What is the background?", "What colour is the background?", "Where is it?", "What is behind it?",
    "Which background does the picture have?", "What color is behind the object?",
)  # fmt: skip
ASK_COUNT = (
    "How many are there?",
    "How many things are in the picture?",
    "Count them.",
    "how many?",
    "How many do you see?",
)
AGAIN = (
    "Draw this again", "Draw the same thing", "Make me another one of these", "Redraw this", "Draw it once more",
    "Show me one like this", "Now you draw it", "Can you draw this", "Make a picture like this", "Draw what you see",
)  # fmt: skip
CHANGE_THING = (
    "now make it {x}", "Now draw {x} instead.", "Change it to {x}.", "And now {x}?", "Make it {x}", "now {x}",
    "Replace it with {x}.", "I would rather have {x}.", "Can it be {x} instead?", "the same but with {x}",
)  # fmt: skip
CHANGE_STYLE = (
    "now in the {s} style", "Make it {s}.", "Can I have it in {s} style?", "Use the {s} style instead.",
    "and in {s}?",
)  # fmt: skip
CHANGE_GROUND = (
    "now put it {b}", "Place it {b}.", "Same thing {b}, please.", "Can it be {b}?", "and {b}?",
    "Change the background: {b}",
)  # fmt: skip
CHANGE_COUNT = ("now {n} of them", "Draw {n}.", "Make it {n}.", "I want {n} of these.", "and with {n}?")
CANNOT = {
    "video": (
        ("Make a video of {x}.", "Show me a clip of {x} moving.", "Animate {x}.", "I want a short film with {x}."),
        "I cannot make videos yet. I can draw {x} for you, or answer in words.",
    ),
    "audio": (
        ("Let me hear {x}.", "Play the sound of {x}.", "What does {x} sound like? Play it.", "Make a noise like {x}."),
        "I cannot make sounds yet. I can draw {x} for you, or answer in words.",
    ),
}

PLAIN = (
    "What is {x}?", "Tell me a fact about {p}.", "Where can I buy {x}?", "Why do people like {p}?",
    "Write a poem about {p}.",
    "How much does {x} cost?", "How do you spell {n}?", "Translate {n} into French.", "What is the history of {p}?",
    "Write a short story about {x}.", "What rhymes with {n}?", "Is {x} dangerous?", "How do I learn to draw {p}?",
    "Who was the first person to paint {p}?", "What is the plural of {n}?", "Give me three facts about {p}.",
    "Explain {p} to a child.", "What colours do artists use for {p}?", "Compare {p} and {q}.",
    "What is {x} used for?",
    "How are {p} made?", "Which is better, {p} or {q}?", "List five words about {p}.", "Can you define {n}?",
    "What do {p} and {q} have in common?", "Do you like {p}?", "Have you ever seen {x}?", "What does {n} mean?",
    "I have {x} at home.", "My friend has {x}.", "I drew {x} yesterday.", "I saw a picture of {x} today.",
    "What makes a good picture of {x}?", "How can I take better photos of {p}?", "Which painter is famous for {p}?",
    "Describe {x} in words.", "Tell me about {p} without any picture.", "Write an essay on {p}.",
    "Give me a recipe with {p}.",
)  # fmt: skip
PLAIN_FIXED = (
    "Hello!", "Hi", "Hey there", "Good morning", "How are you?", "Who are you?", "What can you do?", "Thanks!",
    "Thank you.",
    "Bye", "See you later", "What is the capital of France?", "What is the capital of Japan?", "What is 2 + 2?",
    "What is 17 times 3?", "Tell me a joke.", "What is your name?", "Who wrote Hamlet?", "What is gravity?", "ok",
    "How far is the moon?", "What day comes after Monday?", "Write a haiku.", "I am tired.", "I feel sad today.",
    "Can you help me?", "What is photosynthesis?", "Why is the sky blue?", "What is the largest ocean?", "yes", "no",
    "Write a Python function that adds two numbers.", "Solve x + 3 = 7.", "Summarise the plot of Romeo and Juliet.",
    "What should I cook tonight?", "Give me some advice.", "How old is the earth?", "What is an LLM?", "Define love.",
    "Who painted the Mona Lisa?", "What is a good way to learn drawing?",
    "What is the difference between art and craft?",
    "Which colours mix to green?", "How does a camera work?", "What is a pixel?", "Who invented photography?",
    "Draw a conclusion from these facts: it rains and the street is wet.", "Paint dries slowly, why?",
    "Show me how to solve 3x = 12.", "Show your work: 12 * 12.",
    "Picture this: you win a million. What would you do?",
    "Make a list of fruits.", "Create a plan for my week.", "Generate three names for a cat.", "Give me a quote.",
    "Illustrate your point with an example in words.", "Sketch an outline for an essay.", "Design a workout plan.",
    "Make me laugh.", "Show me the way to Paris in words.", "Write a caption for my holiday.", "I need a friend.",
)  # fmt: skip

GREET = (
    "Hello", "Hi", "Hello there", "Good morning", "Good afternoon", "Good day",
    "Greetings", "Welcome back", "Howdy", "Yo", "Hiya", "Morning", "Evening",
)  # fmt: skip
PART = (
    "Bye", "Goodbye", "Bye bye", "Sleep well", "See you", "See you soon", "See you tomorrow", "So long",
    "Talk to you later", "Have a nice day", "Have a good one", "Take care", "Until next time", "Good bye for now",
    "I have to go", "I am off to bed", "That is all for today", "Catch you later", "Farewell", "Enjoy your evening",
)  # fmt: skip
REPLY = (
    "Thanks", "Thank you", "Thank you so much", "Great", "Nice", "Cool", "Wow", "Perfect", "Well done",
    "Good job", "I see", "Okay", "Fine", "Sure", "Right", "Never mind", "Sorry", "Yes please", "No thanks", "Maybe",
    "I like it", "That is beautiful", "I love it", "Not bad", "Really", "You are welcome", "Congratulations", "Oh",
    "What do you mean", "Why", "Who", "Tell me more", "Go on", "I don't know", "I understand", "That was fun",
)  # fmt: skip
SMALL = (
    "How are you today", "What's up", "Nice to meet you", "How was your day",
    "Are you there", "Do you have a name", "Where are you from",
    "What are you doing", "Can we talk", "I am bored", "I am happy", "I am hungry", "It is late", "It is raining",
    "I had a long day", "Do you sleep", "What do you like", "Can you keep a secret", "Tell me about yourself",
    "What languages do you speak", "I missed you", "Long time no see", "Do you know me", "My name is Sam",
)  # fmt: skip
NAMES = ("", "", "", "", " friend", " my friend", " everyone", " anygen", " Anna", " Tom", " buddy", " again")


@dataclass(frozen=True, slots=True)
class PoolPicture:
    """A picture of the pool that questions are asked about."""

    index: int
    """Its row in the pool of encoded pictures."""
    concept: int
    drawing: Drawing


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that end with the answer to be learned, or with a question that words answer."""

    messages: list[Message]
    """Media in user messages are pool rows; in answers, captions."""
    words: bool = False
    """Whether to learn only that the answer is one of words: the messages end with the question."""


def user(text: str, picture: PoolPicture | None = None, *, picture_last: bool = False) -> Message:
    """A user's turn, its picture before or behind the words."""
    words = (TextPart(text),) if text else ()
    media = (MediaPart("image", picture.index),) if picture else ()  # type: ignore[arg-type]
    return Message("user", words + media if picture_last else media + words)


def answer(*parts: str | Drawing) -> Message:
    """The assistant's turn; a drawing becomes a run whose target is its canonical caption."""
    made = [
        TextPart(part) if isinstance(part, str) else MediaPart("image", canonical(part))  # type: ignore[arg-type]
        for part in parts
    ]
    return Message("assistant", tuple(made))


def here(drawing: Drawing) -> str:
    """'Here is a red apple.', 'Here are two dogs, in the flat style.'"""
    return f"Here {'is' if drawing.count == 1 else 'are'} {canonical(drawing)}."


MIXTURE = {
    "draw": 0.36,
    "draw_two": 0.06,
    "ask": 0.24,
    "again": 0.05,
    "change": 0.08,
    "cannot": 0.02,
    "talk": 0.13,
    "talk_after": 0.04,
    "media_after": 0.02,
}
"""Kind of conversation -> share."""


class Conversations:
    """An endless, indexable supply of conversations.

    Args:
        concepts: what can be drawn.
        pool: pictures to ask about.
        seed: every seed has its own conversations.
        mixture: kind -> weight, in place of `MIXTURE`.
        answers: plain question -> the LLM's own answer, for conversations that go on after one; without any, they
            start with what was drawn or seen.

    Raises:
        ConfigError: a kind of `mixture` does not exist.
    """

    def __init__(
        self,
        concepts: Sequence[Concept],
        pool: Sequence[PoolPicture],
        seed: int,
        mixture: Mapping[str, float] | None = None,
        answers: Mapping[str, str] | None = None,
    ) -> None:
        self.concepts, self.pool, self.seed = concepts, pool, seed
        self.answers = list((answers or {}).items())
        self.mixture = dict(MIXTURE if mixture is None else mixture)
        if unknown := sorted(set(self.mixture) - set(MIXTURE)):
            raise ConfigError(f"unknown kinds of conversation: {', '.join(unknown)}; known: {', '.join(MIXTURE)}")
        self.forms: dict[str, Callable[[random.Random], Conversation]] = {
            "draw": self._draw,
            "draw_two": self._draw_two,
            "ask": self._ask_about,
            "again": self._draw_again,
            "change": self._change,
            "cannot": self._cannot,
            "talk": self._talk,
            "talk_after": self._talk_after,
            "media_after": self._media_after,
        }

    def __getitem__(self, number: int) -> Conversation:
        rng = random.Random(f"{self.seed}/{number}")
        form = rng.choices(list(self.mixture), list(self.mixture.values()))[0]
        return self.forms[form](rng)

    def _concept(self, rng: random.Random) -> Concept:
        return rng.choice(self.concepts)

    def _wish(self, rng: random.Random, *, plain: float = 0.45) -> tuple[Drawing, str]:
        """What to draw, stated in full, and a user's words for it, perhaps with an alias."""
        concept = self._concept(rng)
        drawing = random_drawing(concept, rng.choice(TRAINED_STYLES), rng)
        if rng.random() < plain:
            drawing = Drawing(label=concept.label, style=drawing.style if rng.random() < 0.5 else None)
        else:
            drawing = replace(said(drawing, concept, rng, open_style=0.4), label=concept.label)
        spoken = replace(drawing, label=rng.choice([concept.label, concept.label, *concept.aliases]))
        words = canonical(spoken) if rng.random() < 0.45 else varied(spoken, rng)
        return drawing, words

    def _request(self, words: str, rng: random.Random) -> str:
        if rng.random() < 0.4:
            text = rng.choice(WHOLE).format(x=words, X=words[:1].upper() + words[1:])
        else:
            noun = rng.choice(NOUN) + " " if rng.random() < 0.45 and not words.startswith(_NOUNS) else ""
            text = f"{rng.choice(ASK)} {noun}{words}{rng.choice(TAIL)}"
            text += rng.choice(["", "", ".", ".", "!", "?"]) if text[-1].isalnum() else ""
        return _typed(text, rng)

    def ask_for(self, drawing: Drawing, rng: random.Random) -> Conversation:
        """A request for that drawing, in its canonical words or in others, and the answer."""
        words = canonical(drawing) if rng.random() < 0.5 else varied(drawing, rng)
        return Conversation([user(self._request(words, rng)), answer(here(drawing), drawing)])

    def free_request(self, rng: random.Random) -> Conversation:
        """A request for one or two pictures or a changed one, without pictures in it, and the answer."""
        make = rng.choices([self._draw, self._draw_two, self._change], [0.7, 0.15, 0.15])[0]
        return make(rng)

    def _draw(self, rng: random.Random) -> Conversation:
        drawing, words = self._wish(rng)
        asked = user(self._request(words, rng))
        return Conversation([asked, answer(here(drawing), drawing)])

    def _draw_two(self, rng: random.Random) -> Conversation:
        (first, x), (second, y) = self._wish(rng, plain=0.7), self._wish(rng, plain=0.7)
        text = _typed(rng.choice(PAIR).format(x=x, y=y, X=x[:1].upper() + x[1:]), rng)
        told = (here(first), first, " And " + here(second).replace("Here", "here", 1), second)
        return Conversation([user(text), answer(*told)])

    def _ask_about(self, rng: random.Random) -> Conversation:
        return Conversation(self._seen(rng, rng.choice(self.pool)))

    def _seen(self, rng: random.Random, picture: PoolPicture) -> list[Message]:
        drawing = picture.drawing
        kinds = ["name", "name", "name", "describe", "style", "ground", "count"]
        kind = rng.choice(kinds)
        ground = _WORDS_OF[drawing.background or "white"]
        if kind == "name":
            asked, told = rng.choice(NAME_IT), f"This is {subject(Drawing(label=drawing.label))}."
            if drawing.count > 1:
                told = f"These are {subject(Drawing(label=drawing.label, count=drawing.count))}."
        elif kind == "describe":
            asked = rng.choice(DESCRIBE)
            told = f"{'This is' if drawing.count == 1 else 'These are'} {canonical(drawing)}."
        elif kind == "style":
            asked, told = rng.choice(ASK_STYLE), f"It is drawn in the {drawing.style} style."
        elif kind == "ground":
            asked, told = rng.choice(ASK_GROUND), f"It is {ground}."
        else:
            there = subject(Drawing(label=drawing.label, count=drawing.count))
            there = f"one {drawing.label}" if drawing.count == 1 else there
            asked, told = rng.choice(ASK_COUNT), f"There {'is' if drawing.count == 1 else 'are'} {there}."
        return [user(_typed(asked, rng), picture, picture_last=rng.random() < 0.5), answer(told)]

    def _draw_again(self, rng: random.Random) -> Conversation:
        picture = rng.choice(self.pool)
        wanted, words = picture.drawing, rng.choice(AGAIN)
        if rng.random() < 0.7:
            wanted, change = self._changed(rng, replace(wanted, place=None, size=None))
            words = f"{words}, {change}" if rng.random() < 0.6 else f"{words}. {change}"
        asked = user(_typed(words, rng), picture, picture_last=rng.random() < 0.5)
        return Conversation([asked, answer(here(wanted), wanted)])

    def _changed(self, rng: random.Random, drawing: Drawing) -> tuple[Drawing, str]:
        kind = rng.choice(["style", "ground", "count"])
        if kind == "style":
            style = rng.choice(TRAINED_STYLES)
            return replace(drawing, style=style), rng.choice(CHANGE_STYLE).format(s=style)
        if kind == "ground":
            ground = rng.choice([*COLOURS, *SCENES])
            return replace(drawing, background=ground), rng.choice(CHANGE_GROUND).format(b=_WORDS_OF[ground])
        count = rng.choice([2, 3, 4])
        return replace(drawing, count=count), rng.choice(CHANGE_COUNT).format(n=NUMBERS[count])

    def _change(self, rng: random.Random) -> Conversation:
        drawing, words = self._wish(rng, plain=0.7)
        drawing = replace(drawing, place=None, size=None)
        opening = [user(self._request(words, rng)), answer(here(drawing), drawing)]
        if rng.random() < 0.5:
            other = self._concept(rng)
            wanted = replace(drawing, label=other.label)
            name = rng.choice([other.label, *other.aliases])
            change = rng.choice(CHANGE_THING).format(x=subject(replace(wanted, label=name)))
        else:
            wanted, change = self._changed(rng, drawing)
        return Conversation([*opening, user(_typed(change, rng)), answer(here(wanted), wanted)])

    def _cannot(self, rng: random.Random) -> Conversation:
        asks, told = CANNOT[rng.choice(sorted(CANNOT))]
        concept = self._concept(rng)
        name = with_article(concept.label)
        return Conversation([user(_typed(rng.choice(asks).format(x=name), rng)), answer(told.format(x=name))])

    def _plain(self, rng: random.Random) -> str:
        kind = rng.random()
        if kind < 0.4:
            return rng.choice(self_prompts())
        if kind < 0.52:
            return _typed(rng.choice(PLAIN_FIXED), rng)
        if kind < 0.68:
            return _typed(self._small_talk(rng), rng)
        label, other = self._concept(rng).label, self._concept(rng).label
        form = rng.choice(PLAIN)
        return _typed(form.format(x=with_article(label), n=label, p=plural(label), q=plural(other)), rng)

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
        for asked, told in rng.sample(self.answers, min(len(self.answers), rng.choice([1, 1, 2]))):
            turns += [user(asked), answer(told)]
        return turns

    def _talk_after(self, rng: random.Random) -> Conversation:
        """A plain question after a picture was drawn or asked about, or after talk: the answer is of words again."""
        kind = rng.random()
        if kind < 0.3:
            before = self._talked(rng)
        else:
            before = self._draw(rng).messages if kind < 0.7 else self._seen(rng, rng.choice(self.pool))
        return Conversation([*before, user(self._plain(rng))], words=True)

    def _media_after(self, rng: random.Random) -> Conversation:
        """A request for a picture, or a question about one, after talk."""
        make = rng.choices([self._draw, self._ask_about, self._change], [0.6, 0.25, 0.15])[0]
        return Conversation([*self._talked(rng), *make(rng).messages])


# "a picture of a flat icon of a dog" reads badly: phrases that are pictures already take no second noun.
_NOUNS = ("a picture", "a drawing", "an icon", "an image", "an illustration") + tuple(
    f"a {style} {noun}" for style in TRAINED_STYLES for noun in ("picture", "drawing", "icon", "image", "illustration")
)


def _typed(text: str, rng: random.Random) -> str:
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
